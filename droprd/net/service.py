"""What the listening side hands on, and to whom: `Service`, its answers and refusals.

`net` knows sockets, the worker knows the spool; this protocol is all they share. The listener
guarantees that `peer` comes from credentials, that lengths were checked against the limits and
`admit` was asked before a byte of a body was read, and that a body is whole when `push` gets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from droprd.errors import DroprdError

RequestKind = Literal["hello", "push", "match", "blob"]


class Answer(NamedTuple):
    """An answer to a request: its body is msgpack.

    `retry_after_s` becomes the header Retry-After, in whole seconds, if it is not None.
    """

    status: int = 200
    body: bytes = b""
    retry_after_s: int | None = None


class Refused(DroprdError):
    """A request that is refused with this status and code, and closes its connection.

    Attributes:
        status: 4xx or 5xx.
        retry_after_s: for 429, 503 and 507.
    """

    code = "refused"

    def __init__(
        self, status: int, code: str, what: str, why: str = "", retry_after_s: int | None = None
    ) -> None:
        super().__init__(what, why=why, code=code)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class BlobPiece:
    """Which bytes of which blob a request brings.

    Attributes:
        offset: where they belong.
        length: how many the request brings.
        size: of the whole blob; offset + length is never more.
    """

    spool_id: bytes
    frame_id: bytes
    offset: int
    length: int
    size: int


class Reader(Protocol):
    """The body of a request as it arrives."""

    async def read(self) -> bytes:
        """The next bytes, as many as are there; empty at the end.

        Raises: Refused if they come too slowly, ConnectionResetError if the peer is gone. Both may
        be let through; what was read before is genuine.
        """
        ...


class Service(Protocol):
    """The receiver behind the listener.

    Each coroutine may raise `Refused` or `BadData` (400). Any other `DroprdError`, and `OSError`,
    is answered with 500. They run to their end even when the peer has gone.
    """

    def admit(self, peer: str, kind: RequestKind, length: int) -> None:
        """Refuse a request of `length` bytes by its head alone; raises `Refused`, or returns."""
        ...

    async def hello(self, peer: str, body: bytes) -> Answer:
        """A greeting."""
        ...

    async def push(self, peer: str, body: bytes) -> Answer:
        """A whole push body."""
        ...

    async def match(self, peer: str, body: bytes) -> Answer:
        """A match request."""
        ...

    async def blob(self, peer: str, piece: BlobPiece, reader: Reader) -> Answer:
        """Bytes of a blob."""
        ...
