"""Pushes as a sending node makes them, for tests of whatever receives them.

one = frame_of([b"body"])                              a frame, ready to be pushed
push, parts = push_of(("sites", 5, head, [one]))       what `InboxWriter.push` takes
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from droprd.core import chain, entry, frame
from droprd.core.frame import Stamp
from droprd.core.push import Aside, LanePush, Push, decode_push, encode_push
from droprd.model import Head, Lane, Void

SENDER = b"S" * 16
"""The spool id of the sending node, if nothing else is said."""


@dataclass
class Sent:
    """A frame as a sender has it; `blob` is its body, if that is a file."""

    frame_id: bytes
    data: bytes
    count: int
    aside: Aside = field(default_factory=Aside)
    blob: bytes = b""


LanePart = tuple[str, int, Head, Sequence[Sent]]
"""Channel, priority, the head that is expected, and the frames that follow it."""


def frame_of(
    bodies: Sequence[bytes],
    channel: str = "sites",
    priority: int = 5,
    *,
    voids: Sequence[Void] = (),
    elapsed_ms: int | None = None,
    ttl_ms: int = 0,
    shared: bytes = b"",
) -> Sent:
    """A frame of small bodies; those in `voids` are left out."""
    frame_id = frame.new_frame_id(1, os.urandom(10))
    pieces = frame.build(
        frame_id=frame_id,
        lane=Lane("berlin", channel, priority),
        stamp=Stamp(b"B" * 16, 1, 2),
        bodies=bodies,
        shared=shared,
        ttl_ms=ttl_ms,
    )
    data = b"".join(pieces)
    if voids:
        data = b"".join(frame.parse(data).without({void.index for void in voids}))
    return Sent(frame_id, data, len(bodies), Aside(elapsed_ms, tuple(voids)))


def blob_frame_of(body: bytes, channel: str = "sites", priority: int = 5) -> Sent:
    """A frame whose body is a file, to be put before it."""
    frame_id = frame.new_frame_id(1, os.urandom(10))
    pieces = frame.build_blob(
        frame_id=frame_id,
        lane=Lane("berlin", channel, priority),
        stamp=Stamp(b"B" * 16, 1, 2),
        blob_bytes=len(body),
        blob_crc=crc32(body),
        shared=frame.pack_map({"d": hashlib.sha256(body).digest()}),
    )
    return Sent(frame_id, b"".join(pieces), 1, blob=body)


def push_body_of(*lanes: LanePart, spool_id: bytes = SENDER) -> bytes:
    """The body of a push request."""
    pushes = []
    tail = []
    for channel, priority, head, sent in lanes:
        data = b"".join(
            entry.pack_entry(b"L" * 16, 9999, 5000, b"", len(one.data)) + one.data for one in sent
        )
        asides = {i: one.aside for i, one in enumerate(sent) if one.aside != Aside()}
        pushes.append(LanePush(channel, priority, head, len(sent), len(data), asides))
        tail.append(data)
    return encode_push(Push(spool_id, tuple(pushes))) + b"".join(tail)


def push_of(*lanes: LanePart, spool_id: bytes = SENDER) -> tuple[Push, Sequence[memoryview]]:
    """A push and the entries of its lanes."""
    return decode_push(push_body_of(*lanes, spool_id=spool_id))


def after(head: Head, sent: Sequence[Sent]) -> Head:
    """The head of a lane after these frames."""
    return chain.advance(head, [(one.frame_id, one.count) for one in sent])
