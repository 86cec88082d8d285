"""A TCP proxy between a sender and a receiver that does to HTTP what bad networks do.

Runs an event loop in a thread of its own; every method may be called from any thread. It reads the
heads of requests, so that a fault meets the requests it is meant for (`PUSH`, `BLOB`) and not a
greeting that happens to come by. All connections it ends, it ends by a reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
CHUNK_BYTES = 64 * 1024
WITHIN_S = 30.0
PUSH, BLOB = b"/v1/push", b"/v1/blobs/"


class LossyProxy:
    """Listens on loopback and passes on to `port`.

    Attributes:
        delay_s: each piece of a request and of an answer waits so long.
        recording: keep every push that comes by in `pushes`, byte for byte.
        pushes: requests as they were, for `repeat`.
        cuts: how many connections were reset.
        passed_up: bytes that went up to the receiver in requests for blobs.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.delay_s = 0.0
        self.recording = False
        self.pushes: list[bytes] = []
        self.cuts = 0
        self.passed_up = 0
        self._answers_to_lose = 0
        self._requests_to_keep = 0
        self._cut_at: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._do(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WITHIN_S)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=CHUNK_BYTES)

    # -- faults ----------------------------------------------------------------------------------

    def lose_answers(self, count: int) -> None:
        """The next `count` pushes reach the receiver; its answers never reach the sender."""
        self._answers_to_lose = count

    @property
    def answers_to_lose(self) -> int:
        """How many answers are still to be lost."""
        return self._answers_to_lose

    def keep_pushes(self, count: int) -> None:
        """The next `count` pushes are read whole, kept in `pushes`, and never passed on."""
        self._requests_to_keep = count

    def cut_after(self, count: int) -> None:
        """Cut everything once, when `count` bytes more of blobs have gone up."""
        self._cut_at = self.passed_up + count

    @property
    def is_cut_due(self) -> bool:
        """Whether the cut of `cut_after` is still to come."""
        return self._cut_at is not None

    def cut(self) -> None:
        """Reset every connection; new ones may come at once."""

        async def cutting() -> None:
            self._reset(*self._writers)

        self._do(cutting())

    @contextmanager
    def cut_every(self, seconds: float) -> Iterator[None]:
        """Reset every connection again and again."""
        over = threading.Event()

        def cutting() -> None:
            while not over.wait(seconds):
                self.cut()

        thread = threading.Thread(target=cutting)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Nobody listens, and all connections are cut."""
        self._server.close()
        self.cut()
        try:
            yield
        finally:

            async def listen_again() -> asyncio.Server:
                return await asyncio.start_server(
                    self._serve, "127.0.0.1", self.port, limit=CHUNK_BYTES
                )

            self._server = self._do(listen_again())

    def heal(self) -> None:
        """No fault any more."""
        self._answers_to_lose = self._requests_to_keep = 0
        self._cut_at = None
        self.delay_s = 0.0
        self.recording = False
        self.pushes.clear()

    def repeat(self, request: bytes) -> bytes:
        """Send a request once more, straight to the receiver; its whole answer."""
        with socket.create_connection(("127.0.0.1", self._target), WITHIN_S) as connection:
            connection.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
            answer = b""
            while data := connection.recv(CHUNK_BYTES):
                answer += data
        return answer

    def close(self) -> None:
        """End it all."""
        self._server.close()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WITHIN_S)
        self._loop.close()

    # -- one connection --------------------------------------------------------------------------

    def _reset(self, *writers: asyncio.StreamWriter) -> None:
        for writer in writers:
            if writer in self._writers:
                self._writers.discard(writer)
                self.cuts += 1
                connection = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                writer.transport.abort()

    async def _serve(self, near: asyncio.StreamReader, sender: asyncio.StreamWriter) -> None:
        self._writers.add(sender)
        try:
            far, receiver = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            self._reset(sender)
            return
        self._writers.add(receiver)
        lost = asyncio.Event()
        down = asyncio.ensure_future(self._down(far, sender, lost))
        try:
            await self._up(near, receiver, lost)
            receiver.write_eof()
            await down
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._reset(sender, receiver)
            down.cancel()

    async def _down(
        self, far: asyncio.StreamReader, sender: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        """Pass answers on, until one is to be lost."""
        with contextlib.suppress(OSError):
            while data := await far.read(CHUNK_BYTES):
                if lost.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    break
                await asyncio.sleep(self.delay_s)
                sender.write(data)
                await sender.drain()
        self._reset(sender)

    async def _up(
        self, near: asyncio.StreamReader, receiver: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        """Pass requests on, one after another."""
        while True:
            try:
                head = await near.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                if not error.partial:
                    return
                raise
            path = head.split(b" ", 2)[1]
            left = length_of(head)
            if path == PUSH and self._requests_to_keep:
                self._requests_to_keep -= 1
                self.pushes.append(head + await near.readexactly(left))
                raise ConnectionResetError
            if path == PUSH and self._answers_to_lose:
                self._answers_to_lose -= 1
                lost.set()
            kept = [head]
            receiver.write(head)
            while left:
                data = await near.read(min(left, CHUNK_BYTES))
                if not data:
                    raise ConnectionResetError
                left -= len(data)
                await asyncio.sleep(self.delay_s)
                receiver.write(data)
                await receiver.drain()
                if path == PUSH and self.recording:
                    kept.append(data)
                elif path.startswith(BLOB):
                    self._count(len(data))
            if path == PUSH and self.recording:
                self.pushes.append(b"".join(kept))

    def _count(self, size: int) -> None:
        self.passed_up += size
        if self._cut_at is not None and self.passed_up >= self._cut_at:
            self._cut_at = None
            self._reset(*list(self._writers))


def length_of(head: bytes) -> int:
    """The Content-Length of a request."""
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0
