"""What the three workers share: the way in, the link to the angel, and the way out.

A worker is `python -m droprd.workers.NAME --link FD …`, started by the angel. Its module calls

    worker.run("sender", serve)            # async def serve(context: Context) -> None

The shell reads the settings from the link, sets up signals and logging, calls `serve`, and exits
0 when it returns, 78 after a ConfigError (the angel then waits for another configuration), 1 after
any other error (the angel starts it again). `serve` calls

- `context.ready()` once, when it does its work;
- `context.beat()` whenever it got a step further, and at least each third of
  `daemon.hang_timeout_s` while idle or starting. It is cheap, and may be called inside a long
  blocking step. Without it the angel writes out the stacks and kills the process;
- `context.gauges(…)` when what it counts has changed (sent at most every half second, and kept
  in state/NAME for a stopped daemon, at most once a second);
- and returns soon after `context.stopping` is set: by the angel's `stop`, by SIGTERM, or because
  the angel is gone (end of file on the link, PR_SET_PDEATHSIG behind it).

A crash leaves state/NAME of a second ago, a hint only. The daemon's lock, inherited as a
descriptor, stays held until this process ends, so that no second daemon starts beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from droprd import logs
from droprd.core import rpc
from droprd.errors import BadData, ConfigError, DroprdError
from droprd.model import Clock
from droprd.settings.values import Settings
from droprd.spool import state
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import Fs, OsFs
from droprd.spool.layout import Layout

EXIT_CONFIG = 78
GAUGES_INTERVAL_S = 0.5
GAUGES_FILE_INTERVAL_S = 1.0
# Beats wait in the socket while the angel is stopped; more than this many bytes say nothing new.
UNSENT_BYTES_MAX = 256 * 1024
_PR_SET_PDEATHSIG = 1

Handler = Callable[[rpc.Params], Awaitable[Any]]
Serve = Callable[["Context"], Awaitable[None]]

log = logging.getLogger("droprd.worker")


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket that the angel opened. `local` is the one for this node's own sender."""

    fd: int
    address: str
    local: bool = False


class Context:
    """All that a worker is given, and all that it may tell. Of one process; not for threads.

    Attributes:
        name: sender, receiver or janitor.
        settings: replaced by the shell before the handler of `reload` is called.
        facts: what the angel knows of the node: node, spool_id, version, paused, draining,
            local_socket (path of the receiver's Unix socket for this node's own messages, or "").
        generation: which start of this worker this is, counted by the angel.
        listeners: the sockets to accept connections on (receiver only).
        stopping: set when the worker has to leave.
        fs, clock, urandom: the real ones.
    """

    def __init__(
        self,
        name: str,
        link: socket.socket,
        generation: int,
        settings: Settings,
        facts: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.settings = settings
        self.facts = dict(facts)
        self.generation = generation
        self.listeners = tuple(
            Listener(one["fd"], one["address"], bool(one.get("local", False)))
            for one in facts.get("listeners", ())
        )
        self.stopping = asyncio.Event()
        self.fs: Fs = OsFs()
        self.clock: Clock = SystemClock()
        self.urandom: Callable[[int], bytes] = os.urandom
        self._link = link
        self._out = bytearray()
        self._handlers: dict[str, Handler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = False
        self._progress = 0
        self._beat_interval_s = min(1.0, settings.daemon.hang_timeout_s / 10)
        self._beat_at = float("-inf")
        self._gauges: dict[str, Any] | None = None
        self._gauges_sent: bytes = b""
        self._gauges_kept: bytes = b""
        self._gauges_kept_at = float("-inf")
        self._gauges_at = float("-inf")

    @property
    def listen_fds(self) -> list[int]:
        """The descriptors of `listeners`."""
        return [one.fd for one in self.listeners]

    # -- what a worker tells ---------------------------------------------------------------------

    def ready(self) -> None:
        """Tell the angel that this worker does its work from now on."""
        self._notify("ready", {})

    def beat(self) -> None:
        """Tell the angel that there is progress; sent at most once a second."""
        self._progress += 1
        now = asyncio.get_running_loop().time()
        if now - self._beat_at >= self._beat_interval_s:
            self._beat_at = now
            self._notify("beat", {"progress": self._progress})

    def gauges(self, values: Mapping[str, Any]) -> None:
        """Tell what this worker counts now; replaces what was told before. Values fit msgpack."""
        self._gauges = dict(values)
        if asyncio.get_running_loop().time() - self._gauges_at >= GAUGES_INTERVAL_S:
            self._send_gauges()

    def on(self, command: str, handler: Handler) -> None:
        """Let `handler` answer the angel's `command`; its parameters are a map.

            pause, resume, drain    {target, paused: {target: …}, draining: [target …]}: what an
                                    operator did just now, and all that is in force then; `facts`
                                    has the last two already
            retry                   {peer}
            peer_reset              {peer, mode: "replay" | "continue"}
            reload                  {settings, changed: [section …]}; `settings` is renewed already

        What it returns is the result; a DroprdError it raises is the answer's error. Without a
        handler for `reload` the angel starts the worker afresh with the new settings.
        """
        self._handlers[command] = handler

    # -- the link --------------------------------------------------------------------------------

    def _notify(self, method: str, params: Mapping[str, Any]) -> None:
        if len(self._out) < UNSENT_BYTES_MAX:
            self._send(rpc.Notification(method, {**params, "generation": self.generation}))

    def _send(self, message: rpc.Message) -> None:
        waiting = bool(self._out)
        self._out += rpc.encode(message)
        if not waiting:
            self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            sent = self._link.send(self._out)
            del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            # The angel is gone; end of file on the link says so too.
            self._out.clear()
            self.stopping.set()
        if self._out:
            loop.add_writer(self._link, self._flush)
        else:
            loop.remove_writer(self._link)

    def _send_gauges(self) -> None:
        """Send and keep the gauges where they changed."""
        if self._gauges is None:
            return
        now = self._gauges_at = asyncio.get_running_loop().time()
        packed = state.pack(self._gauges)
        if packed != self._gauges_sent:
            self._gauges_sent = packed
            self._notify("gauges", {"gauges": self._gauges})
        if packed != self._gauges_kept and now - self._gauges_kept_at >= GAUGES_FILE_INTERVAL_S:
            self._keep_gauges(now)

    def _keep_gauges(self, now: float) -> None:
        self._gauges_kept, self._gauges_kept_at = self._gauges_sent, now
        try:
            state.write_hint(
                self.fs, Layout(self.settings.node.spool).gauges(self.name), self._gauges_kept
            )
        except OSError as error:
            logs.event(log, logging.WARNING, "gauges not kept", why=error.strerror)

    def _received(self, message: rpc.Message) -> None:
        if not isinstance(message, rpc.Request):
            return
        if message.method == "stop":
            self.stopping.set()
            self._send(rpc.Response(message.id, None, {}))
            return
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: rpc.Request) -> None:
        try:
            if request.method == "reload":
                self.settings = Settings.from_dict(request.params["settings"])
                logs.set_up(self.name, level=self.settings.log.level, form=self.settings.log.format)
            self.facts.update(
                {k: v for k, v in request.params.items() if k in ("paused", "draining")}
            )
            handler = self._handlers.get(request.method)
            if handler is None:
                raise DroprdError(
                    f"the {self.name} knows no command {request.method!r}", code="unknown_method"
                )
            result = await handler(request.params)
        except DroprdError as error:
            self._send(rpc.Response(request.id, rpc.RpcError.of(error)))
        except Exception:
            # One bad command must not look like one that was obeyed, nor hang its caller; and a
            # worker that is in a state it does not understand must not go on.
            self._send(rpc.Response(request.id, rpc.RpcError("internal", "the command failed")))
            log.exception("command failed: %s", request.method)
            self._failed = True
            self.stopping.set()
        else:
            self._send(rpc.Response(request.id, None, result))

    async def _run(self, serve: Serve, decoder: rpc.Decoder, early: Sequence[rpc.Message]) -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        self._link.setblocking(False)

        def readable() -> None:
            try:
                data = self._link.recv(65536)
                for message in decoder.feed(data):
                    self._received(message)
            except BlockingIOError:
                return
            except (OSError, BadData):
                data = b""
            if not data:
                loop.remove_reader(self._link)
                self.stopping.set()

        async def gauges_in_time() -> None:
            while True:
                await asyncio.sleep(GAUGES_INTERVAL_S)
                self._send_gauges()

        self.beat()  # imports are over
        loop.add_reader(self._link, readable)
        for message in early:
            self._received(message)
        timer = loop.create_task(gauges_in_time())
        try:
            await serve(self)
        finally:
            timer.cancel()
            self._send_gauges()
            if self._gauges_kept != self._gauges_sent:
                self._keep_gauges(loop.time())
        return 1 if self._failed else 0


def run(name: str, serve: Serve, argv: Sequence[str] | None = None) -> NoReturn:
    """Be the worker `name`: never returns. The angel gives the arguments."""
    parser = argparse.ArgumentParser(prog=f"droprd-{name}")
    parser.add_argument("--link", type=int, required=True, help="socket to the angel")
    parser.add_argument("--listen", type=int, action="append", default=[], help="listening socket")
    parser.add_argument("--lock", type=int, help="descriptor that keeps the daemon's lock held")
    parser.add_argument("--generation", type=int, default=0)
    arguments = parser.parse_args(argv)

    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for fd in (arguments.link, arguments.lock, *arguments.listen):
        if fd is not None:
            os.set_inheritable(fd, False)
    link = socket.socket(fileno=arguments.link)
    _leave_with_the_angel(link)
    logs.set_up(name)
    decoder = rpc.Decoder(rpc.ANSWER_BYTES_MAX, items_max=1 << 16)
    configured, early = _configuration(link, decoder)
    try:
        settings = Settings.from_dict(configured.get("settings", {}))
        logs.set_up(name, level=settings.log.level, form=settings.log.format)

        async def main() -> int:
            facts = configured.get("facts", {})
            context = Context(name, link, arguments.generation, settings, facts)
            return await context._run(serve, decoder, early)

        code = asyncio.run(main())
    except DroprdError as error:
        logs.event(log, logging.ERROR, str(error), code=error.code)
        code = EXIT_CONFIG if isinstance(error, ConfigError) else 1
    sys.exit(code)


def _leave_with_the_angel(link: socket.socket) -> None:
    """Get SIGTERM when the angel dies, and leave now if it died before that was asked for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    if struct.unpack("3i", credentials)[0] != os.getppid():
        sys.exit(0)


def _configuration(
    link: socket.socket, decoder: rpc.Decoder
) -> tuple[rpc.Params, list[rpc.Message]]:
    """Wait for the angel's `configure`; what came behind it is returned as well."""
    while True:
        data = link.recv(65536)
        if not data:
            sys.exit(0)
        messages = list(decoder.feed(data))
        for index, message in enumerate(messages):
            if isinstance(message, rpc.Request) and message.method == "configure":
                link.sendall(rpc.encode(rpc.Response(message.id, None, {"pid": os.getpid()})))
                return message.params, messages[index + 1 :]
