"""Each stage hung on purpose: critical, with its name, in time; and it moves again unaided."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from droprd.net.control import Control
from droprd.settings.published import find_node
from droprd.testing.node import Node, wait_until

# With the default of 30 s the same takes three times as long, which is within a minute.
HANG_S = 9


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(
        tmp_path / "hamburg", "hamburg", settings=f"[daemon]\nhang_timeout_s = {HANG_S}"
    ).start()
    yield made
    made.close()


def health(node: Node) -> dict[str, Any]:
    with Control(find_node(str(node.config)).socket, 10) as control:
        found: dict[str, Any] = control.call("health")
    return found


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_as_critical_and_replaced(node: Node) -> None:
    assert health(node)["verdict"] == "ok"
    pids = {name: node.kill_worker(name, signal.SIGSTOP) for name in ("sender", "receiver")}
    pids["janitor"] = node.kill_worker("janitor", signal.SIGSTOP)
    hung: set[str] = set()

    def all_named() -> bool:
        found = health(node)
        hung.update(
            r["subject"]
            for r in found["reasons"]
            if (r["level"], r["code"]) == ("critical", "worker_hung")
        )
        return hung == set(pids)

    wait_until(all_named, "all three are named", HANG_S * 2)

    def replaced() -> bool:
        workers = node.status()["workers"]
        return all(
            workers[name]["state"] == "running" and workers[name]["pid"] != pid
            for name, pid in pids.items()
        )

    wait_until(replaced, "all three are replaced", HANG_S + 30)
    with node.outbox() as outbox, node.inbox() as inbox:
        outbox.send(b"moves again", to="hamburg", channel="sites")
        (message,) = inbox.receive("sites", wait_s=20)
        message.ack()


def test_a_daemon_that_hangs_is_not_answering(node: Node) -> None:
    assert node.process is not None
    os.kill(node.process.pid, signal.SIGSTOP)
    try:
        done = node.ctl("--timeout", "1", "health", check=False)
        assert done.returncode == 3
        assert b"not answering" in done.stderr
    finally:
        os.kill(node.process.pid, signal.SIGCONT)
    wait_until(lambda: health(node)["verdict"] == "ok", "it answers again")
