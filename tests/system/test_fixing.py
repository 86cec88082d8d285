"""Fixing what is stuck: list, cat, trace, requeue and purge on real nodes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from droprd.testing.node import Node, pair, wait_until

FAST = "[channels.sites]\nmax_attempts = 1\n"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """hamburg and berlin, which know each other; no daemon runs yet."""
    with ExitStack() as ends:
        both = pair(tmp_path, settings=FAST)
        for node in both:
            ends.callback(node.close)
        yield both


def listed(node: Node, *words: str) -> list[dict[str, Any]]:
    out = node.ctl("list", *words, "--json").stdout.decode()
    return [json.loads(line) for line in out.splitlines()]


def done(node: Node, *words: str, stdin: bytes = b"") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.ctl(*words, "--json", stdin=stdin).stdout)
    return found


def send(node: Node, count: int, **how: Any) -> list[str]:
    with node.outbox() as outbox:
        return [
            outbox.send(b"body %d" % n, to="berlin", channel="sites", **how) for n in range(count)
        ]


def take_all(node: Node, count: int, channel: str = "sites") -> list[tuple[str, bytes]]:
    """So many messages, acknowledged, in the order in which they came."""
    found: list[tuple[str, bytes]] = []
    with node.inbox() as inbox:

        def some() -> bool:
            for message in inbox.receive(channel, wait_s=0.2):
                found.append((message.id, message.body))
                message.ack()
            return len(found) >= count

        wait_until(some, f"{count} messages come")
    return found


def fsck(*nodes: Node) -> None:
    for node in nodes:
        checked = json.loads(node.ctl("fsck", "--json").stdout)
        assert checked["ok"], checked


@pytest.mark.parametrize("with_daemon", [True, False])
def test_a_poisoned_channel_is_listed_and_piped_into_requeue(
    nodes: tuple[Node, Node], with_daemon: bool
) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    berlin.start()
    ids = send(hamburg, 5)
    rejected = []
    with berlin.inbox() as inbox:

        def poisoned() -> bool:
            for message in inbox.receive("sites", wait_s=0.2):
                message.reject("no such site")
                rejected.append(message.id)
            return len(rejected) == 5

        wait_until(poisoned, "all are rejected")
    dead = listed(berlin, "--dead")
    assert [one["id"] for one in dead] == ids
    assert {(one["reason"], one["peer"], one["box"]) for one in dead} == {
        ("no such site", "hamburg", "inbox")
    }
    assert berlin.ctl("cat", ids[3]).stdout == b"body 3"
    told = done(berlin, "why", ids[3])
    assert told["state"] == "dead"
    assert "no such site" in told["text"]
    if not with_daemon:
        berlin.stop()
    piped = berlin.ctl("list", "--dead", "--reason", "no such").stdout
    assert done(berlin, "requeue", "-", "--dry-run", stdin=piped)["messages"] == 5
    assert done(berlin, "requeue", "-", stdin=piped)["messages"] == 5
    assert listed(berlin, "--dead") == []
    assert [one for one, _ in take_all(berlin, 5)] == ids
    if with_daemon:
        assert "event=requeue" in berlin.said(60_000)
    fsck(hamburg, berlin)


@pytest.mark.parametrize("with_daemon", [True, False])
def test_sent_messages_are_delivered_again_with_their_ids_in_order(
    nodes: tuple[Node, Node], with_daemon: bool
) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    berlin.start()
    ids = send(hamburg, 20)
    assert [one for one, _ in take_all(berlin, 20)] == ids
    wait_until(lambda: hamburg.queued("berlin") == 0, "all is delivered")
    assert [one["id"] for one in listed(hamburg, "berlin/sites", "--sent")] == ids
    if not with_daemon:
        hamburg.stop()
    assert done(hamburg, "requeue", "berlin", "--sent")["messages"] == 20
    if not with_daemon:
        hamburg.start()
    assert take_all(berlin, 20) == [(one, b"body %d" % n) for n, one in enumerate(ids)]
    wait_until(lambda: hamburg.queued("berlin") == 0, "all is delivered again")
    steps = done(hamburg, "trace", ids[7])["steps"]
    assert [step["step"] for step in steps] == ["sent", "sent", "delivered", "delivered"]
    told = done(hamburg, "why", ids[7])
    assert told["state"] == "sent"
    assert told["command"] == f"droprctl requeue {ids[7]} --sent"
    fsck(hamburg, berlin)


@pytest.mark.parametrize("with_daemon", [True, False])
def test_purging_a_dead_peers_queue_frees_space_and_later_sends_still_arrive(
    nodes: tuple[Node, Node], with_daemon: bool
) -> None:
    hamburg, berlin = nodes
    if with_daemon:
        hamburg.start()
    with hamburg.outbox() as outbox:
        kept = outbox.send(b"first", to="berlin", channel="other")
        outbox.send_many([os.urandom(30_000) for _ in range(60)], to="berlin", channel="sites")
        outbox.send(os.urandom(3_000_000), to="berlin", channel="sites")
    if with_daemon:
        wait_until(lambda: hamburg.status()["peers"]["berlin"]["queued"] == 62, "all is merged")
        ages = done(hamburg, "status", "--ages")
        assert ages["peers"] == {"berlin": [62, *[0] * len(ages["buckets_s"])]}
        told = done(hamburg, "why", kept)
        assert (told["state"], told["peer"]) == ("waiting", "berlin")
    refused = hamburg.ctl("purge", "berlin/sites", check=False)
    assert refused.returncode == 2
    assert done(hamburg, "purge", "berlin/sites", "--dry-run")["messages"] == 61
    before = disk_bytes(hamburg.spool / "outbox")
    purged = done(hamburg, "purge", "berlin/sites", "--yes")
    assert (purged["messages"], purged["bytes"]) == (61, 60 * 30_000 + 3_000_000)
    if not with_daemon:
        hamburg.start()
    wait_until(lambda: disk_bytes(hamburg.spool / "outbox") < before / 3, "space is freed")
    assert [one["id"] for one in listed(hamburg, "berlin") if one["state"] == "waiting"] == [kept]
    fsck(hamburg)
    late = send(hamburg, 2)
    berlin.start()
    hamburg.ctl("retry", "berlin")
    assert [one for one, _ in take_all(berlin, 2)] == late
    assert take_all(berlin, 1, "other") == [(kept, b"first")]
    wait_until(lambda: hamburg.queued("berlin") == 0, "the holes went out")
    hamburg.stop()
    berlin.stop()
    fsck(hamburg, berlin)


def test_dead_letters_of_the_outbox_are_requeued_purged_and_counted(
    nodes: tuple[Node, Node],
) -> None:
    hamburg, berlin = nodes
    berlin_peer = berlin.directory / "peers.d" / "hamburg.toml"
    text = berlin_peer.read_text()
    berlin_peer.write_text(text + 'channels = ["other"]\n')
    hamburg.start()
    berlin.start()
    ids = send(hamburg, 4)
    with hamburg.outbox() as outbox:
        blob = outbox.send(b"x" * 100_000, to="berlin", channel="sites")
    wait_until(lambda: hamburg.status()["dead_letters"] == 5, "all are refused")
    assert [one["id"] for one in listed(hamburg, "berlin", "--dead")] == [*ids, blob]
    assert done(hamburg, "purge", ids[0], ids[1], "--yes")["messages"] == 2
    berlin_peer.write_text(text)
    berlin.ctl("reload")
    unknown = "0199c5d2-5cb4-7bd1-a5d0-7a6a1e2c0000"
    partly = hamburg.ctl("requeue", ids[2], ids[3], blob, unknown, "--json", check=False)
    assert partly.returncode == 4, partly
    assert json.loads(partly.stdout)["missing"] == [unknown]
    assert json.loads(partly.stdout)["messages"] == 3
    assert [one for one, _ in take_all(berlin, 3)] == [ids[2], ids[3], blob]
    wait_until(lambda: hamburg.queued("berlin") == 0, "all is delivered")
    wait_until(lambda: hamburg.status()["dead_letters"] == 0, "no letter is left")
    assert listed(hamburg, "--dead") == []
    assert hamburg.ctl("requeue", unknown, check=False).returncode == 1
    hamburg.stop()
    berlin.stop()
    fsck(hamburg, berlin)


def test_purged_messages_of_the_inbox_never_come(nodes: tuple[Node, Node]) -> None:
    hamburg, berlin = nodes
    hamburg.start()
    berlin.start()
    ids = send(hamburg, 6)
    wait_until(lambda: len(listed(berlin, "--inbox")) == 6, "all have arrived")
    assert done(berlin, "purge", *ids[1:3], "--yes")["messages"] == 2
    assert (
        done(berlin, "purge", "hamburg/sites", "--newer-than", "0", "--inbox", "--yes")["messages"]
        == 0
    )
    assert [one for one, _ in take_all(berlin, 4)] == [ids[0], *ids[3:]]
    assert listed(berlin, "--inbox") == []
    fsck(berlin)


def disk_bytes(path: Path) -> int:
    return sum(one.stat().st_blocks * 512 for one in path.rglob("*") if one.is_file())
