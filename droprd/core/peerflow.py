"""PeerFlow: whether, where and how much one peer may be sent now.

The state of the *line* to a peer is a literal table, every cell filled:

            ┌──────── failed / refused ────────┐
            │                                  ▼
          OPEN ◄── accepted ── PROBING ◄─── THROTTLED
                                  └── failed ──►┘       (a started request is the probe)

- THROTTLED waits: by backoff after a failure, or as long as the peer asked (`Retry-After`). When
  the wait is over, exactly one request may start: it is the probe, and decides.
- The wait is never given up, and no failure of the line counts as an attempt of a message.
- Hearing *from* the peer ends a backoff at once, but not a wait the peer asked for: a full disk
  does not keep it from sending. An operator's `retry` ends both.
- Requests that were under way when the line was throttled fail with it: one outage is one failure.
  If one of them is accepted after all, the line is open.
- An accepted frame sets the backoff to its start.

What an operator or the configuration says about a peer stands beside the line, as its *standing*:
unconfigured and paused stop everything, draining stops nothing (the queue must empty). So a
draining peer may well be throttled; `state` shows what keeps messages from flowing, in this order:
unconfigured, paused, throttled, probing, draining, open.

A peer's addresses are tried in order: one that cannot be reached gives way to the next at once;
only when all have failed does the peer wait.

Pure: `now_s` (monotonic seconds) and the generator of random numbers are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from droprd.core.backoff import Backoff, Rng
from droprd.core.pace import ONE_FRAME, REQUEST_BYTES_MAX, Flight, Pace
from droprd.model import PRIORITY_MAX

REQUESTS_IN_FLIGHT_MAX = 4
RETRY_AFTER_MAX_S = 3600.0
"""Longer waits than this are cut to it: a peer cannot switch itself off for ever by mistake."""


class Line(Enum):
    """The state of the line to a peer."""

    OPEN = "open"
    THROTTLED = "throttled"
    PROBING = "probing"


class Event(Enum):
    """What happened to the line."""

    STARTED = "a request was started"
    ACCEPTED = "the peer stored something, or answered a greeting"
    BROKEN = "an established transfer broke off"
    UNREACHABLE = "no request could be handed over, or the answer made no sense"
    REFUSED = "the peer asked to wait: 429, 503 or 507"
    LATE = "a request failed that began before the line was last throttled"
    HEARD = "the peer itself called"
    RETRY = "an operator wants a try now, or the peer was resumed"


class Act(Enum):
    """What a transition does besides changing the state."""

    FORGIVE = "set the backoff to its start"
    END_BACKOFF = "end a wait by backoff"
    END_WAIT = "end any wait"
    WAIT = "count a failure and wait by backoff"
    WAIT_AS_ASKED = "wait as long as the peer asked"
    NEXT_ADDRESS = "try the next address at once, or wait by backoff if all have failed"
    HALVE = "halve the size of requests"
    SHUT = "the rate is unknown again"


_O, _T, _P = Line.OPEN, Line.THROTTLED, Line.PROBING

TRANSITIONS: Mapping[tuple[Line, Event], tuple[Line, tuple[Act, ...]] | None] = {
    (_O, Event.STARTED): (_O, ()),
    (_O, Event.ACCEPTED): (_O, (Act.FORGIVE,)),
    (_O, Event.BROKEN): (_T, (Act.HALVE, Act.WAIT)),
    (_O, Event.UNREACHABLE): (_T, (Act.SHUT, Act.NEXT_ADDRESS)),
    (_O, Event.REFUSED): (_T, (Act.WAIT_AS_ASKED,)),
    (_O, Event.LATE): (_O, ()),
    (_O, Event.HEARD): (_O, ()),
    (_O, Event.RETRY): (_O, ()),
    (_T, Event.STARTED): (_P, ()),
    (_T, Event.ACCEPTED): (_O, (Act.FORGIVE, Act.END_WAIT)),
    # No request of the newest epoch is under way while the line is throttled: all others are late.
    (_T, Event.BROKEN): None,
    (_T, Event.UNREACHABLE): None,
    (_T, Event.REFUSED): (_T, (Act.WAIT_AS_ASKED,)),
    (_T, Event.LATE): (_T, ()),
    (_T, Event.HEARD): (_T, (Act.FORGIVE, Act.END_BACKOFF)),
    (_T, Event.RETRY): (_T, (Act.FORGIVE, Act.END_WAIT)),
    # One probe at a time.
    (_P, Event.STARTED): None,
    (_P, Event.ACCEPTED): (_O, (Act.FORGIVE,)),
    (_P, Event.BROKEN): (_T, (Act.HALVE, Act.WAIT)),
    (_P, Event.UNREACHABLE): (_T, (Act.SHUT, Act.NEXT_ADDRESS)),
    (_P, Event.REFUSED): (_T, (Act.WAIT_AS_ASKED,)),
    (_P, Event.LATE): (_P, ()),
    (_P, Event.HEARD): (_P, (Act.FORGIVE,)),
    (_P, Event.RETRY): (_P, (Act.FORGIVE,)),
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What the next request may carry: about `bytes`, and one frame in any case.

    `urgent`: only the most urgent priority that waits may use it, because it takes the slot kept
    for that, goes beyond the window, or is the probe.
    """

    bytes: int
    urgent: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """Permission for one request; give it back when the request has ended."""

    priority: int
    address: int
    epoch: int
    flight: Flight


class PeerFlow:
    """The flow to one peer.

    Args:
        rng: gives numbers from 0 to 1 for the jitter.
        now_s: monotonic seconds.
        addresses: how many addresses the peer has.
        requests_max: how many requests may be under way at once. Of two and more, one is kept for
            a priority more urgent than all those under way.
        backoff: the bounds of the wait after failures.
    """

    def __init__(
        self,
        rng: Rng,
        now_s: float,
        *,
        addresses: int = 1,
        requests_max: int = REQUESTS_IN_FLIGHT_MAX,
        backoff: Backoff | None = None,
    ) -> None:
        self.line = Line.OPEN
        self.since_s = now_s
        self.last_error = ""
        self.last_accepted_s: float | None = None
        self.configured = True
        self.paused = False
        self.draining = False
        self._rng = rng
        self._addresses = max(1, addresses)
        self._requests_max = max(1, requests_max)
        self._backoff = backoff or Backoff()
        self._pace = Pace(self._requests_max)
        self._wait_until_s = now_s
        self._asked = False
        self._address = 0
        self._tried: set[int] = set()
        self._epoch = 0
        self._tickets: set[Ticket] = set()

    # What is shown.

    @property
    def state(self) -> str:
        """One word for people: what, if anything, keeps messages from flowing."""
        if not self.configured:
            return "unconfigured"
        if self.paused:
            return "paused"
        if self.line is Line.OPEN and self.draining:
            return "draining"
        return self.line.value

    @property
    def failures(self) -> int:
        """Failures in a row since something was last accepted."""
        return self._backoff.failures

    @property
    def rate(self) -> float | None:
        """Bytes per second the peer was last seen to accept; None if not measured."""
        return self._pace.rate

    @property
    def in_flight(self) -> int:
        """How many requests are under way."""
        return len(self._tickets)

    @property
    def stopped(self) -> bool:
        """Whether an operator or the configuration keeps all requests back."""
        return self.paused or not self.configured

    def next_try_s(self, now_s: float) -> float | None:
        """When the next request may start, in seconds from now; None if no wait decides that."""
        if self.stopped or self.line is not Line.THROTTLED:
            return None
        return max(0.0, self._wait_until_s - now_s)

    @property
    def address(self) -> int:
        """Index of the address that the next request goes to."""
        return self._address

    # Asking.

    def budget(self, now_s: float, priority: int, lanes_waiting: int) -> Budget | None:
        """What a request may carry, if one may start now; else None.

        Args:
            now_s: monotonic seconds.
            priority: the most urgent priority that waits.
            lanes_waiting: how many lanes have something to send: while there are more than one,
                the window is divided among several requests, so that the line is never idle
                between an answer and the next request.
        """
        if self.stopped or self.line is Line.PROBING:
            return None
        if self.line is Line.THROTTLED:
            return Budget(ONE_FRAME, urgent=True) if now_s >= self._wait_until_s else None
        under_way = len(self._tickets)
        share = self._share(lanes_waiting + under_way)
        if under_way == 0:
            return Budget(share)
        # Scraps of a window would make many tiny requests.
        roomy = self._pace.left >= max(ONE_FRAME, share // 2)
        if under_way < self._ordinary_slots() and roomy:
            return Budget(min(share, self._pace.left))
        if under_way < self._requests_max and all(priority < t.priority for t in self._tickets):
            return Budget(max(ONE_FRAME, min(share, self._pace.left)), urgent=True)
        return None

    def _ordinary_slots(self) -> int:
        return max(1, self._requests_max - 1)

    def _share(self, lanes: int) -> int:
        parts = max(1, min(self._ordinary_slots(), lanes))
        return max(ONE_FRAME, min(self._pace.window // parts, REQUEST_BYTES_MAX))

    # Telling.

    def start(self, now_s: float, priority: int = PRIORITY_MAX, size: int = 0) -> Ticket:
        """A request of `size` bytes begins; only after `budget` said so. Greetings have size 0."""
        self._apply(Event.STARTED, now_s)
        flight = self._pace.started(size, now_s)
        ticket = Ticket(priority, self._address, self._epoch, flight)
        self._tickets.add(ticket)
        return ticket

    def accepted(self, ticket: Ticket, now_s: float) -> None:
        """The peer answered well, or with a conflict: it can be worked with."""
        self._tickets.discard(ticket)
        self._pace.accepted(ticket.flight, now_s)
        self.last_error = ""
        self.last_accepted_s = now_s
        self._apply(Event.ACCEPTED, now_s)

    def failed(self, ticket: Ticket, now_s: float, error: str, *, broken: bool) -> None:
        """The request came to nothing. `broken`: the connection stood, and broke off."""
        self._end(ticket)
        if ticket.epoch != self._epoch:
            self._apply(Event.LATE, now_s)
            return
        self.last_error = error
        self._apply(Event.BROKEN if broken else Event.UNREACHABLE, now_s)

    def refused(
        self, ticket: Ticket, now_s: float, error: str, retry_after_s: float | None
    ) -> None:
        """The peer asked to wait; without saying how long, the backoff decides."""
        self._end(ticket)
        self.last_error = error
        if retry_after_s is None and ticket.epoch != self._epoch:
            self._apply(Event.LATE, now_s)
            return
        asked_s = None
        if retry_after_s is not None:
            asked_s = now_s + min(max(retry_after_s, 0.0), RETRY_AFTER_MAX_S)
        # A refusal is newer than whatever else was known: it throttles, late or not.
        self._apply(Event.REFUSED, now_s, asked_s)

    def cancelled(self, ticket: Ticket) -> None:
        """The request was given up by this side: nothing is known of the line."""
        self._end(ticket)
        if self.line is Line.PROBING and ticket.epoch == self._epoch:
            self.line = Line.THROTTLED

    def heard(self, now_s: float) -> None:
        """The peer itself called: it is there."""
        self._apply(Event.HEARD, now_s)

    def retry(self, now_s: float) -> None:
        """An operator wants a try now."""
        self._tried.clear()
        self._apply(Event.RETRY, now_s)

    # The table at work.

    def _end(self, ticket: Ticket) -> None:
        self._tickets.discard(ticket)
        self._pace.ended(ticket.flight)

    def _apply(self, event: Event, now_s: float, asked_until_s: float | None = None) -> None:
        cell = TRANSITIONS[self.line, event]
        if cell is None:
            raise RuntimeError(f"{event.name} cannot happen to a line that is {self.line.value}")
        line, acts = cell
        if line is not self.line:
            if Line.OPEN in (line, self.line):
                self.since_s = now_s  # a probe does not begin an outage anew
            self.line = line
            if line is Line.THROTTLED:
                # Whatever else is under way now belongs to this same outage.
                self._epoch += 1
        for act in acts:
            self._act(act, now_s, asked_until_s)

    def _act(self, act: Act, now_s: float, asked_until_s: float | None) -> None:
        if act is Act.FORGIVE:
            self._backoff = self._backoff.succeeded()
            self._tried.clear()
        elif act is Act.END_WAIT:
            self._asked = False
            self._wait_until_s = now_s
        elif act is Act.END_BACKOFF:
            if not self._asked:
                self._wait_until_s = now_s
        elif act is Act.WAIT:
            self._wait(now_s)
        elif act is Act.WAIT_AS_ASKED:
            if asked_until_s is None:
                self._wait(now_s)
            else:
                # Jitter on top, never below: all its peers were told the same second.
                until_s = asked_until_s + self._rng() * min(1.0, asked_until_s - now_s)
                self._wait_until_s = max(until_s, self._wait_until_s if self._asked else until_s)
                self._asked = True
        elif act is Act.NEXT_ADDRESS:
            self._next_address(now_s)
        elif act is Act.HALVE:
            self._pace.broken()
        elif act is Act.SHUT:
            self._pace.shut()

    def _wait(self, now_s: float) -> None:
        self._backoff = self._backoff.failed()
        self._asked = False
        self._wait_until_s = now_s + self._backoff.wait_s(self._rng)

    def _next_address(self, now_s: float) -> None:
        self._tried.add(self._address)
        untried = [i for i in range(self._addresses) if i not in self._tried]
        if untried:
            self._address = untried[0]
            self._asked = False
            self._wait_until_s = now_s
            return
        self._tried.clear()
        self._address = 0
        self._wait(now_s)
