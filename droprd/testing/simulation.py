"""What every simulation shares: machines, their clocks, and the chaos that strikes them.

A simulation runs the real code of `droprd.core` and `droprd.spool` on simulated disks
(`simdisk`), clocks and networks, in one thread, from one seed. Processes interleave at their file
operations: at any step of one of them others may run to an end, as they would on a machine whose
scheduler happens to stop the first there.

`Chaos` draws, from the seed, the steps at which something happens: another process runs, one is
killed (before or halfway through an operation), a machine loses its power, a sync or write fails.
A `Violation` is what an oracle raises when a promise of the design is broken; its seed replays it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from droprd.testing.simdisk import SimDisk
from droprd.testing.simfs import NEVER, Crash, Fault, SimFs

__all__ = [
    "NEVER",
    "Chaos",
    "Crash",
    "Fault",
    "Machine",
    "Rates",
    "SimClock",
    "SimDisk",
    "SimFs",
    "SimTime",
    "Violation",
]

SECOND_NS = 1_000_000_000


class Violation(AssertionError):
    """A promise of the design was broken."""


class SimTime:
    """The true time of a simulated world; every look at a clock moves it on a little."""

    def __init__(self) -> None:
        self.now_ns = 1_700_000_000 * SECOND_NS

    def pass_s(self, seconds: float) -> None:
        self.now_ns += int(seconds * SECOND_NS)


class SimClock:
    """`droprd.model.Clock` of one machine: it starts anew at each boot; its wall clock jumps."""

    def __init__(self, time: SimTime, rng: Random) -> None:
        self._time = time
        self._rng = rng
        self._booted_ns = 0
        self._boot_id = b""
        self.wall_offset_ns = 0
        self.reboot()

    def reboot(self) -> None:
        self._boot_id = self._rng.randbytes(16)
        self._booted_ns = self._time.now_ns - SECOND_NS

    def boot_id(self) -> bytes:
        return self._boot_id

    def boot_ns(self) -> int:
        self._time.now_ns += 1000
        return self._time.now_ns - self._booted_ns

    def wall_ns(self) -> int:
        return self._time.now_ns + self.wall_offset_ns


class Machine:
    """A disk, a clock and the processes that run on them."""

    def __init__(self, name: str, disk: SimDisk, time: SimTime, rng: Random, chaos: Chaos) -> None:
        self.name = name
        self.disk = disk
        self.clock = SimClock(time, rng)
        self.processes: list[SimFs] = []
        self.kept: dict[str, bytes] = {}
        self._rng = rng
        self._chaos = chaos

    def start(self, name: str) -> SimFs:
        """A new process; chaos watches its steps."""
        self.processes = [p for p in self.processes if p.alive]
        fs = SimFs(self.disk, self._rng, f"{self.name}/{name}")
        fs.now_ns = self.clock.wall_ns
        self.processes.append(fs)
        self._chaos.watch(fs, self)
        return fs

    def urandom(self, length: int) -> bytes:
        return self._rng.randbytes(length)

    def kill_all(self) -> None:
        """Every process dies; the disk and its cache stay."""
        for process in self.processes:
            process.die()
        self.processes.clear()

    def power_cut(self) -> None:
        """Every process dies, unsynced data is lost at random, and the machine boots again."""
        self.kill_all()
        self.disk.power_cut(self._rng)
        self.clock.reboot()


@dataclass
class Rates:
    """How often something happens at a step, and in what proportions.

    Attributes:
        per_step: probability that any of what follows happens at one step.
        per_read: probability that others run at one read.
        others run, kill, power cut, error: weights.
    """

    per_step: float = 0.02
    per_read: float = 0.01
    others: float = 6.0
    kill: float = 1.0
    power: float = 1.0
    error: float = 0.0


@dataclass
class Chaos:
    """Draws what happens at which step. With `quiet`, nothing happens any more.

    Attributes:
        run_others: lets other processes of the world run (nested) at a step of `fs`.
        crashes: kills and power cuts so far.
    """

    rng: Random
    rates: Rates = field(default_factory=Rates)
    run_others: Callable[[SimFs], None] | None = None
    quiet: bool = False
    crashes: int = 0
    depth: int = 0
    _doomed: set[SimFs] = field(default_factory=set)

    def watch(self, fs: SimFs, machine: Machine) -> None:
        def interrupt(fs: SimFs, operation: str) -> Fault | None:
            return self._strike(fs, machine, operation)

        fs.interrupt = interrupt
        fs.pause = self._pause
        fs.left_out = self._doom
        self._arm(fs)
        self._arm_reads(fs)

    def _arm(self, fs: SimFs) -> None:
        fs.alarm = fs.steps + 1 + int(self.rng.expovariate(self.rates.per_step))

    def _arm_reads(self, fs: SimFs) -> None:
        fs.read_alarm = fs.reads + 1 + int(self.rng.expovariate(self.rates.per_read))

    def _doom(self, fs: SimFs) -> None:
        """A sync was left out: the power fails soon, so that few seeds suffice to notice."""
        if not self.quiet and self.rng.random() < 0.3:
            self._doomed.add(fs)
            fs.alarm = fs.steps + 1 + int(self.rng.expovariate(0.05))

    def _pause(self, fs: SimFs) -> None:
        """The scheduler stops a process at a read, and lets others run."""
        if not self.quiet:
            self._arm_reads(fs)
            self._run_others(fs)

    def _run_others(self, fs: SimFs) -> None:
        if self.run_others is not None and self.depth < 3:
            self.depth += 1
            try:
                self.run_others(fs)
            finally:
                self.depth -= 1

    def _strike(self, fs: SimFs, machine: Machine, operation: str) -> Fault | None:
        if self.quiet:
            return None
        if fs in self._doomed:
            self._doomed.discard(fs)
            self.crashes += 1
            machine.power_cut()
            raise Crash(fs.name)
        self._arm(fs)
        rates = self.rates
        draw = self.rng.random() * (rates.others + rates.kill + rates.power + rates.error)
        draw -= rates.others
        if draw < 0:
            self._run_others(fs)
            return None
        draw -= rates.error
        if draw < 0:
            # A process that meets an error *and* dies before it could act on it leaves a lying
            # cache that nobody knows of: no program can do anything about that.
            fs.alarm = max(fs.alarm, fs.steps + 5)
            if operation in ("write", "truncate", "create", "mkdir", "rename"):
                return Fault.ENOSPC if self.rng.random() < 0.8 else Fault.EIO
            return Fault.EIO if operation in ("sync", "sync_dir") else None
        self.crashes += 1
        draw -= rates.kill
        if draw < 0:
            if operation == "write" and self.rng.random() < 0.5:
                return Fault.DIE_HALFWAY
            fs.die()
        else:
            machine.power_cut()
        raise Crash(fs.name)
