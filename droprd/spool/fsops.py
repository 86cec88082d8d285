"""All that the spool asks of the operating system's files. Only this module syncs.

`Fs` is the interface; `OsFs` is the real thing, `droprd.testing.simulation.SimFs` the simulated
disk on which crashes are tried. Every sync names its *site* (`"journal.put"`, `"lanes.merge"`):
the simulation can then leave out one of them and must notice.

Guarantees of `OsFs`: descriptors are close-on-exec, regular files are never reached through a
symlink in the last component, `write_at` writes everything or raises, nothing is buffered here.
A failed sync is raised and must never be repeated on the same file: the kernel may report success
the second time while the disk holds old data.

Locks are flock(2): bound to the open file, and gone when its last descriptor is closed. They are
released in forked children by `close_in_child` (a fork shares the open file and its lock).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat as stat_module
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview

IOV_MAX = 1024
COPY_CHUNK_BYTES = 1 << 20
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # fallocate(2)


@dataclass(frozen=True, slots=True)
class Stat:
    """What is known of a name: which file it leads to (device, inode), its size and kind."""

    file: tuple[int, int]
    size: int
    is_dir: bool
    is_file: bool
    is_fifo: bool
    uid: int
    gid: int
    mode: int
    mtime_ns: int
    blocks_bytes: int


class Fs(Protocol):
    """The file operations the spool is built from. All raise OSError."""

    def open(self, path: str, flags: int, mode: int = 0o640) -> int: ...
    def close(self, fd: int) -> None: ...
    def read_at(self, fd: int, length: int, offset: int) -> bytes: ...
    def write_at(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None: ...
    def size(self, fd: int) -> int: ...
    def file_of(self, fd: int) -> tuple[int, int]: ...
    def truncate(self, fd: int, length: int) -> None: ...
    def punch(self, fd: int, offset: int, length: int) -> None: ...
    def sync(self, fd: int, site: str) -> None: ...
    def sync_dir(self, path: str, site: str) -> None: ...
    def rename(self, old: str, new: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def mkdir(self, path: str, mode: int = 0o750) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def listdir(self, path: str) -> list[str]: ...
    def stat(self, path: str) -> Stat | None: ...
    def chmod(self, fd: int, mode: int) -> None: ...
    def copy(
        self, src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int
    ) -> None: ...
    def try_lock(self, fd: int, *, shared: bool = False) -> bool: ...
    def lock(self, fd: int, timeout_s: float, *, shared: bool = False) -> bool: ...
    def unlock(self, fd: int) -> None: ...
    def mkfifo(self, path: str, mode: int) -> None: ...
    def free_bytes(self, path: str) -> tuple[int, int]: ...


def _stat(found: os.stat_result) -> Stat:
    mode = found.st_mode
    return Stat(
        file=(found.st_dev, found.st_ino),
        size=found.st_size,
        is_dir=stat_module.S_ISDIR(mode),
        is_file=stat_module.S_ISREG(mode),
        is_fifo=stat_module.S_ISFIFO(mode),
        uid=found.st_uid,
        gid=found.st_gid,
        mode=stat_module.S_IMODE(mode),
        mtime_ns=found.st_mtime_ns,
        blocks_bytes=found.st_blocks * 512,
    )


class OsFs:
    """The operating system's files."""

    def open(self, path: str, flags: int, mode: int = 0o640) -> int:
        """Open `path`; a created file gets exactly `mode`, whatever the umask."""
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
        try:
            found = os.fstat(fd)
            if not stat_module.S_ISREG(found.st_mode) and not stat_module.S_ISFIFO(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            if (
                flags & os.O_CREAT
                and flags & os.O_EXCL
                and stat_module.S_IMODE(found.st_mode) != mode
            ):
                os.fchmod(fd, mode)
        except OSError:
            os.close(fd)
            raise
        return fd

    def close(self, fd: int) -> None:
        os.close(fd)

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only where the file ends."""
        data = os.pread(fd, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]
        got = len(data)
        while got < length:
            data = os.pread(fd, length - got, offset + got)
            if not data:
                break
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def write_at(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
        """Write all pieces one after another from `offset`, or raise."""
        if len(pieces) == 1:
            data = memoryview(pieces[0]).cast("B")
            while data:
                n = os.pwrite(fd, data, offset)
                if n == 0:
                    raise OSError(errno.EIO, "write returned 0")
                data = data[n:]
                offset += n
            return
        todo = [memoryview(p).cast("B") for p in pieces if len(p)]
        while todo:
            n = os.pwritev(fd, todo[:IOV_MAX], offset)
            if n == 0:
                raise OSError(errno.EIO, "write returned 0")
            offset += n
            done = 0
            while done < len(todo) and n >= len(todo[done]):
                n -= len(todo[done])
                done += 1
            todo = todo[done:]
            if n:
                todo[0] = todo[0][n:]

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def file_of(self, fd: int) -> tuple[int, int]:
        found = os.fstat(fd)
        return found.st_dev, found.st_ino

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Give these bytes back to the file system, and read zeros instead, if it can do that."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise OSError(number, os.strerror(number))

    def sync(self, fd: int, site: str) -> None:
        """Bring the file's bytes and size to stable storage."""
        os.fdatasync(fd)

    def sync_dir(self, path: str, site: str) -> None:
        """Bring the names in a directory to stable storage."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str, mode: int = 0o750) -> None:
        """Make a directory with `mode` whatever the umask; setgid is inherited, never set here."""
        os.mkdir(path, mode)
        found = stat_module.S_IMODE(os.stat(path).st_mode)
        wanted = mode | (found & stat_module.S_ISGID)
        if found != wanted:
            os.chmod(path, wanted)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def stat(self, path: str) -> Stat | None:
        """What `path` is (a symlink is not followed), or None if there is nothing."""
        try:
            return _stat(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def chmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def copy(self, src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, length: int) -> None:
        """Copy bytes between files within the kernel where the file systems can, else by hand."""
        while length:
            try:
                n = os.copy_file_range(src_fd, dst_fd, min(length, 1 << 30), src_offset, dst_offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                data = os.pread(src_fd, min(length, COPY_CHUNK_BYTES), src_offset)
                self.write_at(dst_fd, [data], dst_offset)
                n = len(data)
            if n == 0:
                raise OSError(errno.EIO, "the source ended early")
            src_offset += n
            dst_offset += n
            length -= n

    def try_lock(self, fd: int, *, shared: bool = False) -> bool:
        """Take the flock now; False if somebody else holds it."""
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def lock(self, fd: int, timeout_s: float, *, shared: bool = False) -> bool:
        """Take the flock within `timeout_s`; False if it is still held by somebody else then."""
        if self.try_lock(fd, shared=shared):
            return True
        deadline = time.monotonic() + timeout_s
        pause_s = 0.0002
        while time.monotonic() < deadline:
            time.sleep(pause_s)
            if self.try_lock(fd, shared=shared):
                return True
            pause_s = min(pause_s * 1.5, 0.01)
        return False

    def unlock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)

    def mkfifo(self, path: str, mode: int) -> None:
        os.mkfifo(path, mode)
        os.chmod(path, mode)

    def free_bytes(self, path: str) -> tuple[int, int]:
        """(bytes free to us, bytes in all) of the file system that holds `path`."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def sync_tree_up(fs: Fs, path: str, stop: str, site: str) -> None:
    """Sync the directory `path` and each one above it up to and including `stop`."""
    while True:
        fs.sync_dir(path, site)
        if path == stop or len(path) <= len(stop):
            return
        path = os.path.dirname(path)


def make_dirs(fs: Fs, path: str, stop: str, mode: int, site: str) -> None:
    """Make `path` and what is missing between it and `stop`; all these names are synced then.

    Those of directories that were there too: their maker may have been killed before he synced.
    """
    if path == stop:
        return
    parent = os.path.dirname(path)
    make_dirs(fs, parent, stop, mode, site)
    if fs.stat(path) is None:
        fs.mkdir(path, mode)
    # If we stop here: an empty directory, or none; the next one who needs it makes it again.
    fs.sync_dir(parent, site)


def replace_file(fs: Fs, path: str, data: bytes, site: str, mode: int = 0o640) -> None:
    """Put `data` at `path` as a whole: readers see the old or the new, also after a crash."""
    temporary = f"{path}.new"
    if fs.stat(temporary) is not None:
        fs.unlink(temporary)
    fd = fs.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        fs.write_at(fd, [data], 0)
        fs.sync(fd, site)
    finally:
        fs.close(fd)
    # If we stop here: the old file counts, the temporary one is overwritten next time.
    fs.rename(temporary, path)
    fs.sync_dir(os.path.dirname(path), site)
