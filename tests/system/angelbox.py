"""A real `droprd` process in a temporary directory, with small real workers in place of the three.

The workers are modules written into the directory and run by the angel like its own: they use the
shell of droprd.workers.worker, or are plain scripts where they misbehave on purpose.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from droprd.errors import NotAnswering
from droprd.net.control import Control
from droprd.spool.fsops import OsFs
from droprd.spool.layout import make_spool

WITHIN_S = 15.0

GOOD = """
    import asyncio
    from droprd.workers import worker

    async def serve(context):
        for command in ("pause", "resume", "drain", "retry", "reload"):
            context.on(command, remember(context, command))
        context.on("accept_clock", broken)
        context.gauges({"commands": []})
        context.ready()
        while not context.stopping.is_set():
            context.beat()
            try:
                await asyncio.wait_for(context.stopping.wait(), 0.1)
            except TimeoutError:
                pass

    commands = []

    async def broken(params):
        return params["nothing"]

    def remember(context, command):
        async def handler(params):
            commands.append([command, params])
            context.gauges({"problems": [f"{c} {sorted(p)}" for c, p in commands]})
            return {"done": command}
        return handler

    worker.run(NAME, serve)
"""

RUN = """
import json, sys
from droprd.angel.main import run
sys.exit(run(sys.argv[2:], json.loads(sys.argv[1])))
"""


def eventually(condition: Callable[[], Any], what: str, within_s: float = WITHIN_S) -> Any:
    """Wait until `condition` gives something true, and return that."""
    pause = threading.Event()
    end = time.monotonic() + within_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        pause.wait(0.02)


class AngelBox:
    """One node's directory, and the daemon that runs on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spool = path / "spool"
        self.log_file = path / "log"
        self.socket = path / "c.sock"
        self.modules_dir = path / "modules"
        self.modules_dir.mkdir()
        self.modules: dict[str, str] = {}
        self.settings: dict[str, dict[str, Any]] = {
            "daemon": {"hang_timeout_s": 30, "stop_timeout_s": 8, "backoff_max_s": 60}
        }
        self.environment = dict(os.environ)
        self.environment["PYTHONPATH"] = os.pathsep.join([str(self.modules_dir), *sys.path])
        self.process: subprocess.Popen[bytes] | None = None
        self.prefix: list[str] = []
        make_spool(OsFs(), str(self.spool), os.urandom)
        for name in ("sender", "receiver", "janitor"):
            self.worker(name, GOOD)

    def worker(self, name: str, code: str) -> None:
        """Let worker `name` run `code`, from its next start on."""
        module = f"angelbox_{name}"
        text = f"NAME = {name!r}\n{textwrap.dedent(code)}"
        (self.modules_dir / f"{module}.py").write_text(text)
        self.modules[name] = module

    def configure(self, section: str = "daemon", **values: Any) -> None:
        """Change settings in the configuration file."""
        self.settings.setdefault(section, {}).update(values)
        lines = []
        node = {"name": "hamburg", "spool": "spool"}
        for table, entries in {
            "node": node,
            "control": {"socket": "c.sock"},
            **self.settings,
        }.items():
            lines.append(f"[{table}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in entries.items()]
        (self.path / "droprd.toml").write_text("\n".join(lines))

    def start(self, *, ready: bool = True, pass_fds: tuple[int, ...] = (), **more: Any) -> None:
        """Start the daemon; with `ready` wait until it runs."""
        self.configure()
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.prefix,
                    *(sys.executable, "-c", RUN, json.dumps(self.modules)),
                    *("-C", str(self.path)),
                ],
                env=self.environment,
                stderr=log,
                pass_fds=pass_fds,
                **{"stdin": subprocess.DEVNULL, **more},
            )
        if ready:
            eventually(lambda: self.ended or self.status().get("state") == "running", "running")
            assert not self.ended, self.log

    @property
    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def logged(self, pattern: str, times: int = 1) -> bool:
        """Whether so many log lines match."""
        return len(re.findall(pattern, self.log)) >= times

    def call(self, method: str, timeout_s: float = 20.0, **params: Any) -> Any:
        """Ask the daemon."""
        with Control(str(self.socket), timeout_s) as control:
            return control.call(method, params)

    def status(self) -> Mapping[str, Any]:
        """The status document, empty if nobody answers."""
        with contextlib.suppress(NotAnswering):
            found: Mapping[str, Any] = self.call("status")
            return found
        return {}

    def of(self, worker: str) -> Mapping[str, Any]:
        """What the status says of a worker."""
        found: Mapping[str, Any] = self.status().get("workers", {}).get(worker, {})
        return found

    def running(self, worker: str, but_not: int | None = None) -> int:
        """Wait until `worker` runs, as another process than `but_not`; its pid."""

        def pid() -> int:
            about = self.of(worker)
            known = about.get("pid") or 0
            return known if about.get("state") == "running" and known != but_not else 0

        found: int = eventually(pid, f"{worker} runs\n{self.log}")
        return found

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, within_s: float = WITHIN_S) -> int:
        """Wait for the end of the daemon; its exit status."""
        assert self.process is not None
        return self.process.wait(within_s)

    def stop(self) -> int:
        """Stop it gracefully; its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def end(self) -> None:
        """After a test: leave nothing behind."""
        if self.process is not None and self.process.poll() is None:
            workers = self.status().get("workers", {})
            self.process.kill()
            self.process.wait()
            for about in workers.values():
                if about.get("pid"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(about["pid"], signal.SIGKILL)
