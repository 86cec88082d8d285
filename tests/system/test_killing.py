"""Any process may be killed at any time; nothing is lost, nothing comes twice, order is kept."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import droprd
from droprd.testing.node import Node, pair, wait_until

COUNT = 4000
BATCH = 20
PACE_S = 0.02
context = multiprocessing.get_context("spawn")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    hamburg, berlin = pair(tmp_path)
    hamburg.start(wait=False)
    berlin.start(wait=False)
    hamburg.wait_running()
    berlin.wait_running()
    yield hamburg, berlin
    hamburg.close()
    berlin.close()


class Consumer(threading.Thread):
    """Takes what arrives in a channel, until it has `count` messages."""

    def __init__(self, node: Node, count: int, channel: str = "common") -> None:
        super().__init__(daemon=True)
        self._node = node
        self._count = count
        self._channel = channel
        self.bodies: list[bytes] = []
        self.stopped = threading.Event()
        self.start()

    def run(self) -> None:
        with self._node.inbox() as inbox:
            while len(self.bodies) < self._count and not self.stopped.is_set():
                messages = inbox.receive(self._channel, wait_s=1, max_messages=200)
                inbox.ack(messages)
                self.bodies += [m.body for m in messages]

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.bodies) >= count, f"{count} messages have arrived", 60)


def produce(spool: str, first: int, count: int) -> None:
    """Send numbered messages in batches, slowly enough that something happens meanwhile."""
    pace = threading.Event()
    with droprd.Outbox(spool=spool) as outbox:
        for start in range(first, first + count, BATCH):
            numbers = range(start, min(start + BATCH, first + count))
            outbox.send_many([b"%d" % n for n in numbers], to="berlin")
            pace.wait(PACE_S)


def in_background(spool: str, first: int, count: int) -> multiprocessing.context.SpawnProcess:
    process = context.Process(target=produce, args=(spool, first, count))
    process.start()
    return process


@pytest.mark.parametrize("worker", ["sender", "receiver", "janitor"])
def test_a_worker_killed_during_transfer_is_replaced_and_nothing_is_lost(
    nodes: tuple[Node, Node], worker: str
) -> None:
    hamburg, berlin = nodes
    consumer = Consumer(berlin, COUNT)
    producer = in_background(str(hamburg.spool), 0, COUNT)
    victim = hamburg if worker == "sender" else berlin
    for part in (1, 2):
        consumer.wait_for(COUNT * part // 4)
        old = victim.kill_worker(worker)
        assert victim.worker_pid(worker) != old  # waits until one runs again
    producer.join(60)
    assert producer.exitcode == 0
    consumer.wait_for(COUNT)
    assert consumer.bodies == [b"%d" % n for n in range(COUNT)]


def test_an_angel_killed_and_started_at_once_loses_nothing(nodes: tuple[Node, Node]) -> None:
    hamburg, berlin = nodes
    consumer = Consumer(berlin, COUNT)
    producer = in_background(str(hamburg.spool), 0, COUNT)
    for part, node in ((1, hamburg), (2, berlin)):
        consumer.wait_for(COUNT * part // 8)
        node.kill()
        node.start()
    producer.join(60)
    consumer.wait_for(COUNT)
    assert consumer.bodies == [b"%d" % n for n in range(COUNT)]


def test_applications_go_on_while_the_daemon_is_stopped_on_either_side(
    nodes: tuple[Node, Node],
) -> None:
    hamburg, berlin = nodes
    produce(str(hamburg.spool), 0, 100)
    wait_until(lambda: hamburg.queued("berlin") == 0, "the first hundred are delivered")
    assert berlin.stop() == 0
    consumer = Consumer(berlin, 200)
    consumer.wait_for(100)  # what had arrived is consumed with the daemon stopped
    assert hamburg.stop() == 0
    produce(str(hamburg.spool), 100, 100)
    assert hamburg.ctl("status", check=False).returncode == 3
    berlin.start()
    hamburg.start()
    consumer.wait_for(200)
    assert consumer.bodies == [b"%d" % n for n in range(200)]


def test_a_producer_killed_in_mid_send_loses_nothing_that_send_returned(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    hamburg, berlin = nodes
    returned = context.Value("q", 0)
    process = context.Process(target=_send_for_ever, args=(str(hamburg.spool), returned))
    process.start()
    wait_until(lambda: returned.value > 200, "some sends have returned")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    count = returned.value
    consumer = Consumer(berlin, count)
    consumer.wait_for(count)
    consumer.stopped.set()
    consumer.join()
    assert consumer.bodies[:count] == [b"%d" % n for n in range(count)]


def _send_for_ever(spool: str, returned: object) -> None:
    with droprd.Outbox(spool=spool) as outbox:
        number = 0
        while True:
            outbox.send(b"%d" % number, to="berlin")
            number += 1
            returned.value = number  # type: ignore[attr-defined]  # a ctypes value


def test_two_producers_that_call_each_other_are_delivered_in_the_order_of_their_sends(
    nodes: tuple[Node, Node],
) -> None:
    hamburg, berlin = nodes
    ours, theirs = context.Pipe()
    other = context.Process(target=_answer, args=(str(hamburg.spool), theirs))
    other.start()
    with hamburg.outbox() as outbox:
        for number in range(0, 400, 2):
            outbox.send(b"%d" % number, to="berlin")
            ours.send(number + 1)  # the other one sends only after our send has returned
            assert ours.poll(30)
            assert ours.recv() == number + 1
    ours.send(None)
    other.join(30)
    consumer = Consumer(berlin, 400)
    consumer.wait_for(400)
    assert consumer.bodies == [b"%d" % n for n in range(400)]


def _answer(spool: str, pipe: multiprocessing.connection.Connection) -> None:
    with droprd.Outbox(spool=spool) as outbox:
        while (number := pipe.recv()) is not None:
            outbox.send(b"%d" % number, to="berlin")
            pipe.send(number)


def test_a_consumer_killed_with_a_lease_gives_its_messages_back_at_once(
    nodes: tuple[Node, Node],
) -> None:
    hamburg, berlin = nodes
    produce(str(hamburg.spool), 0, 50)
    taken = context.Event()
    victim = context.Process(target=_take_and_hang, args=(str(berlin.spool), taken))
    victim.start()
    assert taken.wait(30)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    with berlin.inbox() as inbox:
        got: list[droprd.Message] = []

        def more() -> bool:
            got.extend(inbox.receive("common", wait_s=1))
            return len(got) >= 50

        wait_until(more, "the dead consumer's messages are leased again")
        assert {m.body for m in got} == {b"%d" % n for n in range(50)}
        assert {m.attempt for m in got} == {2}
        inbox.ack(got)


def _take_and_hang(spool: str, taken: object) -> None:
    with droprd.Inbox(spool=spool) as inbox:
        got = 0
        while got < 50:
            got += len(inbox.receive("common", wait_s=5, lease_s=3600))
        taken.set()  # type: ignore[attr-defined]  # a multiprocessing event
        signal.pause()
