"""A sender in its own process, as an angel starts it, and a far node that stores what it gets."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from droprd.core import ask, entry, frame, rpc
from droprd.core import push as pushes
from droprd.model import Lane
from droprd.net.credentials import Tokens
from droprd.net.listen import Listener
from droprd.net.service import Answer, BlobPiece, Reader, Refused, RequestKind
from droprd.settings.values import Settings
from droprd.spool.arrivals import PieceRefused
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.journal import Journal
from droprd.spool.judging import Limits, PeerLimits
from droprd.spool.layout import Layout, make_spool
from droprd.spool.puts import Put
from droprd.spool.receiver import ReceiverStore

FS = OsFs()
TOKEN = "correct-horse"


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


@dataclass
class FarNode:
    """The receiving side: the real store behind the real listener."""

    layout: Layout
    spool_id: bytes
    name: str = "berlin"
    got: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refusals: deque[Refused] = field(default_factory=deque)
    lose_answers: int = 0
    channels: frozenset[str] = frozenset()
    store: ReceiverStore | None = None

    def open(self) -> None:
        spool = Spool(FS, SystemClock(), os.urandom, self.layout, self.spool_id)
        limits = Limits(peers={"hamburg": PeerLimits(channels=self.channels)})
        self.store = ReceiverStore(spool, limits)

    def admit(self, peer: str, kind: RequestKind, length: int) -> None:
        self.requests.append(kind)
        if kind != "hello" and self.refusals:
            raise self.refusals.popleft()

    async def hello(self, peer: str, body: bytes) -> Answer:
        ask.decode_hello(body)
        wall_ns = SystemClock().wall_ns()
        return Answer(body=ask.encode_hello(ask.Hello(self.name, 1, wall_ns, self.spool_id)))

    async def push(self, peer: str, body: bytes) -> Answer:
        assert self.store is not None
        asked, parts = pushes.decode_push(body)
        for one in self.store.wanted_blobs(peer, asked, parts):
            self.store.blobs.missing(peer, one)
        pending = self.store.push(peer, asked, parts)
        self.store.commit()
        answers = self.store.answer(pending)
        for lane, part, answer in zip(asked.lanes, parts, answers, strict=True):
            if answer.verdict == "ok":
                self._keep(lane, bytes(part))
        if self.lose_answers:
            self.lose_answers -= 1
            raise Refused(502, "lost", "the answer was lost")
        return Answer(body=pushes.encode_push_answer(answers))

    def _keep(self, lane: pushes.LanePush, part: bytes) -> None:
        bodies = self.got.setdefault((lane.channel, lane.priority), [])
        at = 0
        for number in range(lane.frames):
            size = entry.entry_bytes(part, at)
            assert size is not None
            aside = lane.asides.get(number, pushes.NO_ASIDE)
            holes = [void.index for void in aside.voids]
            parsed = frame.parse(part[at + entry.ENTRY_BYTES : at + size], holes)
            if parsed.info.is_blob and not holes:
                path = self.layout.inbox_blob("hamburg", parsed.frame_id)
                bodies.append(Path(path).read_bytes())
            else:
                bodies += [bytes(parsed.body(i)) for i in range(parsed.count) if i not in holes]
            at += size

    async def match(self, peer: str, body: bytes) -> Answer:
        assert self.store is not None
        answer = self.store.match(peer, ask.decode_match(body))
        return Answer(body=ask.encode_match_answer(answer))

    async def blob(self, peer: str, piece: BlobPiece, reader: Reader) -> Answer:
        assert self.store is not None
        try:
            arrival = self.store.blobs.arrive(peer, piece.frame_id, piece.offset, piece.size)
        except PieceRefused as refusal:
            return Answer(409, ask.encode_blob_answer(refusal.have))
        if arrival is None:
            return Answer(body=ask.encode_blob_answer(piece.size))
        with suppress(ConnectionResetError):
            while data := await reader.read():
                arrival.write(data)
        return Answer(body=ask.encode_blob_answer(arrival.close()))

    def bodies(self, channel: str, priority: int = 5) -> list[bytes]:
        return self.got.get((channel, priority), [])


@asynccontextmanager
async def serving(far: FarNode, port: int) -> AsyncIterator[None]:
    """`far` answers on loopback."""
    far.open()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        listener = Listener(far, Tokens({"hamburg": TOKEN}))
        await listener.start([sock])
        try:
            yield
        finally:
            await listener.stop(0.2)
            assert far.store is not None
            far.store.close()


class SenderProcess:
    """The worker `sender` with this test as its angel."""

    def __init__(self, settings: Settings, facts: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        self.settings = settings
        self.gauges: dict[str, Any] = {}
        self.beats = 0
        self.is_ready = False
        self._answers: dict[int, rpc.Response] = {}
        self._decoder = rpc.Decoder()
        self._link = ours
        self._next = 1
        self.process = subprocess.Popen(
            [sys.executable, "-m", "droprd.workers.sender", "--link", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        params = {"settings": settings.to_dict(), "generation": 1, "facts": facts}
        ours.sendall(rpc.encode(rpc.Request(0, "configure", params)))
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, self._readable)

    def _readable(self) -> None:
        try:
            data = self._link.recv(65536)
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._link)
            return
        for message in self._decoder.feed(data):
            if isinstance(message, rpc.Response):
                self._answers[message.id] = message
            elif isinstance(message, rpc.Notification):
                if message.method == "gauges":
                    self.gauges = message.params["gauges"]
                self.is_ready = self.is_ready or message.method == "ready"
                self.beats += message.method == "beat"

    async def call(self, method: str, **params: Any) -> Any:
        self._next += 1
        self._link.send(rpc.encode(rpc.Request(self._next, method, params)))
        wanted = self._next
        await until(lambda: wanted in self._answers)
        answer = self._answers.pop(wanted)
        assert answer.error is None, answer.error
        return answer.result

    def peer(self, name: str = "berlin") -> dict[str, Any]:
        found: dict[str, Any] = self.gauges.get("peers", {}).get(name, {})
        return found

    async def stop(self) -> int:
        if self.process.poll() is None:
            with suppress(OSError):
                self._link.send(rpc.encode(rpc.Request(1, "stop", {})))
        return await self.ended()

    async def ended(self) -> int:
        """Its exit code, once it has ended."""
        await until(lambda: self.process.poll() is not None)
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._link)
        self._link.close()


class NearNode:
    """The sending side: a spool, a producer, and senders started one after another."""

    def __init__(self, root: Path, port: int) -> None:
        self.root = root
        self.layout = Layout(str(root / "spool"))
        self.spool_id = make_spool(FS, self.layout.root, os.urandom).spool_id
        token = root / "berlin.token"
        token.write_text(TOKEN)
        self.peer: dict[str, Any] = {
            "url": f"http://127.0.0.1:{port}",
            "token_file": str(token),
        }
        self.others: dict[str, dict[str, Any]] = {}
        self.paused: dict[str, Any] = {}
        self.journal = self._journal()
        self.sender: SenderProcess | None = None

    def _journal(self) -> Journal:
        return Journal(FS, SystemClock(), os.urandom, self.layout, self.spool_id, uid=os.getuid())

    def settings(self) -> Settings:
        return Settings.from_dict(
            {
                "node": {"name": "hamburg", "spool": self.layout.root},
                "daemon": {"stop_timeout_s": 3},
                "peers": {"berlin": self.peer, **self.others},
            }
        )

    async def start(self) -> SenderProcess:
        facts = {"node": "hamburg", "spool_id": self.spool_id, "paused": self.paused}
        self.sender = SenderProcess(self.settings(), facts)
        await until(lambda: self.sender is not None and self.sender.is_ready)
        return self.sender

    def send(
        self,
        *bodies: bytes,
        peer: str = "berlin",
        channel: str = "a",
        priority: int = 5,
        ring: bool = True,
    ) -> None:
        self.journal.put(Put(Lane(peer, channel, priority), bodies))
        if ring:
            with suppress(OSError):
                bell = os.open(self.layout.bell, os.O_WRONLY | os.O_NONBLOCK)
                os.write(bell, b"\0")
                os.close(bell)
