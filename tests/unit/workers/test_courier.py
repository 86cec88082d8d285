"""The courier against a real receiver's listener on loopback, with a cargo of plain bytes."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from droprd.core import ask
from droprd.core.schedule import Batch
from droprd.errors import BadData
from droprd.model import Lane
from droprd.net.credentials import Tokens
from droprd.net.listen import Listener
from droprd.net.service import Answer, BlobPiece, Reader, Refused, RequestKind
from droprd.net.transport import Piece
from droprd.settings.values import PeerSettings
from droprd.spool.clock import SystemClock
from droprd.workers.courier import Cargo, Courier, Job, Node

SPOOL_ID = bytes(range(16))
TOKEN = "correct-horse"


def lane(channel: str, priority: int = 5) -> Lane:
    return Lane("berlin", channel, priority)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@dataclass
class Receiver:
    """A receiver that stores every body it gets, unless told otherwise."""

    stored: list[bytes] = field(default_factory=list)
    greetings: int = 0
    most_at_once: int = 0
    obstacles: deque[Exception | bytes] = field(default_factory=deque)
    refuse_if: bytes | None = None
    gate: asyncio.Event | None = None
    _at_once: int = 0

    def admit(self, peer: str, kind: RequestKind, length: int) -> None:
        pass

    async def hello(self, peer: str, body: bytes) -> Answer:
        self.greetings += 1
        ask.decode_hello(body)
        return Answer(body=ask.encode_hello(ask.Hello("berlin", 1, 0, SPOOL_ID)))

    async def push(self, peer: str, body: bytes) -> Answer:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.obstacles:
                obstacle = self.obstacles.popleft()
                if isinstance(obstacle, bytes):
                    return Answer(body=obstacle)
                raise obstacle
            if self.refuse_if is not None and self.refuse_if in body:
                raise BadData("poison")
            self.stored.append(body)
            return Answer(body=b"ok")
        finally:
            self._at_once -= 1

    async def match(self, peer: str, body: bytes) -> Answer:
        raise AssertionError

    async def blob(self, peer: str, piece: BlobPiece, reader: Reader) -> Answer:
        raise AssertionError


class Bodies:
    """A cargo of plain bytes, so many of a lane at once as fit."""

    def __init__(self, courier: Courier) -> None:
        self.courier = courier
        self.waiting: dict[Lane, deque[bytes]] = {}
        self.delivered: list[bytes] = []

    def put(self, where: Lane, body: bytes) -> None:
        self.waiting.setdefault(where, deque()).append(body)
        self.courier.schedule.wake(where)

    def load(self, batch: Batch) -> Job | None:
        taken: dict[Lane, list[bytes]] = {}
        while (offer := batch.next()) is not None:
            bodies: list[bytes] = []
            for body in self.waiting.get(offer.lane, ()):
                if bodies and sum(map(len, bodies)) + len(body) > offer.bytes_max:
                    break
                bodies.append(body)
            batch.took(sum(map(len, bodies)))
            if bodies:
                taken[offer.lane] = bodies
        return BodiesJob(self, taken) if taken else None


class BodiesJob:
    method = "POST"
    path = "/v1/push"
    careful = False

    def __init__(self, cargo: Bodies, taken: dict[Lane, list[bytes]]) -> None:
        self.cargo = cargo
        self.taken = taken
        self.lanes: Sequence[Lane] = list(taken)
        bodies = [body for bodies in taken.values() for body in bodies]
        self.pieces: Sequence[Piece] = bodies
        self.size = sum(map(len, bodies))
        self.frames = len(bodies)

    def answered(self, status: int, body: bytes) -> None:
        if body != b"ok":
            raise BadData("no such answer")
        for where, bodies in self.taken.items():
            waiting = self.cargo.waiting[where]
            for _ in bodies:
                self.cargo.delivered.append(waiting.popleft())
            self.cargo.courier.schedule.accepted(where)
            self.cargo.courier.schedule.landed(where, more=bool(waiting))

    def failed(self) -> None:
        for where in self.lanes:
            self.cargo.courier.schedule.landed(where, more=True)

    def blamed(self, why: str) -> None:
        schedule = self.cargo.courier.schedule
        for where in self.lanes:
            if len(self.lanes) == 1:
                schedule.refused(where, asyncio.get_running_loop().time(), lambda: 0.999)
            schedule.send_alone(where, True)
            schedule.landed(where, more=True)


@dataclass
class Rig:
    receiver: Receiver
    courier: Courier
    cargo: Bodies
    address: str
    token_file: str

    def configure(self, *urls: str, requests_max: int = 4) -> None:
        self.courier.configure(
            PeerSettings(
                urls=urls or (self.address,),
                token_file=self.token_file,
                requests_in_flight_max=requests_max,
            )
        )
        self.courier.pump()

    def send(self, where: Lane, *bodies: bytes) -> None:
        for body in bodies:
            self.cargo.put(where, body)
        self.courier.pump()

    async def stored(self, count: int) -> None:
        await until(lambda: sum(map(len, self.receiver.stored)) >= count)


@asynccontextmanager
async def listening(receiver: Receiver, port: int = 0) -> AsyncIterator[int]:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        listener = Listener(receiver, Tokens({"hamburg": TOKEN}))
        await listener.start([sock])
        yield sock.getsockname()[1]
        await listener.stop(0.1)


def run(tmp_path: Path, test: Callable[[Rig], Awaitable[None]], *, serve: bool = True) -> None:
    """Run `test` with a courier, and with a receiver at its address if `serve`."""

    async def main() -> None:
        receiver = Receiver()
        made: list[Bodies] = []

        def cargo(courier: Courier) -> Cargo:
            made.append(Bodies(courier))
            return made[0]

        token_file = tmp_path / "berlin.token"
        token_file.write_text(f"{TOKEN}\n")
        node = Node("hamburg", SPOOL_ID, SystemClock())
        courier = Courier(node, "berlin", cargo, lambda: None)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        rig = Rig(receiver, courier, made[0], f"http://127.0.0.1:{port}", str(token_file))
        try:
            if serve:
                async with listening(receiver, port):
                    await test(rig)
                    await courier.aclose(1)
            else:
                await test(rig)
        finally:
            await courier.aclose(1)

    asyncio.run(main())


def test_what_waits_is_delivered_and_the_peer_greeted(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.configure()
        rig.send(lane("a"), b"one", b"two")
        await until(lambda: rig.cargo.delivered == [b"one", b"two"])
        await until(lambda: rig.receiver.greetings == 1)
        shown = rig.courier.gauges()
        assert (shown["state"], shown["last_error"]) == ("open", None)

    run(tmp_path, test)


def test_before_it_is_configured_nothing_is_sent(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.courier.configure(None)
        rig.send(lane("a"), b"one")
        await asyncio.sleep(0)
        assert not rig.courier.flow.in_flight
        assert rig.courier.gauges()["state"] == "unconfigured"
        rig.configure()
        await rig.stored(3)

    run(tmp_path, test)


def test_a_peer_that_is_away_is_tried_until_it_is_back(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.configure()
        rig.send(lane("a"), b"one")
        await until(lambda: rig.courier.flow.failures > 0)
        shown = rig.courier.gauges()
        assert shown["state"] in ("throttled", "probing")
        assert "127.0.0.1" in shown["last_error"]
        port = int(rig.address.rpartition(":")[2])
        async with listening(rig.receiver, port):
            await rig.stored(3)

    run(tmp_path, test, serve=False)


def test_hearing_from_a_peer_has_it_tried_at_once(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.configure()
        rig.send(lane("a"), b"one")
        await until(lambda: rig.courier.flow.failures >= 2)
        port = int(rig.address.rpartition(":")[2])
        async with listening(rig.receiver, port):
            rig.courier.heard()
            await until(lambda: rig.receiver.stored == [b"one"], 1.0)

    run(tmp_path, test, serve=False)


def test_the_next_address_is_tried_when_one_does_not_answer(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            dead = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            rig.configure(dead, rig.address)
            rig.send(lane("a"), b"one")
            await rig.stored(3)
            assert rig.courier.gauges()["address"] == rig.address
            assert rig.courier.flow.failures == 0

    run(tmp_path, test)


def test_a_refusal_with_retry_after_stops_the_peer_for_that_long(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.receiver.obstacles.append(Refused(507, "inbox_full", "full", retry_after_s=30))
        rig.configure()
        rig.send(lane("a"), b"one")
        await until(lambda: rig.courier.gauges()["state"] == "throttled")
        shown = rig.courier.gauges()
        assert shown["next_try_s"] > 28
        assert "507" in shown["last_error"]
        rig.courier.retry()
        await rig.stored(3)

    run(tmp_path, test)


def test_a_poison_message_delays_no_other_lane(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.receiver.refuse_if = b"poison"
        rig.configure()
        rig.send(lane("warm"), b"warm" * 20_000)
        await rig.stored(80_000)
        good = [lane(f"c{i}") for i in range(20)]
        rig.cargo.put(lane("bad"), b"poison")
        rig.send(lane("bad"), *[])
        for each in good:
            rig.send(each, b"good")
        await rig.stored(80_000 + 20 * 4)
        assert rig.courier.gauges()["state"] == "open"
        assert rig.cargo.waiting[lane("bad")]

    run(tmp_path, test)


def test_a_peer_that_finds_fault_with_everything_is_throttled(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.receiver.refuse_if = b""
        rig.configure()
        for i in range(20):
            rig.send(lane(f"c{i}"), b"fine")
        await until(lambda: rig.courier.gauges()["state"] in ("throttled", "probing"))

    run(tmp_path, test)


def test_an_answer_that_makes_no_sense_is_a_failure(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.receiver.obstacles.append(b"nonsense")
        rig.configure()
        rig.send(lane("a"), b"one")
        await until(lambda: "no sense" in (rig.courier.gauges()["last_error"] or ""))
        await rig.stored(3)

    run(tmp_path, test)


def test_a_wrong_token_is_shown_and_stops_nothing_for_ever(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        right = rig.token_file
        wrong = tmp_path / "wrong.token"
        wrong.write_text("wrong\n")
        rig.token_file = str(wrong)
        rig.configure()
        rig.send(lane("a"), b"one")
        await until(lambda: "401" in (rig.courier.gauges()["last_error"] or ""))
        rig.token_file = str(tmp_path / "missing")
        rig.configure()
        await until(lambda: "missing" in (rig.courier.gauges()["last_error"] or ""))
        rig.token_file = right
        rig.configure()
        await rig.stored(3)

    run(tmp_path, test)


def test_no_more_than_the_allowed_requests_are_under_way_and_one_is_kept_for_urgent_ones(
    tmp_path: Path,
) -> None:
    async def test(rig: Rig) -> None:
        piece = b"x" * 100_000
        rig.configure()
        for _ in range(20):
            rig.send(lane("warm"), *[piece] * 40)
        await rig.stored(80_000_000)
        rig.receiver.gate = asyncio.Event()
        for i in range(10):
            rig.send(lane(f"c{i}"), *[piece] * 40)
        await until(lambda: rig.receiver.most_at_once == 3)
        assert rig.courier.flow.in_flight == 3
        rig.send(lane("urgent", 0), b"now")
        await until(lambda: rig.receiver.most_at_once == 4)
        rig.send(lane("other", 0), b"now")
        assert rig.courier.flow.in_flight == 4
        rig.receiver.gate.set()
        await rig.stored(80_000_000 + 40_000_000 + 6)

    run(tmp_path, test)


def test_a_paused_peer_gets_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.configure()
        rig.courier.stand(paused=True, draining=False, pauses=())
        rig.send(lane("a"), b"one")
        await until(lambda: not rig.courier.busy)
        assert rig.courier.gauges()["state"] == "paused"
        assert not rig.receiver.stored
        rig.courier.stand(paused=False, draining=False, pauses=())
        await rig.stored(3)

    run(tmp_path, test)


def test_leaving_waits_for_what_is_under_way_and_breaks_off_the_rest(tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        rig.configure()
        rig.receiver.gate = asyncio.Event()
        rig.send(lane("a"), b"one")
        await until(lambda: rig.receiver.most_at_once == 1)
        await rig.courier.aclose(0.05)
        assert not rig.courier.busy
        assert not rig.cargo.delivered
        assert rig.courier.schedule.ready == 1
        rig.receiver.gate.set()

    run(tmp_path, test)


@pytest.mark.parametrize("kind", ["reload", "unconfigured"])
def test_new_settings_do_not_break_off_what_is_under_way(tmp_path: Path, kind: str) -> None:
    async def test(rig: Rig) -> None:
        rig.configure()
        rig.receiver.gate = asyncio.Event()
        rig.send(lane("a"), b"one")
        await until(lambda: rig.receiver.most_at_once == 1)
        if kind == "reload":
            rig.configure(requests_max=1)
        else:
            rig.courier.configure(None)
        rig.receiver.gate.set()
        await until(lambda: rig.cargo.delivered == [b"one"])

    run(tmp_path, test)
