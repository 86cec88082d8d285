"""What becomes of each lane's part of a push: taken, in conflict, in need of blobs, or refused.

Owns the verdicts and the limits they rest on. Nothing is changed here but blobs, which get their
name once they are compared with their frame: `droprd.spool.receiver` takes what is judged.

    head is not the expected one          conflict
    a lane too many of this peer          refused, for now
    channel not permitted or reserved     ok: ids and reason are kept, nothing else (`outside`)
    a body over max_message_bytes         ok: stored as a void
    a blob that is not there              ok for what comes before it; if it comes first, need

Raises: BadData for what cannot be read, before anything is taken; OSError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from droprd.core import chain, intake
from droprd.core.frame import Buffer, Frame
from droprd.core.push import LaneVerdict, Push, Refusal
from droprd.model import GENESIS, MIB, RESERVED_CHANNEL_PREFIX, Head, LaneKey
from droprd.spool.staged import Lane, Part, Staged

TOO_LARGE = "over max_message_bytes"
NOT_PERMITTED = "channel not permitted"
REFUSALS_BYTES_MAX = 48 * 1024
"""Of a push answer, which has at most 64 KiB. One frame may need nearly all of it."""
_REFUSAL_BYTES = 24  # of one in an answer, without its reason


@dataclass(frozen=True, slots=True)
class PeerLimits:
    """What one peer may bring; `channels` empty means all, 0 bytes means no quota."""

    channels: frozenset[str] = frozenset()
    max_message_bytes: int = 1024 * MIB
    quota_bytes: int = 0
    lanes_max: int = 1000

    def permits(self, channel: str) -> bool:
        """Whether the peer may send to this channel."""
        if channel.startswith(RESERVED_CHANNEL_PREFIX):
            return False
        return not self.channels or channel in self.channels


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the inbox."""

    segment_bytes_max: int = 16 * MIB
    match_frames: int = 100_000
    quota_bytes: int = 0
    peers: Mapping[str, PeerLimits] = field(default_factory=dict)

    def peer(self, name: str) -> PeerLimits:
        """Those of one peer."""
        return self.peers.get(name, _DEFAULT)


_DEFAULT = PeerLimits()


@dataclass(slots=True, eq=False)
class PendingLane(Part):
    """The verdict on one lane's part, and the frames to take."""

    expected: Head
    verdict: LaneVerdict
    lane: Lane | None = None
    staged: list[Staged] = field(default_factory=list)
    outside: bool = False
    refusals: tuple[Refusal, ...] = ()
    need: dict[bytes, int] = field(default_factory=dict)
    reason: str = ""


class Blobs(Protocol):
    """The bodies that arrived before their frames."""

    def missing(self, peer: str, frame: Frame, /) -> int | None:
        """None if the body of a blob frame is there, else how much of it is."""
        ...


class Judge:
    """Judges pushes by the lanes and blobs that are there."""

    def __init__(self, lanes: Mapping[LaneKey, Lane], blobs: Blobs) -> None:
        self._lanes = lanes
        self._blobs = blobs

    def judge(
        self, peer: str, push: Push, parts: Sequence[memoryview], limits: Limits
    ) -> list[PendingLane]:
        """One verdict a lane, in their order."""
        mine = limits.peer(peer)
        budget = [REFUSALS_BYTES_MAX]
        pending = []
        new = 0
        for lane_push, part in zip(push.lanes, parts, strict=True):
            key = LaneKey(peer, push.spool_id, lane_push.channel, lane_push.priority)
            lane = self._lanes.get(key)
            head = GENESIS if lane is None else lane.head
            if head != lane_push.head:
                pending.append(PendingLane(lane_push.head, "conflict", lane))
                continue
            incoming = intake.read_lane(lane_push, part)
            if lane is None and incoming:
                new += 1
                if new > mine.lanes_max - self._count(peer):
                    reason = f"more than {mine.lanes_max} lanes of this peer"
                    pending.append(PendingLane(head, "refused", reason=reason))
                    continue
                lane = Lane(key)
            one = PendingLane(head, "ok", lane)
            if lane is not None and incoming:
                if mine.permits(lane_push.channel):
                    self._take(one, lane, incoming, mine, budget)
                else:
                    _refuse(one, lane, incoming)
            pending.append(one)
        return pending

    def wanted_blobs(
        self, peer: str, push: Push, parts: Sequence[memoryview], limits: Limits
    ) -> list[Frame]:
        """The blob frames of a push that `Blobs.missing` should look at, since comparing a
        large file may take long. Raises: BadData."""
        mine = limits.peer(peer)
        return [
            frame
            for lane_push, part in zip(push.lanes, parts, strict=True)
            if mine.permits(lane_push.channel)
            for frame in intake.blob_frames(lane_push, part)
            if frame.info.bodies_bytes <= mine.max_message_bytes
        ]

    def _count(self, peer: str) -> int:
        return sum(1 for key in self._lanes if key.peer == peer)

    def _take(
        self,
        one: PendingLane,
        lane: Lane,
        incoming: list[intake.Incoming],
        mine: PeerLimits,
        budget: list[int],
    ) -> None:
        head = one.expected
        refusals: list[Refusal] = []
        for index, (frame, elapsed_ms, voids) in enumerate(incoming):
            info = frame.info
            too_large = _too_large(frame, mine.max_message_bytes)
            if info.is_blob and not voids and not too_large:
                missing = self._blobs.missing(lane.key.peer, frame)
                if missing is not None:
                    if index == 0:
                        self._need(one, lane, incoming, mine)
                        return
                    break
            pieces: list[Buffer] = [frame.data]
            stored: list[tuple[int | None, str]] = [(v.index, v.reason) for v in voids]
            if too_large:
                here = _refusals(frame, too_large)
                size = sum(_REFUSAL_BYTES + len(r.reason) for r in here)
                if size > budget[0] and budget[0] < REFUSALS_BYTES_MAX:
                    break  # the next push takes it; the head says how far this one came
                budget[0] -= size
                refusals += here
                if not info.is_blob:
                    pieces = frame.without({*frame.voids, *too_large})
                stored = sorted([*stored, *((i, TOO_LARGE) for i in too_large)], key=_by_index)
            after = chain.extend(head, info.frame_id, info.messages)
            one.staged.append(
                Staged(
                    one,
                    lane,
                    head,
                    after,
                    info.frame_id,
                    info.messages,
                    pieces,
                    sum(map(len, pieces)),
                    elapsed_ms,
                    stored,
                    info.bodies_bytes if info.is_blob and not stored else 0,
                )
            )
            head = after
        if not one.staged:
            one.verdict, one.reason = "refused", "the answer has no room for more refusals"
        one.refusals = tuple(refusals)

    def _need(
        self, one: PendingLane, lane: Lane, incoming: list[intake.Incoming], mine: PeerLimits
    ) -> None:
        one.verdict = "need"
        for frame, _, voids in incoming:
            if frame.info.is_blob and not voids and not _too_large(frame, mine.max_message_bytes):
                missing = self._blobs.missing(lane.key.peer, frame)
                if missing is not None:
                    one.need[frame.frame_id] = missing


def _refuse(one: PendingLane, lane: Lane, incoming: list[intake.Incoming]) -> None:
    """No message of this lane may be stored."""
    head = one.expected
    one.outside = True
    for frame, elapsed_ms, voids in incoming:
        after = chain.extend(head, frame.frame_id, frame.count)
        stored: list[tuple[int | None, str]] = [(v.index, v.reason) for v in voids]
        if len(stored) < frame.count:
            stored.append((None, NOT_PERMITTED))
        one.staged.append(
            Staged(one, lane, head, after, frame.frame_id, frame.count, [], 0, elapsed_ms, stored)
        )
        head = after
    one.refusals = (Refusal(None, None, NOT_PERMITTED),)


def _too_large(frame: Frame, limit: int) -> list[int]:
    """The indexes of messages that are larger than this peer may send, voids left out."""
    info = frame.info
    if info.bodies_bytes <= limit:
        return []
    if info.is_blob:
        return [] if frame.voids else [0]
    return [i for i, n in enumerate(frame.lengths) if n > limit and i not in frame.voids]


def _refusals(frame: Frame, too_large: list[int]) -> list[Refusal]:
    if len(too_large) + len(frame.voids) == frame.count:
        return [Refusal(frame.frame_id, None, TOO_LARGE)]
    return [Refusal(frame.frame_id, index, TOO_LARGE) for index in too_large]


def _by_index(void: tuple[int | None, str]) -> int:
    return void[0] or 0
