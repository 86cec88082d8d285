"""The sending half of a simulated node: producers with journals, and the sender process.

Everything here runs the real code; what it adds is only which process does what and when, and what
the oracle is told.
"""

from __future__ import annotations

import os
from random import Random
from typing import Literal

from droprd.core import ask, entry
from droprd.core import frame as frames
from droprd.core.push import Push, decode_push_answer, encode_push
from droprd.errors import SendInDoubt, SpoolFull, SpoolNotReady
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.handle import Spool
from droprd.spool.journal import Journal
from droprd.spool.layout import Layout, make_spool, read_version
from droprd.spool.outbox import OutboxStore
from droprd.spool.outgoing import Outgoing
from droprd.spool.puts import Put
from droprd.spool.settling import Conversation, Outcome
from droprd.testing.oracle import Copy, Fate, Oracle, Sent
from droprd.testing.simnet import Network, Reply, Request
from droprd.testing.simulation import NEVER, Crash, Machine, SimFs, Violation

ROOT = "/spool"
JOURNAL_BYTES_MAX = 12_000
PADDING = (0, 0, 50, 300, 512, 2000)


def make_node_spool(machine: Machine) -> bytes:
    """Make the spool of a machine, undisturbed. Returns its spool id."""
    fs = machine.start("init")
    fs.alarm = NEVER
    facts = make_spool(fs, ROOT, machine.urandom)
    machine.disk.sync_all()
    fs.die()
    return facts.spool_id


def open_spool(machine: Machine, fs: SimFs) -> Spool:
    """The spool as one process uses it."""
    facts = read_version(fs, ROOT)
    return Spool(fs, machine.clock, machine.urandom, Layout(ROOT), facts.spool_id)


def body_of(serial: int, padding: int) -> bytes:
    """A body that tells which message it is."""
    return b"%d|" % serial + bytes(padding)


def serial_of(body: bytes) -> int:
    """The other way round."""
    return int(body[: body.index(b"|")])


class Producer:
    """An application that sends. It starts when it is first asked to, and again after its death."""

    def __init__(self, machine: Machine, oracle: Oracle, rng: Random, name: str) -> None:
        self.machine = machine
        self.name = name
        self._oracle = oracle
        self._rng = rng
        self._fs: SimFs | None = None
        self._journal: Journal | None = None

    def _open(self) -> Journal:
        if self._journal is None or self._fs is None or not self._fs.alive:
            self._fs = self.machine.start(self.name)
            spool = open_spool(self.machine, self._fs)
            self._journal = Journal(
                spool.fs,
                spool.clock,
                spool.urandom,
                spool.layout,
                spool.spool_id,
                uid=0,
                bytes_max=JOURNAL_BYTES_MAX,
            )
        return self._journal

    def send(self, lanes: list[Lane], copy: Copy) -> None:
        """One commit of a few messages; Crash if it does not survive it."""
        journal = self._open()
        rng = self._rng
        boot_id = self.machine.clock.boot_id()
        sents: list[list[Sent]] = []
        puts: list[Put] = []
        for _ in range(rng.choice((1, 1, 1, 2))):
            lane = rng.choice(lanes)
            group = [
                self._oracle.begin(lane, copy, boot_id) for _ in range(rng.choice((1, 1, 1, 2, 5)))
            ]
            sents.append(group)
            puts.append(Put(lane, [body_of(s.serial, rng.choice(PADDING)) for s in group]))
        journal.commit(puts)
        if any(put.error is not None for put in puts):
            in_doubt = any(isinstance(put.error, SendInDoubt) for put in puts)
            for group in sents:
                for sent in group:
                    self._oracle.end(sent, Fate.UNKNOWN if in_doubt else Fate.REFUSED)
            for put in puts:
                if not isinstance(put.error, SendInDoubt | SpoolFull | SpoolNotReady):
                    raise AssertionError(put.error)
            return
        for group, put in zip(sents, puts, strict=True):
            for sent, message_id in zip(group, put.ids, strict=True):
                self._oracle.end(sent, Fate.ACCEPTED, message_id)

    def leave(self) -> None:
        """End in order."""
        if self._journal is not None and self._fs is not None and self._fs.alive:
            try:
                self._journal.close()
            except Crash:
                return
            self._fs.die()
        self._journal = None


Mode = Literal["", "replay", "continue"]


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
        self._busy.clear()

    def _push(self) -> None:
        rng = self._rng
        lanes = [s.lane for s in self.store.waiting_lanes()]
        lanes = [n for n in lanes if n not in self._busy and n not in self.matches]
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

    def hear(self, reply: Reply) -> list[Outcome]:
        """An answer has come; to a request that was given up too."""
        request = reply.request
        if request.kind == "push":
            outs = self._pushes.pop(request, None)
            if outs is None:
                return []
            self._busy.difference_update(out.lane for out in outs)
            outcomes = []
            for out, answer in zip(outs, decode_push_answer(reply.body, len(outs)), strict=True):
                outcome = self.store.on_answer(out, answer)
                if outcome.kind == "conflict":
                    self.matches[out.lane] = self.store.begin_match(out.lane)
                outcomes.append(outcome)
            return outcomes
        found = self._asked.pop(request, None)
        if found is None:
            return []
        lane, talk = found
        self._busy.discard(lane)
        result = self.store.on_match(talk, ask.decode_match_answer(reply.body))
        if isinstance(result, Outcome):
            self.matches.pop(lane, None)
            return [result]
        self.matches[lane] = talk, result
        return []


def dead_letters(fs: SimFs) -> set[int]:
    """The messages in a node's outbox/dead.log."""
    path = f"{ROOT}/outbox/dead.log"
    if fs.stat(path) is None:
        return set()
    fd = fs.open(path, os.O_RDONLY)
    header = log.read_header(fs, fd)
    found: set[int] = set()
    for item in log.Walk(fs, fd, header.log_id, promised=log.read_published(fs, fd)):
        if isinstance(item, log.Damage):
            raise Violation("dead.log is damaged")
        note = entry.unpack_note(item.note)
        frame = frames.parse(item.frame, [v[0] for v in note["v"]])
        for index, _ in note["i"]:
            body = bytes(frame.body(index))
            if body:
                found.add(serial_of(body))
    fs.close(fd)
    return found
