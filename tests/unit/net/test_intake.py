"""What is refused, with which status, and that nothing of a refused body is taken in."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from droprd.errors import BadData, SpoolFull
from droprd.net.intake import Limits
from droprd.net.push import CurlTransport
from droprd.net.service import Answer, BlobPiece, Refused
from droprd.net.transport import Request
from droprd.testing.serving import GOOD, Client, Recorder, run, serving, until

BLOB = "/v1/blobs/" + "ab" * 16 + "/" + "cd" * 16


def test_the_three_posts_reach_the_service_with_the_peers_name() -> None:
    async def test() -> None:
        async with serving() as here:
            for kind in ("hello", "push", "match"):
                reply = await here.ask(f"/v1/{kind}", b"body of " + kind.encode())
                assert (reply.status, reply.body) == (200, b"done")
                assert reply.headers["content-type"] == "application/msgpack"
            assert here.service.calls == [
                (kind, "hamburg", b"body of " + kind.encode())
                for kind in ("hello", "push", "match")
            ]
            assert here.service.admitted[0] == ("hamburg", "hello", 13)
            assert here.listener.refused == {}

    run(test)


def test_a_blob_is_handed_on_in_pieces_as_it_arrives() -> None:
    async def test() -> None:
        async with serving() as here:
            body = bytes(9 << 20)
            path = f"{BLOB}?offset=100&size=10000000"
            assert (await here.ask(path, body, method="PUT")).status == 200
            ((_, peer, piece, got, largest),) = here.service.calls
            assert peer == "hamburg"
            assert piece == BlobPiece(b"\xab" * 16, b"\xcd" * 16, 100, len(body), 10_000_000)
            assert got == len(body)
            assert largest <= 4 << 20

    run(test)


def test_a_blob_that_is_not_wanted_is_stopped_by_a_409() -> None:
    async def test() -> None:
        async with serving(service=Recorder(reads_blobs=False)) as here:
            transport = CurlTransport()
            url = f"http://127.0.0.1:{here.port}"
            path = f"{BLOB}?offset=0&size={64 << 20}"
            request = Request(
                "PUT", url, path, [bytes(64 << 20)], "secret", {"Droprd-Version": "1"}
            )
            reply = await transport.exchange(request)
            assert (reply.status, reply.body) == (409, b"done")
            assert reply.bytes_sent < 32 << 20
            await transport.aclose()

    run(test)


NO, BAD, LENGTH = "unauthorized", "bad_request", "length_required"
CHUNKED = "Transfer-Encoding: chunked"
REFUSED: list[tuple[str, dict[str, object], int, str]] = [
    ("an unknown path", {"path": "/v2/push"}, 404, "not_found"),
    ("a path with a query", {"path": "/v1/push?x=1"}, 404, "not_found"),
    ("the wrong method", {"method": "GET"}, 405, "method_not_allowed"),
    ("no token", {"headers": {"Droprd-Version": "1"}}, 401, NO),
    ("a wrong token", {"headers": {**GOOD, "Authorization": "Bearer x"}}, 401, NO),
    ("another scheme", {"headers": {**GOOD, "Authorization": "Basic secret"}}, 401, NO),
    (
        "two tokens",
        {"raw": ["Authorization: Bearer secret", "Content-Length: 3"]},
        401,
        NO,
    ),
    ("no version", {"headers": {"Authorization": "Bearer secret"}}, 400, "version_unsupported"),
    ("a later version", {"headers": {**GOOD, "Droprd-Version": "2"}}, 400, "version_unsupported"),
    ("no length", {"raw": [], "body": b""}, 411, LENGTH),
    (
        "a chunked body",
        {"raw": [CHUNKED], "body": b"0\r\n\r\n"},
        411,
        LENGTH,
    ),
    ("two lengths", {"raw": ["Content-Length: 3", "Content-Length: 3"]}, 400, BAD),
    (
        "lengths that differ",
        {"raw": ["Content-Length: 3", "Content-Length: 4"]},
        400,
        BAD,
    ),
    (
        "a length and chunks",
        {"raw": ["Content-Length: 3", CHUNKED]},
        400,
        BAD,
    ),
    ("a signed length", {"raw": ["Content-Length: +3"]}, 400, BAD),
    ("a length with an underscore", {"raw": ["Content-Length: 0_3"]}, 400, BAD),
    ("a list of lengths", {"raw": ["Content-Length: 3, 3"]}, 400, BAD),
    ("a negative length", {"raw": ["Content-Length: -1"]}, 400, BAD),
    ("too long a push", {"raw": ["Content-Length: 5000"]}, 413, "too_large"),
    (
        "too long a greeting",
        {"path": "/v1/hello", "raw": ["Content-Length: 65537"]},
        413,
        "too_large",
    ),
    ("an encoding", {"headers": {**GOOD, "Content-Encoding": "gzip"}}, 415, "encoding_unsupported"),
    ("another expectation", {"headers": {**GOOD, "Expect": "wonders"}}, 417, "expectation_failed"),
    ("a blob posted", {"path": BLOB + "?offset=0&size=3"}, 405, "method_not_allowed"),
    ("a blob without size", {"path": BLOB + "?offset=0", "method": "PUT"}, 404, "not_found"),
    (
        "a blob of odd numbers",
        {"path": BLOB + "?offset=0_0&size=3", "method": "PUT"},
        404,
        "not_found",
    ),
    (
        "a blob beyond its size",
        {"path": BLOB + "?offset=1&size=3", "method": "PUT"},
        400,
        BAD,
    ),
    (
        "a blob of no name",
        {"path": "/v1/blobs/../x", "method": "PUT"},
        404,
        "not_found",
    ),
]


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [case[1:] for case in REFUSED],
    ids=[case[0] for case in REFUSED],
)
def test_refused_before_the_service_is_asked(
    request_: dict[str, object], status: int, code: str
) -> None:
    async def test() -> None:
        async with serving(Limits(push_bytes_max=4999)) as here:
            client = await here.connect()
            client.send(**request_)  # type: ignore[arg-type]
            reply = await client.reply()
            assert reply.status == status
            assert reply.headers["content-type"] == "application/problem+json"
            problem = json.loads(reply.body)
            assert (problem["code"], problem["status"]) == (code, status)
            assert problem["type"] == f"urn:droprd:problem:{code}"
            assert ("www-authenticate" in reply.headers) == (status == 401)
            assert ("allow" in reply.headers) == (status == 405)
            client.writer.write_eof()
            assert await client.ended()
            assert here.listener.refused == {code: 1}
            assert not here.service.admitted
            assert not here.service.calls

    run(test)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"POST /v1/push HTTP/9.9\r\n\r\n",
        b"POST /v1/push HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /v1/push HTTP/1.1\r\nA : b\r\n\r\n",
        b"POST /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nA: " + b"x" * 9000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    ],
)
def test_what_is_no_http_gets_a_problem_and_is_counted(junk: bytes) -> None:
    async def test() -> None:
        async with serving() as here:
            client = await here.connect()
            client.writer.write(junk)
            reply = await client.reply()
            assert reply.status == 400
            assert json.loads(reply.body)["code"] == "bad_request"
            assert await client.ended()
            assert here.listener.refused == {"bad_request": 1}

    run(test)


def test_a_second_request_hidden_behind_a_refused_one_is_never_taken() -> None:
    async def test() -> None:
        async with serving() as here:
            client = await here.connect()
            client.send(headers={"Droprd-Version": "1"})
            client.send()
            assert (await client.reply()).status == 401
            assert await client.ended()
            assert not here.service.calls

    run(test)


def test_the_services_refusal_comes_before_the_body_is_sent() -> None:
    async def test() -> None:
        service = Recorder(refuse=Refused(507, "full", "no room", "quota", retry_after_s=60))
        async with serving(service=service) as here:
            client = await here.connect()
            client.send(
                headers={**GOOD, "Expect": "100-continue"},
                body=b"",
                raw=["Content-Length: 1000000"],
            )
            reply = await client.reply()
            assert (reply.status, reply.headers["retry-after"]) == (507, "60")
            assert json.loads(reply.body)["detail"] == "quota"
            assert service.admitted == [("hamburg", "push", 1_000_000)]
            assert not service.calls

    run(test)


def test_consent_is_given_only_when_asked_for() -> None:
    async def test() -> None:
        async with serving() as here:
            client = await here.connect()
            client.send(
                headers={**GOOD, "Expect": "100-continue"}, body=b"", raw=["Content-Length: 3"]
            )
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.writer.write(b"abc")
            assert (await client.reply()).status == 200
            client.send()
            assert (await client.reply()).status == 200

    run(test)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BadData("no push"), 400, "bad_data"),
        (Refused(503, "paused", "paused here", retry_after_s=5), 503, "paused"),
        (SpoolFull("no room"), 500, "failed"),
        (OSError(5, "Input/output error"), 500, "failed"),
        (ZeroDivisionError(), 500, "failed"),
    ],
)
def test_an_error_of_the_service_becomes_a_problem(
    error: Exception, status: int, code: str
) -> None:
    async def fail() -> Answer:
        raise error

    async def test() -> None:
        async with serving(service=Recorder(then=fail)) as here:
            client = await here.connect()
            client.send()
            reply = await client.reply()
            assert reply.status == status
            assert json.loads(reply.body)["code"] == code
            assert await client.ended()
            assert here.listener.refused == {code: 1}
            assert here.listener.intake.in_flight == 0

    run(test)


def test_an_error_answer_of_the_service_closes_the_connection_too() -> None:
    async def conflict() -> Answer:
        return Answer(409, b"have", 3)

    async def test() -> None:
        async with serving(service=Recorder(then=conflict)) as here:
            client = await here.connect()
            client.send()
            reply = await client.reply()
            assert (reply.status, reply.body, reply.headers["retry-after"]) == (409, b"have", "3")
            assert await client.ended()

    run(test)


def test_a_body_that_comes_too_slowly_is_broken_off() -> None:
    async def test() -> None:
        limits = Limits(body_rate_min=1000, body_window_s=0.2)
        async with serving(limits) as here:
            client = await here.connect()
            client.send(body=b"x" * 150, raw=["Content-Length: 1000"])
            reply = await client.reply()
            assert reply.status == 408
            assert "850 bytes are missing" in json.loads(reply.body)["detail"]

    run(test)


def test_a_slow_body_that_moves_is_taken() -> None:
    async def test() -> None:
        limits = Limits(body_rate_min=100, body_window_s=0.4)
        async with serving(limits) as here:
            client = await here.connect()
            client.send(body=b"", raw=["Content-Length: 600"])
            for _ in range(30):
                # The clock of this rule is the event loop's own: only time itself can pass it.
                client.writer.write(b"x" * 20)
                await client.writer.drain()
                await asyncio.sleep(0.03)
            assert (await client.reply()).status == 200
            assert len(here.service.calls[0][2]) == 600

    run(test)


def test_a_request_broken_off_never_reaches_the_service_and_frees_its_room() -> None:
    async def test() -> None:
        async with serving(Limits(bodies_bytes_max=1000, requests_per_peer=1)) as here:
            client = await here.connect()
            client.send(body=b"x" * 10, raw=["Content-Length: 900"])
            await until(lambda: bool(here.service.admitted))
            client.writer.transport.abort()
            await until(lambda: here.listener.intake.in_flight == 0)
            assert not here.service.calls
            assert (await here.ask(body=b"x" * 900)).status == 200

    run(test)


async def hold_one(here_body: bytes, client: Client, length: int) -> None:
    client.send(body=here_body, raw=[f"Content-Length: {length}"])


def test_bodies_that_would_fill_the_memory_wait() -> None:
    async def test() -> None:
        async with serving(Limits(bodies_bytes_max=1000)) as here:
            client = await here.connect()
            await hold_one(b"x", client, 900)
            await until(lambda: bool(here.service.admitted))
            reply = await here.ask(body=b"x" * 200)
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert json.loads(reply.body)["code"] == "busy"
            blob = await here.ask(f"{BLOB}?offset=0&size=5000", b"x" * 5000, method="PUT")
            assert blob.status == 200

    run(test)


def test_a_peer_has_only_so_many_requests_at_once() -> None:
    async def test() -> None:
        async with serving(Limits(requests_per_peer=2)) as here:
            clients = [await here.connect() for _ in range(2)]
            for client in clients:
                await hold_one(b"x", client, 10)
            await until(lambda: len(here.service.admitted) == 2)
            assert (await here.ask()).status == 429
            clients[0].writer.write(b"x" * 9)
            assert (await clients[0].reply()).status == 200
            assert (await here.ask()).status == 200

    run(test)


def test_spoilt_requests_are_refused_or_taken_and_never_fail() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    good = (
        b"POST /v1/push HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
        b"Droprd-Version: 1\r\nContent-Length: 3\r\n\r\nabc"
    )
    junk = [b"\r\n", b"\0", b"\xff", b"0", b" ", b":", b"Content-Length: 9\r\n", b"\r", b"\n", b","]

    async def test() -> None:
        async with serving() as here:
            for n in range(400):
                spoilt = bytearray(good)
                for _ in range(rng.randint(1, 3)):
                    at = rng.randrange(len(spoilt))
                    end = at + rng.randint(0, 2)
                    spoilt[at:end] = rng.choice(junk)
                client = await here.connect()
                client.writer.write(spoilt)
                client.writer.write_eof()
                said = await client.reader.read()
                client.writer.close()
                told = f"seed {seed}, request {n}: {bytes(spoilt)!r} got {said[:100]!r}"
                assert not said or said[9:12] == b"200" or b"400" <= said[9:12] < b"500", told
            for _, peer, body in here.service.calls:
                assert peer == "hamburg", seed
                assert len(body) <= 9, seed
            await until(lambda: here.listener.connections == 0)
            assert here.listener.intake.in_flight == 0
            assert (await here.ask()).status == 200

    run(test)
