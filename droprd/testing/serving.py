"""A listener on a free port of loopback, and a client that sends bytes as they are."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from droprd.net.credentials import Tokens
from droprd.net.intake import Limits
from droprd.net.listen import Listener
from droprd.net.service import Answer, BlobPiece, Reader, Refused, RequestKind

GOOD = {"Authorization": "Bearer secret", "Droprd-Version": "1"}


@dataclass
class Recorder:
    """A service that keeps what it got and does what the test hangs into it."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    admitted: list[tuple[str, str, int]] = field(default_factory=list)
    refuse: Refused | None = None
    then: Callable[[], Coroutine[Any, Any, Answer | None]] | None = None
    reads_blobs: bool = True
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def admit(self, peer: str, kind: RequestKind, length: int) -> None:
        self.admitted.append((peer, kind, length))
        if self.refuse is not None:
            raise self.refuse

    async def _call(self, *call: Any) -> Answer:
        self.calls.append(call)
        self.arrived.set()
        answer = await self.then() if self.then is not None else None
        return answer or Answer(body=b"done")

    async def hello(self, peer: str, body: bytes) -> Answer:
        return await self._call("hello", peer, body)

    async def push(self, peer: str, body: bytes) -> Answer:
        return await self._call("push", peer, body)

    async def match(self, peer: str, body: bytes) -> Answer:
        return await self._call("match", peer, body)

    async def blob(self, peer: str, piece: BlobPiece, reader: Reader) -> Answer:
        got = 0
        largest = 0
        while self.reads_blobs and (data := await reader.read()):
            got += len(data)
            largest = max(largest, len(data))
        return await self._call("blob", peer, piece, got, largest)


@dataclass
class Serving:
    listener: Listener
    service: Recorder
    port: int

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    async def ask(
        self,
        path: str = "/v1/push",
        body: bytes = b"abc",
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        raw: list[str] | None = None,
    ) -> Reply:
        """One request on a connection of its own; `raw` replaces the header Content-Length."""
        client = await self.connect()
        try:
            client.send(path, body, method=method, headers=headers, raw=raw)
            return await client.reply()
        finally:
            client.writer.close()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(
        self,
        path: str = "/v1/push",
        body: bytes = b"abc",
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        raw: list[str] | None = None,
    ) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: x"]
        lines += [
            f"{name}: {value}" for name, value in (GOOD if headers is None else headers).items()
        ]
        lines += [f"Content-Length: {len(body)}"] if raw is None else raw
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def reply(self) -> Reply:
        async with asyncio.timeout(10):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().rstrip().split("\r\n")
            headers = {
                name.lower(): value for name, value in (line.split(": ", 1) for line in lines)
            }
            length = int(headers.get("content-length", "0"))
            return Reply(int(first.split(" ")[1]), headers, await self.reader.readexactly(length))

    async def ended(self) -> bool:
        """Whether the other side closes the connection (within ten seconds)."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True


@asynccontextmanager
async def serving(
    limits: Limits | None = None, service: Recorder | None = None, **options: Any
) -> AsyncIterator[Serving]:
    service = service or Recorder()
    listener = Listener(service, Tokens({"hamburg": "secret"}), limits, **options)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        await listener.start([listening])
        try:
            yield Serving(listener, service, listening.getsockname()[1])
        finally:
            await listener.stop(0.2)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine with a bound."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until this holds, at most ten seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
