"""`outbox/lanes/<peer>/<channel>/<priority>/<n>.log`: frames in the order of the lane.

Owns the files: one writer (the sender). Positions, numbers and chain are not in them but follow
from `sender.log`; an entry here is a frame with an empty note, or with {"v": [[index, reason]…]}
where corrupt bodies were left out.

Guarantees: nothing is appended except within a merge, and a merge touches one segment of a lane.
Lanes are written without sync; until `sync_all` the journals behind them must stay. A crash leaves
any part of the unsynced; `mend` cuts what no merge commits and says what is missing.

Raises: OSError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from droprd.core.entry import FILE_HEADER_BYTES, Kind
from droprd.core.outstate import LaneState, Pos
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.fsops import Buffer, make_dirs
from droprd.spool.handle import Spool
from droprd.spool.layout import segment_number

WRITERS_MAX = 200


class LaneFiles:
    """The sender's open lane files."""

    def __init__(self, spool: Spool, segment_bytes_max: int) -> None:
        self._spool = spool
        self._segment_bytes_max = segment_bytes_max
        self._writers: dict[Lane, tuple[int, log.LogWriter]] = {}

    def path(self, lane: Lane, segment: int) -> str:
        """Where a segment lies."""
        return self._spool.layout.lane_segment(lane.peer, lane.channel, lane.priority, segment)

    def writer(self, state: LaneState) -> tuple[int, log.LogWriter]:
        """(segment, writer) at the tail of a lane; a full segment is left for a new one."""
        lane = state.lane
        found = self._writers.pop(lane, None)
        tail = state.tail
        if found is not None and found[0] != tail.segment:
            self._shut(found[1])
            found = None
        if found is None and tail.offset == FILE_HEADER_BYTES:
            found = tail.segment, self._create(lane, tail.segment)
        elif found is None:
            found = tail.segment, self._open(state)
        if found[1].end >= self._segment_bytes_max:
            # If we stop here: the old segment is whole on disk, and the merge that would have
            # gone into the new one is not committed.
            self._shut(found[1])
            found = found[0] + 1, self._create(lane, found[0] + 1)
        self._writers[lane] = found  # popped and set again: the least recently used comes first
        if len(self._writers) > WRITERS_MAX:
            oldest = next(iter(self._writers))
            self._shut(self._writers.pop(oldest)[1])
        return found

    def _shut(self, writer: log.LogWriter) -> None:
        # Synced while the descriptor that wrote is open: a later one might not learn of an error.
        writer.sync("lanes.sync")
        writer.close()

    def _create(self, lane: Lane, segment: int) -> log.LogWriter:
        spool = self._spool
        path = self.path(lane, segment)
        make_dirs(spool.fs, os.path.dirname(path), spool.layout.outbox, 0o700, "lanes.mkdir")
        if spool.fs.stat(path) is not None:
            spool.fs.unlink(path)  # left by a merge that was never committed
        return log.create(
            spool.fs,
            path,
            Kind.LANE,
            log_id=spool.urandom(16),
            spool_id=spool.spool_id,
            wall_ns=spool.clock.wall_ns(),
            site="lanes",
            mode=0o600,
        )

    def _open(self, state: LaneState) -> log.LogWriter:
        fs = self._spool.fs
        path = self.path(state.lane, state.tail.segment)
        fd = fs.open(path, os.O_RDWR)
        writer = log.LogWriter(fs, fd, path, log.read_header(fs, fd), state.tail.offset)
        # What was mended since is not known to be synced, and must not be called so.
        same = state.synced.segment == state.tail.segment
        writer.synced_end = min(state.synced.offset, writer.end) if same else FILE_HEADER_BYTES
        return writer

    def flush(self, lanes: Sequence[Lane]) -> None:
        """Hand what was appended to these lanes to the operating system."""
        for lane in lanes:
            self._writers[lane][1].flush()

    def sync_all(self) -> None:
        """Bring every lane's data to stable storage (names were synced when made)."""
        for _, writer in self._writers.values():
            writer.sync("lanes.sync")

    def close(self) -> None:
        """Close all files without syncing."""
        for _, writer in self._writers.values():
            writer.close()
        self._writers.clear()

    # -- reading -----------------------------------------------------------------------------

    def walk(
        self, state: LaneState, start: Pos
    ) -> Iterator[tuple[int, int, log.Entry | log.Damage]]:
        """(segment, descriptor, entry or damage) from `start` to the tail of a lane.

        A descriptor is good until the next item is asked for.
        """
        fs = self._spool.fs
        for segment in range(start.segment, state.tail.segment + 1):
            if segment == state.tail.segment and state.tail.offset == FILE_HEADER_BYTES:
                return
            try:
                fd = fs.open(self.path(state.lane, segment), os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                stop = state.tail.offset if segment == state.tail.segment else fs.size(fd)
                offset = start.offset if segment == start.segment else FILE_HEADER_BYTES
                log_id = log.read_header(fs, fd).log_id
                for item in log.Walk(fs, fd, log_id, offset, promised=stop, stop=stop):
                    yield segment, fd, item
            finally:
                fs.close(fd)

    # -- recovery ----------------------------------------------------------------------------

    def mend(self, state: LaneState, committed: Sequence[tuple[int, int]]) -> dict[int, int]:
        """Cut what no merge commits; say what is missing of what merges commit.

        `committed` are (segment, end) of the segments that hold anything not known to be synced,
        ascending. Returns {segment: valid end} of those that end too early.
        """
        fs = self._spool.fs
        lane = state.lane
        directory = os.path.dirname(self.path(lane, 1))
        missing: dict[int, int] = {}
        for segment, end in committed:
            start = FILE_HEADER_BYTES
            if segment == state.synced.segment:
                start = max(start, state.synced.offset)
            path = self.path(lane, segment)
            if fs.stat(path) is None:
                self._create(lane, segment).close()
            fd = fs.open(path, os.O_RDWR)
            try:
                # Nobody acts on what is not on disk: what is read here is believed from now on.
                fs.sync(fd, "lanes.recover")
                walk = log.Walk(
                    fs, fd, log.read_header(fs, fd).log_id, start, promised=start, stop=end
                )
                valid = end
                for item in walk:
                    if isinstance(item, log.Damage):
                        valid = item.start
                        break
                valid = min(valid, walk.end)
                if valid < end:
                    missing[segment] = valid
                if fs.size(fd) > valid:
                    fs.truncate(fd, valid)
                    # If we stop here: the bytes may come back; they are cut again, or lie under
                    # what is appended next, which names its own place.
                    fs.sync(fd, "lanes.cut")
            finally:
                fs.close(fd)
        if fs.stat(directory) is not None:
            for name in fs.listdir(directory):
                number = segment_number(name)
                if number is not None and number > state.tail.segment:
                    fs.unlink(f"{directory}/{name}")
        return missing

    def append_missing(
        self, lane: Lane, segment: int, at: int, note: bytes, frame: Sequence[Buffer], size: int
    ) -> int:
        """Put back one frame at its place; returns the end after it."""
        fs = self._spool.fs
        path = self.path(lane, segment)
        fd = fs.open(path, os.O_RDWR)
        try:
            writer = log.LogWriter(fs, fd, path, log.read_header(fs, fd), at)
            writer.append(note, frame, size)
            writer.flush()
            return writer.end
        finally:
            fs.close(fd)

    def sync_mended(self, lane: Lane, segment: int) -> None:
        """Sync a segment to which frames were put back; nobody else may have it open later."""
        fs = self._spool.fs
        fd = fs.open(self.path(lane, segment), os.O_RDWR)
        try:
            fs.sync(fd, "lanes.mended")
        finally:
            fs.close(fd)
