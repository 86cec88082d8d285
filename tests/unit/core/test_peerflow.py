from __future__ import annotations

from itertools import product

import pytest

from droprd.core.backoff import Backoff
from droprd.core.pace import ONE_FRAME
from droprd.core.peerflow import (
    RETRY_AFTER_MAX_S,
    TRANSITIONS,
    Act,
    Event,
    Line,
    PeerFlow,
    Ticket,
)
from droprd.model import KIB


def half() -> float:
    return 0.5


def flow_of(addresses: int = 1, requests_max: int = 4) -> PeerFlow:
    return PeerFlow(half, 0.0, addresses=addresses, requests_max=requests_max)


def go(flow: PeerFlow, now_s: float, priority: int = 5, size: int = 100) -> Ticket:
    assert flow.budget(now_s, priority, 1) is not None
    return flow.start(now_s, priority, size)


def opened(rate: float = 50e6, requests_max: int = 4) -> PeerFlow:
    """A flow whose line was measured."""
    flow = flow_of(requests_max=requests_max)
    now_s = 0.0
    for _ in range(20):
        budget = flow.budget(now_s, 5, 1)
        assert budget is not None
        size = max(32 * KIB, budget.bytes)
        ticket = flow.start(now_s, 5, size)
        now_s += size / rate
        flow.accepted(ticket, now_s)
    return flow


def unreachable(flow: PeerFlow, now_s: float) -> None:
    flow.failed(go(flow, now_s), now_s, "connection refused", broken=False)


# The table.


def test_every_cell_of_the_table_is_filled() -> None:
    assert set(TRANSITIONS) == set(product(Line, Event))


def test_every_act_of_the_table_is_used() -> None:
    used = {act for cell in TRANSITIONS.values() if cell for act in cell[1]}
    assert used == set(Act)


def test_nothing_but_an_accepted_request_opens_a_line() -> None:
    for (line, event), cell in TRANSITIONS.items():
        if cell is not None and cell[0] is Line.OPEN and line is not Line.OPEN:
            assert event is Event.ACCEPTED


def test_no_state_is_without_a_way_back_to_open() -> None:
    assert TRANSITIONS[Line.THROTTLED, Event.STARTED] == (Line.PROBING, ())
    cell = TRANSITIONS[Line.PROBING, Event.ACCEPTED]
    assert cell is not None
    assert cell[0] is Line.OPEN


# Throttling and probing.


def test_a_new_peer_is_open_and_may_be_tried_at_once() -> None:
    flow = flow_of()
    assert flow.state == "open"
    assert flow.budget(0, 5, 1) is not None


def test_an_unreachable_peer_is_throttled_and_waits_by_its_backoff() -> None:
    flow = flow_of()
    unreachable(flow, 0)
    assert (flow.state, flow.last_error, flow.failures) == ("throttled", "connection refused", 1)
    assert flow.next_try_s(0) == 0.5
    assert flow.budget(0.49, 0, 1) is None
    assert flow.budget(0.5, 0, 1) is not None


def test_there_is_one_probe_at_a_time() -> None:
    flow = flow_of()
    unreachable(flow, 0)
    go(flow, 1)
    assert flow.state == "probing"
    assert flow.budget(1, 0, 1) is None
    assert flow.budget(1000, 0, 1) is None


def test_a_probe_is_one_frame() -> None:
    flow = opened()
    flow.failed(go(flow, 10), 10, "reset", broken=True)
    budget = flow.budget(11, 5, 1)
    assert budget is not None
    assert budget.bytes == ONE_FRAME


def test_failures_in_a_row_make_the_wait_longer_up_to_five_minutes_and_never_end_it() -> None:
    flow = flow_of()
    now_s = 0.0
    waits = []
    for _ in range(50):
        unreachable(flow, now_s)
        wait_s = flow.next_try_s(now_s)
        assert wait_s is not None
        waits.append(wait_s)
        now_s += wait_s
    assert waits[:4] == pytest.approx([0.5, 1, 2, 4])
    assert waits[-1] == pytest.approx(150)


def test_an_accepted_frame_sets_the_backoff_to_its_start() -> None:
    flow = flow_of()
    for now_s in (0, 10, 20, 30):
        unreachable(flow, now_s)
    flow.accepted(go(flow, 100), 100)
    assert (flow.state, flow.failures, flow.last_error) == ("open", 0, "")
    unreachable(flow, 101)
    assert flow.next_try_s(101) == 0.5


def test_a_transfer_that_broke_is_tried_again_soon_with_less() -> None:
    flow = opened()
    before = flow.budget(10, 5, 1)
    flow.failed(go(flow, 10, size=1_000_000), 12, "reset by peer", broken=True)
    assert flow.next_try_s(12) == 0.5
    flow.accepted(go(flow, 12.5, size=0), 12.6)
    after = flow.budget(13, 5, 9)
    assert before is not None
    assert after is not None
    assert after.bytes < before.bytes


def test_four_requests_that_fail_in_one_outage_are_one_failure() -> None:
    flow = opened()
    tickets = [go(flow, 10, priority=p) for p in (5, 5, 5, 0)]
    for ticket in tickets:
        flow.failed(ticket, 11, "reset", broken=True)
    assert (flow.failures, flow.in_flight) == (1, 0)


def test_a_late_failure_does_not_disturb_the_probe() -> None:
    flow = opened()
    early = go(flow, 10)
    flow.failed(go(flow, 10), 11, "reset", broken=True)
    probe = go(flow, 12)
    flow.failed(early, 12, "reset", broken=True)
    assert flow.state == "probing"
    flow.accepted(probe, 13)
    assert flow.state == "open"


def test_a_late_answer_opens_the_line() -> None:
    flow = opened()
    early = go(flow, 10)
    flow.failed(go(flow, 10), 11, "reset", broken=True)
    flow.accepted(early, 11)
    assert flow.state == "open"


def test_a_probe_given_up_by_this_side_leaves_the_way_free_for_the_next() -> None:
    flow = flow_of()
    unreachable(flow, 0)
    flow.cancelled(go(flow, 1))
    assert flow.state == "throttled"
    assert flow.budget(1, 5, 1) is not None


def test_an_outage_is_as_old_as_its_first_failure_however_many_probes_there_were() -> None:
    flow = flow_of()
    unreachable(flow, 10)
    unreachable(flow, 20)
    go(flow, 30)
    assert (flow.state, flow.since_s) == ("probing", 10)


# Refusals and hearing.


def test_retry_after_is_kept_to() -> None:
    flow = flow_of()
    flow.refused(go(flow, 0), 0, "507 inbox full", 60)
    assert flow.budget(59.9, 0, 1) is None
    wait_s = flow.next_try_s(0)
    assert wait_s is not None
    assert 60 <= wait_s <= 61


def test_a_refusal_that_does_not_say_how_long_waits_by_backoff() -> None:
    flow = flow_of()
    flow.refused(go(flow, 0), 0, "503", None)
    assert flow.next_try_s(0) == 0.5


def test_a_peer_cannot_ask_to_wait_for_ever() -> None:
    flow = flow_of()
    flow.refused(go(flow, 0), 0, "503", 1e12)
    wait_s = flow.next_try_s(0)
    assert wait_s is not None
    assert wait_s <= RETRY_AFTER_MAX_S + 1


def test_of_several_refusals_the_longest_counts() -> None:
    flow = opened()
    first, second = go(flow, 10), go(flow, 10)
    flow.refused(first, 10, "429", 60)
    flow.refused(second, 10, "429", 5)
    assert flow.budget(60, 0, 1) is None


def test_hearing_from_a_peer_clears_its_backoff() -> None:
    flow = flow_of()
    for now_s in (0, 10, 20, 30, 40):
        unreachable(flow, now_s)
    assert flow.budget(40, 0, 1) is None
    flow.heard(40)
    assert flow.next_try_s(40) == 0
    assert flow.budget(40, 0, 1) is not None


def test_hearing_from_a_peer_does_not_shorten_a_wait_it_asked_for() -> None:
    flow = flow_of()
    flow.refused(go(flow, 0), 0, "507 inbox full", 60)
    flow.heard(1)
    assert flow.budget(1, 0, 1) is None


def test_an_operators_retry_ends_any_wait() -> None:
    flow = flow_of()
    flow.refused(go(flow, 0), 0, "507 inbox full", 60)
    flow.retry(1)
    assert flow.budget(1, 0, 1) is not None


# Standing.


def test_a_paused_peer_gets_nothing_and_goes_on_where_it_was() -> None:
    flow = flow_of()
    flow.paused = True
    assert (flow.state, flow.budget(0, 0, 1)) == ("paused", None)
    flow.paused = False
    assert flow.state == "open"


def test_an_unconfigured_peer_waits() -> None:
    flow = flow_of()
    flow.configured = False
    flow.paused = True
    assert (flow.state, flow.budget(0, 0, 1)) == ("unconfigured", None)


def test_a_draining_peer_is_still_sent_to_and_shows_when_it_is_throttled() -> None:
    flow = flow_of()
    flow.draining = True
    assert flow.state == "draining"
    unreachable(flow, 0)
    assert flow.state == "throttled"


# Slots, sizes, addresses.


def test_before_a_rate_was_measured_one_frame_is_under_way() -> None:
    flow = flow_of()
    budget = flow.budget(0, 5, 100)
    assert budget is not None
    assert budget.bytes == ONE_FRAME
    flow.start(0, 5, 32 * KIB)
    assert flow.budget(0, 5, 100) is None


def test_one_slot_is_kept_for_a_more_urgent_priority_than_those_under_way() -> None:
    flow = opened()
    for _ in range(3):
        go(flow, 10, priority=5)
    assert flow.budget(10, 5, 9) is None
    assert flow.budget(10, 7, 9) is None
    budget = flow.budget(10, 4, 9)
    assert budget is not None
    assert budget.urgent
    go(flow, 10, priority=4)
    assert flow.budget(10, 0, 9) is None


def test_an_urgent_frame_does_not_wait_for_a_full_window() -> None:
    flow = opened(rate=8_000)
    go(flow, 100, priority=5, size=32 * KIB)
    assert flow.budget(100, 5, 1) is None
    budget = flow.budget(100, 0, 1)
    assert budget is not None
    assert (budget.bytes, budget.urgent) == (ONE_FRAME, True)


def test_all_requests_together_carry_no_more_than_about_two_seconds() -> None:
    rate = 100_000
    flow = opened(rate=rate)
    total = 0
    while (budget := flow.budget(100, 5, 50)) is not None:
        flow.start(100, 5, budget.bytes)
        total += budget.bytes
    assert flow.in_flight > 1
    assert total <= 2.1 * rate


def test_a_peer_with_one_slot_uses_it_for_everything() -> None:
    flow = opened(requests_max=1)
    go(flow, 10, priority=5)
    assert flow.budget(10, 0, 1) is None


def test_the_next_address_is_tried_at_once_and_the_wait_comes_when_all_have_failed() -> None:
    flow = flow_of(addresses=3)
    assert flow.address == 0
    unreachable(flow, 0)
    assert (flow.address, flow.next_try_s(0), flow.failures) == (1, 0, 0)
    unreachable(flow, 0)
    assert (flow.address, flow.next_try_s(0)) == (2, 0)
    unreachable(flow, 0)
    assert (flow.address, flow.next_try_s(0), flow.failures) == (0, 0.5, 1)


def test_an_address_that_works_is_kept() -> None:
    flow = flow_of(addresses=2)
    unreachable(flow, 0)
    flow.accepted(go(flow, 0), 0)
    assert flow.address == 1
    unreachable(flow, 10)
    assert (flow.address, flow.next_try_s(10)) == (0, 0)


def test_bounds_of_the_backoff_can_be_given() -> None:
    flow = PeerFlow(half, 0.0, backoff=Backoff(wait_first_s=4, wait_max_s=8))
    unreachable(flow, 0)
    assert flow.next_try_s(0) == 2
