"""What is wrong gets its own stable code and a sentence of what, why and what to do.

Nothing is half-written by what was refused: the files are the same before and after.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import droprd
from droprd.testing.node import Node
from tests.system.disks import read_only

PEER = "http://127.0.0.1:9"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node with a peer that is never there; no daemon runs yet."""
    made = Node(tmp_path / "hamburg", "hamburg")
    made.ctl("peer", "add", "berlin", PEER)
    yield made
    made.close()


def tree(root: Path) -> dict[str, bytes | None]:
    """All files below `root` with what they hold; of others, that they are there."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def in_journals(node: Node) -> dict[str, bytes | None]:
    return tree(node.spool / "outbox" / "journals") | tree(node.spool / "outbox" / "blobs")


def refusal(
    node: Node, *words: str, exit_code: int = 1, stdin: bytes = b"", lines_max: int = 1
) -> dict[str, Any]:
    """How droprctl refuses this: one JSON object on stderr, nothing on stdout."""
    done = node.ctl(*words, "--json", check=False, stdin=stdin)
    assert done.returncode == exit_code, (words, done)
    assert done.stdout == b""
    error: dict[str, Any] = json.loads(done.stderr)
    assert set(error) >= {"schema", "code", "what", "why", "hint"}
    check_words(error["what"], error["why"], error["hint"], lines_max)
    told = node.ctl(*words, check=False, stdin=stdin)
    assert told.returncode == exit_code
    prose = told.stderr.decode()
    assert prose.startswith("droprctl: ")
    assert error["what"] in prose
    assert "Traceback" not in prose
    return error


def check_words(what: str, why: str, hint: str, lines_max: int = 1) -> None:
    """An error says what, why, and what to do, in one sentence; many faults have a line each."""
    for part in (what, why, hint):
        assert part
        assert not part.endswith(".")
        assert len(part.splitlines()) <= lines_max


def daemon_refusal(node: Node, exit_code: int = 1) -> dict[str, Any]:
    """Start a daemon that has to refuse; the line that says why, as a map."""
    done = subprocess.run(
        [sys.executable, "-m", "droprd.angel.main", "-C", str(node.directory)],
        capture_output=True,
        timeout=60,
        env={**node.env, "DROPRD_LOG__FORMAT": "json"},
        check=False,
        text=True,
    )
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [text for text in done.stderr.splitlines() if "critical" in text]
    if line.startswith("{"):
        found: dict[str, Any] = json.loads(line)
        return found
    # Before the configuration is read, its own `log.format` is not known.
    event = re.search(r'event=("(?:[^"\\]|\\.)*")', line)
    code = re.search(r"code=(\S+)", line)
    assert event is not None
    assert code is not None
    return {"event": json.loads(event[1]), "code": code[1]}


# -- configuration -------------------------------------------------------------------------------

FAULTY = """
[node]
name = "Hamburg!"
spool = "spool"
max_mesage_bytes = 7

[reciever]
listen = ["127.0.0.1:1"]

[receiver]
listen = ["0.0.0.0:7707"]

[daemon]
hang_timeout_s = "soon"

[peers.rome]
url = "ftp://rome.example"

[peers.paris]
url = "http://paris.example:7707"
token_file = "keys/none.token"
"""
PLACES = {
    "node.name": "Hamburg!",
    "node.max_mesage_bytes": "did you mean 'max_message_bytes'?",
    "reciever": "did you mean 'receiver'?",
    "receiver.listen": "0.0.0.0",
    "daemon.hang_timeout_s": "soon",
    "peers.rome.url": "ftp",
    "peers.paris.url": "http",
    "peers.paris.token_file": "none.token",
}


def test_all_configuration_faults_are_told_at_once_with_their_places(node: Node) -> None:
    node.config.write_text(FAULTY)
    before = tree(node.directory)
    told = daemon_refusal(node, exit_code=78)
    assert told["code"] == "config_invalid"
    checked = node.ctl("config", "check", "--json", check=False)
    assert checked.returncode == 1
    document = json.loads(checked.stdout)
    assert (document["ok"], document["code"]) == (False, "config_invalid")
    for faults in (told["event"].splitlines()[1:], document["faults"]):
        for place, words in PLACES.items():
            (fault,) = [text for text in faults if f":{place}: " in text]
            assert str(node.config) in fault
            assert words in fault
        assert len(faults) == len(PLACES)
    assert tree(node.directory) == before


def test_a_running_daemon_keeps_its_configuration_when_a_new_one_is_faulty(node: Node) -> None:
    node.start()
    good = node.config.read_text()
    before = in_journals(node)
    node.config.write_text(f'{good}\n[daemon]\nhang_timeout_s = "soon"\n[reciever]\n')
    error = refusal(node, "reload", lines_max=3)
    assert error["code"] == "config_invalid"
    assert "daemon.hang_timeout_s" in error["why"]
    assert "did you mean 'receiver'?" in error["why"]
    assert node.status()["state"] == "running"
    assert in_journals(node) == before


def test_no_configuration_says_where_it_was_looked_for(node: Node) -> None:
    node.config.unlink()
    assert daemon_refusal(node, exit_code=78)["code"] == "config_missing"
    error = refusal(node, "status")
    assert error["code"] == "config_missing"
    assert str(node.config) in error["what"] + error["why"]
    with pytest.raises(droprd.DroprdError) as refused:
        droprd.Outbox(config=node.config)
    assert refused.value.code == "config_missing"


# -- messages ------------------------------------------------------------------------------------


def test_an_unknown_peer_is_refused_and_nothing_is_written(node: Node) -> None:
    before = tree(node.spool)
    error = refusal(node, "send", "rome", "hello")
    assert error["code"] == "unknown_peer"
    assert "droprctl peer list" in error["hint"]
    with node.outbox() as outbox, pytest.raises(droprd.UnknownPeer) as refused:
        outbox.send(b"x", to="rome")
    assert refused.value.code == "unknown_peer"
    check_words(refused.value.what, refused.value.why, refused.value.hint)
    assert tree(node.spool) == before


BAD_NAMES = ["", "../up", "a/b", ".hidden", "Upper", "with space", "nul\0", "é", "x" * 65]
A_UUID = "018f4d2e-9c3a-7c1e-8a2b-3c4d5e6f7a8b"


def test_a_bad_name_is_refused_by_the_api_whatever_it_names(node: Node) -> None:
    before = tree(node.spool)
    with node.outbox() as outbox, node.inbox() as inbox:
        for name in (*BAD_NAMES, A_UUID):
            calls: list[Callable[[], object]] = [
                partial(outbox.send, b"x", to=name),
                partial(outbox.send, b"x", to="berlin", channel=name),
                partial(outbox.send_many, [b"x"], to="berlin", channel=name),
                partial(outbox.send_file, node.config, to="berlin", channel=name),
                partial(inbox.receive, name),
            ]
            for call in calls:
                with pytest.raises(droprd.InvalidName) as refused:
                    call()
                assert refused.value.code == "invalid_name"
                check_words(refused.value.what, refused.value.why, refused.value.hint)
    assert tree(node.spool) == before


def test_a_bad_name_is_refused_by_droprctl_whatever_it_names(node: Node) -> None:
    before = tree(node.directory)
    for words in (
        ("send", "../up", "x"),
        ("send", "berlin", "x", "--channel", "../up"),
        ("receive", "../up"),
        ("pause", f"berlin/{A_UUID}"),
        ("peer", "add", "../up", PEER),
    ):
        assert refusal(node, *words, exit_code=2)["code"] == "invalid_name"
    assert tree(node.directory) == before


def test_a_body_over_the_limit_is_refused_whole(node: Node, tmp_path: Path) -> None:
    with open(node.directory / "peers.d" / "berlin.toml", "a") as file:
        file.write("max_message_bytes = 100000\n")
    node.start()
    large = tmp_path / "large"
    large.write_bytes(bytes(100_001))
    before = in_journals(node)
    error = refusal(node, "send", "berlin", "--file", str(large))
    assert error["code"] == "message_too_large"
    assert "100000" in error["why"]
    with node.outbox() as outbox:
        calls: list[Callable[[], object]] = [
            lambda: outbox.send(bytes(100_001), to="berlin"),
            lambda: outbox.send_many([b"small", bytes(100_001)], to="berlin"),
            lambda: outbox.send_file(large, to="berlin"),
        ]
        for call in calls:
            with pytest.raises(droprd.MessageTooLarge) as refused:
                call()
            assert refused.value.code == "message_too_large"
            check_words(refused.value.what, refused.value.why, refused.value.hint)
        assert in_journals(node) == before
        outbox.send(bytes(100_000), to="berlin")


def test_headers_over_the_limit_are_refused_whole(node: Node) -> None:
    before = tree(node.spool)
    with node.outbox() as outbox, pytest.raises(droprd.MessageTooLarge):
        outbox.send(b"x", to="berlin", headers={"k": "v" * 9000})
    assert tree(node.spool) == before


# -- the spool -----------------------------------------------------------------------------------


def test_a_full_spool_is_refused_with_what_fills_it(node: Node) -> None:
    with open(node.config, "a") as file:
        file.write("\n[outbox]\nquota_bytes = 300000\n")
    node.ctl("peer", "add", "rome", PEER)  # publishes the limit without a daemon
    with node.outbox() as outbox:
        for _ in range(6):
            outbox.send(bytes(20_000), to="berlin")
        before = in_journals(node)
        with pytest.raises(droprd.SpoolFull) as refused:
            outbox.send_many([bytes(20_000)] * 30, to="berlin")
        check_words(refused.value.what, refused.value.why, refused.value.hint)
        assert "300000" in refused.value.why
        assert in_journals(node) == before
    error = refusal(node, "send", "berlin", stdin=bytes(200_000))
    assert error["code"] == refused.value.code == "spool_full"
    assert json.loads(node.ctl("fsck", "--json").stdout)["findings"] == []


@pytest.mark.root
def test_an_unwritable_spool_is_refused_by_all(node: Node) -> None:
    with read_only(node.spool):
        before = tree(node.spool)
        error = refusal(node, "send", "berlin", "hello")
        assert error["code"] == "spool_unwritable"
        assert str(node.spool) in error["what"] + error["why"]
        with node.outbox() as outbox, pytest.raises(droprd.SpoolNotReady):
            outbox.send(b"x", to="berlin")
        told = daemon_refusal(node)
        assert told["code"] == "spool_unwritable"
        assert str(node.spool) in told["event"]
        assert tree(node.spool) == before
    node.start()


def test_a_missing_spool_is_refused_and_never_made(node: Node) -> None:
    node.spool.rename(node.directory / "elsewhere")
    node.spool.mkdir()  # the mount point of a disk that is not there
    for words in (["send", "berlin", "x"], ["status"], ["fsck"]):
        error = refusal(node, *words)
        assert error["code"] == "spool_missing"
        assert "droprctl init" in error["hint"]
    told = daemon_refusal(node)
    assert told["code"] == "spool_missing"
    assert str(node.spool) in told["event"]
    with pytest.raises(droprd.SpoolNotReady) as refused:
        node.outbox()
    assert refused.value.code == "spool_missing"
    assert list(node.spool.iterdir()) == []


def test_a_spool_of_another_version_is_refused_and_no_byte_changed(node: Node) -> None:
    node.ctl("send", "berlin", "before")
    version = node.spool / "VERSION"
    version.write_text(version.read_text().replace("droprd-spool 1\n", "droprd-spool 2\n"))
    before = tree(node.spool)
    for words in (["send", "berlin", "x"], ["status"], ["fsck"]):
        error = refusal(node, *words)
        assert error["code"] == "spool_version"
        assert "format 2" in error["why"]
    assert daemon_refusal(node)["code"] == "spool_version"
    with pytest.raises(droprd.SpoolNotReady) as refused:
        node.inbox()
    assert refused.value.code == "spool_version"
    assert tree(node.spool) == before


def test_a_node_that_is_there_is_not_touched_by_init(node: Node) -> None:
    before = tree(node.directory)
    done = node.ctl(
        "init", "--dir", str(node.directory), "--name", "other", "--json", at=False, check=False
    )
    assert done.returncode == 1
    error = json.loads(done.stderr)
    assert error["code"] == "node_exists"
    check_words(error["what"], error["why"], error["hint"])
    assert tree(node.directory) == before


# -- processes -----------------------------------------------------------------------------------


def test_a_second_daemon_names_the_first_and_leaves_it_alone(node: Node) -> None:
    node.start()
    assert node.process is not None
    told = daemon_refusal(node)
    assert (told["code"], told["pid"]) == ("spool_busy", node.process.pid)
    assert str(node.process.pid) in told["event"]
    assert node.status()["state"] == "running"


def test_a_port_in_use_is_named_and_nothing_is_left_running(node: Node) -> None:
    with socket.create_server(("127.0.0.1", node.port)):
        told = daemon_refusal(node)
    assert told["code"] == "port_in_use"
    assert node.listen in told["event"]
    node.start()  # nothing is left that would be in the way


def test_without_a_daemon_the_exit_code_is_3(node: Node) -> None:
    for words in (["retry", "berlin"], ["reload"], ["stop"]):
        error = refusal(node, *words, exit_code=3)
        assert error["code"] == "no_daemon"
    shown = node.ctl("status", "--json", check=False)
    assert shown.returncode == 3
    assert json.loads(shown.stdout)["state"] == "stopped"
    assert node.ctl("health", "--json", check=False).returncode == 3


def test_a_daemon_that_hangs_is_given_up_after_the_time_limit(node: Node) -> None:
    node.start()
    assert node.process is not None
    node.process.send_signal(signal.SIGSTOP)
    try:
        for words in (["status"], ["health"], ["pause", "berlin"]):
            began = time.monotonic()
            done = node.ctl("--timeout", "500ms", *words, check=False)
            assert time.monotonic() - began < 5
            assert done.returncode == 3
            assert b"not answering" in done.stderr
        error = refusal(node, "--timeout", "300ms", "status", exit_code=3)
        assert error["code"] == "not_answering"
        node.ctl("send", "berlin", "applications go on")
    finally:
        node.process.send_signal(signal.SIGCONT)
    node.wait_running()
