"""droprctl with real daemons: what an operator types, and what comes of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.system.angelbox import eventually

WITHIN_S = 30.0


@dataclass
class Done:
    """How one call of droprctl ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)


@dataclass
class Node:
    """A node in a directory, made and steered by droprctl alone."""

    path: Path
    name: str
    port: int
    daemon: subprocess.Popen[bytes] | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.path.parent / f"{self.name}.log"
        listen = f"127.0.0.1:{self.port}"
        self("init", "--dir", str(self.path), "--name", self.name, "--listen", listen, exit_code=0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        root = str(Path(__file__).parents[2])
        clean = {k: v for k, v in os.environ.items() if not k.startswith("DROPRD_")}
        return {**clean, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "droprd.ctl.main", "-C", str(self.path), *words]

    def __call__(self, *words: str, exit_code: int | None = None, stdin: bytes = b"") -> Done:
        done = subprocess.run(
            self.command(*words), input=stdin, capture_output=True, env=self.environment, timeout=60
        )
        result = Done(done.returncode, done.stdout.decode(), done.stderr.decode())
        if exit_code is not None:
            assert result.code == exit_code, (words, result)
        return result

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "droprd.angel.main", "-C", str(self.path)],
                env=self.environment,
                stderr=log,
            )
        eventually(self._runs, f"{self.name} runs", WITHIN_S)

    def _runs(self) -> bool:
        assert self.daemon is not None
        assert self.daemon.poll() is None, self.log.read_text()
        found = self("status", "--json")
        return found.code == 0 and found.json["state"] == "running"

    def end(self) -> None:
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.terminate()
            self.daemon.wait(40)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _peers(one: Node, other: Node) -> None:
    """Let each know the other, as the documentation says."""
    added = one("peer", "add", other.name, other.url, exit_code=0)
    other("peer", "add", one.name, one.url, "--token-file", "-", stdin=added.out.encode())


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """hamburg and berlin, which know each other; no daemon runs yet."""
    with ExitStack() as ends:
        made = []
        for name in ("hamburg", "berlin"):
            node = Node(tmp_path / name[0], name, _free_port())
            ends.callback(node.end)
            made.append(node)
        _peers(*made)
        yield made[0], made[1]


def test_a_first_message_by_hand(nodes: tuple[Node, Node]) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    berlin.start()
    sent = hamburg("send", "berlin", "hello", "--channel", "sites", "--header", "a=b", exit_code=0)
    got = berlin("receive", "sites", "--wait", "20s", "--json", exit_code=0)
    message = got.json
    assert message["id"] == sent.out.strip()
    assert (message["sender"], message["channel"], message["body"]) == ("hamburg", "sites", "hello")
    assert (message["priority"], message["attempt"], message["headers"]) == (5, 1, {"a": "b"})
    assert message["created"].endswith("Z")
    assert berlin("receive", "sites", "--json", exit_code=0).out == ""
    status = eventually(
        lambda: (
            (s := hamburg("status", "--json", exit_code=0).json)["peers"]["berlin"]["queued"] == 0
            and s
        ),
        "the receipt is shown",
        WITHIN_S,
    )
    assert status["unmerged_bytes"] == 0
    assert {w["state"] for w in status["workers"].values()} == {"running"}


def test_bodies_come_out_as_they_went_in(nodes: tuple[Node, Node]) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    berlin.start()
    lines = [b"%d" % i for i in range(500)]
    hamburg("send", "berlin", "--lines", stdin=b"\n".join(lines), exit_code=0)
    got = berlin("receive", "common", "--max", "500", "--wait", "20s", exit_code=0)
    assert got.out.encode() == b"\n".join(lines) + b"\n"
    binary = os.urandom(100_000)
    hamburg("send", "berlin", "--channel", "raw", stdin=binary, exit_code=0)
    words = berlin.command("receive", "raw", "--wait", "20s", "--raw")
    done = subprocess.run(words, capture_output=True, env=berlin.environment, timeout=60)
    assert done.stdout == binary
    hamburg("send", "berlin", "--channel", "raw", stdin=b"\xff", exit_code=0)
    assert berlin("receive", "raw", "--wait", "20s", "--json").json["body_base64"] == "/w=="


def test_peeking_takes_and_counts_nothing(nodes: tuple[Node, Node]) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    berlin.start()
    hamburg("send", "berlin", "look", exit_code=0)
    eventually(lambda: berlin("receive", "common", "--peek").out, "it arrives", WITHIN_S)
    assert berlin("receive", "common", "--peek", "--json").json["attempt"] == 1
    assert berlin("receive", "common", "--json").json["attempt"] == 1


def test_a_pipe_that_breaks_loses_nothing(nodes: tuple[Node, Node]) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    berlin.start()
    hamburg("send", "berlin", "--lines", stdin=b"one\ntwo\nthree", exit_code=0)
    eventually(
        lambda: len(berlin("receive", "common", "--peek", "--max", "9").out.split()) == 3,
        "all are there",
        WITHIN_S,
    )
    reading, writing = os.pipe()
    os.close(reading)
    words = berlin.command("receive", "common", "--max", "3")
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, env=berlin.environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
    assert sorted(berlin("receive", "common", "--max", "3", "--wait", "5s").out.split()) == [
        "one",
        "three",
        "two",
    ]


def test_an_interrupt_is_exit_130(nodes: tuple[Node, Node]) -> None:
    _, berlin = nodes
    waiting = berlin.path / "spool" / "inbox" / "waiting"
    process = subprocess.Popen(
        berlin.command("receive", "common", "--wait", "10m"), env=berlin.environment
    )
    eventually(lambda: list(waiting.iterdir()), "it waits", WITHIN_S)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_drain_waits_for_a_peer_that_is_away(nodes: tuple[Node, Node]) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    hamburg("send", "berlin", "--lines", stdin=b"one\ntwo\n", exit_code=0)
    late = hamburg("--timeout", "1s", "drain", "berlin", "--json", exit_code=4)
    assert (late.json["left"], late.json["running"]) == (2, True)
    refused = hamburg("send", "berlin", "three", "--json", exit_code=1)
    assert refused.error["code"] == "draining"
    why = hamburg("why", "berlin", "--json", exit_code=0).json
    assert why["queued"] == 2
    assert why["command"]
    berlin.start()
    hamburg("retry", "berlin", exit_code=0)
    empty = hamburg("--timeout", "30s", "drain", "berlin", "--json", exit_code=0)
    assert empty.json["left"] == 0
    hamburg("resume", "berlin", exit_code=0)
    hamburg("send", "berlin", "three", exit_code=0)
    got = berlin("receive", "common", "--max", "3", "--wait", "20s", exit_code=0)
    assert got.out.split() == ["one", "two", "three"]


def test_a_pause_outlives_the_daemon_and_a_resume_lets_messages_go(
    nodes: tuple[Node, Node],
) -> None:
    hamburg, berlin = nodes
    hamburg("pause", "berlin", "--reason", "moving", exit_code=0)
    hamburg.start()
    berlin.start()
    hamburg("send", "berlin", "held", exit_code=0)
    eventually(
        lambda: hamburg("status", "--json").json["peers"]["berlin"]["queued"] == 1,
        "it is queued",
        WITHIN_S,
    )
    why = hamburg("why", "berlin", "--json", exit_code=0).json
    assert (why["state"], why["command"]) == ("paused", "droprctl resume berlin")
    assert "moving" in why["text"]
    assert berlin("receive", "common", "--wait", "500ms").out == ""
    hamburg("resume", exit_code=0)
    assert berlin("receive", "common", "--wait", "20s").out == "held\n"


def test_peers_change_while_the_daemon_runs(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    paris = Node(tmp_path / "p", "paris", _free_port())
    try:
        _peers(hamburg, paris)
        paris.start()
        hamburg("send", "paris", "bonjour", exit_code=0)
        assert paris("receive", "common", "--wait", "20s").out == "bonjour\n"
    finally:
        paris.end()
    hamburg("peer", "remove", "paris", exit_code=0)
    refused = hamburg("send", "paris", "encore", "--json", exit_code=1)
    assert refused.error["code"] == "unknown_peer"
    eventually(
        lambda: (
            [peer["name"] for peer in hamburg("peer", "list", "--json").json["peers"]]
            == [berlin.name]
        ),
        "it is forgotten, for nothing waits for it",
        WITHIN_S,
    )


def test_a_faulty_configuration_is_refused_and_the_old_one_stays(
    nodes: tuple[Node, Node],
) -> None:
    hamburg, _ = nodes
    hamburg.start()
    main = hamburg.path / "droprd.toml"
    good = main.read_text()
    main.write_text(f"{good}\n[recever]\n[log]\nlevel = 'loud'\n")
    refused = hamburg("reload", "--json", exit_code=1).error
    assert refused["code"] == "config_invalid"
    assert "did you mean 'receiver'?" in refused["why"]
    assert "log.level" in refused["why"]
    hamburg("peer", "add", "rome", "https://rome.example", exit_code=1)
    assert not (hamburg.path / "keys" / "rome.token").exists()
    main.write_text(good)
    hamburg("reload", exit_code=0)
    hamburg("status", exit_code=0)


def test_a_stopped_node_is_told_from_a_running_one(nodes: tuple[Node, Node]) -> None:
    hamburg, _ = nodes
    hamburg.start()
    first = hamburg("status", "--json", exit_code=0).json
    hamburg("restart", "janitor", exit_code=0)

    def replaced() -> bool:
        now = hamburg("status", "--json", exit_code=0).json["workers"]["janitor"]
        before = first["workers"]["janitor"]
        return bool(now["state"] == "running" and now["pid"] != before["pid"])

    eventually(replaced, "the janitor is replaced", WITHIN_S)
    hamburg("stop", exit_code=0)
    assert hamburg.daemon is not None
    assert hamburg.daemon.wait(10) == 0
    assert hamburg("status", "--json", exit_code=3).json["state"] == "stopped"
    assert hamburg("stop", "--json", exit_code=3).error["code"] == "no_daemon"
    hamburg("fsck", exit_code=0)


def test_a_daemon_that_is_stopped_by_a_signal_is_not_answering(nodes: tuple[Node, Node]) -> None:
    hamburg, _ = nodes
    hamburg.start()
    assert hamburg.daemon is not None
    hamburg.daemon.send_signal(signal.SIGSTOP)
    try:
        silent = hamburg("--timeout", "300ms", "status", "--json", exit_code=3)
        assert silent.error["code"] == "not_answering"
    finally:
        hamburg.daemon.send_signal(signal.SIGCONT)
    hamburg("status", exit_code=0)
