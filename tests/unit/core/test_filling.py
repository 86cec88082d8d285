"""When the disk is full, at the present rate."""

from __future__ import annotations

from droprd.core.filling import Filling


def looked(*free_bytes: int, every_s: float = 60) -> int | None:
    filling = Filling()
    for index, free in enumerate(free_bytes):
        filling.look(index * every_s, free)
    return filling.full_in_s


def test_the_rate_of_the_last_minutes_is_carried_on() -> None:
    # 100 bytes a minute, 500 are left.
    assert looked(1000, 900, 800, 700, 600, 500) == 300


def test_nothing_is_said_before_there_is_enough_to_judge_by() -> None:
    assert looked(1000, 900, 800) is None


def test_a_disk_that_does_not_fill_is_never_full() -> None:
    assert looked(*[1000] * 9) is None
    assert looked(*range(1000, 2000, 100)) is None


def test_what_was_long_ago_does_not_count() -> None:
    assert looked(10**9, *[1000] * 20) is None
    assert looked(10**9, 1000, every_s=3600) is None
