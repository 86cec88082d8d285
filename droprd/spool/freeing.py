"""Giving back what purged messages take on the disk: their bodies in lanes, and their blobs.

A frame's head stays, for it goes out with a hole where each body was; of a body whole blocks are
given back to the file system. Small messages that have a frame of their own take less than a block
and stay until their segment goes.

Never of a frame that may be on its way at this moment, and never before the lane is independent of
the journals behind it: mending would put back what is missing. A crash leaves some of it undone; it
goes with its segment then.

Raises: OSError.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Container

from droprd.core import frame
from droprd.core.outstate import OutboxState, Pos
from droprd.errors import BadData
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.blobs import merged_blob
from droprd.spool.handle import Spool
from droprd.spool.lanes import LaneFiles

FRAMES_A_LOOK = 2000
BLOCK_BYTES = 4096


class Freer:
    """Gives back, a piece at a time, what it was told."""

    def __init__(self, spool: Spool, state: Callable[[], OutboxState], files: LaneFiles) -> None:
        self._spool = spool
        self._state = state
        self._files = files
        self._pending: deque[tuple[Lane, Pos, Pos]] = deque()

    def add(self, lane: Lane, start: Pos, end: Pos) -> None:
        """The frames that begin there have no bodies any more."""
        if self._pending and self._pending[-1][0] == lane and self._pending[-1][2] == start:
            start = self._pending.pop()[1]
        self._pending.append((lane, start, end))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self._pending

    def work(self, busy: Container[Lane], sync_lanes: Callable[[], None]) -> None:
        """Go on for a while; lanes that are `busy` wait for the next time."""
        if any(end > self._state().lane(lane).synced for lane, _, end in self._pending):
            sync_lanes()
        left = FRAMES_A_LOOK
        for _ in range(len(self._pending)):
            if left <= 0:
                return
            lane, start, end = self._pending.popleft()
            if lane in busy:
                self._pending.append((lane, start, end))
                continue
            at, left = self._free(lane, start, end, left)
            if at < end:
                self._pending.appendleft((lane, at, end))

    def _free(self, lane: Lane, start: Pos, end: Pos, left: int) -> tuple[Pos, int]:
        fs = self._spool.fs
        open_now: tuple[int, int] | None = None
        try:
            for segment, _, item in self._files.walk(self._state().lane(lane), start):
                at = Pos(segment, item.start if isinstance(item, log.Damage) else item.head.offset)
                if at >= end:
                    break
                if left <= 0:
                    return at, 0
                left -= 1
                if isinstance(item, log.Damage) or not item.frame:
                    continue
                try:
                    info = frame.peek(item.frame)
                except BadData:
                    continue
                if info.is_blob:
                    blob = merged_blob(fs, self._spool.layout, info.frame_id)
                    if blob is not None:
                        fs.unlink(blob)
                    continue
                size = len(item.frame) - info.head_bytes
                if size < 2 * BLOCK_BYTES:
                    continue
                if open_now is None or open_now[0] != segment:
                    if open_now is not None:
                        fs.close(open_now[1])
                    path = self._files.path(lane, segment)
                    open_now = segment, fs.open(path, os.O_RDWR)
                fs.punch(open_now[1], item.head.end - size, size)
        finally:
            if open_now is not None:
                fs.close(open_now[1])
        return end, left
