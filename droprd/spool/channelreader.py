"""The segments of one channel and priority, as consumers and the janitor read them.

Owns reading `inbox/channels/<channel>/<priority>/<n>.log`: which frame holds which seq. Only what
lies before a segment's published synced end is looked at. The final end of a segment is published
before the next one is made, so whoever stands at it and sees a successor may go on there.

Guarantees: frames come in order of arrival; what is between two of them comes as a `Stored` without
a frame: bytes that were promised and cannot be read, or seqs that were never used. Memory is
one chunk of a segment and a sparse index of it, whatever the backlog. A segment that is open here
can be read after it was deleted.

Nothing is written. Raises OSError.
"""

from __future__ import annotations

import logging
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator

from droprd.core import entry as entries
from droprd.core import frame as frames
from droprd.core.entry import ENTRY_BYTES, FILE_HEADER_BYTES, FileHeader, Kind
from droprd.core.leasing import Stored, read_stored
from droprd.errors import BadData
from droprd.spool import log
from droprd.spool.fsops import Buffer, Fs
from droprd.spool.layout import segment_name, segment_number

CHUNK_BYTES = 384 << 10
INDEX_EVERY_BYTES = 64 << 10
OPEN_MAX = 4
_log = logging.getLogger("droprd.spool")


class Segment:
    """One open segment: how far it has been read, and a sparse index of its seqs."""

    __slots__ = ("fd", "header", "number", "offset", "offsets", "published", "seq", "seqs")

    def __init__(self, number: int, fd: int, header: FileHeader) -> None:
        self.number = number
        self.fd = fd
        self.header = header
        self.published = FILE_HEADER_BYTES
        self.seq = header.base  # of the first message not yet read …
        self.offset = FILE_HEADER_BYTES  # … and where it is
        self.seqs = array("q", [self.seq])
        self.offsets = array("q", [self.offset])

    def passed(self, seq: int, offset: int) -> None:
        """Everything before `offset` has been read, and `seq` is the next message."""
        if offset <= self.offset:
            return
        if offset - self.offsets[-1] >= INDEX_EVERY_BYTES:
            self.seqs.append(seq)
            self.offsets.append(offset)
        self.seq, self.offset = seq, offset

    def near(self, seq: int) -> tuple[int, int]:
        """(seq, offset) of a frame at or before the one that holds `seq`."""
        if seq >= self.seq:
            return self.seq, self.offset
        at = bisect_right(self.seqs, seq) - 1
        return self.seqs[at], self.offsets[at]


class ChannelReader:
    """The messages of one channel and priority. Not safe with threads: its owner sees to that."""

    def __init__(self, fs: Fs, directory: str) -> None:
        self._fs = fs
        self._directory = directory
        self._bases: list[int] = []
        self._numbers: list[int] = []
        self._open: dict[int, Segment] = {}
        self._chunk: tuple[int, int, memoryview] = (0, 0, memoryview(b""))
        self._last: tuple[int, int, Stored, int] | None = None  # segment, offset, what, its end

    def begin(self) -> int:
        """The seq of the oldest message that is still stored (0 if nothing came yet)."""
        if not self._numbers:
            self._list()
        return self._bases[0] if self._bases else 0

    def grown(self, seq: int) -> bool:
        """Whether there may be a message `seq` or a later one."""
        if self._numbers:
            newest = self._open.get(self._numbers[-1])
            if newest is not None:
                if newest.seq <= seq and newest.published <= newest.offset:
                    self._publish(newest)
                if seq < newest.seq or newest.published > newest.offset:
                    return True
        segment = self._newest()
        if segment is None:
            return False
        return seq < segment.seq or segment.published > segment.offset

    def end(self) -> int:
        """The seq after the newest published message. Reads what has come since it was asked."""
        segment = self._newest()
        if segment is None:
            return 0
        for _ in self._walk(segment, segment.seq, segment.offset, parse=False):
            pass
        return segment.seq

    def read(self, seq: int, *, parse: bool = True) -> Iterator[Stored]:
        """The frames from the one that holds `seq` on; of those gone, what comes after them.

        Without `parse` only frames with a time to live are read whole; of the others, all that is
        told are their seqs and places.
        """
        segment = self._holding(seq)
        while segment is not None:
            at, offset = segment.near(seq)
            self._publish(segment)
            yield from self._walk(segment, at, offset, parse=parse, seek=seq)
            if segment.offset < segment.published:
                return  # the end of it cannot be read, and nobody knows yet where it ends
            following = self._after(segment.number)
            if following is None:
                return
            self._publish(segment)
            if segment.offset < segment.published:
                continue  # published between our look and the turnover
            if segment.seq < following.header.base and seq < following.header.base:
                yield Stored(max(seq, segment.seq), following.header.base)
            segment, seq = following, max(seq, following.header.base)

    def segments(self) -> list[tuple[int, int]]:
        """(number, base) of all segments, oldest first."""
        self._list()
        return list(zip(self._numbers, self._bases, strict=True))

    def raw(self, place: tuple[int, int, int]) -> bytes:
        """The bytes at a `Stored`'s place."""
        number, start, end = place
        segment = self._segment(number)
        return b"" if segment is None else self._fs.read_at(segment.fd, end - start, start)

    def close(self) -> None:
        """Close all files (in a forked child too) and forget what was read."""
        segments, self._open = self._open, {}
        self._numbers, self._bases = [], []
        self._chunk, self._last = (0, 0, memoryview(b"")), None
        for segment in segments.values():
            self._fs.close(segment.fd)

    # Segments

    def _list(self) -> None:
        try:
            names = self._fs.listdir(self._directory)
        except FileNotFoundError:
            names = []
        numbers = sorted(n for n in map(segment_number, names) if n is not None)
        if numbers == self._numbers:
            return
        known = dict(zip(self._numbers, self._bases, strict=True))
        self._numbers, self._bases = [], []
        for number in numbers:
            base = known.get(number)
            if base is None:
                opened = self._open_segment(number)
                if opened is None:
                    continue  # being made at this moment, or deleted
                base = opened[1].base
                self._fs.close(opened[0])
            self._numbers.append(number)
            self._bases.append(base)

    def _segment(self, number: int) -> Segment | None:
        segment = self._open.pop(number, None)
        if segment is None:
            opened = self._open_segment(number)
            if opened is None:
                return None
            if len(self._open) >= OPEN_MAX:
                # The one not used for longest: never the one that is being read.
                self._fs.close(self._open.pop(next(iter(self._open))).fd)
            segment = Segment(number, *opened)
            self._publish(segment)
        self._open[number] = segment
        return segment

    def _open_segment(self, number: int) -> tuple[int, FileHeader] | None:
        path = f"{self._directory}/{segment_name(number)}"
        try:
            fd = self._fs.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            header = log.read_header(self._fs, fd)
            if header.kind == Kind.CHANNEL:
                return fd, header
            _log.error("%s is a log of kind %s", path, header.kind.name)
        except BadData as error:
            # Being made at this moment, if it is the newest; else damaged.
            if self._fs.stat(f"{self._directory}/{segment_name(number + 1)}") is not None:
                _log.error("%s cannot be read: %s", path, error)
        except OSError:
            self._fs.close(fd)
            raise
        self._fs.close(fd)
        return None

    def _publish(self, segment: Segment) -> None:
        """Look how far the segment may be read by now.

        The end goes back where a receiver's start has cut off damage: never behind what was read.
        """
        segment.published = max(segment.offset, log.read_published(self._fs, segment.fd))

    def _after(self, number: int) -> Segment | None:
        if not self._numbers or number >= self._numbers[-1]:
            path = f"{self._directory}/{segment_name(number + 1)}"
            if self._fs.stat(path) is None:
                return None
            self._list()
        at = bisect_right(self._numbers, number)
        return self._segment(self._numbers[at]) if at < len(self._numbers) else None

    def _newest(self) -> Segment | None:
        if not self._numbers:
            self._list()
        while self._numbers:
            segment = self._segment(self._numbers[-1])
            if segment is None:
                return None
            self._publish(segment)
            if self._after(segment.number) is None:
                return segment
        return None

    def _holding(self, seq: int) -> Segment | None:
        if not self._numbers:
            self._list()
        if not self._numbers:
            return None
        at = max(0, bisect_right(self._bases, seq) - 1)
        segment = self._segment(self._numbers[at])
        if segment is None:
            self._numbers = []  # deleted meanwhile
            self._list()
            segment = self._segment(self._numbers[0]) if self._numbers else None
        return segment

    # Entries

    def _walk(
        self, segment: Segment, seq: int, offset: int, *, parse: bool, seek: int = 0
    ) -> Iterator[Stored]:
        """What lies in one segment from `offset` on; of entries wholly before `seek`, nothing."""
        number = segment.number
        unsure = False  # the count of the frame before this one is unchecked
        while offset < segment.published:
            last = self._last
            if parse and last is not None and last[0] == number and last[1] == offset:
                stored, end = last[2], last[3]
            else:
                found = self._entry(segment, offset)
                if found is None:
                    hole = self._hole(segment, seq, offset)
                    if hole is None:
                        return
                    stored, end = hole
                else:
                    at, chunk, note_bytes, frame_bytes = found
                    frame_at = at + ENTRY_BYTES + note_bytes
                    end = offset + ENTRY_BYTES + note_bytes + frame_bytes
                    place = (number, offset, end)
                    if not frame_bytes:
                        offset = end
                        segment.passed(seq, offset)
                        continue
                    note = chunk[at + ENTRY_BYTES : frame_at]
                    frame = chunk[frame_at : frame_at + frame_bytes]
                    try:
                        passed = seq < seek or not parse
                        if passed:
                            first, info = _seq(note), frames.peek(frame)
                            stored = Stored(first, first + info.messages, place)
                            passed = stored.end <= seek or not (parse or info.ttl_ms)
                        if not passed:
                            stored = read_stored(note, frame, place)
                            self._last = (number, offset, stored, end)
                        if stored.first < seq and not unsure:
                            raise BadData("its seqs were given out before")
                        unsure = passed
                        if stored.first > max(seq, seek):
                            yield Stored(max(seq, seek), stored.first)
                    except BadData as error:
                        after = self._seq_at(segment, end)
                        if after is None:
                            return
                        _log.error("%s, offset %d: %s", self._directory, offset, error)
                        stored = Stored(seq, after, place)
            seq, offset = stored.end, end
            segment.passed(seq, offset)
            if stored.end > seek and stored.end > stored.first:
                yield stored

    def _entry(self, segment: Segment, offset: int) -> tuple[int, memoryview, int, int] | None:
        """(place in the chunk, chunk, note bytes, frame bytes) of the entry at `offset`."""
        number, chunk_at, chunk = self._chunk
        at = offset - chunk_at
        log_id = segment.header.log_id
        if number == segment.number and 0 <= at < len(chunk):
            head = entries.parse_entry(chunk, at, log_id, offset)
            if head is not None and head.end - chunk_at <= len(chunk):
                return at, chunk, head.note_bytes, head.frame_bytes
        size = min(CHUNK_BYTES, segment.published - offset)
        chunk = memoryview(self._fs.read_at(segment.fd, size, offset))
        need = entries.entry_bytes(chunk, 0) or 0
        if size < need <= segment.published - offset:
            chunk = memoryview(self._fs.read_at(segment.fd, need, offset))
        self._chunk = (segment.number, offset, chunk)
        head = entries.parse_entry(chunk, 0, log_id, offset)
        if head is None or head.end - offset > len(chunk):
            return None
        return 0, chunk, head.note_bytes, head.frame_bytes

    def _hole(self, segment: Segment, seq: int, offset: int) -> tuple[Stored, int] | None:
        """What stands for damaged bytes at `offset`, and where they end.

        None while nobody knows how many messages they held.
        """
        walk = log.Walk(
            self._fs,
            segment.fd,
            segment.header.log_id,
            offset,
            promised=segment.published,
            stop=segment.published,
        )
        damage = next(iter(walk), None)
        if not isinstance(damage, log.Damage):
            return None
        after = self._seq_at(segment, damage.end)
        if after is None or after < seq:
            return None
        path = f"{self._directory}/{segment_name(segment.number)}"
        _log.error("%s: bytes %d to %d cannot be read", path, damage.start, damage.end)
        return Stored(seq, after, (segment.number, damage.start, damage.end)), damage.end

    def _seq_at(self, segment: Segment, offset: int) -> int | None:
        """The seq of the first message at or after `offset`, as its own entry says."""
        while offset < segment.published:
            entry = log.read_entry(self._fs, segment.fd, segment.header.log_id, offset)
            if entry is None:
                return None
            if entry.frame:
                try:
                    return _seq(entry.note)
                except BadData:
                    return None
            offset = entry.head.end
        following = self._after(segment.number)
        return None if following is None else following.header.base


def _seq(note: Buffer) -> int:
    """The seq that an entry's note names. Raises: BadData."""
    try:
        return int(entries.unpack_note(note)["q"])
    except (LookupError, TypeError, ValueError) as error:
        raise BadData("the note of an inbox entry cannot be used", why=str(error)) from error
