"""Pace: how many bytes a peer may be sent at once, from the rate it was seen to take them.

The *window* is what may be on its way to one peer over all its requests together: about two
seconds' worth at the measured rate, so that an urgent frame never queues behind more than that.

- Until a rate was measured, and after an outage, the window is 1 byte, which means one frame: a
  request always takes at least one. From there the ceiling doubles with each accepted request that
  had filled the window and took less than two seconds: step by step, no burst into a line that has
  just come back.
- A broken transfer halves the window.
- The rate is measured as BBR does it: all that the peer accepted between the last answer before
  this request began and this request's answer, divided by that time. So requests that overlap are
  not counted twice, and the pauses of an idle peer do not count.
- Two seconds are meant beside the way there and back, which is known from greetings and tiny
  requests: a line over a satellite must be filled too.
- A request that did not fill the window says little about the line (it measured the delay): it
  may raise the rate, never lower it.

Source for the measurement: draft-cheng-iccrg-delivery-rate-estimation.
"""

from __future__ import annotations

from dataclasses import dataclass

from droprd.model import KIB, MIB

TARGET_S = 2.0
REQUEST_BYTES_MAX = 4 * MIB
ONE_FRAME = 1

_STEP_BYTES = 16 * KIB
_TRUSTED_S = 1.0
_ELAPSED_MIN_S = 0.0005
_TINY_BYTES = 2 * KIB
_DELAY_MAX_S = 2.0


@dataclass(slots=True)
class Flight:
    """One request under way: what must be remembered to measure the rate by its answer."""

    bytes: int
    full: bool
    started_s: float
    since_s: float
    delivered_before: int


class Pace:
    """The window of one peer.

    Args:
        requests_max: how many requests may be under way at once; bounds the window at the top.
    """

    def __init__(self, requests_max: int) -> None:
        self.rate: float | None = None
        self.in_flight_bytes = 0
        self._window_max = REQUEST_BYTES_MAX * max(1, requests_max)
        self._ceiling = ONE_FRAME
        self._flights = 0
        self._delivered = 0
        self._delivered_at_s = 0.0
        self._delay_s = _DELAY_MAX_S
        self._delay_known = False

    @property
    def window(self) -> int:
        """How many bytes may be under way in all; `ONE_FRAME` until a rate was measured."""
        if self.rate is None:
            return ONE_FRAME
        return max(ONE_FRAME, min(self._ceiling, int(self._target_s * self.rate), self._window_max))

    @property
    def _target_s(self) -> float:
        return TARGET_S + self._delay_s if self._delay_known else TARGET_S

    @property
    def left(self) -> int:
        """How many bytes of the window are free; below zero if urgent frames went over it."""
        return self.window - self.in_flight_bytes

    def started(self, size: int, now_s: float) -> Flight:
        """A request of `size` bytes begins; give the flight back when it ends."""
        if self._flights == 0:
            self._delivered_at_s = now_s
        self._flights += 1
        self.in_flight_bytes += size
        full = 2 * self.in_flight_bytes >= self.window
        return Flight(size, full, now_s, self._delivered_at_s, self._delivered)

    def ended(self, flight: Flight) -> None:
        """The request ended without being accepted; its bytes are no longer under way."""
        self._flights -= 1
        self.in_flight_bytes -= flight.bytes

    def accepted(self, flight: Flight, now_s: float) -> None:
        """The peer accepted the request: measure, and perhaps open the window by one step."""
        self.ended(flight)
        if flight.bytes <= _TINY_BYTES:
            self._delay_s = min(self._delay_s, now_s - flight.started_s)
            self._delay_known = True
        if flight.bytes == 0:
            return
        self._delivered += flight.bytes
        self._delivered_at_s = now_s
        elapsed_s = max(now_s - flight.since_s, _ELAPSED_MIN_S)
        sample = (self._delivered - flight.delivered_before) / elapsed_s
        if self.rate is None or sample > self.rate:
            self.rate = sample
        elif flight.full:
            # A long measurement of a full window is the truth; a short one may be a hiccup.
            weight = 1.0 if elapsed_s >= _TRUSTED_S else 0.5
            self.rate += weight * (sample - self.rate)
        if flight.full and elapsed_s < self._target_s:
            step = 2 * max(self._ceiling, flight.bytes, _STEP_BYTES)
            self._ceiling = min(step, self._window_max)

    def broken(self) -> None:
        """A transfer broke off half-way: smaller requests from now on."""
        self._ceiling = max(ONE_FRAME, min(self._ceiling, self.window) // 2)

    def shut(self) -> None:
        """The peer was out of reach: what the line carries is unknown again."""
        self.rate = None
        self._ceiling = ONE_FRAME
        self._delay_s, self._delay_known = _DELAY_MAX_S, False
