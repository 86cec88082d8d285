"""What an inbox in memory holds, shared by its writer and its consumers within one process.

Owns the frames and claims of every channel and priority (`Shelf`), what the writer knows of each
lane, who listens, and a temporary directory for the bodies that are files. Both sides of
`droprd.testing.inboxes.MemoryInbox` work on it, in as many threads as they like.

It ends with its process. Raises nothing.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from droprd.core.claimops import op_forget
from droprd.core.claims import Claims
from droprd.core.entry import pack_note
from droprd.core.leasing import Stored, read_stored
from droprd.core.match import Run
from droprd.model import Clock, LaneKey
from droprd.spool.layout import Layout
from droprd.spool.staged import Lane, StreamKey


class Shelf:
    """All of one channel and priority. `stored` and `firsts` (their first seqs) only grow at their
    ends and shrink at their beginnings, together, under `mutex`; claims change under `lock`."""

    def __init__(self, boot_id: bytes) -> None:
        self.claims = Claims(boot_id)
        self.stored: list[Stored] = []
        self.firsts: list[int] = []
        self.end = 0
        self.lock = threading.Lock()
        self.mutex = threading.Lock()

    def put(self, note: Mapping[str, Any], frame: bytes) -> None:
        """Store a frame, as a receiver notes it; its seq is given here."""
        with self.mutex:
            beside = pack_note({**note, "q": self.end})
            stored = read_stored(beside, memoryview(frame), (0, 0, 0))
            self.firsts.append(stored.first)
            self.stored.append(stored)
            self.end = stored.end

    def begin(self) -> int:
        """The seq of the oldest message that is here."""
        with self.mutex:
            return self.firsts[0] if self.firsts else self.end

    def drop_settled(self) -> list[Stored]:
        """Let go of the oldest frames as far as all is settled. Returns them. Dead letters stay."""
        with self.lock:
            below = self.claims.lowest_open()
            for first, _, _ in self.claims.dead.between(0, below):
                below = first
                break
            with self.mutex:
                count = sum(1 for stored in self.stored if stored.end <= below)
                gone = self.stored[:count]
                del self.stored[:count], self.firsts[:count]
            if gone:
                self.claims.apply([op_forget(gone[-1].end)])
        return gone


class Ear:
    """How one consumer is woken: a descriptor, and the channels it listens to."""

    def __init__(self) -> None:
        self.consumer = os.urandom(16)
        self.heard: set[str] = set()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


class Shelves:
    """One inbox in memory."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lanes: dict[LaneKey, Lane] = {}
        self.history: dict[LaneKey, Run] = {}
        self._shelves: dict[StreamKey, Shelf] = {}
        self._ears: dict[bytes, Ear] = {}
        self._mutex = threading.Lock()
        self._blobs: tempfile.TemporaryDirectory[str] | None = None

    # -- frames ----------------------------------------------------------------------------------

    def shelf(self, key: StreamKey) -> Shelf:
        """The shelf of a channel and priority, made if it is not there."""
        with self._mutex:
            return self._shelves.setdefault(key, Shelf(self.clock.boot_id()))

    def all(self) -> list[tuple[StreamKey, Shelf]]:
        """All shelves, by channel, the most urgent first."""
        with self._mutex:
            return sorted(self._shelves.items(), key=lambda one: one[0])

    @property
    def layout(self) -> Layout:
        """Where the bodies that are files lie."""
        with self._mutex:
            if self._blobs is None:
                self._blobs = tempfile.TemporaryDirectory(prefix="droprd-memory-inbox-")
                os.makedirs(Layout(self._blobs.name).inbox_blobs)
            return Layout(self._blobs.name)

    def remove_blob(self, sender: str, frame_id: bytes) -> None:
        """The body of a frame that has gone."""
        with suppress(FileNotFoundError):
            os.unlink(self.layout.inbox_blob(sender, frame_id))

    # -- who listens -----------------------------------------------------------------------------

    def join(self, ear: Ear) -> None:
        """A consumer has come."""
        with self._mutex:
            self._ears[ear.consumer] = ear

    def leave(self, consumer: bytes) -> None:
        """A consumer is gone; those who wait for its leases look again."""
        with self._mutex:
            gone = self._ears.pop(consumer, None)
            if gone is not None:
                os.close(gone.fd)
        self.ring(None)

    def alive(self, consumer: bytes) -> bool:
        """Whether that consumer is there."""
        return consumer in self._ears

    def ring(self, channels: Collection[str] | None, own: bytes = b"") -> None:
        """Wake the consumers of these channels, or all."""
        with self._mutex:
            for ear in self._ears.values():
                if ear.consumer != own and (channels is None or not ear.heard.isdisjoint(channels)):
                    os.eventfd_write(ear.fd, 1)
