"""One request from its head to its answer: what is checked, in which order, before the service.

    path, method        404 not_found, 405 method_not_allowed
    credentials         401 unauthorized
    Droprd-Version      400 version_unsupported
    one Content-Length  411 length_required, 400 bad_request, 413 too_large, 415, 417
    room                429, 503 busy or stopping, then Service.admit: 503, 507, …
    body                408 too_slow; handed on whole, blobs as they arrive
    service             its answer; 400 bad_data, its refusals, 500 failed

Owns the count of what was refused, by code. Guarantees that nothing of a body is read before all
that can be refused by the head was, and that the connection is closed after every refusal. A body
that is not read is never parsed as a next request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass

from aiohttp import hdrs, web

from droprd.core.problem import CONTENT_TYPE as PROBLEM_TYPE
from droprd.core.problem import Problem, encode_problem
from droprd.core.push import PUSH_BODY_BYTES_MAX, SMALL_BODY_BYTES_MAX, VERSION
from droprd.errors import BadData, DroprdError
from droprd.model import MIB
from droprd.net.credentials import Tokens, unix_user
from droprd.net.service import Answer, BlobPiece, Refused, RequestKind, Service

log = logging.getLogger("droprd.net")

ANSWER_TYPE = "application/msgpack"
_BLOB_PATH = re.compile(
    r"/v1/blobs/([0-9a-f]{32})/([0-9a-f]{32})\?offset=(0|[1-9][0-9]{0,17})&size=([1-9][0-9]{0,17})\Z"
)
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,17})\Z")
_POSTS: dict[str, RequestKind] = {"/v1/push": "push", "/v1/hello": "hello", "/v1/match": "match"}

TITLES = {
    "unauthorized": "the credentials are missing or unknown",
    "not_found": "there is nothing at this path",
    "method_not_allowed": "this path has another method",
    "version_unsupported": "this protocol version is not spoken here",
    "length_required": "the request must say its length",
    "bad_request": "the request cannot be read",
    "bad_data": "the body cannot be read",
    "too_large": "the body is longer than allowed",
    "encoding_unsupported": "bodies travel as they are",
    "expectation_failed": "only 100-continue can be expected",
    "too_slow": "the body came too slowly",
    "too_many_requests": "too many requests of this peer at once",
    "busy": "no memory for another body now",
    "stopping": "the receiver is stopping",
    "failed": "the receiver failed",
}
"""The refusals of this module by code; those of a service bring their own words."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may take.

    Attributes:
        header_timeout_s: a request's head must be there so long after the connection was made or
            the answer before was sent.
        body_rate_min: bytes a second that a body must bring, on average over `body_window_s`.
        connections_per_address: at once; Unix sockets are one address.
        connections_max: at once, in all.
        requests_per_peer: at once.
        bodies_bytes_max: of all push bodies that are being received, in memory.
        push_bytes_max: of one push body.
    """

    header_timeout_s: float = 10.0
    body_rate_min: int = 256
    body_window_s: float = 30.0
    connections_per_address: int = 64
    connections_max: int = 1024
    requests_per_peer: int = 16
    bodies_bytes_max: int = 64 * MIB
    push_bytes_max: int = PUSH_BODY_BYTES_MAX


class BodyReader:
    """`Reader` over a request: counts, and watches the rate while it waits, never while we work."""

    def __init__(self, request: web.BaseRequest, length: int, limits: Limits) -> None:
        self._content = request.content
        self._clock = asyncio.get_running_loop().time
        self.left = length  # bytes still to be read
        self._window_s = limits.body_window_s
        self._window_bytes = limits.body_rate_min * limits.body_window_s
        self._waited_s = 0.0
        self._got = 0

    async def read(self) -> bytes:
        """See `Reader.read`."""
        if not self.left:
            return b""
        begun = self._clock()
        try:
            async with asyncio.timeout(max(0.0, self._window_s - self._waited_s)):
                data = await self._content.readany()
        except TimeoutError:
            if self._got < self._window_bytes:
                raise Refused(
                    408, "too_slow", TITLES["too_slow"], f"{self.left} bytes are missing"
                ) from None
            self._waited_s, self._got = 0.0, 0
            return await self.read()
        except (ConnectionError, web.RequestPayloadError, RuntimeError) as error:
            # aiohttp tells of a lost connection by any of these.
            raise ConnectionResetError("the peer broke the request off") from error
        if not data:
            raise ConnectionResetError("the peer broke the request off")
        self._waited_s += self._clock() - begun
        self._got += len(data)
        self.left -= len(data)
        return data

    async def whole(self) -> bytes:
        """All of the body."""
        parts = []
        while data := await self.read():
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Intake:
    """Takes requests for a `Service`."""

    def __init__(
        self, service: Service, tokens: Tokens, limits: Limits, own_name: str | None = None
    ) -> None:
        """`own_name`: who asks on a Unix socket without a token, if it is this process's user."""
        self.refused: Counter[str] = Counter()
        self.busy: set[object] = set()
        self.stopping = False
        self.tokens = tokens
        self._service = service
        self._limits = limits
        self._own_name = own_name
        self._by_peer: Counter[str] = Counter()
        self._bodies_bytes = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Requests that are being read or answered."""
        return len(self.busy)

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        await self._idle.wait()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The handler of the HTTP server."""
        self.busy.add(request.protocol)  # a connection has one request at a time
        self._idle.clear()
        try:
            answer = await self._answer(request)
        except Refused as refusal:
            return self.refuse(refusal, request)
        except BadData as error:
            return self.refuse(Refused(400, "bad_data", TITLES["bad_data"], str(error)))
        except ConnectionResetError:
            return self.refuse(Refused(400, "broken_off", "the request was broken off"))
        except (DroprdError, OSError) as error:
            log.exception("a request failed")
            why = error.what if isinstance(error, DroprdError) else ""
            return self.refuse(Refused(500, "failed", TITLES["failed"], why))
        finally:
            self.busy.discard(request.protocol)
            if not self.busy:
                self._idle.set()
        response = web.Response(
            status=answer.status, body=answer.body, headers={hdrs.CONTENT_TYPE: ANSWER_TYPE}
        )
        if answer.retry_after_s is not None:
            response.headers[hdrs.RETRY_AFTER] = str(answer.retry_after_s)
        if answer.status >= 400:
            self.refused[f"status_{answer.status}"] += 1
        if answer.status >= 400 or self.stopping:
            response.force_close()
        return response

    def refuse(self, refusal: Refused, request: web.BaseRequest | None = None) -> web.Response:
        """Count it, and make the answer, which closes the connection."""
        self.refused[refusal.code] += 1
        problem = Problem(refusal.status, refusal.code, refusal.what, refusal.why)
        response = web.Response(
            status=refusal.status,
            body=encode_problem(problem),
            headers={hdrs.CONTENT_TYPE: PROBLEM_TYPE},
        )
        if refusal.retry_after_s is not None:
            response.headers[hdrs.RETRY_AFTER] = str(refusal.retry_after_s)
        if refusal.status == 401:
            response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
        elif refusal.status == 405 and request is not None:
            response.headers[hdrs.ALLOW] = "POST" if request.raw_path in _POSTS else "PUT"
        response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> Answer:
        kind, piece = _route(request)
        peer = self._peer(request)
        if request.headers.getall("Droprd-Version", []) != [str(VERSION)]:
            raise _refused(400, "version_unsupported", f"spoken is {VERSION}")
        length = self._length(request, kind)
        if piece is not None:
            piece = BlobPiece(piece.spool_id, piece.frame_id, piece.offset, length, piece.size)
            if piece.offset + length > piece.size:
                raise _refused(400, "bad_request", "the piece reaches beyond the blob's size")
        expects = self._expects(request)
        if self.stopping:
            raise _refused(503, "stopping", retry_after_s=1)
        if self._by_peer[peer] >= self._limits.requests_per_peer:
            raise _refused(429, "too_many_requests", retry_after_s=1)
        held = 0 if kind == "blob" else length
        if self._bodies_bytes + held > self._limits.bodies_bytes_max:
            raise _refused(503, "busy", retry_after_s=1)
        self._service.admit(peer, kind, length)
        self._by_peer[peer] += 1
        self._bodies_bytes += held
        try:
            if expects and length:
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # an answer may still replace this one
            reader = BodyReader(request, length, self._limits)
            if piece is not None:
                answer = await self._service.blob(peer, piece, reader)
                if reader.left and answer.status == 200:
                    # Nothing of it was wanted. A client sends on after a 200, but stops at a 409.
                    return answer._replace(status=409)
                return answer
            body = await reader.whole()
            if kind == "push":
                return await self._service.push(peer, body)
            if kind == "match":
                return await self._service.match(peer, body)
            return await self._service.hello(peer, body)
        finally:
            self._bodies_bytes -= held
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]

    def _peer(self, request: web.BaseRequest) -> str:
        given = request.headers.getall(hdrs.AUTHORIZATION, [])
        if len(given) == 1:
            peer = self.tokens.peer_of(given[0])
            if peer is not None:
                return peer
        elif not given and self._own_name is not None and request.transport is not None:
            connection = request.transport.get_extra_info("socket")
            if unix_user(connection) == os.geteuid():
                return self._own_name
        raise _refused(401, "unauthorized")

    def _length(self, request: web.BaseRequest, kind: RequestKind) -> int:
        headers = request.headers
        if hdrs.TRANSFER_ENCODING in headers:
            raise _refused(411, "length_required", "chunked bodies are not taken")
        given = headers.getall(hdrs.CONTENT_LENGTH, [])
        if not given:
            raise _refused(411, "length_required")
        if len(given) != 1 or not _NUMBER.match(given[0]):
            raise _refused(400, "bad_request", "exactly one Content-Length, a plain number")
        if headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
            raise _refused(415, "encoding_unsupported", "no Content-Encoding")
        length = int(given[0])
        if kind != "blob":
            limit = self._limits.push_bytes_max if kind == "push" else SMALL_BODY_BYTES_MAX
            if length > limit:
                raise _refused(413, "too_large", f"{length} bytes, {limit} are allowed")
        return length

    @staticmethod
    def _expects(request: web.BaseRequest) -> bool:
        expect = request.headers.get(hdrs.EXPECT)
        if expect is None:
            return False
        if expect.lower() != "100-continue":
            raise _refused(417, "expectation_failed")
        return True


def _refused(status: int, code: str, why: str = "", retry_after_s: int | None = None) -> Refused:
    return Refused(status, code, TITLES[code], why, retry_after_s)


def _route(request: web.BaseRequest) -> tuple[RequestKind, BlobPiece | None]:
    path = request.raw_path
    kind = _POSTS.get(path)
    if kind is not None:
        if request.method != hdrs.METH_POST:
            raise _refused(405, "method_not_allowed")
        return kind, None
    match = _BLOB_PATH.match(path)
    if match is None:
        raise _refused(404, "not_found")
    if request.method != hdrs.METH_PUT:
        raise _refused(405, "method_not_allowed")
    spool_id, frame_id, offset, size = match.groups()
    piece = BlobPiece(bytes.fromhex(spool_id), bytes.fromhex(frame_id), int(offset), 0, int(size))
    return "blob", piece
