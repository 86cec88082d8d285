"""The control socket: who asks, whether they may, and an answer in time.

MessagePack-RPC on a Unix socket (core/rpc.py). The first call is `hello`. Who calls is what the
kernel says (SO_PEERCRED, SO_PEERGROUPS), never what the caller says:

    root, and the owner of the spool    everything
    group droprd-monitor                hello, status, why, health, list_peers
    anybody else                        nothing

Every call gets exactly one answer: its result, its error, or `timeout` at its deadline. Callers
cannot hold up the angel: what they send is bounded, what they do not read is bounded, and they are
cut off when they say no hello. What a call does is in commands.py.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import pwd
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from droprd import logs
from droprd.angel import sockets
from droprd.angel.loop import Loop, Timer
from droprd.angel.stream import Stream
from droprd.core import rpc
from droprd.errors import DroprdError, NotPermitted

log = logging.getLogger("droprd.angel")

CONNECTIONS_MAX = 64
HELLO_WITHIN_S = 5.0
ACCEPT_AGAIN_S = 1.0
CALLS_MAX = 16  # of one connection at a time
_SO_PEERGROUPS = 59  # <asm-generic/socket.h>; Python has no name for it
_GROUPS_BYTES_MAX = 1024  # what Python takes: 256 groups; who is in more is taken for in none


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end, as the kernel knows it."""

    pid: int
    uid: int
    may_change: bool
    may_read: bool

    @property
    def name(self) -> str:
        """The user's name, or its number where it has none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return f"uid {self.uid}"


class Call:
    """One call that waits for its answer."""

    def __init__(self, params: rpc.Params, caller: Caller, send: Callable[[Any], None]) -> None:
        self.params = params
        self.caller = caller
        self._send = send

    def answer(self, result: Any) -> None:
        """Answer with `result`. Later answers are ignored."""
        self._send(result)

    def fail(self, error: DroprdError | rpc.RpcError) -> None:
        """Answer with an error."""
        self._send(error if isinstance(error, rpc.RpcError) else rpc.RpcError.of(error))

    def pass_on(self, response: rpc.Response) -> None:
        """Answer with what a worker answered."""
        self._send(response.result if response.error is None else response.error)


@dataclass(frozen=True, slots=True)
class Method:
    """What a call does: it answers `call`, now or later."""

    do: Callable[[Call], None]
    changes: bool = True
    deadline_s: float = 5.0
    logs: bool = True  # who called it with what; else it logs for itself


class Control:
    """Accepts callers and serves their calls."""

    def __init__(
        self,
        loop: Loop,
        listening: socket.socket,
        owner_uid: int,
        methods: Mapping[str, Method],
    ) -> None:
        self._loop = loop
        self._listening = listening
        self._owner_uid = owner_uid
        self._methods = methods
        self._connections: set[_Connection] = set()
        self._listen()

    def _listen(self) -> None:
        if self._listening.fileno() >= 0:
            self._loop.watch(self._listening.fileno(), self._accept)

    @property
    def unsent(self) -> bool:
        """Whether some caller has not got all of its answer yet."""
        return any(connection.busy for connection in self._connections)

    def close(self) -> None:
        """Accept nobody any more, and hang up."""
        self._loop.forget(self._listening.fileno())
        self._listening.close()
        for connection in list(self._connections):
            connection.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it hung up again
        except OSError as error:
            # No descriptor is free: accepting again at once would only burn the processor.
            logs.event(log, logging.ERROR, "caller not accepted", why=error.strerror)
            self._loop.forget(self._listening.fileno())
            self._loop.later(ACCEPT_AGAIN_S, self._listen)
            return
        if len(self._connections) >= CONNECTIONS_MAX:
            sock.close()
            return
        caller = identify(sock, self._owner_uid)
        connection = _Connection(self._loop, sock, caller, self._methods, self._connections.discard)
        self._connections.add(connection)


def identify(sock: socket.socket, owner_uid: int) -> Caller:
    """Who is at the other end of `sock`."""
    pid, uid, gid = sockets.peer_credentials(sock)
    may_change = uid in (0, owner_uid, os.geteuid())
    monitors = sockets.monitor_gid()
    may_read = may_change or (monitors is not None and monitors in {gid, *_groups(sock)})
    return Caller(pid, uid, may_change, may_read)


def _groups(sock: socket.socket) -> list[int]:
    groups = array.array("I")
    with contextlib.suppress(OSError, struct.error):
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES_MAX))
    return list(groups)


class _Connection:
    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        caller: Caller,
        methods: Mapping[str, Method],
        gone: Callable[[_Connection], None],
    ) -> None:
        self._loop = loop
        self._caller = caller
        self._methods = methods
        self._gone = gone
        self._greeted = False
        self._calls: dict[int, Timer] = {}
        self._stream = Stream(loop, sock, rpc.Decoder(), self._received, self._closed)
        self._hello_timer = loop.later(HELLO_WITHIN_S, self.close)

    @property
    def busy(self) -> bool:
        return bool(self._calls) or self._stream.unsent

    def close(self) -> None:
        self._stream.close()
        self._closed("")

    def _closed(self, reason: str) -> None:
        self._hello_timer.cancel()
        for timer in self._calls.values():
            timer.cancel()
        self._calls.clear()
        self._gone(self)

    def _received(self, message: rpc.Message) -> None:
        if not isinstance(message, rpc.Request) or message.id in self._calls:
            self.close()
            return
        try:
            method = self._allowed(message.method)
        except DroprdError as error:
            self._stream.send(rpc.Response(message.id, rpc.RpcError.of(error)))
            return
        self._serve(message, method)

    def _allowed(self, name: str) -> Method:
        method = self._methods.get(name)
        if not self._caller.may_read:
            raise NotPermitted(
                f"user {self._caller.name} may not talk to this daemon",
                why=f"neither root, nor the owner of the spool, nor in {sockets.MONITOR_GROUP}",
                hint="use sudo, or join that group to read",
            )
        if not self._greeted and name != "hello":
            raise DroprdError(
                f"{name} came before hello", hint="call hello first", code="hello_first"
            )
        if method is None:
            raise DroprdError(
                f"there is no call {name!r}",
                why="this daemon does not know it",
                hint="droprctl and daemon should be of one version",
                code="unknown_method",
            )
        if method.changes and not self._caller.may_change:
            raise NotPermitted(
                f"user {self._caller.name} may not {name}",
                why="only root and the owner of the spool may change something",
                hint="use sudo",
            )
        if len(self._calls) >= CALLS_MAX:
            raise DroprdError("too many calls at a time", code="too_many_calls")
        return method

    def _serve(self, request: rpc.Request, method: Method) -> None:
        if request.method == "hello":
            self._greeted = True
            self._hello_timer.cancel()

        def send(result: Any) -> None:
            timer = self._calls.pop(request.id, None)
            if timer is None:
                return
            timer.cancel()
            if isinstance(result, rpc.RpcError):
                self._stream.send(rpc.Response(request.id, result))
            else:
                self._stream.send(rpc.Response(request.id, None, result))

        def too_late() -> None:
            send(
                rpc.RpcError(
                    "timeout",
                    f"{request.method} was not done within {method.deadline_s:g} s",
                    "the daemon still waits for it",
                    "see `droprctl status`",
                )
            )

        if method.changes and method.logs:
            logs.event(
                log,
                logging.INFO,
                "command",
                command=request.method,
                user=self._caller.name,
                **{f"for_{key}": value for key, value in request.params.items()},
            )
        self._calls[request.id] = self._loop.later(method.deadline_s, too_late)
        call = Call(request.params, self._caller, send)
        try:
            method.do(call)
        except DroprdError as error:
            call.fail(error)
