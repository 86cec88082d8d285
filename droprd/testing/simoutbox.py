"""Crashes of the outbox alone: producers, their journals, and the sender that merges them.

The oracle reads the lanes: what a merge has committed is what would be sent, so it must stay as it
is, in that order, whatever crashes; and after the faults stop every accepted message is in it.
"""

from __future__ import annotations

from random import Random

from droprd.core.frame import parse
from droprd.core.outstate import START
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.lanes import LaneFiles
from droprd.spool.layout import Layout
from droprd.spool.mending import mend
from droprd.spool.merging import Merger
from droprd.spool.senderlog import SenderLog, open_sender_log
from droprd.testing.oracle import Oracle
from droprd.testing.simdisk import SimDisk
from droprd.testing.simproducer import (
    ROOT,
    Producer,
    blob_serial,
    check_kept,
    make_node_spool,
    open_spool,
    serial_of,
)
from droprd.testing.simulation import Chaos, Crash, Machine, Rates, SimFs, SimTime, Violation

LANES = [Lane("berlin", "sites", 5), Lane("berlin", "sites", 0), Lane("paris", "sites", 5)]
SEGMENT_BYTES_MAX = 9_000


class OutboxSimulation:
    """One node that only sends; nothing takes what it has merged."""

    def __init__(self, seed: int, disable_sites: frozenset[str] = frozenset()) -> None:
        self.rng = Random(seed)
        rates = Rates(
            per_step=self.rng.choice((0.01, 0.05, 0.2)),
            others=self.rng.choice((2, 8)),
            kill=1,
            power=self.rng.choice((0.3, 2)),
            error=self.rng.choice((0, 0, 0.3)),
        )
        self.chaos = Chaos(self.rng, rates)
        self.time = SimTime()
        disk = SimDisk(disable_sites=disable_sites)
        disk.subsets_only = self.rng.random() < 0.3
        self.machine = Machine("node", disk, self.time, self.rng, self.chaos)
        self.oracle = Oracle()
        self.copy = self.oracle.copy()
        self.producers = [
            Producer(self.machine, self.oracle, self.rng, f"producer{i}") for i in range(3)
        ]
        profile = self.rng.choice(("", "", "even", "short"))
        if profile:
            rates.per_step, rates.others, rates.kill, rates.power = 0.2, 8, 3, 2
            disk.subsets_only = True
        for producer in self.producers:
            # Frames of one size in one lane, and processes that are stopped in mid-commit; or
            # journals that are hardly made when they are full, or left to be adopted.
            producer.even = profile == "even"
            if profile == "short":
                producer.journal_bytes_max = 4600
                producer.blob_share = 0
        self.sender: SenderProcess | None = None
        self.known: dict[Lane, list[int]] = {}
        self.chaos.run_others = self._others
        self.running: list[object] = []
        make_node_spool(self.machine)

    def run(self, crashes: int, actions: int = 400) -> int:
        """Go on until so many crashes or actions; then heal, and everything must be merged."""
        for _ in range(actions):
            if self.chaos.crashes >= crashes:
                break
            self.act()
        self.chaos.quiet = True
        self.machine.power_cut()
        for _ in range(6):
            self.time.pass_s(10)
            self.run_sender()
        check_kept(self.machine)
        found = {serial for serials in self.known.values() for serial in serials}
        self.oracle.check_all_there(found, set(), "outbox")
        if self.sender is not None and self.sender.merger.unmerged_bytes():
            raise Violation("something is never merged")
        return self.chaos.crashes

    def act(self) -> None:
        """One thing that some process does."""
        draw = self.rng.random()
        self.note_boot()
        if draw < 0.5:
            self.send(self.rng.choice(self.producers))
        elif draw < 0.8:
            self.run_sender()
        elif draw < 0.85:
            self.time.pass_s(self.rng.choice((0.1, 6)))
        elif draw < 0.9:
            self.rng.choice(self.producers).leave()
        elif draw < 0.95 and self.machine.processes:
            self.chaos.crashes += 1
            self.rng.choice(self.machine.processes).die()
        elif draw >= 0.97:
            self.chaos.crashes += 1
            self.machine.power_cut()

    def note_boot(self) -> None:
        boot_id = self.machine.clock.boot_id()
        if not self.copy.boots or self.copy.boots[-1][0] != boot_id:
            self.copy.boots.append((boot_id, self.oracle.now))

    def _others(self, fs: SimFs) -> None:
        if self.rng.random() < 0.75:
            self.send(self.rng.choice(self.producers))
        else:
            self.run_sender()

    def send(self, producer: Producer) -> None:
        """Unless that producer is in the middle of something."""
        if producer in self.running:
            return
        self.running.append(producer)
        self.note_boot()
        try:
            producer.send(LANES, self.copy)
        except Crash:
            pass
        finally:
            self.running.remove(producer)

    def run_sender(self) -> None:
        """Start the sender if need be, and let it do a round."""
        if "sender" in self.running:
            return
        self.running.append("sender")
        try:
            if self.sender is None or not self.sender.fs.alive:
                self.sender = None
                self.sender = SenderProcess(self)
            self.sender.work()
        except Crash:
            pass
        except OSError:
            # A worker exits after a disk error; the machine's disk is seen to.
            self.machine.power_cut()
        finally:
            self.running.remove("sender")


class SenderProcess:
    """One life of the sender."""

    def __init__(self, world: OutboxSimulation) -> None:
        self.world = world
        self.fs = world.machine.start("sender")
        spool = open_spool(world.machine, self.fs)
        self.log: SenderLog
        self.log, damage = open_sender_log(spool)
        self.lanes = LaneFiles(spool, SEGMENT_BYTES_MAX)
        self.merger = Merger(spool, self.log, self.lanes)
        mend(spool, self.log.state, self.lanes)
        if damage:
            raise Violation("a crash damaged sender.log")
        self.first = True
        self.check()

    def work(self) -> None:
        """A round, and now and then what follows it."""
        began = self.world.oracle.now
        small = not self.world.chaos.quiet and self.world.rng.random() < 0.5
        self.merger.round(bytes_max=1000 if small else 1 << 20)
        if self.first:
            self.world.copy.sender_ran.append(began)
            self.first = False
        self.check()
        if self.world.rng.random() < 0.4:
            self.merger.retire()
        if self.world.rng.random() < 0.1:
            self.merger.sync_lanes()
            self.log.checkpoint()

    def check(self) -> None:
        """What is committed must be what was committed, and something more."""
        world = self.world
        for lane, state in self.log.state.lanes.items():
            serials: list[int] = []
            for _, _, item in self.lanes.walk(state, START):
                if isinstance(item, log.Damage):
                    raise Violation(f"{lane} is damaged at {item}")
                found = parse(item.frame)
                if found.lane != lane:
                    raise Violation(f"{lane} holds a frame of {found.lane}")
                if found.info.is_blob:
                    serials.append(blob_serial(self.fs, self._blob_paths(found.frame_id), found))
                    continue
                serials += [serial_of(bytes(found.body(i))) for i in range(found.count)]
            known = world.known.get(lane, [])
            if serials[: len(known)] != known:
                raise Violation(f"{lane}: what was committed has changed")
            if state.accepted != len(serials):
                raise Violation(f"{lane}: {state.accepted} counted, {len(serials)} there")
            world.known[lane] = serials
            world.oracle.check_once(serials, str(lane))
            world.oracle.check_order(serials, str(lane))
        for lane, known in world.known.items():
            if known and lane not in self.log.state.lanes:
                raise Violation(f"{lane} is gone")

    def _blob_paths(self, frame_id: bytes) -> list[str]:
        layout = Layout(ROOT)
        names = self.fs.listdir(layout.outbox_blobs)
        return [f"{layout.outbox_blobs}/{n}" for n in names if n.endswith(frame_id.hex())]
