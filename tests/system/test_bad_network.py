"""Two real nodes over a network that loses, cuts, delays and repeats, and peers that misbehave."""

from __future__ import annotations

import os
import statistics
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from droprd.client.inbox import Inbox
from droprd.core import entry
from droprd.core.push import decode_push_answer
from droprd.ctl.files import toml_table
from droprd.model import KIB, MIB
from droprd.spool import log
from droprd.spool.fsops import OsFs
from droprd.testing.node import Node, free_port, wait_until
from tests.system.badpeers import Refusing, Silence
from tests.system.lossyproxy import LossyProxy

pytestmark = pytest.mark.slow


class Pair:
    """hamburg sends to berlin through `proxy`; berlin sends to hamburg directly."""

    def __init__(self, directory: Path) -> None:
        port, self.port6 = free_port(), free_port()
        listen = f"127.0.0.1:{port},[::1]:{self.port6}"
        self.proxy = LossyProxy(port)
        self.hamburg = Node(directory / "hamburg", "hamburg")
        self.berlin = Node(
            directory / "berlin", "berlin", port=port, env={"DROPRD_RECEIVER__LISTEN": listen}
        )
        token = self.hamburg.ctl("peer", "add", "berlin", self.proxy.url).stdout
        self.berlin.ctl(
            "peer", "add", "hamburg", self.hamburg.url, "--token-file", "-", stdin=token
        )

    def start(self) -> None:
        for node in (self.hamburg, self.berlin):
            node.start(wait=False)
        for node in (self.hamburg, self.berlin):
            node.wait_running()

    def close(self) -> None:
        self.hamburg.close()
        self.berlin.close()
        self.proxy.close()

    def wait_delivered(self) -> None:
        """Wait until everything to berlin was confirmed."""
        wait_until(lambda: self.hamburg.queued("berlin") == 0, "everything is delivered")


@contextmanager
def changed(node: Node, peer: str, **values: Any) -> Iterator[None]:
    """A peer's settings, changed for a while; the running daemon takes them over."""
    path = node.directory / "peers.d" / f"{peer}.toml"
    before = path.read_text()
    table = tomllib.loads(before)["peers"][peer] | values
    path.write_text(toml_table(f"peers/{peer}", table))
    node.ctl("reload")
    try:
        yield
    finally:
        path.write_text(before)
        node.ctl("reload")


def about(node: Node, peer: str = "berlin") -> dict[str, Any]:
    found: dict[str, Any] = node.status()["peers"][peer]
    return found


def why(node: Node, peer: str = "berlin") -> str:
    return node.ctl("why", peer).stdout.decode()


class Consumer:
    """Takes and acknowledges what arrives in a channel."""

    def __init__(self, inbox: Inbox, channel: str) -> None:
        self._inbox = inbox
        self._channel = channel
        self.bodies: list[bytes] = []

    def take(self, wait_s: float = 0) -> int:
        messages = self._inbox.receive(self._channel, wait_s=wait_s)
        self._inbox.ack(messages)
        self.bodies += [message.body for message in messages]
        return len(messages)

    def wait_for(self, count: int, within_s: float = 30) -> None:
        def there() -> bool:
            self.take(0.5)
            return len(self.bodies) >= count

        wait_until(there, f"{count} messages have arrived", within_s)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    nodes = Pair(tmp_path_factory.mktemp("bad_network"))
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.close()


@pytest.fixture
def nodes(running: Pair) -> Iterator[Pair]:
    """The same two nodes for all tests, each of which uses channels of its own."""
    yield running
    running.proxy.heal()
    running.hamburg.ctl("resume")
    running.hamburg.ctl("retry", "berlin")


@pytest.fixture
def inbox(running: Pair) -> Iterator[Inbox]:
    with running.berlin.inbox() as inbox:
        yield inbox


def numbered(first: int, count: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, first + count)]


# -- lost, late and repeated ---------------------------------------------------------------------


def test_lost_answers_make_no_duplicates(nodes: Pair, inbox: Inbox) -> None:
    consumer = Consumer(inbox, "lost-answers")
    with nodes.hamburg.outbox() as outbox:
        for part in range(3):
            nodes.proxy.lose_answers(1 + part % 2)
            outbox.send_many(numbered(50 * part, 50), to="berlin", channel="lost-answers")
            wait_until(lambda: nodes.proxy.answers_to_lose == 0, "the answers are lost")
    consumer.wait_for(150)
    nodes.wait_delivered()
    consumer.take()
    assert consumer.bodies == numbered(0, 150)


def test_repeated_requests_change_nothing(nodes: Pair, inbox: Inbox) -> None:
    consumer = Consumer(inbox, "repeated")
    nodes.proxy.recording = True
    with nodes.hamburg.outbox() as outbox:
        for part in range(5):
            outbox.send_many(numbered(10 * part, 10), to="berlin", channel="repeated")
            nodes.wait_delivered()
    consumer.wait_for(50)
    assert len(nodes.proxy.pushes) >= 5
    for request in nodes.proxy.pushes * 2:
        assert verdict(nodes.proxy.repeat(request)) == "conflict"
    assert consumer.take() == 0
    assert consumer.bodies == numbered(0, 50)


def verdict(answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), answer
    [lane] = decode_push_answer(body, 1)
    return lane.verdict


def test_a_request_that_comes_after_its_repeat_changes_nothing(nodes: Pair, inbox: Inbox) -> None:
    consumer = Consumer(inbox, "late")
    nodes.proxy.keep_pushes(1)
    with nodes.hamburg.outbox() as outbox:
        outbox.send_many(numbered(0, 10), to="berlin", channel="late")
        consumer.wait_for(10)  # sent again by itself
        [late] = nodes.proxy.pushes
        assert verdict(nodes.proxy.repeat(late)) == "conflict"
        outbox.send_many(numbered(10, 10), to="berlin", channel="late")
        consumer.wait_for(20)
    nodes.wait_delivered()
    assert consumer.take() == 0
    assert consumer.bodies == numbered(0, 20)


def test_a_long_way_that_is_cut_again_and_again_keeps_order_and_loses_nothing(
    nodes: Pair, inbox: Inbox
) -> None:
    consumer = Consumer(inbox, "far")
    nodes.proxy.delay_s = 0.1
    cuts = nodes.proxy.cuts
    with nodes.hamburg.outbox() as outbox, nodes.proxy.cut_every(1.5):
        for part in range(20):
            outbox.send_many(numbered(50 * part, 50), to="berlin", channel="far")
            consumer.take(0.2)
        consumer.wait_for(1000, 60)
    assert nodes.proxy.cuts > cuts
    nodes.proxy.delay_s = 0
    nodes.wait_delivered()
    assert consumer.take() == 0
    assert consumer.bodies == numbered(0, 1000)


# -- out of reach --------------------------------------------------------------------------------


def test_after_an_outage_a_word_from_the_peer_ends_the_wait_at_once(
    nodes: Pair, inbox: Inbox
) -> None:
    hamburg, berlin = nodes.hamburg, nodes.berlin
    consumer = Consumer(inbox, "outage")
    with nodes.proxy.gone():
        with hamburg.outbox() as outbox:
            outbox.send_many(numbered(0, 500), to="berlin", channel="outage")

        def long_wait() -> bool:
            return (about(hamburg)["next_try_s"] or 0) > 5

        wait_until(long_wait, "hamburg waits longer and longer", 60)
        shown = about(hamburg)
        assert (shown["state"], shown["queued"]) == ("throttled", 500)
        assert "Could not connect" in shown["last_error"]
    began = time.monotonic()
    with berlin.outbox() as outbox:
        outbox.send(b"I am back", to="hamburg")
    consumer.wait_for(500)
    assert time.monotonic() - began < 4  # the wait would have lasted longer
    assert consumer.bodies == numbered(0, 500)


def test_of_several_addresses_the_one_that_works_is_used(nodes: Pair, inbox: Inbox) -> None:
    consumer = Consumer(inbox, "addresses")
    dead = f"http://127.0.0.1:{free_port()}"
    by_ipv6 = f"http://[::1]:{nodes.port6}"
    with changed(nodes.hamburg, "berlin", url=dead, urls=[by_ipv6]):
        with nodes.hamburg.outbox() as outbox:
            outbox.send_many(numbered(0, 20), to="berlin", channel="addresses")
        consumer.wait_for(20)
        wait_until(lambda: about(nodes.hamburg)["address"] == by_ipv6, "the second one is shown")
        assert about(nodes.hamburg)["state"] == "open"
    assert consumer.bodies == numbered(0, 20)


def test_dead_silent_and_refusing_peers_do_not_delay_a_live_one(nodes: Pair, inbox: Inbox) -> None:
    hamburg = nodes.hamburg

    def latency_s() -> float:
        samples = []
        with hamburg.outbox() as outbox:
            for number in range(40):
                began = time.monotonic()
                outbox.send(b"%d" % number, to="berlin", channel="live")
                [message] = inbox.receive("live", wait_s=20)
                samples.append(time.monotonic() - began)
                assert message.body == b"%d" % number
                message.ack()
        return statistics.median(samples)

    alone_s = latency_s()
    with ExitStack() as stack:
        silent, failing, busy = Silence(), Refusing(500), Refusing(503, 30)
        for server in (silent, failing, busy):
            stack.callback(server.close)
        urls = {
            "dead": f"http://127.0.0.1:{free_port()}",
            "silent": silent.url,
            "failing": failing.url,
            "busy": busy.url,
        }
        for name, url in urls.items():
            hamburg.ctl("peer", "add", name, url)
            stack.callback(hamburg.ctl, "peer", "remove", name)
        with hamburg.outbox() as outbox:
            for name in urls:
                for channel in range(10):
                    outbox.send_many([b"x" * KIB] * 100, to=name, channel=f"c{channel}")
        wait_until(lambda: silent.asked and failing.asked and busy.asked, "all are tried")
        beside_s = latency_s()
        wait_until(lambda: "503" in (about(hamburg, "busy")["last_error"] or ""), "503 is shown")
        shown = hamburg.status()["peers"]
        assert {shown[name]["queued"] for name in urls} == {1000}
        assert shown["busy"]["next_try_s"] > 20
        assert busy.asked <= 5  # what was under way when it said so
        assert shown["dead"]["state"] in ("throttled", "probing")
        assert shown["failing"]["last_error"]
    # Generous, for a busy machine: one connection waited for would cost seconds.
    assert beside_s < max(10 * alone_s, 0.2), (alone_s, beside_s)


# -- as an operator wants it ---------------------------------------------------------------------


def test_a_node_that_listens_nowhere_sends_to_itself(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", "bremen", env={"DROPRD_RECEIVER__LISTEN": ""})
    try:
        node.start()
        assert node.status()["listen"] == []
        with node.outbox() as outbox, node.inbox() as inbox:
            outbox.send_many(numbered(0, 10), to="bremen")
            messages = inbox.receive("common", wait_s=20)
            assert [message.body for message in messages] == numbered(0, 10)
            assert {message.sender for message in messages} == {"bremen"}
            inbox.ack(messages)
    finally:
        node.close()


def test_a_paused_channel_waits_while_others_go_on(nodes: Pair, inbox: Inbox) -> None:
    hamburg = nodes.hamburg
    held, other = Consumer(inbox, "held"), Consumer(inbox, "not-held")
    hamburg.ctl("pause", "berlin/held")
    with hamburg.outbox() as outbox:
        outbox.send_many(numbered(0, 10), to="berlin", channel="held")
        outbox.send_many(numbered(0, 10), to="berlin", channel="not-held")
        other.wait_for(10)
    wait_until(lambda: about(hamburg)["queued"] == 10, "only the paused channel waits")
    assert held.take() == 0
    hamburg.ctl("resume", "berlin/held")
    held.wait_for(10)
    assert held.bodies == numbered(0, 10)


def test_a_paused_peer_gets_nothing_until_it_is_resumed(nodes: Pair, inbox: Inbox) -> None:
    hamburg = nodes.hamburg
    consumer = Consumer(inbox, "paused")
    hamburg.ctl("pause", "berlin", "--reason", "berlin moves")
    with hamburg.outbox() as outbox:
        outbox.send_many(numbered(0, 10), to="berlin", channel="paused", priority=0)
    wait_until(lambda: about(hamburg)["queued"] == 10, "they wait")
    assert about(hamburg)["state"] == "paused"
    assert "berlin moves" in why(hamburg)
    assert consumer.take() == 0
    hamburg.ctl("resume", "berlin")
    consumer.wait_for(10)


# -- limits --------------------------------------------------------------------------------------


def test_a_full_receiver_lets_the_sender_wait_and_goes_on_once_consumed(
    nodes: Pair, inbox: Inbox
) -> None:
    hamburg, berlin = nodes.hamburg, nodes.berlin
    consumer = Consumer(inbox, "full")
    bodies = [b"%d" % number + bytes(30 * KIB) for number in range(28)]
    with changed(berlin, "hamburg", quota_bytes=500 * KIB):
        with hamburg.outbox() as outbox:
            for body in bodies:
                outbox.send(body, to="berlin", channel="full")
        wait_until(lambda: "507" in (about(hamburg)["last_error"] or ""), "hamburg is told so")
        shown = about(hamburg)
        assert shown["state"] in ("throttled", "probing")
        assert 0 < shown["queued"] <= len(bodies)
        assert shown["next_try_s"] is None or shown["next_try_s"] > 1
        wait_until(lambda: berlin.status()["receiver"]["full"], "berlin says so itself")
        assert berlin.status()["receiver"]["refused"]["no_room"] > 0

        def all_there() -> bool:
            consumer.take(0.2)
            if berlin.status()["receiver"]["full"]:
                return False
            hamburg.ctl("retry", "berlin")  # it was told to wait some seconds
            return len(consumer.bodies) == len(bodies)

        wait_until(all_there, "what was consumed made room for the rest", 60)
    assert consumer.bodies == bodies
    nodes.wait_delivered()


def test_a_channel_that_is_not_permitted_makes_dead_letters_and_others_go_on(
    nodes: Pair, inbox: Inbox
) -> None:
    hamburg = nodes.hamburg
    consumer = Consumer(inbox, "permitted")
    dead = hamburg.status()["dead_letters"]
    with changed(nodes.berlin, "hamburg", channels=["permitted"]):
        with hamburg.outbox() as outbox:
            outbox.send_many(numbered(0, 3), to="berlin", channel="forbidden")
            outbox.send_many(numbered(0, 3), to="berlin", channel="permitted")
        consumer.wait_for(3)
        nodes.wait_delivered()
    wait_until(lambda: hamburg.status()["dead_letters"] == dead + 3, "three dead letters")
    assert dead_reasons(hamburg, "forbidden") == ["channel not permitted"] * 3
    assert not (nodes.berlin.spool / "inbox" / "channels" / "forbidden").exists()
    # From now on the channel is permitted, and its lane goes on.
    with hamburg.outbox() as outbox:
        outbox.send(b"permitted now", to="berlin", channel="forbidden")
    [message] = inbox.receive("forbidden", wait_s=20)
    assert message.body == b"permitted now"
    message.ack()


def test_a_message_that_is_too_large_is_a_dead_letter_and_its_lane_goes_on(
    nodes: Pair, inbox: Inbox
) -> None:
    hamburg = nodes.hamburg
    consumer = Consumer(inbox, "sizes")
    dead = hamburg.status()["dead_letters"]
    with changed(nodes.berlin, "hamburg", max_message_bytes=2000):
        with hamburg.outbox() as outbox:
            outbox.send_many([b"a", b"b" * 2001, b"c"], to="berlin", channel="sizes")
            outbox.send(b"d" * 100_000, to="berlin", channel="sizes")  # a blob
            outbox.send(b"e" * 2000, to="berlin", channel="sizes")
        consumer.wait_for(3)
        nodes.wait_delivered()
    assert consumer.bodies == [b"a", b"c", b"e" * 2000]
    wait_until(lambda: hamburg.status()["dead_letters"] == dead + 2, "two dead letters")
    assert dead_reasons(hamburg, "sizes") == ["over max_message_bytes"] * 2


def dead_reasons(node: Node, channel: str) -> list[str]:
    """The reasons of the dead letters of a channel, from the file that keeps them."""
    fs = OsFs()
    fd = fs.open(str(node.spool / "outbox" / "dead.log"), os.O_RDONLY)
    try:
        header = log.read_header(fs, fd)
        found = []
        for item in log.Walk(fs, fd, header.log_id, promised=log.read_published(fs, fd)):
            assert isinstance(item, log.Entry)
            note = entry.unpack_note(item.note)
            if note["l"][1] == channel:
                found += [reason for _, reason in note["i"]]
    finally:
        fs.close(fd)
    return found


# -- large bodies --------------------------------------------------------------------------------


def test_a_file_resumes_where_it_was_cut_and_never_sits_in_memory(
    nodes: Pair, inbox: Inbox, tmp_path: Path
) -> None:
    size = 24 * MIB
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    workers = [nodes.hamburg.worker_pid("sender"), nodes.berlin.worker_pid("receiver")]
    before = [peak_bytes(pid) for pid in workers]
    passed = nodes.proxy.passed_up
    refused = nodes.berlin.status()["receiver"]["refused"]
    nodes.proxy.cut_after(16 * MIB)
    with nodes.hamburg.outbox() as outbox:
        outbox.send_file(tmp_path / "file", to="berlin", channel="files")
    [message] = inbox.receive("files", wait_s=60)
    assert message.body == content
    message.ack()
    assert not nodes.proxy.is_cut_due

    def is_counted() -> bool:
        now = Counter(nodes.berlin.status()["receiver"]["refused"])
        now.subtract(refused)
        return now["broken_off"] > 0 and now["no_room"] == 0

    wait_until(is_counted, "the cut is counted as what it was")
    # From its start again it would have been 40 MiB.
    assert nodes.proxy.passed_up - passed < size + 8 * MIB
    grown = [peak_bytes(pid) - peak for pid, peak in zip(workers, before, strict=True)]
    assert max(grown) < size // 2, grown


def peak_bytes(pid: int) -> int:
    """The most memory a process has ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("no VmHWM")
