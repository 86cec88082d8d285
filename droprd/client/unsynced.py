"""What a consumer settled and has not brought to stable storage yet.

Owns the streams whose claims were written and not synced. What was settled longest ago waits no
longer than `SYNC_EVERY_S` for the next chance, and one sync serves all of a stream.

A crash leaves what is written to the kernel; the janitor syncs it within a second. Raises
SpoolNotReady, SpoolFull.
"""

from __future__ import annotations

import time

from droprd.client.settling import disk
from droprd.spool.inbox import Stream

SYNC_EVERY_S = 0.02


class Unsynced:
    """The streams to be synced. Used under the lock of its `Inbox`."""

    def __init__(self) -> None:
        self._streams: set[Stream] = set()
        self._since_s = 0.0

    def add(self, stream: Stream) -> None:
        """Something of this stream was settled."""
        if not self._streams:
            self._since_s = time.monotonic()
        self._streams.add(stream)

    def wait_at_most(self, timeout_s: float) -> float:
        """How many seconds of `timeout_s` may pass before the next sync is due."""
        if not self._streams:
            return timeout_s
        return min(timeout_s, max(0.0, self._since_s + SYNC_EVERY_S - time.monotonic()))

    def sync_if_due(self) -> None:
        """Sync, if something has waited long enough."""
        if self._streams and time.monotonic() - self._since_s >= SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Bring all to stable storage."""
        with disk("what was settled cannot be brought to stable storage"):
            while self._streams:
                self._streams.pop().sync()
