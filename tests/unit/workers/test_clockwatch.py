"""The wall clock jumps; two peers say whether it is right now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.layout import Layout, make_spool
from droprd.spool.outbox import OutboxStore
from droprd.workers.clockwatch import ClockWatch

HOUR_NS = 3600 * 10**9


class JumpingClock(SystemClock):
    jumped_ns = 0

    def wall_ns(self) -> int:
        return super().wall_ns() + self.jumped_ns


@dataclass
class Greeter:
    """What of a courier the watch looks at."""

    peer: str
    hello_at: float = 0.0
    clock_apart_ns: int | None = 0
    greeted: int = 0

    def greet(self) -> None:
        self.greeted += 1


@pytest.fixture
def clock() -> JumpingClock:
    return JumpingClock()


@pytest.fixture
def store(tmp_path: Path, clock: JumpingClock) -> Iterator[OutboxStore]:
    root = str(tmp_path / "spool")
    facts = make_spool(OsFs(), root, os.urandom)
    store = OutboxStore.open(Spool(OsFs(), clock, os.urandom, Layout(root), facts.spool_id))
    yield store
    store.close()


def test_after_a_jump_all_peers_are_greeted_and_two_that_agree_lift_the_hold(
    store: OutboxStore, clock: JumpingClock
) -> None:
    watch = ClockWatch(store, "hamburg")
    berlin, paris = Greeter("berlin", 5.0), Greeter("paris", 5.0)
    watch.look(10, [berlin, paris])
    assert watch.problem is None
    clock.jumped_ns = HOUR_NS
    watch.look(20, [berlin, paris])
    assert (berlin.greeted, paris.greeted) == (1, 1)
    assert watch.problem is not None
    berlin.hello_at = 21
    watch.look(22, [berlin, paris])
    assert store.clock_parted
    paris.hello_at = 23
    watch.look(24, [berlin, paris])
    assert not store.clock_parted
    assert watch.problem is None


def test_peers_that_disagree_old_greetings_and_this_node_itself_do_not_count(
    store: OutboxStore, clock: JumpingClock
) -> None:
    watch = ClockWatch(store, "hamburg")
    others = [
        Greeter("berlin", 30.0),
        Greeter("paris", 30.0, clock_apart_ns=-HOUR_NS),
        Greeter("rome", 15.0),
        Greeter("hamburg", 30.0),
    ]
    clock.jumped_ns = HOUR_NS
    watch.look(20, others)
    watch.look(40, others)
    assert store.clock_parted


def test_a_clock_that_jumps_back_needs_nobody(store: OutboxStore, clock: JumpingClock) -> None:
    watch = ClockWatch(store, "hamburg")
    clock.jumped_ns = HOUR_NS
    watch.look(20, [])
    clock.jumped_ns = 0
    watch.look(21, [])
    assert watch.problem is None
