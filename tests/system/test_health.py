"""What health says of a real node, in its files and through its programs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.testing.node import Node, wait_until

QUICK = """
[health]
oldest_age_warning_s = 1
oldest_age_critical_s = 0
inbox_age_warning_s = 1
inbox_age_critical_s = 0
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "hamburg", "hamburg", settings=QUICK).start()
    yield made
    made.close()


def codes(node: Node) -> set[tuple[str, str]]:
    done = node.ctl("health", "--json", check=False)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["verdict"] == "ok" else 1)
    return {(reason["code"], reason["subject"]) for reason in found["reasons"]}


def check(node: Node, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "droprd.monitor.nagios", *arguments, "--config", str(node.config)],
        capture_output=True,
        text=True,
        env=node.env,
    )
    return done.returncode, done.stdout


def test_an_inbox_that_nobody_consumes_is_told_until_somebody_does(node: Node) -> None:
    assert codes(node) == set()
    assert check(node, "inbox")[0] == 0
    with node.outbox() as outbox:
        outbox.send(b"x", to="hamburg", channel="sites")
    wait_until(lambda: codes(node) == {("inbox_age", "sites")}, "it is told")
    code, output = check(node, "inbox")
    assert code == 1
    assert output.startswith("DROPRD INBOX WARNING - the oldest message of channel sites waits")
    assert check(node, "inbox", "-w", "100000")[0] == 0
    with node.inbox() as inbox:
        (message,) = inbox.receive("sites", wait_s=20)
        message.ack()
    wait_until(lambda: codes(node) == set(), "all is well again")


def test_paused_receiving_is_told_and_paused_sending_is_not(node: Node) -> None:
    node.ctl("pause", "--reason", "a new disk")
    assert codes(node) == set()
    node.ctl("resume")
    node.ctl("pause", "--receiving", "--reason", "a new disk")
    assert codes(node) == {("receiver_paused", "receiver")}
    assert "a new disk" in check(node, "inbox")[1]
    node.ctl("resume")
    assert codes(node) == set()


def test_each_mode_looks_at_its_own_and_only_at_that(node: Node) -> None:
    node.ctl("peer", "add", "berlin", "http://127.0.0.1:9")
    with node.outbox() as outbox:
        outbox.send(b"x", to="berlin")
    wait_until(lambda: ("oldest_age", "berlin") in codes(node), "it is late")
    found = {mode: check(node, mode)[0] for mode in ("alive", "queue", "oldest", "dead", "spool")}
    assert found == {"alive": 0, "queue": 0, "oldest": 1, "dead": 0, "spool": 0}
    assert check(node, "queue", "--peer", "berlin", "-c", "0")[0] == 2
    code, output = check(node, "oldest", "--peer", "nobody")
    assert (code, output.split(" - ")[0]) == (3, "DROPRD UNKNOWN")
    node.stop()
    code, output = check(node, "oldest")
    assert code == 2
    assert "no daemon runs here" in output
