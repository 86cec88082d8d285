"""One worker as the angel sees it: its process, its link, and where it stands in the restart table.

`core/restart.py` decides, `Worker` does: it starts the process, signals it through its pidfd,
hears its reports and counts its failures. Reports are gossip: those of another generation are
ignored, and none of them changes what the table says, except `ready`.

A worker's end is always seen (pidfd), also when it ends before it was asked to. Nothing here waits.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from droprd import logs
from droprd.angel.configuration import child_environment, deaf_to_interrupts, python_command
from droprd.angel.loop import Loop, Timer
from droprd.angel.stream import Stream
from droprd.core import restart, rpc
from droprd.core.counted import Counted
from droprd.core.restart import Action, Event, State
from droprd.model import MIB
from droprd.settings.values import DaemonSettings

log = logging.getLogger("droprd.angel")

# A killed process is gone within this time, or it is stuck in the kernel.
KILL_GRACE_S = 2.0
# Of stop_timeout_s, what is kept for killing and for the angel's own end.
STOP_RESERVE_S = 3.0
MEMORY_INTERVAL_S = 5.0

Answered = Callable[[rpc.Response], None]


class Boss(Protocol):
    """What a worker's process needs of the angel."""

    @property
    def daemon_settings(self) -> DaemonSettings: ...

    def configuration(self, worker: str) -> Mapping[str, Any]:
        """The parameters of `configure`."""
        ...

    def descriptors(self, worker: str) -> tuple[list[int], int]:
        """(listening sockets, lock) that the worker inherits."""
        ...

    def changed(self, worker: Worker) -> None:
        """The worker is in another state, or told something new."""
        ...


@dataclass(slots=True)
class _Call:
    answered: Answered
    timer: Timer


class Worker:
    """Attributes:
    name, module: which worker, and what is run.
    state: as in the restart table. wanted: whether it shall run.
    generation: counts its starts. pid: of its process, None without one.
    failures: failures in a row. restarts: starts but the first.
    gauges: what it told last; they outlive its process, and what it counts goes on.
    heard_at: when it spoke last (monotonic).
    stuck: it was killed and did not go.
    """

    def __init__(self, loop: Loop, name: str, module: str, boss: Boss) -> None:
        self.name = name
        self.module = module
        self.state = State.STOPPED
        self.wanted = False
        self.generation = 0
        self.failures = 0
        self.pid: int | None = None
        self.gauges: dict[str, Any] = {}
        self._counted = Counted()
        self.heard_at = 0.0
        self.stuck = False
        self._loop = loop
        self._boss = boss
        self._beat_at = 0.0
        self._since = loop.now()
        self._memory_at = 0.0
        self._pidfd = -1
        self._stream: Stream | None = None
        self._timer: Timer | None = None
        self._calls: dict[int, _Call] = {}
        self._next_id = 0

    @property
    def restarts(self) -> int:
        return max(0, self.generation - 1)

    @property
    def alive(self) -> bool:
        return self.state in restart.ALIVE

    def describe(self) -> dict[str, Any]:
        """Its part of the status document."""
        about: dict[str, Any] = {
            "state": self.state.value,
            "pid": self.pid,
            "restarts": self.restarts,
        }
        if self.failures:
            about["failures"] = self.failures
        if self.state is State.BACKOFF and self._timer is not None:
            about["next_start_s"] = round(max(0.0, self._timer.at - self._loop.now()), 3)
        if self.stuck:
            about["stuck"] = True
        if self.state in (State.STARTING, State.RUNNING):
            silent_s = self._loop.now() - self._beat_at
            hang_s = self._boss.daemon_settings.hang_timeout_s
            if silent_s >= hang_s / 2:
                about["silent_s"] = round(silent_s, 1)
                about["killed_in_s"] = round(max(0.0, hang_s - silent_s), 1)
        return about

    # -- what is wanted --------------------------------------------------------------------------

    def start(self) -> None:
        """It shall run."""
        self.wanted = True
        self.handle(Event.START)

    def stop(self) -> None:
        """It shall run no more."""
        self.wanted = False
        self.handle(Event.STOP)

    def recycle(self, why: str) -> None:
        """It shall be replaced by a fresh process, gracefully."""
        logs.event(log, logging.INFO, "worker recycled", worker=self.name, why=why)
        self.handle(Event.RECYCLE)

    def call(
        self, method: str, params: Mapping[str, Any], deadline_s: float, answered: Answered
    ) -> None:
        """Ask the worker; `answered` is called once, with an error if it is late."""
        self._next_id += 1
        id_ = self._next_id
        if self._stream is None:
            error = rpc.RpcError(
                "worker_away",
                f"the {self.name} is {self.state.value}",
                "it cannot be asked now",
                "see `droprctl status`, and try again",
            )
            answered(rpc.Response(id_, error))
            return

        def too_late() -> None:
            self._answer(
                rpc.Response(
                    id_,
                    rpc.RpcError(
                        "timeout",
                        f"the {self.name} did not answer within {deadline_s:g} s",
                        "it may still do what was asked",
                        "see `droprctl status`",
                    ),
                )
            )

        self._calls[id_] = _Call(answered, self._loop.later(deadline_s, too_late))
        self._stream.send(rpc.Request(id_, method, params))

    # -- what happens ----------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Let `event` happen: go to the next state and do what the table says."""
        before = self.state
        self.state, actions = restart.step(before, event)
        if self.state is not before:
            self._since = self._loop.now()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        for action in actions:
            self._do(action)
        if self.state is not before:
            self._log_state(before, event)
            self._boss.changed(self)

    def _log_state(self, before: State, event: Event) -> None:
        level = logging.INFO
        if self.state in (State.BACKOFF, State.FATAL) or event in (Event.HUNG, Event.KILLED):
            level = logging.WARNING
        logs.event(
            log,
            level,
            "worker state",
            worker=self.name,
            state=self.state.value,
            before=before.value,
            cause=event.name.lower(),
            pid=self.pid,
            generation=self.generation,
        )

    def _do(self, action: Action) -> None:
        daemon = self._boss.daemon_settings
        match action:
            case Action.SPAWN:
                self._spawn()
            case Action.ASK:
                if self._stream is not None:
                    self._next_id += 1
                    self._stream.send(rpc.Request(self._next_id, "stop"))
                self._signal(signal.SIGTERM)
                grace_s = max(daemon.stop_timeout_s - STOP_RESERVE_S, daemon.stop_timeout_s / 2)
                self._arm(grace_s, Event.GRACE_OVER)
            case Action.ABORT:
                self._signal(signal.SIGABRT)
                self._arm(restart.ABORT_GRACE_S, Event.GRACE_OVER)
            case Action.KILL:
                self._signal(signal.SIGKILL)
                self._timer = self._loop.later(KILL_GRACE_S, self._survived)
            case Action.DELAY:
                self.failures += 1
                delay_s = restart.backoff_s(self.failures, daemon.backoff_max_s)
                self._arm(delay_s, Event.DELAY_OVER)
            case Action.FORGIVE:
                if self.failures:
                    self.failures = 0
                    logs.event(log, logging.INFO, "worker stable", worker=self.name)
                    self._boss.changed(self)
            case Action.AGAIN:
                if self.wanted:
                    self._loop.later(0, self._again)

    def _again(self) -> None:
        if self.wanted:
            self.handle(Event.START)

    def _arm(self, delay_s: float, event: Event) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.later(delay_s, lambda: self.handle(event))

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            # If it has just ended by itself, its pidfd tells us next.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _survived(self) -> None:
        self._timer = None
        self.stuck = True
        status = "gone"
        if self.pid is not None:
            with contextlib.suppress(psutil.Error):
                status = psutil.Process(self.pid).status()
        logs.event(
            log,
            logging.CRITICAL,
            "worker stuck in the kernel, not replaced",
            worker=self.name,
            pid=self.pid,
            process=status,
        )
        self._boss.changed(self)

    # -- the process -----------------------------------------------------------------------------

    def _spawn(self) -> None:
        self.generation += 1
        try:
            child, ours = self._process()
        except OSError as error:
            logs.event(log, logging.ERROR, "worker not started", worker=self.name, why=str(error))
            self._loop.later(0, lambda: self.handle(Event.SPAWN_FAILED))
            return
        self.pid = child.pid
        self._beat_at = self._memory_at = self._loop.now()

        def ended(code: int) -> None:
            child.returncode = code  # so that Popen knows it was waited for
            self._ended(code)

        self._pidfd = self._loop.on_end(child.pid, ended)
        decoder = rpc.Decoder(rpc.ANSWER_BYTES_MAX, items_max=1 << 16)
        self._stream = Stream(self._loop, ours, decoder, self._received, self._link_closed)
        self._next_id += 1
        self._stream.send(
            rpc.Request(self._next_id, "configure", self._boss.configuration(self.name))
        )

    def _process(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """A new process and our end of its link. Raises: OSError; nothing is left open then."""
        listening, lock = self._boss.descriptors(self.name)
        ours, theirs = socket.socketpair()
        arguments = [
            *python_command(self.module),
            *("--link", str(theirs.fileno())),
            *("--lock", str(lock)),
            *("--generation", str(self.generation)),
            *(word for fd in listening for word in ("--listen", str(fd))),
        ]
        try:
            with deaf_to_interrupts():
                child = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    env=child_environment(),
                    pass_fds=[theirs.fileno(), lock, *listening],
                )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return child, ours

    def _link_closed(self, reason: str) -> None:
        # A worker without a link cannot be heard: it ends by itself, or beats no more.
        self._stream = None

    def _ended(self, code: int) -> None:
        if self._stream is not None:
            self._stream.drain()  # its last gauges
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._pidfd = -1
        pid, self.pid = self.pid, None
        self.stuck = False
        for id_ in list(self._calls):
            error = rpc.RpcError("worker_away", f"the {self.name} ended before it answered")
            self._answer(rpc.Response(id_, error))
        meant = self.state is State.STOPPING
        logs.event(
            log,
            logging.INFO if meant and code == 0 else logging.WARNING,
            "worker ended",
            worker=self.name,
            pid=pid,
            code=code if code >= 0 else None,
            signal=signal.Signals(-code).name if code < 0 else None,
        )
        self.handle(restart.event_of_end(code))

    def _received(self, message: rpc.Message) -> None:
        if isinstance(message, rpc.Response):
            self._answer(message)
            return
        if message.params.get("generation") != self.generation:
            return
        self.heard_at = self._loop.now()
        match message.method:
            case "beat":
                self._beat_at = self.heard_at
            case "ready":
                self._beat_at = self.heard_at
                self.handle(Event.READY)
            case "gauges":
                told = message.params.get("gauges")
                if isinstance(told, dict):
                    self.gauges = self._counted.told(self.generation, told)
                    self._boss.changed(self)

    def _answer(self, response: rpc.Response) -> None:
        call = self._calls.pop(response.id, None)
        if call is not None:
            call.timer.cancel()
            call.answered(response)

    # -- once a second ---------------------------------------------------------------------------

    def tick(self, paused_s: float) -> None:
        """Look whether it hangs, eats memory, or has become stable.

        `paused_s`: how long the angel itself did not run before this tick; beats that were not
        heard in that time are nobody's fault.
        """
        now = self._loop.now()
        self._beat_at += paused_s
        daemon = self._boss.daemon_settings
        if self.state not in (State.STARTING, State.RUNNING):
            return
        if now - self._beat_at >= daemon.hang_timeout_s:
            logs.event(
                log,
                logging.ERROR,
                "worker hangs",
                worker=self.name,
                pid=self.pid,
                silent_s=round(now - self._beat_at),
            )
            self.handle(Event.HUNG)
            return
        if self.state is not State.RUNNING:
            return
        if self.failures and now - self._since >= restart.STABLE_S:
            self.handle(Event.STABLE)
        if now - self._memory_at >= MEMORY_INTERVAL_S:
            self._memory_at = now
            self._look_at_memory(daemon.max_rss_mib)

    def _look_at_memory(self, max_rss_mib: int) -> None:
        try:
            rss = psutil.Process(self.pid).memory_info().rss
        except psutil.Error:
            return
        if max_rss_mib and rss > max_rss_mib * MIB:
            self.recycle(f"memory {rss // MIB} MiB over max_rss_mib {max_rss_mib}")
