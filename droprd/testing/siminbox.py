"""Crashes of the inbox alone: a receiver that dies at any step, senders that repeat themselves, a
consumer that reads what is published, and blobs.

The oracle holds what every lane sent, in order. What was answered as stored must be there ever
after; what a consumer saw must stay; nothing is there twice, or out of order, or without being
sent; a match proves itself by the chain; and when the faults stop, every lane can be brought to its
end.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

from droprd.core import chain, entry, frame
from droprd.core.ask import MatchRequest
from droprd.core.frame import Stamp
from droprd.core.push import Aside, LaneAnswer, LanePush, Push, decode_push, encode_push
from droprd.errors import BadData
from droprd.model import GENESIS, Head, Lane, LaneKey, Void
from droprd.spool import log
from droprd.spool.arrivals import PieceRefused
from droprd.spool.judging import Limits, PeerLimits
from droprd.spool.layout import segment_number
from droprd.spool.receiver import ReceiverStore
from droprd.spool.seals import SealReader
from droprd.testing.simdisk import SimDisk
from droprd.testing.simproducer import make_node_spool, open_spool
from droprd.testing.simulation import Chaos, Crash, Machine, Rates, SimFs, SimTime, Violation

PEER = "hamburg"
REFUSED = "secret"
BLOB_BYTES = 40_000 // 64 * 64
SIZES = (0, 20, 300, 512, 3000)


@dataclass
class SentFrame:
    """A frame, and beside it what the sender voided."""

    frame_id: bytes
    count: int
    data: bytes
    voids: tuple[Void, ...] = ()
    blob: bytes = b""

    def entry(self) -> bytes:
        return entry.pack_entry(b"L" * 16, 8192, 4096, b"", len(self.data)) + self.data


@dataclass
class SendingLane:
    """One lane as its sender knows it: all it ever sent, and how much of it is answered for."""

    key: LaneKey
    frames: list[SentFrame] = field(default_factory=list)
    heads: list[Head] = field(default_factory=lambda: [GENESIS])
    acked: int = 0

    def add(self, one: SentFrame) -> None:
        self.frames.append(one)
        self.heads.append(chain.extend(self.heads[-1], one.frame_id, one.count))

    def find(self, head: Head) -> int:
        """How many frames a head stands for. Raises: Violation."""
        if head not in self.heads:
            raise Violation(f"{self.key}: a head that was never reached")
        return self.heads.index(head)


class InboxSimulation:
    """One node that only receives."""

    def __init__(self, seed: int, disable_sites: frozenset[str] = frozenset()) -> None:
        self.rng = rng = Random(seed)
        rates = Rates(
            per_step=rng.choice((0.03, 0.08, 0.2)),
            others=rng.choice((2, 8)),
            kill=1,
            power=rng.choice((0.3, 2, 5)),
            error=rng.choice((0, 0, 0.3)),
        )
        self.chaos = Chaos(rng, rates)
        disk = SimDisk(disable_sites=disable_sites)
        disk.subsets_only = rng.random() < 0.3
        self.machine = Machine("node", disk, SimTime(), rng, self.chaos)
        self.chaos.run_others = lambda fs: self.consume()
        spools = [rng.randbytes(16) for _ in range(2)]
        self.lanes = [
            SendingLane(LaneKey(PEER, spool_id, channel, 5))
            for spool_id in spools
            for channel in ("a", "b", REFUSED)
        ]
        if rng.random() < 0.3:
            self.lanes = [lane for lane in self.lanes if lane.key.channel != "b"][:2]
        self.checkpoints = rng.choice((0.02, 0.15))
        self.limits = Limits(
            segment_bytes_max=9000,
            match_frames=rng.choice((5, 100_000)),
            peers={PEER: PeerLimits(channels=frozenset({"a", "b"}))},
        )
        self.seen: dict[str, dict[int, bytes]] = {"a": {}, "b": {}}
        self.seen_end = {"a": 0, "b": 0}
        make_node_spool(self.machine)

    def run(self, crashes: int, lives: int = 400) -> int:
        """Go on until so many crashes or lives; then heal, and everything must arrive."""
        for _ in range(lives):
            if self.chaos.crashes >= crashes:
                break
            self.life()
        self.chaos.quiet = True
        self.machine.power_cut()
        fs = self.machine.start("receiver")
        store = self.open(fs)
        for lane in self.lanes:
            for _ in range(4 * len(lane.frames) + 4):
                if lane.acked == len(lane.frames):
                    break
                self.push(store, [lane], more=False)
            else:
                raise Violation(f"{lane.key}: something never arrives")
            self.check_match(store, lane)
        self.consume()
        self.check_all()
        return self.chaos.crashes

    def life(self) -> None:
        """One receiver process: it recovers, takes pushes, and usually dies."""
        try:
            fs = self.machine.start("receiver")
            try:
                store = self.open(fs)
                for _ in range(self.rng.randrange(1, 15)):
                    self.act(store)
                if self.rng.random() < 0.3:
                    store.close()
                fs.die()
            except (OSError, log.LogBroken):
                # The process ends; after a failed sync the disk is seen to.
                self.machine.power_cut()
        except Crash:
            pass

    def open(self, fs: SimFs) -> ReceiverStore:
        store = ReceiverStore(open_spool(self.machine, fs), self.limits)
        if store.report.damage:
            raise Violation(f"a crash damaged what was promised: {store.report.damage}")
        for lane in self.lanes:
            # What is known after a start is spoken of: it must last from now on.
            self.learn(lane, store.head(lane.key))
        return store

    def learn(self, lane: SendingLane, head: Head) -> None:
        at = lane.find(head)
        if at < lane.acked:
            raise Violation(f"{lane.key}: {lane.acked - at} frames that were answered for are gone")
        lane.acked = at

    # -- what happens ----------------------------------------------------------------------------

    def act(self, store: ReceiverStore) -> None:
        draw = self.rng.random() - self.checkpoints
        if draw < 0:
            store.checkpoint()
        elif draw < 0.65:
            count = self.rng.choice((1, 1, 2))
            self.push(store, self.rng.sample(self.lanes, count), more=True)
        elif draw < 0.7:
            self.check_match(store, self.rng.choice(self.lanes))
        elif draw < 0.8:
            self.delete_sealed(store)
        else:
            self.consume()

    def make(self, lane: SendingLane) -> SentFrame:
        rng = self.rng
        to = Lane("berlin", lane.key.channel, 5)
        stamp = Stamp(self.machine.clock.boot_id(), 1, 2)
        frame_id = rng.randbytes(14) + bytes(2)
        if rng.random() < 0.1 and lane.key.channel != REFUSED:
            blob = rng.randbytes(64) * (BLOB_BYTES // 64)
            shared = frame.pack_map({"d": hashlib.sha256(blob).digest()})
            pieces = frame.build_blob(
                frame_id=frame_id,
                lane=to,
                stamp=stamp,
                blob_bytes=len(blob),
                blob_crc=crc32(blob),
                shared=shared,
            )
            return SentFrame(frame_id, 1, b"".join(pieces), blob=blob)
        bodies = [bytes(rng.choice(SIZES)) for _ in range(rng.choice((1, 1, 3)))]
        pieces = frame.build(frame_id=frame_id, lane=to, stamp=stamp, bodies=bodies)
        voids: tuple[Void, ...] = ()
        data = b"".join(pieces)
        if rng.random() < 0.2:
            voids = (Void(0, "expired"),)
            data = b"".join(frame.parse(data).without({0}))
        return SentFrame(frame_id, len(bodies), data, voids)

    def push(self, store: ReceiverStore, lanes: list[SendingLane], *, more: bool) -> None:
        """Push what follows the answered heads, or a late repetition, and take the answer."""
        rng = self.rng
        parts, tail, starts = [], [], []
        for lane in lanes:
            if more:
                for _ in range(rng.choice((0, 1, 1, 2))):
                    if len(lane.frames) - lane.acked < 6:
                        lane.add(self.make(lane))
            start = lane.acked
            if more and rng.random() < 0.1:
                start = rng.randrange(lane.acked + 1)
            sent = lane.frames[start : start + rng.randrange(1, 7)]
            data = b"".join(one.entry() for one in sent)
            asides = {i: Aside(None, one.voids) for i, one in enumerate(sent)}
            key = lane.key
            part = LanePush(key.channel, 5, lane.heads[start], len(sent), len(data), asides)
            parts.append(part)
            tail.append(data)
            starts.append(start)
        for lane, part, data, start in zip(lanes, parts, tail, starts, strict=True):
            push, views = decode_push(encode_push(Push(lane.key.spool_id, (part,))) + data)
            pending = store.push(PEER, push, views)
            if rng.random() < 0.7:
                store.commit()
                self.answered(store, lane, store.answer(pending)[0], start)
            # Else it waits for the commit of another one, and its answer is lost.
        store.commit()

    def answered(
        self, store: ReceiverStore, lane: SendingLane, answer: LaneAnswer, start: int
    ) -> None:
        at = lane.find(answer.head)
        if answer.verdict == "ok":
            if at < start:
                raise Violation(f"{lane.key}: an answer behind the head that was expected")
            lane.acked = max(lane.acked, at)
        elif answer.verdict in ("conflict", "need"):
            self.learn(lane, answer.head)
        for frame_id, have in answer.need.items():
            one = next(one for one in lane.frames if one.frame_id == frame_id)
            self.put_blob(store, one, have)

    def put_blob(self, store: ReceiverStore, one: SentFrame, have: int) -> None:
        if self.chaos.quiet or self.rng.random() < 0.7:
            end = BLOB_BYTES
        else:
            end = self.rng.randrange(have, BLOB_BYTES)
        try:
            arrival = store.blobs.arrive(PEER, one.frame_id, have, len(one.blob))
        except PieceRefused:
            return
        if arrival is None:
            return
        arrival.write(one.blob[have:end])
        arrival.close()

    def delete_sealed(self, store: ReceiverStore) -> None:
        """What the janitor does with segments whose messages are all settled."""
        layout = store.layout
        for (channel, priority), newest in SealReader(store.fs, layout).read().items():
            names = store.fs.listdir(layout.stream(channel, priority))
            numbers = sorted(n for n in map(segment_number, names) if n is not None)
            if numbers and numbers[0] <= newest:
                self.consume()  # all messages in it are settled
                store.fs.unlink(layout.inbox_segment(channel, priority, numbers[0]))
        store.recount()

    # -- what must hold --------------------------------------------------------------------------

    def consume(self) -> None:
        """Another process reads what is published; whatever it sees must last."""
        fs = SimFs(self.machine.disk, self.rng, "consumer")
        layout = open_spool(self.machine, fs).layout
        for channel in self.seen:
            directory = layout.stream(channel, 5)
            if fs.stat(directory) is None:
                continue
            found: list[tuple[int, bytes]] = []
            seq = -1
            for name in sorted(n for n in fs.listdir(directory) if segment_number(n)):
                fd = fs.open(f"{directory}/{name}", os.O_RDONLY)
                try:
                    header = log.read_header(fs, fd)
                except BadData:
                    break  # being made
                end = log.read_published(fs, fd)
                for item in log.Walk(fs, fd, header.log_id, promised=end, stop=end):
                    if not isinstance(item, log.Entry):
                        raise Violation("a consumer met damage before the published end")
                    note = entry.unpack_note(item.note)
                    parsed = frame.parse(item.frame, [v[0] for v in note.get("v", ())])
                    if parsed.bad_bodies():
                        raise Violation("a consumer met a damaged body")
                    # Unlinks persist in any order: below what is settled, an old segment may be
                    # back while a newer one is gone.
                    is_settled = seq < note["q"] <= self.seen_end[channel]
                    if seq not in (-1, note["q"]) and not is_settled:
                        raise Violation(f"seq {note['q']} follows {seq}")
                    seq = note["q"] + parsed.count
                    if parsed.info.is_blob and "v" not in note:
                        self.check_blob(fs, layout.inbox_blob(PEER, parsed.frame_id), parsed)
                    found.append((note["q"], parsed.frame_id))
            self.see(channel, found, seq)
        fs.die()

    def see(self, channel: str, found: list[tuple[int, bytes]], end: int) -> None:
        """(seq, frame id) of what there is, up to the seq `end`. What is settled may be deleted;
        after a power cut an older end is published until the receiver has started."""
        seen = self.seen[channel]
        if found and found[0][0] > self.seen_end[channel]:
            raise Violation(f"{channel}: there is a gap behind what a consumer saw")
        for seq, frame_id in found:
            if seq >= self.seen_end[channel]:
                seen[seq] = frame_id
            elif seen.get(seq) != frame_id:
                raise Violation(f"{channel}: what a consumer saw is gone or changed")
        self.seen_end[channel] = max(end, self.seen_end[channel])
        self.check_order(channel)

    def check_order(self, channel: str) -> None:
        """Of each lane a beginning, in its order, once."""
        for lane in self.lanes:
            if lane.key.channel == channel:
                ids = [one.frame_id for one in lane.frames]
                mine = set(ids)
                stored = [frame_id for frame_id in self.seen[channel].values() if frame_id in mine]
                if stored != ids[: len(stored)]:
                    raise Violation(f"{lane.key}: lost, doubled or out of order in the inbox")

    def check_all(self) -> None:
        sent = sum(len(lane.frames) for lane in self.lanes if lane.key.channel != REFUSED)
        if sum(map(len, self.seen.values())) != sent:
            raise Violation("the consumer did not get everything")

    def check_blob(self, fs: SimFs, path: str, parsed: frame.Frame) -> None:
        if fs.stat(path) is None:
            raise Violation("a stored frame names a blob that is not there")
        fd = fs.open(path, os.O_RDONLY)
        if crc32(fs.read_at(fd, fs.size(fd), 0)) != parsed.crcs[0]:
            raise Violation("a stored frame names a blob that is damaged")

    def check_match(self, store: ReceiverStore, lane: SendingLane) -> None:
        head = store.head(lane.key)
        at = self.rng.randrange(lane.find(head) + 1)
        heads = (Head(7, b"?" * 16), lane.heads[at])
        spool_id = lane.key.spool_id
        told = store.match(PEER, MatchRequest(spool_id, lane.key.channel, 5, heads))
        if told.head != head:
            raise Violation("a match tells another head")
        if told.common is None:
            if self.limits.match_frames > 1000 or lane.heads[at].number >= told.floor:
                raise Violation(f"{lane.key}: a match does not know a common head")
            return
        if told.common != lane.heads[at] or chain.advance(told.common, told.frames) != head:
            raise Violation(f"{lane.key}: a match tells frames that do not lead to the head")
        voids = {
            (one.frame_id, void.index)
            for one in lane.frames[at : lane.find(head)]
            for void in one.voids
        }
        got = {(void.frame_id, void.index) for void in told.voids}
        while told.voids_to is not None:
            asked = MatchRequest(spool_id, lane.key.channel, 5, heads, None, told.voids_to)
            told = store.match(PEER, asked)
            got |= {(void.frame_id, void.index) for void in told.voids}
        if not voids <= got and self.limits.match_frames > 1000:
            raise Violation(f"{lane.key}: a match forgets stored voids")
