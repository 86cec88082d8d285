"""Another configuration for a running daemon: all of it, or none, and only what changed.

The configuration child reads it; what it refuses, or what cannot change while the daemon runs, is
reported and the old configuration stays whole. Sockets are opened before anything is given up.
Workers are told (`reload` {settings, changed}) even if no setting changed: a token file may have.
One that does not know `reload`, or fails in it, is replaced gracefully.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from droprd import logs
from droprd.angel import sockets
from droprd.angel.configuration import read_settings
from droprd.angel.loop import Loop
from droprd.angel.process import Worker
from droprd.core import rpc
from droprd.core.restart import State
from droprd.errors import ConfigError, DroprdError
from droprd.settings.values import Settings

log = logging.getLogger("droprd.angel")

Reloaded = Callable[[dict[str, Any] | DroprdError], None]


class Reloadable(Protocol):
    """What gets another configuration: the angel."""

    loop: Loop
    state: str
    settings: Settings
    listening: list[sockets.Listening]
    workers: dict[str, Worker]

    def renew(self, settings: Settings, listening: list[sockets.Listening]) -> None:
        """Work by other settings and listen elsewhere from now on."""
        ...


class Reloading:
    """Those who asked for a reload, served one after another."""

    def __init__(self, angel: Reloadable) -> None:
        self._angel = angel
        self._asked: deque[Reloaded] = deque()

    def ask(self, done: Reloaded) -> None:
        """Reload; `done` gets what changed, or why all stays as it was."""
        self._asked.append(done)
        if len(self._asked) == 1:
            self._read()

    def _read(self) -> None:
        read_settings(self._angel.loop, self._angel.settings.config_file, self._have_read)

    def _have_read(self, answer: Settings | ConfigError) -> None:
        try:
            if isinstance(answer, ConfigError):
                raise answer
            result: dict[str, Any] | DroprdError = self._apply(answer)
        except DroprdError as error:
            logs.event(
                log, logging.ERROR, "reload refused, the old configuration stays", why=str(error)
            )
            result = error
        # Whoever asked while the child ran is served by a run of its own: the child may have read
        # the files before that caller changed them.
        self._asked.popleft()(result)
        if self._asked:
            self._read()

    def _apply(self, new: Settings) -> dict[str, Any]:
        angel, old = self._angel, self._angel.settings
        if angel.state == "stopping":
            raise DroprdError("the daemon is stopping", code="stopping")
        _check_fixed(old, new)
        before, after = old.to_dict(), new.to_dict()
        changed = sorted(key for key in after if after[key] != before.get(key))
        opened = sockets.open_missing(new.receiver.listen, angel.listening)
        kept: list[sockets.Listening] = []
        dropped: list[sockets.Listening] = []
        for one in angel.listening:
            stays = one.local or not one.wanted or one.wanted in new.receiver.listen
            (kept if stays else dropped).append(one)
        angel.renew(new, [*kept, *opened])
        for one in dropped:
            one.sock.close()
        logs.event(log, logging.INFO, "reloaded", changed=",".join(changed) or "nothing")
        for name, worker in angel.workers.items():
            if worker.state in (State.FATAL, State.BACKOFF):
                worker.start()
            elif name == "receiver" and (opened or dropped):
                worker.recycle("it has to listen elsewhere")
            else:
                self._tell(worker, {"settings": after, "changed": changed})
        return {"changed": changed}

    def _tell(self, worker: Worker, params: Mapping[str, Any]) -> None:
        def answered(response: rpc.Response) -> None:
            if response.error is not None and response.error.code != "worker_away":
                worker.recycle(f"reload: {response.error.what}")

        worker.call("reload", params, self._angel.settings.daemon.hang_timeout_s, answered)


def _check_fixed(old: Settings, new: Settings) -> None:
    fixed = [
        name
        for name, before, after in (
            ("node.name", old.node.name, new.node.name),
            ("node.spool", old.node.spool, new.node.spool),
            ("control.socket", old.control.socket, new.control.socket),
            ("inbox.store", old.inbox.store, new.inbox.store),
        )
        if before != after
    ]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} cannot change while the daemon runs",
            hint="restart the daemon",
            code="restart_needed",
        )
