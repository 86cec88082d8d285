"""The receiving half of a simulated node: the receiver process, and consumers.

A request is answered as the real receiver does: taken into memory, brought to stable storage with
whatever else waits, and only then answered. While a commit writes, other requests are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random
from typing import cast

from droprd.client.message import Message
from droprd.client.taking import Look, Taker
from droprd.core import ask, claimops, leasing
from droprd.core.claimops import Now
from droprd.core.leasing import Stored
from droprd.core.push import decode_push, encode_push_answer
from droprd.errors import SpoolBusy, SpoolCorrupt
from droprd.settings.values import ChannelSettings
from droprd.spool.arrivals import PieceRefused
from droprd.spool.bells import Waiting
from droprd.spool.channelreader import ChannelReader
from droprd.spool.inbox import FilesStream, channel_names, stream_priorities
from droprd.spool.judging import Limits
from droprd.spool.layout import Layout
from droprd.spool.receiver import ReceiverStore
from droprd.spool.retention import DeadLetters, Retention
from droprd.spool.seals import SealReader
from droprd.spool.staging import Pending
from droprd.spool.tending import StreamTender
from droprd.testing.simnet import Network, Piece, Reply, Request
from droprd.testing.simproducer import ROOT, blob_serial, open_spool, serial_of
from droprd.testing.simulation import Machine, SimFs, Violation

LEASE_S = 30
POLICY = ChannelSettings(max_attempts=1000)


class Receiver:
    """One life of the receiver process."""

    def __init__(self, machine: Machine, network: Network, rng: Random, limits: Limits) -> None:
        """Opening may crash."""
        self.fs = machine.start("receiver")
        self._network = network
        self._rng = rng
        self._waiting: list[tuple[Request, Pending]] = []
        self.writing = False
        self.store = ReceiverStore(open_spool(machine, self.fs), limits)
        if self.store.report.damage or self.store.report.lost_messages:
            raise Violation(f"a crash damaged the inbox: {self.store.report}")

    def take(self, request: Request) -> None:
        """A request arrives."""
        if request.kind == "match":
            if self.writing:
                self._network.requests.append(request)  # it waits for the commit
                return
            answer = self.store.match(request.peer, ask.decode_match(request.body))
            self._network.answer(Reply(request, ask.encode_match_answer(answer)))
            return
        if request.piece is not None:
            have = self._take_piece(request, request.piece)
            self._network.answer(Reply(request, ask.encode_blob_answer(have)))
            return
        push, parts = decode_push(request.body)
        pending = self.store.push(request.peer, push, parts)
        if pending.waits:
            self._waiting.append((request, pending))
        else:
            self._answer(request, pending)

    def _take_piece(self, request: Request, piece: Piece) -> int:
        blobs = self.store.blobs
        try:
            arrival = blobs.arrive(request.peer, piece.frame_id, piece.offset, piece.size)
            if arrival is None:
                return piece.size
            # Now and then the connection breaks in the middle.
            whole = self._rng.random() < 0.9
            try:
                arrival.write(request.body if whole else request.body[: len(request.body) // 2])
            finally:
                have = arrival.close()
        except PieceRefused as refusal:
            return refusal.have
        return have

    def commit(self) -> None:
        """Bring what waits to stable storage, then answer it."""
        batch = self.store.begin()
        if batch is None:
            return
        taken, self._waiting = self._waiting, []
        self.writing = True
        try:
            self.store.write(batch)
        finally:
            self.writing = False
        self.store.finish(batch)
        for request, pending in taken:
            self._answer(request, pending)

    def _answer(self, request: Request, pending: Pending) -> None:
        self._network.answer(Reply(request, encode_push_answer(self.store.answer(pending))))


class SimInbox:
    """`droprd.spool.inbox.InboxStore` of a simulated process: the real files, no FIFO."""

    def __init__(self, machine: Machine, fs: SimFs, alive: dict[bytes, SimFs]) -> None:
        self._fs = fs
        self._boot_id = machine.clock.boot_id()
        self._layout = Layout(ROOT)
        self._alive = alive
        self._streams: dict[str, list[FilesStream]] = {}
        self.consumer = machine.urandom(16)
        alive[self.consumer] = fs

    def hear(self, channels: Collection[str]) -> None:
        """Nobody rings here."""

    def streams(self, channel: str, *, again: bool) -> Sequence[FilesStream]:
        known = self._streams.get(channel, [])
        if known and not again:
            return known
        have = {stream.priority: stream for stream in known}
        self._streams[channel] = [
            have.get(p) or FilesStream(self._fs, self._layout, channel, p, self._boot_id)
            for p in stream_priorities(self._fs, self._layout, channel)
        ]
        return self._streams[channel]

    def channels(self) -> list[str]:
        return channel_names(self._fs, self._layout)

    def alive(self, consumer: bytes) -> bool:
        fs = self._alive.get(consumer)
        return fs is not None and fs.alive

    def ring(self, channels: Collection[str]) -> None:
        """Nobody listens."""

    def fileno(self) -> int:
        raise NotImplementedError("simulated consumers do not wait")

    def drain(self) -> bool:
        return False

    def wait(self, timeout_s: float, watch: Collection[bytes], wakeup_fd: int) -> None:
        raise NotImplementedError("simulated consumers do not wait")

    def blob_path(self, sender: str, frame_id: bytes) -> str:
        return self._layout.inbox_blob(sender, frame_id)

    def close(self) -> None:
        """The process ends instead."""

    def close_in_child(self) -> None:
        """There are no forks here."""


class Consumer:
    """An application that receives. Implements `droprd.client.message.Settler` as far as needed."""

    def __init__(self, machine: Machine, rng: Random, alive: dict[bytes, SimFs]) -> None:
        self.machine = machine
        self.fs = machine.start("consumer")
        self._rng = rng
        self._store = SimInbox(machine, self.fs, alive)
        self._taker = Taker(self, self._store, lambda channel: POLICY, machine.clock.boot_ns())
        self.messages: list[Message] = []
        self._serials: dict[Message, int] = {}
        self.acked: set[int] = set()
        self.fault: SpoolCorrupt | None = None

    def _now(self) -> Now:
        clock = self.machine.clock
        return Now(clock.boot_id(), clock.boot_ns(), clock.wall_ns(), False)

    def receive(self, channels: Sequence[str], room: int) -> list[Message]:
        """Lease some messages."""
        look = Look(self._now(), LEASE_S * 10**9, room)
        self._taker.take(channels, look)
        self.fault = look.fault
        self.messages += look.messages
        for message in look.messages:
            # While it is leased; later it may be settled by another, and its body be gone.
            self._serials[message] = serial_in(self.fs, message._stored, message._index)
        return look.messages

    def serial(self, message: Message) -> int:
        """Which message this is."""
        return self._serials[message]

    def settle(self, messages: Sequence[Message]) -> None:
        """Ack what is still leased; `acked` are the serials not synced yet."""
        for message in messages:
            self.messages.remove(message)
            stream, lease, seq = message._held.stream, message._held.lease, message._seq
            try:
                claims = stream.acquire(1)
            except SpoolBusy:
                continue
            try:
                if claims.holds(lease, seq, seq + 1, self._now()):
                    stream.append([claimops.op_ack(lease, leasing.runs([seq]))])
                    self.acked.add(self.serial(message))
            finally:
                stream.release()

    def sync(self, channels: Sequence[str]) -> set[int]:
        """Bring what was settled to stable storage. Returns its serials."""
        acked, self.acked = self.acked, set()
        for channel in channels:
            for stream in self._store.streams(channel, again=False):
                stream.sync()
        return acked

    def ack(self, messages: Sequence[Message]) -> None:
        self.settle(messages)

    def _nack(self, message: Message, delay_s: float) -> None:
        raise NotImplementedError

    def _reject(self, message: Message, reason: str) -> None:
        raise NotImplementedError

    def _extend(self, message: Message, lease_s: float) -> None:
        raise NotImplementedError

    def _blob_path(self, sender: str, frame_id: bytes) -> str:
        return self._store.blob_path(sender, frame_id)


def serial_in(fs: SimFs, stored: Stored, index: int) -> int:
    """Which message lies at `index` of a frame of the inbox."""
    frame = stored.frame
    assert frame is not None
    if frame.info.is_blob:
        return blob_serial(fs, [Layout(ROOT).inbox_blob(stored.sender, frame.frame_id)], frame)
    return serial_of(bytes(frame.body(index)))


class SimWaiting:
    """What the janitor asks of `droprd.spool.bells.Waiting`."""

    def __init__(self, alive: dict[bytes, SimFs]) -> None:
        self._alive = alive

    def alive(self, consumer: bytes) -> bool:
        fs = self._alive.get(consumer)
        return fs is not None and fs.alive

    def ring(self, channels: Collection[str]) -> None:
        """Nobody listens."""


class Janitor:
    """One life of the janitor, as far as it touches claims and segments."""

    def __init__(self, machine: Machine, alive: dict[bytes, SimFs], rng: Random) -> None:
        self.fs = machine.start("janitor")
        self._machine = machine
        self._spool = open_spool(machine, self.fs)
        self._waiting = cast("Waiting", SimWaiting(alive))
        self._dead = DeadLetters(self._spool)
        self._retention = Retention(self._spool, self._dead)
        self._seals = SealReader(self.fs, self._spool.layout)
        self._tenders: dict[tuple[str, int], StreamTender] = {}
        self._retain_s = rng.choice((0, 0, 1000))

    def tick(self) -> None:
        """One look at every stream."""
        fs, layout, clock = self.fs, self._spool.layout, self._machine.clock
        now = Now(clock.boot_id(), clock.boot_ns(), clock.wall_ns(), False)
        for channel in channel_names(fs, layout):
            for name in fs.listdir(layout.channel(channel)):
                key = channel, int(name)
                if key not in self._tenders:
                    self._tenders[key] = StreamTender(self._spool, self._waiting, *key)
        sealed = self._seals.read()
        for key, tender in self._tenders.items():
            tender.tend(now, POLICY.max_attempts)
            tender.delete_settled(self._retention, sealed.get(key, 0), self._retain_s, now)


Seen = dict[tuple[str, int], dict[int, tuple[str, int]]]


def read_inbox(fs: SimFs) -> tuple[Seen, dict[tuple[str, int], int]]:
    """(sender, serial) of all messages before the published ends, by stream and seq; and the seq
    with which each stream begins."""
    found: Seen = {}
    begins: dict[tuple[str, int], int] = {}
    layout = Layout(ROOT)
    for channel in channel_names(fs, layout):
        for priority in stream_priorities(fs, layout, channel):
            reader = ChannelReader(fs, layout.stream(channel, priority))
            here = found[channel, priority] = {}
            begins[channel, priority] = reader.begin()
            for stored in reader.read(begins[channel, priority]):
                if stored.frame is None:
                    raise Violation(f"a hole in {channel}/{priority} at seq {stored.first}")
                for index in range(stored.frame.count):
                    if index not in stored.voids:
                        serial = serial_in(fs, stored, index)
                        here[stored.first + index] = stored.sender, serial
            reader.close()
    return found, begins
