"""docs/wire.md says what the code does: its examples are read by it, its codes are all of them."""

from __future__ import annotations

import re
from pathlib import Path

from droprd.core import ask, push
from droprd.model import GENESIS, Head, Void
from droprd.net.intake import TITLES

PAGE = (Path(__file__).parents[3] / "docs" / "wire.md").read_text()
SPOOL = bytes.fromhex("5f0c2a91d3e84b7799a1c2d3e4f50617")
FRAME = bytes.fromhex("0192a5c07d40700091c4e2b7f35d0000")
HEAD = Head(3, bytes.fromhex("3ad1f7c20b9e4d5586f0a1b2c3d4e5f6"))


def examples() -> list[bytes]:
    blocks = re.findall(r"(?:^    (?:[0-9a-f]{2} ?)+$\n?)+", PAGE, re.MULTILINE)
    return [bytes.fromhex("".join(block.split())) for block in blocks]


def test_the_examples_are_read_as_the_page_says() -> None:
    hello, pushed, ok, conflict, have, match, matched = examples()
    assert ask.decode_hello(hello) == ask.Hello(
        "hamburg", 1, 1_790_000_000_000_000_000, SPOOL, ("https://hamburg.example:7707",)
    )
    preamble, (entries,) = push.decode_push(pushed + bytes(400))
    assert preamble == push.Push(
        SPOOL,
        (push.LanePush("sites", 5, GENESIS, 2, 400, {1: push.Aside(4200, (Void(0, "expired"),))}),),
    )
    assert len(entries) == 400
    assert push.decode_push_answer(ok, 1) == (push.LaneAnswer(HEAD, "ok"),)
    assert push.decode_push_answer(conflict, 1) == (push.LaneAnswer(HEAD, "conflict"),)
    assert ask.decode_blob_answer(have) == 65536
    assert ask.decode_match(match) == ask.MatchRequest(SPOOL, "sites", 5, (HEAD, GENESIS))
    assert ask.decode_match_answer(matched) == ask.MatchAnswer(HEAD, GENESIS, 0, ((FRAME, 3),))


def test_the_page_names_every_code_of_a_refusal() -> None:
    table = PAGE.partition("## Refusals")[2].partition("## Limits")[0]
    codes = set(re.findall(r"^\| \d+ \| `([a-z_]+)` \|", table, re.MULTILINE))
    assert codes == {*TITLES, "no_room", "paused", "broken_off"}


def test_the_page_names_every_limit() -> None:
    limits = PAGE.partition("## Limits")[2].partition("## Deadlines")[0].replace(",", "")
    for limit in (
        push.LANES_PER_PUSH_MAX,
        push.FRAMES_PER_PUSH_MAX,
        push.PREAMBLE_BYTES_MAX >> 10,
        push.FRAME_BYTES_MAX >> 10,
        push.SMALL_BODY_BYTES_MAX >> 10,
    ):
        assert f"{limit}" in limits
