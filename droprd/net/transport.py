"""How requests reach a peer: the interface, its values, and the words of an address.

A `Transport` carries whole requests to one address and brings back the answer. It never decides:
it does not repeat, redirect, back off or judge an answer (a 503 is a `Reply`, not an error). The
sender tries a peer's addresses in order and measures by `bytes_sent` and `seconds`.

A body is a list of pieces: bytes, or a range of a file that the transport reads itself, so that
what lies in a log never becomes a Python string. The descriptors must stay open until `exchange`
has returned, raised or been cancelled *and awaited*; the transport never closes them.

Raises only `TransportError`, whose `kind` says where it broke and whose text is for `why PEER`.
Which transport carries which scheme is in `droprd.net.registry`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from droprd.errors import ConfigError, DroprdError

ANSWER_BYTES_MAX = 64 * 1024

TransportErrorKind = Literal[
    "resolve", "connect", "tls", "auth", "timeout", "reset", "protocol", "local"
]


class TransportError(DroprdError):
    """The exchange did not come to a whole answer. What the peer did with the request is unknown.

    Attributes:
        kind: `resolve` no address for the name; `connect` nobody answers there; `tls` no trusted
            encryption; `auth` the peer wants a credential that was not given; `timeout` too slow;
            `reset` broken off midway; `protocol` an answer that is none; `local` this node could
            not read its own body or has no descriptors left.
        bytes_sent: bytes of the body that had left when it broke.
        seconds: since the request began.
    """

    code = "transport"

    def __init__(
        self,
        kind: TransportErrorKind,
        what: str,
        *,
        why: str = "",
        hint: str = "",
        bytes_sent: int = 0,
        seconds: float = 0.0,
    ) -> None:
        super().__init__(what, why=why, hint=hint)
        self.kind: TransportErrorKind = kind
        self.bytes_sent = bytes_sent
        self.seconds = seconds


class FileRange(NamedTuple):
    """`length` bytes at `offset` of an open file."""

    fd: int
    offset: int
    length: int


Piece = bytes | FileRange


@dataclass(frozen=True, slots=True)
class Request:
    """One request to one address.

    Attributes:
        url: of the peer, without the path of the request: https://berlin.example:7707, or
            unix:/run/droprd/receive.sock.
        path: the request's own, with its query: /v1/push.
        pieces: the body, in order.
        token: the bearer token, None for a peer that knows us by certificate.
        expect_continue: wait for the peer's consent before the body is sent.
        low_speed_bytes_s, low_speed_s: give up after so many seconds below so many bytes a second;
            a slow line that moves is never cut off.
        connect_timeout_s: for the connection, name resolution and TLS included.
    """

    method: Literal["POST", "PUT"]
    url: str
    path: str
    pieces: Sequence[Piece] = ()
    token: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    expect_continue: bool = False
    connect_timeout_s: float = 10.0
    low_speed_bytes_s: int = 64
    low_speed_s: int = 30

    @property
    def body_bytes(self) -> int:
        """Length of the whole body in bytes."""
        return sum(
            piece.length if isinstance(piece, FileRange) else len(piece) for piece in self.pieces
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """The peer's answer, whatever its status.

    Attributes:
        body: at most ANSWER_BYTES_MAX bytes.
        retry_after_s: from Retry-After in seconds, None if there is none that can be read.
        bytes_sent: bytes of the request's body that were sent (less than all if the peer answered
            before it had read everything).
        seconds: from the start of the request to the end of the answer.
        send_seconds: of these, from the connection being ready to the first byte of the answer.
        address: numeric address of the peer, "" for a Unix socket.
    """

    status: int
    content_type: str
    body: bytes
    retry_after_s: int | None = None
    bytes_sent: int = 0
    seconds: float = 0.0
    send_seconds: float = 0.0
    address: str = ""


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """What holds for every request of one transport; one transport per peer.

    Attributes:
        ca_file: certificates to trust in place of the system's.
        cert_file, key_file: this node's own certificate, for peers that require one.
        connections_max: connections kept open and used at once.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    connections_max: int = 8


@runtime_checkable
class Transport(Protocol):
    """Carries requests. Safe for several exchanges at once on one event loop."""

    async def exchange(self, request: Request) -> Reply:
        """Send `request` and wait for the whole answer.

        When it is cancelled, the request is broken off and no file is read any more.

        Raises: TransportError.
        """
        ...

    async def aclose(self) -> None:
        """Break off what is in flight, close all connections. May be called twice."""
        ...


TransportFactory = Callable[[TransportOptions], Transport]

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{0,31}):")


def scheme_of(url: str) -> str:
    """The scheme of `url`. Raises: ConfigError if it has none."""
    match = _SCHEME.match(url)
    if match is None:
        raise ConfigError(
            f"{url!r} is no URL", why="it begins with no scheme", hint="write https://HOST:PORT"
        )
    return match[1]
