"""Far ends for transports: peers that do what their scripts say, bad manners included.

`StreamFarEnd` speaks HTTP/1.1 on TCP (with TLS if wanted) or a Unix socket, by hand, so that it
can also break the rules. `MemoryTransport` carries requests to a coroutine of the same process,
for tests that need no socket; `MemoryFarEnd` is its far end. The checks are in
`droprd.testing.transports`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from droprd.net.transport import (
    ANSWER_BYTES_MAX,
    FileRange,
    Piece,
    Reply,
    Request,
    TransportError,
)

Act = Literal["answer", "early", "hang_up", "garbage", "stall"]


@dataclass
class Script:
    """How the far end treats one request.

    Attributes:
        act: `answer` after the whole body; `early`, as soon as the head is there; `hang_up` without
            an answer; `garbage`, something that is no HTTP; `stall`, never answer.
        hold: answer only when this is set.
        hang_up_after: close the connection after the answer, without having said so.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/msgpack"})
    act: Act = "answer"
    hold: asyncio.Event | None = None
    hang_up_after: bool = False


@dataclass
class Received:
    """A request as the far end got it; header names in lower case, every value kept."""

    method: str
    path: str
    headers: dict[str, list[str]]
    body: bytes = b""
    connection: int = 0
    whole: bool = False


class FarEnd(Protocol):
    """A peer that does what it is told."""

    url: str
    received: list[Received]

    def will(self, *scripts: Script) -> None:
        """Treat the next requests like this; those after them are answered with 200."""
        ...

    async def wait(self, count: int) -> None:
        """Until the heads of `count` requests have arrived; fails after ten seconds."""
        ...


class Scripts:
    """What all far ends share: the scripts to come and the requests that came."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self._scripts: list[Script] = []
        self._arrived = asyncio.Condition()

    def will(self, *scripts: Script) -> None:
        """See `FarEnd.will`."""
        self._scripts.extend(scripts)

    async def wait(self, count: int) -> None:
        """See `FarEnd.wait`."""
        async with asyncio.timeout(10), self._arrived:
            await self._arrived.wait_for(lambda: len(self.received) >= count)

    async def arrived(self, request: Received) -> Script:
        """Note a request; returns how to treat it."""
        async with self._arrived:
            self.received.append(request)
            self._arrived.notify_all()
        return self._scripts.pop(0) if self._scripts else Script()


class StreamFarEnd(Scripts):
    """A far end on a stream socket."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self._connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def on_tcp(
        cls, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> AsyncIterator[Self]:
        """Listen on a free port of `host`, with TLS if a context is given."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family)
        shown = f"[{host}]" if ":" in host else "localhost" if tls else host
        far = cls(f"{'https' if tls else 'http'}://{shown}:{listening.getsockname()[1]}")
        server = await asyncio.start_server(far._serve, sock=listening, ssl=tls)
        try:
            yield far
        finally:
            await far._close(server)

    @classmethod
    @contextlib.asynccontextmanager
    async def on_unix(cls) -> AsyncIterator[Self]:
        """Listen on a Unix socket in a directory of its own."""
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "peer.sock")
            far = cls(f"unix:{path}")
            server = await asyncio.start_unix_server(far._serve, path)
            try:
                yield far
            finally:
                await far._close(server)

    async def _close(self, server: asyncio.Server) -> None:
        server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        self._writers.add(writer)
        try:
            while await self._serve_one(reader, writer, number):
                pass
        except (OSError, EOFError):
            pass  # the other side broke off, as some checks want it to
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _serve_one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        method, path, _ = first.split(" ")
        headers: dict[str, list[str]] = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers.setdefault(name.lower(), []).append(value.strip())
        request = Received(method, path, headers, connection=number)
        script = await self.arrived(request)
        if script.act == "hang_up":
            return False
        if script.act != "early":
            if "expect" in headers:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.body = await reader.readexactly(int(headers["content-length"][0]))
            request.whole = True
        if script.act == "stall":
            await asyncio.Event().wait()
        if script.hold is not None:
            await script.hold.wait()
        if script.act == "garbage":
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n" * 3)
            await writer.drain()
            return False
        answer = [f"HTTP/1.1 {script.status} X", f"Content-Length: {len(script.body)}"]
        answer += [f"{name}: {value}" for name, value in script.headers.items()]
        if script.act == "early":
            answer.append("Connection: close")
        writer.write("\r\n".join([*answer, "", ""]).encode("latin-1") + script.body)
        await writer.drain()
        if script.act == "early":
            # Take in what is on its way, else the system resets the connection under the answer.
            while await reader.read(1 << 16):
                pass
            return False
        return not script.hang_up_after


Handler = Callable[[Received], Awaitable[Script]]


class MemoryTransport:
    """Carries requests to a coroutine of the same process; bodies are read like real ones."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._closed = False
        self._running: set[asyncio.Future[Script]] = set()

    async def exchange(self, request: Request) -> Reply:
        """See `Transport.exchange`."""
        if self._closed:
            raise TransportError("local", "the transport is closed")
        began = asyncio.get_running_loop().time()
        body = read_pieces(request.pieces)
        headers = {name.lower(): [value] for name, value in request.headers.items()}
        headers["content-length"] = [str(len(body))]
        if request.token is not None:
            headers["authorization"] = [f"Bearer {request.token}"]
        received = Received(request.method, request.path, headers, body, 1, whole=True)
        running = asyncio.ensure_future(self._handler(received))
        self._running.add(running)
        try:
            async with asyncio.timeout(request.low_speed_s):
                script = await running
        except TimeoutError:
            raise TransportError("timeout", "no answer", why="the handler is too slow") from None
        except asyncio.CancelledError:
            if self._closed:
                raise TransportError("local", "the transport was closed") from None
            raise
        finally:
            self._running.discard(running)
        if script.act == "hang_up":
            raise TransportError("reset", "no answer", why="the handler hung up")
        if script.act == "garbage" or len(script.body) > ANSWER_BYTES_MAX:
            raise TransportError("protocol", "no answer", why="it cannot be read")
        retry_after = script.headers.get("Retry-After")
        return Reply(
            script.status,
            script.headers.get("Content-Type", ""),
            script.body,
            None if retry_after is None else int(retry_after),
            0 if script.act == "early" else len(body),
            asyncio.get_running_loop().time() - began,
        )

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        self._closed = True
        for running in self._running:
            running.cancel()


class MemoryFarEnd(Scripts):
    """The far end of a `MemoryTransport`: give `answer` to it."""

    url = "memory:"

    async def answer(self, request: Received) -> Script:
        """The handler."""
        script = await self.arrived(request)
        if script.act == "stall":
            await asyncio.Event().wait()
        if script.hold is not None:
            await script.hold.wait()
        return script


def read_pieces(pieces: Sequence[Piece]) -> bytes:
    """The body that these pieces make. Raises: TransportError if a file is too short."""
    parts = []
    for piece in pieces:
        part = (
            os.pread(piece.fd, piece.length, piece.offset)
            if isinstance(piece, FileRange)
            else piece
        )
        if isinstance(piece, FileRange) and len(part) != piece.length:
            raise TransportError("local", "the body cannot be read", why="the file is too short")
        parts.append(part)
    return b"".join(parts)
