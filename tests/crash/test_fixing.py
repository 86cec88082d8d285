"""Requeues and purges that are killed, or lose the power, at each of their steps.

Whatever the step: no message is in no place, the sums are right, and doing it again finishes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random

import pytest

from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.core.push import LaneAnswer, Refusal
from droprd.model import Lane
from droprd.spool.blobs import write_blob
from droprd.spool.journal import Journal
from droprd.spool.lookup import OutboxView
from droprd.spool.outbox import OutboxStore
from droprd.spool.puts import Put
from droprd.testing.simdisk import SimDisk
from droprd.testing.simfs import NEVER, Crash, Fault, SimFs
from droprd.testing.simproducer import make_node_spool, open_spool
from droprd.testing.simulation import Chaos, Machine, SimTime

LANE = Lane("berlin", "sites", 5)
STEPS_MAX = 400


class World:
    """A node whose messages wait, or are refused."""

    def __init__(self, seed: int, *, refused: bool) -> None:
        self.rng = Random(seed)
        chaos = Chaos(self.rng, quiet=True)
        self.machine = Machine("node", SimDisk(), SimTime(), self.rng, chaos)
        make_node_spool(self.machine)
        fs = self.machine.start("producer")
        fs.alarm = NEVER
        spool = open_spool(self.machine, fs)
        journal = Journal(
            fs, spool.clock, spool.urandom, spool.layout, spool.spool_id, uid=os.getuid()
        )
        journal.put(Put(LANE, [b"a" * 9000, b"b", b"c"]))
        journal.put(Put(LANE, [b"d" * 9000], {"t": "text/plain"}))
        blob = write_blob(
            fs, spool.layout, journal.pin(), spool.urandom(14) + bytes(2), b"e" * 50_000
        )
        journal.put(Put(LANE, [blob]))
        journal.close()
        self.start()
        if refused:
            while (out := self.store.next_push(LANE)) is not None:
                all_of = tuple(Refusal(sent.frame_id, None, "no") for sent in out.frames)
                self.store.release(out)
                self.store.on_answer(out, LaneAnswer(out.frames[-1].head, "ok", refusals=all_of))
        self.store.commit()
        self.all = self.ids("dead") | self.ids("waiting")
        assert len(self.all) == 5

    def start(self) -> None:
        self.fs: SimFs = self.machine.start("sender")
        self.fs.alarm = NEVER
        self.store = OutboxStore.open(open_spool(self.machine, self.fs), idle_s=0)
        self.store.merge_all()

    def strike(self, at: int, power: bool) -> None:
        def interrupt(fs: SimFs, operation: str) -> Fault | None:
            if power:
                self.machine.power_cut()
            else:
                fs.die()
            return None

        self.fs.interrupt = interrupt
        self.fs.alarm = self.fs.steps + at

    def ids(self, kind: str) -> set[bytes]:
        view = OutboxView(open_spool(self.machine, self.fs), self.store.state)
        hits = {"dead": view.dead, "waiting": view.waiting}[kind](Selection())
        return {one for hit in hits if hit.state == kind for one in hit.chosen.values()}

    def check(self) -> None:
        state = self.store.lane(LANE)
        assert state.accepted == state.queued + state.ended.total
        assert state.ended.dead == len(self.ids("dead"))
        assert state.queued_bytes >= 0

    def fix(self, verb: str, what: str) -> Fixed:
        fixer = self.store.fixer()
        selection = Selection(what=what)  # type: ignore[arg-type]
        done = list((fixer.purge if verb == "purge" else fixer.requeue)(selection))[-1]
        self.store.merge_all()
        self.store.tend()
        return done


def struck(seed: int, verb: str, what: str, power: bool) -> Iterator[World]:
    """The world after a crash at each step of a command, one after another."""
    for at in range(1, STEPS_MAX):
        world = World(seed + at, refused=what == "dead")
        world.strike(at, power)
        try:
            world.fix(verb, what)
        except Crash:
            world.start()
            yield world
        else:
            return
    raise AssertionError("the command never ends")


@pytest.mark.parametrize("power", [False, True])
def test_a_requeue_that_is_cut_short_loses_nothing_and_can_be_given_again(power: bool) -> None:
    count = 0
    for world in struck(1000, "requeue", "dead", power):
        count += 1
        world.check()
        assert world.ids("dead") | world.ids("waiting") == world.all
        world.fix("requeue", "dead")
        world.check()
        assert world.ids("dead") == set()
        assert world.ids("waiting") == world.all
        while (out := world.store.next_push(LANE, 1)) is not None:
            assert not any(sent.voids for sent in out.frames)
            world.store.release(out)
            world.store.on_answer(out, LaneAnswer(out.frames[-1].head, "ok"))
        world.check()
    assert count > 10


@pytest.mark.parametrize("power", [False, True])
def test_a_purge_that_is_cut_short_keeps_the_sums_and_can_be_given_again(power: bool) -> None:
    for what in ("waiting", "dead"):
        count = 0
        for world in struck(2000, "purge", what, power):
            count += 1
            world.check()
            world.fix("purge", what)
            world.check()
            assert world.ids(what) == set()
            while (out := world.store.next_push(LANE, 1)) is not None:
                assert all(len(sent.voids) == sent.messages for sent in out.frames)
                world.store.release(out)
                world.store.on_answer(out, LaneAnswer(out.frames[-1].head, "ok"))
            world.check()
            assert world.store.lane(LANE).ended.purged == 5
            assert world.store.lane(LANE).queued == 0
            assert world.store.lane(LANE).queued_bytes == 0
        assert count > 5, what
