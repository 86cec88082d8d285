"""Applications that send: the spool of a simulated node, and producers with their journals.

Everything here runs the real code; what it adds is only which process does what and when, and what
the oracle is told.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from random import Random
from zlib import crc32

from droprd.core import frame as frames
from droprd.core.frame import new_frame_id
from droprd.errors import SendInDoubt, SpoolFull, SpoolNotReady
from droprd.model import Lane
from droprd.spool.blobs import remove_blob, write_blob
from droprd.spool.handle import Spool
from droprd.spool.journal import Journal
from droprd.spool.layout import Layout, make_spool, read_version
from droprd.spool.puts import Put
from droprd.testing.oracle import Copy, Fate, Oracle, Sent
from droprd.testing.simulation import NEVER, Crash, Machine, SimFs, Violation

ROOT = "/spool"
JOURNAL_BYTES_MAX = 12_000
PADDING = (0, 0, 50, 300, 512, 2000)
EVEN_BYTES = 512 - 52 - 96 - 11 - 8  # a body of which one entry for berlin/sites fills a sector


def make_node_spool(machine: Machine) -> bytes:
    """Make the spool of a machine, undisturbed. Returns its spool id."""
    fs = machine.start("init")
    fs.alarm = NEVER
    facts = make_spool(fs, ROOT, machine.urandom)
    machine.disk.sync_all()
    fs.die()
    return facts.spool_id


class SimSpool(Spool):
    """A spool that remembers what was set aside in it: that must stay (P3)."""

    machine: Machine

    def set_aside(self, path: str, offset: int, data: bytes) -> str:
        name = super().set_aside(path, offset, data)
        self.machine.kept[name] = data
        return name


def open_spool(machine: Machine, fs: SimFs) -> Spool:
    """The spool as one process uses it."""
    facts = read_version(fs, ROOT)
    spool = SimSpool(fs, machine.clock, machine.urandom, Layout(ROOT), facts.spool_id)
    object.__setattr__(spool, "machine", machine)
    return spool


def check_kept(machine: Machine) -> None:
    """Whatever was set aside is still there, whole."""
    fs = SimFs(machine.disk, Random(0), "checker")
    for name, data in machine.kept.items():
        if fs.stat(name) is None:
            raise Violation(f"{name} was set aside and is gone")
        fd = fs.open(name, os.O_RDONLY)
        if fs.read_at(fd, fs.size(fd), 0) != data:
            raise Violation(f"{name} was set aside and has changed")
        fs.close(fd)


def body_of(serial: int, padding: int) -> bytes:
    """A body that tells which message it is."""
    return b"%d|" % serial + bytes(padding)


def serial_of(body: bytes) -> int:
    """The other way round."""
    return int(body[: body.index(b"|")])


def blob_serial(fs: SimFs, paths: Iterable[str], frame: frames.Frame) -> int:
    """Which message a blob frame holds, after its body was found whole under one of `paths`."""
    for path in paths:
        if fs.stat(path) is not None:
            fd = fs.open(path, os.O_RDONLY)
            body = fs.read_at(fd, fs.size(fd), 0)
            fs.close(fd)
            if len(body) != frame.info.bodies_bytes or crc32(body) != frame.crcs[0]:
                raise Violation(f"the body {path} is not what was sent")
            return serial_of(body)
    raise Violation(f"the body of {frame.frame_id.hex()} is missing")


class Producer:
    """An application that sends. It starts when it is first asked to, and again after its death."""

    def __init__(self, machine: Machine, oracle: Oracle, rng: Random, name: str) -> None:
        self.machine = machine
        self.name = name
        self.even = False
        self.blob_share = 0.08
        self.journal_bytes_max = JOURNAL_BYTES_MAX
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
                bytes_max=self.journal_bytes_max,
            )
        return self._journal

    def send(self, lanes: list[Lane], copy: Copy) -> None:
        """One commit of a few messages; Crash if it does not survive it."""
        journal = self._open()
        rng = self._rng
        if self.even:
            self._send_even(journal, lanes[0], copy)
            return
        if rng.random() < self.blob_share:
            self._send_blob(journal, rng.choice(lanes), copy)
            return
        boot_id = self.machine.clock.boot_id()
        sents: list[list[Sent]] = []
        puts: list[Put] = []
        for _ in range(rng.choice((1, 1, 1, 2))):
            lane = rng.choice(lanes)
            group = [
                self._oracle.begin(lane, copy, boot_id) for _ in range(rng.choice((1, 1, 1, 2, 5)))
            ]
            ttl_ms = rng.choice((0,) * 15 + (5000,))
            for sent in group:
                sent.may_expire = ttl_ms > 0
            sents.append(group)
            bodies = [body_of(s.serial, rng.choice(PADDING)) for s in group]
            puts.append(Put(lane, bodies, ttl_ms=ttl_ms))
        journal.commit(puts)
        for group, put in zip(sents, puts, strict=True):
            self._ended(group, put)

    def _send_even(self, journal: Journal, lane: Lane, copy: Copy) -> None:
        """All frames alike: where one was cut away, any other fits in exactly."""
        sent = self._oracle.begin(lane, copy, self.machine.clock.boot_id())
        put = Put(lane, [b"%d|" % sent.serial + bytes(EVEN_BYTES - 1 - len(str(sent.serial)))])
        journal.commit([put])
        self._ended([sent], put)

    def _send_blob(self, journal: Journal, lane: Lane, copy: Copy) -> None:
        """A body that is a file of its own, put as `droprd.client` does."""
        clock, urandom = self.machine.clock, self.machine.urandom
        sent = self._oracle.begin(lane, copy, clock.boot_id())
        try:
            name = journal.pin()
        except (SpoolFull, SpoolNotReady):
            self._oracle.end(sent, Fate.REFUSED)
            return
        assert self._fs is not None
        layout = Layout(ROOT)
        try:
            frame_id = new_frame_id(clock.wall_ns(), urandom(10))
            body = body_of(sent.serial, self._rng.choice((0, 3000, 9000)))
            blob = write_blob(self._fs, layout, name, frame_id, body)
        except OSError:
            journal.unpin(name)
            self._oracle.end(sent, Fate.REFUSED)
            return
        put = Put(lane, [blob])
        journal.commit([put])
        if put.error is not None and not isinstance(put.error, SendInDoubt):
            remove_blob(self._fs, layout, blob)
        journal.unpin(name)
        self._ended([sent], put)

    def _ended(self, group: list[Sent], put: Put) -> None:
        if put.error is None:
            for sent, message_id in zip(group, put.ids, strict=True):
                self._oracle.end(sent, Fate.ACCEPTED, message_id)
        elif isinstance(put.error, SendInDoubt):
            for sent in group:
                self._oracle.end(sent, Fate.UNKNOWN)
        elif isinstance(put.error, SpoolFull | SpoolNotReady):
            for sent in group:
                self._oracle.end(sent, Fate.REFUSED)
        else:
            raise put.error

    def leave(self) -> None:
        """End in order."""
        if self._journal is not None and self._fs is not None and self._fs.alive:
            try:
                self._journal.close()
            except Crash:
                return
            self._fs.die()
        self._journal = None
