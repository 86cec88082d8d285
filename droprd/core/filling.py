"""When will the disk be full, at the rate of the last ten minutes? Values in, values out.

Other programs fill a disk too: what counts is how its free space shrinks, whoever does it. Nothing
is said before there are five minutes to judge by, nor while the space does not shrink.
"""

from __future__ import annotations

from collections import deque

EVERY_S = 10.0
SPAN_S = 600.0
SPAN_MIN_S = 300.0


class Filling:
    """Looks at the free space now and then; `full_in_s` is None while nothing can be said."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque()
        self.full_in_s: int | None = None

    def look(self, at_s: float, free_bytes: int) -> None:
        """So much is free at `at_s` (monotonic). Calls within ten seconds change nothing."""
        looks = self._looks
        if looks and at_s - looks[-1][0] < EVERY_S:
            return
        looks.append((at_s, free_bytes))
        while at_s - looks[0][0] > SPAN_S:
            looks.popleft()
        span_s = at_s - looks[0][0]
        shrunk = looks[0][1] - free_bytes
        self.full_in_s = None
        if span_s >= SPAN_MIN_S and shrunk > 0:
            self.full_in_s = round(free_bytes / shrunk * span_s)
