"""Pushes that were taken and are not stored yet: the rules that every receiving store keeps.

Owns what stands between the verdict on a push (`droprd.spool.judging`) and stable storage: the
frames that wait, and how far each lane's head has come. How frames are stored is the store's.

    pending = staging.push(peer, push, parts, limits)   heads go on in memory
    batch = staging.begin()                             all that waits; None if nothing does
    …                                                   the store writes it, notes what failed
    channels = staging.finish(batch)                    synced heads go on, or heads come back
    answers = answers_of(pending)                       speaks only of what is stored

Guarantees: a lane takes only frames that continue its head, each once; a frame that found no room
was never there, nor what was taken behind it. A conflict with frames that are not stored yet is
answered after them (`Pending.waits`).

In memory only: a crash forgets what was never answered. Raises BadData for what a peer sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from droprd.core.frame import Frame
from droprd.core.push import LaneAnswer, Push
from droprd.model import GENESIS, LaneKey
from droprd.spool.judging import Blobs, Judge, Limits, PendingLane
from droprd.spool.staged import Lane, Staged, StreamKey

REFUSED_RETRY_S = 5


@dataclass(slots=True)
class Pending:
    """A push that was taken, and waits for its answer.

    Attributes:
        waits: it must not be answered before the next commit is finished.
    """

    lanes: list[PendingLane]
    waits: bool = False


@dataclass(slots=True)
class Batch:
    """What one commit brings to stable storage.

    Attributes:
        streams: the frames by channel and priority, in the order in which they were taken.
        refused: frames none of which may be stored; only their ids and reasons are kept.
        failed: streams for which there was no room, noted by whoever writes.
    """

    streams: dict[StreamKey, list[Staged]]
    refused: list[Staged]
    failed: set[StreamKey] = field(default_factory=set)

    @property
    def frame_bytes(self) -> int:
        """The bytes of all frames, blobs left out."""
        return sum(one.frame_bytes for staged in self.streams.values() for one in staged)

    def stored(self) -> list[tuple[StreamKey, list[Staged]]]:
        """The streams that did not fail."""
        return [(key, staged) for key, staged in self.streams.items() if key not in self.failed]


class Staging:
    """What was taken and is not stored yet. `lanes` are all that are known, by their keys."""

    def __init__(self, lanes: dict[LaneKey, Lane], blobs: Blobs) -> None:
        self._lanes = lanes
        self._judge = Judge(lanes, blobs)
        self._staged: dict[StreamKey, list[Staged]] = {}
        self._refused: list[Staged] = []
        self._under_way = False

    @property
    def has_staged(self) -> bool:
        """Whether frames wait for a commit."""
        return bool(self._staged or self._refused)

    def push(self, peer: str, push: Push, parts: Sequence[memoryview], limits: Limits) -> Pending:
        """Judge a push and take what continues its lanes. Raises: BadData (nothing was taken)."""
        lanes = self._judge.judge(peer, push, parts, limits)
        waits = False
        for pending in lanes:
            lane = pending.lane
            if pending.staged:
                assert lane is not None
                lane.head = pending.staged[-1].after
                self._lanes.setdefault(lane.key, lane)
                if pending.outside:
                    self._refused += pending.staged
                else:
                    key = (lane.key.channel, lane.key.priority)
                    self._staged.setdefault(key, []).extend(pending.staged)
            if lane is not None and lane.head != lane.synced:
                waits = True
        return Pending(lanes, waits)

    def wanted_blobs(
        self, peer: str, push: Push, parts: Sequence[memoryview], limits: Limits
    ) -> list[Frame]:
        """The blob frames of a push whose bodies must be there. Raises: BadData."""
        return self._judge.wanted_blobs(peer, push, parts, limits)

    def begin(self) -> Batch | None:
        """Take all that waits, to be written; None if nothing does."""
        if self._under_way:
            raise RuntimeError("a commit is under way")
        if not self.has_staged:
            return None
        self._under_way = True
        batch = Batch(self._staged, self._refused)
        self._staged, self._refused = {}, []
        return batch

    def finish(self, batch: Batch) -> frozenset[str]:
        """Let the heads go on, or back. Returns the channels that got something."""
        for key in batch.failed:
            self._roll_back(key, batch.streams[key])
        stored = batch.stored()
        for _, staged in stored:
            for one in staged:
                one.lane.synced = one.after
        for one in batch.refused:
            one.lane.synced = one.after
        self._under_way = False
        return frozenset(channel for (channel, _), _ in stored)

    def _roll_back(self, key: StreamKey, staged: list[Staged]) -> None:
        """Frames that found no room, and those taken behind them since, were never here."""
        lanes = {one.lane for one in staged}
        later = self._staged.pop(key, [])
        for one in staged + [one for one in later if one.lane in lanes]:
            one.part.failed = True
        for lane in lanes:
            lane.head = lane.synced
            if lane.synced == GENESIS:
                del self._lanes[lane.key]
        rest = [one for one in later if one.lane not in lanes]
        if rest:
            self._staged[key] = rest


def answers_of(pending: Pending) -> tuple[LaneAnswer, ...]:
    """The answers to a push, after the commit it waits for is finished; one a lane, in order."""
    return tuple(_answer(one) for one in pending.lanes)


def _answer(one: PendingLane) -> LaneAnswer:
    synced = GENESIS if one.lane is None else one.lane.synced
    if one.failed:
        return LaneAnswer(
            synced, "refused", reason="the disk is full", retry_after_s=REFUSED_RETRY_S
        )
    if one.verdict == "ok":
        head = one.staged[-1].after if one.staged else one.expected
        return LaneAnswer(head, "ok", refusals=one.refusals)
    return LaneAnswer(
        synced,
        one.verdict,
        one.need,
        reason=one.reason,
        retry_after_s=REFUSED_RETRY_S if one.verdict == "refused" else None,
    )
