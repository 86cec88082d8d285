"""Every transport passes the same checks; one from another package is found and delivers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trustme

from droprd.core.push import (
    LaneAnswer,
    LanePush,
    Push,
    decode_push,
    encode_push_answer,
)
from droprd.errors import ConfigError
from droprd.model import GENESIS
from droprd.net.credentials import Tokens
from droprd.net.listen import Listener
from droprd.net.push import CurlTransport
from droprd.net.registry import transport_factory
from droprd.net.service import Answer, BlobPiece, Reader, RequestKind
from droprd.net.transport import Transport, TransportOptions
from droprd.testing.farend import FarEnd, MemoryFarEnd, MemoryTransport, StreamFarEnd
from droprd.testing.transports import CHECKS, Check

Pair = Callable[[Path], AbstractAsyncContextManager[tuple[Transport, FarEnd]]]

PLUGIN = Path(__file__).with_name("carrier.py")


@asynccontextmanager
async def curl_http(tmp: Path) -> AsyncIterator[tuple[Transport, FarEnd]]:
    async with StreamFarEnd.on_tcp() as far:
        yield CurlTransport(), far


@asynccontextmanager
async def curl_http_on_ipv6(tmp: Path) -> AsyncIterator[tuple[Transport, FarEnd]]:
    try:
        async with StreamFarEnd.on_tcp(host="::1") as far:
            yield CurlTransport(), far
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")


@asynccontextmanager
async def curl_https(tmp: Path) -> AsyncIterator[tuple[Transport, FarEnd]]:
    import ssl

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp / "ca.pem"))
    async with StreamFarEnd.on_tcp(context) as far:
        yield CurlTransport(TransportOptions(ca_file=str(tmp / "ca.pem"))), far


@asynccontextmanager
async def curl_unix(tmp: Path) -> AsyncIterator[tuple[Transport, FarEnd]]:
    async with StreamFarEnd.on_unix() as far:
        yield CurlTransport(), far


@asynccontextmanager
async def memory(tmp: Path) -> AsyncIterator[tuple[Transport, FarEnd]]:
    far = MemoryFarEnd()
    yield MemoryTransport(far.answer), far


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("pair", [curl_http, curl_http_on_ipv6, curl_https, curl_unix, memory])
def test_the_transport_keeps_the_contract(pair: Pair, check: Check, tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path) as (transport, far):
            try:
                async with asyncio.timeout(30):
                    await check(transport, far)
            finally:
                await transport.aclose()

    asyncio.run(run())


def test_a_scheme_without_a_transport_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="http, https, unix"):
        transport_factory("gopher")


class Store:
    """A service that takes every push."""

    def __init__(self) -> None:
        self.pushes: list[tuple[str, Push, bytes]] = []

    def admit(self, peer: str, kind: RequestKind, length: int) -> None:
        pass

    async def push(self, peer: str, body: bytes) -> Answer:
        push, parts = decode_push(body)
        self.pushes.append((peer, push, b"".join(bytes(part) for part in parts)))
        return Answer(body=encode_push_answer([LaneAnswer(GENESIS, "ok") for _ in push.lanes]))

    async def hello(self, peer: str, body: bytes) -> Answer:
        raise AssertionError("nobody greets here")

    async def match(self, peer: str, body: bytes) -> Answer:
        raise AssertionError("nobody asks here")

    async def blob(self, peer: str, piece: BlobPiece, reader: Reader) -> Answer:
        raise AssertionError("nobody sends blobs here")


def install(package: Path, where: Path) -> None:
    """Lay a package out as an installer does: its module, and what it offers in a dist-info."""
    (where / package.name).write_bytes(package.read_bytes())
    info = where / "droprd_carrier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: droprd-carrier\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[droprd.transports]\ncarrier = carrier:CarrierTransport\nbroken = carrier:NothingThere\n"
    )


def run_with(installed: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env={**os.environ, "PYTHONPATH": f"{installed}:{root}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


SENDER = """
    import asyncio, sys
    from droprd.core.push import LanePush, Push, decode_push_answer, encode_push
    from droprd.model import GENESIS
    from droprd.net.registry import Transports, transport_factory
    from droprd.net.transport import FileRange, Request, Transport

    async def main():
        transports = Transports()
        body = encode_push(Push(bytes(16), (LanePush("sites", 5, GENESIS, 1, 1000),)))
        with open(sys.argv[2], "rb") as file:
            pieces = [body, FileRange(file.fileno(), 500, 1000)]
            headers = {"Droprd-Version": "1"}
            request = Request("POST", sys.argv[1], "/v1/push", pieces, "secret", headers)
            reply = await transports.exchange(request)
        await transports.aclose()
        print(reply.status, decode_push_answer(reply.body, 1)[0].verdict)

    asyncio.run(main())
"""


def test_a_transport_of_another_installed_package_delivers(tmp_path: Path) -> None:
    install(PLUGIN, tmp_path)
    data = os.urandom(2000)
    (tmp_path / "lane.log").write_bytes(data)
    store = Store()

    async def run() -> str:
        import socket

        path = str(tmp_path / "receive.sock")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen()
            listener = Listener(store, Tokens({"hamburg": "secret"}))
            await listener.start([listening])
            sender = run_with(tmp_path, SENDER, f"carrier:{path}", str(tmp_path / "lane.log"))
            try:
                async with asyncio.timeout(30):
                    said, _ = await asyncio.to_thread(sender.communicate)
            finally:
                sender.kill()
                await listener.stop(1)
        return said

    assert asyncio.run(run()).strip() == "200 ok"
    ((peer, push, entries),) = store.pushes
    assert peer == "hamburg"
    assert push.lanes == (LanePush("sites", 5, GENESIS, 1, 1000),)
    assert entries == data[500:1500]


def test_a_transport_that_cannot_be_loaded_is_a_configuration_fault(tmp_path: Path) -> None:
    install(PLUGIN, tmp_path)
    program = """
        from droprd.errors import ConfigError
        from droprd.net.registry import known_schemes, transport_factory
        print(known_schemes())
        try:
            transport_factory("broken")
        except ConfigError as error:
            print(error)
    """
    with run_with(tmp_path, program) as process:
        said, _ = process.communicate(timeout=30)
    assert "['broken', 'carrier', 'http', 'https', 'unix']" in said
    assert "carrier:NothingThere" in said
    assert "Traceback" not in said
