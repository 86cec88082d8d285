"""A receiver in its own process, as an angel starts it: what it answers is what is on its disk."""

from __future__ import annotations

import hashlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from droprd.core import ask, chain, entry, frame, rpc
from droprd.core.push import LaneAnswer, LanePush, Push, decode_push_answer, encode_push
from droprd.model import GENESIS, Head, Lane
from droprd.settings.values import Settings
from droprd.spool import log
from droprd.spool.bells import WaitingBell
from droprd.spool.fsops import OsFs
from droprd.spool.hearsay import read_bell
from droprd.spool.layout import Layout, make_spool

FS = OsFs()
SENDER = b"S" * 16
WITHIN_S = 15.0


@dataclass
class Sent:
    frame_id: bytes
    data: bytes
    count: int = 1


def make(*bodies: bytes, channel: str = "sites", blob: bytes | None = None) -> Sent:
    frame_id = frame.new_frame_id(1, os.urandom(10))
    lane, stamp = Lane("berlin", channel, 5), frame.Stamp(b"B" * 16, 1, 2)
    if blob is None:
        pieces = frame.build(frame_id=frame_id, lane=lane, stamp=stamp, bodies=bodies)
        return Sent(frame_id, b"".join(pieces), len(bodies))
    pieces = frame.build_blob(
        frame_id=frame_id,
        lane=lane,
        stamp=stamp,
        blob_bytes=len(blob),
        blob_crc=crc32(blob),
        shared=frame.pack_map({"d": hashlib.sha256(blob).digest()}),
    )
    return Sent(frame_id, b"".join(pieces))


def after(head: Head, sent: Sequence[Sent]) -> Head:
    return chain.advance(head, [(one.frame_id, one.count) for one in sent])


def push_body(head: Head, sent: Sequence[Sent], channel: str = "sites") -> bytes:
    data = b"".join(
        entry.pack_entry(b"L" * 16, 9999, 5000, b"", len(one.data)) + one.data for one in sent
    )
    lane = LanePush(channel, 5, head, len(sent), len(data))
    return encode_push(Push(SENDER, (lane,))) + data


class Peer:
    """One connection of a sending node."""

    def __init__(self, port: int, token: str = "token-of-hamburg") -> None:
        self._port = port
        self._headers = {"Authorization": f"Bearer {token}", "Droprd-Version": "1"}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WITHIN_S)

    def request(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        try:
            self._connection.request(method, path, body, self._headers)
            reply = self._connection.getresponse()
            return reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def push(self, head: Head, *sent: Sent, channel: str = "sites") -> LaneAnswer:
        status, body = self.request("POST", "/v1/push", push_body(head, sent, channel))
        assert status == 200, body
        return decode_push_answer(body, 1)[0]

    def put(self, one: Sent, piece: bytes, offset: int, size: int) -> tuple[int, int]:
        path = f"/v1/blobs/{SENDER.hex()}/{one.frame_id.hex()}?offset={offset}&size={size}"
        status, body = self.request("PUT", path, piece)
        return status, ask.decode_blob_answer(body)


class Receiver:
    """The worker, with this test as its angel. The listening socket outlives it."""

    def __init__(self, path: Path) -> None:
        self.layout = Layout(str(path / "spool"))
        self.spool_id = make_spool(FS, self.layout.root, os.urandom).spool_id
        self.peers: dict[str, dict[str, Any]] = {}
        for name in ("hamburg", "bremen"):
            token = path / f"{name}.token"
            token.write_text(f"token-of-{name}\n")
            self.peers[name] = {"token_file": str(token)}
        self.inbox: dict[str, Any] = {}
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None

    def settings(self) -> dict[str, Any]:
        return Settings.from_dict(
            {
                "node": {"name": "berlin", "spool": self.layout.root},
                "peers": self.peers,
                "inbox": self.inbox,
            }
        ).to_dict()

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        listen = self._listening.fileno()
        arguments = ["--link", str(theirs.fileno()), "--listen", str(listen)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "droprd.workers.receiver", *arguments],
            pass_fds=[theirs.fileno(), listen],
        )
        theirs.close()
        facts = {
            "node": "berlin",
            "spool_id": self.spool_id,
            "listeners": [{"fd": listen, "address": f"127.0.0.1:{self.port}"}],
        }
        params = {"settings": self.settings(), "generation": 1, "facts": facts}
        self._link = ours
        self._decoder = rpc.Decoder()
        ours.sendall(rpc.encode(rpc.Request(0, "configure", params)))
        self.wait_for("ready")

    def wait_for(self, method: str) -> Any:
        """The next notification of that name, or the answer to a request (its id as text)."""
        assert self._link is not None
        self._link.settimeout(WITHIN_S)
        while True:
            data = self._link.recv(65536)
            assert data, "the receiver is gone"
            for message in self._decoder.feed(data):
                if isinstance(message, rpc.Notification) and message.method == method:
                    return message.params
                if isinstance(message, rpc.Response) and str(message.id) == method:
                    return message

    def reload(self) -> Any:
        assert self._link is not None
        self._link.sendall(rpc.encode(rpc.Request(7, "reload", {"settings": self.settings()})))
        return self.wait_for("7")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        if self._link is not None:
            self._link.close()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(WITHIN_S)
        if self._link is not None:
            self._link.close()
        return code

    def stored(self, channel: str = "sites") -> list[bytes]:
        """The ids of the frames that a consumer may read, in order."""
        directory = self.layout.stream(channel, 5)
        ids = []
        for name in sorted(n for n in os.listdir(directory) if n.endswith(".log")):
            fd = FS.open(f"{directory}/{name}", os.O_RDONLY)
            end = log.read_published(FS, fd)
            header = log.read_header(FS, fd)
            for item in log.Walk(FS, fd, header.log_id, promised=end, stop=end):
                assert isinstance(item, log.Entry)
                ids.append(frame.parse(item.frame).frame_id)
            FS.close(fd)
        return ids


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path)
    receiver.start()
    yield receiver
    if receiver.process is not None and receiver.process.poll() is None:
        receiver.kill()


def test_what_is_answered_survives_a_kill(node: Receiver) -> None:
    head = GENESIS
    sent: list[Sent] = []
    for _ in range(5):
        peer = Peer(node.port)
        for _ in range(10):
            sent.append(make(os.urandom(100)))
            answer = peer.push(head, sent[-1])
            assert answer.verdict == "ok"
            head = answer.head
        node.kill()
        node.start()
    assert Peer(node.port).push(head).head == after(GENESIS, sent)
    assert node.stored() == [one.frame_id for one in sent]


def test_a_kill_in_the_middle_of_many_pushes_loses_and_doubles_nothing(node: Receiver) -> None:
    node.inbox = {"segment_bytes_max": 1 << 16}
    node.kill()
    node.start()
    stop = threading.Event()
    sent: dict[str, list[Sent]] = {}
    heads: dict[str, Head] = {}

    def sender(channel: str) -> None:
        mine = sent[channel] = []
        heads[channel] = GENESIS
        peer = Peer(node.port)
        while not stop.is_set() or heads[channel] != after(GENESIS, mine):
            done = 0
            while after(GENESIS, mine[:done]) != heads[channel]:
                done += 1
            if not stop.is_set() and done == len(mine):
                mine.append(make(os.urandom(2000), b"x", channel=channel))
            waiting = mine[done:]
            try:
                heads[channel] = peer.push(heads[channel], *waiting, channel=channel).head
            except (OSError, http.client.HTTPException):
                stop.wait(0.01)  # the receiver is being killed

    channels = ["a", "b", "c"]
    threads = [threading.Thread(target=sender, args=(channel,)) for channel in channels]
    for thread in threads:
        thread.start()
    for _ in range(4):
        number = sum(head.number for head in heads.values()) + 40
        until(lambda number=number: sum(head.number for head in heads.values()) > number)
        node.kill()
        node.start()
    stop.set()
    for thread in threads:
        thread.join(WITHIN_S)
        assert not thread.is_alive()
    for channel in channels:
        assert node.stored(channel) == [one.frame_id for one in sent[channel]]


def until(condition: Any) -> None:
    end = time.monotonic() + WITHIN_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.005)


def test_a_conflict_names_the_head_and_a_match_what_follows(node: Receiver) -> None:
    peer = Peer(node.port)
    sent = [make(b"%d" % i) for i in range(6)]
    head = peer.push(GENESIS, *sent).head
    wrong = Head(3, b"?" * 16)
    conflict = peer.push(wrong, make(b"other"))
    assert (conflict.verdict, conflict.head) == ("conflict", head)
    asked = ask.MatchRequest(SENDER, "sites", 5, (wrong, after(GENESIS, sent[:2]), GENESIS))
    status, body = peer.request("POST", "/v1/match", ask.encode_match(asked))
    assert status == 200
    told = ask.decode_match_answer(body)
    assert (told.head, told.common) == (head, after(GENESIS, sent[:2]))
    assert [f for f, _ in told.frames] == [one.frame_id for one in sent[2:]]


def test_the_bell_of_a_waiting_consumer_rings_and_the_sender_hears(node: Receiver) -> None:
    mine = WaitingBell(FS, node.layout, os.urandom)
    other = WaitingBell(FS, node.layout, os.urandom)
    mine.hear(["sites"])
    other.hear(["elsewhere"])
    sender = os.open(node.layout.bell, os.O_RDWR | os.O_NONBLOCK)
    Peer(node.port).push(GENESIS, make(b"x"))
    assert select.select([mine.fd], [], [], WITHIN_S)[0]
    assert not select.select([other.fd], [], [], 0)[0]
    assert select.select([sender], [], [], WITHIN_S)[0]
    assert read_bell(sender) == (False, {"hamburg"})
    os.close(sender)
    mine.close()
    other.close()


def test_a_greeting_is_answered(node: Receiver) -> None:
    mine = ask.Hello("hamburg", 1, time.time_ns(), SENDER)
    status, body = Peer(node.port).request("POST", "/v1/hello", ask.encode_hello(mine))
    assert status == 200
    told = ask.decode_hello(body)
    assert (told.node, told.spool_id) == ("berlin", node.spool_id)


def test_a_blob_resumes_where_it_broke_off(node: Receiver) -> None:
    body = os.urandom(3_000_000)
    one = make(blob=body)
    peer = Peer(node.port)
    assert peer.push(GENESIS, one).need == {one.frame_id: 0}
    with socket.create_connection(("127.0.0.1", node.port)) as broken:
        path = f"/v1/blobs/{SENDER.hex()}/{one.frame_id.hex()}?offset=0&size={len(body)}"
        head = (
            f"PUT {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-of-hamburg\r\n"
            f"Droprd-Version: 1\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        broken.sendall(head.encode() + body[:1_500_000])
    # How much was read before the connection broke is the receiver's to say.
    until(lambda: peer.push(GENESIS, one).need.get(one.frame_id, 0) > 0)
    status, have = Peer(node.port).put(one, body[5:], 5, len(body))
    assert (status, 0 < have <= 1_500_000) == (409, True)
    while status == 409:
        status, have = Peer(node.port).put(one, body[have:], have, len(body))
    assert (status, have) == (200, len(body))
    assert peer.push(GENESIS, one).verdict == "ok"
    assert Path(node.layout.inbox_blob("hamburg", one.frame_id)).read_bytes() == body


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff" * 4, b"\0\0\0\0", push_body(GENESIS, [make(b"x")])[:-1] + b"?"],
    ids=["empty", "long", "no preamble", "flipped"],
)
def test_a_push_that_cannot_be_read_changes_nothing(node: Receiver, body: bytes) -> None:
    status, _ = Peer(node.port).request("POST", "/v1/push", body)
    assert status == 400
    assert os.listdir(node.layout.channels) == []
    assert Peer(node.port).push(GENESIS).head == GENESIS


def test_new_limits_and_tokens_count_after_a_reload(node: Receiver) -> None:
    peer = Peer(node.port)
    head = peer.push(GENESIS, make(b"x")).head
    node.peers["hamburg"]["channels"] = ["other"]
    node.peers["bremen"]["token_file"] += ".missing"
    assert node.reload().error is None
    assert peer.push(head, make(b"y")).refusals
    status, _ = Peer(node.port, "token-of-bremen").request("POST", "/v1/push", b"")
    assert status == 401


def test_a_full_inbox_tells_the_peer_to_wait(node: Receiver) -> None:
    node.inbox = {"quota_bytes": 10_000}
    assert node.reload().error is None
    status, _ = Peer(node.port).request(
        "POST", "/v1/push", push_body(GENESIS, [make(b"x" * 20_000)])
    )
    assert status == 507
    while not node.wait_for("gauges")["gauges"]["full"]:
        pass
    assert Peer(node.port).push(GENESIS, make(b"small")).verdict == "ok"


def test_a_stop_ends_cleanly_and_the_next_start_knows_everything(node: Receiver) -> None:
    head = Peer(node.port).push(GENESIS, make(b"x"), make(b"y")).head
    assert node.stop() == 0
    node.start()
    assert Peer(node.port).push(head, make(b"z")).verdict == "ok"
    assert node.stop() == 0
