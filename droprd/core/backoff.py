"""Backoff: how long to wait after the n-th failure in a row.

Exponential with full jitter: the wait after failure n is drawn evenly from 0 to
min(wait_max_s, wait_first_s · 2ⁿ⁻¹), so that many nodes that lost the same peer at the same
moment do not come back at the same moment. It is never given up: however many failures, there is
always a next try, at most `wait_max_s` away. The first wait is short (half a second on average),
so a connection that was cut and is back at once costs next to nothing.

Pure values: nothing here reads a clock or a generator of random numbers.
Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

WAIT_FIRST_S = 1.0
WAIT_MAX_S = 300.0

# Beyond this many doublings every cap in use is long reached; it keeps 2ⁿ a small number for ever.
_DOUBLINGS_MAX = 32

Rng = Callable[[], float]
"""Gives a number from 0 (included) to 1 (excluded)."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Failures in a row so far, and the bounds of the wait.

    Attributes:
        failures: how many failures there were since the last success.
        wait_first_s: the longest wait after the first failure, in seconds.
        wait_max_s: the longest wait after any failure, in seconds.
    """

    failures: int = 0
    wait_first_s: float = WAIT_FIRST_S
    wait_max_s: float = WAIT_MAX_S

    def failed(self) -> Backoff:
        """The backoff after one more failure."""
        return replace(self, failures=self.failures + 1)

    def succeeded(self) -> Backoff:
        """The backoff at its start again."""
        return replace(self, failures=0)

    def ceiling_s(self) -> float:
        """The longest wait that is possible now, in seconds; 0 without a failure."""
        if self.failures == 0:
            return 0.0
        doublings = min(self.failures - 1, _DOUBLINGS_MAX)
        return float(min(self.wait_max_s, self.wait_first_s * 2**doublings))

    def wait_s(self, rng: Rng) -> float:
        """How long to wait before the next try, in seconds: evenly from 0 to `ceiling_s()`."""
        return self.ceiling_s() * rng()
