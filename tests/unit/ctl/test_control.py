"""Calls of the daemon end in time, and say why there is no answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from droprd.core import rpc
from droprd.ctl.control import Control
from droprd.errors import DroprdError, NotAnswering, NotPermitted, UnknownPeer

Answer = Callable[[rpc.Request], bytes | None]


@contextmanager
def daemon(path: Path, answer: Answer) -> Iterator[None]:
    """A daemon that takes one connection and answers as `answer` says; None hangs up."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()

    def serve() -> None:
        connection, _ = listening.accept()
        decoder = rpc.Decoder()
        with connection:
            while data := connection.recv(4096):
                for message in decoder.feed(data):
                    assert isinstance(message, rpc.Request)
                    said = answer(message)
                    if said is None:
                        return
                    connection.sendall(said)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)
        listening.close()
    assert not thread.is_alive()


def _ok(request: rpc.Request, result: Any = None) -> bytes:
    return rpc.encode(rpc.Response(request.id, None, result))


def test_hello_comes_first_and_answers_belong_to_their_calls(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(request: rpc.Request) -> bytes:
        asked.append(request.method)
        stale = rpc.encode(rpc.Response(4_000_000, None, "of another call"))
        return stale + _ok(request, {"params": dict(request.params)})

    with daemon(tmp_path / "s", answer), Control(str(tmp_path / "s"), 5) as control:
        assert control.call("retry", {"peer": "berlin"}) == {"params": {"peer": "berlin"}}
    assert asked == ["hello", "retry"]


def test_the_daemons_error_is_raised_as_its_own_kind(tmp_path: Path) -> None:
    def answer(request: rpc.Request) -> bytes:
        if request.method == "hello":
            return _ok(request)
        error = UnknownPeer("no peer 'x'", why="because", hint="see")
        return rpc.encode(rpc.Response(request.id, rpc.RpcError.of(error)))

    with (
        daemon(tmp_path / "s", answer),
        Control(str(tmp_path / "s"), 5) as control,
        pytest.raises(UnknownPeer) as caught,
    ):
        control.call("why", {"peer": "x"})
    assert (caught.value.why, caught.value.hint) == ("because", "see")


def test_nobody_there_and_nobody_answering_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotAnswering) as caught:
        Control(str(tmp_path / "nothing"), 5)
    assert caught.value.code == "no_daemon"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(tmp_path / "s"))
    with pytest.raises(NotAnswering) as caught:
        Control(str(tmp_path / "s"), 5)
    assert caught.value.code == "no_daemon"
    listening.listen()
    with pytest.raises(NotAnswering) as caught:
        Control(str(tmp_path / "s"), 0.01)
    assert caught.value.code == "not_answering"
    listening.close()


def test_a_call_ends_at_its_deadline_though_bytes_keep_coming(tmp_path: Path) -> None:
    def answer(request: rpc.Request) -> bytes:
        if request.method == "hello":
            return _ok(request)
        return rpc.encode(rpc.Notification("noise"))

    with (
        daemon(tmp_path / "s", answer),
        Control(str(tmp_path / "s"), 5) as control,
        pytest.raises(NotAnswering) as caught,
    ):
        control.call("status", timeout_s=0.05)
    assert caught.value.code == "not_answering"


def test_a_daemon_that_hangs_up_or_speaks_nonsense_is_not_answering(tmp_path: Path) -> None:
    for number, said in enumerate((None, b"\xc1" * 20)):
        path = tmp_path / str(number)

        def answer(request: rpc.Request, said: bytes | None = said) -> bytes | None:
            return _ok(request) if request.method == "hello" else said

        with (
            daemon(path, answer),
            Control(str(path), 5) as control,
            pytest.raises(NotAnswering) as caught,
        ):
            control.call("status")
        assert caught.value.code == "not_answering"


def test_a_refusal_is_an_error_of_its_own(tmp_path: Path) -> None:
    def answer(request: rpc.Request) -> bytes:
        error = NotPermitted("user x may not", why="…", hint="use sudo")
        return rpc.encode(rpc.Response(request.id, rpc.RpcError.of(error)))

    with daemon(tmp_path / "s", answer), pytest.raises(DroprdError) as caught:
        Control(str(tmp_path / "s"), 5)
    assert isinstance(caught.value, NotPermitted)
