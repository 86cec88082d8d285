"""Crashes of one log file: its writer, a reader beside it, and recovery, which may crash too.

The oracle knows what `sync` promised, what recovery handed out, and what a reader saw. All of it
must be there ever after, in order, with nothing between it and nothing that was once cut away.
"""

from __future__ import annotations

import contextlib
import os
from random import Random
from typing import NoReturn

from droprd.core.entry import ENTRY_BYTES, Kind, pack_note
from droprd.core.frame import Stamp, build
from droprd.errors import BadData
from droprd.model import Lane
from droprd.spool import log
from droprd.testing.simdisk import SimDisk
from droprd.testing.simulation import Chaos, Crash, Machine, Rates, SimFs, SimTime, Violation

PATH = "/spool/a.log"
ONE_SECTOR = 512 - ENTRY_BYTES - 8
LANE = Lane("berlin", "sites", 5)


class LogSimulation:
    """One file, from its creation through many crashes."""

    def __init__(self, seed: int, disable_sites: frozenset[str] = frozenset()) -> None:
        self.rng = Random(seed)
        rates = Rates(per_step=self.rng.choice((0.05, 0.3)), others=1.5, kill=1, power=2, error=0.3)
        self.chaos = Chaos(self.rng, rates)
        self.machine = Machine(
            "node", SimDisk(disable_sites=disable_sites), SimTime(), self.rng, self.chaos
        )
        self.chaos.run_others = lambda fs: self.read()
        # What the file holds for certain, and what was written after it.
        self.promised: list[bytes] = []
        self.hoped: list[bytes] = []
        self.serial = 0
        self.just_cut = False
        # Few sizes: then new entries often end where an old one, once cut away, began.
        self.lazy = self.rng.choice((0.2, 0.9))
        self.sizes = self.rng.sample((0, 20, ONE_SECTOR, 3000), self.rng.choice((1, 1, 2, 4)))
        if self.lazy > 0.5:
            # Long tails of whole sectors: some valid, some not, in any order.
            self.sizes = [ONE_SECTOR]
            self.machine.disk.subsets_only = True
            rates.per_step, rates.power = 0.06, 6

    def run(self, crashes: int) -> int:
        """Go on until so many crashes have happened. Returns their number. Raises: Violation."""
        fs = self.machine.start("setup")
        fs.alarm = 1 << 62
        fs.mkdir("/spool")
        fs.sync_dir("/", "setup")
        while self.chaos.crashes < crashes:
            self.life()
        self.chaos.quiet = True
        self.life()
        return self.chaos.crashes

    def life(self) -> None:
        """One process opens the file, writes, and usually dies."""
        try:
            fs = self.machine.start("writer")
            writer = self.open(fs)
            for _ in range(self.rng.randrange(1, 12)):
                if self.just_cut and self.rng.random() < 0.8:
                    self.write_and_lose_power(writer)
                self.write(fs, writer)
            fs.die()
        except Crash:
            pass

    def open(self, fs: SimFs) -> log.LogWriter:
        found: list[bytes] = []
        self.just_cut = False
        try:
            if fs.stat(PATH) is None:
                self.expect(not self.promised, "the file is gone")
                return self.create(fs)
            try:
                recovered = log.recover(
                    fs,
                    PATH,
                    Kind.JOURNAL,
                    site="log",
                    on_entry=lambda entry: found.append(bytes(entry.note)),
                    set_aside=self.set_aside,
                )
            except BadData:
                self.expect(not self.promised, "the header is gone")
                fs.unlink(PATH)
                fs.sync_dir("/spool", "setup")
                return self.create(fs)
        except OSError:
            self.disk_error(fs)
        self.expect(not recovered.damage, "a crash damaged what was promised")
        self.check(found, whole=True)
        # What recovery hands out is acted upon: it is promised from now on, the rest is not there.
        self.promised, self.hoped = found, []
        return recovered.writer

    def set_aside(self, path: str, offset: int, data: bytes) -> None:
        self.just_cut = True

    def create(self, fs: SimFs) -> log.LogWriter:
        self.hoped = []
        return log.create(
            fs,
            PATH,
            Kind.JOURNAL,
            log_id=self.machine.urandom(16),
            spool_id=bytes(16),
            wall_ns=0,
            site="log",
        )

    def append(self, writer: log.LogWriter) -> None:
        rng = self.rng
        self.serial += 1
        note = b"%08d" % self.serial + bytes(rng.choice(self.sizes))
        if len(self.sizes) > 1 and rng.random() < 0.3:
            note = pack_note(self.serial)
            pieces = build(
                frame_id=rng.randbytes(14) + bytes(2),
                lane=LANE,
                stamp=Stamp(bytes(16), 0, 0),
                bodies=[bytes(rng.choice((1, 100, 700)))],
            )
            writer.append(note, pieces, sum(map(len, pieces)))
        else:
            writer.append(note)
        self.hoped.append(note)

    def write(self, fs: SimFs, writer: log.LogWriter) -> None:
        rng = self.rng
        self.just_cut = False
        for _ in range(rng.randrange(1, 4)):
            self.append(writer)
        prepare = rng.choice((0, 0, 2000))
        try:
            if rng.random() < self.lazy:
                writer.flush(prepare)
                return
            try:
                writer.sync("log.put", prepare)
            except OSError:
                if writer.broken is not None:
                    raise
                writer.cut_back("log.cut_back")
                # Refused for good: none of it may ever be seen.
                self.hoped = []
                self.just_cut = True
                return
        except (OSError, log.LogBroken):
            self.disk_error(fs)
        self.promised += self.hoped
        self.hoped = []

    def write_and_lose_power(self, writer: log.LogWriter) -> NoReturn:
        """An unsynced entry where something was cut: the old bytes must not come back behind it."""
        self.append(writer)
        with contextlib.suppress(OSError):
            writer.flush()
        self.chaos.crashes += 1
        self.machine.power_cut()
        raise Crash("power cut")

    def disk_error(self, fs: SimFs) -> NoReturn:
        """After a failed sync the cache lies to every process: the machine is started again."""
        self.machine.power_cut()
        raise Crash(fs.name)

    def read(self) -> None:
        """Another process reads what is published; whatever it sees must last."""
        fs = SimFs(self.machine.disk, self.rng, "reader")
        if fs.stat(PATH) is None:
            return
        fd = fs.open(PATH, os.O_RDONLY)
        try:
            header = log.read_header(fs, fd)
        except BadData:
            return
        published = log.read_published(fs, fd)
        walk = log.Walk(fs, fd, header.log_id, promised=published, stop=published)
        seen = []
        for item in walk:
            if isinstance(item, log.Damage):
                raise Violation("a reader met damage before the published end")
            seen.append(bytes(item.note))
        self.check(seen, whole=False)
        new = len(seen) - len(self.promised)
        if new > 0:
            self.promised += self.hoped[:new]
            del self.hoped[:new]

    def check(self, found: list[bytes], *, whole: bool) -> None:
        known = self.promised + self.hoped
        self.expect(found == known[: len(found)], "entries are missing, changed or came back")
        self.expect(not whole or len(found) >= len(self.promised), "promised entries are gone")

    def expect(self, truth: bool, what: str) -> None:
        if not truth:
            raise Violation(what)
