"""Sorted, disjoint ranges of integers, each with a value.

`Spans` is how claims stay small: a million messages nacked in batches are a few thousand ranges.
Neighbours with equal values are joined. Ranges are half open: `first <= n < end`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

V = TypeVar("V")
Span = tuple[int, int, V]


class Spans(Generic[V]):
    """A map from integers to values, held as ranges; `count` is the number of integers in it."""

    __slots__ = ("_firsts", "_spans", "count")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._spans: list[Span[V]] = []
        self.count = 0

    def __len__(self) -> int:
        """The number of ranges (not of integers)."""
        return len(self._spans)

    def __iter__(self) -> Iterator[Span[V]]:
        return iter(self._spans)

    def first(self) -> int | None:
        """The smallest integer in the map, or None if it is empty."""
        return self._firsts[0] if self._firsts else None

    def add(self, first: int, end: int, value: V) -> None:
        """Put `first` to `end` into the map. Raises ValueError if any of it is there already."""
        if first >= end:
            raise ValueError(f"{first} to {end} is no range")
        firsts, spans = self._firsts, self._spans
        at = bisect_right(firsts, first)
        if (at and spans[at - 1][1] > first) or (at < len(spans) and firsts[at] < end):
            raise ValueError(f"{first} to {end} is there already")
        self.count += end - first
        if at < len(spans) and firsts[at] == end and spans[at][2] == value:
            end = spans[at][1]
            del firsts[at], spans[at]
        if at and spans[at - 1][1] == first and spans[at - 1][2] == value:
            spans[at - 1] = (firsts[at - 1], end, value)
            return
        firsts.insert(at, first)
        spans.insert(at, (first, end, value))

    def between(self, first: int, end: int) -> list[Span[V]]:
        """What of the map lies in `first` to `end`, in order."""
        low, high = self._touching(first, end)
        return [(max(a, first), min(b, end), v) for a, b, v in self._spans[low:high]]

    def cut(self, first: int, end: int) -> list[Span[V]]:
        """Take `first` to `end` out of the map; returns what was there, in order."""
        low, high = self._touching(first, end)
        if low == high:
            return []
        touched = self._spans[low:high]
        taken = [(max(a, first), min(b, end), v) for a, b, v in touched]
        rest: list[Span[V]] = []
        if touched[0][0] < first:
            rest.append((touched[0][0], first, touched[0][2]))
        if touched[-1][1] > end:
            rest.append((end, touched[-1][1], touched[-1][2]))
        self._spans[low:high] = rest
        self._firsts[low:high] = [a for a, _, _ in rest]
        self.count -= sum(b - a for a, b, _ in taken)
        return taken

    def covers(self, first: int, end: int) -> bool:
        """Whether every integer of `first` to `end` is in the map."""
        for a, b, _ in self.between(first, end):
            if a != first:
                return False
            first = b
        return first >= end

    def get(self, n: int) -> V | None:
        """The value at `n`, or None if it is not in the map."""
        at = bisect_right(self._firsts, n)
        if at and self._spans[at - 1][1] > n:
            return self._spans[at - 1][2]
        return None

    def _touching(self, first: int, end: int) -> tuple[int, int]:
        low = bisect_right(self._firsts, first)
        if low and self._spans[low - 1][1] > first:
            low -= 1
        return low, max(low, bisect_left(self._firsts, end))
