"""The journal: where a producing process puts its frames, and how others read them.

Owns `outbox/journals/<32 hex digits>-<n>.log` while its process lives: the file's flock is held,
its mode is 0640 whatever the umask, its name is never used twice.

Guarantees: when `put` returns, the frames are on stable storage, bytes and name. The puts of one
`commit` share one append and one sync, and one frame where lane, time to live and delay are the
same. Stamps in one journal ascend; each is taken after its put began and before its sync ended.
While the process lives a commit counts whole or not at all: others read a held journal only
before its published synced end, and what fails is cut back to there.

After a failed sync, or a cut that failed, the file is *left behind*: never written or synced again
from here. Its lock is kept until the next journal exists, whose first entry is then the note
{"after": name of the file left behind, "end": where that one validly ends}. Bytes of it at or after
`end` do not count, and nobody adopts it.

A crash leaves: a file with a header that is not whole (nothing in it was promised), or valid
entries, and behind them a tail that ends at its first bad entry, or zeros written ahead.

`commit` sets `error` on the puts that failed, `put` raises it: SpoolFull (nothing was accepted),
SendInDoubt (bytes could not be taken back), SpoolNotReady (the file system refuses; nothing was
accepted). Not safe for threads: the caller lets one thread in at a time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from droprd.core.entry import ENTRY_BYTES, FILE_HEADER_BYTES, Kind, pack_note
from droprd.core.frame import Stamp
from droprd.errors import BadData, DroprdError, SendInDoubt, SpoolFull, SpoolNotReady
from droprd.model import KIB, MIB, Clock
from droprd.spool import journalfile, log
from droprd.spool.blobs import Blob, move_blob
from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout, journal_name
from droprd.spool.puts import Put, build_frames

JOURNAL_BYTES_MAX = 16 * MIB
JOURNAL_MODE = 0o640
PREPARE_BYTES_MIN = 64 * KIB
PREPARE_BYTES_MAX = 1 * MIB
_FLUSH_BYTES = 4 * MIB
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEFT_BEHIND = b"\xff"  # no entry begins so, and it is no zero: such a file is never adopted


class Journal:
    """The journal of one producer. Opens a file at its first `commit` (or `open`).

    Attributes:
        spare_bytes: how many bytes may be written ahead at most, beside what is put.
    """

    def __init__(
        self,
        fs: Fs,
        clock: Clock,
        urandom: Callable[[int], bytes],
        layout: Layout,
        spool_id: bytes,
        *,
        uid: int,
        bytes_max: int = JOURNAL_BYTES_MAX,
    ) -> None:
        """`uid` is whom the files belong to that this process makes: only those are adopted."""
        self._fs = fs
        self._clock = clock
        self._urandom = urandom
        self._layout = layout
        self._spool_id = spool_id
        self._uid = uid
        self._bytes_max = bytes_max
        self.spare_bytes = PREPARE_BYTES_MAX
        self._reset()

    def _reset(self) -> None:
        self._maker = b""
        self._number = 0
        self._name = ""
        self._writer: log.LogWriter | None = None
        self._left_behind = False
        self._unfinished = False
        self._last_ns = 0
        self._zeros_end = 0
        self._zeros_bytes = 0
        self._pins: dict[str, int] = {}
        self._kept: dict[str, log.LogWriter] = {}

    # -- putting -------------------------------------------------------------------------------

    def put(self, put: Put) -> list[str]:
        """Put one; its ids. Raises: SpoolFull, SendInDoubt, SpoolNotReady."""
        self.commit([put])
        if put.error is not None:
            raise put.error
        return put.ids

    def commit(self, puts: Sequence[Put]) -> None:
        """Append all, with one sync. Each put is `done` then, and has ids or an error.

        All of them are accepted or none is. Only an exception that is no OSError (an interrupt)
        leaves them undecided and is passed on; what was half written does not count then.
        """
        try:
            writer = self._current()
            for put in puts:
                for body in put.bodies:
                    if isinstance(body, Blob) and body.journal != self._name:
                        move_blob(self._fs, self._layout, body, self._name)
        except OSError as error:
            _refuse(puts, error, self._layout.journals)
            return
        built = build_frames(puts, self._stamp, self._urandom)
        self._unfinished = True
        try:
            zeros = self._zeros(writer, built)
            failure = self._write(writer, built, zeros)
            if failure is not None and writer.broken is None and zeros:
                self._zeros_bytes = 0  # there may be room for the frames alone
                failure = self._write(writer, built, 0)
        except BaseException:
            self._mend(writer)
            raise
        self._unfinished = False
        if failure is not None and writer.broken is not None:
            self._leave_behind(writer)
            for put in puts:
                put.error = SendInDoubt(
                    "the messages may or may not be sent",
                    ids=put.ids,
                    why=f"{writer.path} could not be written and not be cut back: {failure}",
                    hint="check the disk; sending them again may deliver them twice",
                )
        elif failure is not None:
            _refuse(puts, failure, writer.path)
        for put in puts:
            put.done = True

    def _write(self, writer: log.LogWriter, built: Sequence[bytes], zeros: int) -> OSError | None:
        """Append, sync, publish. After a failure all is cut back, or the writer is broken."""
        try:
            waiting = 0
            for frame in built:
                writer.append(b"", [frame], len(frame))
                waiting += len(frame)
                if waiting >= _FLUSH_BYTES:
                    writer.flush()
                    waiting = 0
            writer.sync("journal.put", zeros)
        except OSError as error:
            if writer.broken is None:
                self._cut_back(writer)
            elif self._came_through(writer):
                # The data was synced before its end was published: that one write was reported as
                # failed and took effect, and others may have read by it.
                self._leave_behind(writer)
                return None
            return error
        return None

    def _came_through(self, writer: log.LogWriter) -> bool:
        """Whether all that was appended is published, whatever we were told about it."""
        try:
            end = log.read_published(self._fs, writer.fd)
        except OSError:
            return False
        if end != writer.end:
            return False
        writer.synced_end = end
        return True

    def _cut_back(self, writer: log.LogWriter) -> None:
        self._zeros_end = 0
        try:
            writer.cut_back("journal.cut")
        except OSError as error:
            writer.broken = error

    def _mend(self, writer: log.LogWriter) -> None:
        """After an interrupt in mid-commit: either it had come through, or it never was."""
        if writer.broken is None and not self._came_through(writer):
            self._cut_back(writer)
        if writer.broken is not None:
            self._leave_behind(writer)
        self._unfinished = False

    def _zeros(self, writer: log.LogWriter, built: Sequence[bytes]) -> int:
        """How many zeros to write ahead of the next entries: none at first, then more and more.

        Overwriting them changes no metadata, which makes the sync cheaper than that of growth.
        """
        end = writer.end + sum(ENTRY_BYTES + len(frame) for frame in built)
        if end <= self._zeros_end:
            return 0
        zeros = max(0, min(self._zeros_bytes, self._bytes_max - end, self.spare_bytes))
        self._zeros_bytes = min(max(2 * self._zeros_bytes, PREPARE_BYTES_MIN), PREPARE_BYTES_MAX)
        self._zeros_end = end + zeros if zeros else 0
        return zeros

    def _stamp(self) -> Stamp:
        self._last_ns = max(self._clock.boot_ns(), self._last_ns + 1)
        return Stamp(self._clock.boot_id(), self._last_ns, self._clock.wall_ns())

    # -- files ---------------------------------------------------------------------------------

    def open(self) -> str:
        """The name of the journal that the next commit goes to. Raises: SpoolFull, SpoolNotReady.

        With `pin`, the file stays held until `unpin`, even if the journal turns over meanwhile.
        """
        try:
            self._current()
        except OSError as error:
            raise refusal(error, self._layout.journals) from error
        return self._name

    def pin(self) -> str:
        """Like `open`, and keep that file's lock until `unpin`: a blob is being written for it."""
        name = self.open()
        self._pins[name] = self._pins.get(name, 0) + 1
        return name

    def unpin(self, name: str) -> None:
        """The blob is named by a synced frame now, or is gone."""
        count = self._pins.pop(name, 0) - 1
        if count > 0:
            self._pins[name] = count
        elif name in self._kept:
            self._kept.pop(name).close()

    def close(self) -> None:
        """Let go of the files; the sender may finish them, another process adopt them."""
        if self._writer is not None and self._unfinished:
            self._mend(self._writer)
        if self._left_behind:
            # The error was raised when it happened; without the note, the mark has to do.
            with suppress(OSError):
                self._current()
        self.abandon()

    def abandon(self) -> None:
        """Close all descriptors, unlock nothing: in a forked child the locks are the parent's."""
        writers = [*self._kept.values(), *([self._writer] if self._writer else [])]
        self._reset()
        for writer in writers:
            writer.close()

    def _current(self) -> log.LogWriter:
        """The writer to append to: the one there is, an adopted one, or a new one."""
        writer = self._writer
        if writer is not None and self._unfinished:
            self._mend(writer)
        if writer is not None and not self._left_behind and writer.end < self._bytes_max:
            return writer
        if writer is None and (found := self._adopt()) is not None:
            self._name, self._writer = found
            self._zeros_end = self._zeros_bytes = 0
            return found[1]
        name, new = self._make(writer if self._left_behind else None)
        if writer is not None:
            # If we stop here: the old file is nobody's any more, the sender finishes it.
            if self._pins.get(self._name):
                self._kept[self._name] = writer
            else:
                writer.close()
        self._name, self._writer, self._left_behind = name, new, False
        self._zeros_end = 0
        return new

    def _make(self, left_behind: log.LogWriter | None) -> tuple[str, log.LogWriter]:
        while True:
            if not self._maker:
                # Never the maker of an adopted file: its next name may have been used before.
                self._maker = self._urandom(16)
            self._number += 1
            name = journal_name(self._maker, self._number)
            path = self._layout.journal(name)
            try:
                writer = log.create(
                    self._fs,
                    path,
                    Kind.JOURNAL,
                    log_id=self._urandom(16),
                    spool_id=self._spool_id,
                    wall_ns=self._clock.wall_ns(),
                    site="journal",
                    mode=JOURNAL_MODE,
                    locked=True,
                )
            except FileExistsError:
                continue
            except OSError as error:
                with suppress(OSError):
                    self._fs.unlink(path)
                if error.errno is None:  # the sender looked at the file before we could lock it
                    continue
                raise
            if not journalfile.leads_to(self._fs, path, writer.fd):
                writer.close()
                continue
            if left_behind is not None:
                note = {"after": os.path.basename(left_behind.path), "end": left_behind.synced_end}
                writer.append(pack_note(note))
                try:
                    writer.sync("journal.note")
                except OSError:
                    writer.close()
                    with suppress(OSError):
                        self._fs.unlink(path)
                    raise
                # If we stop here: the old file ends where the note says, for everybody.
            return name, writer

    def _leave_behind(self, writer: log.LogWriter) -> None:
        """Take the file out of use. Its lock stays ours until a note in the next one says so."""
        self._left_behind = True
        try:
            # Not synced, and need not be: as long as the lying cache lives, so does the mark in it.
            self._fs.truncate(writer.fd, writer.synced_end)
            self._fs.write_at(writer.fd, [_LEFT_BEHIND], writer.synced_end)
        except OSError:
            pass  # the note will say the same

    def _adopt(self) -> tuple[str, log.LogWriter] | None:
        """The first journal of our user that nobody holds and whose synced end is its end."""
        fs = self._fs
        for name in journalfile.list_journals(fs, self._layout):
            found = fs.stat(self._layout.journal(name))
            if found is None or found.uid != self._uid or found.size > self._bytes_max:
                continue
            try:
                file = journalfile.open_journal(fs, self._layout, name, write=True)
            except (OSError, BadData):
                continue  # not for us: we make one of our own
            if file is None:
                continue
            if not self._is_adoptable(file):
                file.close()
                continue
            try:
                # The file's maker may have stopped before its name was on disk.
                fs.sync_dir(self._layout.journals, "journal.adopt_dir")
            except OSError:
                file.close()
                raise
            return name, log.LogWriter(fs, file.fd, file.path, file.header, file.published())
        return None

    def _is_adoptable(self, file: journalfile.JournalFile) -> bool:
        """Whether we may go on writing it; our lock is on it then."""
        try:
            return (
                file.header.spool_id == self._spool_id
                and file.is_clean()
                and file.hold()
                and file.is_clean()
                # Of a file without entries nobody knows whether the sync of its header succeeded.
                and FILE_HEADER_BYTES < file.published() < self._bytes_max
                and file.name not in journalfile.left_behind(self._fs, self._layout)
            )
        except OSError:
            return False


def refusal(error: OSError, path: str) -> DroprdError:
    """The error for a caller whose messages were not accepted because of `error`."""
    if error.errno in _NO_ROOM:
        return SpoolFull(
            "no message was accepted",
            why=f"{path}: {error.strerror}",
            hint="free space on the file system of the spool, or wait for deliveries",
        )
    return SpoolNotReady(
        "no message was accepted",
        why=f"{path}: {error.strerror or error}",
        hint="check that the disk is mounted for writing, and who may write the spool",
        code="spool_unwritable",
    )


def _refuse(puts: Sequence[Put], error: OSError, path: str) -> None:
    for put in puts:
        put.error = refusal(error, path)
        put.done = True
