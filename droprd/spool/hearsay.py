"""Hearsay: the receiver tells the sender which peers called, over the outbox's bell.

A producer's ring is a zero byte. `hear` writes a peer's name between line feeds into the same FIFO,
in one write of less than PIPE_BUF bytes, so that lines never mix. It is a hint and no more: it ends
a peer's backoff. A full or missing FIFO loses it; whoever may send may forge it, and gains a try.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from droprd.model import NAME_PATTERN
from droprd.spool.layout import Layout

INTERVAL_S = 1.0
READ_BYTES = 65536


class Hearsay:
    """Tells of peers, of each at most once a second. Of one thread."""

    def __init__(self, layout: Layout, now: Callable[[], float]) -> None:
        """`now` gives monotonic seconds."""
        self._path = layout.bell
        self._now = now
        self._told: dict[str, float] = {}
        self._fd: int | None = None

    def hear(self, peer: str) -> None:
        """A request of `peer` came in, with credentials that are good."""
        now = self._now()
        if now - self._told.get(peer, float("-inf")) < INTERVAL_S:
            return
        self._told[peer] = now
        if self._fd is None:
            with suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = os.open(self._path, flags)
        if self._fd is None:
            return
        try:
            os.write(self._fd, f"\n{peer}\n".encode())
        except BlockingIOError:
            return
        except OSError:
            self.close()  # nobody listens: the next one who does is found by a new descriptor

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def read_bell(fd: int) -> tuple[bool, set[str]]:
    """Empty the bell: (whether a producer rang, the peers that were heard)."""
    parts = []
    with suppress(BlockingIOError):
        while data := os.read(fd, READ_BYTES):
            parts.append(data)
            if len(data) < READ_BYTES:
                break
    data = b"".join(parts)
    rang = b"\0" in data
    if not data.strip(b"\0"):
        return rang, set()
    lines = data.replace(b"\0", b"").decode("ascii", "replace").split("\n")
    return rang, {line for line in lines if NAME_PATTERN.match(line)}
