"""Counters go on when a worker is replaced."""

from __future__ import annotations

from droprd.core.counted import Counted


def test_counters_never_fall_when_a_worker_is_replaced() -> None:
    counted = Counted()
    assert counted.told(1, {"received": 7, "refused": {"full": 2}, "lanes": 3}) == {
        "received": 7,
        "refused": {"full": 2},
        "lanes": 3,
    }
    assert counted.told(2, {"received": 0, "refused": {}, "lanes": 1}) == {
        "received": 7,
        "refused": {"full": 2},
        "lanes": 1,
    }
    told = counted.told(2, {"received": 5, "refused": {"full": 1, "paused": 4}})
    assert told == {"received": 12, "refused": {"full": 3, "paused": 4}}
    assert counted.told(3, {"received": 1, "refused": {}})["received"] == 13


def test_what_is_no_count_is_left_alone() -> None:
    gauges = {"received": "many", "refused": {"full": None}, "lanes": -1}
    assert Counted().told(1, gauges) == {"received": "many", "refused": {}, "lanes": -1}
