"""The chain: what makes a lane's head say its whole history.

    chain 0 = 16 zero bytes
    chain k = first 16 bytes of SHA-256(chain k-1 ‖ frame id k ‖ messages in frame k, u32 LE)

Equal chain means equal frames in equal order; bodies, voids and times play no part. A head is
(number, chain): how many messages, and the chain after the last frame.

Pure. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from struct import Struct

from droprd.model import Head

CHAIN_BYTES = 16

_COUNT = Struct("<I")


def extend(head: Head, frame_id: bytes, count: int) -> Head:
    """The head after one more frame of `count` messages."""
    digest = sha256(head.chain + frame_id + _COUNT.pack(count)).digest()
    return Head(head.number + count, digest[:CHAIN_BYTES])


def advance(head: Head, frames: Iterable[tuple[bytes, int]]) -> Head:
    """The head after all of `frames`, given as (frame id, count) in their order."""
    for frame_id, count in frames:
        head = extend(head, frame_id, count)
    return head


def heads(head: Head, frames: Iterable[tuple[bytes, int]]) -> Iterator[Head]:
    """The head after each of `frames` in turn; `head` itself is not among them."""
    for frame_id, count in frames:
        head = extend(head, frame_id, count)
        yield head
