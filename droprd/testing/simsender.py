"""The sender process of a simulated node: it merges, pushes, uploads, matches, and hears answers.

What the real worker does with asyncio and libcurl is done here one step at a time; the store, its
decisions and the bytes that travel are the real ones.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from random import Random
from typing import Literal

from droprd.core import ask, entry
from droprd.core import frame as frames
from droprd.core.push import LaneAnswer, Push, decode_push_answer, encode_push
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.outbox import OutboxStore
from droprd.spool.outgoing import Outgoing
from droprd.spool.settling import Conversation, Outcome
from droprd.testing.oracle import Copy, Oracle
from droprd.testing.simdisk import SimDisk
from droprd.testing.simnet import Network, Piece, Reply, Request
from droprd.testing.simproducer import ROOT, Producer, open_spool
from droprd.testing.simulation import Machine, SimFs, Violation

Mode = Literal["", "replay", "continue"]


@dataclass(slots=True)
class _Upload:
    frame_id: bytes
    size: int
    have: int


class Sender:
    """One life of the sender process, with what it has under way."""

    def __init__(
        self, machine: Machine, network: Network, rng: Random, peer: str, *, retain_s: float
    ) -> None:
        """`peer` is how the receiver calls this node. Opening may crash."""
        self.fs = machine.start("sender")
        self._network = network
        self._rng = rng
        self._peer = peer
        self._space_wanted = retain_s == 0
        self.store = OutboxStore.open(
            open_spool(machine, self.fs), segment_bytes_max=9_000, retain_s=retain_s
        )
        self.first_round_done = False
        self.matches: dict[Lane, tuple[Conversation, ask.MatchRequest]] = {}
        self._uploads: dict[Lane, _Upload] = {}
        self._pieces: dict[Request, Lane] = {}
        self._pushes: dict[Request, list[Outgoing]] = {}
        self._asked: dict[Request, tuple[Lane, Conversation]] = {}
        self._busy: set[Lane] = set()

    def work(self, *, calm: bool) -> None:
        """Some of what a sender does all the time."""
        rng = self._rng
        if calm:
            self.store.merge_all()
            self.first_round_done = True
        elif rng.random() < 0.4:
            self.store.merge_round()
            self.first_round_done = True
        self._match()
        self._upload()
        self._push()
        if calm or rng.random() < 0.3:
            self.store.commit()
        if rng.random() < 0.1:
            self.store.tend(space_wanted=self._space_wanted and rng.random() < 0.3)

    def reset(self, mode: Mode, lane: Lane) -> None:
        """An operator says what to do with a lane that is held."""
        if lane not in self._busy:
            self.matches[lane] = self.store.begin_match(lane, mode)

    def give_up(self) -> None:
        """All requests under way take too long."""
        self._pushes.clear()
        self._asked.clear()
        self._pieces.clear()
        self._busy.clear()

    def _push(self) -> None:
        rng = self._rng
        lanes = [s.lane for s in self.store.waiting_lanes()]
        busy = self._busy | self.matches.keys() | self._uploads.keys()
        lanes = [lane for lane in lanes if lane not in busy]
        rng.shuffle(lanes)
        outs: list[Outgoing] = []
        for lane in lanes[: rng.choice((1, 2, 3))]:
            out = self.store.next_push(lane, rng.choice((1, 3000, 1 << 20)), rng.choice((1, 100)))
            if out is not None:
                outs.append(out)
        if not outs:
            return
        parts = [encode_push(Push(self.store.spool_id, tuple(out.push for out in outs)))]
        for out in outs:
            for piece in out.pieces:
                if isinstance(piece, tuple):
                    fd, offset, length = piece
                    parts.append(self.fs.read_at(fd, length, offset))
                else:
                    parts.append(bytes(piece))
            self.store.release(out)
        request = Request("push", self._peer, b"".join(parts), self)
        self._pushes[request] = outs
        self._busy.update(out.lane for out in outs)
        self._network.ask(request)

    def _match(self) -> None:
        for lane, (talk, wanted) in list(self.matches.items()):
            if lane not in self._busy:
                request = Request("match", self._peer, ask.encode_match(wanted), self)
                self._asked[request] = lane, talk
                self._busy.add(lane)
                self._network.ask(request)

    def _upload(self) -> None:
        for lane, upload in list(self._uploads.items()):
            if lane not in self._busy:
                fd = self.store.open_blob(upload.frame_id)
                data = self.fs.read_at(fd, 4000, upload.have)
                self.fs.close(fd)
                piece = Piece(upload.frame_id, upload.have, upload.size)
                request = Request("blob", self._peer, data, self, piece)
                self._pieces[request] = lane
                self._busy.add(lane)
                self._network.ask(request)

    def hear(self, reply: Reply) -> None:
        """An answer has come; to a request that was given up too."""
        request = reply.request
        if request in self._pushes:
            outs = self._pushes.pop(request)
            answers = decode_push_answer(reply.body, len(outs))
            for out, answer in zip(outs, answers, strict=True):
                self._busy.discard(out.lane)
                self._judged(out, answer)
        elif request in self._pieces:
            lane = self._pieces.pop(request)
            self._busy.discard(lane)
            upload = self._uploads[lane]
            upload.have = ask.decode_blob_answer(reply.body)
            if upload.have >= upload.size:
                del self._uploads[lane]
        elif request in self._asked:
            lane, talk = self._asked.pop(request)
            self._busy.discard(lane)
            result = self.store.on_match(talk, ask.decode_match_answer(reply.body))
            if isinstance(result, Outcome):
                del self.matches[lane]
            else:
                self.matches[lane] = talk, result

    def _judged(self, out: Outgoing, answer: LaneAnswer) -> None:
        outcome = self.store.on_answer(out, answer)
        if outcome.kind == "conflict":
            self.matches[out.lane] = self.store.begin_match(out.lane)
        elif outcome.kind == "need":
            assert out.blob is not None
            frame_id, size = out.blob
            self._uploads[out.lane] = _Upload(frame_id, size, outcome.need[frame_id])


def dead_letters(fs: SimFs) -> set[str]:
    """The ids of the messages in a node's outbox/dead.log."""
    path = f"{ROOT}/outbox/dead.log"
    if fs.stat(path) is None:
        return set()
    fd = fs.open(path, os.O_RDONLY)
    header = log.read_header(fs, fd)
    found: set[str] = set()
    for item in log.Walk(fs, fd, header.log_id, promised=log.read_published(fs, fd)):
        if isinstance(item, log.Damage):
            raise Violation("dead.log is damaged")
        if not item.frame:
            continue  # an operator took letters away
        note = entry.unpack_note(item.note)
        frame = frames.parse(item.frame, [v[0] for v in note["v"]])
        ids = frame.ids()
        found.update(ids[index] for index, _ in note["i"])
    fs.close(fd)
    return found


class SendingNode:
    """A machine that sends: its producers, its sender, and the life line of its spool.

    Attributes:
        saved: an older copy of its disk, and when it was taken.
    """

    def __init__(
        self, machine: Machine, oracle: Oracle, rng: Random, copy: Copy, producers: int
    ) -> None:
        self.peer = machine.name
        self.copy = copy
        self.machine = machine
        self.producers = [Producer(machine, oracle, rng, f"producer{i}") for i in range(producers)]
        self.sender: Sender | None = None
        self.saved: tuple[SimDisk, int] | None = None

    def note_boot(self, now: int) -> None:
        """Let the oracle know which boot this is."""
        boot_id = self.machine.clock.boot_id()
        if not self.copy.boots or self.copy.boots[-1][0] != boot_id:
            self.copy.boots.append((boot_id, now))
