"""Who has which message of one channel and priority: leases, acks, dead letters.

Every message has a *seq*, counted from 0. A seq is, at every moment, exactly one of

    fresh      at or after `fresh`: never touched
    waiting    touched and not leased: ready, or delayed until its `Due`
    leased     invisible to other consumers until settled, nacked, or the lease has ended
    dead       a dead letter with its reason, until its segment is deleted
    settled    below `fresh` and none of these: acked, expired, void, purged, or buried

The state changes by *operations* only, msgpack arrays that the constructors below make. A note of
the claims file is a list of operations; every process that applies the same notes has the same
state, so nothing in an operation depends on who reads it or when. A lease ends by an operation
too: whoever finds it over, or its consumer dead, writes that.

Guarantees: `apply` keeps the five sets disjoint and complete, whatever it is given, or raises
BadData; after BadData the state is worth nothing. Memory follows what is touched and not settled,
never the backlog. Nothing here looks at a clock: `now` is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Any

from droprd.core import claimops
from droprd.core.claimops import (
    AT_ONCE,
    COUNTS,
    FRESH_WAIT,
    REASON_ATTEMPTS,
    SNAPSHOT_VERSION,
    Dead,
    Due,
    Now,
    Op,
    Range,
    Wait,
)
from droprd.core.spans import Span, Spans
from droprd.errors import BadData


class Lease:
    """What one `receive()` leased from here and has not settled yet; values are attempts."""

    __slots__ = ("boot_id", "consumer", "open", "until_ns")

    def __init__(self, consumer: bytes, boot_id: bytes, until_ns: int) -> None:
        self.consumer = consumer
        self.boot_id = boot_id
        self.until_ns = until_ns
        self.open: Spans[int] = Spans()

    def over(self, now: Now) -> bool:
        """Whether its time has run out. A lease of another boot has ended."""
        return self.boot_id != now.boot_id or now.boot_ns >= self.until_ns


class Claims:
    """The state of one channel and priority, as far as its notes have been applied.

    `boot_id` is the boot of this process; it only chooses how delays are indexed.
    """

    def __init__(self, boot_id: bytes) -> None:
        self.boot_id = boot_id
        self.fresh = 0
        self.floor = 0
        self.lease_next = 1
        self.leases: dict[int, Lease] = {}
        self.dead: Spans[Dead] = Spans()
        self.ready: Spans[Wait] = Spans()
        self.delayed: Spans[Wait] = Spans()
        self.counts = dict.fromkeys(COUNTS, 0)
        self.leased = 0
        self.sync_failed = False
        self._heap: list[tuple[int, int, int]] = []  # delays of this boot: boot ns, first, end
        self._heap_wall: list[tuple[int, int, int]] = []  # of other boots: wall ns, first, end

    # Questions

    @property
    def waiting(self) -> int:
        """How many messages were touched and are not leased now."""
        return self.ready.count + self.delayed.count

    def lowest_open(self) -> int:
        """The smallest seq that is neither settled nor dead."""
        firsts = [self.ready.first(), self.delayed.first()]
        firsts += [lease.open.first() for lease in self.leases.values()]
        return min([self.fresh, *(f for f in firsts if f is not None)])

    def holds(self, lease: int, first: int, end: int, now: Now) -> bool:
        """Whether that lease is still good for all of `first` to `end`."""
        found = self.leases.get(lease)
        return found is not None and not found.over(now) and found.open.covers(first, end)

    def consumers(self) -> set[bytes]:
        """Who holds leases at present."""
        return {lease.consumer for lease in self.leases.values()}

    def overdue(self, now: Now) -> list[int]:
        """Leases whose time has run out and that no operation has ended yet."""
        return [number for number, lease in self.leases.items() if lease.over(now)]

    def leased_by(self, consumer: bytes) -> list[int]:
        """The numbers of the leases of one consumer."""
        return [n for n, lease in self.leases.items() if lease.consumer == consumer]

    def candidates(self, now: Now) -> Iterator[tuple[int, int | None, Wait]]:
        """What can be leased, in order of arrival: (first, end, wait); the last has no end.

        Do not change the state while iterating.
        """
        self._promote(now)
        yield from self.ready
        yield self.fresh, None, FRESH_WAIT

    def idle(self, first: int, end: int) -> list[Range]:
        """What of `first` to `end` is neither leased nor settled nor dead."""
        found = [(a, b) for a, b, _ in self.ready.between(first, end)]
        found += [(a, b) for a, b, _ in self.delayed.between(first, end)]
        if end > self.fresh:
            found.append((max(first, self.fresh), end))
        return sorted(found)

    def pieces(self) -> int:
        """How many ranges this state consists of: what a snapshot of it costs."""
        leased = sum(len(lease.open) for lease in self.leases.values())
        return len(self.ready) + len(self.delayed) + len(self.dead) + leased

    def offers(self, now: Now) -> bool:
        """Whether a message that was touched before can be leased again."""
        self._promote(now)
        return self.ready.count > 0

    def next_change_ns(self, now: Now) -> int | None:
        """Nanoseconds until a lease ends or a delay is over by itself, or None."""
        self._promote(now)
        moments = [lease.until_ns - now.boot_ns for lease in self.leases.values()]
        if self._heap:
            moments.append(self._heap[0][0] - now.boot_ns)
        if self._heap_wall and not now.held:
            moments.append(self._heap_wall[0][0] - now.wall_ns)
        return max(0, min(moments)) if moments else None

    # Changes

    def apply(self, ops: Sequence[Any]) -> None:
        """Apply the operations of one note, in order. Raises BadData if one is impossible."""
        try:
            for op in ops:
                _APPLY[op[0]](self, *op[1:])
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise BadData(
                "a note of a claims file cannot be applied",
                why=str(error),
                hint="run `droprctl fsck`",
            ) from error

    def snapshot(self) -> list[Op]:
        """Operations that make this state out of an empty one."""
        leases = [
            [n, lease.consumer, lease.boot_id, lease.until_ns, list(lease.open)]
            for n, lease in self.leases.items()
        ]
        waiting = [
            [first, end, wait.attempts, list(wait.due), wait.alone]
            for spans in (self.ready, self.delayed)
            for first, end, wait in spans
        ]
        dead = [[first, end, *why] for first, end, why in self.dead]
        counts = [[name, n] for name, n in self.counts.items() if n]
        state = [self.fresh, self.floor, self.lease_next, leases, waiting, dead, counts]
        return [[claimops.SNAPSHOT, SNAPSHOT_VERSION, *state]]

    def _apply_lease(
        self, consumer: bytes, boot_id: bytes, until_ns: int, ranges: Sequence[Range]
    ) -> None:
        lease = self._new_lease(consumer, boot_id, until_ns)
        for first, end in ranges:
            for a, b, wait in self._take(first, end):
                lease.open.add(a, b, wait.attempts + 1)
            self.leased += end - first

    def _apply_ack(self, number: int, ranges: Sequence[Range]) -> None:
        for first, end, _ in self._release(number, ranges):
            self.counts["acked"] += end - first

    def _apply_nack(
        self, number: int, ranges: Sequence[Range], due: Any, attempts_max: int, wall_ns: int
    ) -> None:
        self._back(self._release(number, ranges), _due(due), False, attempts_max, wall_ns)

    def _apply_reject(
        self, number: int, ranges: Sequence[Range], reason: str, wall_ns: int
    ) -> None:
        for first, end, attempts in self._release(number, ranges):
            self.dead.add(first, end, Dead(_text(reason), attempts, wall_ns))

    def _apply_extend(
        self, number: int, ranges: Sequence[Range], boot_id: bytes, until_ns: int
    ) -> None:
        consumer = self.leases[number].consumer
        pieces = self._release(number, ranges)
        lease = self._new_lease(consumer, boot_id, until_ns)
        for first, end, attempts in pieces:
            lease.open.add(first, end, attempts)
            self.leased += end - first

    def _apply_end(self, number: int, attempts_max: int, wall_ns: int) -> None:
        pieces = list(self.leases[number].open)
        del self.leases[number]
        self.leased -= sum(end - first for first, end, _ in pieces)
        self._back(pieces, AT_ONCE, True, attempts_max, wall_ns)

    def _apply_settle(self, ranges: Sequence[Range], how: str) -> None:
        for first, end in ranges:
            dead = self.dead.cut(first, end)
            at = first
            for a, b, _ in [*dead, (end, end, None)]:
                if at < a:
                    self._take(at, a)
                at = b
            self.counts[how] += end - first

    def _apply_defer(self, ranges: Sequence[Range], due: Any) -> None:
        for first, end in ranges:
            for a, b, wait in self._take(first, end):
                self._wait(a, b, wait._replace(due=_due(due)))

    def _apply_kill(self, ranges: Sequence[Range], reason: str, wall_ns: int) -> None:
        for first, end in ranges:
            for a, b, wait in self._take(first, end):
                self.dead.add(a, b, Dead(_text(reason), wait.attempts, wall_ns))

    def _apply_revive(self, ranges: Sequence[Range]) -> None:
        for first, end in ranges:
            for a, b, _ in self.dead.cut(first, end):
                self._wait(a, b, FRESH_WAIT)

    def _apply_forget(self, below: int) -> None:
        if below <= self.floor:
            return
        lost = sum(b - a for a, b, _ in self.ready.cut(0, below) + self.delayed.cut(0, below))
        for number, lease in list(self.leases.items()):
            gone = sum(b - a for a, b, _ in lease.open.cut(0, below))
            self.leased -= gone
            lost += gone
            if not lease.open.count:
                del self.leases[number]
        if below > self.fresh:
            lost += below - self.fresh
            self.fresh = below
        self.counts["lost"] += lost
        self.counts["buried"] += sum(b - a for a, b, _ in self.dead.cut(0, below))
        self.floor = below

    def _apply_snapshot(
        self, version: int, fresh: int, floor: int, lease_next: int, *state: Any
    ) -> None:
        if version != SNAPSHOT_VERSION:
            raise ValueError(f"its snapshot has the unknown version {version}")
        leases, waiting, dead, counts = state
        self.__init__(self.boot_id)  # type: ignore[misc]  # a snapshot begins again
        self.fresh, self.floor, self.lease_next = int(fresh), int(floor), int(lease_next)
        for number, consumer, boot_id, until_ns, spans in leases:
            lease = self.leases[number] = Lease(consumer, boot_id, until_ns)
            for first, end, attempts in spans:
                lease.open.add(first, end, attempts)
            self.leased += lease.open.count
        for first, end, attempts, due, alone in waiting:
            self._wait(first, end, Wait(attempts, _due(due), alone))
        for first, end, reason, attempts, wall_ns in dead:
            self.dead.add(first, end, Dead(_text(reason), attempts, wall_ns))
        for name, n in counts:
            self.counts[name] += n

    def _apply_sync_failed(self) -> None:
        self.sync_failed = True

    # Pieces of changes

    def _new_lease(self, consumer: bytes, boot_id: bytes, until_ns: int) -> Lease:
        lease = self.leases[self.lease_next] = Lease(bytes(consumer), bytes(boot_id), int(until_ns))
        self.lease_next += 1
        return lease

    def _take(self, first: int, end: int) -> list[Span[Wait]]:
        """Take a range out of what nobody has; fresh messages passed over become waiting ones."""
        if not 0 <= first < end:
            raise ValueError(f"{first} to {end} is no range")
        if first >= self.fresh:
            if first > self.fresh:
                self._wait(self.fresh, first, FRESH_WAIT)
            self.fresh = end
            return [(first, end, FRESH_WAIT)]
        middle = min(end, self.fresh)
        taken = self.ready.cut(first, middle)
        if sum(b - a for a, b, _ in taken) != middle - first:
            taken = sorted(taken + self.delayed.cut(first, middle))
            if sum(b - a for a, b, _ in taken) != middle - first:
                raise ValueError(f"not all of {first} to {middle} is waiting")
        if end > middle:
            taken.append((middle, end, FRESH_WAIT))
            self.fresh = end
        return taken

    def _release(self, number: int, ranges: Sequence[Range]) -> list[Span[int]]:
        """Take ranges out of a lease; the lease is gone with the last of them."""
        lease = self.leases[number]
        released: list[Span[int]] = []
        for first, end in ranges:
            pieces = lease.open.cut(first, end)
            if first >= end or sum(b - a for a, b, _ in pieces) != end - first:
                raise ValueError(f"not all of {first} to {end} is in lease {number}")
            self.leased -= end - first
            released += pieces
        if not lease.open.count:
            del self.leases[number]
        return released

    def _back(
        self, pieces: list[Span[int]], due: Due, alone: bool, attempts_max: int, wall_ns: int
    ) -> None:
        for first, end, attempts in pieces:
            if attempts >= attempts_max:
                self.dead.add(first, end, Dead(REASON_ATTEMPTS, attempts, wall_ns))
            else:
                self._wait(first, end, Wait(attempts, due, alone))

    def _wait(self, first: int, end: int, wait: Wait) -> None:
        if not wait.due.boot_id:
            self.ready.add(first, end, wait)
            return
        self.delayed.add(first, end, wait)
        if wait.due.boot_id == self.boot_id:
            heappush(self._heap, (wait.due.boot_ns, first, end))
        else:
            heappush(self._heap_wall, (wait.due.wall_ns, first, end))

    def _promote(self, now: Now) -> None:
        """Move what is due from `delayed` to `ready`. Only an index: both are waiting."""
        heap = self._heap
        while heap and (heap[0][0] <= now.boot_ns or not self._delays(heap[0])):
            self._ready(heappop(heap), now)
        heap = self._heap_wall
        while heap and ((heap[0][0] <= now.wall_ns and not now.held) or not self._delays(heap[0])):
            self._ready(heappop(heap), now)

    def _delays(self, entry: tuple[int, int, int]) -> bool:
        """Whether anything of a heap's entry still waits (it may have been taken since)."""
        return bool(self.delayed.between(entry[1], entry[2]))

    def _ready(self, entry: tuple[int, int, int], now: Now) -> None:
        for first, end, wait in self.delayed.between(entry[1], entry[2]):
            if wait.due.reached(now):
                self.delayed.cut(first, end)
                self.ready.add(first, end, wait._replace(due=AT_ONCE))


def _due(raw: Any) -> Due:
    boot_id, boot_ns, wall_ns = raw
    return Due(bytes(boot_id), int(boot_ns), int(wall_ns))


def _text(reason: Any) -> str:
    if not isinstance(reason, str):
        raise TypeError("a reason is text")
    return reason


_APPLY: dict[int, Callable[..., None]] = {
    claimops.LEASE: Claims._apply_lease,
    claimops.ACK: Claims._apply_ack,
    claimops.NACK: Claims._apply_nack,
    claimops.REJECT: Claims._apply_reject,
    claimops.EXTEND: Claims._apply_extend,
    claimops.END: Claims._apply_end,
    claimops.SETTLE: Claims._apply_settle,
    claimops.DEFER: Claims._apply_defer,
    claimops.KILL: Claims._apply_kill,
    claimops.REVIVE: Claims._apply_revive,
    claimops.FORGET: Claims._apply_forget,
    claimops.SNAPSHOT: Claims._apply_snapshot,
    claimops.SYNC_FAILED: Claims._apply_sync_failed,
}
