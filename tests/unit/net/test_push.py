"""What libcurl must be told so that it does what the sender believes."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios

import pytest

from droprd.net.push import CurlTransport
from droprd.net.transport import Request, TransportError
from droprd.testing.farend import Script, StreamFarEnd
from droprd.testing.serving import run
from droprd.testing.transports import a_request


@pytest.mark.parametrize("size", [3, 3 << 20])
def test_a_kept_connection_that_breaks_is_replaced_once(size: int) -> None:
    async def test() -> None:
        async with StreamFarEnd.on_tcp() as far:
            transport = CurlTransport()
            far.will(Script(), Script(act="hang_up"), Script(), Script(act="hang_up"))
            far.will(Script(act="hang_up"))
            for _ in range(2):
                assert (await transport.exchange(a_request(far, bytes(size)))).status == 200
            assert [got.connection for got in far.received] == [1, 1, 2]
            with pytest.raises(TransportError) as caught:
                await transport.exchange(a_request(far, bytes(size)))
            assert caught.value.kind == "reset"
            assert len(far.received) == 5
            await transport.aclose()

    run(test)


def test_connections_are_kept_and_used_again() -> None:
    async def test() -> None:
        async with StreamFarEnd.on_tcp() as far:
            transport = CurlTransport()
            for _ in range(5):
                await transport.exchange(a_request(far, b"x"))
            await asyncio.gather(*(transport.exchange(a_request(far, b"x")) for _ in range(4)))
            assert {got.connection for got in far.received[:5]} == {1}
            assert len({got.connection for got in far.received}) <= 4
            await transport.aclose()

    run(test)


def test_the_bytes_sent_are_those_that_left_and_not_those_the_kernel_holds() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            transport = CurlTransport()
            request = Request("POST", url, "/v1/push", [bytes(32 << 20)])
            running = asyncio.create_task(transport.exchange(request))
            never_reads, _ = await loop.sock_accept(listening)
            seen = -1
            while seen < (seen := waiting_in(never_reads)) or not seen:
                await asyncio.sleep(0.1)
            never_reads.close()
            with pytest.raises(TransportError) as caught:
                await running
            assert caught.value.kind == "reset"
            assert seen <= caught.value.bytes_sent < seen + (1 << 20)
            await transport.aclose()

    run(test)


def waiting_in(connection: socket.socket) -> int:
    """Bytes that have arrived and were not read."""
    answer = fcntl.ioctl(connection, termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def test_a_proxy_in_the_environment_never_sees_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with StreamFarEnd.on_tcp() as far, StreamFarEnd.on_tcp() as proxy:
            for name in ("http_proxy", "https_proxy", "all_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy.url)
            transport = CurlTransport()
            assert (await transport.exchange(a_request(far, b"x"))).status == 200
            assert not proxy.received
            await transport.aclose()

    run(test)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1:1", "file:///etc/passwd", "http://", "unix:x"])
def test_other_addresses_are_refused(url: str) -> None:
    from droprd.errors import DroprdError

    async def test() -> None:
        transport = CurlTransport()
        with pytest.raises(DroprdError):
            await transport.exchange(Request("POST", url, "/v1/push", [b"x"]))
        await transport.aclose()

    run(test)


def test_a_retry_after_that_is_no_number_is_none() -> None:
    async def test() -> None:
        async with StreamFarEnd.on_tcp() as far:
            transport = CurlTransport()
            far.will(Script(503, headers={"Retry-After": "soon"}))
            assert (await transport.exchange(a_request(far, b"x"))).retry_after_s is None
            await transport.aclose()

    run(test)
