"""A real line between two nodes, in the kernel: slow and cut again and again, or silent.

A backlog of small messages over such a line is the matter of test_scheduling; here a file travels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.model import KIB
from droprd.testing.node import wait_until
from tests.system.netns import FAR, NEAR, Line, LineNode, needs_namespaces, two_namespaces

pytestmark = [needs_namespaces, pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    with two_namespaces() as line:
        yield line


@pytest.fixture(scope="module")
def nodes(
    line: Line, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LineNode, LineNode]]:
    directory = tmp_path_factory.mktemp("line")
    near = LineNode(directory / "hamburg", "hamburg", line.near, NEAR)
    far = LineNode(directory / "berlin", "berlin", line.far, FAR)
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
    return [message.body for message in messages]


def test_a_silent_line_is_noticed_and_what_waits_goes_out_soon_after_it_is_back(
    line: Line, nodes: tuple[LineNode, LineNode]
) -> None:
    hamburg, berlin = nodes
    with hamburg.outbox() as outbox, berlin.inbox() as inbox:
        outbox.send(b"before", to="berlin", channel="alarm")
        assert take(inbox, "alarm", 20) == [b"before"]
        with line.silent():
            sent = [b"%d" % number for number in range(100)]
            outbox.send_many(sent, to="berlin", channel="alarm")
            wait_until(lambda: hamburg.queued("berlin") == 100, "all of them wait")
            assert take(inbox, "alarm", 5) == []
        got: list[bytes] = []

        def all_there() -> bool:
            got.extend(take(inbox, "alarm", 1))
            return len(got) >= len(sent)

        # TCP itself waits as long as it has waited before, doubled; then all goes out.
        wait_until(all_there, "what waited arrives", 20)
        assert got == sent


def _is_cut(line: Line, count: int) -> bool:
    return line.cuts >= count


def test_a_file_arrives_over_64_kbit_cut_every_ten_seconds_and_urgent_messages_pass_it(
    line: Line, nodes: tuple[LineNode, LineNode], tmp_path: Path
) -> None:
    hamburg, berlin = nodes
    line.slow_down("64kbit")
    content = os.urandom(100 * KIB)  # thirteen seconds, if nothing were cut
    (tmp_path / "file").write_bytes(content)
    late = []
    cuts = line.cuts
    with hamburg.outbox() as outbox, berlin.inbox() as inbox, line.cut_every(10):
        outbox.send_file(tmp_path / "file", to="berlin", channel="files")
        for number in range(2):
            # Once beside the first bytes, then each time right after a cut.
            wait_until(partial(_is_cut, line, cuts + number), "the line was cut", 30)
            began = time.monotonic()
            outbox.send(b"%d" % number, to="berlin", channel="urgent", priority=0)
            assert take(inbox, "urgent", 30) == [b"%d" % number]
            late.append(time.monotonic() - began)
        assert inbox.receive("files") == []
        messages = inbox.receive("files", wait_s=120)
        assert messages[0].body == content
        messages[0].ack()
    assert line.cuts > cuts
    assert max(late) < 10, late
