"""Twenty thousand crashes of the real spool and protocol code, each change.

A failure prints the command that replays its seed.
"""

from __future__ import annotations

import pytest

from droprd.testing.torture import run_seeds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("simulation", "seeds", "crashes_min"),
    [("cut", 100, 200), ("log", 1400, 8_000), ("outbox", 210, 6_000), ("world", 340, 6_000)],
)
def test_no_crash_breaks_a_promise(simulation: str, seeds: int, crashes_min: int) -> None:
    crashes = 0
    for result in run_seeds(simulation, range(seeds)):
        assert not result.failure, str(result)
        crashes += result.crashes
    assert crashes >= crashes_min


def test_a_seed_replays_to_the_same_end() -> None:
    for simulation in ("cut", "log", "outbox", "world"):
        first, second = (next(run_seeds(simulation, [7], processes=1)) for _ in range(2))
        assert first == second
