"""What a real receiver answers to requests that no sender of ours would make.

Each gets a 4xx with a problem body, is counted in `status`, and changes nothing in the spool.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from droprd.core import entry, frame
from droprd.core.push import LanePush, Push, decode_push_answer, encode_push
from droprd.model import GENESIS, MIB, Lane
from droprd.testing.node import Node, wait_until

WITHIN_S = 15.0
SPOOL_ID = b"S" * 16
Reply = tuple[int, dict[str, str], bytes]
Case = tuple[bytes, int, str]
"""A request, the status it gets, and the code."""


def push_body(channel: str = "sites", *, body: bytes = b"a body") -> bytes:
    """A push that is right in everything."""
    frame_bytes = b"".join(
        frame.build(
            frame_id=frame.new_frame_id(1, os.urandom(10)),
            lane=Lane("berlin", channel, 5),
            stamp=frame.Stamp(b"B" * 16, 1, 2),
            bodies=[body],
        )
    )
    data = entry.pack_entry(b"L" * 16, 9999, 5000, b"", len(frame_bytes)) + frame_bytes
    lane = LanePush(channel, 5, GENESIS, 1, len(data))
    return encode_push(Push(SPOOL_ID, (lane,))) + data


class Receiver:
    """A node that knows the peer hamburg, and connections to it by hand."""

    def __init__(self, directory: Path) -> None:
        self.node = Node(directory / "berlin", "berlin")
        self.token = self.node.ctl("peer", "add", "hamburg").stdout.decode().strip()

    def head(self, line: str, *more: str, token: str | None = None, version: str = "1") -> bytes:
        """A request's head; `token` "" leaves it out."""
        token = self.token if token is None else token
        lines = [f"{line} HTTP/1.1", "Host: berlin", f"Droprd-Version: {version}", *more]
        if token:
            lines.append(f"Authorization: Bearer {token}")
        return "\r\n".join([*lines, "", ""]).encode()

    def post(
        self,
        body: bytes,
        *more: str,
        path: str = "/v1/push",
        token: str | None = None,
        version: str = "1",
    ) -> bytes:
        """A whole request."""
        length = f"Content-Length: {len(body)}"
        return self.head(f"POST {path}", length, *more, token=token, version=version) + body

    def ask(self, request: bytes) -> Reply:
        """The answer to these bytes; the connection is closed then, as after every refusal."""
        with socket.create_connection(("127.0.0.1", self.node.port), WITHIN_S) as connection:
            connection.sendall(request)
            answer = b""
            while data := connection.recv(65536):
                answer += data
        return parsed(answer)

    def refused(self) -> dict[str, int]:
        found: dict[str, int] = self.node.status()["receiver"]["refused"]
        return found

    def files(self) -> dict[str, str]:
        """Every file of the inbox, the outbox and the configuration, with a sum of its content."""
        found = {}
        for top in (self.node.spool, self.node.directory / "keys", self.node.directory / "peers.d"):
            for path in sorted(top.rglob("*")):
                # What workers tell of themselves changes with the count of refusals.
                if "state" not in path.relative_to(top).parts[:1]:
                    is_file = stat.S_ISREG(path.lstat().st_mode)
                    data = path.read_bytes() if is_file else b""
                    found[str(path)] = hashlib.sha256(data).hexdigest()
        return found

    @contextmanager
    def refusing(self, *cases: Case) -> Iterator[None]:
        """What follows is refused as these cases say, counted, and changes nothing."""
        files, counted = self.files(), Counter(self.refused())
        yield
        counted.update(code for _, _, code in cases)
        wait_until(lambda: self.refused() == counted, f"counted are {counted}")
        assert self.files() == files

    def check(self, cases: Mapping[str, Case]) -> None:
        """Each of these requests is refused in its way."""
        with self.refusing(*cases.values()):
            # At once: where a body is announced the receiver waits a moment for it.
            with ThreadPoolExecutor(len(cases)) as pool:
                replies = list(pool.map(self.ask, [request for request, _, _ in cases.values()]))
            for reply, (name, (_, status, code)) in zip(replies, cases.items(), strict=True):
                check_problem(name, reply, status, code)


def check_problem(name: str, reply: Reply, status: int, code: str) -> None:
    got, headers, body = reply
    assert (got, headers["content-type"]) == (status, "application/problem+json"), (name, reply)
    problem = json.loads(body)
    assert (problem["status"], problem["code"]) == (status, code), (name, problem)
    assert problem["type"] == f"urn:droprd:problem:{code}"
    assert problem["title"]


def parsed(answer: bytes) -> Reply:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in lines)}
    return int(first.split()[1]), headers, body


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path_factory.mktemp("requests"))
    try:
        receiver.node.start()
        yield receiver
    finally:
        receiver.node.close()


PUSH = b"POST /v1/push HTTP/1.1\r\nHost: b\r\n"


def test_a_head_that_makes_no_sense_is_refused(receiver: Receiver) -> None:
    many = b"".join(b"X-%d: y\r\n" % number for number in range(200))
    lengths = b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"
    way_out = b"PUT /v1/blobs/../../../etc/passwd?offset=0&size=1 HTTP/1.1\r\nHost: b\r\n"
    receiver.check(
        {
            "no HTTP": (b"\x16\x03\x01 hello, is this TLS?\r\n\r\n", 400, "bad_request"),
            "an endless line": (b"POST /" + b"x" * 5000 + b" HTTP/1.1\r\n", 400, "bad_request"),
            "a long header": (PUSH + b"X: " + b"x" * 5000 + b"\r\n\r\n", 400, "bad_request"),
            "many headers": (PUSH + many + b"\r\n", 400, "bad_request"),
            "two lengths": (PUSH + lengths, 400, "bad_request"),
            "no such path": (b"POST /v2/push HTTP/1.1\r\nHost: b\r\n\r\n", 404, "not_found"),
            "a way out": (way_out + b"Content-Length: 1\r\n\r\nx", 404, "not_found"),
            "another method": (
                b"GET /v1/push HTTP/1.1\r\nHost: b\r\n\r\n",
                405,
                "method_not_allowed",
            ),
        }
    )


def test_who_cannot_say_who_they_are_are_refused(receiver: Receiver) -> None:
    right, second = receiver.token, "Authorization: Bearer another"
    receiver.check(
        {
            "no token": (receiver.post(push_body(), token=""), 401, "unauthorized"),
            "a wrong token": (receiver.post(push_body(), token=right + "x"), 401, "unauthorized"),
            "two tokens": (receiver.post(push_body(), second), 401, "unauthorized"),
        }
    )


def test_another_version_of_the_protocol_is_refused(receiver: Receiver) -> None:
    request = receiver.post(push_body(), version="2")
    receiver.check({"version 2": (request, 400, "version_unsupported")})


def test_a_body_that_is_announced_wrongly_is_refused_before_it_is_sent(
    receiver: Receiver,
) -> None:
    announced: list[tuple[str, str, int, str]] = [
        ("push", "X-Nothing: 1", 411, "length_required"),
        ("push", "Transfer-Encoding: chunked", 411, "length_required"),
        ("push", "Content-Length: +5", 400, "bad_request"),
        ("push", "Content-Length: -1", 400, "bad_request"),
        ("push", f"Content-Length: {5 * MIB}", 413, "too_large"),
        ("hello", "Content-Length: 65537", 413, "too_large"),
        ("match", "Content-Length: 65537", 413, "too_large"),
        ("push", "Content-Length: 5\r\nContent-Encoding: gzip", 415, "encoding_unsupported"),
        ("push", "Content-Length: 5\r\nExpect: a-miracle", 417, "expectation_failed"),
    ]
    cases = {
        f"{path} {header}": (receiver.head(f"POST /v1/{path}", header), status, code)
        for path, header, status, code in announced
    }
    blob = f"PUT /v1/blobs/{'a' * 32}/{'b' * 32}?offset=0&size={2 << 40}"
    cases["a blob too large"] = (receiver.head(blob, "Content-Length: 9"), 413, "too_large")
    receiver.check(cases)


def test_a_body_that_cannot_be_read_is_refused(receiver: Receiver) -> None:
    whole = push_body(body=b"the letter a")
    bodies: dict[str, tuple[str, bytes]] = {
        "nothing": ("push", b""),
        "no msgpack": ("push", b"\x10\x00\x00\x00" + b"\xc1" * 16),
        "a preamble longer than the body": ("push", b"\xff\xff\x00\x00" + b"x" * 100),
        "cut within the entries": ("push", whole[:-1]),
        "more than was announced": ("push", whole + b"x"),
        "a channel that leads out": ("push", whole.replace(b"\xa5sites", b"\xa5../x/")),
        "a changed message": ("push", whole.replace(b"the letter a", b"the letter b")),
        "a frame of another lane": ("push", whole.replace(b"\xa5sites", b"\xa5other")),
    }
    for path in ("hello", "match"):
        for body in (b"", b"\x80", b"\xdf\xff\xff\xff\xff", b"\x91" * 2000):
            bodies[f"{path} {body[:5]!r}"] = (path, body)
    receiver.check(
        {
            name: (receiver.post(body, path=f"/v1/{path}"), 400, "bad_data")
            for name, (path, body) in bodies.items()
        }
    )


def test_a_body_that_breaks_off_is_counted_and_changes_nothing(receiver: Receiver) -> None:
    with receiver.refusing((b"", 400, "broken_off")):
        with socket.create_connection(("127.0.0.1", receiver.node.port), WITHIN_S) as connection:
            connection.sendall(receiver.post(push_body())[:-20])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_sees_why_a_large_body_is_not_taken(receiver: Receiver, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(8 * MIB))
    token = ["-H", f"Authorization: Bearer {receiver.token}"]
    cases: list[tuple[list[str], int, str]] = [
        ([], 401, "unauthorized"),
        (token, 413, "too_large"),
        ([*token, "-H", "Transfer-Encoding: chunked"], 411, "length_required"),
    ]
    with receiver.refusing(*[(b"", status, code) for _, status, code in cases]):
        for options, status, code in cases:
            command = ["curl", "-sS", "-i", "--noproxy", "*", "--max-time", "20", *options]
            command += ["-H", "Droprd-Version: 1", "--data-binary", f"@{large}"]
            url = f"{receiver.node.url}/v1/push"
            answer = subprocess.run([*command, url], capture_output=True, check=False).stdout
            if answer.startswith(b"HTTP/1.1 100"):
                answer = answer.partition(b"\r\n\r\n")[2]
            check_problem(str(options), parsed(answer), status, code)


def test_what_is_right_in_everything_is_taken_after_all_that(receiver: Receiver) -> None:
    body = push_body(body=b"a real one")
    status, _, answer = receiver.ask(receiver.post(body, "Connection: close"))
    assert (status, decode_push_answer(answer, 1)[0].verdict) == (200, "ok")
    with receiver.node.inbox() as inbox:
        [message] = inbox.receive("sites", wait_s=10)
        assert (message.body, message.sender) == (b"a real one", "hamburg")
        message.ack()
