"""The body of a push and of its answer, as they travel between two nodes.

Owns these bytes (docs/wire.md) and nothing else: no socket, no file, no decision. Every `encode_*`
gives a whole body; every `decode_*` takes a whole body and returns frozen values, or raises
`BadData` naming the field. Nothing is guessed: a missing or unknown key, a wrong type, a number out
of range, a trailing byte, an extension type or a length that does not add up is refused.

    push body    u32 LE length of the preamble | preamble (msgpack) | entries of lane 0 | lane 1 | …
    preamble     {spool, lanes: [{c, p, h: [number, chain], n, b, a?: [[frame, elapsed, voids]…]}…]}
    push answer  {lanes: [{h, s, need?, v?, r?, w?}…]}, one per lane, in the order of the request

The entries themselves are checked by whoever reads them (`core.frame`, `core.entry`): here only
their number and bytes must fit together. All limits are constants below; a sender that respects
them is never refused for size. Encoders raise `BadData` too, so that what cannot be read is never
sent. The other bodies are in `core.ask`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from droprd.core.strict import (
    ARRAY_MAX,
    MESSAGES_PER_FRAME_MAX,
    NUMBER_MAX,
    bad,
    check_head,
    check_id,
    check_index,
    check_int,
    check_list,
    check_map,
    check_text,
    check_tuple,
    check_wire_name,
    pack,
    show,
    unpack,
)
from droprd.model import KIB, MIB, Head, Void

VERSION = 1

PUSH_BYTES_MAX = 4 * MIB
"""Bytes of entries that a sender puts into one push, unless a single frame is larger."""
FRAME_BYTES_MAX = 128 * KIB
"""More than any entry with its frame can have."""
PREAMBLE_BYTES_MAX = 512 * KIB
PUSH_BODY_BYTES_MAX = 4 + PREAMBLE_BYTES_MAX + PUSH_BYTES_MAX + FRAME_BYTES_MAX
SMALL_BODY_BYTES_MAX = 64 * KIB
"""Limit of hello and match requests and of every answer."""
LANES_PER_PUSH_MAX = 256
FRAMES_PER_PUSH_MAX = 4096
REASON_CHARS_MAX = 500
ENTRY_BYTES_MIN = 52
"""An entry is never shorter than its header."""

LaneVerdict = Literal["ok", "conflict", "need", "refused"]
LANE_VERDICTS: tuple[LaneVerdict, ...] = ("ok", "conflict", "need", "refused")

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Aside:
    """What travels beside a frame, whose own bytes never change.

    Attributes:
        elapsed_ms: milliseconds since the frame was stamped, None if it has no time to live and no
            delay.
        voids: the messages of the frame whose bodies were left out.
    """

    elapsed_ms: int | None = None
    voids: tuple[Void, ...] = ()


NO_ASIDE = Aside()


@dataclass(frozen=True, slots=True)
class LanePush:
    """One lane's part of a push: the head it expects and what follows it.

    Attributes:
        head: the receiver's head as the sender knows it.
        frames: how many entries follow; 0 only asks whether the head is right.
        entry_bytes: bytes of those entries in the body.
        asides: by index of the frame within this lane's part; frames without any are left out.
    """

    channel: str
    priority: int
    head: Head
    frames: int
    entry_bytes: int
    asides: Mapping[int, Aside] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Push:
    """The preamble of a push: whose spool, and which lanes, in the order of their entries."""

    spool_id: bytes
    lanes: tuple[LanePush, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Messages refused for good, stored by the receiver as voids.

    Attributes:
        frame_id: the frame, or None for every frame that this push brought in this lane.
        index: the message, or None for every message of the frame that was not void already.
        reason: why, in words for the dead letter.
    """

    frame_id: bytes | None
    index: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class LaneAnswer:
    """The receiver's word on one lane of a push.

    Attributes:
        head: its synced head of this lane.
        verdict: "ok" stored up to `head`; "conflict" the expected head was not its head, nothing
            changed; "need" blobs are missing, nothing changed; "refused" not now, nothing changed
            (`reason`, `retry_after_s`).
        need: bytes that lie there already of each blob frame that must come first.
        refusals: messages stored as voids because they are refused for good.
    """

    head: Head
    verdict: LaneVerdict
    need: Mapping[bytes, int] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    reason: str = ""
    retry_after_s: int | None = None


def encode_push(push: Push) -> bytes:
    """The length and preamble that open a push body; the entries follow it.

    Raises: BadData if it breaks a limit: too many lanes, frames or voids for one push.
    """
    lanes: list[dict[str, Any]] = []
    for lane in push.lanes:
        part: dict[str, Any] = {
            "c": lane.channel,
            "p": lane.priority,
            "h": list(lane.head),
            "n": lane.frames,
            "b": lane.entry_bytes,
        }
        asides = [
            [index, aside.elapsed_ms, [[v.index, v.reason] for v in aside.voids]]
            for index, aside in sorted(lane.asides.items())
            if aside != NO_ASIDE
        ]
        if asides:
            part["a"] = asides
        lanes.append(part)
    preamble = pack({"spool": push.spool_id, "lanes": lanes}, PREAMBLE_BYTES_MAX, "preamble")
    _push_from(unpack(preamble, PREAMBLE_BYTES_MAX, "preamble"))
    return _LENGTH.pack(len(preamble)) + preamble


def decode_push(body: bytes | bytearray | memoryview) -> tuple[Push, list[memoryview]]:
    """(preamble, one view of the entries per lane) of a whole push body. Nothing is copied.

    Raises: BadData.
    """
    view = memoryview(body)
    if len(view) < _LENGTH.size:
        raise bad("push", "shorter than the length of its preamble")
    (size,) = _LENGTH.unpack_from(view)
    if size > PREAMBLE_BYTES_MAX:
        raise bad("preamble", f"claims {size} bytes, {PREAMBLE_BYTES_MAX} are allowed")
    start = _LENGTH.size + size
    if start > len(view):
        raise bad("preamble", f"claims {size} bytes, the body ends before")
    push = _push_from(unpack(view[_LENGTH.size : start], PREAMBLE_BYTES_MAX, "preamble"))
    parts: list[memoryview] = []
    for lane in push.lanes:
        end = start + lane.entry_bytes
        if end > len(view):
            raise bad("push", "the body ends before the entries that its preamble announces")
        parts.append(view[start:end])
        start = end
    if start != len(view):
        raise bad("push", f"{len(view) - start} bytes follow the entries")
    return push, parts


def _push_from(data: object) -> Push:
    top = check_map(data, "preamble", ("spool", "lanes"))
    raw_lanes = check_list(top["lanes"], "lanes", LANES_PER_PUSH_MAX)
    if not raw_lanes:
        raise bad("lanes", "a push without lanes")
    lanes = tuple(_lane_push(raw) for raw in raw_lanes)
    if len({(lane.channel, lane.priority) for lane in lanes}) != len(lanes):
        raise bad("lanes", "the same lane twice in one push")
    if sum(lane.frames for lane in lanes) > FRAMES_PER_PUSH_MAX:
        raise bad("lanes", f"more than {FRAMES_PER_PUSH_MAX} frames in one push")
    return Push(check_id(top["spool"], "spool"), lanes)


def _lane_push(data: object) -> LanePush:
    lane = check_map(data, "lane", ("c", "p", "h", "n", "b"), ("a",))
    frames = check_int(lane["n"], "n", 0, FRAMES_PER_PUSH_MAX)
    entry_bytes = check_int(lane["b"], "b", 0, PUSH_BYTES_MAX + FRAME_BYTES_MAX)
    if entry_bytes < frames * ENTRY_BYTES_MIN or (frames == 0 and entry_bytes):
        raise bad("b", f"{entry_bytes} bytes cannot hold exactly {frames} entries")
    asides: dict[int, Aside] = {}
    for raw in check_list(lane.get("a", []), "a", FRAMES_PER_PUSH_MAX):
        index, elapsed, voids = check_tuple(raw, "a", 3)
        at = check_int(index, "a", 0, frames - 1)
        if at in asides:
            raise bad("a", f"frame {at} twice")
        asides[at] = Aside(
            None if elapsed is None else check_int(elapsed, "a", 0, NUMBER_MAX), _voids(voids)
        )
    return LanePush(
        check_wire_name(lane["c"], "channel"),
        check_int(lane["p"], "p", 0, 9),
        check_head(lane["h"], "h"),
        frames,
        entry_bytes,
        asides,
    )


def _voids(data: object) -> tuple[Void, ...]:
    voids = []
    last = -1
    for raw in check_list(data, "voids", MESSAGES_PER_FRAME_MAX):
        index, reason = check_tuple(raw, "voids", 2)
        last = check_int(index, "voids", last + 1, MESSAGES_PER_FRAME_MAX - 1)
        voids.append(Void(last, check_text(reason, "voids", REASON_CHARS_MAX)))
    return tuple(voids)


def encode_push_answer(lanes: Iterable[LaneAnswer]) -> bytes:
    """The body of the answer to a push, one part per lane in the order of the request.

    Raises: BadData if it would be longer than an answer may be. A receiver that would have to
    refuse more messages than fit takes fewer frames of the push: its head says how many.
    """
    parts: list[dict[str, Any]] = []
    for lane in lanes:
        part: dict[str, Any] = {"h": list(lane.head), "s": lane.verdict}
        if lane.need:
            part["need"] = dict(lane.need)
        if lane.refusals:
            part["v"] = [[r.frame_id, r.index, r.reason] for r in lane.refusals]
        if lane.reason:
            part["r"] = lane.reason
        if lane.retry_after_s is not None:
            part["w"] = lane.retry_after_s
        parts.append(part)
    body = pack({"lanes": parts}, SMALL_BODY_BYTES_MAX, "push answer")
    decode_push_answer(body, len(parts))
    return body


def decode_push_answer(body: bytes | memoryview, lanes: int) -> tuple[LaneAnswer, ...]:
    """The answers to the `lanes` lanes of a push, in order. Raises: BadData."""
    top = check_map(unpack(body, SMALL_BODY_BYTES_MAX, "push answer"), "push answer", ("lanes",))
    parts = check_list(top["lanes"], "lanes", LANES_PER_PUSH_MAX)
    if len(parts) != lanes:
        raise bad("lanes", f"{len(parts)} answers to a push of {lanes} lanes")
    return tuple(_lane_answer(part) for part in parts)


def _lane_answer(data: object) -> LaneAnswer:
    part = check_map(data, "lane answer", ("h", "s"), ("need", "v", "r", "w"))
    verdict = part["s"]
    if not isinstance(verdict, str) or verdict not in LANE_VERDICTS:
        raise bad("s", f"no verdict is called {show(verdict)}")
    need: dict[bytes, int] = {}
    raw_need = part.get("need", {})
    if not isinstance(raw_need, dict):
        raise bad("need", "no map")
    for frame_id, have in raw_need.items():
        need[check_id(frame_id, "need")] = check_int(have, "need", 0, NUMBER_MAX)
    if bool(need) != (verdict == "need"):
        raise bad("need", f"does not go with the verdict {verdict!r}")
    refusals = []
    for raw in check_list(part.get("v", []), "v", ARRAY_MAX):
        frame_id, index, reason = check_tuple(raw, "v", 3)
        if frame_id is None and index is not None:
            raise bad("v", "an index without a frame")
        refusals.append(
            Refusal(
                None if frame_id is None else check_id(frame_id, "v"),
                check_index(index, "v"),
                check_text(reason, "v", REASON_CHARS_MAX),
            )
        )
    if refusals and verdict != "ok":
        raise bad("v", f"refusals do not go with the verdict {verdict!r}")
    wait = part.get("w")
    return LaneAnswer(
        check_head(part["h"], "h"),
        verdict,
        need,
        tuple(refusals),
        check_text(part.get("r", ""), "r", REASON_CHARS_MAX),
        None if wait is None else check_int(wait, "w", 0, NUMBER_MAX),
    )
