"""The lock that makes one process the daemon of a spool: the flock of <spool>/lock.

The file says who took it last: "PID PROGRAM\\n". The angel hands its descriptor to its workers,
so that the lock is free only when all of them are gone, also after the angel was killed. A crash
leaves a stale name in the file, and no lock: whoever comes next takes it.

Raises SpoolBusy with the pid of the holder, SpoolNotReady (spool_unwritable) if the spool cannot be
written.
"""

from __future__ import annotations

import os
from typing import Final

from droprd.errors import SpoolBusy, SpoolNotReady
from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout

_BYTES_MAX: Final = 64


class DaemonLock:
    """The lock, held until `release` or the end of all processes that have its descriptor."""

    def __init__(self, fs: Fs, fd: int) -> None:
        self._fs = fs
        self.fd = fd

    @classmethod
    def take(cls, fs: Fs, layout: Layout, program: str, timeout_s: float = 0.0) -> DaemonLock:
        """Become the daemon; `program` (droprd, droprctl) is told to others who try.

        Raises: SpoolBusy with the holder's pid, SpoolNotReady (spool_unwritable), OSError.
        """
        try:
            fd = fs.open(layout.lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise SpoolNotReady(
                f"the spool at {layout.root} cannot be written",
                why=f"{layout.lock}: {error.strerror or error}",
                hint="check that the disk is mounted for writing, and who may write the spool",
                code="spool_unwritable",
            ) from error
        try:
            if not fs.lock(fd, timeout_s):
                holder = read_holder(fs, layout)
                pid, name = holder if holder is not None else (None, "another process")
                raise SpoolBusy(
                    f"the spool at {layout.root} is in use",
                    pid=pid,
                    why=f"{name} with pid {pid} holds it" if pid else f"{name} holds it",
                    hint="stop that one first, or use another spool",
                )
            fs.truncate(fd, 0)
            fs.write_at(fd, [f"{os.getpid()} {program}\n".encode()], 0)
        except BaseException:
            fs.close(fd)
            raise
        return cls(fs, fd)

    def release(self) -> None:
        """Let others be the daemon, as far as this process is concerned."""
        self._fs.close(self.fd)


def read_holder(fs: Fs, layout: Layout) -> tuple[int, str] | None:
    """(pid, program) that last took the daemon's lock, or None. It may be gone since."""
    try:
        fd = fs.open(layout.lock, os.O_RDONLY)
    except OSError:
        return None
    try:
        words = fs.read_at(fd, _BYTES_MAX, 0).decode("ascii", "replace").split()
    finally:
        fs.close(fd)
    if len(words) != 2 or not words[0].isdecimal():
        return None
    return int(words[0]), words[1]
