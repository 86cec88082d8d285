"""Real nodes over bad lines: slow, cut, refusing. Two network namespaces; root is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.testing.node import Node, wait_until

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "ss"))),
    reason="network namespaces want root, and ip, tc, ss of iproute2",
)

FRAME_BYTES = 32 * 1024
NEAR, FAR = "10.99.7.1", "10.99.7.2"


def command(line: str) -> None:
    subprocess.run(line.split(), check=True, capture_output=True)


class LineNode(Node):
    """A node in a network namespace of its own, which listens on that namespace's address."""

    def __init__(self, directory: Path, name: str, namespace: str, address: str) -> None:
        self.address = address
        super().__init__(
            directory,
            name,
            prefix=("ip", "netns", "exec", namespace),
            env={"DROPRD_RECEIVER__ALLOW_PLAIN_HTTP": "true"},
        )

    @property
    def listen(self) -> str:
        return f"{self.address}:{self.port}"

    def ctl(
        self,
        *args: str,
        stdin: bytes | None = None,
        check: bool = True,
        at: bool = True,
        within_s: float = 120,
    ) -> subprocess.CompletedProcess[bytes]:
        if args[0] == "init":
            args = (*args, "--allow-plain-http")
        return super().ctl(*args, stdin=stdin, check=check, at=at, within_s=within_s)


@dataclass
class Line:
    """A line between two namespaces."""

    near: str
    far: str
    cuts: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def slow_down(self, rate: str) -> None:
        """Let no more than `rate` through, each way."""
        for namespace, device in ((self.near, "near"), (self.far, "far")):
            command(
                f"ip netns exec {namespace} tc qdisc replace dev {device} root "
                f"tbf rate {rate} burst 4kb latency 3s"
            )

    def cut(self) -> None:
        """Reset every connection over the line; new ones may come at once."""
        command(f"ip netns exec {self.near} ss -K dst {FAR}")
        self.cuts += 1

    @contextmanager
    def cut_every(self, seconds: float) -> Iterator[None]:
        """Cut it again and again."""

        def cutting() -> None:
            while not self._over.wait(seconds):
                self.cut()

        thread = threading.Thread(target=cutting)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


@pytest.fixture
def line() -> Iterator[Line]:
    near, far = f"droprd-a{os.getpid()}", f"droprd-b{os.getpid()}"
    try:
        for namespace in (near, far):
            command(f"ip netns add {namespace}")
            command(f"ip -n {namespace} link set lo up")
        command(f"ip -n {near} link add near type veth peer name far netns {far}")
        command(f"ip -n {near} addr add {NEAR}/24 dev near")
        command(f"ip -n {far} addr add {FAR}/24 dev far")
        command(f"ip -n {near} link set near up")
        command(f"ip -n {far} link set far up")
        yield Line(near, far)
    finally:
        for namespace in (near, far):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


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


def take(inbox: Inbox, channel: str, wait_s: float) -> list[bytes]:
    messages = inbox.receive(channel, wait_s=wait_s)
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
    with near.outbox() as outbox, far.inbox() as inbox, line.cut_every(10):
        for number, body in enumerate(backlog):
            outbox.send(body, to="berlin", channel=f"bulk{number % 3}")
        for number in range(5):
            # At another moment between two cuts each time.
            threading.Event().wait(7.3)
            began = time.monotonic()
            outbox.send(b"urgent %d" % number, to="berlin", channel="alarm", priority=0)
            got = take(inbox, "alarm", 20)
            late.append(time.monotonic() - began)
            assert got == [b"urgent %d" % number]
        arrived: dict[str, list[bytes]] = {}

        def all_there() -> bool:
            for channel in ("bulk0", "bulk1", "bulk2"):
                arrived.setdefault(channel, []).extend(take(inbox, channel, 0))
            return sum(map(len, arrived.values())) == len(backlog)

        wait_until(all_there, "the backlog arrives", 180)
    assert line.cuts >= 3
    print("urgent messages took", [round(seconds, 1) for seconds in late])
    assert max(late) < 10, late
    for number in range(3):
        assert arrived[f"bulk{number}"] == backlog[number::3]
