"""What real processes log: JSON on request, and no flood when something fails again and again."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd import logs
from droprd.testing.node import Node, wait_until
from tests.system.angelbox import AngelBox, eventually

CRASHES = """
    import sys
    sys.exit(1)
"""
SECRET = b"site 4711 has changed"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "hamburg", "hamburg", settings='[log]\nformat = "json"\nlevel = "debug"')
    yield made
    made.close()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[AngelBox]:
    made = AngelBox(tmp_path)
    yield made
    made.end()


class Refusing:
    """A peer that hangs up on everybody, and counts them."""

    def __init__(self) -> None:
        self.calls = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._listening.accept()[0].close()
                self.calls += 1


def test_a_peer_that_fails_again_and_again_does_not_flood_the_log(node: Node) -> None:
    peer = Refusing()
    token = node.ctl("peer", "add", "berlin", peer.url).stdout.decode()
    node.start()
    with node.outbox() as outbox:
        outbox.send(SECRET, to="berlin", headers={"private": "do not log"})

    def tried_often() -> bool:
        node.ctl("retry", "berlin")
        return peer.calls > 20

    wait_until(tried_often, "twenty tries", 60)
    node.stop()
    lines = [json.loads(line) for line in node.log.read_text().splitlines() if line[:1] == "{"]
    about = [line for line in lines if line.get("peer") == "berlin"]
    # That it is not reached is told once; the rest are operators' commands.
    assert [line["event"] for line in about].count("peer not reached") == 1
    assert len(about) <= 3, about
    for line in lines:
        assert list(line)[:2] == ["time", "level"]
        assert {"process", "event"} <= set(line)
    text = node.log.read_text()
    assert "4711" not in text
    assert "do not log" not in text
    assert token.strip() not in text


def test_a_crash_loop_does_not_flood_the_log(box: AngelBox) -> None:
    box.worker("janitor", CRASHES)
    box.configure(backoff_max_s=1)
    box.start(ready=False)
    crashes = logs.LINES_MAX + 3
    eventually(lambda: box.of("janitor").get("restarts", 0) >= crashes, "many crashes", 60)
    about = [line for line in box.log.splitlines() if "worker=janitor" in line]
    ended = [line for line in about if 'event="worker ended"' in line]
    assert len(ended) == logs.LINES_MAX
    assert "code=1" in ended[0]
