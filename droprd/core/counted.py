"""Counts of a worker that go on when its process is replaced: they never fall.

A process counts from 0. `told` adds what its predecessors had counted last; what was counted in
the last half second before a kill is missing, and nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

COUNTERS: Final = ("received",)
COUNTERS_BY_REASON: Final = ("refused",)


class Counted:
    """The counters of one worker, over all of its processes."""

    def __init__(self) -> None:
        self._generation = -1
        self._before: dict[tuple[str, str], int] = {}
        self._now: dict[tuple[str, str], int] = {}

    def told(self, generation: int, gauges: Mapping[str, Any]) -> dict[str, Any]:
        """`gauges` as told by that start of the worker, with counters over all starts."""
        if generation != self._generation:
            self._generation = generation
            self._before, self._now = self._totals(), {}
        for name in COUNTERS:
            self._take(name, "", gauges.get(name))
        for name in COUNTERS_BY_REASON:
            told = gauges.get(name)
            if isinstance(told, Mapping):
                for reason, count in told.items():
                    self._take(name, str(reason), count)
        result = dict(gauges)
        totals = self._totals()
        result.update({name: n for (name, reason), n in totals.items() if not reason})
        for name in COUNTERS_BY_REASON:
            if name in gauges or any(key[0] == name for key in totals):
                result[name] = {r: n for (key, r), n in totals.items() if key == name}
        return result

    def _take(self, name: str, reason: str, count: Any) -> None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            return
        self._now[name, reason] = max(count, self._now.get((name, reason), 0))

    def _totals(self) -> dict[tuple[str, str], int]:
        keys = [*self._before, *(key for key in self._now if key not in self._before)]
        return {key: self._before.get(key, 0) + self._now.get(key, 0) for key in keys}
