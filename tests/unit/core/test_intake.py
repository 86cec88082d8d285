"""What a push brings is taken as it came, or refused whole; nothing else ever happens."""

from __future__ import annotations

import hashlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droprd.core import entry, frame
from droprd.core.frame import Stamp
from droprd.core.intake import blob_frames, read_lane
from droprd.core.push import Aside, LanePush
from droprd.errors import BadData
from droprd.model import GENESIS, Lane, Void

LANE = Lane("berlin", "sites", 5)


def entry_of(data: bytes, note: bytes = b"") -> bytes:
    return entry.pack_entry(b"L" * 16, 8192, 4096, note, len(data)) + data


def frame_of(number: int, bodies: list[bytes], shared: bytes = b"") -> bytes:
    return b"".join(
        frame.build(
            frame_id=number.to_bytes(14, "big") + b"\0\0",
            lane=LANE,
            stamp=Stamp(b"B" * 16, 1, 2),
            bodies=bodies,
            shared=shared,
        )
    )


def blob_of(shared: bytes) -> bytes:
    return b"".join(
        frame.build_blob(
            frame_id=bytes(16),
            lane=LANE,
            stamp=Stamp(b"B" * 16, 1, 2),
            blob_bytes=100_000,
            blob_crc=7,
            shared=shared,
        )
    )


def lane_push(
    data: bytes, frames: int, channel: str = "sites", asides: dict[int, Aside] | None = None
) -> LanePush:
    return LanePush(channel, 5, GENESIS, frames, len(data), asides or {})


SHARED = frame.pack_map({"t": "text/plain", "h": {"k": "v"}})
WHOLE = entry_of(frame_of(1, [b"one", b"two"], SHARED)) + entry_of(frame_of(2, [b"", b"x" * 300]))


@given(st.lists(st.lists(st.binary(max_size=200), min_size=1, max_size=5), max_size=5))
def test_frames_come_through_as_they_were_built(frames: list[list[bytes]]) -> None:
    data = b"".join(entry_of(frame_of(i, bodies)) for i, bodies in enumerate(frames))
    taken = read_lane(lane_push(data, len(frames)), memoryview(data))
    assert [[bytes(f.frame.body(i)) for i in range(f.frame.count)] for f in taken] == frames


def test_every_flipped_bit_is_refused() -> None:
    for at in range(len(WHOLE)):
        for bit in range(8):
            data = bytearray(WHOLE)
            data[at] ^= 1 << bit
            with pytest.raises(BadData):
                read_lane(lane_push(WHOLE, 2), memoryview(data))


def test_every_truncation_and_any_rest_is_refused() -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(BadData):
            read_lane(lane_push(WHOLE, 2), memoryview(WHOLE)[:end])
    for rest in (b"\0", WHOLE):
        with pytest.raises(BadData):
            read_lane(lane_push(WHOLE, 2), memoryview(WHOLE + rest))


def test_rubbish_is_refused() -> None:
    rng = Random(20)
    for _ in range(2000):
        data = bytearray(WHOLE)
        for _ in range(rng.randrange(1, 20)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
        if data == WHOLE:
            continue
        with pytest.raises(BadData):
            read_lane(lane_push(bytes(data), 2), memoryview(data))
        try:
            blob_frames(lane_push(bytes(data), 2), memoryview(data))
        except BadData:
            continue


def test_an_entry_with_a_note_or_without_a_frame_is_refused() -> None:
    for data in (entry_of(frame_of(1, [b"x"]), b"\x01"), entry_of(b"", b"\x01"), entry_of(b"")):
        with pytest.raises(BadData):
            read_lane(lane_push(data, 1), memoryview(data))


def test_voids_must_name_messages_whose_bodies_are_left_out() -> None:
    data = frame_of(1, [b"one", b"two"])
    holed = entry_of(b"".join(frame.parse(data).without({1})))
    voids = {0: Aside(5, (Void(1, "expired"),))}
    (taken,) = read_lane(lane_push(holed, 1, asides=voids), memoryview(holed))
    assert (taken.elapsed_ms, bytes(taken.frame.body(0))) == (5, b"one")
    with pytest.raises(BadData):
        read_lane(lane_push(holed, 1), memoryview(holed))
    whole = entry_of(data)
    for index in (1, 2, 700):
        asides = {0: Aside(None, (Void(index, "x"),))}
        with pytest.raises(BadData):
            read_lane(lane_push(whole, 1, asides=asides), memoryview(whole))


def test_a_blob_frame_must_name_its_sha256() -> None:
    digest = hashlib.sha256(b"").digest()
    good = entry_of(blob_of(frame.pack_map({"d": digest})))
    assert len(read_lane(lane_push(good, 1), memoryview(good))) == 1
    assert len(blob_frames(lane_push(good, 1), memoryview(good))) == 1
    void = {0: Aside(None, (Void(0, "purged"),))}
    assert blob_frames(lane_push(good, 1, asides=void), memoryview(good)) == []
    for shared in ({}, {"d": b"short"}, {"d": 5}):
        bad = entry_of(blob_of(frame.pack_map(shared)))
        with pytest.raises(BadData):
            read_lane(lane_push(bad, 1), memoryview(bad))
