"""`droprd.spool.fsops.Fs` for one simulated process, and the faults that can meet it.

A `SimFs` is a process on a `SimDisk`: it owns descriptors and flocks, and all of them vanish when
it dies. Every operation that changes the disk, and every sync, is a *step*. At the step `alarm` the
function `interrupt` is asked what happens there: nothing (it may let other processes run
meanwhile), a `Fault`, or a `Crash`. Once a process is dead each of its calls raises `Crash` again,
so that no clean-up code of the dying process can touch the disk.

`Crash` is a BaseException: code that handles errors must not be able to handle its own death.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable, Sequence
from random import Random
from typing import NoReturn

from droprd.spool.fsops import Buffer, Stat
from droprd.testing.simdisk import PAGE_BYTES, SimDir, SimDisk, SimFile, torn

NEVER = 1 << 62


class Crash(BaseException):
    """The process is dead (killed, or the machine lost its power)."""


class Fault(enum.Enum):
    """What may happen to one operation."""

    DIE_HALFWAY = "die halfway"
    EIO = "eio"
    ENOSPC = "enospc"


class _Open:
    __slots__ = ("file", "fs", "readable", "writable")

    def __init__(self, fs: SimFs, file: SimFile, readable: bool, writable: bool) -> None:
        self.fs = fs
        self.file = file
        self.readable = readable
        self.writable = writable


class SimFs:
    """The files of a simulated machine as one of its processes sees them.

    Attributes:
        steps: how many mutating operations and syncs this process has begun.
        alarm: the step at which `interrupt(fs, operation)` is called; it may set the next one.
        left_out: called when a sync was left out (see `SimDisk.disable_sites`).
        read_alarm: the read at which `pause(fs)` is called, which may let other processes run.
    """

    def __init__(self, disk: SimDisk, rng: Random, name: str = "process") -> None:
        self.disk = disk
        self.name = name
        self.alive = True
        self.steps = 0
        self.alarm = NEVER
        self.reads = 0
        self.read_alarm = NEVER
        self.pause: Callable[[SimFs], None] = lambda fs: None
        self.left_out: Callable[[SimFs], None] = lambda fs: None
        self.interrupt: Callable[[SimFs, str], Fault | None] = lambda fs, operation: None
        self.now_ns: Callable[[], int] = lambda: 0
        self._rng = rng
        self._open: dict[int, _Open] = {}
        self._next_fd = 1000

    def __repr__(self) -> str:
        return f"<SimFs {self.name}>"

    # Life and death

    def die(self) -> None:
        """End the process without a word: descriptors are closed, locks are free."""
        self.alive = False
        self.alarm = 0
        for opened in self._open.values():
            opened.file.locks.pop(opened, None)
        self._open.clear()

    def _step(self, operation: str) -> Fault | None:
        self.steps += 1
        if self.steps < self.alarm:
            return None
        if not self.alive:
            raise Crash(self.name)
        self.alarm = NEVER
        fault = self.interrupt(self, operation)
        if not self.alive:
            raise Crash(self.name)
        return fault

    def _fail_plain(self, fault: Fault, path: str) -> None:
        """Carry out a fault at an operation that happens whole or not at all."""
        if fault is Fault.DIE_HALFWAY:
            self.die()
            raise Crash(self.name)
        code = errno.EIO if fault is Fault.EIO else errno.ENOSPC
        raise OSError(code, os.strerror(code), path)

    # Files

    def open(self, path: str, flags: int, mode: int = 0o640) -> int:
        parent, name = self._parent(path)
        node = parent.names.get(name)
        if flags & os.O_CREAT:
            if node is None:
                fault = self._step("create")
                if fault is not None:
                    self._fail_plain(fault, path)
                # Another process may have run in between.
                node = parent.names.get(name)
            if node is not None and flags & os.O_EXCL:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            if node is None:
                node = self.disk.new_file(mode)
                node.mtime_ns = self.now_ns()
                self.disk.change_name(node, None, "", parent, name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(node, SimDir):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        access = flags & os.O_ACCMODE
        if node.fifo and access == os.O_WRONLY:
            # Nobody listens here: a lost ring costs time, never a message.
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), path)
        fd = self._next_fd
        self._next_fd += 1
        self._open[fd] = _Open(self, node, access != os.O_WRONLY, access != os.O_RDONLY)
        if flags & os.O_TRUNC and node.content:
            self.truncate(fd, 0)
        return fd

    def close(self, fd: int) -> None:
        opened = self._open.pop(fd, None)
        if opened is None:
            if not self.alive:
                return  # nothing is left to close, and a generator's clean-up need not know
            self._bad(fd)
        opened.file.locks.pop(opened, None)

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        self.reads += 1
        if self.reads >= self.read_alarm:
            self.read_alarm = NEVER
            self.pause(self)
        opened = self._open.get(fd)
        if opened is None or not opened.readable:
            self._bad(fd)
        return bytes(opened.file.content[offset : offset + length])

    def write_at(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
        opened = self._open.get(fd)
        if opened is None or not opened.writable:
            self._bad(fd)
        data = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
        fault = self._step("write")
        file = opened.file
        if fault is None and not (self.disk.full and offset + len(data) > len(file.content)):
            if data:
                self.disk.change(file, offset, data)
                file.mtime_ns = self.now_ns()
            return
        if data:
            # Killed or out of space in the middle: kernels look at signals, and allocate, by pages.
            part = torn(offset, data, self._rng, PAGE_BYTES)
            if part:
                self.disk.change(file, offset, part)
        self._fail_plain(fault or Fault.ENOSPC, str(fd))

    def size(self, fd: int) -> int:
        return len(self._file(fd).content)

    def file_of(self, fd: int) -> tuple[int, int]:
        return (1, self._file(fd).number)

    def truncate(self, fd: int, length: int) -> None:
        opened = self._open.get(fd)
        if opened is None or not opened.writable:
            self._bad(fd)
        fault = self._step("truncate")
        if fault is None and self.disk.full and length > len(opened.file.content):
            fault = Fault.ENOSPC
        if fault is not None:
            self._fail_plain(fault, str(fd))
        self.disk.change(opened.file, length, None)

    def punch(self, fd: int, offset: int, length: int) -> None:
        self.write_at(fd, [bytes(length)], offset)

    def sync(self, fd: int, site: str) -> None:
        file = self._file(fd)
        fault = self._step("sync")
        disk = self.disk
        disk.syncs[site] = disk.syncs.get(site, 0) + 1
        if fault is not None:
            # Dying within a sync changes nothing that a power cut could not do as well.
            if fault is Fault.EIO:
                disk.fail_sync(file, self._rng)
            self._fail_plain(fault, site)
        if site not in disk.disable_sites:
            disk.sync(file)
        else:
            self.left_out(self)

    def copy(self, src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int) -> None:
        data = self.read_at(src_fd, length, src_offset)
        self.write_at(dst_fd, [data], dst_offset)
        if len(data) < length:
            raise OSError(errno.EIO, "the source ended early")

    def chmod(self, fd: int, mode: int) -> None:
        self._file(fd).mode = mode

    # Names

    def sync_dir(self, path: str, site: str) -> None:
        directory = self._directory(path)
        fault = self._step("sync_dir")
        disk = self.disk
        disk.syncs[site] = disk.syncs.get(site, 0) + 1
        if fault is not None:
            self._fail_plain(fault, path)
        if site not in disk.disable_sites:
            disk.sync_dir(directory)
        else:
            self.left_out(self)

    def rename(self, old: str, new: str) -> None:
        fault = self._step("rename")
        if fault is not None:
            self._fail_plain(fault, old)
        old_dir, old_name = self._parent(old)
        new_dir, new_name = self._parent(new)
        node = old_dir.names.get(old_name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        target = new_dir.names.get(new_name)
        if target is node:
            return
        if isinstance(target, SimDir) and (target.names or not isinstance(node, SimDir)):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), new)
        self.disk.change_name(node, old_dir, old_name, new_dir, new_name)

    def unlink(self, path: str) -> None:
        fault = self._step("unlink")
        if fault is not None:
            self._fail_plain(fault, path)
        parent, name = self._parent(path)
        node = parent.names.get(name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(node, SimDir):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self.disk.change_name(node, parent, name, None, "")

    def mkdir(self, path: str, mode: int = 0o750) -> None:
        fault = self._step("mkdir")
        if fault is not None:
            self._fail_plain(fault, path)
        self._new_name(path, self.disk.new_dir(mode))

    def rmdir(self, path: str) -> None:
        fault = self._step("rmdir")
        if fault is not None:
            self._fail_plain(fault, path)
        directory = self._directory(path)
        if directory.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        parent, name = self._parent(path)
        self.disk.change_name(directory, parent, name, None, "")

    def mkfifo(self, path: str, mode: int) -> None:
        fault = self._step("mkfifo")
        if fault is not None:
            self._fail_plain(fault, path)
        self._new_name(path, self.disk.new_file(mode, fifo=True))

    def listdir(self, path: str) -> list[str]:
        return sorted(self._directory(path).names)

    def stat(self, path: str) -> Stat | None:
        if not self.alive:
            raise Crash(self.name)
        try:
            parent, name = self._parent(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        node = parent.names.get(name) if name else parent
        if node is None:
            return None
        is_dir = isinstance(node, SimDir)
        size = 0 if isinstance(node, SimDir) else len(node.content)
        fifo = isinstance(node, SimFile) and node.fifo
        return Stat(
            file=(1, node.number),
            size=size,
            is_dir=is_dir,
            is_file=not is_dir and not fifo,
            is_fifo=fifo,
            uid=0,
            gid=0,
            mode=node.mode,
            mtime_ns=0 if isinstance(node, SimDir) else node.mtime_ns,
            blocks_bytes=-(-size // 512) * 512,
        )

    def free_bytes(self, path: str) -> tuple[int, int]:
        self._directory(path)
        return (0 if self.disk.full else self.disk.free_bytes), 1 << 40

    # Locks

    def try_lock(self, fd: int, *, shared: bool = False) -> bool:
        opened = self._open.get(fd)
        if opened is None:
            self._bad(fd)
        locks = opened.file.locks
        for holder, holder_shares in locks.items():
            if holder is not opened and not (shared and holder_shares):
                return False
        locks[opened] = shared
        return True

    def lock(self, fd: int, timeout_s: float, *, shared: bool = False) -> bool:
        """Like `try_lock`: a holder that does not run cannot let go however long one waits."""
        return self.try_lock(fd, shared=shared)

    def unlock(self, fd: int) -> None:
        opened = self._open.get(fd)
        if opened is None:
            self._bad(fd)
        opened.file.locks.pop(opened, None)

    # Within

    def _bad(self, fd: int) -> NoReturn:
        if not self.alive:
            raise Crash(self.name)
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), str(fd))

    def _file(self, fd: int) -> SimFile:
        opened = self._open.get(fd)
        if opened is None:
            self._bad(fd)
        return opened.file

    def _directory(self, path: str) -> SimDir:
        if not self.alive:
            raise Crash(self.name)
        node: SimFile | SimDir | None = self.disk.root
        for part in path.split("/"):
            if part:
                if not isinstance(node, SimDir):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
                node = node.names.get(part)
                if node is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not isinstance(node, SimDir):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node

    def _parent(self, path: str) -> tuple[SimDir, str]:
        head, _, name = path.rpartition("/")
        return self._directory(head), name

    def _new_name(self, path: str, node: SimFile | SimDir) -> None:
        parent, name = self._parent(path)
        if name in parent.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self.disk.change_name(node, None, "", parent, name)
