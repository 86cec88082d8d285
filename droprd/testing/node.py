"""A real node in a directory of its own: for tests, the demo and the benchmark.

Owns the processes it starts and ends them. Everything goes through the programs a user has:
`droprctl` to set up and ask, `droprd` as the daemon. Nothing here waits by sleeping for luck;
`wait_until` asks for a condition until a bound.

Raises: AssertionError where a bound passes, with what the node said.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from droprd.client.inbox import Inbox
from droprd.client.outbox import Outbox

T = TypeVar("T")
WITHIN_S = 30.0
POLL_S = 0.02


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], T | None], what: str, within_s: float = WITHIN_S) -> T:
    """The first true value of `condition`. Raises: AssertionError after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(POLL_S)


class Node:
    """One node of droprd below `directory`, made by `droprctl init`."""

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        port: int | None = None,
        settings: str = "",
        prefix: Sequence[str] = (),
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Set up the node; no daemon runs yet.

        Args:
            settings: more lines for droprd.toml.
            prefix: a command to run everything under, e.g. ("ip", "netns", "exec", "a").
        """
        self.directory = directory
        self.name = name
        self.port = port or free_port()
        self.prefix = list(prefix)
        self.python = python
        self.env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory.parent / f"{name}.log"
        self.ctl("init", "--dir", str(directory), "--name", name, "--listen", self.listen, at=False)
        if settings:
            with open(directory / "droprd.toml", "a", encoding="utf-8") as file:
                file.write(f"\n{settings}\n")

    @property
    def listen(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.listen}"

    @property
    def config(self) -> Path:
        return self.directory / "droprd.toml"

    @property
    def spool(self) -> Path:
        return self.directory / "spool"

    # -- programs ------------------------------------------------------------------------------

    def ctl(
        self,
        *args: str,
        stdin: bytes | None = None,
        check: bool = True,
        at: bool = True,
        within_s: float = 120,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `droprctl` on this node. With `check`, anything but exit 0 raises AssertionError."""
        where = ["-C", str(self.directory)] if at else []
        done = subprocess.run(
            [*self.prefix, self.python, "-m", "droprd.ctl.main", *where, *args],
            input=stdin if stdin is not None else b"",
            capture_output=True,
            timeout=within_s,
            check=False,
            env=self.env,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"droprctl {' '.join(args)}: exit {done.returncode}\n"
                f"{done.stdout.decode()}{done.stderr.decode()}"
            )
        return done

    def start(self, *, wait: bool = True) -> Node:
        """Start the daemon, and wait until all workers run."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, self.python, "-m", "droprd.angel.main", "-C", str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                start_new_session=True,
            )
        if wait:
            self.wait_running()
        return self

    def wait_running(self, within_s: float = WITHIN_S) -> dict[str, Any]:
        """Wait until the daemon and all its workers run; the status then."""

        def running() -> dict[str, Any] | None:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"droprd ended: {self.said()}")
            status = self.status(check=False)
            workers = status.get("workers", {})
            is_up = status.get("state") == "running" and workers
            return (
                status if is_up and all(w["state"] == "running" for w in workers.values()) else None
            )

        try:
            return wait_until(running, f"{self.name} runs", within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def status(self, *, check: bool = True) -> dict[str, Any]:
        """What `droprctl status --json` says; an empty map where it cannot say anything."""
        done = self.ctl("status", "--json", check=False)
        if check and done.returncode not in (0, 3):
            raise AssertionError(done.stderr.decode())
        try:
            found: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            return {}
        return found

    def worker_pid(self, worker: str) -> int:
        """The pid of a running worker."""

        def pid() -> int | None:
            found = self.status(check=False).get("workers", {}).get(worker, {})
            return found.get("pid") if found.get("state") == "running" else None

        return wait_until(pid, f"{self.name} has a running {worker}")

    def kill_worker(self, worker: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a worker; returns its pid."""
        pid = self.worker_pid(worker)
        os.kill(pid, number)
        return pid

    def stop(self, within_s: float = 40) -> int:
        """End the daemon with SIGTERM; returns its exit code."""
        process = self.process
        assert process is not None, "no daemon was started"
        if process.poll() is None:
            process.terminate()
        code = process.wait(within_s)
        self.process = None
        return code

    def kill(self) -> None:
        """End the angel with SIGKILL; its workers notice and leave."""
        process = self.process
        assert process is not None, "no daemon was started"
        process.kill()
        process.wait()
        self.process = None

    def close(self) -> None:
        """End whatever still runs."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
            if self.process is not None:
                self.kill()

    def said(self, bytes_max: int = 6000) -> str:
        """The end of what the daemon logged."""
        try:
            return self.log.read_bytes()[-bytes_max:].decode(errors="replace")
        except FileNotFoundError:
            return ""

    # -- applications --------------------------------------------------------------------------

    def outbox(self) -> Outbox:
        """An `Outbox` on this node's spool."""
        return Outbox(spool=str(self.spool))

    def inbox(self) -> Inbox:
        """An `Inbox` on this node's spool."""
        return Inbox(spool=str(self.spool))

    def knows(self, other: Node, *extra: str) -> None:
        """Make two nodes peers of each other, with one token for both directions."""
        token = self.ctl("peer", "add", other.name, other.url, *extra).stdout
        other.ctl("peer", "add", self.name, self.url, *extra, "--token-file", "-", stdin=token)

    def queued(self, peer: str) -> int:
        """Messages that wait for a peer, those not merged yet counted as one."""
        status = self.status()
        waiting: int = status["peers"].get(peer, {}).get("queued", 0)
        return waiting + bool(status["unmerged_bytes"])


def pair(
    directory: Path, *, settings: str = "", names: tuple[str, str] = ("hamburg", "berlin")
) -> tuple[Node, Node]:
    """Two nodes on loopback that know each other; no daemon runs yet."""
    first = Node(directory / names[0], names[0], settings=settings)
    second = Node(directory / names[1], names[1], settings=settings)
    first.knows(second)
    return first, second
