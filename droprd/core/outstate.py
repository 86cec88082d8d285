"""What the sender knows of its outbox: journals, lanes, receipts, voids. Every change is a note.

Owns the state and the meaning of the notes in `sender.log`. Live work and recovery go the same way:
a note is made, applied here, and written to the log; a start applies the same notes again. So what
is in memory is always what the log says.

Pure: no file, no clock. Memory grows with the number of lanes and journals, never with the backlog.

    tag        fields                                          meaning
    boots      [boot id…]                                      the order of boots; our own is last
    merge      runs, lanes, bad                                journals' ranges went into lanes
    settle     lane, head, pos, skips, counts, bytes, ids      a receipt; with skips, a rebase
    replay     lane, head, pos, counts, bytes, ids             an operator sends settled ones again
    void       lane, frame id, [[index, reason]…]              these bodies will not be sent
    purge      lane, [[start, end]…], bytes                    nor those of the frames that begin in
                                                               these ranges, as an operator wants
    letters    op, [[lane, [[frame id, indexes]…], reason]…]   dead letters an operator took away
    hold       lane, reason | nil                              the lane waits for an operator
    synced     [[lane, pos]…]                                  lanes' data and names are on disk
    gone       [journal…]                                      these names are deleted, durably
    drop       lane, segment                                   segments before it are deleted
    checkpoint dump                                            all of the above, at one point
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from droprd.core.entry import FILE_HEADER_BYTES
from droprd.core.frame import Frame
from droprd.errors import BadData
from droprd.model import GENESIS, Head, Lane

RECEIPTS_MAX = 512
CLOSED_MAX = 16_384
PURGED = "purged"
REQUEUED = "requeued"
DUMP_VERSION = 1


class Pos(NamedTuple):
    """A place in a lane: segment number and offset in that file. Ordered as the lane is."""

    segment: int
    offset: int


START = Pos(1, FILE_HEADER_BYTES)
END = Pos(1 << 62, 0)


class Receipt(NamedTuple):
    """A head the receiver acknowledged, and the place up to which the lane was settled then."""

    head: Head
    pos: Pos


class Skip(NamedTuple):
    """Frames beyond the cursor that are settled already, since the receiver's head `number`."""

    start: Pos
    end: Pos
    number: int


class Counts(NamedTuple):
    """How messages ended."""

    delivered: int = 0
    expired: int = 0
    purged: int = 0
    dead: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        return sum(self)


NONE_ENDED = Counts()


def count_as(reason: str) -> Counts:
    """How a message voided for `reason` is counted once the receiver has stored the void."""
    if reason == "expired":
        return Counts(expired=1)
    if reason in (PURGED, REQUEUED):  # of the latter, the message is counted anew
        return Counts(purged=1)
    return Counts(dead=1)


@dataclass(slots=True)
class LaneState:
    """One lane. All before `cursor` is settled; what lies between it and `tail` waits."""

    lane: Lane
    tail: Pos = START
    cursor: Pos = START
    acked: Head = GENESIS
    synced: Pos = START
    first_segment: int = 1
    accepted: int = 0
    ended: Counts = NONE_ENDED
    queued_bytes: int = 0
    skips: list[Skip] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=lambda: [Receipt(GENESIS, START)])
    voids: dict[bytes, dict[int, str]] = field(default_factory=dict)
    purges: list[tuple[Pos, Pos]] = field(default_factory=list)
    hold: str | None = None

    @property
    def queued(self) -> int:
        """Accepted and not known to have ended."""
        return self.accepted - self.ended.total

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits here."""
        return self.cursor >= self.tail

    def skip_at(self, pos: Pos) -> Skip | None:
        """The settled range that holds `pos`, if any."""
        for skip in self.skips:
            if skip.start <= pos < skip.end:
                return skip
        return None

    def is_purged(self, pos: Pos) -> bool:
        """Whether an operator has purged the whole frame that begins at `pos`."""
        at = bisect_right(self.purges, (pos, END)) - 1
        return at >= 0 and pos < self.purges[at][1]

    def voids_at(self, pos: Pos, frame_id: bytes, messages: int) -> dict[int, str]:
        """Which messages of the frame at `pos` will not be sent, and why."""
        voids = dict(self.voids.get(frame_id, ()))
        if self.purges and self.is_purged(pos):
            for index in range(messages):
                voids.setdefault(index, PURGED)
        return voids

    def bytes_at(self, pos: Pos, frame: Frame) -> int:
        """What the frame at `pos` counts in `queued_bytes`: what was purged no longer does."""
        info = frame.info
        if self.purges and self.is_purged(pos):
            return 0
        purged = [i for i, why in self.voids.get(info.frame_id, {}).items() if why == PURGED]
        if info.is_blob:
            return 0 if purged else info.bodies_bytes
        return info.bodies_bytes - sum(frame.lengths[i] for i in purged)

    def _purge(self, ranges: Iterable[tuple[Pos, Pos]]) -> None:
        joined: list[tuple[Pos, Pos]] = []
        for start, end in sorted([*self.purges, *ranges]):
            if joined and start <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((start, end))
        self.purges = joined


class MergedLane(NamedTuple):
    """What one merge appended to one lane: always within one segment."""

    lane: Lane
    segment: int
    start: int
    end: int
    messages: int
    bytes: int


class Merge(NamedTuple):
    """One committed merge.

    Attributes:
        runs: (journal, start, end) in the order in which they were taken.
        lanes: what each touched lane got.
        bad: (journal, offset, indexes) of frames that went in with bodies left out as corrupt.
    """

    runs: Sequence[tuple[str, int, int]]
    lanes: Sequence[MergedLane]
    bad: Sequence[tuple[str, int, Sequence[int]]]


class OutboxState:
    """All lanes and journals as the notes applied so far say.

    `closed` are the newest settled frames of which some messages were not delivered, and why;
    `letters_op` is the last change of dead.log that the counts follow.
    """

    def __init__(self) -> None:
        self.lanes: dict[Lane, LaneState] = {}
        self.merged: dict[str, int] = {}
        self.boots: list[bytes] = []
        self.unsynced: list[Merge] = []
        self.closed: dict[bytes, dict[int, str]] = {}
        self.letters_op = b""

    def lane(self, lane: Lane) -> LaneState:
        """The state of a lane, made when first asked for."""
        state = self.lanes.get(lane)
        if state is None:
            state = self.lanes[lane] = LaneState(lane)
        return state

    def apply(self, note: Any) -> None:
        """Take in one note. Raises: BadData for a note that means nothing here."""
        try:
            handler = _HANDLERS[note[0]]
            handler(self, *note[1:])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadData(
                "a note in sender.log means nothing to this version", why=repr(error)
            ) from error

    # -- handlers, one a tag -----------------------------------------------------------------

    def _boots(self, boots: Sequence[bytes]) -> None:
        self.boots = [bytes(b) for b in boots]

    def _merge(
        self, runs: Sequence[Sequence[Any]], lanes: Sequence[Sequence[Any]], bad: Sequence[Any]
    ) -> None:
        merge = Merge(
            [(r[0], r[1], r[2]) for r in runs],
            [MergedLane(Lane(*m[0]), *m[1:]) for m in lanes],
            [(b[0], b[1], tuple(b[2])) for b in bad],
        )
        for name, _, end in merge.runs:
            self.merged[name] = max(end, self.merged.get(name, 0))
        for part in merge.lanes:
            state = self.lane(part.lane)
            state.tail = Pos(part.segment, part.end)
            state.accepted += part.messages
            state.queued_bytes += part.bytes
        self.unsynced.append(merge)

    def _settle(
        self,
        lane: Sequence[Any],
        head: Sequence[Any],
        pos: Sequence[int],
        skips: Sequence[Sequence[Any]],
        counts: Sequence[int],
        settled_bytes: int,
        ids: Sequence[bytes],
        delivered: Sequence[bytes] = (),
    ) -> None:
        state = self.lane(Lane(*lane))
        state.acked = Head(*head)
        state.cursor = Pos(*pos)
        state.skips += [Skip(Pos(*s[0]), Pos(*s[1]), s[2]) for s in skips]
        state.skips.sort()
        state.ended = state.ended.plus(Counts(*counts))
        state.queued_bytes = max(0, state.queued_bytes - settled_bytes)
        for frame_id in ids:
            reasons = state.voids.pop(frame_id, None)
            if reasons:
                self.closed[frame_id] = reasons
        for frame_id in delivered:
            state.voids.pop(frame_id, None)
        while len(self.closed) > CLOSED_MAX:
            del self.closed[next(iter(self.closed))]
        state.receipts.append(Receipt(state.acked, state.cursor))
        if len(state.receipts) > RECEIPTS_MAX:
            half = RECEIPTS_MAX // 2
            state.receipts = state.receipts[:half:2] + state.receipts[half:]
        state.skips = [s for s in state.skips if s.end > Pos(state.first_segment, 0)]
        state.hold = None

    def _replay(
        self,
        lane: Sequence[Any],
        head: Sequence[Any],
        pos: Sequence[int],
        counts: int | Sequence[int],
        replayed_bytes: int,
        ids: Sequence[bytes] = (),
    ) -> None:
        state = self.lane(Lane(*lane))
        state.acked = Head(*head)
        state.cursor = Pos(*pos)
        state.receipts = [r for r in state.receipts if r.head.number < state.acked.number]
        state.receipts.append(Receipt(state.acked, state.cursor))
        state.skips = [s for s in state.skips if s.number <= state.acked.number]
        undone = Counts(counts) if isinstance(counts, int) else Counts(*counts)
        state.ended = state.ended.plus(Counts(*(-n for n in undone)))
        state.queued_bytes += replayed_bytes
        for frame_id in ids:
            reasons = self.closed.pop(frame_id, None)
            if reasons:
                state.voids[frame_id] = reasons
        state.hold = None

    def _void(self, lane: Sequence[Any], frame_id: bytes, voids: Sequence[Sequence[Any]]) -> None:
        known = self.lane(Lane(*lane)).voids.setdefault(frame_id, {})
        for index, reason in voids:
            known.setdefault(index, reason)

    def _purge(
        self, lane: Sequence[Any], ranges: Sequence[Sequence[Any]], purged_bytes: int
    ) -> None:
        state = self.lane(Lane(*lane))
        state._purge((Pos(*start), Pos(*end)) for start, end in ranges)
        state.queued_bytes = max(0, state.queued_bytes - purged_bytes)

    def _letters(self, op: bytes, taken: Sequence[Sequence[Any]]) -> None:
        self.letters_op = op
        for lane, letters, reason in taken:
            state = self.lane(Lane(*lane))
            for frame_id, indexes in letters:
                state.ended = state.ended.plus(Counts(purged=len(indexes), dead=-len(indexes)))
                closed = self.closed.setdefault(frame_id, {})
                closed.update(dict.fromkeys(indexes, reason))

    def _hold(self, lane: Sequence[Any], reason: str | None) -> None:
        self.lane(Lane(*lane)).hold = reason

    def _synced(self, lanes: Sequence[Sequence[Any]]) -> None:
        for lane, pos in lanes:
            self.lane(Lane(*lane)).synced = Pos(*pos)
        self.unsynced = [
            m
            for m in self.unsynced
            if any(Pos(p.segment, p.end) > self.lane(p.lane).synced for p in m.lanes)
        ]

    def _gone(self, names: Sequence[str]) -> None:
        for name in names:
            self.merged.pop(name, None)

    def _drop(self, lane: Sequence[Any], segment: int) -> None:
        state = self.lane(Lane(*lane))
        state.first_segment = segment
        state.tail = max(state.tail, Pos(segment, FILE_HEADER_BYTES))
        state.cursor = max(state.cursor, Pos(segment, FILE_HEADER_BYTES))
        state.synced = max(state.synced, Pos(segment, FILE_HEADER_BYTES))
        state.purges = [p for p in state.purges if p[1] > Pos(segment, 0)]

    def _checkpoint(self, dump: dict[str, Any]) -> None:
        if dump["version"] != DUMP_VERSION:
            raise ValueError(f"checkpoint of version {dump['version']}")
        self.boots = list(dump["boots"])
        self.merged = dict(dump["merged"])
        self.unsynced = []
        self.closed = {frame_id: dict(reasons) for frame_id, reasons in dump.get("closed", ())}
        self.letters_op = dump.get("letters_op", b"")
        self.lanes = {}
        for raw in dump["lanes"]:
            lane = Lane(*raw["lane"])
            self.lanes[lane] = LaneState(
                lane=lane,
                tail=Pos(*raw["tail"]),
                cursor=Pos(*raw["cursor"]),
                acked=Head(*raw["acked"]),
                synced=Pos(*raw["tail"]),
                first_segment=raw["first"],
                accepted=raw["accepted"],
                ended=Counts(*raw["ended"]),
                queued_bytes=raw["bytes"],
                skips=[Skip(Pos(*s[0]), Pos(*s[1]), s[2]) for s in raw["skips"]],
                receipts=[Receipt(Head(*r[0]), Pos(*r[1])) for r in raw["receipts"]],
                voids={f: dict(v) for f, v in raw["voids"]},
                purges=[(Pos(*a), Pos(*b)) for a, b in raw.get("purges", ())],
                hold=raw["hold"],
            )

    def dump(self) -> list[Any]:
        """A checkpoint note of this state. All lanes must be synced to their tails."""
        return [
            "checkpoint",
            {
                "version": DUMP_VERSION,
                "boots": self.boots,
                "merged": self.merged,
                "closed": [[f, list(v.items())] for f, v in self.closed.items()],
                "letters_op": self.letters_op,
                "lanes": [
                    {
                        "lane": list(s.lane),
                        "tail": list(s.tail),
                        "cursor": list(s.cursor),
                        "acked": list(s.acked),
                        "first": s.first_segment,
                        "accepted": s.accepted,
                        "ended": list(s.ended),
                        "bytes": s.queued_bytes,
                        "skips": [[list(k.start), list(k.end), k.number] for k in s.skips],
                        "receipts": [[list(r.head), list(r.pos)] for r in s.receipts],
                        "voids": [[f, list(v.items())] for f, v in s.voids.items()],
                        "purges": [[list(a), list(b)] for a, b in s.purges],
                        "hold": s.hold,
                    }
                    for s in self.lanes.values()
                ],
            },
        ]


_HANDLERS: dict[str, Any] = {
    "boots": OutboxState._boots,
    "merge": OutboxState._merge,
    "settle": OutboxState._settle,
    "replay": OutboxState._replay,
    "void": OutboxState._void,
    "purge": OutboxState._purge,
    "letters": OutboxState._letters,
    "hold": OutboxState._hold,
    "synced": OutboxState._synced,
    "gone": OutboxState._gone,
    "drop": OutboxState._drop,
    "checkpoint": OutboxState._checkpoint,
}


# -- notes ---------------------------------------------------------------------------------------


def merge_note(
    runs: Iterable[tuple[str, int, int]],
    lanes: Iterable[MergedLane],
    bad: Iterable[tuple[str, int, Sequence[int]]],
) -> list[Any]:
    """Journals' ranges went into lanes."""
    return [
        "merge",
        [list(run) for run in runs],
        [[list(m.lane), *m[1:]] for m in lanes],
        [[name, offset, list(indexes)] for name, offset, indexes in bad],
    ]


def settle_note(
    lane: Lane,
    head: Head,
    pos: Pos,
    counts: Counts,
    settled_bytes: int,
    ids: Iterable[bytes] = (),
    skips: Iterable[Skip] = (),
    delivered: Iterable[bytes] = (),
) -> list[Any]:
    """The receiver holds everything up to `head`; `ids` are frames whose voids are closed by it,
    `delivered` those whose voids came too late."""
    return [
        "settle",
        list(lane),
        list(head),
        list(pos),
        [[list(s.start), list(s.end), s.number] for s in skips],
        list(counts),
        settled_bytes,
        list(ids),
        list(delivered),
    ]
