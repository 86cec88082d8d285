"""What every transport must do: a suite of checks, to be run against a far end.

For authors of transports: give `CHECKS` a `Transport` and a `FarEnd` that it can reach, one pair
for each check, and await each::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_transport(check):
        async def run():
            async with StreamFarEnd.on_tcp() as far:
                transport = MyTransport(TransportOptions())
                try:
                    await check(transport, far)
                finally:
                    await transport.aclose()
        asyncio.run(run())
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Sequence

from droprd.net.transport import (
    ANSWER_BYTES_MAX,
    FileRange,
    Piece,
    Request,
    Transport,
    TransportError,
)
from droprd.testing.farend import FarEnd, Script, read_pieces

Check = Callable[[Transport, FarEnd], Awaitable[None]]


def a_request(far: FarEnd, *pieces: Piece, low_speed_s: int = 20, expect: bool = False) -> Request:
    """A push of these pieces to the far end."""
    return Request(
        "POST",
        far.url,
        "/v1/push",
        pieces,
        "secret",
        {"Droprd-Version": "1"},
        expect_continue=expect,
        low_speed_s=low_speed_s,
    )


async def fails(transport: Transport, request: Request) -> TransportError:
    """The error that this exchange must end in, within 20 seconds."""
    async with asyncio.timeout(20):
        try:
            reply = await transport.exchange(request)
        except TransportError as error:
            return error
    raise AssertionError(f"an error was to come, not {reply}")


async def the_answer_comes_back_whole(transport: Transport, far: FarEnd) -> None:
    """Status, type, body and Retry-After; an error status is an answer like others."""
    kind = {"Content-Type": "application/problem+json"}
    far.will(
        Script(200, b"x" * ANSWER_BYTES_MAX),
        Script(503, b"{}", kind | {"Retry-After": "17"}),
        Script(204),
    )
    reply = await transport.exchange(a_request(far, b"abc"))
    assert (reply.status, len(reply.body)) == (200, ANSWER_BYTES_MAX)
    assert reply.content_type == "application/msgpack"
    assert reply.retry_after_s is None
    reply = await transport.exchange(a_request(far, b"abc"))
    assert (reply.status, reply.body, reply.retry_after_s) == (503, b"{}", 17)
    assert reply.content_type == "application/problem+json"
    assert (await transport.exchange(a_request(far))).status == 204


async def the_request_arrives_as_it_was_given(transport: Transport, far: FarEnd) -> None:
    """Method, path with query, token, headers, and exactly one Content-Length."""
    for method in ("POST", "PUT"):
        path = "/v1/blobs/aa/bb?offset=0&size=3"
        await transport.exchange(
            Request(method, far.url, path, [b"abc"], "secret", {"Droprd-Version": "1"})
        )
    for got, method in zip(far.received, ("POST", "PUT"), strict=True):
        assert (got.method, got.path) == (method, "/v1/blobs/aa/bb?offset=0&size=3")
        assert got.headers["authorization"] == ["Bearer secret"]
        assert got.headers["droprd-version"] == ["1"]
        assert got.headers["content-length"] == ["3"]
        assert "transfer-encoding" not in got.headers
        assert "expect" not in got.headers
        assert got.body == b"abc"


async def bodies_are_read_from_files_by_range(transport: Transport, far: FarEnd) -> None:
    """Small and large pieces, mixed; the file's own position plays no part."""
    data = os.urandom(5 << 20)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        fd = file.fileno()
        pieces: list[Piece] = [b"begin", FileRange(fd, 3, 0), b"", FileRange(fd, 7, 1)]
        pieces += [FileRange(fd, n * 1000, 300) for n in range(500)]
        pieces += [FileRange(fd, 1_000_003, 3 << 20), b"end"]
        sent = a_request(far, *pieces)
        reply = await transport.exchange(sent)
        empty = await transport.exchange(a_request(far))
    whole = read_pieces([p for p in pieces if isinstance(p, bytes)][:1]) + data[7:8]
    whole += b"".join(data[n * 1000 : n * 1000 + 300] for n in range(500))
    whole += data[1_000_003 : 1_000_003 + (3 << 20)] + b"end"
    assert far.received[0].body == whole
    assert reply.bytes_sent == sent.body_bytes == len(whole)
    assert 0 < reply.seconds < 20
    assert empty.status == 200
    assert far.received[1].headers["content-length"] == ["0"]


async def a_file_that_is_too_short_is_a_local_error(transport: Transport, far: FarEnd) -> None:
    """The peer is not to blame, and gets no padding."""
    with tempfile.TemporaryFile() as file:
        file.write(b"short")
        file.flush()
        error = await fails(transport, a_request(far, FileRange(file.fileno(), 0, 100_000)))
    assert error.kind == "local"
    assert not any(got.whole for got in far.received)


async def exchanges_do_not_wait_for_each_other(transport: Transport, far: FarEnd) -> None:
    """The first of four is answered last."""
    hold = asyncio.Event()
    far.will(Script(body=b"first", hold=hold))
    first = asyncio.create_task(transport.exchange(a_request(far, b"1")))
    await far.wait(1)
    async with asyncio.timeout(10):
        others = await asyncio.gather(*(transport.exchange(a_request(far, b"n")) for _ in range(3)))
    assert [reply.body for reply in others] == [b""] * 3
    assert not first.done()
    hold.set()
    assert (await first).body == b"first"


async def a_redirect_is_not_followed(transport: Transport, far: FarEnd) -> None:
    """It is an answer like others; the sender calls it a fault."""
    far.will(Script(307, headers={"Location": far.url + "/elsewhere"}))
    assert (await transport.exchange(a_request(far, b"x"))).status == 307
    assert len(far.received) == 1


async def an_answer_over_64_kib_is_broken_off(transport: Transport, far: FarEnd) -> None:
    """Whatever it says."""
    far.will(Script(body=b"x" * (ANSWER_BYTES_MAX + 1)))
    assert (await fails(transport, a_request(far, b"x"))).kind == "protocol"


async def what_is_no_answer_is_a_protocol_error(transport: Transport, far: FarEnd) -> None:
    """Another service listens there."""
    far.will(Script(act="garbage"))
    assert (await fails(transport, a_request(far, b"x"))).kind == "protocol"


async def a_connection_that_ends_without_an_answer_is_an_error(
    transport: Transport, far: FarEnd
) -> None:
    """Reset, or, where a client certificate may be wanted, auth."""
    far.will(Script(act="hang_up"))
    error = await fails(transport, a_request(far, b"x"))
    assert error.kind in ("reset", "auth")
    assert (error.kind == "auth") <= far.url.startswith("https")


async def a_peer_that_stands_still_times_out(transport: Transport, far: FarEnd) -> None:
    """After the time without progress, not before."""
    far.will(Script(act="stall"))
    error = await fails(transport, a_request(far, b"x", low_speed_s=1))
    assert error.kind == "timeout"


async def a_cancelled_exchange_reads_no_file_any_more(transport: Transport, far: FarEnd) -> None:
    """Its descriptors may be closed at once; others go on."""
    far.will(Script(act="stall"))
    with tempfile.TemporaryFile() as file:
        file.write(bytes(8 << 20))
        file.flush()
        request = a_request(far, FileRange(file.fileno(), 0, 8 << 20))
        running = asyncio.create_task(transport.exchange(request))
        await far.wait(1)
        running.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
    assert (await transport.exchange(a_request(far, b"y"))).status == 200


async def consent_is_asked_for_when_wanted(transport: Transport, far: FarEnd) -> None:
    """A refusal comes before the body has left; a consent brings all of it."""
    far.will(Script(503, act="early"))
    body = bytes(1 << 20)
    refused = await transport.exchange(a_request(far, body, expect=True))
    assert (refused.status, refused.bytes_sent) == (503, 0)
    taken = await transport.exchange(a_request(far, body, expect=True))
    assert (taken.status, taken.bytes_sent) == (200, len(body))
    assert far.received[1].body == body


async def an_answer_before_the_end_of_the_body_is_an_answer(
    transport: Transport, far: FarEnd
) -> None:
    """Not a broken connection."""
    far.will(Script(507, act="early"))
    reply = await transport.exchange(a_request(far, bytes(8 << 20)))
    assert reply.status == 507


async def a_kept_connection_found_closed_costs_nothing(transport: Transport, far: FarEnd) -> None:
    """The request goes out on a new one, and arrives once."""
    far.will(Script(hang_up_after=True))
    await transport.exchange(a_request(far, b"1"))
    for n in range(3):
        assert (await transport.exchange(a_request(far, b"%d" % n * 300_000))).status == 200
    assert len(far.received) == 4


async def closing_breaks_off_what_is_in_flight(transport: Transport, far: FarEnd) -> None:
    """With an error that is no cancellation; afterwards nothing is sent."""
    far.will(Script(act="stall"))
    running = asyncio.create_task(transport.exchange(a_request(far, b"x")))
    await far.wait(1)
    await transport.aclose()
    async with asyncio.timeout(5):
        (result,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(result, TransportError)
    assert result.kind == "local"
    assert (await fails(transport, a_request(far, b"x"))).kind == "local"
    await transport.aclose()


CHECKS: Sequence[Check] = (
    the_answer_comes_back_whole,
    the_request_arrives_as_it_was_given,
    bodies_are_read_from_files_by_range,
    a_file_that_is_too_short_is_a_local_error,
    exchanges_do_not_wait_for_each_other,
    a_redirect_is_not_followed,
    an_answer_over_64_kib_is_broken_off,
    what_is_no_answer_is_a_protocol_error,
    a_connection_that_ends_without_an_answer_is_an_error,
    a_peer_that_stands_still_times_out,
    a_cancelled_exchange_reads_no_file_any_more,
    consent_is_asked_for_when_wanted,
    an_answer_before_the_end_of_the_body_is_an_answer,
    a_kept_connection_found_closed_costs_nothing,
    closing_breaks_off_what_is_in_flight,
)
