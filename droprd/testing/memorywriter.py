"""The receiver's side of an inbox in memory: pushes in, for the consumers of the same inbox.

Owns what the receiver knows of an inbox in memory as long as it is open. The rules are those of
every store (`droprd.spool.staging`, `droprd.core.match`); here is only where frames and history go.
What was stored stays in the inbox, and the next writer goes on with it; the process's end is its
end.

Raises OSError where bodies that are files cannot be written; BadData for what a peer sent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from droprd.core import match
from droprd.core.ask import MatchAnswer, MatchRequest
from droprd.core.frame import Frame
from droprd.core.match import NumberedVoid, Run
from droprd.core.push import LaneAnswer, Push
from droprd.model import GENESIS, LaneKey
from droprd.spool.arrivals import Arrivals
from droprd.spool.fsops import OsFs
from droprd.spool.judging import Limits
from droprd.spool.room import Room
from droprd.spool.staged import Staged
from droprd.spool.staging import Batch, Pending, Staging, answers_of
from droprd.spool.store import Report
from droprd.testing.shelves import Shelves


class MemoryWriter:
    """The `InboxWriter` in memory."""

    def __init__(self, shelves: Shelves, limits: Limits) -> None:
        self.report = Report()
        self.received = 0
        self._shelves = shelves
        self._limits = limits
        fs = OsFs()
        self.blobs = Arrivals(fs, shelves.layout)
        self._room = Room(fs, shelves.layout)
        for key, lane in shelves.lanes.items():
            # Whatever the writer before us took, or did not finish: what is stored counts.
            stored = shelves.history.get(key)
            lane.head = lane.synced = GENESIS if stored is None else stored.end
        self._staging = Staging(shelves.lanes, self.blobs)
        self.recount()

    @property
    def lanes(self) -> int:
        return len(self._shelves.lanes)

    @property
    def has_staged(self) -> bool:
        return self._staging.has_staged

    def configure(self, limits: Limits) -> None:
        self._limits = limits

    def push(self, peer: str, push: Push, parts: Sequence[memoryview]) -> Pending:
        return self._staging.push(peer, push, parts, self._limits)

    def wanted_blobs(self, peer: str, push: Push, parts: Sequence[memoryview]) -> list[Frame]:
        return self._staging.wanted_blobs(peer, push, parts, self._limits)

    def answer(self, pending: Pending) -> tuple[LaneAnswer, ...]:
        return answers_of(pending)

    def begin(self) -> Batch | None:
        return self._staging.begin()

    def write(self, batch: Batch) -> None:
        for key, staged in batch.streams.items():
            shelf = self._shelves.shelf(key)
            for one in staged:
                shelf.put(self._note(one), b"".join(one.pieces))
                self._remember(one)
        for one in batch.refused:
            self._remember(one)

    def _note(self, one: Staged) -> dict[str, Any]:
        clock = self._shelves.clock
        note: dict[str, Any] = {
            "p": one.lane.key.peer,
            "b": clock.boot_id(),
            "t": clock.boot_ns(),
            "w": clock.wall_ns(),
        }
        if one.elapsed_ms is not None:
            note["e"] = one.elapsed_ms
        if one.voids:
            note["v"] = [list(void) for void in one.voids]
        return note

    def finish(self, batch: Batch) -> frozenset[str]:
        for _, staged in batch.stored():
            for one in staged:
                self.received += one.count
                self._room.grow(one.lane.key.peer, one.frame_bytes)
        return self._staging.finish(batch)

    def _remember(self, one: Staged) -> None:
        lane, history = one.lane, self._shelves.history
        run = history.get(lane.key)
        if run is None:
            run = history[lane.key] = Run(one.before, one.before, bytearray())
        run.add(one.frame_id, one.count, one.after)
        run.voids += [
            NumberedVoid(one.before.number + (index or 0), one.frame_id, index, reason)
            for index, reason in one.voids
        ]
        keep = self._limits.match_frames
        if len(run) > 2 * keep:
            kept = match.drop_oldest(run, keep)
            kept.packed, kept.voids = bytearray(kept.packed), kept.voids[-keep:]
            history[lane.key] = kept
            lane.floor = kept.start.number

    def match(self, peer: str, request: MatchRequest) -> MatchAnswer:
        key = LaneKey(peer, request.spool_id, request.channel, request.priority)
        lane = self._shelves.lanes.get(key)
        if lane is None:
            return match.answer(request, GENESIS, 0, ())
        run = self._shelves.history.get(key)
        return match.answer(request, lane.synced, lane.floor, () if run is None else (run,))

    def no_room(self, peer: str, length: int) -> str:
        return self._room.lacks(peer, length, self._limits)

    def make_room(self, bytes_min: int) -> None:
        for _, shelf in self._shelves.all():
            for stored in shelf.drop_settled():
                if stored.frame is not None and stored.frame.info.is_blob:
                    self._shelves.remove_blob(stored.sender, stored.frame.frame_id)

    def recount(self) -> None:
        frames = [
            {stored.sender: len(stored.frame.data)}
            for _, shelf in self._shelves.all()
            for stored in tuple(shelf.stored)
            if stored.frame is not None
        ]
        self._room.count([*frames, self.blobs.bytes_by_peer()])

    def ring(self, channels: Iterable[str]) -> None:
        self._shelves.ring(channels if isinstance(channels, Collection) else tuple(channels))

    def close(self) -> None:
        batch = self.begin()
        if batch is not None:
            self.write(batch)
            self.finish(batch)
