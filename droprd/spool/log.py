"""The log: the one file structure of the spool. A file of checksummed entries, front to back.

Owns: how a log file is made, appended to, synced, published, read, and recovered after a crash.
The byte layouts are in `droprd.core.entry`.

Guarantees: an entry counts once `sync` has returned; `published` never lies beyond what is synced;
readers other than the writer read only before it. After a failed write or sync the writer is
*broken*: nothing more goes into that file from this process (a failed sync is never repeated,
for the kernel may then call old data clean).

What a crash leaves: all that was promised, and after it a tail that ends at its first bad entry.
Damage *before* a point that some later entry, or the header, names as synced was promised, and is
reported as `Damage`; what follows it is found again, since entries name their log and their place.

Raises: OSError from the disk; BadData for a file that is no log; LogBroken after a failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from droprd.core import entry as entries
from droprd.core import frame as frames
from droprd.core.entry import (
    ENTRY_BYTES,
    FILE_HEADER_BYTES,
    PUBLISHED_AT,
    EntryHead,
    FileHeader,
    Kind,
)
from droprd.errors import BadData, SpoolCorrupt
from droprd.spool.fsops import Buffer, Fs

READ_BYTES = 1 << 20


class LogBroken(SpoolCorrupt):
    """This log file took a failed write or sync; its writer must not go on with it."""

    code = "log_broken"


class Entry(NamedTuple):
    """An entry as read: its header, its note and its frame (either may be empty)."""

    head: EntryHead
    note: memoryview
    frame: memoryview


class Damage(NamedTuple):
    """Bytes that were promised and cannot be read: from `start` up to `end`."""

    start: int
    end: int


class LogWriter:
    """The one writer of a log file."""

    def __init__(self, fs: Fs, fd: int, path: str, header: FileHeader, end: int) -> None:
        """Go on at `end`, up to which everything is valid and synced (see `create`, `recover`)."""
        self.fs = fs
        self.fd = fd
        self.path = path
        self.header = header
        self.end = end
        self.synced_end = end
        self.broken: OSError | None = None
        self._written_end = end
        self._prepared_end = 0
        self._waiting: list[Buffer] = []

    def append(self, note: bytes, frame: Sequence[Buffer] = (), frame_bytes: int = 0) -> int:
        """Add an entry behind those that wait to be written. Returns its offset.

        Nothing is on disk, and nobody may act on it, before `sync`.
        """
        offset = self.end
        self._waiting.append(
            entries.pack_entry(self.header.log_id, offset, self.synced_end, note, frame_bytes)
        )
        if frame_bytes:
            self._waiting += frame
        self.end = offset + ENTRY_BYTES + len(note) + frame_bytes
        return offset

    def flush(self, prepare_bytes: int = 0) -> None:
        """Hand what waits to the operating system; with `prepare_bytes`, write zeros ahead.

        Later entries then overwrite allocated blocks, and their sync changes no metadata.
        """
        if self.broken is not None:
            raise LogBroken(
                f"{self.path} is closed for writing", why=f"an earlier write failed: {self.broken}"
            )
        if not self._waiting:
            return
        pieces = self._waiting
        if prepare_bytes and self.end > self._prepared_end:
            pieces = [*pieces, bytes(prepare_bytes)]
            self._prepared_end = self.end + prepare_bytes
        self.fs.write_at(self.fd, pieces, self._written_end)
        self._waiting = []
        self._written_end = self.end

    def sync(self, site: str, prepare_bytes: int = 0) -> int:
        """Write what waits, sync it, publish the new synced end. Returns that end.

        Raises OSError: after a failed *write*, `cut_back` may still save the file; after a failed
        *sync* the writer is broken.
        """
        self.flush(prepare_bytes)
        if self.synced_end == self.end:
            return self.end
        self.sync_data(site)
        # If we stop here: the entries are promised, and the published end is an older one;
        # whoever recovers the file finds them by their checksums.
        self.publish(self.end)
        return self.end

    def sync_data(self, site: str) -> None:
        """Sync the file's data without publishing; breaks the writer if it fails."""
        try:
            self.fs.sync(self.fd, site)
        except OSError as error:
            self.broken = error
            raise

    def publish(self, end: int) -> None:
        """Tell readers that all before `end` is synced (the caller has synced it)."""
        try:
            self.fs.write_at(self.fd, [entries.pack_published(end)], PUBLISHED_AT)
        except OSError as error:
            self.broken = error
            raise
        self.synced_end = end

    def seal(self, site: str) -> None:
        """Sync everything *and* the published end, so that a successor file may be made."""
        self.sync(site)
        self.sync_data(site)

    def cut_back(self, site: str) -> None:
        """Take back all after the synced end, on disk too. Raises OSError if it cannot be done."""
        self._waiting = []
        self.end = self._written_end = self.synced_end
        self._prepared_end = 0
        try:
            self.fs.truncate(self.fd, self.synced_end)
            # If we stop here: the bytes may come back; they were never promised.
            self.fs.sync(self.fd, site)
        except OSError as error:
            self.broken = error
            raise

    def close(self) -> None:
        """Close the file; what was not synced is not promised."""
        self.fs.close(self.fd)


def create(
    fs: Fs,
    path: str,
    kind: Kind,
    *,
    log_id: bytes,
    spool_id: bytes,
    wall_ns: int,
    site: str,
    base: int = 0,
    mode: int = 0o640,
    locked: bool = False,
) -> LogWriter:
    """Make a new log file, its name synced in its directory. With `locked`, flock it first.

    Raises: OSError (EEXIST among them; nothing is left behind then).
    """
    header = FileHeader(kind, log_id, spool_id, base, wall_ns)
    fd = fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
    try:
        if locked and not fs.try_lock(fd):
            raise OSError(f"{path}: a new file is locked by somebody else")
        fs.write_at(fd, [entries.pack_file_header(header)], 0)
        fs.sync(fd, f"{site}.create")
        # If we stop here: a file without entries, or with a header that is not whole; it is
        # passed over, for nothing in it was promised.
        fs.sync_dir(os.path.dirname(path), f"{site}.create_dir")
    except OSError:
        # After a failed sync the cache shows a file that the disk may not hold; nobody must use it.
        with suppress(OSError):
            fs.unlink(path)
        fs.close(fd)
        raise
    return LogWriter(fs, fd, path, header, FILE_HEADER_BYTES)


def read_header(fs: Fs, fd: int) -> FileHeader:
    """Raises: BadData if the file is no log of ours."""
    return entries.parse_file_header(fs.read_at(fd, FILE_HEADER_BYTES, 0))


def read_published(fs: Fs, fd: int) -> int:
    """The end up to which a reader may read. FILE_HEADER_BYTES if nothing is published."""
    for _ in range(3):  # a read may meet the middle of the writer's 16 bytes
        data = fs.read_at(fd, 16, PUBLISHED_AT)
        if len(data) == 16:
            end = entries.parse_published(data)
            if end is not None:
                return end
    return FILE_HEADER_BYTES


def frame_is_whole(frame: memoryview, note: memoryview) -> bool:
    """Whether a frame and all its bodies match their checksums."""
    try:
        voids: list[int] = []
        if note:
            beside = entries.unpack_note(note)
            if isinstance(beside, dict):
                voids = [v[0] for v in beside.get("v", ())]
        return not frames.parse(frame, voids).bad_bodies()
    except (BadData, IndexError, TypeError):
        return False


class Walk:
    """An iteration over the entries of a file from `start`, with what was damaged between them.

    Before `promised` (and before whatever a later entry names as synced) damage is yielded as
    `Damage` and passed over; after it the walk ends at the first bad entry: `end` is then the end
    of what is valid. With `stop`, nothing at or after it is looked at.
    """

    def __init__(
        self,
        fs: Fs,
        fd: int,
        log_id: bytes,
        start: int = FILE_HEADER_BYTES,
        *,
        promised: int,
        stop: int | None = None,
    ) -> None:
        self._fs = fs
        self._fd = fd
        self._log_id = log_id
        self._promised = promised
        self._stop = stop
        self.end = start

    def __iter__(self) -> Iterator[Entry | Damage]:
        stop = self._fs.size(self._fd) if self._stop is None else self._stop
        chunk = memoryview(b"")
        chunk_at = self.end
        log_id = self._log_id
        while self.end < stop:
            at = self.end - chunk_at
            head = entries.parse_entry(chunk, at, log_id, self.end)
            if head is None or head.end > chunk_at + len(chunk):
                need = (head.end - self.end) if head else entries.entry_bytes(chunk, at) or 0
                if chunk_at != self.end or len(chunk) < min(need or ENTRY_BYTES, stop - self.end):
                    size = min(max(READ_BYTES, need), stop - self.end)
                    chunk = memoryview(self._fs.read_at(self._fd, size, self.end))
                    chunk_at = self.end
                    need = entries.entry_bytes(chunk, 0) or 0
                    if len(chunk) < need <= stop - self.end:
                        chunk = memoryview(self._fs.read_at(self._fd, need, self.end))
                    at = 0
                    head = entries.parse_entry(chunk, 0, log_id, self.end)
                if head is not None and head.end > chunk_at + len(chunk):
                    head = None
            if head is not None:
                note_at = at + ENTRY_BYTES
                frame_at = note_at + head.note_bytes
                note = chunk[note_at:frame_at]
                frame = chunk[frame_at : frame_at + head.frame_bytes]
                if (
                    head.offset >= self._promised
                    and head.frame_bytes
                    and not frame_is_whole(frame, note)
                ):
                    head = None
            if head is not None:
                self.end = head.end
                self._promised = max(self._promised, head.synced)
                yield Entry(head, note, frame)
                continue
            found = self._search(self.end + 1, stop)
            if found is None:
                if self.end < self._promised:
                    damage = Damage(self.end, min(self._promised, stop))
                    self.end = damage.end
                    yield damage
                return
            damage = Damage(self.end, found)
            self.end = found
            chunk, chunk_at = memoryview(b""), found
            yield damage

    def _search(self, start: int, stop: int) -> int | None:
        """The next entry after damage at `start - 1`, if that damage was promised."""
        bad_at = start - 1
        window = 16 * READ_BYTES
        position = start
        while position < stop:
            data = self._fs.read_at(self._fd, min(window, stop - position), position)
            if not data:
                return None
            found = data.find(entries.ENTRY_MAGIC)
            while found >= 0:
                offset = position + found
                head = self._head_at(offset, stop)
                if head is not None and (bad_at < self._promised or head.synced > bad_at):
                    return offset
                found = data.find(entries.ENTRY_MAGIC, found + 1)
            if len(data) < window:
                return None
            position += len(data) - 3
        return None

    def _head_at(self, offset: int, stop: int) -> EntryHead | None:
        data = self._fs.read_at(self._fd, ENTRY_BYTES, offset)
        length = entries.entry_bytes(data, 0)
        if length is None or offset + length > stop:
            return None
        return entries.parse_entry(
            self._fs.read_at(self._fd, length, offset), 0, self._log_id, offset
        )


def read_entry(fs: Fs, fd: int, log_id: bytes, offset: int) -> Entry | None:
    """The one entry at `offset`, or None if there is no valid one."""
    data = fs.read_at(fd, 4 * ENTRY_BYTES + 1024, offset)
    length = entries.entry_bytes(data, 0)
    if length is None:
        return None
    if length > len(data):
        data = fs.read_at(fd, length, offset)
    head = entries.parse_entry(data, 0, log_id, offset)
    if head is None or head.end - offset > len(data):
        return None
    view = memoryview(data)
    note_end = ENTRY_BYTES + head.note_bytes
    return Entry(head, view[ENTRY_BYTES:note_end], view[note_end : head.end - offset])


class Recovered(NamedTuple):
    """A log file opened by its own writer after whatever happened before."""

    writer: LogWriter
    damage: list[Damage]


def recover(
    fs: Fs,
    path: str,
    kind: Kind,
    *,
    site: str,
    on_entry: Callable[[Entry], None] | None = None,
    set_aside: Callable[[str, int, bytes], object] | None = None,
    start: int = FILE_HEADER_BYTES,
) -> Recovered:
    """Open a log file to go on writing it: sync it, walk it, cut its tail, publish its end.

    `on_entry` sees every valid entry from `start` on. `set_aside(path, offset, data)` is handed the
    bytes of a cut tail that are not just zeros, and those of damage, before they are cut.

    Raises: OSError; BadData if the file is no log of this kind.
    """
    fd = fs.open(path, os.O_RDWR)
    try:
        header = read_header(fs, fd)
        if header.kind != kind:
            raise BadData(f"{path} is a log of kind {header.kind.name}, not {kind.name}")
        published = read_published(fs, fd)
        # Nobody acts on what is not on disk: what we are about to believe is synced first.
        fs.sync(fd, f"{site}.recover")
        # Its maker may have been killed before the name was synced.
        fs.sync_dir(os.path.dirname(path), f"{site}.recover_dir")
        size = fs.size(fd)
        walk = Walk(fs, fd, header.log_id, start, promised=min(published, size))
        damage: list[Damage] = []
        for item in walk:
            if isinstance(item, Damage):
                damage.append(item)
                if set_aside is not None:
                    set_aside(path, item.start, fs.read_at(fd, item.end - item.start, item.start))
            elif on_entry is not None:
                on_entry(item)
        end = walk.end
        if size > end:
            tail = fs.read_at(fd, size - end, end)
            if tail.strip(b"\0"):
                if set_aside is not None:
                    set_aside(path, end, tail.rstrip(b"\0"))
                fs.truncate(fd, end)
                # If we stop here: the tail may come back, and is cut again by the next start.
                fs.sync(fd, f"{site}.cut")
        writer = LogWriter(fs, fd, path, header, end)
        if published != end:
            writer.publish(end)
    except (OSError, BadData):
        fs.close(fd)
        raise
    return Recovered(writer, damage)
