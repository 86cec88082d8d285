"""A frame between the verdict on it and stable storage.

Values only. Made by `droprd.spool.judging`, written by `droprd.spool.channelog`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from droprd.core.frame import Buffer
from droprd.model import Head
from droprd.spool.headlog import Lane


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
