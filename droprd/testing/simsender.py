"""The sending half of a simulated node: producers with journals, and the sender process.

Everything here runs the real code; what it adds is only which process does what and when, and what
the oracle is told.
"""

from __future__ import annotations

from random import Random

from droprd.errors import SendInDoubt, SpoolFull, SpoolNotReady
from droprd.model import Lane
from droprd.spool.handle import Spool
from droprd.spool.journal import Journal
from droprd.spool.layout import Layout, make_spool, read_version
from droprd.spool.puts import Put
from droprd.testing.oracle import Copy, Fate, Oracle, Sent
from droprd.testing.simulation import NEVER, Crash, Machine, SimFs

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
