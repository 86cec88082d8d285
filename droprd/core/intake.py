"""What a push brings: its entries, checked to the last byte before any of them is taken.

Owns the checks that stand between the network and the inbox: entry and frame checksums, lengths,
every body, the channel and priority of the lane, the maps that consumers will read, the voids
beside a frame. What passes is stored as it came; nothing here depends on state.

Pure. Raises BadData, which means that the sender is broken or hostile: the whole request is
refused and changes nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from droprd.core import entry as entries
from droprd.core import frame as frames
from droprd.core.entry import ENTRY_BYTES
from droprd.core.frame import Frame
from droprd.core.push import NO_ASIDE, LanePush
from droprd.errors import BadData
from droprd.model import Void, is_message_id

_FLAGS_AT = 5  # in a frame
OWN_ID_KEY, TYPE_KEY, HEADERS_KEY, SHA256_KEY = "i", "t", "h", "d"


class Incoming(NamedTuple):
    """A checked frame and what came beside it."""

    frame: Frame
    elapsed_ms: int | None
    voids: tuple[Void, ...]


def read_lane(lane: LanePush, part: memoryview) -> list[Incoming]:
    """The frames of one lane's part of a push, in order. Raises: BadData."""
    incoming = []
    at = 0
    for index in range(lane.frames):
        head = entries.parse_entry(part, at, None, None)
        if head is None or head.note_bytes or not head.frame_bytes:
            raise BadData(f"entry {index} of {lane.channel} is damaged or is no frame alone")
        frame_at = at + ENTRY_BYTES
        at = frame_at + head.frame_bytes
        if at > len(part):
            raise BadData(f"entry {index} of {lane.channel} is cut short")
        aside = lane.asides.get(index, NO_ASIDE)
        incoming.append(
            Incoming(_frame(lane, part[frame_at:at], aside.voids), aside.elapsed_ms, aside.voids)
        )
    if at != len(part):
        raise BadData(f"{len(part) - at} bytes follow the entries of {lane.channel}")
    return incoming


def _frame(lane: LanePush, data: memoryview, voids: tuple[Void, ...]) -> Frame:
    if voids:
        holes = frozenset(void.index for void in voids)
        # The largest index is the last one; `parse` adds up lengths by it, so it is checked first.
        if voids[-1].index >= frames.peek(data).messages:
            raise BadData("a void names a message that its frame does not have")
        frame = frames.parse(data, holes)
    else:
        frame = frames.parse(data)
    if frame.lane.channel != lane.channel or frame.lane.priority != lane.priority:
        raise BadData(f"a frame for {frame.lane} came in the lane of {lane.channel}")
    bad = frame.bad_bodies()
    if bad:
        raise BadData(f"body {bad[0]} of a frame does not match its checksum")
    info = frame.info
    if info.shared_bytes or info.maps_bytes:
        _check_map(frame.shared)
        for single in frame.singles.values():
            _check_map(single)
    if info.is_blob:
        blob_sha256(frame)
    return frame


def _check_map(values: dict[str, Any]) -> None:
    """What consumers rely on; keys that are unknown here are theirs to pass over."""
    own_id = values.get(OWN_ID_KEY)
    if own_id is not None and not (isinstance(own_id, str) and is_message_id(own_id)):
        raise BadData("a message's own id in a frame is none")
    if not isinstance(values.get(TYPE_KEY, ""), str):
        raise BadData("a content type in a frame is no text")
    headers = values.get(HEADERS_KEY, {})
    if not isinstance(headers, dict) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in headers.items()
    ):
        raise BadData("the headers in a frame are no map of texts")


def blob_sha256(frame: Frame) -> bytes:
    """The SHA-256 that a blob frame names. Raises: BadData if it names none."""
    digest = frame.shared.get(SHA256_KEY)
    if not isinstance(digest, bytes) or len(digest) != 32:
        raise BadData("a blob frame names no SHA-256")
    return digest


def blob_frames(lane: LanePush, part: memoryview) -> list[Frame]:
    """The blob frames of one lane's part whose body is wanted, found without looking at others.

    Raises: BadData for a damaged one; other damage is left to `read_lane`.
    """
    found = []
    at = 0
    for index in range(lane.frames):
        size = entries.entry_bytes(part, at)
        head_at = at + ENTRY_BYTES
        if size is None or at + size > len(part):
            break
        if (
            part[head_at + _FLAGS_AT] & frames.FLAG_BLOB
            and not lane.asides.get(index, NO_ASIDE).voids
        ):
            found.append(frames.parse(part[head_at : at + size]))
            blob_sha256(found[-1])
        at += size
    return found
