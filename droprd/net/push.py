"""The transport by libcurl: https, http, and Unix sockets.

Owns one `AsyncCurlMulti` with its connections (kept open and used again) and a few easy handles.
Bodies are read by libcurl's read function straight from the descriptors in the request, at most
1 MiB at a time, and can be rewound. It follows no redirect, uses no proxy, speaks HTTP/1.1 only,
checks certificates always, and breaks an answer off that is longer than 64 KiB. There is no total
timeout: a request lives as long as it moves.

A kept connection may have been closed by the peer a moment ago. A request that meets this is sent
once more on a new connection; the protocol makes a repeat harmless. Nothing else is repeated.

Raises `TransportError` in plain words, see `curlerrors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pycurl

from droprd.errors import ConfigError
from droprd.net.curlerrors import BROKEN, explain
from droprd.net.resolve import Resolver
from droprd.net.transport import (
    ANSWER_BYTES_MAX,
    FileRange,
    Piece,
    Reply,
    Request,
    TransportError,
    TransportOptions,
    scheme_of,
)

READ_BYTES = 1024 * 1024
_GATHER_BYTES = 64 * 1024
"""Smaller reads are joined with what follows, so that many small pieces cost few calls."""
_IDLE_S = 8
"""Receivers close an idle connection after 10 s unless told otherwise: be first."""
_EXPECT_S = 10
_HANDLES_KEPT = 16
_UNSENT_BYTES_MAX = 128 * 1024


class Body:
    """The body of one request as libcurl wants it: `read` and `seek`, and what went wrong."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = [p for p in pieces if (p.length if isinstance(p, FileRange) else len(p))]
        self._at = 0
        self._offset = 0  # within the piece
        self._closed = False
        self.fault = ""

    def close(self) -> None:
        """Read no file any more, whatever libcurl asks for."""
        self._closed = True

    def read(self, size: int) -> bytes | int:
        """The next bytes, at most `size` and 1 MiB; empty at the end."""
        if self._closed:
            return pycurl.READFUNC_ABORT
        size = min(size, READ_BYTES)
        try:
            data = self._take(size)
            if len(data) >= min(size, _GATHER_BYTES) or self._at == len(self._pieces):
                return data
            parts = [data]
            got = len(data)
            while got < size and self._at < len(self._pieces):
                data = self._take(size - got)
                parts.append(data)
                got += len(data)
            return b"".join(parts)
        except (OSError, EOFError) as error:
            self.fault = str(error)
            return pycurl.READFUNC_ABORT

    def _take(self, size: int) -> bytes:
        if self._at == len(self._pieces):
            return b""
        piece = self._pieces[self._at]
        if isinstance(piece, FileRange):
            wanted = min(size, piece.length - self._offset)
            data = os.pread(piece.fd, wanted, piece.offset + self._offset)
            if not data:
                raise EOFError("the file is shorter than the request says")
            whole = piece.length
        else:
            data = piece[self._offset : self._offset + size]
            whole = len(piece)
        self._offset += len(data)
        if self._offset == whole:
            self._at += 1
            self._offset = 0
        return data

    def seek(self, offset: int, origin: int) -> int:
        """Go to byte `offset` of the body (from its start only, as libcurl does)."""
        if origin != os.SEEK_SET or offset < 0:
            return pycurl.SEEKFUNC_CANTSEEK
        self._at = 0
        for piece in self._pieces:
            length = piece.length if isinstance(piece, FileRange) else len(piece)
            if offset < length:
                break
            offset -= length
            self._at += 1
        self._offset = offset if self._at < len(self._pieces) else 0
        return pycurl.SEEKFUNC_OK


class _Answer:
    """Collects the body of an answer up to its limit."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._bytes = 0
        self.too_long = False

    def write(self, data: bytes) -> int:
        self._bytes += len(data)
        if self._bytes > ANSWER_BYTES_MAX:
            self.too_long = True
            return 0  # fewer than given: libcurl breaks off
        self._parts.append(data)
        return len(data)

    def body(self) -> bytes:
        return b"".join(self._parts)


class CurlTransport:
    """`Transport` for https://, http:// and unix: addresses; one per peer."""

    def __init__(self, options: TransportOptions | None = None) -> None:
        self._options = options or TransportOptions()
        self._resolver = Resolver()
        self._multi: pycurl.AsyncCurlMulti | None = None
        self._idle: list[pycurl.Curl] = []
        self._bodies: set[Body] = set()
        self._closed = False

    async def exchange(self, request: Request) -> Reply:
        """See `Transport.exchange`."""
        if self._closed:
            raise TransportError("local", "the transport is closed")
        try:
            return await self._once(request, fresh=False)
        except _StaleConnection:
            return await self._once(request, fresh=True)

    async def _once(self, request: Request, *, fresh: bool) -> Reply:
        resolved = None
        if scheme_of(request.url) != "unix":
            resolved = await self._resolver.entry(request.url, request.connect_timeout_s)
            if self._closed:
                raise TransportError("local", "the transport is closed")
        if self._multi is None:
            self._multi = pycurl.AsyncCurlMulti()
            self._multi.setopt(pycurl.M_MAXCONNECTS, self._options.connections_max)
        multi = self._multi
        curl = self._idle.pop() if self._idle else pycurl.Curl()
        body = Body(request.pieces)
        answer = _Answer()
        reusable = False
        self._bodies.add(body)
        try:
            self._prepare(curl, request, body, answer, fresh, resolved)
            future = multi.add_handle(curl)
            try:
                await future
            except asyncio.CancelledError:
                body.close()
                # At once, not by the callback of the future: the caller may close its files now.
                # RuntimeError: the transport was closed, or it is out already.
                with contextlib.suppress(RuntimeError, pycurl.error):
                    multi.remove_handle(curl)
                task = asyncio.current_task()
                if self._closed and task is not None and not task.cancelling():
                    # Not the caller was cancelled, but the transfer, by `aclose`.
                    raise TransportError("local", "the transport was closed") from None
                raise
            reusable = True
            return _reply(curl, answer)
        except pycurl.error as error:
            reusable = True
            self._fail(error, curl, request, body, answer, fresh)
        finally:
            body.close()
            self._bodies.discard(body)
            if reusable and not self._closed and len(self._idle) < _HANDLES_KEPT:
                curl.reset()
                self._idle.append(curl)
            else:
                curl.close()

    def _prepare(
        self,
        curl: pycurl.Curl,
        request: Request,
        body: Body,
        answer: _Answer,
        fresh: bool,
        resolved: str | None,
    ) -> None:
        set_option = curl.setopt
        scheme = scheme_of(request.url)
        if scheme == "unix":
            path = request.url.removeprefix("unix:")
            if path.startswith("//"):
                path = path[2:]
            if not path.startswith("/"):
                raise ConfigError(
                    f"{request.url!r} is no address of a Unix socket",
                    why="the path must be absolute",
                    hint="write unix:/PATH",
                )
            set_option(pycurl.UNIX_SOCKET_PATH, path)
            set_option(pycurl.URL, "http://localhost" + request.path)
        else:
            set_option(pycurl.URL, request.url.rstrip("/") + request.path)
        set_option(pycurl.PROTOCOLS, pycurl.PROTO_HTTPS if scheme == "https" else pycurl.PROTO_HTTP)
        set_option(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        set_option(pycurl.FOLLOWLOCATION, 0)
        set_option(pycurl.PROXY, "")
        set_option(pycurl.NOSIGNAL, 1)
        size = request.body_bytes
        if request.method == "PUT":
            set_option(pycurl.UPLOAD, 1)
            set_option(pycurl.INFILESIZE_LARGE, size)
        else:
            set_option(pycurl.POST, 1)
            set_option(pycurl.POSTFIELDSIZE_LARGE, size)
        set_option(pycurl.READFUNCTION, body.read)
        set_option(pycurl.SEEKFUNCTION, body.seek)
        set_option(pycurl.UPLOAD_BUFFERSIZE, READ_BYTES)
        set_option(pycurl.WRITEFUNCTION, answer.write)
        headers = [f"{name}: {value}" for name, value in request.headers.items()]
        if not any(name.lower() == "content-type" for name in request.headers):
            headers.append("Content-Type: application/octet-stream")
        # Without the empty header libcurl asks for consent by itself above 1 MiB.
        headers.append("Expect: 100-continue" if request.expect_continue else "Expect:")
        if request.token is not None:
            headers.append(f"Authorization: Bearer {request.token}")
        set_option(pycurl.HTTPHEADER, headers)
        set_option(pycurl.EXPECT_100_TIMEOUT_MS, _EXPECT_S * 1000)
        set_option(pycurl.CONNECTTIMEOUT_MS, max(1, int(request.connect_timeout_s * 1000)))
        set_option(pycurl.LOW_SPEED_LIMIT, request.low_speed_bytes_s)
        set_option(pycurl.LOW_SPEED_TIME, request.low_speed_s)
        set_option(pycurl.MAXAGE_CONN, _IDLE_S)
        set_option(pycurl.SOCKOPTFUNCTION, _tune)
        set_option(pycurl.TCP_KEEPALIVE, 1)
        if resolved is not None:
            set_option(pycurl.RESOLVE, [resolved])
        if fresh:
            set_option(pycurl.FRESH_CONNECT, 1)
        if scheme == "https":
            self._prepare_tls(set_option)

    def _prepare_tls(self, set_option: Callable[[int, Any], None]) -> None:
        set_option(pycurl.SSLVERSION, pycurl.SSLVERSION_TLSv1_2)
        set_option(pycurl.SSL_VERIFYPEER, 1)
        set_option(pycurl.SSL_VERIFYHOST, 2)
        ca_file = self._options.ca_file or _system_certificates()
        if ca_file:
            set_option(pycurl.CAINFO, ca_file)
        if self._options.cert_file:
            set_option(pycurl.SSLCERT, self._options.cert_file)
            set_option(pycurl.SSLKEY, self._options.key_file or self._options.cert_file)

    def _fail(
        self,
        error: pycurl.error,
        curl: pycurl.Curl,
        request: Request,
        body: Body,
        answer: _Answer,
        fresh: bool,
    ) -> NoReturn:
        code, text = (*error.args, "")[:2]
        reused = curl.getinfo(pycurl.NUM_CONNECTS) == 0 and code in BROKEN
        if reused and not fresh and not curl.getinfo(pycurl.RESPONSE_CODE):
            raise _StaleConnection from error
        kind, why, hint = explain(code, str(text), curl, request, self._options)
        if kind in ("connect", "timeout"):
            self._resolver.forget()
        if body.fault:
            kind, why, hint = "local", body.fault, "run droprctl fsck"
        elif answer.too_long:
            kind, why, hint = "protocol", f"the answer is over {ANSWER_BYTES_MAX} bytes", ""
        raise TransportError(
            kind,
            f"no answer from {request.url}",
            why=why,
            hint=hint,
            bytes_sent=int(curl.getinfo(pycurl.SIZE_UPLOAD_T)),
            seconds=float(curl.getinfo(pycurl.TOTAL_TIME)),
        ) from error

    async def aclose(self) -> None:
        """See `Transport.aclose`."""
        self._closed = True
        for body in self._bodies:
            body.close()
        if self._multi is not None:
            await self._multi.aclose()
        for curl in self._idle:
            curl.close()
        self._idle.clear()


class _StaleConnection(Exception):
    """A kept connection was found closed."""


def _tune(fd: int, purpose: int) -> int:
    """Keep what waits in the kernel small.

    Else a slow line takes megabytes at once and then seems to stand still: the bytes sent and the
    low-speed limit would speak of the kernel's memory, not of the line.
    """
    with contextlib.suppress(OSError):
        connection = socket.socket(fileno=fd)
        try:
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES_MAX
                )
        finally:
            connection.detach()
    return pycurl.SOCKOPT_OK


def _reply(curl: pycurl.Curl, answer: _Answer) -> Reply:
    info = curl.getinfo
    seconds = float(info(pycurl.TOTAL_TIME))
    return Reply(
        status=int(info(pycurl.RESPONSE_CODE)),
        content_type=str(info(pycurl.CONTENT_TYPE) or "").partition(";")[0].strip().lower(),
        body=answer.body(),
        retry_after_s=int(info(pycurl.RETRY_AFTER)) or None,
        bytes_sent=int(info(pycurl.SIZE_UPLOAD_T)),
        seconds=seconds,
        send_seconds=max(
            0.0,
            float(info(pycurl.STARTTRANSFER_TIME)) - float(info(pycurl.PRETRANSFER_TIME)),
        ),
        address=str(info(pycurl.PRIMARY_IP) or ""),
    )


# Where distributions keep the certificates they trust; a libcurl from a wheel cannot know it.
_CERTIFICATE_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def _system_certificates() -> str:
    """The file of certificates this system trusts, "" to leave it to libcurl."""
    for path in (os.environ.get("SSL_CERT_FILE", ""), *_CERTIFICATE_FILES):
        if path and os.path.isfile(path):
            return path
    return ""
