"""The choice of a transport, and the body that libcurl reads."""

from __future__ import annotations

import os
import tempfile

import pycurl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from droprd.errors import ConfigError
from droprd.net.push import READ_BYTES, Body, CurlTransport
from droprd.net.registry import transport_factory
from droprd.net.transport import (
    FileRange,
    Piece,
    Request,
    Transport,
    TransportOptions,
    scheme_of,
)

pieces_spec = st.lists(
    st.tuples(st.booleans(), st.integers(0, 5000), st.integers(0, 5000)), max_size=8
)


def made(spec: list[tuple[bool, int, int]], fd: int, data: bytes) -> tuple[list[Piece], bytes]:
    pieces: list[Piece] = []
    whole = b""
    for in_file, offset, length in spec:
        part = data[offset : offset + length]
        pieces.append(FileRange(fd, offset, len(part)) if in_file else part)
        whole += part
    return pieces, whole


def read_all(body: Body, size: int) -> bytes:
    parts: list[bytes] = []
    while True:
        part = body.read(size)
        assert isinstance(part, bytes)
        assert len(part) <= size
        if not part:
            return b"".join(parts)
        parts.append(part)


@given(pieces_spec, st.integers(1, 9000), st.integers(0, 20_000))
def test_a_body_is_read_across_its_pieces_and_again_from_any_point(
    spec: list[tuple[bool, int, int]], size: int, back_to: int
) -> None:
    data = os.urandom(10_000)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        pieces, whole = made(spec, file.fileno(), data)
        body = Body(pieces)
        assert read_all(body, size) == whole
        back_to = min(back_to, len(whole))
        assert body.seek(back_to, os.SEEK_SET) == pycurl.SEEKFUNC_OK
        assert read_all(body, size) == whole[back_to:]


def test_one_read_gives_at_most_a_mebibyte_and_many_small_pieces_are_joined() -> None:
    assert len(Body([bytes(3 << 20)]).read(10 << 20) or b"") == READ_BYTES  # type: ignore[arg-type]
    small = Body([b"x" * 100] * 1000)
    assert len(small.read(1 << 20) or b"") == 100_000  # type: ignore[arg-type]


def test_a_closed_body_reads_no_file() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"abc")
        file.flush()
        body = Body([FileRange(file.fileno(), 0, 3)])
    body.close()
    assert body.read(100) == pycurl.READFUNC_ABORT
    assert not body.fault


def test_a_body_says_why_its_file_cannot_be_read() -> None:
    with tempfile.TemporaryFile() as file:
        body = Body([FileRange(file.fileno(), 0, 3)])
        assert body.read(100) == pycurl.READFUNC_ABORT
        assert "shorter" in body.fault
        fd = file.fileno()
    body = Body([FileRange(fd, 0, 3)])
    assert body.read(100) == pycurl.READFUNC_ABORT
    assert "descriptor" in body.fault


def test_the_scheme_chooses_the_transport() -> None:
    for scheme in ("http", "https", "unix"):
        transport = transport_factory(scheme)(TransportOptions())
        assert isinstance(transport, CurlTransport)
        assert isinstance(transport, Transport)
    assert scheme_of("unix:/run/x.sock") == "unix"
    for bad in ("berlin.example", "://x", "HTTP://x", ""):
        with pytest.raises(ConfigError):
            scheme_of(bad)


def test_a_token_is_never_shown() -> None:
    request = Request("POST", "https://x", "/v1/push", [b"x"], "very-secret")
    assert "very-secret" not in repr(request)
    assert request.body_bytes == 1
