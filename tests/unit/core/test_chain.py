"""The chain: equal heads mean equal history."""

from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from droprd.core import chain
from droprd.model import GENESIS, Head

FRAMES = st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(1, 1024)), max_size=8)


def test_the_first_link_is_what_the_wire_document_says() -> None:
    frame_id = bytes(range(16))
    expected = sha256(bytes(16) + frame_id + (7).to_bytes(4, "little")).digest()[:16]
    assert chain.extend(GENESIS, frame_id, 7) == Head(7, expected)


@given(FRAMES, FRAMES)
def test_going_on_from_a_head_is_the_same_as_going_all_the_way(
    first: list[tuple[bytes, int]], then: list[tuple[bytes, int]]
) -> None:
    middle = chain.advance(GENESIS, first)
    assert chain.advance(middle, then) == chain.advance(GENESIS, first + then)
    assert list(chain.heads(middle, then))[-1:] == ([chain.advance(middle, then)] if then else [])


@given(FRAMES, FRAMES)
def test_different_histories_have_different_chains(
    one: list[tuple[bytes, int]], other: list[tuple[bytes, int]]
) -> None:
    same = chain.advance(GENESIS, one).chain == chain.advance(GENESIS, other).chain
    assert same == (one == other)


def test_numbers_count_messages_and_not_frames() -> None:
    assert chain.advance(GENESIS, [(bytes(16), 3), (b"x" * 16, 4)]).number == 7
