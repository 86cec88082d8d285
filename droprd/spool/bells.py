"""Bells: FIFOs by which one process wakes another. A lost ring costs latency, never a message.

Owns `outbox/bell` (producers ring, the sender listens) and `inbox/waiting/<id>-<bits>`: one FIFO
for each open Inbox, made by it, its flock held while the consumer lives. `bits` is a 64-bit set in
hexadecimal, bit `crc32(channel) % 64` for each channel the consumer has asked for, so that the
receiver rings only those concerned.

Guarantees: ringing never blocks and never raises for a bell that nobody hears. Whoever rings after
a change, and whoever listens sets its bits *before* it looks, so a change is seen or rung for.
The death of a consumer is visible at once: its FIFO has no reader any more (`watch` turns that into
a poll event), and its lock is free.

A crash leaves the FIFO of a dead consumer; the janitor removes it (`remove_orphans`).
Raises OSError only where a bell is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from zlib import crc32

from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout

WAITING_MODE = 0o660
_RING = b"\0"
_DRAIN_BYTES = 65536


def channel_bits(channels: Iterable[str]) -> int:
    """The set of channels as it stands in a waiting FIFO's name."""
    bits = 0
    for channel in channels:
        bits |= 1 << crc32(channel.encode()) % 64
    return bits


def waiting_name(consumer: bytes, bits: int) -> str:
    """The file name of a consumer's FIFO."""
    return f"{consumer.hex()}-{bits:016x}"


def split_waiting_name(name: str) -> tuple[bytes, int] | None:
    """(consumer, bits) of a name in inbox/waiting, or None if it is none."""
    consumer, _, bits = name.partition("-")
    if len(consumer) != 32 or len(bits) != 16 or name != name.lower():
        return None
    try:
        return bytes.fromhex(consumer), int(bits, 16)
    except ValueError:
        return None


def listen(path: str) -> int:
    """Open a FIFO to listen on; poll the descriptor, then `drain` it. Raises: OSError.

    It is opened for writing too, so that it never reports an end of file.
    """
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)


def drain(fd: int) -> bool:
    """Take all rings out of a FIFO, before looking for what they announced. True if it had rung."""
    rung = False
    with suppress(BlockingIOError):
        while os.read(fd, _DRAIN_BYTES):
            rung = True
    return rung


def _open_to_ring(path: str) -> int | None:
    """A descriptor for writing, or None if nobody listens there."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None


def _ring(fd: int) -> bool:
    """False if nobody listens any more. A full FIFO has rung already."""
    try:
        os.write(fd, _RING)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


class Bell:
    """A bell with one listener, to be rung often: `outbox/bell`. Safe with threads."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd: int | None = None

    def ring(self) -> None:
        """Wake the listener, if there is one."""
        fd = self._fd
        if fd is not None and _ring(fd):
            return
        self.close()
        self._fd = _open_to_ring(self._path)
        if self._fd is not None:
            _ring(self._fd)

    def close(self) -> None:
        """Close the descriptor (in a forked child too); the next ring opens it again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class WaitingBell:
    """A consumer's own FIFO and its sign of life. `consumer` is the 16 random bytes it is known by.

    Raises: OSError when it is made.
    """

    def __init__(self, fs: Fs, layout: Layout, urandom: Callable[[int], bytes]) -> None:
        self._fs = fs
        self._layout = layout
        self._bits = 0
        while True:
            self.consumer = urandom(16)
            path = self._path()
            fs.mkfifo(path, WAITING_MODE)
            self.fd = listen(path)
            # Between these lines somebody may look whether we live, or the janitor remove us.
            if fs.lock(self.fd, 1.0) and fs.stat(path) is not None:
                return
            fs.close(self.fd)

    def _path(self) -> str:
        return f"{self._layout.waiting}/{waiting_name(self.consumer, self._bits)}"

    def hear(self, channels: Iterable[str]) -> None:
        """Be rung for these channels as well, from now on."""
        bits = self._bits | channel_bits(channels)
        if bits != self._bits:
            old = self._path()
            self._bits = bits
            self._fs.rename(old, self._path())

    def close(self) -> None:
        """Leave: no more rings, and everybody may know that this consumer is gone."""
        if self.fd >= 0:
            with suppress(FileNotFoundError):
                self._fs.unlink(self._path())
        self.close_in_child()

    def close_in_child(self) -> None:
        """Close the descriptor in a forked child; the name and the lock stay the parent's."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._fs.close(fd)


class Waiting:
    """All FIFOs in `inbox/waiting`, for those who ring them or ask whether a consumer lives.

    `own` is the descriptor-holder's own consumer, which is neither rung nor asked about.
    """

    def __init__(self, fs: Fs, layout: Layout, own: bytes = b"") -> None:
        self._fs = fs
        self._layout = layout
        self._own = own
        self._fds: dict[bytes, int] = {}

    def ring(self, channels: Iterable[str]) -> None:
        """Wake the consumers that have asked for any of these channels."""
        wanted = channel_bits(channels)
        here = self._names()
        for consumer in [c for c in self._fds if c not in here]:
            os.close(self._fds.pop(consumer))
        for consumer, (name, bits) in here.items():
            if not bits & wanted or consumer == self._own:
                continue
            fd = self._fds.get(consumer)
            if fd is None:
                fd = _open_to_ring(f"{self._layout.waiting}/{name}")
                if fd is None:
                    # Renamed since it was listed, or dead. One that renames itself looks again.
                    continue
                self._fds[consumer] = fd
            if not _ring(fd):
                os.close(self._fds.pop(consumer))

    def watch(self, consumer: bytes) -> int | None:
        """A descriptor on which poll(2) reports an error once that consumer has died.

        None if it is dead already. The caller closes it.
        """
        for _ in range(3):  # it may rename itself meanwhile
            found = self._names().get(consumer)
            if found is None:
                return None
            fd = _open_to_ring(f"{self._layout.waiting}/{found[0]}")
            if fd is not None:
                if self._fs.try_lock(fd):
                    os.close(fd)  # its lock is free, whoever else may have it open
                    return None
                return fd
        return None

    def alive(self, consumer: bytes) -> bool:
        """Whether that consumer lives: it is listed, listens, and holds its lock."""
        if consumer == self._own:
            return True
        fd = self.watch(consumer)
        if fd is None:
            return False
        os.close(fd)
        return True

    def remove_orphans(self) -> int:
        """Remove the FIFOs of dead consumers. Returns how many."""
        removed = 0
        for name, _ in self._names().values():
            path = f"{self._layout.waiting}/{name}"
            try:
                fd = self._fs.open(path, os.O_RDWR)
            except OSError:
                continue
            try:
                # One that was only just made and is not locked yet sees this and makes another.
                if self._fs.try_lock(fd):
                    self._fs.unlink(path)
                    removed += 1
            except FileNotFoundError:
                pass
            finally:
                self._fs.close(fd)
        return removed

    def close(self) -> None:
        """Close what is open, in a forked child too."""
        fds, self._fds = self._fds, {}
        for fd in fds.values():
            os.close(fd)

    def _names(self) -> dict[bytes, tuple[str, int]]:
        here = {}
        try:
            names = self._fs.listdir(self._layout.waiting)
        except FileNotFoundError:
            return {}
        for name in names:
            found = split_waiting_name(name)
            if found is not None:
                here[found[0]] = (name, found[1])
        return here
