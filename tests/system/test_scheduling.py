"""Real nodes over bad lines: slow, and cut again and again. A file over one: test_slow_line."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.testing.node import Node, wait_until
from tests.system.lossyproxy import LossyProxy
from tests.system.netns import FAR, NEAR, Line, LineNode, needs_namespaces, two_namespaces

FRAME_BYTES = 32 * 1024


@pytest.fixture
def line() -> Iterator[Line]:
    with two_namespaces() as line:
        yield line


@pytest.fixture
def nodes(line: Line, tmp_path: Path) -> Iterator[tuple[LineNode, LineNode]]:
    near = LineNode(tmp_path / "hamburg", "hamburg", line.near, NEAR)
    far = LineNode(tmp_path / "berlin", "berlin", line.far, FAR)
    near.knows(far, "--allow-plain-http")
    try:
        near.start(wait=False)
        far.start(wait=False)
        near.wait_running()
        far.wait_running()
        yield near, far
    finally:
        near.close()
        far.close()


def take(inbox: Inbox, channel: str, wait_s: float = 0) -> list[bytes]:
    messages = inbox.receive(channel, wait_s=wait_s, max_messages=1000)
    inbox.ack(messages)
    return [bytes(message.body) for message in messages]


@pytest.mark.slow
@pytest.mark.root
@needs_namespaces
def test_the_backlog_drains_over_64_kbit_cut_every_ten_seconds_and_urgent_messages_pass(
    line: Line, nodes: tuple[LineNode, LineNode]
) -> None:
    near, far = nodes
    line.slow_down("64kbit")
    backlog = [os.urandom(FRAME_BYTES) for _ in range(9)]
    late = []
    arrived: dict[str, list[bytes]] = {}
    with near.outbox() as outbox, far.inbox() as inbox, line.cut_every(10):
        for number, body in enumerate(backlog):
            outbox.send(body, to="berlin", channel=f"bulk{number % 3}")
        for number in range(5):
            # At another moment between two cuts each time.
            threading.Event().wait(7.3)
            began = time.monotonic()
            outbox.send(b"urgent %d" % number, to="berlin", channel="alarm", priority=0)
            assert take(inbox, "alarm", 20) == [b"urgent %d" % number]
            late.append(time.monotonic() - began)

        def all_there() -> bool:
            for channel in ("bulk0", "bulk1", "bulk2"):
                arrived.setdefault(channel, []).extend(take(inbox, channel))
            return sum(map(len, arrived.values())) >= len(backlog)

        wait_until(all_there, "the backlog arrives", 180)
    assert line.cuts >= 3
    print("urgent messages took", [round(seconds, 1) for seconds in late])
    assert max(late) < 10, late
    assert arrived == {f"bulk{number}": backlog[number::3] for number in range(3)}


def test_a_line_that_is_cut_several_times_a_second_loses_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    near, far = Node(tmp_path / "hamburg", "hamburg"), Node(tmp_path / "berlin", "berlin")
    proxy = LossyProxy(far.port)
    token = near.ctl("peer", "add", "berlin", proxy.url).stdout
    far.ctl("peer", "add", "hamburg", near.url, "--token-file", "-", stdin=token)
    sent: dict[str, list[bytes]] = {channel: [] for channel in ("a", "b", "c")}
    got: dict[str, list[bytes]] = {channel: [] for channel in sent}
    try:
        near.start()
        far.start()
        proxy.delay_s = 0.003
        with near.outbox() as outbox, far.inbox() as inbox, proxy.cut_every(0.11):
            for number in range(60):
                for channel, bodies in sent.items():
                    some = [f"{channel}{number}.{i} ".encode() * 200 for i in range(20)]
                    outbox.send_many(some, to="berlin", channel=channel)
                    bodies += some
            large = os.urandom(500_000)
            outbox.send(large, to="berlin", channel="a")
            sent["a"].append(large)

            def all_there() -> bool:
                for channel, bodies in got.items():
                    bodies += take(inbox, channel)
                return sum(map(len, got.values())) >= sum(map(len, sent.values()))

            wait_until(all_there, "all arrives", 120)
        assert got == sent
        assert proxy.cuts > 3
        wait_until(lambda: near.queued("berlin") == 0, "all is known to be delivered")
    finally:
        near.close()
        far.close()
        proxy.close()
