"""The claims file of one channel and priority: shared by all consumers, under a short lock.

Owns `inbox/channels/<channel>/<priority>/claims`, a log of notes whose operations
(`droprd.core.claimops`) make the state in `droprd.core.claims`.

Guarantees: whoever holds the lock has applied every note of the others, and what it appends is in
the file, for every process to read, when `append` returns. It is on stable storage after `sync`,
which publishes that end. The janitor replaces the file by a shorter one under the same lock; so
whoever has locked it checks that the name still leads to it.

What a crash leaves: a note cut short, which the next one who locks cuts off; after a power cut,
less than was written, never less than was published: leases and acks are lost, no message is.
After a failed sync nobody writes into that file any more (the kernel may call old data clean, for
other processes too: a note tells them); all go on once the janitor has replaced it.

Raises OSError; SpoolBusy if the lock cannot be had in time; SpoolCorrupt for bytes that were
published and cannot be read (the janitor sets them aside and begins a new file).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from droprd.core import entry as entries
from droprd.core.claimops import Op, op_sync_failed
from droprd.core.claims import Claims
from droprd.core.entry import ENTRY_BYTES, FILE_HEADER_BYTES, FileHeader, Kind
from droprd.errors import BadData, SpoolBusy, SpoolCorrupt
from droprd.spool import log
from droprd.spool.fsops import Fs

LOCK_TIMEOUT_S = 10.0
_READ_BYTES = 1 << 18


def create_claims(fs: Fs, path: str, *, log_id: bytes, spool_id: bytes, wall_ns: int) -> None:
    """Make an empty claims file, its name synced. The receiver does, with the directory.

    Raises: OSError (FileExistsError among them).
    """
    log.create(
        fs,
        path,
        Kind.CLAIMS,
        log_id=log_id,
        spool_id=spool_id,
        wall_ns=wall_ns,
        site="claims",
        mode=0o660,
    ).close()


class ClaimsFile:
    """One process's view of a claims file. Not safe with threads: its owner sees to that.

    `state` is what the notes read so far make; it is current only inside `locked`.
    """

    def __init__(self, fs: Fs, path: str, boot_id: bytes) -> None:
        self._fs = fs
        self.path = path
        self._boot_id = boot_id
        self.state = Claims(boot_id)
        self._fd: int | None = None
        self._file = (0, 0)
        self._header: FileHeader | None = None
        self.end = FILE_HEADER_BYTES
        self._synced = FILE_HEADER_BYTES
        self._torn = False
        self._held = False
        self._name_synced = False
        self._broken: tuple[int, int] | None = None

    @property
    def dirty(self) -> bool:
        """Whether notes that were read or written here may not be on stable storage yet."""
        return self._fd is not None and (self.end > self._synced or not self._name_synced)

    @contextmanager
    def locked(self, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[Claims]:
        """Hold the lock, with all notes applied.

        Raises: FileNotFoundError if there is no file yet; SpoolBusy; SpoolCorrupt; OSError.
        """
        state = self.acquire(timeout_s)
        try:
            yield state
        finally:
            self.release()

    def acquire(self, timeout_s: float = LOCK_TIMEOUT_S) -> Claims:
        """Take the lock and apply all notes; see `locked`."""
        fs = self._fs
        while True:
            fd = self._fd if self._fd is not None else self._open()
            if not fs.lock(fd, timeout_s):
                raise SpoolBusy(
                    f"{self.path} is locked",
                    why=f"another consumer has held it for {timeout_s:g} s",
                    hint="look for a stopped process that consumes from this channel",
                )
            found = fs.stat(self.path)
            if found is not None and found.file == self._file:
                break
            self.close()  # replaced while we waited
        self._held = True
        try:
            self._follow(fd)
        except BaseException:
            self.release()
            raise
        return self.state

    def release(self) -> None:
        """Give the lock back."""
        self._held = False
        if self._fd is not None:
            self._fs.unlock(self._fd)

    def look(self) -> Claims:
        """Apply what others have appended, without the lock; what this shows may be old at once.

        Raises: FileNotFoundError, SpoolCorrupt, OSError.
        """
        fd = self._fd if self._fd is not None else self._open()
        if not self._follow(fd):
            found = self._fs.stat(self.path)
            if found is None or found.file != self._file:
                self.close()
                return self.look()
        return self.state

    def append(self, ops: Sequence[Op]) -> None:
        """Write one note, and apply it. Only while holding the lock.

        Raises: OSError (nothing counts then), SpoolCorrupt after a failed sync of this file.
        """
        fd = self._fd
        assert fd is not None
        assert self._header is not None
        self._check_sound()
        if self._torn:
            self._fs.truncate(fd, self.end)
            # If we stop here: what was cut may come back, and is cut again. Were the cut not
            # synced, whole old notes could come back behind the new one.
            self._sync_fd(fd, "claims.cut")
            self._torn = False
        self._write(fd, ops)

    def sync(self) -> bool:
        """Bring what is in the file to stable storage, and publish that. True if it had to.

        Raises: OSError; this process then no longer writes into this file (SpoolCorrupt).
        """
        fd = self._fd
        if fd is None or (self.end <= self._synced and self._name_synced):
            return False
        self._check_sound()
        if not self._name_synced:
            # The janitor may have died between renaming this file and syncing its new name.
            self._fs.sync_dir(os.path.dirname(self.path), "claims.name")
            self._name_synced = True
        end = self.end
        self._synced = max(self._synced, min(end, log.read_published(self._fs, fd)))
        if end <= self._synced:
            return False  # somebody else has done it
        self._sync_fd(fd, "claims.sync")
        # A success means nothing if another process was told of a failure before.
        self._follow(fd)
        self._check_sound()
        self._synced = end
        if log.read_published(self._fs, fd) < end:
            self._fs.write_at(fd, [entries.pack_published(end)], entries.PUBLISHED_AT)
        return True

    def replace(self, log_id: bytes, wall_ns: int) -> None:
        """Put a file that holds only the present state in this one's place. The janitor's.

        Only while holding the lock, which ends with the old file. Raises: OSError.
        """
        assert self._header is not None
        fs = self._fs
        temporary = f"{self.path}.new"
        if fs.stat(temporary) is not None:
            fs.unlink(temporary)
        writer = log.create(
            fs,
            temporary,
            Kind.CLAIMS,
            log_id=log_id,
            spool_id=self._header.spool_id,
            wall_ns=wall_ns,
            site="claims.compact",
            mode=0o660,
        )
        try:
            writer.append(entries.pack_note(self.state.snapshot()))
            writer.seal("claims.compact")
            # If we stop here: the old file counts; the temporary one is removed next time.
            fs.rename(temporary, self.path)
            fs.sync_dir(os.path.dirname(self.path), "claims.compact_dir")
        finally:
            writer.close()
        self.close()

    def salvage(self, log_id: bytes, spool_id: bytes, wall_ns: int) -> bytes:
        """Replace a file that cannot be read by what its readable part says. The janitor's.

        Returns the bytes of the damaged file, to be kept. Messages settled after the damage come
        again. Raises: OSError, SpoolBusy.
        """
        fs = self._fs
        self.close()
        fd = fs.open(self.path, os.O_RDWR)
        try:
            if not fs.lock(fd, LOCK_TIMEOUT_S):
                raise SpoolBusy(f"{self.path} is locked")
            data = fs.read_at(fd, fs.size(fd), 0)
            found = fs.stat(self.path)
            if found is None or found.file != fs.file_of(fd):
                return b""  # replaced already
            self._header = FileHeader(Kind.CLAIMS, log_id, spool_id, 0, wall_ns)
            self.state = _readable_part(data, self._boot_id)
            # Numbers that were given out by notes now lost must not mean other leases.
            self.state.lease_next += 1 << 32
            self.replace(log_id, wall_ns)
        finally:
            fs.close(fd)
        return data

    def close(self) -> None:
        """Close the file and forget the state; the next use reads it afresh.

        In a forked child this leaves the parent's lock alone: it is freed with the *last* of the
        descriptors that share it.
        """
        fd, self._fd = self._fd, None
        self._held = False
        if fd is not None:
            self._fs.close(fd)
        self.state = Claims(self._boot_id)
        self.end = self._synced = FILE_HEADER_BYTES
        self._torn = False

    def _open(self) -> int:
        fs = self._fs
        fd = fs.open(self.path, os.O_RDWR)
        try:
            header = log.read_header(fs, fd)
            if header.kind != Kind.CLAIMS:
                raise BadData(f"it is a log of kind {header.kind.name}")
        except BadData as error:
            fs.close(fd)
            raise self._corrupt(str(error)) from error
        except OSError:
            fs.close(fd)
            raise
        self._fd = fd
        self._file = fs.file_of(fd)
        self._header = header
        self._synced = log.read_published(fs, fd)
        self._name_synced = False
        return fd

    def _follow(self, fd: int) -> bool:
        """Apply the notes from `end` on. Returns whether there were any."""
        assert self._header is not None
        log_id = self._header.log_id
        began = self.end
        while True:
            data = self._fs.read_at(fd, _READ_BYTES, self.end)
            if not data:
                self._torn = False
                break
            at = 0
            while True:
                head = entries.parse_entry(data, at, log_id, self.end)
                if head is None:
                    break
                note_at = at + ENTRY_BYTES
                self._apply(entries.unpack_note(data[note_at : note_at + head.note_bytes]))
                at += head.end - self.end
                self.end = head.end
            if at:
                continue
            length = entries.entry_bytes(data, 0)
            if length is not None and length > len(data):
                data = self._fs.read_at(fd, length, self.end)
                head = entries.parse_entry(data, 0, log_id, self.end)
                if head is not None:
                    self._apply(entries.unpack_note(data[ENTRY_BYTES : head.end - self.end]))
                    self.end = head.end
                    continue
            # What follows is no note: the rest of one that somebody died over, or damage.
            if log.read_published(self._fs, fd) > self.end:
                end = self.end
                self.close()
                raise self._corrupt(f"what was synced at byte {end} does not match its checksum")
            self._torn = True
            break
        return self.end > began

    def _write(self, fd: int, ops: Sequence[Op]) -> None:
        assert self._header is not None
        note = entries.pack_note(ops)
        data = entries.pack_entry(self._header.log_id, self.end, self._synced, note, 0)
        try:
            self._fs.write_at(fd, [data], self.end)
        except OSError:
            self._torn = True
            with suppress(OSError):  # to free what it took; the next one cuts it again, and syncs
                self._fs.truncate(fd, self.end)
            raise
        self._apply(ops)
        self.end += len(data)

    def _sync_fd(self, fd: int, site: str) -> None:
        try:
            self._fs.sync(fd, site)
        except OSError:
            self._broken = self._file
            self._tell_sync_failed()
            raise

    def _tell_sync_failed(self) -> None:
        held = self._held
        with suppress(OSError, SpoolBusy, SpoolCorrupt):
            if not held:
                self.acquire(1.0)
            try:
                if self._fd is not None and self._broken == self._file:
                    self._write(self._fd, [op_sync_failed()])
            finally:
                if not held:
                    self.release()

    def _apply(self, ops: Sequence[Op]) -> None:
        try:
            self.state.apply(ops)
        except BaseException as error:
            # Applied in part, perhaps (an interrupt may come anywhere): read it afresh next time.
            self.close()
            if isinstance(error, BadData):
                raise self._corrupt(str(error)) from error
            raise

    def _check_sound(self) -> None:
        if self._broken == self._file or self.state.sync_failed:
            raise SpoolCorrupt(
                f"{self.path} is closed for writing",
                why="an earlier sync of it failed",
                hint="the janitor replaces it; see that droprd runs",
                code="log_broken",
            )

    def _corrupt(self, why: str) -> SpoolCorrupt:
        return SpoolCorrupt(
            f"{self.path} cannot be read",
            why=why,
            hint="droprd sets it aside and begins a new one; unsettled messages come again",
        )


def _readable_part(data: bytes, boot_id: bytes) -> Claims:
    """The state up to the first note that cannot be read or applied."""
    state = Claims(boot_id)
    try:
        log_id = entries.parse_file_header(data).log_id
    except BadData:
        return state
    at = FILE_HEADER_BYTES
    while True:
        head = entries.parse_entry(data, at, log_id, at)
        if head is None:
            return state
        note_at = at + ENTRY_BYTES
        try:
            state.apply(entries.unpack_note(data[note_at : note_at + head.note_bytes]))
        except BadData:
            # It may have been applied in part: begin again, and stop before it.
            return _readable_part(data[:at], boot_id)
        at = head.end
