"""The simulations notice when a rule or a sync is switched off. If not, they prove nothing."""

from __future__ import annotations

import pytest

from droprd.testing.mutants import MUTANTS, SYNC
from droprd.testing.torture import BOUNDS, excuse, hunt_all, sites_used


@pytest.mark.slow
def test_every_rule_that_is_switched_off_is_noticed() -> None:
    caught = hunt_all(MUTANTS, BOUNDS)
    assert [name for name, result in caught.items() if result is None] == []


@pytest.mark.slow
def test_every_sync_that_is_left_out_is_noticed() -> None:
    wanted = [SYNC + site for site in sorted(sites_used()) if not excuse(site)]
    caught = hunt_all(wanted, BOUNDS)
    assert [name for name, result in caught.items() if result is None] == []
