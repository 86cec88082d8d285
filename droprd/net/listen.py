"""The HTTP server of the receiver, on sockets that already listen.

Owns the connections: accepts them, counts them per address, closes what is too many or too slow,
and stops in order. The listening sockets stay the caller's: a new receiver goes on with them, so
that a restart refuses no connection. What a request means is decided in `intake`.

Guarantees: before it knows who asks, a connection costs one protocol object, no body is read and
nothing is written to disk; a head must be complete within `header_timeout_s`, a TLS handshake too.
Plain HTTP listens on loopback and Unix sockets only, unless allowed.

Raises `ConfigError` for a socket on which it may not listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Sequence

from aiohttp import web

from droprd.errors import ConfigError
from droprd.model import MIB
from droprd.net.credentials import Tokens
from droprd.net.intake import TITLES, Intake, Limits
from droprd.net.service import Refused, Service

log = logging.getLogger("droprd.net")

_LINGER_S = 2.0
"""So long the rest of a refused body is read and dropped, for the peer to see the answer."""
_PAUSE_S = 0.2
_ACCEPT_ERRORS_S = 60.0


class _Connection(web.RequestHandler):
    """One connection; answers what is no HTTP in our words."""

    __slots__ = ("_intake",)

    def __init__(self, server: _Server, limits: Limits, intake: Intake) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=limits.header_timeout_s,
            access_log=None,  # type: ignore[arg-type]  # None is how aiohttp turns it off
            logger=log,
            lingering_time=_LINGER_S,
            read_bufsize=MIB,
            auto_decompress=False,
            max_headers=32,
            max_line_size=1024,
            max_field_size=2048,
        )
        self._intake = intake

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Called by aiohttp for what is no HTTP (400), and for an error in our own code (500)."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        if status == 500:
            log.error("a request failed", exc_info=exc)
            return self._intake.refuse(Refused(500, "failed", TITLES["failed"]))
        return self._intake.refuse(Refused(status, "bad_request", TITLES["bad_request"]))


class _Server(web.Server):
    """aiohttp's list of connections, which tells the listener when one ends."""

    def __init__(self, listener: Listener, intake: Intake) -> None:
        super().__init__(intake.handle)
        self._listener = listener

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self._listener.forget(handler)


class Listener:
    """Serves a `Service` over HTTP."""

    def __init__(
        self,
        service: Service,
        tokens: Tokens,
        limits: Limits | None = None,
        *,
        own_name: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        allow_plain_http: bool = False,
    ) -> None:
        """Prepare; call `start` on the running event loop.

        Args:
            own_name: the peer that a process of this user is on a Unix socket, without a token.
            ssl_context: TLS for all sockets but Unix ones.
            allow_plain_http: without TLS, listen on more than loopback.
        """
        self.limits = limits or Limits()
        self.intake = Intake(service, tokens, self.limits, own_name)
        self._ssl = ssl_context
        self._allow_plain_http = allow_plain_http
        self._server: _Server | None = None
        self._accepting: list[asyncio.Task[None]] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._addresses: dict[web.RequestHandler, str] = {}
        self._per_address: Counter[str] = Counter()

    @property
    def refused(self) -> dict[str, int]:
        """How many requests and connections were refused since the start, by code."""
        return dict(self.intake.refused)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._addresses)

    @property
    def accepting(self) -> bool:
        """Whether every socket is still being listened on."""
        return bool(self._accepting) and not any(task.done() for task in self._accepting)

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accept on `sockets`, which listen already and stay the caller's. Raises: ConfigError."""
        for listening in sockets:
            self._check(listening)
        self._server = _Server(self, self.intake)
        for listening in sockets:
            listening.setblocking(False)
            self._accepting.append(asyncio.create_task(self._accept(listening)))

    async def stop(self, timeout_s: float) -> bool:
        """Accept no more, let requests in flight end, close everything.

        Idle connections close at once; bodies still on their way may arrive. After `timeout_s`
        what is left is broken off. Returns whether all requests ended by themselves.
        """
        self.intake.stopping = True
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        self._accepting.clear()
        server = self._server
        if server is None:
            return True
        # Requests that have arrived whole get into the handler first. One whose head is on its way
        # is closed like an idle connection: its peer gets no answer and repeats the request.
        for _ in range(3):
            await asyncio.sleep(0)
        for connection in server.connections:
            if connection not in self.intake.busy:
                connection.force_close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.intake.idle()
        all_ended = self.intake.in_flight == 0
        for task in self._opening:
            task.cancel()
        # What has ended may still be writing its answer; the rest had its time.
        await server.shutdown(1.0 if all_ended else 0.1)
        return all_ended

    def forget(self, connection: web.RequestHandler) -> None:
        """A connection has ended, or never came to be."""
        address = self._addresses.pop(connection, None)
        if address is not None:
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        last_told = -_ACCEPT_ERRORS_S
        while True:
            try:
                accepted, remote = await loop.sock_accept(listening)
            except ConnectionError:
                continue  # gone before it was accepted
            except OSError as error:
                # No descriptors or no memory: waiting is all that helps, spinning makes it worse.
                if loop.time() - last_told >= _ACCEPT_ERRORS_S:
                    last_told = loop.time()
                    log.error("cannot accept connections: %s", error)
                await asyncio.sleep(_PAUSE_S)
                continue
            address = _address_of(remote)
            if len(self._addresses) >= self.limits.connections_max:
                self.intake.refused["connections_max"] += 1
                accepted.close()
            elif self._per_address[address] >= self.limits.connections_per_address:
                self.intake.refused["connections_per_address"] += 1
                accepted.close()
            else:
                assert self._server is not None
                connection = _Connection(self._server, self.limits, self.intake)
                self._addresses[connection] = address
                self._per_address[address] += 1
                task = asyncio.create_task(self._open(accepted, connection))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
            # sock_accept does not give way while connections wait: a flood must not hold the loop.
            await asyncio.sleep(0)

    async def _open(self, accepted: socket.socket, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        tls = None if accepted.family == socket.AF_UNIX else self._ssl
        try:
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=tls,
                ssl_handshake_timeout=self.limits.header_timeout_s if tls else None,
            )
        except (OSError, ssl.SSLError):
            self.intake.refused["handshake"] += 1
            self.forget(connection)
            accepted.close()
        except asyncio.CancelledError:
            self.forget(connection)
            accepted.close()
            raise

    def _check(self, listening: socket.socket) -> None:
        if listening.family == socket.AF_UNIX or self._ssl is not None or self._allow_plain_http:
            return
        host = str(listening.getsockname()[0])
        address = ipaddress.ip_address(host.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        if not (mapped or address).is_loopback:
            raise ConfigError(
                f"refusing to listen on {host} without TLS",
                why="tokens and messages would travel in the clear",
                hint="listen on 127.0.0.1 behind a TLS proxy, or set "
                "receiver.allow_plain_http = true",
            )


def _address_of(remote: object) -> str:
    """What counts as one address: an IPv6 network of 64 bits belongs to one host."""
    if not isinstance(remote, tuple):
        return "unix"
    host = str(remote[0])
    if ":" not in host:
        return host
    address = ipaddress.IPv6Address(host.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))
