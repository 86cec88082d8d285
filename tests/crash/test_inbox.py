"""Crashes of the inbox alone, and the syncs without which they would be felt.

`droprd.testing.siminbox` fails at once for a stored frame that is gone, doubled or out of order.
"""

from __future__ import annotations

import pytest

from droprd.errors import DroprdError
from droprd.testing.siminbox import InboxSimulation
from droprd.testing.simulation import Violation

SEEDS = 12
NEEDED = [
    "arrivals.put",
    "arrivals.whole",
    "heads.checkpoint",
    "heads.checkpoint_dir",
    "heads.refuse",
    "heads.seal",
    "receiver.append",
    "receiver.dir",
    "receiver.seal",
    "receiver.segment.create_dir",
]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_crash_of_the_receiver_loses_or_doubles_what_it_answered(seed: int) -> None:
    assert InboxSimulation(seed).run(crashes=12) >= 1


@pytest.mark.parametrize("site", NEEDED)
def test_a_sync_that_is_left_out_is_noticed(site: str) -> None:
    for seed in range(40):
        try:
            InboxSimulation(seed, frozenset({site})).run(crashes=20)
        except (Violation, DroprdError, OSError):
            return
    pytest.fail(f"nothing notices that {site} is not synced")
