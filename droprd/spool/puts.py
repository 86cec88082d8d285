"""Puts: what producers hand over, and the frames that are built of it.

Guarantees: messages of one put stay in their order; the puts of one call share frames where lane,
time to live and delay are the same; a blob has a frame of its own. Stamps are taken in the order
in which frames are returned. Nothing here reaches a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from droprd.core import frame as frames
from droprd.core.frame import BODIES_BYTES_MAX, MESSAGES_MAX, Stamp
from droprd.errors import DroprdError
from droprd.model import Lane, message_ids
from droprd.spool.blobs import Blob


class Put:
    """What one call hands over for one lane, and what became of it.

    Attributes:
        lane: where to.
        bodies: in order; bytes of at most 32 KiB, or a `Blob` that was written before.
        values: what all these messages share: "t" content type, "h" headers (both optional).
        ttl_ms, delay_ms: 0 for none.
        size: how many bytes this asks of the journal, roughly and rather too many.
        ids: set by `commit`: the message ids, in order.
        error: set by `commit` if the put failed.
        done: whether `commit` has decided about it.
    """

    __slots__ = (
        "bodies",
        "delay_ms",
        "done",
        "error",
        "has_blobs",
        "ids",
        "lane",
        "shared",
        "size",
        "ttl_ms",
        "values",
    )

    def __init__(
        self,
        lane: Lane,
        bodies: Sequence[bytes | Blob],
        values: Mapping[str, Any] | None = None,
        *,
        ttl_ms: int = 0,
        delay_ms: int = 0,
    ) -> None:
        self.lane = lane
        self.bodies = bodies
        self.has_blobs = Blob in set(map(type, bodies))
        self.values = values or {}
        self.shared = frames.pack_map(self.values)
        if self.has_blobs:
            small = [body for body in bodies if not isinstance(body, Blob)]
        else:
            small = cast("list[bytes]", bodies)
        self.size = 512 + (8 + len(self.shared)) * len(bodies) + sum(map(len, small))
        self.ttl_ms = ttl_ms
        self.delay_ms = delay_ms
        self.ids: list[str] = []
        self.error: DroprdError | None = None
        self.done = False


def build_frames(
    puts: Sequence[Put], stamp: Callable[[], Stamp], urandom: Callable[[int], bytes]
) -> list[bytes]:
    """The frames of all puts, in the order in which they must be written; sets the puts' ids."""
    groups: dict[tuple[Lane, int, int], list[Put]] = {}
    for put in puts:
        put.ids = []
        groups.setdefault((put.lane, put.ttl_ms, put.delay_ms), []).append(put)
    built: list[bytes] = []
    for members in groups.values():
        run: list[bytes] = []  # bodies that follow each other without a blob between them
        spans: list[tuple[Put, int]] = []  # how many of them are whose
        for put in members:
            if not put.has_blobs:
                run += cast("list[bytes]", put.bodies)
                spans.append((put, len(put.bodies)))
                continue
            for body in put.bodies:
                if isinstance(body, Blob):
                    built += _run_frames(run, spans, stamp, urandom)
                    run, spans = [], []
                    built.append(_blob_frame(put, body, stamp()))
                else:
                    run.append(body)
                    spans.append((put, 1))
        built += _run_frames(run, spans, stamp, urandom)
    return built


def _run_frames(
    bodies: list[bytes],
    spans: list[tuple[Put, int]],
    stamp: Callable[[], Stamp],
    urandom: Callable[[int], bytes],
) -> list[bytes]:
    if not bodies:
        return []
    first = spans[0][0]
    maps: list[Mapping[str, Any]] | None = None
    if all(put.shared == first.shared for put, _ in spans):
        cuts = _split(bodies)
    else:
        maps = [put.values for put, count in spans for _ in range(count)]
        map_bytes = [len(put.shared) for put, count in spans for _ in range(count)]
        cuts = frames.split(list(map(len, bodies)), map_bytes)
    built: list[bytes] = []
    ids: list[str] = []
    for start, end in cuts:
        now = stamp()
        frame_id = frames.new_frame_id(now.wall_ns, urandom(10))
        pieces = frames.build(
            frame_id=frame_id,
            lane=first.lane,
            stamp=now,
            bodies=bodies[start:end],
            shared=b"" if maps else first.shared,
            singles=[(i, one) for i, one in enumerate(maps[start:end]) if one] if maps else (),
            ttl_ms=first.ttl_ms,
            delay_ms=first.delay_ms,
        )
        built.append(b"".join(pieces))  # one copy costs less than a hundred pieces to write
        ids += message_ids(frame_id, end - start)
    at = 0
    for put, count in spans:
        put.ids += ids[at : at + count]
        at += count
    return built


def _split(bodies: list[bytes]) -> list[tuple[int, int]]:
    """As `frames.split`, without its work a message in the usual case of equal sizes."""
    sizes = list(map(len, bodies))
    largest = max(sizes)
    if len(bodies) == 1:
        return [(0, 1)]
    if largest == min(sizes) and largest >= 64:
        step = min(MESSAGES_MAX, BODIES_BYTES_MAX // largest)
        return [(at, min(at + step, len(bodies))) for at in range(0, len(bodies), step)]
    return frames.split(sizes)


def _blob_frame(put: Put, blob: Blob, stamp: Stamp) -> bytes:
    pieces = frames.build_blob(
        frame_id=blob.frame_id,
        lane=put.lane,
        stamp=stamp,
        blob_bytes=blob.size,
        blob_crc=blob.crc,
        shared=frames.pack_map({**put.values, "d": blob.sha256}),
        ttl_ms=put.ttl_ms,
        delay_ms=put.delay_ms,
    )
    put.ids += message_ids(blob.frame_id, 1)
    return b"".join(pieces)
