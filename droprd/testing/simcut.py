"""One history that chance hardly ever finds: old bytes that fit exactly where a lane was cut.
A sender writes frame Y into a lane and dies before it commits. Meanwhile another producer,
stopped in the middle of a put, publishes Z, whose stamp is earlier. The next sender cuts Y off,
merges Z and Y, commits, and the power fails: if the cut was not synced, the old Y may come back in
Z's place.
"""

from __future__ import annotations

from random import Random

from droprd.core.frame import parse
from droprd.core.outstate import START
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.handle import Spool
from droprd.spool.journal import Journal
from droprd.spool.lanes import LaneFiles
from droprd.spool.mending import mend
from droprd.spool.merging import Merger
from droprd.spool.puts import Put
from droprd.spool.senderlog import SenderLog, open_sender_log
from droprd.testing.simdisk import SimDisk
from droprd.testing.simproducer import EVEN_BYTES, make_node_spool, open_spool
from droprd.testing.simulation import (
    NEVER,
    Chaos,
    Crash,
    Machine,
    Rates,
    SimClock,
    SimFs,
    SimTime,
    Violation,
)

LANE = Lane("berlin", "sites", 5)


class _SlowClock:
    """The clock of a process that looked at it before it was stopped."""

    def __init__(self, clock: SimClock) -> None:
        self._clock = clock
        self._boot_ns = clock.boot_ns()

    def boot_id(self) -> bytes:
        return self._clock.boot_id()

    def boot_ns(self) -> int:
        return self._boot_ns

    def wall_ns(self) -> int:
        return self._clock.wall_ns()


class CutSimulation:
    """The history, with a power cut drawn from the seed."""

    def __init__(self, seed: int, disable_sites: frozenset[str] = frozenset()) -> None:
        self.rng = Random(seed)
        chaos = Chaos(self.rng, Rates(), quiet=True)
        disk = SimDisk(disable_sites=disable_sites)
        disk.subsets_only = True
        self.machine = Machine("node", disk, SimTime(), self.rng, chaos)
        make_node_spool(self.machine)

    def start(self, name: str) -> Spool:
        """A process that nothing happens to."""
        fs = self.machine.start(name)
        fs.alarm = fs.read_alarm = NEVER
        return open_spool(self.machine, fs)

    def sender(self) -> tuple[Spool, SenderLog, Merger, LaneFiles]:
        """A sender that has mended what was left."""
        spool = self.start("sender")
        sender_log, _ = open_sender_log(spool)
        files = LaneFiles(spool, 1 << 20)
        mend(spool, sender_log.state, files)
        return spool, sender_log, Merger(spool, sender_log, files), files

    def put(self, body: bytes, clock: SimClock | _SlowClock) -> None:
        """Send one message, and keep the journal."""
        spool = self.start("producer")
        journal = Journal(spool.fs, clock, spool.urandom, spool.layout, spool.spool_id, uid=0)
        journal.put(Put(LANE, [body * EVEN_BYTES]))

    def expect(self, wanted: bytes) -> None:
        """What a new sender finds in the lane: the first byte of each body."""
        _, sender_log, merger, files = self.sender()
        merger.round()
        found = b""
        for _, _, item in files.walk(sender_log.state.lane(LANE), START):
            found += b"?" if isinstance(item, log.Damage) else bytes(parse(item.frame).body(0)[:1])
        if found != wanted:
            raise Violation(f"the lane holds {found!r}")

    def die_at(self, spool: Spool, operation: str, count: int) -> None:
        """Let a process die before the given operation of that kind."""
        fs = spool.fs
        assert isinstance(fs, SimFs)
        left = count

        def interrupt(process: SimFs, here: str) -> None:
            nonlocal left
            process.alarm = process.steps + 1
            left -= here == operation
            if left == 0:
                process.die()

        fs.interrupt = interrupt
        fs.alarm = fs.steps + 1

    def run(self) -> int:
        """Returns the number of crashes. Raises: Violation."""
        self.put(b"x", self.machine.clock)
        self.sender()[2].round()
        self.machine.kill_all()
        stopped = _SlowClock(self.machine.clock)
        self.put(b"y", self.machine.clock)
        self.die_before_the_commit()
        self.put(b"z", stopped)
        self.sender()[2].round()
        self.machine.power_cut()
        self.expect(b"xzy")
        return 2

    def die_before_the_commit(self) -> None:
        """A sender whose merge is in its lane and nowhere else."""
        spool, _, merger, _ = self.sender()
        self.die_at(spool, "write", 2)  # the first goes into the lane, the second to sender.log
        try:
            merger.round()
        except Crash:
            return
        raise AssertionError("the sender did not come to its second write")
