"""An inbox store of another installed package: the rules on it, and a real receiver with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from droprd.client.inbox import Inbox
from droprd.core import rpc
from droprd.errors import ConfigError
from droprd.model import GENESIS
from droprd.settings.values import Settings
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.inbox import InboxStore
from droprd.spool.judging import Limits
from droprd.spool.layout import Layout, read_version
from droprd.spool.plugins import inbox_plugin
from droprd.spool.store import InboxWriter
from droprd.testing.pushing import after, blob_frame_of, frame_of
from droprd.testing.receiversuite import ReceiverSuite
from tests.spools import new_spool
from tests.system.test_receiver import Peer, Sent

PLUGIN = Path(__file__).with_name("tins.py")
FS = OsFs()
WITHIN_S = 15.0


def install(where: Path) -> Path:
    """Lay the package out as an installer does: its module, and what it offers in a dist-info."""
    info = where / "droprd_tins-1.0.dist-info"
    info.mkdir(parents=True)
    (where / "tins.py").write_bytes(PLUGIN.read_bytes())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: droprd-tins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[droprd.inboxes]\ntins = tins\nbroken = tins:nothing\nhalf = tins:open_tins\n"
    )
    return where


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    where = install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(where))
    monkeypatch.delitem(sys.modules, "tins", raising=False)
    yield where
    sys.modules.pop("tins", None)


class Tins:
    def __init__(self, root: Path) -> None:
        self._plugin = inbox_plugin("tins")
        self._clock = SystemClock()
        self._spool = Spool(FS, self._clock, os.urandom, Layout(str(root)), b"R" * 16)

    def open_writer(self, limits: Limits) -> InboxWriter:
        return self._plugin.open_writer(self._spool, limits)

    def open_consumer(self) -> InboxStore:
        return self._plugin.open_consumer(FS, self._clock, os.urandom, self._spool.layout.root)

    def kill_writer(self, writer: InboxWriter) -> None:
        pass  # what it had in memory is never looked at again

    def tend(self) -> None:
        pass


@pytest.mark.usefixtures("installed")
class TestTinWriter(ReceiverSuite):
    def make(self, tmp_path: Path) -> Tins:
        return Tins(tmp_path / "spool")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["broken", "half", "missing"])
def test_a_store_that_cannot_be_used_is_a_fault_of_the_configuration(name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        inbox_plugin(name)
    assert caught.value.code == "store_missing"


class Node:
    """A node whose inbox is the other package's; this test is the angel of its workers."""

    def __init__(self, path: Path, installed: Path) -> None:
        self.layout = new_spool(path / "spool", "hamburg", node="berlin")
        self._spool_id = read_version(FS, self.layout.root).spool_id
        token = path / "hamburg.token"
        token.write_text("token-of-hamburg\n")
        self._settings = Settings.from_dict(
            {
                "node": {"name": "berlin", "spool": self.layout.root},
                "peers": {"hamburg": {"token_file": str(token)}},
                "inbox": {"store": "tins"},
            }
        ).to_dict()
        root = Path(__file__).parents[2]
        self._environment = {**os.environ, "PYTHONPATH": f"{installed}:{root}"}
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listening.getsockname()[1])
        self._links: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, worker: str, *, until: str) -> Any:
        """Start a worker. Returns what it tells with its first notification `until`."""
        ours, theirs = socket.socketpair()
        listen = self.listening.fileno()
        arguments = ["--link", str(theirs.fileno()), "--listen", str(listen)]
        process = subprocess.Popen(
            [sys.executable, "-m", f"droprd.workers.{worker}", *arguments],
            pass_fds=[theirs.fileno(), listen],
            env=self._environment,
        )
        theirs.close()
        self._processes.append(process)
        self._links.append(ours)
        facts = {
            "node": "berlin",
            "spool_id": self._spool_id,
            "listeners": [{"fd": listen, "address": f"127.0.0.1:{self.port}"}],
        }
        params = {"settings": self._settings, "generation": 1, "facts": facts}
        ours.sendall(rpc.encode(rpc.Request(0, "configure", params)))
        ours.settimeout(WITHIN_S)
        decoder = rpc.Decoder()
        while True:
            data = ours.recv(65536)
            assert data, "the worker is gone"
            for message in decoder.feed(data):
                if isinstance(message, rpc.Notification) and message.method == until:
                    return message.params

    def kill(self) -> None:
        """Kill all that runs."""
        for process in self._processes:
            process.kill()
            process.wait(WITHIN_S)
        for link in self._links:
            link.close()
        self._processes, self._links = [], []


@pytest.fixture
def node(tmp_path: Path, installed: Path) -> Iterator[Node]:
    node = Node(tmp_path, installed)
    yield node
    node.kill()
    node.listening.close()


def test_a_receiver_stores_into_it_and_an_inbox_receives_from_it(
    node: Node, tmp_path: Path
) -> None:
    config = tmp_path / "droprd.toml"
    config.write_text('[node]\nname = "berlin"\nspool = "spool"\n[inbox]\nstore = "tins"\n')
    node.start("receiver", until="ready")
    sent = [frame_of([b"one", b"two"]), frame_of([b"three"])]
    large = blob_frame_of(os.urandom(200_000))
    wire = [Sent(one.frame_id, one.data, one.count) for one in (*sent, large)]
    peer = Peer(node.port)
    head = peer.push(GENESIS, *wire[:2]).head
    assert head == after(GENESIS, sent)
    with Inbox(config=config) as inbox:
        messages = inbox.receive("sites")
        assert [(m.body, m.sender) for m in messages] == [
            (b"one", "hamburg"),
            (b"two", "hamburg"),
            (b"three", "hamburg"),
        ]
        inbox.ack(messages[:2])
        assert peer.put(wire[2], large.blob, 0, len(large.blob)) == (200, len(large.blob))
        node.kill()
        node.start("receiver", until="ready")
        peer = Peer(node.port)
        assert peer.push(GENESIS, *wire[:2]).verdict == "conflict"
        assert peer.push(head, wire[2]).verdict == "ok"
        (last,) = inbox.receive("sites", wait_s=WITHIN_S)
        assert last.body == large.blob
        last.ack()
    with Inbox(config=config) as another:
        assert [m.body for m in another.receive("sites")] == [b"three"]
    assert os.listdir(node.layout.channels) == []


def test_the_janitor_leaves_an_inbox_alone_that_is_not_of_files(node: Node) -> None:
    left = f"{node.layout.waiting}/{'a' * 32}-{'0' * 16}"
    os.mkfifo(left)  # as a dead consumer of files leaves it
    gauges = node.start("janitor", until="gauges")
    assert gauges["gauges"]["channels"] == {}
    assert os.path.exists(left)
