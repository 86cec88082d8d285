"""The angel: keeps three workers running, and knows what node they work for. Never does the work.

It owns the listening sockets, state/public and state/pauses, and the workers' processes. It reads
nothing from the network and no message. Life: `start` (raises what makes a start impossible) →
turns of the loop until `done` → `close`.

If it is killed, its workers see the end of their links and leave; the listening sockets are gone
with it, so that peers try again later; all state is in files. The next angel waits for the old
workers (succession.py) and goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from droprd import logs
from droprd.angel import sockets
from droprd.angel.aside import Aside, Done
from droprd.angel.control import Control, Method
from droprd.angel.loop import Loop
from droprd.angel.notify import Notifier
from droprd.angel.process import Worker
from droprd.angel.reloading import Reloaded, Reloading
from droprd.core import rpc
from droprd.core.health import Health, judge
from droprd.core.restart import State
from droprd.core.status import status_document
from droprd.errors import DroprdError
from droprd.model import Clock
from droprd.settings.published import public_map
from droprd.settings.values import DaemonSettings, Settings
from droprd.spool import state
from droprd.spool.daemonlock import DaemonLock
from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout

log = logging.getLogger("droprd.angel")

MODULES: Mapping[str, str] = {
    "sender": "droprd.workers.sender",
    "receiver": "droprd.workers.receiver",
    "janitor": "droprd.workers.janitor",
}
TICK_S = 1.0
STATUS_LINE_S = 5.0
FRESH_S = 1.5  # heard within this time, gauges are as good as of now
TELL_DEADLINE_S = 3.0


class Angel:
    """One node's master process."""

    def __init__(
        self,
        *,
        loop: Loop,
        fs: Fs,
        clock: Clock,
        settings: Settings,
        version: str,
        spool_id: bytes,
        lock: DaemonLock,
        notifier: Notifier,
        inherited: Iterable[sockets.Listening],
        modules: Mapping[str, str] = MODULES,
        problems: Iterable[str] = (),
    ) -> None:
        self.loop = loop
        self.fs = fs
        self.clock = clock
        self.settings = settings
        self.version = version
        self.layout = Layout(settings.node.spool)
        self.state = "starting"
        self.workers = {name: Worker(loop, name, module, self) for name, module in modules.items()}
        self.wishes = state.Wishes()
        self.listening = list(inherited)
        self._spool_id = spool_id
        self._lock = lock
        self._notifier = notifier
        self._problems = list(problems)
        self._aside = Aside(loop, {lock.fd})
        self._control: Control | None = None
        self._disk_bytes = 0
        self._published = b""
        self._started = loop.now()
        self._ticked = loop.now()
        self._overdue = False
        self._reloading = Reloading(self)

    # -- life ------------------------------------------------------------------------------------

    def start(self, methods: Mapping[str, Method]) -> None:
        """Open what is to be opened and start the workers. Raises: DroprdError, OSError."""
        control = self.settings.control.socket
        listening = sockets.open_control(control)
        owner_uid = os.stat(self.layout.root).st_uid
        self._control = Control(self.loop, listening, owner_uid, methods)
        wanted = self.settings.receiver.listen
        self.listening += sockets.open_missing(wanted, self.listening)
        if "receiver" in self.workers:
            self.listening.append(sockets.open_local(control))
        self.wishes = state.read_wishes(self.fs, self.layout).current(self.clock)
        self._disk_bytes = self.fs.free_bytes(self.layout.root)[1]
        values = self._public_values()
        state.write_public(self.fs, self.layout, values)
        self._published = state.pack(values)
        for worker in self.workers.values():
            worker.start()
        self.loop.every(TICK_S, self._tick)
        self.loop.every(STATUS_LINE_S, self._status_line)
        if self._notifier.watchdog_s:
            interval_s = self._notifier.watchdog_s / 3
            self.loop.every(interval_s, lambda: self._notifier.send(WATCHDOG=1))
        logs.event(
            log,
            logging.INFO,
            "daemon starts",
            node=self.settings.node.name,
            version=self.version,
            pid=os.getpid(),
            spool=self.layout.root,
            listen=",".join(self.addresses) or None,
        )

    def stop(self, why: str) -> None:
        """Stop all workers, each in its own time, and be `done` within stop_timeout_s."""
        if self.state == "stopping":
            return
        self.state = "stopping"
        timeout_s = self.settings.daemon.stop_timeout_s
        logs.event(log, logging.INFO, "daemon stops", why=why)
        self._notifier.send(STOPPING=1, EXTEND_TIMEOUT_USEC=round((timeout_s + 5) * 1e6))
        for one in self.listening:
            one.sock.close()
        for worker in self.workers.values():
            worker.stop()

        def overdue() -> None:
            self._overdue = True

        self.loop.later(max(timeout_s - 0.5, timeout_s / 2), overdue)

    @property
    def done(self) -> bool:
        """Whether nothing is left to wait for after `stop`."""
        if self.state != "stopping":
            return False
        if self._overdue:
            return True
        waits = self._aside.busy or (self._control is not None and self._control.unsent)
        return not waits and not any(worker.alive for worker in self.workers.values())

    def close(self) -> int:
        """Give up the sockets; the exit status: 1 if a process had to be left behind."""
        if self._control is not None:
            self._control.close()
            with contextlib.suppress(OSError):
                os.unlink(self.settings.control.socket)
        for one in self.listening:
            one.sock.close()
            if one.local:
                with contextlib.suppress(OSError):
                    os.unlink(one.address.removeprefix("unix:"))
        left = {worker.name: worker.pid for worker in self.workers.values() if worker.alive}
        if self._aside.busy:
            left["writer"] = self._aside.pid
        for name, pid in left.items():
            logs.event(log, logging.CRITICAL, "process left behind", name=name, pid=pid)
        logs.event(log, logging.INFO, "daemon ends")
        return 1 if left else 0

    # -- what workers need (Boss) ----------------------------------------------------------------

    @property
    def daemon_settings(self) -> DaemonSettings:
        return self.settings.daemon

    def configuration(self, worker: str) -> dict[str, Any]:
        """The parameters of `configure`."""
        mine = self.listening if worker == "receiver" else []
        local = [one.address.removeprefix("unix:") for one in self.listening if one.local]
        return {
            "settings": self.settings.to_dict(),
            "generation": self.workers[worker].generation,
            "facts": {
                "node": self.settings.node.name,
                "spool_id": self._spool_id,
                "version": self.version,
                "paused": self.wishes.paused(),
                "draining": sorted(self.wishes.drains),
                "local_socket": local[0] if local else "",
                "listeners": [
                    {"fd": one.sock.fileno(), "address": one.address, "local": one.local}
                    for one in mine
                ],
            },
        }

    def descriptors(self, worker: str) -> tuple[list[int], int]:
        """(listening sockets, lock) that the worker inherits."""
        mine = self.listening if worker == "receiver" else []
        return [one.sock.fileno() for one in mine], self._lock.fd

    def changed(self, worker: Worker) -> None:
        """A worker is in another state or told new gauges."""
        if self.state == "starting" and not any(
            one.state is State.STARTING for one in self.workers.values()
        ):
            self.state = "running"
            self._notifier.send(READY=1)
            logs.event(log, logging.INFO, "daemon runs", node=self.settings.node.name)
            self._status_line()
        self._publish()

    # -- what is so ------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[str]:
        """Where the receiver listens for other nodes."""
        return [one.address for one in self.listening if not one.local]

    def status(self) -> dict[str, Any]:
        """The status document."""
        now = self.loop.now()
        heard = [w.heard_at for w in self.workers.values() if w.state is State.RUNNING]
        age_s = max((now - at for at in heard), default=0.0)
        wall_ns = self.clock.wall_ns()
        janitor = self.gauges_of("janitor")
        document = status_document(
            node=self.settings.node.name,
            version=self.version,
            state=self.state,
            uptime_s=now - self._started,
            as_of_ns=wall_ns if age_s < FRESH_S else wall_ns - int(age_s * 1e9),
            workers={name: worker.describe() for name, worker in self.workers.items()},
            gauges={name: worker.gauges for name, worker in self.workers.items()},
            peers=self.settings.peers,
            channels=self.settings.channels,
            paused=self.wishes.paused(),
            draining=self.wishes.drains,
            listen=self.addresses,
            problems=self._problems,
        )
        if isinstance(janitor.get("full_in_s"), (int, float)):
            document["spool"]["full_in_s"] = janitor["full_in_s"]
        return document

    def health(self) -> Health:
        """The judgement of `status`."""
        return judge(self.status(), self.settings.health)

    # -- what operators ask for ------------------------------------------------------------------

    def change_wishes(self, change: Callable[[state.Wishes], state.Wishes], done: Done) -> None:
        """Put another set of pauses and drains on disk; then it counts, and `done` is called."""
        wishes = change(self.wishes.current(self.clock))
        before, self.wishes = self.wishes, wishes
        public = self._public_values()
        fs, layout = self.fs, self.layout

        def write() -> None:
            state.write_wishes(fs, layout, wishes)
            # If we stop here: the next start publishes what the file says.
            state.write_public(fs, layout, public)

        def written(error: DroprdError | None) -> None:
            if error is None:
                self._published = state.pack(public)
            elif self.wishes is wishes:
                self.wishes = before
            done(error)

        self._aside.do(write, written)

    def tell(
        self, method: str, params: Mapping[str, Any], done: Callable[[dict[str, Any]], None]
    ) -> None:
        """Ask every running worker; `done` gets {worker: result} of those that know `method`."""
        asked = [w for w in self.workers.values() if w.state in (State.RUNNING, State.STARTING)]
        results: dict[str, Any] = {}
        waiting = len(asked)
        if not asked:
            done(results)

        def answered(name: str, response: rpc.Response) -> None:
            nonlocal waiting
            waiting -= 1
            if response.error is None:
                results[name] = response.result
            elif response.error.code != "unknown_method":
                why = response.error.what
                logs.event(log, logging.WARNING, f"{method} failed", worker=name, why=why)
                results[name] = None
            if waiting == 0:
                done(results)

        for worker in asked:
            worker.call(method, params, TELL_DEADLINE_S, partial(answered, worker.name))

    def reload(self, done: Reloaded) -> None:
        """Read the configuration again; `done` gets what changed, or why all stays as it was."""
        self._reloading.ask(done)

    def renew(self, settings: Settings, listening: list[sockets.Listening]) -> None:
        """Work by other settings and listen elsewhere from now on."""
        self.settings, self.listening = settings, listening
        logs.set_up("angel", level=settings.log.level, form=settings.log.format)
        self._publish()

    # -- now and then ----------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self.loop.now()
        paused_s = max(0.0, now - self._ticked - TICK_S)
        self._ticked = now
        for worker in self.workers.values():
            worker.tick(paused_s if paused_s > TICK_S else 0.0)
        if any(pause.over(self.clock) for pause in self.wishes.pauses.values()):
            over = [t for t, pause in self.wishes.pauses.items() if pause.over(self.clock)]
            logs.event(log, logging.INFO, "pause is over", targets=",".join(over) or "node")
            self.change_wishes(
                lambda wishes: wishes,
                lambda error: self.tell_wishes("resume", over[0], lambda _: None),
            )

    def tell_wishes(self, method: str, target: str, done: Callable[[dict[str, Any]], None]) -> None:
        """Tell the workers of a `pause`, `resume` or `drain`, and all that are in force now."""
        params = {
            "target": target,
            "paused": self.wishes.paused(),
            "draining": sorted(self.wishes.drains),
        }
        self.tell(method, params, done)

    def _status_line(self) -> None:
        status = self.status()
        queued = sum(peer["queued"] for peer in status["peers"].values())
        peers = len(status["peers"])
        health = judge(status, self.settings.health)
        self._notifier.status(f"{self.state}: {peers} peers, {queued} queued; {health.summary()}")

    def _public_values(self) -> dict[str, Any]:
        sender, receiver = (self.gauges_of(name) for name in ("sender", "receiver"))
        told = sender.get("peers")
        return public_map(
            self.settings,
            self._spool_id,
            disk_bytes=self._disk_bytes,
            paused=self.wishes.paused(),
            draining=self.wishes.drains,
            unconfigured=told if isinstance(told, dict) else (),
            outbox_full=_reason(sender.get("full")),
            inbox_full=_reason(receiver.get("full")),
        )

    def gauges_of(self, name: str) -> dict[str, Any]:
        """What worker `name` told last."""
        worker = self.workers.get(name)
        return worker.gauges if worker is not None else {}

    def _publish(self) -> None:
        values = self._public_values()
        packed = state.pack(values)
        if packed == self._published or self._disk_bytes == 0:
            return
        self._published = packed
        fs, layout = self.fs, self.layout

        def written(error: DroprdError | None) -> None:
            if error is not None:
                self._published = b""  # the next change, or the next gauges, try again
                logs.event(log, logging.ERROR, "state/public not written", why=error.why)

        self._aside.do(lambda: state.write_public(fs, layout, values), written)


def _reason(full: Any) -> str | None:
    """Why a box is full, as its worker told: a text, or just that it is."""
    if isinstance(full, str) and full:
        return full
    return "it is full" if full else None


def watch_signals(angel: Angel) -> None:
    """SIGTERM and SIGINT stop, SIGHUP reloads; as process 1, orphans are waited for."""
    loop = angel.loop
    loop.on_signal(signal.SIGTERM, lambda: angel.stop("SIGTERM"))
    loop.on_signal(signal.SIGINT, lambda: angel.stop("SIGINT"))
    loop.on_signal(signal.SIGHUP, lambda: angel.reload(lambda _: None))
    if os.getpid() == 1:
        loop.on_signal(signal.SIGCHLD, loop.reap_strangers)
        loop.every(TICK_S, loop.reap_strangers)
