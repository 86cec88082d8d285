"""The words of claims: moments, waits, dead letters, and the operations that change them.

An operation is a msgpack array, its first element a number that never changes its meaning; a note
of a claims file is a list of them. `droprd.core.claims` gives them their effect. Pure values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Op = list[Any]
Range = tuple[int, int]

SNAPSHOT_VERSION = 1
REASON_ATTEMPTS = "max_attempts"
REASON_CORRUPT = "corrupt"
COUNTS = ("acked", "expired", "void", "purged", "buried", "lost")

(
    LEASE,
    ACK,
    NACK,
    REJECT,
    EXTEND,
    END,
    SETTLE,
    DEFER,
    KILL,
    REVIVE,
    FORGET,
    SNAPSHOT,
    SYNC_FAILED,
) = range(13)


class Now(NamedTuple):
    """One reading of the clocks. `held`: the wall clock is not to be believed at present."""

    boot_id: bytes
    boot_ns: int
    wall_ns: int
    held: bool = False


class Due(NamedTuple):
    """A moment: boot time within its boot, wall time after a reboot. No boot id: always reached."""

    boot_id: bytes
    boot_ns: int
    wall_ns: int

    def reached(self, now: Now) -> bool:
        if self.boot_id == now.boot_id:
            return now.boot_ns >= self.boot_ns
        return not self.boot_id or (not now.held and now.wall_ns >= self.wall_ns)


AT_ONCE = Due(b"", 0, 0)


def due_after(now: Now, delay_ns: int) -> Due:
    """The moment `delay_ns` from `now`."""
    if delay_ns <= 0:
        return AT_ONCE
    return Due(now.boot_id, now.boot_ns + delay_ns, now.wall_ns + delay_ns)


class Wait(NamedTuple):
    """Why a message waits: its attempts so far, when it may be leased, whether only by itself."""

    attempts: int
    due: Due
    alone: bool


class Dead(NamedTuple):
    """A dead letter: why, after how many attempts, and when (wall time, for people)."""

    reason: str
    attempts: int
    wall_ns: int


FRESH_WAIT = Wait(0, AT_ONCE, False)


def op_lease(consumer: bytes, boot_id: bytes, until_ns: int, ranges: Sequence[Range]) -> Op:
    """Lease waiting or fresh ranges; the lease gets the number `Claims.lease_next`."""
    return [LEASE, consumer, boot_id, until_ns, ranges]


def op_ack(lease: int, ranges: Sequence[Range]) -> Op:
    """Leased messages are done."""
    return [ACK, lease, ranges]


def op_nack(lease: int, ranges: Sequence[Range], due: Due, attempts_max: int, wall_ns: int) -> Op:
    """Leased messages go back until `due`; those out of attempts become dead letters."""
    return [NACK, lease, ranges, list(due), attempts_max, wall_ns]


def op_reject(lease: int, ranges: Sequence[Range], reason: str, wall_ns: int) -> Op:
    """Leased messages become dead letters."""
    return [REJECT, lease, ranges, reason, wall_ns]


def op_extend(lease: int, ranges: Sequence[Range], boot_id: bytes, until_ns: int) -> Op:
    """Leased messages move to a lease of their own, numbered `Claims.lease_next`."""
    return [EXTEND, lease, ranges, boot_id, until_ns]


def op_end(lease: int, attempts_max: int, wall_ns: int) -> Op:
    """A lease is over: what it left unsettled goes back, each to be leased alone, or dies."""
    return [END, lease, attempts_max, wall_ns]


def op_settle(ranges: Sequence[Range], how: str) -> Op:
    """Messages that nobody leased are done: `how` is one of `COUNTS` (expired, void, purged)."""
    return [SETTLE, ranges, how]


def op_defer(ranges: Sequence[Range], due: Due) -> Op:
    """Messages that were never leased wait until `due`."""
    return [DEFER, ranges, list(due)]


def op_kill(ranges: Sequence[Range], reason: str, wall_ns: int) -> Op:
    """Messages that nobody leased become dead letters."""
    return [KILL, ranges, reason, wall_ns]


def op_revive(ranges: Sequence[Range]) -> Op:
    """Dead letters are to be leased afresh, as if for the first time."""
    return [REVIVE, ranges]


def op_forget(below: int) -> Op:
    """The segments that held seqs before `below` are gone, their dead letters copied out."""
    return [FORGET, below]


def op_sync_failed() -> Op:
    """A sync of this file failed: nobody may trust it to hold more, until it is replaced."""
    return [SYNC_FAILED]
