"""What goes out next on a lane: a run of frames cut from the lane's files for one push.

Owns the way from a lane's cursor to the pieces of a request: ranges of files wherever the stored
bytes go out as they are, own bytes only where bodies are left out. Computes the heads that follow.

Guarantees: never an unmerged or uncommitted frame; a message whose time is over, or whose bytes are
bad, is voided durably before its frame goes out with a hole. Raises: OSError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from droprd.core import chain, entry, frame
from droprd.core.outstate import LaneState, Pos
from droprd.core.push import FRAMES_PER_PUSH_MAX, Aside, LanePush
from droprd.errors import BadData
from droprd.model import Clock, Head, Lane, Void
from droprd.spool import log
from droprd.spool.fsops import Fs
from droprd.spool.lanes import LaneFiles

Piece = bytes | memoryview | tuple[int, int, int]
EXPIRED = "expired"
CORRUPT = "corrupt"


class SentFrame(NamedTuple):
    """A frame of a push: which head the receiver has once it is stored."""

    frame_id: bytes
    messages: int
    head: Head
    start: Pos
    end: Pos
    bodies_bytes: int
    voids: Mapping[int, str]


@dataclass(slots=True)
class Outgoing:
    """One lane's part of a push.

    Attributes:
        pieces: bytes, or (descriptor, offset, length) of what lies in lane files.
        blob: (frame id, bytes) if its one frame's body is a blob.
    """

    lane: Lane
    head: Head
    pieces: list[Piece] = field(default_factory=list)
    entry_bytes: int = 0
    asides: dict[int, Aside] = field(default_factory=dict)
    frames: list[SentFrame] = field(default_factory=list)
    blob: tuple[bytes, int] | None = None
    _fds: list[int] = field(default_factory=list)

    @property
    def push(self) -> LanePush:
        """Its part of the preamble."""
        return LanePush(
            self.lane.channel,
            self.lane.priority,
            self.head,
            len(self.frames),
            self.entry_bytes,
            self.asides,
        )

    @property
    def messages(self) -> int:
        return self.frames[-1].head.number - self.head.number if self.frames else 0

    def add_range(self, fd: int, offset: int, length: int) -> None:
        """Append stored bytes, joined with the piece before where they touch."""
        self.entry_bytes += length
        last = self.pieces[-1] if self.pieces else None
        if isinstance(last, tuple) and last[0] == fd and last[1] + last[2] == offset:
            self.pieces[-1] = (fd, last[1], last[2] + length)
            return
        self.pieces.append((fd, offset, length))

    @property
    def is_open(self) -> bool:
        """Whether the request may still be under way."""
        return bool(self._fds)

    def release(self, fs: Fs) -> None:
        """Close the lane files; the request is over."""
        while self._fds:
            fs.close(self._fds.pop())


def elapsed_ms(clock: Clock, info: frame.FrameInfo) -> int:
    """Milliseconds since a frame was stamped; across boots by the wall clock, never negative."""
    if info.boot_id == clock.boot_id():
        elapsed_ns = clock.boot_ns() - info.boot_ns
    else:
        elapsed_ns = clock.wall_ns() - info.wall_ns
    return max(0, elapsed_ns // 1_000_000)


def build(
    fs: Fs,
    clock: Clock,
    files: LaneFiles,
    state: LaneState,
    bytes_max: int,
    *,
    may_expire: bool,
    on_void: Callable[[bytes, dict[int, str]], None],
    on_damage: Callable[[int, int, int], None],
    blob_is_whole: Callable[[bytes, int], bool],
    frames_max: int = FRAMES_PER_PUSH_MAX,
) -> Outgoing:
    """The next frames of a lane, at least one if any waits, else up to `bytes_max`.

    `on_void(frame id, {index: reason})` is called for messages found expired or corrupt: the caller
    commits those voids before anything is sent. `on_damage(segment, start, end)` for bytes that
    hold no frame any more. `blob_is_whole(frame id, bytes)` says whether a blob is there.
    """
    out = Outgoing(state.lane, state.acked)
    head = state.acked
    own: tuple[int, int] | None = None
    try:
        for segment, _, item in files.walk(state, state.cursor):
            if isinstance(item, log.Damage):
                on_damage(segment, item.start, item.end)
                continue
            at = Pos(segment, item.head.offset)
            end = Pos(segment, item.head.end)
            if state.skips and state.skip_at(at) is not None:
                continue
            size = item.head.end - item.head.offset
            if out.frames and (out.entry_bytes + size > bytes_max or len(out.frames) >= frames_max):
                break
            try:
                stored = entry.unpack_note(item.note) if item.note else {}
                parsed = frame.parse(item.frame, [v[0] for v in stored.get("v", ())])
            except (BadData, LookupError, TypeError, AttributeError):
                on_damage(segment, item.head.offset, item.head.end)
                continue
            info = parsed.info
            if info.is_blob and out.frames:
                break
            voids = state.voids_at(at, info.frame_id, info.messages)
            owed = state.bytes_at(at, parsed)
            fresh = {i: CORRUPT for i in parsed.bad_bodies() if i not in voids}
            if info.is_blob and not voids and not blob_is_whole(info.frame_id, info.bodies_bytes):
                fresh = {0: CORRUPT}
            elapsed = elapsed_ms(clock, info) if info.ttl_ms or info.delay_ms else None
            if info.ttl_ms and elapsed is not None and elapsed >= info.ttl_ms and may_expire:
                fresh |= {
                    i: EXPIRED for i in range(info.messages) if i not in voids and i not in fresh
                }
            if fresh:
                on_void(info.frame_id, fresh)
                voids |= fresh
            if own is None or own[0] != segment:
                own = segment, fs.open(files.path(state.lane, segment), os.O_RDONLY)
                out._fds.append(own[1])
            if voids or elapsed is not None:
                holes = tuple(Void(i, voids[i]) for i in sorted(voids))
                out.asides[len(out.frames)] = Aside(elapsed, holes)
            if voids or item.note:
                pieces = parsed.without(set(voids))
                frame_bytes = sum(map(len, pieces))
                out.pieces.append(entry.pack_entry(bytes(16), 0, 0, b"", frame_bytes))
                out.pieces += [bytes(p) for p in pieces if len(p)]
                out.entry_bytes += entry.ENTRY_BYTES + frame_bytes
            else:
                out.add_range(own[1], item.head.offset, size)
            head = chain.extend(head, info.frame_id, info.messages)
            out.frames.append(SentFrame(info.frame_id, info.messages, head, at, end, owed, voids))
            if info.is_blob:
                if 0 not in voids:
                    out.blob = info.frame_id, info.bodies_bytes
                break
    except BaseException:
        out.release(fs)
        raise
    return out
