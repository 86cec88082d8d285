"""Runs many seeds of the simulations in several processes, with or without a mutant.

A seed replays: the same simulation and number give the same crashes and the same verdict. Any
exception counts as a failure, not only a `Violation`: real code that cannot start after a crash
does not keep its promises either.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context

from droprd.testing.mutants import mutated
from droprd.testing.simlog import LogSimulation
from droprd.testing.simoutbox import OutboxSimulation
from droprd.testing.simworld import World

Run = Callable[[int, frozenset[str]], tuple[int, Mapping[str, int]]]


def _log(seed: int, disabled: frozenset[str]) -> tuple[int, Mapping[str, int]]:
    simulation = LogSimulation(seed, disabled)
    return simulation.run(crashes=6), simulation.machine.disk.syncs


def _outbox(seed: int, disabled: frozenset[str]) -> tuple[int, Mapping[str, int]]:
    simulation = OutboxSimulation(seed, disabled)
    return simulation.run(crashes=30), simulation.machine.disk.syncs


def _world(seed: int, disabled: frozenset[str]) -> tuple[int, Mapping[str, int]]:
    simulation = World(seed, disabled)
    return simulation.run(crashes=20), simulation.syncs


SIMULATIONS: dict[str, Run] = {"log": _log, "outbox": _outbox, "world": _world}


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
        except Exception:  # noqa: BLE001 - whatever it is, this seed shows a fault
            result.failure = traceback.format_exc()
    return result


def run_seeds(
    simulation: str, seeds: Iterable[int], *, mutant: str = "", processes: int = 2
) -> Iterator[Result]:
    """Run many seeds, in any order of completion."""
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        yield from pool.map(partial(run_one, simulation, mutant=mutant), seeds, chunksize=8)


def hunt(mutant: str, bounds: Mapping[str, int]) -> Result | None:
    """The first seed that catches a mutant: so many seeds of each simulation, in turn."""
    for simulation, seeds in bounds.items():
        for seed in range(seeds):
            result = run_one(simulation, seed, mutant)
            if result.failure:
                return result
    return None


def hunt_all(
    mutants: Iterable[str], bounds: Mapping[str, int], *, processes: int = 2
) -> dict[str, Result | None]:
    """What catches each mutant."""
    mutants = list(mutants)
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        return dict(zip(mutants, pool.map(partial(hunt, bounds=bounds), mutants), strict=True))
