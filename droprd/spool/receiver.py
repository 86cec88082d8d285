"""The receiver's side of the inbox: pushes in, synced heads out.

Owns the inbox as its one writer: `droprd.spool.channelog` (segments), `headlog` (lanes.log) and
`arrivals` (blobs) are its parts. Synchronous; files, clock and randomness come with `Spool`.

    pending = store.push(peer, push, parts)     checked and taken into memory, or BadData
    batch = store.begin()                       all that waits; None if nothing does
    store.write(batch)                          all disk work; may run in another thread
    channels = store.finish(batch)              heads go on; ring the bells of these channels
    answers = store.answer(pending)             speaks only of what is synced

`commit()` is begin, write and finish in one. Between `begin` and `finish` only `push`, `admit` and
the pieces of blobs may be used.

Guarantees: a lane takes only frames that continue its head, each once; a push that cannot be read
changes nothing; one lane's conflict never undoes another's frames; nothing is answered, in a
conflict or a match either, that a power cut could take back. A conflict with frames that are not
synced yet is answered after their sync (`Pending.waits`).

What a crash leaves is described in the parts. After a failed write or sync the store is *broken*
and raises: the process must end, a new one recovers. A full disk (ENOSPC, EDQUOT) only cuts back
the frames that did not fit.

Raises OSError, LogBroken, SpoolCorrupt; BadData for what a peer sent.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from droprd.core import match
from droprd.core.ask import MatchAnswer, MatchRequest
from droprd.core.frame import Frame
from droprd.core.push import LaneAnswer, Push
from droprd.model import GENESIS, NAME_PATTERN, Head, LaneKey
from droprd.spool import log
from droprd.spool.arrivals import Arrivals
from droprd.spool.bells import Waiting
from droprd.spool.channelog import Stream
from droprd.spool.handle import Spool
from droprd.spool.headlog import HeadLog
from droprd.spool.judging import Limits
from droprd.spool.layout import segment_number
from droprd.spool.room import Room
from droprd.spool.staged import Lane, Staged, StreamKey
from droprd.spool.staging import Batch, Pending, Staging, answers_of
from droprd.spool.store import Damaged, Report

_PRIORITY = re.compile(r"[0-9]\Z")
TURNED_AT_ONCE_MAX = 64
"""Each costs some syncs, and nobody is served meanwhile."""


class ReceiverStore:
    """The inbox, as its one writer sees it."""

    def __init__(self, spool: Spool, limits: Limits) -> None:
        """Recover what is there. Raises: OSError, BadData."""
        self.fs = spool.fs
        self.layout = spool.layout
        self.limits = limits
        self._spool = spool
        self.received = 0
        self._heads = HeadLog(spool, limits.match_frames)
        self._streams: dict[StreamKey, Stream] = {}
        self._broken: BaseException | None = None
        self._room = Room(self.fs, self.layout)
        self._waiting = Waiting(self.fs, self.layout)
        self.blobs = Arrivals(self.fs, self.layout)
        self.report = self._open()
        self._staging = Staging(self._heads.memory.lanes, self.blobs)
        self.recount()

    def _open(self) -> Report:
        damage: list[Damaged] = []
        lost = 0
        path = self.layout.inbox_lanes_log
        damage += [Damaged(path, d.start, d.end) for d in self._heads.open()]
        channels = self.layout.channels
        for channel in self._directories(channels, NAME_PATTERN):
            directory = f"{channels}/{channel}"
            for priority in self._directories(directory, _PRIORITY):
                found, gone = self._stream((channel, int(priority))).open()
                where = f"{directory}/{priority}"
                damage += [Damaged(where, d.start, d.end) for d in found]
                lost += gone
            self.fs.sync_dir(directory, "receiver.recover_dir")
        self.fs.sync_dir(channels, "receiver.recover_dir")
        return Report(damage, lost)

    def _directories(self, path: str, pattern: re.Pattern[str]) -> list[str]:
        """Those of ours; what somebody else left there must not stop the start."""
        names = [name for name in self.fs.listdir(path) if pattern.match(name)]
        return [n for n in names if (found := self.fs.stat(f"{path}/{n}")) and found.is_dir]

    def _stream(self, key: StreamKey) -> Stream:
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = Stream(self._spool, self._heads, key)
        return stream

    # -- what it knows ---------------------------------------------------------------------------

    @property
    def lanes(self) -> int:
        """How many lanes are known."""
        return len(self._heads.memory.lanes)

    def head(self, key: LaneKey) -> Head:
        """The synced head of a lane."""
        lane = self._heads.memory.lanes.get(key)
        return GENESIS if lane is None else lane.synced

    def configure(self, limits: Limits) -> None:
        """Other limits from now on. Nothing may be staged or under way."""
        self.limits = limits
        self._heads.match_frames = limits.match_frames
        self.recount()

    # -- pushes ----------------------------------------------------------------------------------

    def push(self, peer: str, push: Push, parts: Sequence[memoryview]) -> Pending:
        """Judge a push and take what continues its lanes. Raises: BadData (nothing was taken)."""
        self._check_usable()
        return self._staging.push(peer, push, parts, self.limits)

    def wanted_blobs(self, peer: str, push: Push, parts: Sequence[memoryview]) -> list[Frame]:
        """The blob frames of a push, for `blobs.missing`, which may read large files, to be asked
        before `push` in a thread of its own. Raises: BadData."""
        return self._staging.wanted_blobs(peer, push, parts, self.limits)

    def answer(self, pending: Pending) -> tuple[LaneAnswer, ...]:
        """The answers to a push, after the commit it waits for is finished."""
        return answers_of(pending)

    # -- commit ----------------------------------------------------------------------------------

    @property
    def has_staged(self) -> bool:
        """Whether frames wait for a commit."""
        return self._staging.has_staged

    def begin(self) -> Batch | None:
        """Take all that waits, to be written; None if nothing does."""
        self._check_usable()
        batch = self._staging.begin()
        for key in () if batch is None else batch.streams:
            self._stream(key)
        return batch

    def write(self, batch: Batch) -> None:
        """Bring a batch to stable storage. Raises OSError, LogBroken: the store is then broken."""
        try:
            for key, staged in batch.streams.items():
                stream = self._streams[key]
                try:
                    stream.write(staged, self.limits.segment_bytes_max)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    stream.cut_back()
                    batch.failed.add(key)
            for key, _ in batch.stored():
                self._streams[key].sync()
            if batch.refused:
                self._write_refused(batch.refused)
            if self._heads.wants_checkpoint:
                self.checkpoint()
        except BaseException as error:
            self._broken = error
            raise

    def _write_refused(self, refused: list[Staged]) -> None:
        """Frames none of which may be stored: their ids and the reasons go to lanes.log."""
        runs: dict[Lane, match.Run] = {}
        for one in refused:
            lane = one.lane
            run = runs.get(lane)
            if run is None:
                stream = self._streams.get((lane.key.channel, lane.key.priority))
                if stream is not None:
                    stream.cover_now()  # runs stand in lanes.log in the order of their numbers
                run = runs[lane] = match.Run(one.before, one.before, bytearray())
            run.add(one.frame_id, one.count, one.after)
            run.voids += [
                match.NumberedVoid(one.before.number + (index or 0), one.frame_id, index, reason)
                for index, reason in one.voids
            ]
        self._heads.remember(runs.items())
        self._heads.sync("heads.refuse")

    def checkpoint(self) -> None:
        """Make lanes.log shorter; `write` does when it has doubled. Raises: LogBroken."""
        self._heads.sync("heads.checkpoint")
        self._heads.checkpoint(self._segment_exists)

    def finish(self, batch: Batch) -> frozenset[str]:
        """Let the heads go on. Returns the channels that got something."""
        self._check_usable()
        for key, staged in batch.stored():
            self._streams[key].stored(staged)
            for one in staged:
                self.received += one.count
                self._room.grow(one.lane.key.peer, one.frame_bytes)
        return self._staging.finish(batch)

    def commit(self) -> frozenset[str]:
        """Bring all that waits to stable storage. Returns the channels that got something."""
        batch = self.begin()
        if batch is None:
            return frozenset()
        self.write(batch)
        return self.finish(batch)

    def ring(self, channels: Iterable[str]) -> None:
        """Wake the consumers of these channels."""
        self._waiting.ring(channels)

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise log.LogBroken("the inbox took a failed write", why=str(self._broken))

    def close(self) -> None:
        """Commit, note how far lanes.log covers the segments, and close all files."""
        self.commit()
        for stream in self._streams.values():
            stream.close()
        self._heads.sync("heads.close")
        self._heads.close()
        self._waiting.close()

    # -- match -----------------------------------------------------------------------------------

    def match(self, peer: str, request: MatchRequest) -> MatchAnswer:
        """Answer a match; not while a commit is under way."""
        self._check_usable()
        key = LaneKey(peer, request.spool_id, request.channel, request.priority)
        lane = self._heads.memory.lanes.get(key)
        if lane is None:
            return match.answer(request, GENESIS, 0, ())
        stream = self._streams.get((request.channel, request.priority))
        recent = [] if stream is None else stream.runs_of(lane)

        def runs() -> Iterator[match.Run]:
            yield from recent
            yield from self._heads.runs_back(lane)

        return match.answer(request, lane.synced, lane.floor, runs())

    # -- room ------------------------------------------------------------------------------------

    def no_room(self, peer: str, length: int) -> str:
        """Why a request of `length` bytes must be refused by its head, or an empty text."""
        return self._room.lacks(peer, length, self.limits)

    def make_room(self, bytes_min: int) -> None:
        """Let the janitor delete the newest segments too, once they are settled: those that take
        `bytes_min` and more, blobs included, are sealed and get successors.

        A channel that gets nothing more would keep its last messages and their blobs for ever, and
        a full inbox gets nothing more. Not while a commit is under way. Raises OSError, LogBroken.
        """
        self._check_usable()
        large = [one for one in self._streams.values() if one.disk_bytes >= bytes_min]
        large.sort(key=lambda stream: stream.disk_bytes, reverse=True)
        try:
            for stream in large[:TURNED_AT_ONCE_MAX]:
                try:
                    stream.turn_over()
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    stream.cut_back()
                    return
        except BaseException as error:
            self._broken = error
            raise

    def recount(self) -> None:
        """Count the bytes of the inbox afresh. Not while a commit is under way.

        Costs a look at the name of each segment and, where there are quotas, at each blob.
        """
        parts: list[Mapping[str, int]] = []
        for key, segments in self._heads.memory.bytes_by_peer.items():
            stream = self._streams.get(key)
            newest = 0 if stream is None else stream.segment
            there = self._segments_of(key)
            for number in [n for n in segments if n not in there and n != newest]:
                del segments[number]
            parts += [of_peers for number, of_peers in segments.items() if number != newest]
        parts += [stream.bytes_by_peer for stream in self._streams.values()]
        limits = self.limits
        if limits.quota_bytes or any(peer.quota_bytes for peer in limits.peers.values()):
            parts.append(self.blobs.bytes_by_peer())
        self._room.count(parts)

    def _segments_of(self, key: StreamKey) -> set[int]:
        try:
            names = self.fs.listdir(self.layout.stream(*key))
        except FileNotFoundError:
            return set()
        return {number for number in map(segment_number, names) if number is not None}

    def _segment_exists(self, key: StreamKey, number: int) -> bool:
        return self.fs.stat(self.layout.inbox_segment(*key, number)) is not None
