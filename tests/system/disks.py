"""Real file systems for tests: small ones that fill up, some that are shut down, some read-only.

Whoever has no right to mount skips the test, with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 1 << 20
_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN of <linux/fs.h>: _IOR('X', 125, __u32)
_WITHOUT_LOG_FLUSH = 2  # nothing more reaches the disk, as after a power cut


def _run(*command: str) -> None:
    """Run a command that prepares a test. Skips the test where it cannot."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(command[:3])} is not possible here: {done.stderr.strip()}")


class Disk:
    """A file system in a file, mounted at `where`; kind is ext4 or xfs."""

    def __init__(self, path: Path, kind: str = "ext4", size_mib: int = 64) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting needs root")
        self.image = path / f"{kind}.img"
        self.where = path / kind
        with open(self.image, "wb") as file:
            file.truncate(size_mib * MIB)
        reserve = ["-m", "0"] if kind == "ext4" else []
        _run(f"mkfs.{kind}", "-q", *reserve, str(self.image))
        self.where.mkdir()
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.where))

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.where)], check=True)

    def shut_down(self) -> None:
        """Let nothing more reach the disk, and fail everything from now on."""
        fd = os.open(self.where, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
        finally:
            os.close(fd)

    def close(self) -> None:
        if self.where.is_mount():
            subprocess.run(["umount", "--lazy", str(self.where)], check=False)


@contextlib.contextmanager
def tmpfs(where: Path, size_mib: int) -> Iterator[Path]:
    """A file system in memory of that size."""
    where.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(where))
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=False)


@contextlib.contextmanager
def read_only(where: Path) -> Iterator[None]:
    """Nobody may write below `where`, root neither."""
    _run("mount", "--bind", str(where), str(where))
    try:
        _run("mount", "-o", "remount,bind,ro", str(where))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=False)
