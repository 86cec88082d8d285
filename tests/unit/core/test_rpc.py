"""The MessagePack-RPC codec: whole, byte by byte, with trailing data, and fed with rubbish."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from droprd.core import rpc
from droprd.errors import BadData, ConfigError, DroprdError, UnknownPeer

MESSAGES: list[rpc.Message] = [
    rpc.Request(0, "hello", {}),
    rpc.Request(rpc.ID_MAX, "pause", {"target": "berlin/sites", "for_s": 60, "receiving": False}),
    rpc.Response(7, None, {"peers": {"berlin": {"queued": 3}}, "list": [1, 2, None]}),
    rpc.Response(8, rpc.RpcError("unknown_peer", "no peer paris", "why", "hint"), None),
    rpc.Notification("beat", {"progress": 2**40}),
]


def stream() -> bytes:
    return b"".join(rpc.encode(m) for m in MESSAGES)


def test_what_was_encoded_is_decoded() -> None:
    assert list(rpc.Decoder().feed(stream())) == MESSAGES


def test_a_stream_fed_byte_by_byte_gives_the_same_messages() -> None:
    decoder = rpc.Decoder()
    got = [m for i in range(len(stream())) for m in decoder.feed(stream()[i : i + 1])]
    assert got == MESSAGES


def test_the_beginning_of_the_next_message_waits_for_its_rest() -> None:
    decoder = rpc.Decoder()
    data = stream()
    assert list(decoder.feed(data + data[:5])) == MESSAGES
    assert list(decoder.feed(data[5:])) == MESSAGES


def test_many_messages_in_one_read_may_together_exceed_the_limit_of_one() -> None:
    one = rpc.encode(rpc.Notification("beat", {"text": "x" * 400}))
    assert len(list(rpc.Decoder(bytes_max=1000).feed(one * 50))) == 50


def test_params_may_be_left_out() -> None:
    assert list(rpc.Decoder().feed(msgpack.packb([0, 1, "status", []]))) == [
        rpc.Request(1, "status", {})
    ]


@pytest.mark.parametrize(
    "form",
    [
        None,
        1,
        [],
        [0],
        [0, 1, "status"],
        [0, 1, "status", {}],
        [0, 1, "status", [1]],
        [0, 1, "status", [{}, {}]],
        [0, 1, "status", [{b"key": 1}]],
        [0, -1, "status", []],
        [0, 2**32, "status", []],
        [0, True, "status", []],
        [0.0, 1, "status", []],
        [False, 1, "status", []],
        [0, 1, "", []],
        [0, 1, "x" * 65, []],
        [0, 1, b"status", []],
        [1, 1, {"code": 5, "what": "x"}, None],
        [1, 1, 17, None],
        [2, "beat"],
        [3, 1, "status", []],
        {"a": 1},
    ],
)
def test_what_has_another_form_is_refused(form: Any) -> None:
    with pytest.raises(BadData):
        list(rpc.Decoder().feed(msgpack.packb(form)))


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\xd6\xff\0\0\0\0",
        b"\xd4\x01\x00",
        b"\xc7\x00\x01",
        b"\xc7\x00\xff",
        b"\xa2\xff\xfe",
        b"\x81\x01\x02",
        b"\xdd\x7f\xff\xff\xff",
        b"\xdf\x7f\xff\xff\xff",
        b"\x91" * 3000,
    ],
    ids=repr,
)
def test_extensions_bad_text_and_lengths_beyond_the_limits_are_refused(data: bytes) -> None:
    with pytest.raises(BadData):
        list(rpc.Decoder().feed(data))


def test_a_message_over_the_limit_is_refused_before_it_is_whole() -> None:
    decoder = rpc.Decoder(bytes_max=1000)
    data = rpc.encode(rpc.Request(1, "status", {"text": "x" * 5000}))
    with pytest.raises(BadData):
        list(decoder.feed(data[:4000]))


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_bad_data(data: bytes) -> None:
    with contextlib.suppress(BadData):
        list(rpc.Decoder().feed(data))


@settings(max_examples=200)
@given(st.integers(0, len(stream()) - 1), st.integers(1, 255))
def test_a_flipped_byte_gives_messages_or_bad_data(at: int, flip: int) -> None:
    data = bytearray(stream())
    data[at] ^= flip
    with contextlib.suppress(BadData):
        list(rpc.Decoder().feed(bytes(data)))


def test_an_error_keeps_its_class_and_its_words_over_the_wire() -> None:
    error = UnknownPeer("no peer 'pariss'", why="not configured", hint="did you mean paris?")
    data = rpc.encode(rpc.Response(1, rpc.RpcError.of(error)))
    (answer,) = rpc.Decoder().feed(data)
    assert isinstance(answer, rpc.Response)
    with pytest.raises(UnknownPeer) as caught:
        answer.value()
    assert str(caught.value) == str(error)
    assert caught.value.code == "unknown_peer"


def test_the_faults_of_a_configuration_travel_in_why() -> None:
    told = rpc.RpcError.of(ConfigError("cannot use it", faults=["a.b: wrong", "c: missing"]))
    assert told.why == "a.b: wrong\nc: missing"
    assert isinstance(told.to_exception(), DroprdError)
    assert told.to_exception().code == "config_invalid"


def test_an_error_in_plain_text_is_taken_as_it_is() -> None:
    (answer,) = rpc.Decoder().feed(msgpack.packb([1, 4, "boom", None]))
    assert answer == rpc.Response(4, rpc.RpcError("error", "boom"))
