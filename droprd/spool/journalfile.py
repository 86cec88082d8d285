"""A journal as others see it: a process that would adopt it, the sender that finishes it.

Guarantees: `hold` is true only for a file that its name still leads to, so that nobody acts on a
deleted one. `left_behind` believes a note only of the user whose journal it speaks of.

Whoever finishes a journal that nobody holds: hold it, sync it, take what is whole, and never
anything at or after the end that `left_behind` gives for it. That is to be asked *after* `hold`,
because the process that left a journal behind lets go of it only once the note is on disk. A
journal with such a note must stay as long as the file that the note names.

Raises: OSError; BadData for a file whose header is not whole (nothing in it was ever promised).
"""

from __future__ import annotations

import errno
import os

from droprd.core.entry import FILE_HEADER_BYTES, FileHeader, Kind, unpack_note
from droprd.errors import BadData
from droprd.spool import log
from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout, split_journal_name

_READ_BYTES = 1 << 20

# What a name in journals/ may answer that is unreadable, a link, a FIFO, a socket or a
# directory: producers own that directory too, and none of them may stop the sender.
NO_JOURNAL = (
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENXIO,
    errno.ESPIPE,
)


def list_journals(fs: Fs, layout: Layout) -> list[str]:
    """The names of all journals; those of one maker in the order in which they were made."""
    found = []
    for name in fs.listdir(layout.journals):
        parts = split_journal_name(name)
        if parts is not None:
            found.append((parts, name))
    return [name for _, name in sorted(found)]


def leads_to(fs: Fs, path: str, fd: int) -> bool:
    """Whether the name still leads to the open file."""
    found = fs.stat(path)
    return found is not None and found.file == fs.file_of(fd)


class JournalFile:
    """An open journal. The file is closed, and with it our lock, by `close`."""

    def __init__(self, fs: Fs, path: str, fd: int, header: FileHeader) -> None:
        self._fs = fs
        self.path = path
        self.name = os.path.basename(path)
        self.fd = fd
        self.header = header

    def hold(self) -> bool:
        """Take its lock: true if nobody held it, and the name still leads to this file."""
        if not self._fs.try_lock(self.fd):
            return False
        if leads_to(self._fs, self.path, self.fd):
            return True
        self._fs.unlock(self.fd)
        return False

    def published(self) -> int:
        """The synced end that its writer published last."""
        return log.read_published(self._fs, self.fd)

    def size(self) -> int:
        return self._fs.size(self.fd)

    def nothing_after(self, end: int) -> bool:
        """Whether only zeros (written ahead) follow `end`. Under the lock: a file is done."""
        size = self.size()
        while end < size:
            data = self._fs.read_at(self.fd, min(_READ_BYTES, size - end), end)
            if not data:
                break
            if data.count(0) != len(data):
                return False
            end += len(data)
        return True

    def is_clean(self) -> bool:
        """Whether its synced end is its end."""
        published = self.published()
        return published <= self.size() and self.nothing_after(published)

    def close(self) -> None:
        self._fs.close(self.fd)


def open_journal(fs: Fs, layout: Layout, name: str, *, write: bool = False) -> JournalFile | None:
    """Open one, None if it is gone. Raises: BadData if it is no journal; OSError."""
    path = layout.journal(name)
    try:
        # A journal belongs to its producer; the group may read it, no more.
        fd = fs.open(path, os.O_RDWR if write else os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in NO_JOURNAL:
            raise BadData(f"{path} is no journal", why=str(error.strerror)) from error
        raise
    try:
        header = log.read_header(fs, fd)
        if header.kind is not Kind.JOURNAL:
            raise BadData(f"{path} is a log of kind {header.kind.name}")
    except BadData:
        fs.close(fd)
        raise
    except OSError as error:
        fs.close(fd)
        if error.errno in NO_JOURNAL:
            raise BadData(f"{path} is no journal", why=str(error.strerror)) from error
        raise
    return JournalFile(fs, path, fd, header)


def left_behind(fs: Fs, layout: Layout) -> dict[str, int]:
    """Where journals that took a failed sync validly end, by name, from all notes there are."""
    ends: dict[str, int] = {}
    for name in list_journals(fs, layout):
        try:
            file = open_journal(fs, layout, name)
            if file is None:
                continue
            try:
                note = _note_of(fs, file)
            finally:
                file.close()
        except (BadData, PermissionError):
            continue
        if note is not None and _same_user(fs, layout, name, note[0]):
            ends[note[0]] = note[1]
    return ends


def _note_of(fs: Fs, file: JournalFile) -> tuple[str, int] | None:
    """(name, end) of the journal that this one's first entry says was left behind, if any."""
    first = log.read_entry(fs, file.fd, file.header.log_id, FILE_HEADER_BYTES)
    if first is None or not first.note:
        return None
    note = unpack_note(first.note)
    if not isinstance(note, dict):
        return None
    name, end = note.get("after"), note.get("end")
    if not isinstance(name, str) or split_journal_name(name) is None or type(end) is not int:
        return None
    return name, end


def _same_user(fs: Fs, layout: Layout, name: str, other: str) -> bool:
    one, two = fs.stat(layout.journal(name)), fs.stat(layout.journal(other))
    return one is not None and two is not None and one.uid == two.uid
