"""Runs many seeds of the simulations in several processes, with or without a mutant.

A seed replays: the same simulation and number give the same crashes and the same verdict. Any
exception counts as a failure, not only a `Violation`: real code that cannot start after a crash
does not keep its promises either.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context

from droprd.errors import DroprdError
from droprd.testing.caught import CAUGHT_BY
from droprd.testing.mutants import MUTANTS, PROTOCOL, SYNC, mutated
from droprd.testing.simcut import CutSimulation
from droprd.testing.siminbox import InboxSimulation
from droprd.testing.simlog import LogSimulation
from droprd.testing.simoutbox import OutboxSimulation
from droprd.testing.simworld import World

# Whatever real code may raise when it meets what it did not expect.
FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    DroprdError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

SEEDS_IN_TURN = 40

Run = Callable[[int, frozenset[str]], tuple[int, Mapping[str, int]]]


def _inbox(seed: int, disabled: frozenset[str]) -> tuple[int, Mapping[str, int]]:
    simulation = InboxSimulation(seed, disabled)
    return simulation.run(crashes=20), simulation.machine.disk.syncs


def _log(seed: int, disabled: frozenset[str]) -> tuple[int, Mapping[str, int]]:
    simulation = LogSimulation(seed, disabled)
    return simulation.run(crashes=6), simulation.machine.disk.syncs


def _outbox(seed: int, disabled: frozenset[str]) -> tuple[int, Mapping[str, int]]:
    simulation = OutboxSimulation(seed, disabled)
    return simulation.run(crashes=30), simulation.machine.disk.syncs


def _world(seed: int, disabled: frozenset[str]) -> tuple[int, Mapping[str, int]]:
    simulation = World(seed, disabled)
    return simulation.run(crashes=20), simulation.syncs


def _cut(seed: int, disabled: frozenset[str]) -> tuple[int, Mapping[str, int]]:
    simulation = CutSimulation(seed, disabled)
    return simulation.run(), simulation.machine.disk.syncs


SIMULATIONS: dict[str, Run] = {
    "cut": _cut,
    "log": _log,
    "inbox": _inbox,
    "outbox": _outbox,
    "world": _world,
}


@dataclass(slots=True)
class Result:
    """What became of one seed. `failure` is empty if all promises were kept."""

    simulation: str
    seed: int
    crashes: int = 0
    failure: str = ""
    syncs: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"scripts/torture --simulation {self.simulation} --first {self.seed} --seeds 1"
            f"\n{self.failure}"
        )


def run_one(simulation: str, seed: int, mutant: str = "") -> Result:
    """Run one seed."""
    logging.disable(logging.ERROR)  # what workers log about mended files is no news here
    result = Result(simulation, seed)
    with mutated(mutant) as disabled:
        try:
            result.crashes, result.syncs = SIMULATIONS[simulation](seed, disabled)
        except FAULTS:
            result.failure = traceback.format_exc()
    return result


@contextmanager
def _workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh interpreters whose sets have the same order everywhere, so that a seed replays."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            yield pool
    finally:
        del os.environ["PYTHONHASHSEED"]
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before


def run_seeds(
    simulation: str, seeds: Iterable[int], *, mutant: str = "", processes: int = 2
) -> Iterator[Result]:
    """Run many seeds, in any order of completion."""
    with _workers(processes) as pool:
        yield from pool.map(partial(run_one, simulation, mutant=mutant), seeds, chunksize=4)


def hunt(mutant: str, bounds: Mapping[str, int]) -> Result | None:
    """A seed that catches a mutant: up to so many of each simulation, some of each in turn.

    The seed that caught it before comes first: it still does, unless the code or the simulation
    changed what happens in it. A simulation that does not come by a site in its first seeds is
    left.
    """
    if mutant in CAUGHT_BY:
        result = run_one(*CAUGHT_BY[mutant], mutant)
        if result.failure and not run_one(*CAUGHT_BY[mutant]).failure:
            return result
    site = mutant.removeprefix(SYNC) if mutant.startswith(SYNC) else ""
    left = {n: seeds for n, seeds in bounds.items() if n == "world" or mutant not in PROTOCOL}
    first = 0
    while left:
        for simulation, seeds in list(left.items()):
            is_used = not site or first > 0
            for seed in range(first, min(seeds, first + SEEDS_IN_TURN)):
                result = run_one(simulation, seed, mutant)
                # Not if it fails without the mutant too: `run_seeds` is there to tell of that.
                if result.failure and not run_one(simulation, seed).failure:
                    return result
                is_used |= site in result.syncs
            if not is_used or first + SEEDS_IN_TURN >= seeds:
                del left[simulation]
        first += SEEDS_IN_TURN
    return None


def hunt_all(
    mutants: Iterable[str], bounds: Mapping[str, int], *, processes: int = 2
) -> dict[str, Result | None]:
    """What catches each mutant."""
    mutants = list(mutants)
    with _workers(processes) as pool:
        found = pool.map(partial(hunt, bounds=bounds), mutants)
        return dict(zip(mutants, found, strict=True))


# Where a mutant is looked for, and how long.
BOUNDS = {"cut": 200, "log": 400, "inbox": 400, "outbox": 250, "world": 200}

_COVERED = "the first entry's sync covers the header; before it nothing is promised"
_AS_LOG = "the same line of `droprd.spool.log` as log.cut, which is noticed"

# Sync sites whose absence harms no promise.
HARMLESS: dict[str, str] = {
    "claims.compact.create": "the seal covers the header; before it the file has another name",
    "claims.compact.create_dir": "claims.compact_dir syncs the name under which it counts",
    "claims.create": _COVERED,
    "claims.create_dir": "the first segment's directory sync covers it",
    "claims.cut": "half a note lies under the next one; after a crash it is cut again",
    "dead.recover": "a letter that was not synced is written again with its receipt",
    "dead.recover_dir": "a letter that was not synced is written again with its receipt",
    "heads.close": "what it covers is found again by walking the segments",
    "heads.cut": _AS_LOG,
    "journal.adopt_dir": "only a journal with published entries is adopted: its name is synced",
    "journal.create": _COVERED,
    "log.create": _COVERED,
    "receiver.cut": _AS_LOG,
    "receiver.cut_back": "the same line of `droprd.spool.log` as log.cut_back, which is noticed",
    "sender.create_dir": "sender.recover_dir comes before anything is written",
    "sender.cut": _AS_LOG,
    "sender.recover_dir": "lanes.mkdir syncs the same directory before the first lane",
}

# Sites that other crash tests switch off.
ELSEWHERE: dict[str, str] = {
    "claims.compact": "tests/crash/test_claims.py",
    "claims.compact_dir": "tests/crash/test_claims.py",
    "claims.name": "tests/crash/test_claims.py",
    "journal.cut": "tests/crash/test_journals.py",
    "journal.note": "tests/crash/test_journals.py",
}

SKIPPED = (
    "not here yet: real file systems shut down in mid-flight, block-level crash states, "
    "system calls made to fail (strace), kill -9 of real workers under load, fuzzing"
)


def main(argv: Sequence[str] | None = None) -> int:
    """`scripts/torture`. Returns the exit code: 1 if a promise was broken or a mutant survived."""
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("--simulation", choices=sorted(SIMULATIONS), help="only this one")
    parser.add_argument("--seeds", type=int, default=1000, help="how many of each (1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--mutant", default="", help="with this rule switched off, or sync:SITE")
    parser.add_argument("--mutants", action="store_true", help="that every mutant is noticed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    options = parser.parse_args(argv)
    if options.mutants:
        return _survivors(options.processes)
    names = [options.simulation] if options.simulation else list(SIMULATIONS)
    failures = 0
    for name in names:
        began, crashes, seeds = time.monotonic(), 0, 0
        numbers = range(options.first, options.first + options.seeds)
        for result in run_seeds(name, numbers, mutant=options.mutant, processes=options.processes):
            crashes += result.crashes
            seeds += 1
            if result.failure:
                failures += 1
                print(result, flush=True)
            elif seeds % 500 == 0:
                print(f"{name}: {seeds} seeds, {crashes} crashes", flush=True)
        took_s = time.monotonic() - began
        print(f"{name}: {seeds} seeds, {crashes} crashes, {took_s:.0f} s", flush=True)
    print(f"torture: {failures} failures; {SKIPPED}")
    return 1 if failures else 0


def sites_used(processes: int = 2) -> set[str]:
    """All sync sites that the simulations come by."""
    sites: set[str] = set()
    for name in SIMULATIONS:
        for result in run_seeds(name, range(60), processes=processes):
            sites |= result.syncs.keys()
    return {site for site in sites if not site.startswith(("layout.", "setup"))}


def excuse(site: str) -> str:
    """Why it is no matter that the simulations do not notice this site missing; empty if it is."""
    return HARMLESS.get(site) or ELSEWHERE.get(site, "")


def _survivors(processes: int) -> int:
    wanted = [*MUTANTS, *(SYNC + site for site in sorted(sites_used(processes)))]
    survivors = []
    for mutant, caught in hunt_all(wanted, BOUNDS, processes=processes).items():
        if caught is not None:
            last = caught.failure.strip().splitlines()[-1]
            print(f"{mutant}: {caught.simulation} {caught.seed}: {last}")
        elif why := excuse(mutant.removeprefix(SYNC)):
            print(f"{mutant}: not noticed: {why}")
        else:
            print(f"{mutant}: NOT NOTICED")
            survivors.append(mutant)
    print(f"torture: {len(wanted)} mutants, {len(survivors)} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
