"""What a node asks another beside pushing: greeting, match, how much of a blob lies there.

Owns the bytes of these bodies (docs/wire.md), all msgpack of at most 64 KiB. As in `core.push`,
`decode_*` returns frozen values or raises `BadData`, and `encode_*` never makes what `decode_*`
would refuse. Only greetings may carry keys that are unknown here: there, nodes of different
versions meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from droprd.core.push import REASON_CHARS_MAX, SMALL_BODY_BYTES_MAX
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
    unpack,
)
from droprd.model import Head

MATCH_HEADS_MAX = 1024
ANSWER_FRAMES_MAX = 1800
"""Frames that fit into one match answer beside its heads and some voids."""
URLS_MAX = 8
URL_CHARS_MAX = 512


@dataclass(frozen=True, slots=True)
class MatchRequest:
    """Which of my heads do you know, and which frames follow it?

    Attributes:
        heads: the asker's heads of this lane, newest first; empty when only `after` matters.
        after: the head that ended the page before, None for the first page.
        voids_after: tell the voids of messages from this number on.
    """

    spool_id: bytes
    channel: str
    priority: int
    heads: tuple[Head, ...]
    after: Head | None = None
    voids_after: int = 0


@dataclass(frozen=True, slots=True)
class StoredVoid:
    """A message that the receiver stored as a void; `index` None means the whole frame."""

    frame_id: bytes
    index: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class MatchAnswer:
    """What the receiver remembers of a lane.

    Attributes:
        head: its synced head.
        common: the newest of the asker's heads it knows, None if it knows none of them.
        floor: the number from which on it remembers single frames.
        frames: (frame id, count) of the frames that follow `common`, or `after` if that was given;
            together with the head they follow they give the chain, so each page proves itself.
        more: more frames follow; ask again with `after`.
        voids: stored voids from `voids_after` on, in order.
        voids_to: None if those are all, else the number to give as `voids_after` next.
    """

    head: Head
    common: Head | None
    floor: int
    frames: tuple[tuple[bytes, int], ...]
    more: bool = False
    voids: tuple[StoredVoid, ...] = ()
    voids_to: int | None = None


@dataclass(frozen=True, slots=True)
class Hello:
    """A greeting, or the answer to one.

    Attributes:
        node: the speaker's own name; the listener trusts its credentials only.
        version: of the protocol.
        wall_ns: the speaker's wall clock, ns since 1970 UTC; compared only to warn.
        urls: where the speaker can be reached; a hint, empty in answers.
    """

    node: str
    version: int
    wall_ns: int
    spool_id: bytes
    urls: tuple[str, ...] = ()


def encode_match(request: MatchRequest) -> bytes:
    """The body of a match request. Raises: BadData if it has too many heads."""
    body = pack(
        {
            "spool": request.spool_id,
            "c": request.channel,
            "p": request.priority,
            "heads": [list(head) for head in request.heads],
            "after": None if request.after is None else list(request.after),
            "voids_after": request.voids_after,
        },
        SMALL_BODY_BYTES_MAX,
        "match",
    )
    decode_match(body)
    return body


def decode_match(body: bytes | bytearray | memoryview) -> MatchRequest:
    """Raises: BadData."""
    keys = ("spool", "c", "p", "heads", "after", "voids_after")
    top = check_map(unpack(body, SMALL_BODY_BYTES_MAX, "match"), "match", keys)
    return MatchRequest(
        check_id(top["spool"], "spool"),
        check_wire_name(top["c"], "channel"),
        check_int(top["p"], "p", 0, 9),
        tuple(
            check_head(raw, "heads") for raw in check_list(top["heads"], "heads", MATCH_HEADS_MAX)
        ),
        None if top["after"] is None else check_head(top["after"], "after"),
        check_int(top["voids_after"], "voids_after", 0, NUMBER_MAX),
    )


def encode_match_answer(answer: MatchAnswer) -> bytes:
    """The body of the answer to a match.

    Raises: BadData if it does not fit: give fewer frames (`more`) or voids (`voids_to`).
    """
    body = pack(
        {
            "head": list(answer.head),
            "common": None if answer.common is None else list(answer.common),
            "floor": answer.floor,
            "frames": [list(frame) for frame in answer.frames],
            "more": answer.more,
            "voids": [[v.frame_id, v.index, v.reason] for v in answer.voids],
            "voids_to": answer.voids_to,
        },
        SMALL_BODY_BYTES_MAX,
        "match answer",
    )
    decode_match_answer(body)
    return body


def decode_match_answer(body: bytes | bytearray | memoryview) -> MatchAnswer:
    """Raises: BadData."""
    keys = ("head", "common", "floor", "frames", "more", "voids", "voids_to")
    top = check_map(unpack(body, SMALL_BODY_BYTES_MAX, "match answer"), "match answer", keys)
    frames = []
    for raw in check_list(top["frames"], "frames", ARRAY_MAX):
        frame_id, count = check_tuple(raw, "frames", 2)
        frames.append(
            (check_id(frame_id, "frames"), check_int(count, "frames", 1, MESSAGES_PER_FRAME_MAX))
        )
    voids = []
    for raw in check_list(top["voids"], "voids", ARRAY_MAX):
        frame_id, index, reason = check_tuple(raw, "voids", 3)
        voids.append(
            StoredVoid(
                check_id(frame_id, "voids"),
                check_index(index, "voids"),
                check_text(reason, "voids", REASON_CHARS_MAX),
            )
        )
    more = top["more"]
    if not isinstance(more, bool):
        raise bad("more", "neither true nor false")
    if more and not frames:
        raise bad("more", "an empty page that promises more")
    to = top["voids_to"]
    return MatchAnswer(
        check_head(top["head"], "head"),
        None if top["common"] is None else check_head(top["common"], "common"),
        check_int(top["floor"], "floor", 0, NUMBER_MAX),
        tuple(frames),
        more,
        tuple(voids),
        None if to is None else check_int(to, "voids_to", 0, NUMBER_MAX),
    )


def encode_hello(hello: Hello) -> bytes:
    """The body of a greeting or of its answer. Raises: BadData."""
    data: dict[str, Any] = {
        "node": hello.node,
        "version": hello.version,
        "wall_ns": hello.wall_ns,
        "spool_id": hello.spool_id,
    }
    if hello.urls:
        data["urls"] = list(hello.urls)
    body = pack(data, SMALL_BODY_BYTES_MAX, "hello")
    decode_hello(body)
    return body


def decode_hello(body: bytes | bytearray | memoryview) -> Hello:
    """A greeting or its answer; keys unknown here are passed over. Raises: BadData."""
    data = unpack(body, SMALL_BODY_BYTES_MAX, "hello")
    top = check_map(
        data, "hello", ("node", "version", "wall_ns", "spool_id"), ("urls",), strict=False
    )
    return Hello(
        check_wire_name(top["node"], "node"),
        check_int(top["version"], "version", 1, 2**31),
        check_int(top["wall_ns"], "wall_ns", 0, NUMBER_MAX),
        check_id(top["spool_id"], "spool_id"),
        tuple(
            check_text(url, "urls", URL_CHARS_MAX)
            for url in check_list(top.get("urls", []), "urls", URLS_MAX)
        ),
    )


def encode_blob_answer(have: int) -> bytes:
    """The body of the answer to a piece of a blob: `have` bytes of it lie there now."""
    return pack({"have": have}, SMALL_BODY_BYTES_MAX, "blob answer")


def decode_blob_answer(body: bytes | bytearray | memoryview) -> int:
    """How many bytes of the blob the receiver has. Raises: BadData."""
    data = unpack(body, SMALL_BODY_BYTES_MAX, "blob answer")
    return check_int(check_map(data, "blob answer", ("have",))["have"], "have", 0, NUMBER_MAX)
