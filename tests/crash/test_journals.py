"""Two producers on a simulated disk that kills, cuts the power, and fails: what returned is there.

Each seed is one history of puts by processes that die, are started again, and adopt each other's
journals. Afterwards (and now and then before) somebody reads all journals as the sender does.
"""

from __future__ import annotations

from random import Random

import pytest

from droprd.core import frame as frames
from droprd.errors import BadData, SendInDoubt, SpoolFull, SpoolNotReady
from droprd.model import Lane
from droprd.spool import journalfile, log
from droprd.spool.journal import Journal
from droprd.spool.layout import Layout, make_spool
from droprd.spool.puts import Put
from droprd.testing.simdisk import SimDisk
from droprd.testing.simfs import Crash, Fault, SimFs

LANE = Lane("berlin", "sites", 5)
STRIKES = (None, None, None, "kill", "power", Fault.DIE_HALFWAY, Fault.ENOSPC, Fault.EIO, Fault.EIO)


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1000

    def boot_id(self) -> bytes:
        return b"b" * 16

    def boot_ns(self) -> int:
        self.now_ns += 1000
        return self.now_ns

    def wall_ns(self) -> int:
        return self.now_ns


class Lost(AssertionError):
    """The history broke a promise."""


class History:
    """One history, drawn from its seed."""

    def __init__(self, seed: int, disable_sites: frozenset[str] = frozenset()) -> None:
        self.rng = Random(seed)
        self.disk = SimDisk(disable_sites=disable_sites)
        self.layout = Layout("/spool")
        fs = SimFs(self.disk, self.rng)
        self.spool_id = make_spool(fs, "/spool", self.rng.randbytes).spool_id
        self.disk.sync_all()
        self.clock = Clock()
        self.processes: dict[str, tuple[SimFs, Journal]] = {}
        self.accepted: set[int] = set()
        self.undecided: set[int] = set()  # in doubt, or the process died before it was told
        self.count = 0

    def run(self) -> None:
        for _ in range(self.rng.randrange(5, 40)):
            self.step(self.rng.choice("ab"))
            if self.rng.random() < 0.3:
                self.check()
        self.power_cut()
        self.check()

    def process(self, name: str) -> tuple[SimFs, Journal]:
        if name not in self.processes or not self.processes[name][0].alive:
            fs = SimFs(self.disk, self.rng, name)
            journal = Journal(
                fs,
                self.clock,
                self.rng.randbytes,
                self.layout,
                self.spool_id,
                uid=0,
                bytes_max=12_000,
            )
            journal.spare_bytes = 8000
            self.processes[name] = fs, journal
        return self.processes[name]

    def step(self, name: str) -> None:
        rng = self.rng
        fs, journal = self.process(name)
        strike = rng.choice(STRIKES)
        if strike is not None:
            fs.alarm = fs.steps + rng.randrange(1, 9)

        def interrupt(fs: SimFs, operation: str) -> Fault | None:
            if not isinstance(strike, Fault):
                fs.die()
                return None
            if rng.random() < 0.3:
                fs.alarm = fs.steps + rng.randrange(1, 4)  # faults seldom come alone
            return strike

        fs.interrupt = interrupt
        numbers = range(self.count, self.count + rng.choice((1, 1, 3, 40)))
        self.count = numbers.stop
        put = Put(LANE, [b"%d|" % n + bytes(rng.choice((0, 300, 2000))) for n in numbers])
        try:
            journal.put(put)
            self.accepted.update(numbers)
        except (SendInDoubt, Crash):
            self.undecided.update(numbers)
        except (SpoolFull, SpoolNotReady):
            pass
        fs.alarm = 1 << 62
        if fs.alive and rng.random() < 0.1:
            journal.close()
            fs.die()
        if strike == "power" and not fs.alive:
            self.power_cut()

    def power_cut(self) -> None:
        for fs, _ in self.processes.values():
            fs.die()
        self.disk.power_cut(self.rng)

    def check(self) -> None:
        """Read as the sender does: in the order of stamps, held journals to their synced end."""
        fs = SimFs(self.disk, self.rng, "reader")
        found: list[tuple[int, int, int]] = []
        for name in journalfile.list_journals(fs, self.layout):
            try:
                file = journalfile.open_journal(fs, self.layout, name)
            except BadData:
                continue
            assert file is not None
            stop = file.published()
            if file.hold():
                fs.sync(file.fd, "reader")
                stop = file.size()
            stop = min(stop, journalfile.left_behind(fs, self.layout).get(name, stop))
            promised = min(file.published(), stop)
            log_id = file.header.log_id
            for item in log.Walk(fs, file.fd, log_id, promised=promised, stop=stop):
                if isinstance(item, log.Damage):
                    raise Lost(f"{name} is damaged: {item}")
                if len(item.frame):
                    frame = frames.parse(bytes(item.frame))
                    found += [
                        (frame.info.boot_ns, i, int(bytes(frame.body(i)).partition(b"|")[0]))
                        for i in range(frame.count)
                    ]
        fs.die()
        numbers = [number for _, _, number in sorted(found)]
        if len(set(numbers)) < len(numbers):
            raise Lost("a message is there twice")
        if not self.accepted <= set(numbers):
            raise Lost(f"accepted and lost: {sorted(self.accepted - set(numbers))}")
        if not set(numbers) <= self.accepted | self.undecided:
            raise Lost("a message is there that was refused")
        in_order = [number for number in numbers if number in self.accepted]
        if in_order != sorted(in_order):
            raise Lost("the order of sends is not kept")


@pytest.mark.parametrize("seed", range(0, 600, 100))
def test_what_returned_survives_every_crash_once_and_in_order(seed: int) -> None:
    for each in range(seed, seed + 100):
        try:
            History(each).run()
        except Lost as error:
            pytest.fail(f"seed {each}: {error}")


@pytest.mark.parametrize(
    "site", ["journal.put", "journal.create_dir", "journal.cut", "journal.note"]
)
def test_the_simulation_notices_a_sync_that_is_left_out(site: str) -> None:
    for seed in range(2000):
        try:
            History(seed, frozenset([site])).run()
        except (Lost, BadData):
            return
    pytest.fail(f"nothing was lost without the sync {site}")
