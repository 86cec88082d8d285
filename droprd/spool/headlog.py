"""lanes.log: what the receiver remembers of every lane, beyond the life of the messages.

Owns `inbox/lanes.log`, a log of notes (msgpack maps, kind in "k"):

    "l"  a lane:    i index in this file, p peer, s spool id, c channel, r priority,
                    h head, f floor (the number from which on its frames are remembered)
    "s"  a stream:  c channel, r priority, n segment, o all of it before this offset is covered by
                    this note and those before it, q next seq, f it is sealed, y bytes by peer,
                    l runs
    "f"  runs:      l
    "y"  bytes:     c, r, n, y of an older segment that was still there at a checkpoint
    "d"  the end of a checkpoint

A run is [lane index, start number, start chain, frames packed, end number, end chain, offset of the
note that holds the lane's run before, voids]: a lane's runs are a chain through the file, walked
backwards, and read only for a match. In memory a lane is its key, its head and one offset.

Guarantees: heads for ever; the frame ids of the newest `match_frames` of a (peer, channel,
priority), those of superseded spool ids going first; as many voids. A segment counts as sealed
once the note that says so is synced.

What a crash leaves: notes that are not synced are cut, and the segments they covered walked again;
a checkpoint is a file `lanes.log.new` until it replaces the old one.

Raises LogBroken after any failed write: memory is then ahead of the file, and only a new start
helps. OSError and BadData at the start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from droprd.core import entry as entries
from droprd.core.entry import FILE_HEADER_BYTES, Kind
from droprd.core.match import NumberedVoid, Run, drop_oldest, join
from droprd.errors import BadData
from droprd.model import MIB, Head, LaneKey
from droprd.spool import log
from droprd.spool.handle import Spool
from droprd.spool.staged import Lane, StreamKey

RUN_FRAMES_MAX = 4096
CHECKPOINT_BYTES_MIN = 1 * MIB


@dataclass(slots=True)
class Cover:
    """How far lanes.log covers a stream: which segment, up to where, and what comes next."""

    segment: int
    offset: int
    next_seq: int
    sealed: bool


@dataclass(slots=True)
class LaneMemory:
    """What is read from lanes.log at a start, and kept."""

    lanes: dict[LaneKey, Lane] = field(default_factory=dict)
    covers: dict[StreamKey, Cover] = field(default_factory=dict)
    bytes_by_peer: dict[StreamKey, dict[int, dict[str, int]]] = field(default_factory=dict)


class HeadLog:
    """The writer of lanes.log, and the way back through a lane's history."""

    def __init__(self, spool: Spool, match_frames: int) -> None:
        """`open` comes next."""
        self._spool = spool
        self._fs = spool.fs
        self._path = spool.layout.inbox_lanes_log
        self._inbox = spool.layout.inbox
        self.match_frames = match_frames
        self.memory = LaneMemory()
        self._by_index: list[Lane] = []
        self._checkpoint_bytes = 0
        self._writer: log.LogWriter

    def open(self) -> list[log.Damage]:
        """Read the log and go on with it, or begin one. Returns what was damaged in it.

        A file whose header cannot be read is set aside whole; what it knew is then found again by
        walking the segments that are still there.
        """
        fs = self._fs
        damage: list[log.Damage] = []
        if fs.stat(f"{self._path}.new") is not None:
            fs.unlink(f"{self._path}.new")  # a checkpoint that never counted
        found = fs.stat(self._path)
        if found is not None:
            try:
                self._writer, damage = log.recover(
                    fs,
                    self._path,
                    Kind.LANES,
                    site="heads",
                    on_entry=self._read,
                    set_aside=self._spool.set_aside,
                )
                # Its name may be as young as its bytes.
                fs.sync_dir(self._inbox, "heads.recover_dir")
                return damage
            except BadData:
                fd = fs.open(self._path, os.O_RDONLY)
                try:
                    data = fs.read_at(fd, found.size, 0)
                finally:
                    fs.close(fd)
                if data[FILE_HEADER_BYTES:].strip(b"\0"):
                    damage = [log.Damage(0, found.size)]
                    self._spool.set_aside(self._path, 0, data)
                fs.unlink(self._path)
                self.memory = LaneMemory()
                self._by_index = []
        self._writer = self._create(self._path)
        return damage

    def _create(self, path: str) -> log.LogWriter:
        return log.create(
            self._fs,
            path,
            Kind.LANES,
            log_id=self._spool.urandom(16),
            spool_id=self._spool.spool_id,
            wall_ns=self._spool.clock.wall_ns(),
            site="heads",
        )

    # -- reading ---------------------------------------------------------------------------------

    def _read(self, item: log.Entry) -> None:
        note = entries.unpack_note(item.note)
        try:
            self._apply(note, item.head.offset)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BadData("a note in lanes.log cannot be understood", why=repr(error)) from error

    def _apply(self, note: dict[str, Any], offset: int) -> None:
        kind = note["k"]
        if kind == "l":
            key = LaneKey(note["p"], note["s"], note["c"], note["r"])
            lane = self.memory.lanes.setdefault(key, Lane(key))
            lane.head = lane.synced = Head(*note["h"])
            lane.floor = note["f"]
            lane.index = note["i"]
            self._by_index.extend([lane] * (lane.index + 1 - len(self._by_index)))
            self._by_index[lane.index] = lane
            return
        if kind == "d":
            self._checkpoint_bytes = offset
            return
        if kind in ("s", "y"):
            stream = (note["c"], note["r"])
            if kind == "s":
                self.memory.covers[stream] = Cover(note["n"], note["o"], note["q"], note["f"])
            segments = self.memory.bytes_by_peer.setdefault(stream, {})
            segments.setdefault(note["n"], {}).update(note["y"])
        for packed in note.get("l", ()):
            lane = self._by_index[packed[0]]
            run = _unpack_run(packed)
            lane.newest = offset
            if run.end.number > lane.synced.number:
                if run.start != lane.synced:
                    lane.floor = run.start.number
                lane.head = lane.synced = run.end

    def runs_back(self, lane: Lane) -> Iterator[Run]:
        """The runs of a lane that lie in the file, newest first."""
        offset = lane.newest
        while offset:
            item = log.read_entry(self._fs, self._writer.fd, self._writer.header.log_id, offset)
            if item is None:
                return
            here = [p for p in entries.unpack_note(item.note).get("l", ()) if p[0] == lane.index]
            for packed in reversed(here):
                yield _unpack_run(packed)
            # All runs of one note name the note before it.
            offset = here[0][6] if here and here[0][6] < offset else 0

    # -- writing ---------------------------------------------------------------------------------

    def cover(
        self,
        stream: StreamKey,
        cover: Cover,
        bytes_by_peer: dict[str, int],
        runs: Iterable[tuple[Lane, Run]],
    ) -> None:
        """Note that these runs cover a segment up to an offset, which must be synced already."""
        channel, priority = stream
        self.memory.covers[stream] = cover
        self.memory.bytes_by_peer.setdefault(stream, {})[cover.segment] = dict(bytes_by_peer)
        self._append_runs(
            {
                "k": "s",
                "c": channel,
                "r": priority,
                "n": cover.segment,
                "o": cover.offset,
                "q": cover.next_seq,
                "f": cover.sealed,
                "y": bytes_by_peer,
            },
            runs,
        )

    def remember(self, runs: Iterable[tuple[Lane, Run]]) -> None:
        """Note runs that lie in no segment: frames whose messages are all refused."""
        self._append_runs({"k": "f"}, runs)

    def _append_runs(self, note: dict[str, Any], runs: Iterable[tuple[Lane, Run]]) -> None:
        packed = []
        touched = []
        for lane, run in runs:
            if lane.index < 0:
                self._introduce(lane, Head(*run.start), run.start.number)
            packed.append(_pack_run(lane, run))
            touched.append(lane)
        offset = self._writer.append(entries.pack_note({**note, "l": packed}))
        for lane in touched:
            lane.newest = offset

    def _introduce(self, lane: Lane, head: Head, floor: int) -> None:
        lane.index = len(self._by_index)
        self._by_index.append(lane)
        self._append_lane(lane, head, floor)

    def _append_lane(self, lane: Lane, head: Head, floor: int) -> None:
        peer, spool_id, channel, priority = lane.key
        self._writer.append(
            entries.pack_note(
                {
                    "k": "l",
                    "i": lane.index,
                    "p": peer,
                    "s": spool_id,
                    "c": channel,
                    "r": priority,
                    "h": list(head),
                    "f": floor,
                }
            )
        )

    def sync(self, site: str) -> None:
        """Bring what was noted to stable storage. Raises: LogBroken."""
        try:
            self._writer.sync(site)
        except OSError as error:
            raise self._broken(error) from error

    def flush(self) -> None:
        """Hand what was noted to the operating system, for `runs_back`. Raises: LogBroken."""
        try:
            self._writer.flush()
        except OSError as error:
            raise self._broken(error) from error

    def _broken(self, error: OSError) -> log.LogBroken:
        return log.LogBroken("lanes.log cannot be written", why=str(error))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    # -- checkpoint ------------------------------------------------------------------------------

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the file has grown to double, and there is room for another one beside it."""
        end = self._writer.end
        return (
            end > 2 * max(self._checkpoint_bytes, CHECKPOINT_BYTES_MIN)
            and self._fs.free_bytes(self._inbox)[0] > 2 * end
        )

    def checkpoint(self, still_there: Callable[[StreamKey, int], bool]) -> None:
        """Replace the file by one that says the same in less; the caller synced the old one.

        `still_there` tells whether a segment of a stream exists; nothing is kept of those that
        are gone.
        """
        old = self._writer
        path = f"{self._path}.new"
        try:
            if self._fs.stat(path) is not None:
                self._fs.unlink(path)
            self._writer = self._create(path)
            self._write_all(old, still_there)
            self._checkpoint_bytes = self._writer.append(entries.pack_note({"k": "d"}))
            self._writer.sync("heads.checkpoint")
            # If we stop here: the old file counts, this one is removed by the next start.
            self._fs.rename(path, self._path)
            self._fs.sync_dir(self._inbox, "heads.checkpoint_dir")
        except OSError as error:
            raise self._broken(error) from error
        finally:
            self._fs.close(old.fd)
        self._writer.path = self._path

    def _write_all(self, old: log.LogWriter, still_there: Callable[[StreamKey, int], bool]) -> None:
        new = self._writer
        # Newest first among lanes that differ only in their spool id: those share the bound.
        order = sorted(self.memory.lanes.values(), key=lambda lane: -lane.newest)
        left: dict[tuple[str, str, int], list[int]] = {}
        self._by_index = []
        for lane in order:
            if lane.index < 0:
                continue
            peer, _, channel, priority = lane.key
            budget = left.setdefault((peer, channel, priority), [self.match_frames] * 2)
            self._writer = old
            runs, head, floor = self._kept(lane, budget)
            self._writer = new
            lane.newest = 0
            lane.floor = floor
            self._introduce(lane, head, floor)
            for run in runs:
                self._append_runs({"k": "f"}, [(lane, run)])
            new.flush()
        for stream, cover in self.memory.covers.items():
            segments = self.memory.bytes_by_peer.setdefault(stream, {})
            for number in [n for n in segments if n != cover.segment]:
                if not still_there(stream, number):
                    del segments[number]
                    continue
                channel, priority = stream
                note = {"k": "y", "c": channel, "r": priority, "n": number, "y": segments[number]}
                new.append(entries.pack_note(note))
            self.cover(stream, cover, segments.get(cover.segment, {}), ())

    def _kept(self, lane: Lane, budget: list[int]) -> tuple[list[Run], Head, int]:
        """What stays of a lane, oldest first, the head after it, and the floor; uses up `budget`
        (frames and voids that may still be kept)."""
        kept: list[Run] = []
        older_voids: list[NumberedVoid] = []
        head: Head | None = None
        for run in self.runs_back(lane):
            head = head or run.end
            beyond = not budget[0] or run.end.number <= lane.floor
            run.voids = run.voids[-budget[1] :] if budget[1] else []
            budget[1] -= len(run.voids)
            if beyond:
                older_voids = run.voids + older_voids
                if not budget[1]:
                    break
                continue
            run = drop_oldest(run, budget[0])
            budget[0] -= len(run)
            kept.append(run)
        kept.reverse()
        head = head or lane.synced
        floor = kept[0].start if kept else head
        if older_voids:
            kept.insert(0, Run(floor, floor, b"", older_voids))
        return list(join(kept, RUN_FRAMES_MAX)), head, floor.number


def _pack_run(lane: Lane, run: Run) -> list[Any]:
    return [
        lane.index,
        *run.start,
        bytes(run.packed),
        *run.end,
        lane.newest,
        [[v.number, v.frame_id, v.index, v.reason] for v in run.voids],
    ]


def _unpack_run(packed: list[Any]) -> Run:
    return Run(
        Head(packed[1], packed[2]),
        Head(packed[4], packed[5]),
        packed[3],
        [NumberedVoid(*void) for void in packed[7]],
    )
