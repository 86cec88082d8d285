"""A lane as the receiver knows it, and a frame between the verdict on it and stable storage.

Values only. Frames are staged by `droprd.spool.judging` and written by the store of the inbox.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from droprd.core.frame import Buffer
from droprd.model import GENESIS, Head, LaneKey

StreamKey = tuple[str, int]
"""A channel and a priority."""


class Lane:
    """One lane as the receiver knows it.

    Attributes:
        head: after all frames that were taken, on disk or not.
        synced: after those that are on stable storage; the only one that is ever spoken of.
        floor: the number from which on its frames are remembered without a gap.
        index, newest: for `droprd.spool.headlog`: its number in lanes.log, and the offset of the
            note with its newest run, 0 if none.
    """

    __slots__ = ("floor", "head", "index", "key", "newest", "synced")

    def __init__(self, key: LaneKey, head: Head = GENESIS, floor: int = 0) -> None:
        self.key = key
        self.head = head
        self.synced = head
        self.floor = floor
        self.index = -1
        self.newest = 0


@dataclass(slots=True, eq=False)
class Part:
    """One lane's part of a push, as far as writing it may change it."""

    failed: bool = field(default=False, init=False)


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """A frame that was taken into its lane and waits to be written.

    `voids` are all messages without a body: the sender's and those refused here. The index is None
    for a whole frame that is not stored, because its channel is not permitted. `blob_bytes` is the
    size of the frame's body in inbox/blobs, which goes with the segment.
    """

    part: Part
    lane: Lane
    before: Head
    after: Head
    frame_id: bytes
    count: int
    pieces: list[Buffer]
    frame_bytes: int
    elapsed_ms: int | None
    voids: list[tuple[int | None, str]]
    blob_bytes: int = 0
