"""In which order frames leave the journals: that of their stamps, boot by boot.

A round notes the boot-time clock and reads the journals *after* that. It takes frames stamped
before the note only: a frame that became visible later, though stamped before, belongs to a send
that had not returned at the note, so nothing promises its place before those taken now.

Frames of earlier boots come first, whatever their clock says, in the order of boots known to
`sender.log`; boots met for the first time (no daemon ran in them) follow those, in an order that
agrees with every journal: a journal that holds frames of two boots shows which came first. Our own
boot is last. Each journal keeps its own order always.

Pure.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Stamped(NamedTuple):
    """An item at the front of a source: when it was stamped, and how many bytes it counts."""

    boot_id: bytes
    boot_ns: int
    bytes: int


class BootOrder:
    """The order of boots, growing as unknown ones are met; our own stays last."""

    def __init__(self, known: Sequence[bytes], own: bytes) -> None:
        self.own = own
        self.known = [b for b in known if b != own]
        self.changed = not known or known[-1] != own
        self._rank = {b: i for i, b in enumerate(self.known)}

    def rank(self, boot_id: bytes) -> int:
        """Smaller is earlier."""
        if boot_id == self.own:
            return 1 << 62
        rank = self._rank.get(boot_id)
        if rank is None:
            rank = self._rank[boot_id] = len(self.known)
            self.known.append(boot_id)
            self.changed = True
        return rank

    def learn(self, journals: Iterable[Sequence[bytes]]) -> None:
        """Rank the boots not known yet, given the boots of each journal in that journal's order.

        Ranks must not be given as frames happen to be met: of two journals with frames of the
        same boot one may still have those of an earlier boot in front.
        """
        after: dict[bytes, set[bytes]] = {}
        for boots in journals:
            fresh = [b for b in boots if b != self.own and b not in self._rank]
            for index, boot in enumerate(fresh):
                after.setdefault(boot, set()).update(b for b in fresh[:index] if b != boot)
        while after:
            ready = [b for b, earlier in after.items() if not earlier & after.keys()]
            # Journals cannot contradict each other; if damage makes it seem so, any order will do.
            for boot in ready or list(after)[:1]:
                del after[boot]
                self.rank(boot)

    def all(self) -> list[bytes]:
        """Every boot, in order, our own last."""
        return [*self.known, self.own]


def in_order(
    sources: Sequence[Iterator[tuple[Stamped, T]]],
    boots: BootOrder,
    before_ns: int,
    bytes_max: int,
) -> Iterator[tuple[int, T]]:
    """(index of the source, item) in the order of a merge, until about `bytes_max` were given.

    Items of our own boot stamped at or after `before_ns` are not taken, nor what follows them in
    their source.
    """
    heap: list[tuple[int, int, int, T]] = []
    sizes: dict[int, int] = {}

    def refill(index: int) -> None:
        for stamped, item in sources[index]:
            if stamped.boot_id == boots.own and stamped.boot_ns >= before_ns:
                return
            heapq.heappush(heap, (boots.rank(stamped.boot_id), stamped.boot_ns, index, item))
            sizes[index] = stamped.bytes
            return

    for index in range(len(sources)):
        refill(index)
    taken = 0
    while heap and taken < bytes_max:
        _, _, index, item = heapq.heappop(heap)
        taken += sizes[index]
        yield index, item
        refill(index)
