"""A disk that is lost, put back from a copy, or runs twice: real nodes, real copies."""

from __future__ import annotations

import copy
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.testing.node import Node, free_port, pair, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """The same two nodes for all tests, each of which uses channels of its own."""
    hamburg, berlin = pair(tmp_path_factory.mktemp("resets"))
    try:
        for node in (hamburg, berlin):
            node.start(wait=False)
        for node in (hamburg, berlin):
            node.wait_running()
        yield hamburg, berlin
    finally:
        hamburg.close()
        berlin.close()


def numbered(first: int, count: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, first + count)]


def send(node: Node, channel: str, bodies: list[bytes]) -> None:
    with node.outbox() as outbox:
        for body in bodies:
            outbox.send(body, to="berlin", channel=channel)


def wait_delivered(node: Node) -> None:
    wait_until(lambda: node.queued("berlin") == 0, f"{node.name} has delivered all", 60)


def take(inbox: Inbox, channel: str, count: int, within_s: float = 30) -> list[bytes]:
    """The next `count` messages, and whatever else is there by then."""
    bodies: list[bytes] = []

    def there() -> bool:
        messages = inbox.receive(channel, wait_s=0.5)
        inbox.ack(messages)
        bodies.extend(message.body for message in messages)
        return len(bodies) >= count

    wait_until(there, f"{count} messages have arrived in {channel}", within_s)
    messages = inbox.receive(channel)
    return bodies + [message.body for message in messages]


def lose_spool(node: Node) -> None:
    """The node's disk dies; it starts with a new and empty spool."""
    assert node.stop() == 0
    shutil.rmtree(node.spool)
    scratch = node.directory.parent / "scratch"
    node.ctl(
        "init", "--dir", str(scratch), "--name", node.name, "--spool", str(node.spool), at=False
    )
    shutil.rmtree(scratch)
    node.start()


def copy_tree(source: Path, target: Path) -> None:
    # shutil.copytree would wait for somebody to write into the FIFOs.
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


@pytest.mark.parametrize(("mode", "first_again"), [("replay", 0), ("continue", 10)])
def test_a_lane_whose_receiver_lost_its_disk_waits_for_an_operator(
    nodes: tuple[Node, Node], mode: str, first_again: int
) -> None:
    hamburg, berlin = nodes
    send(hamburg, mode, numbered(0, 10))
    with berlin.inbox() as inbox:
        assert take(inbox, mode, 10) == numbered(0, 10)
    wait_delivered(hamburg)
    lose_spool(berlin)
    send(hamburg, mode, numbered(10, 10))
    wait_until(
        lambda: b"peer reset berlin --replay" in hamburg.ctl("why", "berlin").stdout,
        "why names the way out",
    )
    assert hamburg.queued("berlin") == 10
    with berlin.inbox() as inbox:
        # A lane that berlin has confirmed nothing of is not concerned.
        send(hamburg, f"fresh-{mode}", [b"go on"])
        assert take(inbox, f"fresh-{mode}", 1) == [b"go on"]
        assert inbox.receive(mode) == []
        hamburg.ctl("peer", "reset", "berlin", f"--{mode}")
        wanted = numbered(first_again, 20 - first_again)
        assert take(inbox, mode, len(wanted)) == wanted
        wait_delivered(hamburg)
        send(hamburg, mode, numbered(20, 5))
        assert take(inbox, mode, 5) == numbered(20, 5)


def test_a_receiver_put_back_from_an_older_copy_gets_again_what_it_lost(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    hamburg, berlin = nodes
    send(hamburg, "put-back", numbered(0, 10))
    wait_delivered(hamburg)
    assert berlin.stop() == 0
    copy_tree(berlin.spool, tmp_path / "copy")
    berlin.start()
    send(hamburg, "put-back", numbered(10, 10))
    wait_delivered(hamburg)
    assert berlin.stop() == 0
    shutil.rmtree(berlin.spool)
    copy_tree(tmp_path / "copy", berlin.spool)
    berlin.start()
    send(hamburg, "put-back", numbered(20, 10))
    wait_until(lambda: b"peer reset" in hamburg.ctl("why", "berlin").stdout, "the lane is held")
    with berlin.inbox() as inbox:
        assert take(inbox, "put-back", 10) == numbered(0, 10)
        hamburg.ctl("peer", "reset", "berlin", "--replay")
        assert take(inbox, "put-back", 20) == numbered(10, 20)


def test_a_sender_put_back_from_an_older_copy_sends_nothing_twice(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    hamburg, berlin = nodes
    send(hamburg, "restored", numbered(0, 10))
    wait_delivered(hamburg)
    hamburg.ctl("pause", "berlin")
    send(hamburg, "restored", numbered(10, 10))
    wait_until(lambda: hamburg.queued("berlin") == 10, "ten messages wait")
    assert hamburg.stop() == 0
    copy_tree(hamburg.spool, tmp_path / "copy")
    hamburg.start()
    hamburg.ctl("resume", "berlin")
    send(hamburg, "restored", numbered(20, 10))
    wait_delivered(hamburg)
    assert hamburg.stop() == 0
    shutil.rmtree(hamburg.spool)
    copy_tree(tmp_path / "copy", hamburg.spool)
    hamburg.start()
    # In the copy berlin is paused, and ten messages wait that it has long got.
    send(hamburg, "restored", numbered(30, 10))
    hamburg.ctl("resume", "berlin")
    wait_delivered(hamburg)
    with berlin.inbox() as inbox:
        assert take(inbox, "restored", 40) == numbered(0, 40)
    assert "rebased" in hamburg.said()
    assert hamburg.status()["dead_letters"] == 0


def test_a_spool_that_runs_twice_keeps_the_order_of_each_and_doubles_nothing(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    hamburg, berlin = nodes
    send(hamburg, "twins", [b"both"])
    wait_delivered(hamburg)
    assert hamburg.stop() == 0
    twin = twin_of(hamburg, tmp_path / "twin")
    hamburg.start(wait=False)
    twin.start(wait=False)
    try:
        hamburg.wait_running()
        twin.wait_running()
        threads = [
            threading.Thread(target=send, args=(node, "twins", own(node, 100)))
            for node in (hamburg, twin)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with berlin.inbox() as inbox:
            got = take(inbox, "twins", 201, 60)
        for node in (hamburg, twin):
            wait_delivered(node)
            assert [body for body in got if body in set(own(node, 100))] == own(node, 100)
            assert node.status()["dead_letters"] == 0
        assert len(got) == 201
        assert "rebased" in hamburg.said() + twin.said()
        with berlin.inbox() as inbox:
            assert inbox.receive("twins") == []
    finally:
        twin.close()


def own(node: Node, count: int) -> list[bytes]:
    return [b"%d of " % number + str(node.directory).encode() for number in range(count)]


def twin_of(node: Node, directory: Path) -> Node:
    """The same node once more, on another machine so to speak: with another port."""
    copy_tree(node.directory, directory)
    twin = copy.copy(node)
    twin.directory = directory
    twin.log = directory.parent / "twin.log"
    twin.port = free_port()
    twin.env = {**node.env, "DROPRD_RECEIVER__LISTEN": twin.listen}
    twin.process = None
    return twin
