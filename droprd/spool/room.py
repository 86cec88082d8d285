"""How much the inbox may still take: quotas, and the reserve of the disk.

Owns the count of the bytes in the inbox, in all and by peer. It grows with what is stored and is
made afresh by `recount`, since the janitor deletes what was settled. A hint: it decides whether a
body is read, never what becomes of a message.

Raises OSError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from droprd.model import KIB, MIB
from droprd.spool.fsops import Fs
from droprd.spool.judging import Limits
from droprd.spool.layout import Layout


class Room:
    """The bytes of one inbox."""

    def __init__(self, fs: Fs, layout: Layout) -> None:
        self._fs = fs
        self._root = layout.root
        self._total = 0
        self._by_peer: dict[str, int] = {}

    def count(self, parts: Iterable[Mapping[str, int]]) -> None:
        """Forget what was counted; `parts` are all bytes there are, by peer."""
        by_peer: dict[str, int] = {}
        for part in parts:
            for peer, size in part.items():
                by_peer[peer] = by_peer.get(peer, 0) + size
        self._by_peer = by_peer
        self._total = sum(by_peer.values())

    def grow(self, peer: str, size: int) -> None:
        """So many bytes of this peer were stored."""
        self._by_peer[peer] = self._by_peer.get(peer, 0) + size
        self._total += size

    def lacks(self, peer: str, length: int, limits: Limits) -> str:
        """Why a request of `length` bytes must not be read now, or an empty text."""
        free, total = self._fs.free_bytes(self._root)
        if free - length < reserve_bytes(total):
            return "the disk is full"
        if limits.quota_bytes and self._total + length > limits.quota_bytes:
            return "the inbox is full"
        quota = limits.peer(peer).quota_bytes
        if quota and self._by_peer.get(peer, 0) + length > quota:
            return "this peer's part of the inbox is full"
        return ""


def reserve_bytes(disk_bytes: int) -> int:
    """What stays free on a file system of that size for acks, reports and deletes (P5)."""
    return min(max(disk_bytes // 20, MIB), KIB * MIB)
