"""A stream: the segments of one channel and priority of the inbox, as their one writer sees them.

Owns `inbox/channels/<channel>/<priority>/<n>.log`. Each entry is a frame with a note (msgpack map):

    p peer  s spool id  n number before this frame  h chain after it  q seq of its first message
    b boot id  t boot-time ns and  w wall-clock ns of arrival  e elapsed ms before that (frames with
    a time to live or a delay)  v voided messages, [[index, reason]…]

Guarantees: every message of the stream has a *seq*, counted without a gap from segment to segment;
the header of a segment names its first one. A segment is sealed (its final synced end published
and synced, its heads and frame ids noted and synced in lanes.log) before the next one is made, so
a reader at the published end of one that sees the next may go on.

What a crash leaves: a tail that was never promised, cut at the next start; a new segment without
entries, made again; a channel directory without segments or claims. Messages lost with damaged
bytes leave a gap in the seqs, which are never given out twice: somebody may have settled them.

Raises OSError; BadData.
"""

from __future__ import annotations

import os
from contextlib import suppress

from droprd.core import chain
from droprd.core import entry as entries
from droprd.core import frame as frames
from droprd.core.entry import ENTRY_BYTES, FILE_HEADER_BYTES, FileHeader, Kind
from droprd.core.match import NumberedVoid, Run
from droprd.errors import BadData
from droprd.model import KIB, Head, LaneKey
from droprd.spool import claims, log
from droprd.spool.fsops import make_dirs
from droprd.spool.handle import Spool
from droprd.spool.headlog import Cover, HeadLog
from droprd.spool.layout import CHANNEL_DIR_MODE, segment_number
from droprd.spool.staged import Lane, Staged, StreamKey

COVER_FRAMES = 4096
"""So many frame ids of a stream are held in memory before they go to lanes.log."""
PREPARE_BYTES = 256 * KIB
_OVERHEAD_BYTES = 230  # about, of an entry beside its frame: header and note
_MESSAGE_BYTES_MIN = 8  # of a message in a frame: its length and its CRC-32


class Stream:
    """The segments of one channel and priority."""

    def __init__(self, spool: Spool, heads: HeadLog, key: StreamKey) -> None:
        """`open` comes next, if there is such a directory."""
        self.key = key
        self.runs: list[tuple[Lane, Run]] = []
        self.bytes_by_peer: dict[str, int] = {}
        self.next_seq = 0
        self._spool = spool
        self._fs = spool.fs
        self._layout = spool.layout
        self._heads = heads
        self._dir = spool.layout.stream(*key)
        self._writer: log.LogWriter | None = None
        self._segment = 0
        self._newest: dict[Lane, Run] = {}
        self._run_frames = 0
        self._covered = FILE_HEADER_BYTES
        self._stored_end = FILE_HEADER_BYTES
        self._gap = False
        self._next_seq_then = 0
        self._blob_bytes = 0  # of the newest segment, as far as they are known

    # -- start -----------------------------------------------------------------------------------

    def open(self) -> tuple[list[log.Damage], int]:
        """Walk what lanes.log does not cover. Returns the damage and how many messages it cost."""
        fs = self._fs
        cover = self._heads.memory.covers.get(self.key)
        if cover is not None:
            self._segment, self.next_seq = cover.segment, cover.next_seq
        there = sorted(filter(None, map(segment_number, fs.listdir(self._dir))))
        damage: list[log.Damage] = []
        lost = 0
        for number in there:
            if cover is not None and (
                number < cover.segment or (number == cover.segment and cover.sealed)
            ):
                continue
            if self._writer is not None:
                # Only where lanes.log was lost: each segment but the last is sealed again.
                self._seal()
            start = FILE_HEADER_BYTES
            if cover is not None and number == cover.segment:
                start = cover.offset
                earlier = self._heads.memory.bytes_by_peer.get(self.key, {})
                self.bytes_by_peer = dict(earlier.get(number, {}))
            here, gone = self._recover(number, start)
            damage += here
            lost += gone
        if there and self._writer is not None:
            # The names may be as young as the bytes: nothing may follow what could vanish.
            fs.sync_dir(self._dir, "receiver.recover_dir")
        return damage, lost

    def _recover(self, number: int, start: int) -> tuple[list[log.Damage], int]:
        path = self._layout.inbox_segment(*self.key, number)
        damage = self._mend_header(path)
        if self._fs.stat(path) is None:
            return damage, 0
        if self._segment != number or damage:
            self._segment, self.bytes_by_peer, start = number, {}, FILE_HEADER_BYTES
            self._blob_bytes = 0
        self._covered = start
        lost = 0

        def on_entry(item: log.Entry) -> None:
            nonlocal lost
            if item.head.frame_bytes:
                lost += self._walked(item)

        self._writer, found = log.recover(
            self._fs,
            path,
            Kind.CHANNEL,
            site="receiver",
            on_entry=on_entry,
            set_aside=self._spool.set_aside,
            start=start,
        )
        self.next_seq = max(self.next_seq, self._writer.header.base)
        self._stored_end = self._writer.end
        if found and found[-1].end >= self._writer.end:
            self._skip_seqs(found[-1].end - found[-1].start)
        return damage + found, lost

    def _skip_seqs(self, lost_bytes: int) -> None:
        """The newest entries are gone, and nobody knows how many messages they held. Consumers may
        have settled those: their seqs are not given out again."""
        self.next_seq += lost_bytes // _MESSAGE_BYTES_MIN + 1
        self._gap = True

    def _walked(self, item: log.Entry) -> int:
        """Take an entry found at the start into its lane. Returns how many messages were lost in
        that lane just before it."""
        note = entries.unpack_note(item.note)
        try:
            key = LaneKey(note["p"], note["s"], *self.key)
            number, chain_after, seq = int(note["n"]), bytes(note["h"]), int(note["q"])
            voids: list[tuple[int | None, str]] = [
                (int(index), str(reason)) for index, reason in note.get("v", ())
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise BadData("an inbox entry's note cannot be understood", why=repr(error)) from error
        info = frames.peek(item.frame)
        lane = self._heads.memory.lanes.setdefault(key, Lane(key))
        after = Head(number + info.messages, chain_after)
        self._count_bytes(key.peer, item.head.end - item.head.offset)
        self._blob_bytes += info.bodies_bytes if info.is_blob else 0
        self.next_seq = max(self.next_seq, seq + info.messages)
        if after.number <= lane.synced.number:
            return 0
        lost = number - lane.synced.number
        if lost == 0 and chain.extend(lane.synced, info.frame_id, info.messages) == after:
            self._remember(lane, lane.synced, after, info.frame_id, info.messages, voids)
        else:
            # The chain before this frame is not known: history is remembered from behind it on.
            lane.floor = after.number
            self._newest[lane] = Run(after, after, bytearray())
            self.runs.append((lane, self._newest[lane]))
        lane.head = lane.synced = after
        return max(0, lost)

    def _mend_header(self, path: str) -> list[log.Damage]:
        """Make a damaged segment header anew from the first entry, which names its log and its
        seq. Removes a file in which nothing is found; it is set aside unless it was empty."""
        fs = self._fs
        fd = fs.open(path, os.O_RDWR)
        try:
            with suppress(BadData):
                if log.read_header(fs, fd).kind == Kind.CHANNEL:
                    return []
            data = fs.read_at(fd, fs.size(fd), 0)
            head = entries.parse_entry(data, FILE_HEADER_BYTES, None, FILE_HEADER_BYTES)
            if head is None or not head.frame_bytes:
                fs.unlink(path)
                fs.sync_dir(self._dir, "receiver.recover_dir")
                if not data[FILE_HEADER_BYTES:].strip(b"\0"):
                    return []  # made just before a crash; nothing was ever in it
                self._spool.set_aside(path, 0, data)
                self._skip_seqs(len(data))
                return [log.Damage(0, len(data))]
            self._spool.set_aside(path, 0, data[:FILE_HEADER_BYTES])
            note_at = FILE_HEADER_BYTES + ENTRY_BYTES
            note = entries.unpack_note(data[note_at : note_at + head.note_bytes])
            log_id = data[FILE_HEADER_BYTES + 12 : FILE_HEADER_BYTES + 28]
            header = FileHeader(
                Kind.CHANNEL, log_id, self._spool.spool_id, note["q"], self._spool.clock.wall_ns()
            )
            fs.write_at(fd, [entries.pack_file_header(header)], 0)
            # If we stop here: the header is damaged as before, or whole.
            fs.sync(fd, "receiver.mend")
        finally:
            fs.close(fd)
        return [log.Damage(0, FILE_HEADER_BYTES)]

    # -- writing ---------------------------------------------------------------------------------

    @property
    def segment(self) -> int:
        """The number of the newest segment, 0 if there was none yet."""
        return self._segment

    @property
    def disk_bytes(self) -> int:
        """What the newest segment takes, with its blobs; 0 if it holds no message, 1 if a crash
        left it sealed and without a successor."""
        if self._writer is None:
            return 1 if self._segment else 0
        if self._writer.synced_end <= FILE_HEADER_BYTES:
            return 0
        return self._writer.synced_end + self._blob_bytes

    def turn_over(self) -> None:
        """Seal the newest segment and begin the next: what is sealed and has a successor can be
        deleted once it is settled. Nothing may be staged. Raises OSError. After ENOSPC, `cut_back`.
        """
        if self._writer is not None:
            self._seal()
        self._begin_segment()
        # If we stop here: an empty segment, which the next frame goes to.

    def write(self, staged: list[Staged], segment_bytes_max: int) -> None:
        """Append the frames and hand them to the operating system; a full segment is sealed first.

        Raises OSError. After ENOSPC, `cut_back`.
        """
        if self._writer is not None and (self._gap or self.disk_bytes >= segment_bytes_max):
            self._seal()
        if self._writer is None:
            self._begin_segment()
        writer = self._writer
        assert writer is not None
        if self._run_frames >= COVER_FRAMES:
            self._cover(sealed=False)
        clock = self._spool.clock
        boot_id, boot_ns, wall_ns = clock.boot_id(), clock.boot_ns(), clock.wall_ns()
        seq = self.next_seq
        for one in staged:
            key = one.lane.key
            note = {
                "p": key.peer,
                "s": key.spool_id,
                "n": one.before.number,
                "h": one.after.chain,
                "q": seq,
                "b": boot_id,
                "t": boot_ns,
                "w": wall_ns,
            }
            if one.elapsed_ms is not None:
                note["e"] = one.elapsed_ms
            if one.voids:
                note["v"] = [list(void) for void in one.voids]
            writer.append(entries.pack_note(note), one.pieces, one.frame_bytes)
            seq += one.count
        # Small entries overwrite blocks that are there already: their sync is cheaper.
        small = writer.end - writer.synced_end < PREPARE_BYTES // 4
        writer.flush(PREPARE_BYTES if small else 0)
        self._next_seq_then = seq

    def sync(self) -> None:
        """Sync and publish what `write` wrote. Raises OSError: the stream is then broken."""
        assert self._writer is not None
        self._writer.sync("receiver.append")

    def cut_back(self) -> None:
        """Take back what `write` wrote, after ENOSPC. Raises OSError: the stream is then broken."""
        if self._writer is not None:
            self._writer.cut_back("receiver.cut_back")

    def stored(self, staged: list[Staged]) -> None:
        """Remember frames that `sync` brought to stable storage."""
        assert self._writer is not None
        self.next_seq = self._next_seq_then
        self._stored_end = self._writer.synced_end
        for one in staged:
            self._remember(one.lane, one.before, one.after, one.frame_id, one.count, one.voids)
            self._count_bytes(one.lane.key.peer, one.frame_bytes + _OVERHEAD_BYTES)
            self._blob_bytes += one.blob_bytes

    def close(self) -> None:
        """Note in lanes.log how far everything is covered, for the next start to begin there."""
        if self._writer is not None:
            self._cover(sealed=False)
            self._writer.close()

    def runs_of(self, lane: Lane) -> list[Run]:
        """The runs of a lane that lanes.log does not hold yet, newest first."""
        return [run for other, run in reversed(self.runs) if other is lane]

    # -- inside ----------------------------------------------------------------------------------

    def _count_bytes(self, peer: str, size: int) -> None:
        self.bytes_by_peer[peer] = self.bytes_by_peer.get(peer, 0) + size

    def _remember(
        self,
        lane: Lane,
        before: Head,
        after: Head,
        frame_id: bytes,
        count: int,
        voids: list[tuple[int | None, str]],
    ) -> None:
        run = self._newest.get(lane)
        if run is None or run.end != before:
            run = self._newest[lane] = Run(before, before, bytearray())
            self.runs.append((lane, run))
        run.add(frame_id, count, after)
        for index, reason in voids:
            run.voids.append(NumberedVoid(before.number + (index or 0), frame_id, index, reason))
        self._run_frames += 1

    def _cover(self, *, sealed: bool) -> None:
        """Hand the runs to lanes.log; not synced."""
        assert self._writer is not None
        # Not the synced end: while a batch is written, its frames are not in `runs` yet.
        end = self._stored_end
        if self.runs or sealed or end != self._covered:
            cover = Cover(self._segment, end, self.next_seq, sealed)
            self._heads.cover(self.key, cover, self.bytes_by_peer, self.runs)
            self._heads.flush()
        self._covered = end
        self.runs = []
        self._newest = {}
        self._run_frames = 0

    def cover_now(self) -> None:
        """Hand the runs to lanes.log, because what follows in a lane lies in no segment."""
        if self._writer is not None:
            self._cover(sealed=False)

    def _seal(self) -> None:
        writer = self._writer
        assert writer is not None
        writer.seal("receiver.seal")
        self._cover(sealed=True)
        self._heads.sync("heads.seal")
        # If we stop here: the newest segment is sealed, and the next is made by the next frame.
        writer.close()
        self._writer = None
        self._gap = False

    def _begin_segment(self) -> None:
        fs = self._fs
        make_dirs(fs, self._dir, self._layout.channels, CHANNEL_DIR_MODE, "receiver.dir")
        number = self._segment + 1
        path = self._layout.inbox_segment(*self.key, number)
        if number == 1:
            self._make_claims()
        found = fs.stat(path)
        if found is not None:
            if found.size > FILE_HEADER_BYTES:
                raise BadData(f"{path} is there before it was made")
            fs.unlink(path)  # an attempt that met a full disk
        self._writer = log.create(
            fs,
            path,
            Kind.CHANNEL,
            log_id=self._spool.urandom(16),
            spool_id=self._spool.spool_id,
            wall_ns=self._spool.clock.wall_ns(),
            site="receiver.segment",
            base=self.next_seq,
        )
        self._segment = number
        self._covered = self._stored_end = FILE_HEADER_BYTES
        self.bytes_by_peer = {}
        self._blob_bytes = 0

    def _make_claims(self) -> None:
        """The claims file comes with the directory, before the first segment."""
        fs = self._fs
        path = self._layout.claims(*self.key)
        if fs.stat(path) is not None:
            fd = fs.open(path, os.O_RDWR)
            try:
                log.read_header(fs, fd)
                settled = fs.size(fd) > FILE_HEADER_BYTES
            except BadData:
                fs.unlink(path)  # no segment was there yet, so nobody has claimed anything
            else:
                if settled:
                    # Segments, and what lanes.log knew of them, were lost: the seqs of old claims
                    # must not meet new messages.
                    jump = int.from_bytes(self._spool.urandom(4), "little") + 1
                    self.next_seq = max(self.next_seq, jump << 24)
                return
            finally:
                fs.close(fd)
        claims.create_claims(
            fs,
            path,
            log_id=self._spool.urandom(16),
            spool_id=self._spool.spool_id,
            wall_ns=self._spool.clock.wall_ns(),
        )
