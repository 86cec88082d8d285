"""The bodies of docs/wire.md: whole, byte by byte, truncated, flipped, and hostile."""

from __future__ import annotations

from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droprd.core import ask, push
from droprd.core.problem import Problem, decode_problem, encode_problem
from droprd.errors import BadData
from droprd.model import GENESIS, Head, Void

SPOOL = bytes(range(16))
FRAME = bytes(range(16, 32))

ids = st.binary(min_size=16, max_size=16)
numbers = st.integers(0, 2**63 - 1)
heads = st.builds(Head, numbers, ids)
names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
reasons = st.text(st.characters(categories=("L", "N", "P")), max_size=30)
indexes = st.integers(0, 1023)
voids = st.dictionaries(indexes, reasons, max_size=4).map(
    lambda found: tuple(Void(index, found[index]) for index in sorted(found))
)
asides = st.builds(push.Aside, st.none() | numbers, voids)


@st.composite
def pushes(draw: st.DrawFn) -> push.Push:
    lanes = []
    keys = draw(st.sets(st.tuples(names, st.integers(0, 9)), min_size=1, max_size=4))
    for channel, priority in sorted(keys):
        frames = draw(st.integers(0, 5))
        extra = draw(st.integers(0, 100)) if frames else 0
        beside = draw(
            st.dictionaries(st.integers(0, frames - 1), asides, max_size=2)
            if frames
            else st.just({})
        )
        beside = {at: aside for at, aside in beside.items() if aside != push.NO_ASIDE}
        lanes.append(
            push.LanePush(channel, priority, draw(heads), frames, frames * 52 + extra, beside)
        )
    return push.Push(draw(ids), tuple(lanes))


lane_answers = st.one_of(
    st.builds(
        push.LaneAnswer,
        heads,
        st.just("ok"),
        refusals=st.lists(
            st.builds(push.Refusal, ids, st.none() | indexes, reasons)
            | st.builds(push.Refusal, st.none(), st.none(), reasons),
            max_size=3,
        ).map(tuple),
    ),
    st.builds(push.LaneAnswer, heads, st.just("conflict")),
    st.builds(
        push.LaneAnswer,
        heads,
        st.just("need"),
        st.dictionaries(ids, numbers, min_size=1, max_size=3),
    ),
    st.builds(
        push.LaneAnswer,
        heads,
        st.just("refused"),
        reason=reasons,
        retry_after_s=st.none() | st.integers(0, 10**6),
    ),
)
match_requests = st.builds(
    ask.MatchRequest,
    ids,
    names,
    st.integers(0, 9),
    st.lists(heads, max_size=5).map(tuple),
    st.none() | heads,
    numbers,
)
match_answers = st.builds(
    ask.MatchAnswer,
    heads,
    st.none() | heads,
    numbers,
    st.lists(st.tuples(ids, st.integers(1, 1024)), min_size=1, max_size=5).map(tuple),
    st.booleans(),
    st.lists(st.builds(ask.StoredVoid, ids, st.none() | indexes, reasons), max_size=4).map(tuple),
    st.none() | numbers,
)
hellos = st.builds(
    ask.Hello,
    names,
    st.integers(1, 100),
    numbers,
    ids,
    st.lists(st.text(st.characters(categories=("L", "N")), max_size=20), max_size=3).map(tuple),
)


def body_of(preamble: push.Push) -> bytes:
    entries = b"".join(bytes([n]) * lane.entry_bytes for n, lane in enumerate(preamble.lanes))
    return push.encode_push(preamble) + entries


ONE_PUSH = push.Push(
    SPOOL,
    (
        push.LanePush(
            "sites", 5, Head(7, FRAME), 2, 110, {1: push.Aside(5000, (Void(3, "expired"),))}
        ),
        push.LanePush("backups", 9, GENESIS, 0, 0),
    ),
)
ONE_ANSWER = (
    push.LaneAnswer(Head(9, FRAME), "ok", refusals=(push.Refusal(FRAME, 0, "too large"),)),
    push.LaneAnswer(GENESIS, "need", {FRAME: 4096}),
)
ONE_MATCH = ask.MatchRequest(SPOOL, "sites", 5, (Head(9, FRAME), GENESIS), Head(3, FRAME), 4)
ONE_MATCH_ANSWER = ask.MatchAnswer(
    Head(9, FRAME),
    GENESIS,
    0,
    ((FRAME, 3), (SPOOL, 6)),
    True,
    (ask.StoredVoid(FRAME, None, "x"),),
    5,
)
ONE_HELLO = ask.Hello("hamburg", 1, 1_700_000_000_000_000_000, SPOOL, ("https://a.example:7707",))

DECODERS: list[tuple[bytes, Callable[[bytes], object]]] = [
    (body_of(ONE_PUSH), push.decode_push),
    (push.encode_push_answer(ONE_ANSWER), lambda body: push.decode_push_answer(body, 2)),
    (ask.encode_match(ONE_MATCH), ask.decode_match),
    (ask.encode_match_answer(ONE_MATCH_ANSWER), ask.decode_match_answer),
    (ask.encode_hello(ONE_HELLO), ask.decode_hello),
    (ask.encode_blob_answer(4096), ask.decode_blob_answer),
]
each_body = pytest.mark.parametrize(
    ("body", "decode"),
    DECODERS,
    ids=["push", "push-answer", "match", "match-answer", "hello", "blob"],
)


@given(pushes())
def test_a_push_is_read_as_it_was_written(preamble: push.Push) -> None:
    read, parts = push.decode_push(body_of(preamble))
    assert read == preamble
    assert [len(part) for part in parts] == [lane.entry_bytes for lane in preamble.lanes]
    for n, part in enumerate(parts):
        assert bytes(part) == bytes([n]) * len(part)


def test_the_entries_of_a_push_are_views_of_its_body_and_no_copies() -> None:
    body = bytearray(body_of(ONE_PUSH))
    _, parts = push.decode_push(body)
    body[-1] = 99
    assert parts[0][-1] == 99


@given(st.lists(lane_answers, min_size=1, max_size=5))
def test_an_answer_is_read_as_it_was_written(answers: list[push.LaneAnswer]) -> None:
    body = push.encode_push_answer(answers)
    assert push.decode_push_answer(body, len(answers)) == tuple(answers)
    with pytest.raises(BadData):
        push.decode_push_answer(body, len(answers) + 1)


@given(match_requests, match_answers, hellos, numbers)
def test_questions_are_read_as_they_were_written(
    request: ask.MatchRequest, answer: ask.MatchAnswer, hello: ask.Hello, have: int
) -> None:
    assert ask.decode_match(ask.encode_match(request)) == request
    assert ask.decode_match_answer(ask.encode_match_answer(answer)) == answer
    assert ask.decode_hello(ask.encode_hello(hello)) == hello
    assert ask.decode_blob_answer(ask.encode_blob_answer(have)) == have


@each_body
def test_every_proper_beginning_is_refused(body: bytes, decode: Callable[[bytes], object]) -> None:
    for end in range(len(body)):
        with pytest.raises(BadData):
            decode(body[:end])
    decode(body)


@each_body
def test_a_byte_too_many_is_refused(body: bytes, decode: Callable[[bytes], object]) -> None:
    with pytest.raises(BadData):
        decode(body + b"\0")


@each_body
def test_a_flipped_bit_is_refused_or_read_as_other_valid_values(
    body: bytes, decode: Callable[[bytes], object]
) -> None:
    for at in range(len(body)):
        for bit in range(8):
            flipped = bytearray(body)
            flipped[at] ^= 1 << bit
            try:
                decode(bytes(flipped))
            except BadData:
                continue


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_bad_data(data: bytes) -> None:
    for _, decode in DECODERS:
        try:
            decode(data)
        except BadData:
            continue


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=5)
    | st.binary(max_size=17),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["spool", "lanes", "c", "p", "h", "n", "b", "a", "s"]), inner
        )
    ),
    max_leaves=20,
)


@given(plain)
def test_valid_msgpack_of_any_shape_raises_nothing_but_bad_data(data: object) -> None:
    packed = msgpack.packb(data)
    for body in (packed, len(packed).to_bytes(4, "little") + packed):
        for _, decode in DECODERS:
            try:
                decode(body)
            except BadData:
                continue


def raw_push(**changed: object) -> bytes:
    lane: dict[str, object] = {"c": "sites", "p": 5, "h": [0, bytes(16)], "n": 1, "b": 60}
    lane.update(changed)
    preamble: bytes = msgpack.packb({"spool": SPOOL, "lanes": [lane]})
    return len(preamble).to_bytes(4, "little") + preamble + bytes(60)


def test_the_push_that_the_next_tests_spoil_is_good() -> None:
    push.decode_push(raw_push())


@pytest.mark.parametrize(
    "change",
    [
        {"c": "../etc"},
        {"c": "A"},
        {"c": b"sites"},
        {"c": "0189aaaa-0000-7000-8000-000000000000"},
        {"p": 10},
        {"p": True},
        {"p": -1},
        {"h": [0]},
        {"h": [-1, bytes(16)]},
        {"h": [0, bytes(15)]},
        {"h": [0.0, bytes(16)]},
        {"h": [2**63, bytes(16)]},
        {"n": 2},
        {"n": 0},
        {"n": 4097},
        {"b": 59},
        {"b": 61},
        {"b": 2**40},
        {"a": [[1, None, []]]},
        {"a": [[0, -1, []]]},
        {"a": [[0, 1, []], [0, 1, []]]},
        {"a": [[0, None, [[1024, "x"]]]]},
        {"a": [[0, None, [[5, "x"], [5, "x"]]]]},
        {"a": [[0, None, [[5, "x"], [4, "x"]]]]},
        {"a": [[0, None, [[5, "a\x1b[31m"]]]]},
        {"a": [[0, None, [[5, "x" * 501]]]]},
        {"x": 1},
        {"h": msgpack.Timestamp(1)},
        {"h": msgpack.ExtType(5, b"abc")},
    ],
)
def test_a_push_with_one_wrong_field_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadData):
        push.decode_push(raw_push(**change))


def test_the_same_lane_twice_is_refused() -> None:
    lane = push.LanePush("sites", 5, GENESIS, 0, 0)
    with pytest.raises(BadData):
        push.encode_push(push.Push(SPOOL, (lane, lane)))


def test_more_frames_than_a_push_may_bring_are_refused_over_all_lanes() -> None:
    lanes = [push.LanePush(f"c{n}", 5, GENESIS, 2048, 2048 * 52) for n in range(3)]
    push.encode_push(push.Push(SPOOL, tuple(lanes[:2])))
    with pytest.raises(BadData):
        push.encode_push(push.Push(SPOOL, tuple(lanes)))


@pytest.mark.parametrize(
    "part",
    [
        {"h": [0, bytes(16)], "s": "maybe"},
        {"h": [0, bytes(16)], "s": "ok", "need": {FRAME: 1}},
        {"h": [0, bytes(16)], "s": "need"},
        {"h": [0, bytes(16)], "s": "conflict", "v": [[FRAME, 0, "x"]]},
        {"h": [0, bytes(16)], "s": "ok", "v": [[None, 0, "x"]]},
        {"h": [0, bytes(16)], "s": "refused", "w": -1},
        {"h": [0, bytes(16)], "s": ["ok"]},
        {"h": [0, bytes(16)], "s": "ok", "also": 1},
    ],
)
def test_an_answer_that_contradicts_itself_is_refused(part: dict[str, object]) -> None:
    with pytest.raises(BadData):
        push.decode_push_answer(msgpack.packb({"lanes": [part]}), 1)


def test_an_answer_over_64_kib_is_never_made_and_never_read() -> None:
    refusals = tuple(push.Refusal(FRAME, None, "x" * 400) for _ in range(200))
    with pytest.raises(BadData):
        push.encode_push_answer([push.LaneAnswer(GENESIS, "ok", refusals=refusals)])
    with pytest.raises(BadData):
        push.decode_push_answer(bytes(push.SMALL_BODY_BYTES_MAX + 1), 1)


def test_as_many_frames_as_promised_fit_into_a_match_answer() -> None:
    frames = tuple((FRAME, 1024) for _ in range(ask.ANSWER_FRAMES_MAX))
    top = Head(2**63 - 1, FRAME)
    answer = ask.MatchAnswer(top, top, 2**63 - 1, frames, more=True)
    assert ask.decode_match_answer(ask.encode_match_answer(answer)) == answer


def test_as_many_heads_as_allowed_fit_into_a_match() -> None:
    request = ask.MatchRequest(SPOOL, "c" * 64, 5, (Head(2**63 - 1, FRAME),) * ask.MATCH_HEADS_MAX)
    assert ask.decode_match(ask.encode_match(request)) == request


def test_an_empty_page_cannot_promise_more() -> None:
    with pytest.raises(BadData):
        ask.encode_match_answer(ask.MatchAnswer(GENESIS, None, 0, (), more=True))


def test_greetings_alone_may_carry_keys_unknown_here() -> None:
    hello = msgpack.unpackb(ask.encode_hello(ONE_HELLO)) | {"colour": "blue"}
    assert ask.decode_hello(msgpack.packb(hello)) == ONE_HELLO
    match = msgpack.unpackb(ask.encode_match(ONE_MATCH)) | {"colour": "blue"}
    with pytest.raises(BadData):
        ask.decode_match(msgpack.packb(match))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 60_000,
        b"\xdd\xff\xff\xff\xff" * 10_000,
        b"\xdc\x0f\xff" * 20_000,
        b"\xdf\xff\xff\xff\xff" * 10_000,
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xdf\x00\x00\x00\x01" * 1000,
    ],
)
def test_nested_and_boastful_input_is_refused(bomb: bytes) -> None:
    for _, decode in DECODERS:
        with pytest.raises(BadData):
            decode(bomb)
        with pytest.raises(BadData):
            decode(len(bomb).to_bytes(4, "little") + bomb)


def test_a_preamble_is_not_read_beyond_its_limit() -> None:
    with pytest.raises(BadData, match="524289"):
        push.decode_push((push.PREAMBLE_BYTES_MAX + 1).to_bytes(4, "little") + bytes(600_000))


def test_a_problem_is_read_as_it_was_written() -> None:
    problem = Problem(507, "full", "no room", "the quota is used up")
    assert decode_problem(507, encode_problem(problem)) == problem


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b'{"code": 5}', b"{}", b"[" * 50_000, b'{"code":"a","title":[]}'],
)
def test_what_is_no_problem_document_is_none(body: bytes) -> None:
    assert decode_problem(500, body) is None


def test_control_characters_of_a_problem_never_reach_a_terminal() -> None:
    problem = decode_problem(500, b'{"code": "x", "title": "a\\u001b[31m", "detail": "b\\nc"}')
    assert problem == Problem(500, "x", "a?[31m", "b?c")
