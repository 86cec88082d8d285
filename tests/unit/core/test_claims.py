"""Claims against a model that keeps one state a message in a plain dictionary."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from droprd.core import claimops as ops
from droprd.core.claimops import AT_ONCE, Dead, Due, Now, Range, Wait
from droprd.core.claims import Claims
from droprd.core.spans import Spans
from droprd.errors import BadData

BOOT = b"b" * 16
OTHER_BOOT = b"o" * 16
ALICE = b"a" * 16
BOB = b"c" * 16
ATTEMPTS_MAX = 3


def now(boot_ns: int = 0, wall_ns: int = 10**9, held: bool = False) -> Now:
    return Now(BOOT, boot_ns, wall_ns, held)


def over_the_wire(claims: Claims, notes: list[Any]) -> None:
    """Apply what another process would read back from the file."""
    claims.apply(msgpack.unpackb(msgpack.packb(notes), use_list=True))


def leased(*ranges: Range, until_ns: int = 100, consumer: bytes = ALICE) -> Claims:
    claims = Claims(BOOT)
    over_the_wire(claims, [ops.op_lease(consumer, BOOT, until_ns, ranges)])
    return claims


def offered(claims: Claims, at: Now) -> list[tuple[int, int | None, Wait]]:
    return list(claims.candidates(at))


def test_fresh_messages_are_offered_in_order_of_arrival() -> None:
    claims = leased((0, 10))
    assert offered(claims, now()) == [(10, None, Wait(0, AT_ONCE, False))]
    assert claims.leased == 10


def test_acked_messages_are_settled_and_the_lease_goes_with_the_last() -> None:
    claims = leased((0, 10))
    over_the_wire(claims, [ops.op_ack(1, [(0, 4)])])
    assert (claims.leased, claims.lowest_open(), claims.counts["acked"]) == (6, 4, 4)
    over_the_wire(claims, [ops.op_ack(1, [(4, 10)])])
    assert not claims.leases
    assert claims.lowest_open() == 10


def test_a_lease_that_ran_out_returns_its_messages_each_to_be_leased_alone() -> None:
    claims = leased((0, 3), until_ns=100)
    assert claims.overdue(now(99)) == []
    assert claims.overdue(now(100)) == [1]
    over_the_wire(claims, [ops.op_end(1, ATTEMPTS_MAX, 0)])
    assert offered(claims, now(100))[0] == (0, 3, Wait(1, AT_ONCE, True))


def test_a_lease_of_another_boot_has_ended() -> None:
    claims = Claims(BOOT)
    over_the_wire(claims, [ops.op_lease(ALICE, OTHER_BOOT, 10**18, [(0, 1)])])
    assert claims.overdue(now()) == [1]
    assert not claims.holds(1, 0, 1, now())


def test_a_nacked_message_comes_back_when_its_delay_is_over_and_before_later_ones() -> None:
    claims = leased((0, 3))
    due = ops.due_after(now(5), 50)
    over_the_wire(claims, [ops.op_nack(1, [(1, 2)], due, ATTEMPTS_MAX, 0)])
    assert offered(claims, now(54))[0][0] == 3
    assert claims.next_change_ns(now(54)) == 1
    assert offered(claims, now(55))[0] == (1, 2, Wait(1, AT_ONCE, False))


def test_a_delay_of_another_boot_goes_on_by_the_wall_clock_unless_that_is_held() -> None:
    claims = Claims(BOOT)
    over_the_wire(claims, [ops.op_defer([(0, 1)], Due(OTHER_BOOT, 7, 2 * 10**9))])
    assert offered(claims, now(wall_ns=10**9))[0][0] == 1
    assert offered(claims, now(wall_ns=3 * 10**9, held=True))[0][0] == 1
    assert claims.next_change_ns(now(wall_ns=3 * 10**9, held=True)) is None
    assert offered(claims, now(wall_ns=3 * 10**9))[0][0] == 0


def test_a_message_out_of_attempts_becomes_a_dead_letter() -> None:
    claims = leased((0, 2))
    for lease in range(1, ATTEMPTS_MAX):
        over_the_wire(claims, [ops.op_nack(lease, [(0, 2)], AT_ONCE, ATTEMPTS_MAX, 9)])
        over_the_wire(claims, [ops.op_lease(ALICE, BOOT, 100, [(0, 2)])])
    over_the_wire(claims, [ops.op_end(ATTEMPTS_MAX, ATTEMPTS_MAX, 9)])
    assert list(claims.dead) == [(0, 2, Dead("max_attempts", 3, 9))]
    assert claims.lowest_open() == 2


def test_a_revived_dead_letter_is_leased_afresh() -> None:
    claims = leased((0, 2))
    over_the_wire(claims, [ops.op_reject(1, [(0, 2)], "no such site", 9)])
    over_the_wire(claims, [ops.op_revive([(1, 2)])])
    assert offered(claims, now())[0] == (1, 2, Wait(0, AT_ONCE, False))
    assert claims.dead.count == 1


def test_extending_one_message_gives_it_a_lease_of_its_own() -> None:
    claims = leased((0, 3), until_ns=100)
    over_the_wire(claims, [ops.op_extend(1, [(1, 2)], BOOT, 500)])
    assert claims.overdue(now(100)) == [1]
    assert claims.holds(2, 1, 2, now(100))
    assert not claims.holds(1, 1, 2, now(0))
    assert claims.leased == 3


def test_forgetting_segments_buries_their_dead_letters() -> None:
    claims = leased((0, 4))
    over_the_wire(claims, [ops.op_reject(1, [(0, 1)], "bad", 0), ops.op_ack(1, [(1, 4)])])
    over_the_wire(claims, [ops.op_forget(4)])
    assert claims.counts["buried"] == 1
    assert claims.counts["lost"] == 0
    assert claims.floor == claims.fresh == 4


@pytest.mark.parametrize(
    "note",
    [
        [[0, ALICE, BOOT, 5, [[0, 5]]], [0, ALICE, BOOT, 5, [[4, 6]]]],
        [[1, 1, [[0, 1]]]],
        [[99]],
        [[2]],
        [7],
        [[11, 99, 0, 0, 0, [], [], [], []]],
        [[8, [[0, 1]], 5, 0]],
        [[0, ALICE, BOOT, 5, [[5, 5]]]],
    ],
)
def test_an_impossible_note_is_refused(note: list[Any]) -> None:
    with pytest.raises(BadData):
        Claims(BOOT).apply(note)


def test_a_million_messages_nacked_in_batches_stay_few_ranges() -> None:
    claims = leased((0, 1_000_000))
    due = ops.due_after(now(), 10**9)
    for first in range(0, 1_000_000, 10_000):
        over_the_wire(claims, [ops.op_nack(1, [(first, first + 10_000)], due, ATTEMPTS_MAX, 0)])
    assert len(claims.delayed) == 1
    assert claims.waiting == 1_000_000


def test_spans_refuse_overlaps_and_empty_ranges() -> None:
    spans: Spans[int] = Spans()
    spans.add(5, 10, 1)
    for first, end in ((0, 6), (9, 12), (5, 10), (6, 7), (0, 20), (3, 3)):
        with pytest.raises(ValueError, match=f"{first} to {end}"):
            spans.add(first, end, 2)
    assert spans.covers(6, 9)
    assert not spans.covers(6, 11)


SEQS = st.integers(0, 24)
SIZES = st.integers(1, 6)


class ClaimsMatchAModel(RuleBasedStateMachine):
    """`model[seq]` is (state, attempts, …) for every seq below `top`; all others are fresh."""

    def __init__(self) -> None:
        super().__init__()
        self.claims = Claims(BOOT)
        self.model: dict[int, tuple[Any, ...]] = {}
        self.boot_ns = 0
        self.acked = 0

    def state(self, seq: int) -> tuple[Any, ...]:
        return self.model.get(seq, ("wait", 0, AT_ONCE, False))

    def seqs(self, kind: str) -> list[int]:
        return [seq for seq, state in sorted(self.model.items()) if state[0] == kind]

    def touch(self, end: int) -> None:
        for seq in range(end):
            self.model.setdefault(seq, ("wait", 0, AT_ONCE, False))

    def apply(self, note: list[Any]) -> None:
        over_the_wire(self.claims, note)

    def whole(self, first: int, size: int, kind: str) -> Range | None:
        """The range, if all of it is in one state."""
        if all(self.state(seq)[0] == kind for seq in range(first, first + size)):
            return first, first + size
        return None

    @rule(first=SEQS, size=SIZES, consumer=st.sampled_from([ALICE, BOB]), lasts=st.integers(1, 50))
    def lease(self, first: int, size: int, consumer: bytes, lasts: int) -> None:
        found = self.whole(first, size, "wait")
        if found is None:
            return
        number = self.claims.lease_next
        self.apply([ops.op_lease(consumer, BOOT, self.boot_ns + lasts, [found])])
        self.touch(found[1])
        for seq in range(*found):
            self.model[seq] = ("leased", self.model[seq][1] + 1, number)

    @precondition(lambda self: self.seqs("leased"))
    @rule(data=st.data(), how=st.sampled_from(["ack", "nack", "reject", "extend"]))
    def settle_one(self, data: Any, how: str) -> None:
        seq = data.draw(st.sampled_from(self.seqs("leased")))
        _, attempts, number = self.model[seq]
        at = [(seq, seq + 1)]
        if how == "ack":
            self.apply([ops.op_ack(number, at)])
            self.model[seq] = ("settled",)
            self.acked += 1
        elif how == "nack":
            due = ops.due_after(now(self.boot_ns), data.draw(st.integers(0, 30)))
            self.apply([ops.op_nack(number, at, due, ATTEMPTS_MAX, 1)])
            back = ("wait", attempts, due, False)
            self.model[seq] = back if attempts < ATTEMPTS_MAX else ("dead",)
        elif how == "reject":
            self.apply([ops.op_reject(number, at, "no", 1)])
            self.model[seq] = ("dead",)
        else:
            self.model[seq] = ("leased", attempts, self.claims.lease_next)
            self.apply([ops.op_extend(number, at, BOOT, self.boot_ns + 40)])

    @rule(passing=st.integers(1, 60))
    def time_passes(self, passing: int) -> None:
        self.boot_ns += passing
        for number in self.claims.overdue(now(self.boot_ns)):
            self.apply([ops.op_end(number, ATTEMPTS_MAX, 1)])
            for seq in self.seqs("leased"):
                _, attempts, its = self.model[seq]
                if its == number:
                    back = ("wait", attempts, AT_ONCE, True)
                    self.model[seq] = back if attempts < ATTEMPTS_MAX else ("dead",)

    @rule(first=SEQS, size=SIZES, how=st.sampled_from(["expired", "kill", "defer"]))
    def unleased(self, first: int, size: int, how: str) -> None:
        found = self.whole(first, size, "wait")
        if found is None:
            return
        self.touch(found[1])
        if how == "expired":
            self.apply([ops.op_settle([found], "expired")])
        elif how == "kill":
            self.apply([ops.op_kill([found], "corrupt", 1)])
        else:
            due = Due(BOOT, self.boot_ns + 20, 0)
            self.apply([ops.op_defer([found], due)])
        for seq in range(*found):
            if how == "defer":
                _, attempts, _, alone = self.model[seq]
                self.model[seq] = ("wait", attempts, due, alone)
            else:
                self.model[seq] = ("settled",) if how == "expired" else ("dead",)

    @rule(first=SEQS, size=SIZES)
    def revive(self, first: int, size: int) -> None:
        self.apply([ops.op_revive([(first, first + size)])])
        for seq in range(first, first + size):
            if self.state(seq)[0] == "dead":
                self.model[seq] = ("wait", 0, AT_ONCE, False)

    @rule()
    def compact(self) -> None:
        snapshot = self.claims.snapshot()
        self.claims = Claims(BOOT)
        self.apply(snapshot)

    @invariant()
    def they_agree(self) -> None:
        claims = self.claims
        at = now(self.boot_ns)
        assert claims.fresh == len(self.model)
        assert claims.leased == len(self.seqs("leased"))
        assert claims.dead.count == len(self.seqs("dead"))
        assert claims.counts["acked"] == self.acked
        waiting = self.seqs("wait")
        assert claims.waiting == len(waiting)
        due = [(seq, *self.model[seq][1::2]) for seq in waiting if self.model[seq][2].reached(at)]
        found = [
            (seq, wait.attempts, wait.alone)
            for first, end, wait in claims.candidates(at)
            if end is not None
            for seq in range(first, end)
        ]
        assert found == due
        opened = [*waiting, *self.seqs("leased"), len(self.model)]
        assert claims.lowest_open() == min(opened)
        for seq in self.seqs("leased"):
            lease = claims.leases[self.model[seq][2]]
            assert lease.open.get(seq) == self.model[seq][1]


TestClaimsMatchAModel = ClaimsMatchAModel.TestCase
TestClaimsMatchAModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
