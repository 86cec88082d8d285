"""What one `receive()` may lease from one channel and priority.

`Stored` is a frame as it lies in an inbox, with what its entry says beside it: who sent it, its
seqs, when it expires, until when it is delayed, which of its messages are void. `choose` goes
through the messages in order of arrival and decides for each: lease it, settle it (void, expired),
put it off (delayed), bury it (corrupt), or pass over it (its sender is blocked).

Pure: claims and frames in, operations and picks out. Raises BadData for an entry that makes no
sense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from zlib import crc32

from droprd.core import claimops
from droprd.core import frame as frames
from droprd.core.claimops import REASON_CORRUPT, Due, Now, Op, Range, Wait
from droprd.core.claims import Claims
from droprd.core.entry import unpack_note
from droprd.core.frame import Buffer, Frame
from droprd.errors import BadData

FRAMES_A_LOOK = 2048  # so that a lock is never held for long
_NO_END = 1 << 62
_MS = 1_000_000

Read = Callable[[int], Iterator["Stored"]]


class Stored:
    """One frame of an inbox, or a hole where one was (`frame` None: its bytes are unreadable).

    `place` is (segment number, offset, end offset), for whoever sets damaged bytes aside. A hole
    without a place is a gap: seqs that were never given to a message. `arrived_wall_ns` is 0 where
    it is not known.
    """

    __slots__ = (
        "_unfit",
        "arrived_wall_ns",
        "bodies",
        "due",
        "end",
        "expires",
        "first",
        "frame",
        "place",
        "sender",
        "voids",
    )

    def __init__(self, first: int, end: int, place: tuple[int, int, int] | None = None) -> None:
        self.first = first
        self.end = end
        self.place = place
        self.frame: Frame | None = None
        self.sender = ""
        self.arrived_wall_ns = 0
        self.due: Due | None = None
        self.expires: Due | None = None
        self.voids: dict[int, str] = {}
        self.bodies: list[memoryview] | None = None
        self._unfit: dict[int, str] | None = None

    def unfit(self) -> dict[int, str]:
        """Why messages of this frame cannot be delivered, by index: `REASON_CORRUPT` or "void".

        After this, `bodies` are those of its messages; None for a blob, which is a file.
        """
        if self._unfit is None:
            frame = self.frame
            if frame is None:
                self._unfit = dict.fromkeys(range(self.end - self.first), REASON_CORRUPT)
                return self._unfit
            self._unfit = unfit = dict.fromkeys(self.voids, "void")
            if frame.info.is_blob:
                return unfit
            # As `Frame.bad_bodies`, but each body is cut out once for its checksum and its reader.
            bodies: list[memoryview] = []
            self.bodies = bodies
            data, voids = frame.data, self.voids
            at = frame.info.head_bytes
            for length, crc in zip(frame.lengths, frame.crcs, strict=True):
                body = data[at : at + length]
                if not voids or len(bodies) not in voids:
                    if crc32(body) != crc:
                        unfit[len(bodies)] = REASON_CORRUPT
                    at += length
                bodies.append(body)
        return self._unfit


def read_stored(note: Buffer, frame: memoryview, place: tuple[int, int, int]) -> Stored:
    """The frame of an inbox entry. Raises: BadData."""
    try:
        beside = unpack_note(note)
        voids = {int(index): str(reason) for index, reason in beside.get("v", ())}
        parsed = frames.parse(frame, voids)
        first = int(beside["q"])
        stored = Stored(first, first + parsed.count, place)
        stored.frame = parsed
        stored.sender = str(beside["p"])
        stored.arrived_wall_ns = int(beside.get("w", 0))
        stored.voids = voids
        info = parsed.info
        if info.ttl_ms or info.delay_ms:
            boot_id, boot_ns, wall_ns = bytes(beside["b"]), int(beside["t"]), int(beside["w"])
            elapsed_ms = int(beside.get("e", 0))
            if info.ttl_ms:
                left = max(0, info.ttl_ms - elapsed_ms) * _MS
                stored.expires = Due(boot_id, boot_ns + left, wall_ns + left)
            if info.delay_ms > elapsed_ms:
                left = (info.delay_ms - elapsed_ms) * _MS
                stored.due = Due(boot_id, boot_ns + left, wall_ns + left)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise BadData("the note of an inbox entry cannot be used", why=str(error)) from error
    return stored


class Pick(NamedTuple):
    """Messages `first` to `end` (seqs) of one frame, to be leased for the `attempt`-th time."""

    stored: Stored
    first: int
    end: int
    attempt: int


class Choice:
    """What `choose` decided.

    `alone`: the message picked must be leased with no other. `again`: there may be more to do,
    though nothing was picked.
    """

    __slots__ = (
        "_due",
        "_expired",
        "_killed",
        "_lost",
        "_void",
        "again",
        "alone",
        "picks",
        "ranges",
        "taken",
    )

    def __init__(self) -> None:
        self.picks: list[Pick] = []
        self.ranges: list[Range] = []
        self.taken = 0
        self.alone = False
        self.again = False
        self._expired: list[Range] = []
        self._void: list[Range] = []
        self._lost: list[Range] = []
        self._killed: list[Range] = []
        self._due: list[tuple[Range, Due]] = []

    def ops(self, now: Now) -> list[Op]:
        """The operations for all but the lease itself."""
        ops: list[Op] = []
        if self._expired:
            ops.append(claimops.op_settle(self._expired, "expired"))
        if self._void:
            ops.append(claimops.op_settle(self._void, "void"))
        if self._lost:
            ops.append(claimops.op_settle(self._lost, "lost"))
        if self._killed:
            ops.append(claimops.op_kill(self._killed, REASON_CORRUPT, now.wall_ns))
        ops += [claimops.op_defer([found], due) for found, due in self._due]
        return ops

    def consider(
        self, stored: Stored, first: int, end: int, wait: Wait, room: int, now: Now, ordered: bool
    ) -> int | None:
        """Decide on `first` to `end` of one frame; at most `room` are picked in all.

        In an ordered channel the first corrupt message ends it, and its seq is returned.
        """
        if stored.place is None:
            _join(self._lost, first, end)
            return None
        if stored.expires is not None and not now.held and stored.expires.reached(now):
            _join(self._expired, first, end)
            return None
        if stored.due is not None and wait.attempts == 0 and not stored.due.reached(now):
            self._due.append(((first, end), stored.due))
            return None
        unfit = stored.unfit()
        if not unfit:
            self._pick(stored, first, min(end, first + room - self.taken), wait)
            return None
        base = stored.first
        for seq in range(first, end):
            why = unfit.get(seq - base)
            if why is not None:
                _join(self._killed if why == REASON_CORRUPT else self._void, seq, seq + 1)
                if ordered and why == REASON_CORRUPT:
                    return seq
            elif self.taken < room:
                self._pick(stored, seq, seq + 1, wait)
            else:
                break
        return None

    def _pick(self, stored: Stored, first: int, end: int, wait: Wait) -> None:
        self.picks.append(Pick(stored, first, end, wait.attempts + 1))
        _join(self.ranges, first, end)
        self.taken += end - first


def _join(ranges: list[Range], first: int, end: int) -> None:
    if ranges and ranges[-1][1] == first:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((first, end))


def over(
    claims: Claims, begin: int, now: Now, attempts_max: int, dead: Iterable[bytes] = ()
) -> list[Op]:
    """Operations for what has come to an end: leases by time or death, and lost segments.

    `begin` is the first seq that is still stored; `dead` are consumers known to have died.
    """
    ops: list[Op] = []
    numbers = set(claims.overdue(now))
    for consumer in dead:
        numbers.update(claims.leased_by(consumer))
    ops += [claimops.op_end(number, attempts_max, now.wall_ns) for number in sorted(numbers)]
    if begin > claims.floor and claims.lowest_open() < begin:
        # Segments went while the claims that covered them were lost in a crash.
        ops.append(claimops.op_forget(begin))
    return ops


def blocked_senders(claims: Claims, read: Read, now: Now) -> dict[str, int]:
    """In an ordered channel: from which seq on each sender's messages must wait.

    A nacked message whose delay lasts holds up those behind it; so does a corrupt one, until an
    operator purges it. A message that its sender delayed does not.
    """
    blocked: dict[str, int] = {}
    next(claims.candidates(now))  # what is due is no longer delayed
    held = [(a, b) for a, b, wait in claims.delayed if wait.attempts]
    held += [(a, b) for a, b, why in claims.dead if why.reason == REASON_CORRUPT]
    for first, end in held:
        for stored in read(first):
            if stored.first >= end:
                break
            seq = max(first, stored.first)
            blocked[stored.sender] = min(seq, blocked.get(stored.sender, seq))
    return blocked


def choose(
    claims: Claims, read: Read, *, room: int, now: Now, first_of_all: bool, ordered: bool
) -> Choice:
    """What to lease now: at most `room` messages, in order of arrival.

    `read(seq)` yields the frames from the one that holds `seq` on. `first_of_all` says that this
    receive has leased nothing yet: only then may a message be leased that must be alone.
    """
    choice = Choice()
    blocked = blocked_senders(claims, read, now) if ordered else {}
    looked = 0
    for first, its_end, wait in claims.candidates(now):
        end = _NO_END if its_end is None else its_end
        if wait.alone:
            if choice.taken or not first_of_all:
                break
            end = first + 1
        for stored in read(first):
            if stored.first >= end:
                break
            looked += 1
            a, b = max(first, stored.first), min(end, stored.end)
            if blocked:
                b = min(b, _blocked_from(blocked, stored.sender))
                if a >= b:
                    continue
            corrupt = choice.consider(stored, a, b, wait, room, now, ordered)
            if corrupt is not None:
                blocked[stored.sender] = corrupt
            if choice.taken >= room or (looked >= FRAMES_A_LOOK and not ordered):
                break
        choice.alone = wait.alone and choice.taken > 0
        if choice.taken >= room or choice.alone:
            break
        if looked >= FRAMES_A_LOOK and not ordered:
            choice.again = not choice.taken
            break
        if wait.alone and choice.ops(now):
            choice.again = True
            break
    return choice


def _blocked_from(blocked: dict[str, int], sender: str) -> int:
    # Whose messages were in a hole nobody knows, so it holds up everybody.
    return min(blocked.get(sender, _NO_END), blocked.get("", _NO_END))


def runs(seqs: Iterable[int]) -> list[Range]:
    """Seqs, in whatever order, as ranges; each counts once."""
    one = set(seqs)
    if not one:
        return []
    first, end = min(one), max(one) + 1
    if end - first == len(one):
        return [(first, end)]
    ranges: list[Range] = []
    for seq in sorted(one):
        _join(ranges, seq, seq + 1)
    return ranges
