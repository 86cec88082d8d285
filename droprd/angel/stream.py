"""A socket that speaks MessagePack-RPC, without ever blocking: to a worker, or to `droprctl`."""

from __future__ import annotations

import socket
from collections.abc import Callable

from droprd.angel.loop import Loop
from droprd.core import rpc
from droprd.errors import BadData

_READ_BYTES = 65536


class Stream:
    """Messages in and out of one connected socket, which it owns."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        decoder: rpc.Decoder,
        received: Callable[[rpc.Message], None],
        closed: Callable[[str], None],
        unsent_bytes_max: int = 2 * rpc.ANSWER_BYTES_MAX,
    ) -> None:
        """`received` gets each message, `closed` once the reason when the other side is gone."""
        sock.setblocking(False)
        self._loop = loop
        self._sock = sock
        self._decoder = decoder
        self._received = received
        self._closed = closed
        self._out = bytearray()
        self._unsent_bytes_max = unsent_bytes_max
        self._write_watched = False
        self.open = True
        self._watch()

    @property
    def unsent(self) -> bool:
        """Whether something waits until the other side reads."""
        return self.open and bool(self._out)

    def send(self, message: rpc.Message) -> None:
        """Send, now or as soon as the other side reads; one that never does is cut off."""
        if not self.open:
            return
        self._out += rpc.encode(message)
        if len(self._out) > self._unsent_bytes_max:
            self._end("it does not read")
            return
        self._flush()

    def close(self) -> None:
        """Close at once; `closed` is not called."""
        if self.open:
            self.open = False
            self._loop.forget(self._sock.fileno())
            self._sock.close()

    def drain(self) -> None:
        """Take in what has arrived already."""
        while self.open and self._read():
            pass

    def _watch(self) -> None:
        if self.open:
            self._write_watched = bool(self._out)
            self._loop.watch(
                self._sock.fileno(),
                self._read,
                self._flush if self._out else None,
            )

    def _read(self) -> bool:
        """Read once; whether there may be more."""
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(error.strerror or "read failed")
            return False
        if not data:
            self._end("it closed the connection")
            return False
        try:
            for message in self._decoder.feed(data):
                self._received(message)
                if not self.open:
                    return False
        except BadData as error:
            self._end(str(error))
            return False
        return True

    def _flush(self) -> None:
        if not self.open:
            return
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(error.strerror or "write failed")
            return
        if bool(self._out) != self._write_watched:
            self._watch()

    def _end(self, reason: str) -> None:
        if self.open:
            self.close()
            self._closed(reason)
