from __future__ import annotations

import sys
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from droprd.core.schedule import LANES_IN_REQUEST_MAX, SHARE_EVERY, Schedule
from droprd.model import Lane


def lane(channel: str, priority: int = 5) -> Lane:
    return Lane("berlin", channel, priority)


def half() -> float:
    return 0.5


def with_lanes(*lanes: Lane) -> Schedule:
    schedule = Schedule()
    for each in lanes:
        schedule.wake(each)
    return schedule


def request(
    schedule: Schedule, budget: int = 1000, size: int = 100, *, urgent: bool = False
) -> list[Lane]:
    """Make up one request in which each lane puts `size` bytes, or what it is offered."""
    batch = schedule.open(budget, urgent=urgent)
    if batch is None:
        return []
    while (offer := batch.next()) is not None:
        batch.took(min(size, max(1, offer.bytes_max)))
    return batch.lanes


def served(schedule: Schedule, times: int, more: Callable[[Lane], bool]) -> list[Lane]:
    """Send `times` requests of one lane each, one after another."""
    order = []
    for _ in range(times):
        lanes = request(schedule, budget=1)
        order += lanes
        for each in lanes:
            schedule.landed(each, more=more(each))
    return order


def always(_: Lane) -> bool:
    return True


# Order.


def test_nothing_to_send_makes_no_request() -> None:
    schedule = Schedule()
    assert schedule.open(1000) is None
    assert schedule.urgency() is None


def test_the_most_urgent_priority_comes_first() -> None:
    schedule = with_lanes(lane("a", 9), lane("b", 0), lane("c", 5))
    assert schedule.urgency() == 0
    assert request(schedule) == [lane("b", 0), lane("c", 5), lane("a", 9)]


def test_channels_of_one_priority_take_turns() -> None:
    a, b, c = lane("a"), lane("b"), lane("c")
    schedule = with_lanes(a, b, c)
    served(schedule, 6, always)
    order = served(schedule, 9, always)
    assert set(order[:3]) == {a, b, c}
    assert order == order[:3] * 3


def test_live_traffic_does_not_stand_behind_the_backlog_of_many_channels() -> None:
    backlog = [lane(f"old{i}") for i in range(100)]
    schedule = with_lanes(*backlog)
    served(schedule, 200, always)
    schedule.wake(lane("live"))
    assert lane("live") in served(schedule, 2, always)


def test_the_backlog_keeps_half_beside_live_traffic_of_its_priority() -> None:
    schedule = with_lanes(lane("old"))
    served(schedule, 1, always)
    count = 0
    for i in range(20):
        schedule.wake(lane(f"live{i}"))
        schedule.wake(lane(f"more{i}"))
        count += served(schedule, 1, lambda each: each.channel == "old").count(lane("old"))
    assert count == 10


def test_urgent_traffic_without_end_slows_the_backlog_down_and_does_not_stop_it() -> None:
    schedule = with_lanes(lane("urgent", 0), lane("backlog", 9))
    order = served(schedule, 40, always)
    assert order.count(lane("backlog", 9)) == 40 // SHARE_EVERY


def test_the_share_goes_to_whoever_has_waited_longest() -> None:
    lanes = [lane("urgent", 0), lane("x", 3), lane("y", 6), lane("z", 9)]
    order = served(with_lanes(*lanes), 12, always)
    assert {each.priority for each in order} == {0, 3, 6, 9}


def test_an_urgent_request_takes_the_most_urgent_priority_only() -> None:
    schedule = with_lanes(lane("a", 3), lane("b", 3), lane("c", 4))
    for _ in range(SHARE_EVERY * 2):
        lanes = request(schedule, urgent=True)
        assert lanes == [lane("a", 3), lane("b", 3)]
        for each in lanes:
            schedule.landed(each, more=True)


# One request of a lane at a time.


def test_a_lane_under_way_is_not_sent_again_until_it_has_landed() -> None:
    schedule = with_lanes(lane("a"))
    assert request(schedule) == [lane("a")]
    schedule.wake(lane("a"))
    assert request(schedule) == []
    schedule.landed(lane("a"), more=False)
    assert request(schedule) == [lane("a")]


def test_a_lane_that_landed_empty_rests_until_it_is_woken() -> None:
    schedule = with_lanes(lane("a"))
    request(schedule)
    schedule.landed(lane("a"), more=False)
    assert request(schedule) == []
    schedule.wake(lane("a"))
    schedule.wake(lane("a"))
    assert schedule.ready == 1


def test_a_lane_that_had_nothing_after_all_takes_no_part() -> None:
    schedule = with_lanes(lane("a"), lane("b"))
    batch = schedule.open(1000)
    assert batch is not None
    assert batch.next() is not None
    batch.took(0)
    assert batch.next() is not None
    batch.took(10)
    assert batch.next() is None
    assert batch.lanes == [lane("b")]
    assert schedule.ready == 0


# Sizes.


def test_a_request_of_one_byte_takes_one_frame_of_one_lane() -> None:
    schedule = with_lanes(lane("a"), lane("b"))
    assert request(schedule, budget=1) == [lane("a")]


def test_a_single_lane_is_offered_the_whole_request() -> None:
    batch = with_lanes(lane("a")).open(1000)
    assert batch is not None
    offer = batch.next()
    assert offer is not None
    assert offer.bytes_max == 1000


def test_many_lanes_share_a_request() -> None:
    schedule = with_lanes(*[lane(f"c{i}") for i in range(10)])
    assert len(request(schedule, budget=1000, size=1000)) == 10


def test_a_request_carries_a_bounded_number_of_lanes() -> None:
    schedule = with_lanes(*[lane(f"c{i}") for i in range(1000)])
    assert len(request(schedule, budget=1 << 22, size=10)) == LANES_IN_REQUEST_MAX


def test_a_lane_that_travels_alone_shares_with_no_other() -> None:
    schedule = with_lanes(lane("a"), lane("upload"), lane("b"))
    schedule.send_alone(lane("upload"), True)
    requests = [request(schedule) for _ in range(3)]
    assert requests == [[lane("a")], [lane("upload")], [lane("b")]]


# Held, delayed, paused: its own affair.


def test_a_held_lane_waits_and_no_other_does() -> None:
    schedule = with_lanes(lane("a"), lane("b"))
    schedule.hold(lane("a"), "receiver was reset")
    assert request(schedule) == [lane("b")]
    assert schedule.reasons(lane("a")) == {"receiver was reset"}
    schedule.release(lane("a"), "receiver was reset")
    assert request(schedule) == [lane("a")]


def test_a_lane_held_while_under_way_stays_back_when_it_lands() -> None:
    schedule = with_lanes(lane("a"))
    request(schedule)
    schedule.hold(lane("a"), "match")
    schedule.landed(lane("a"), more=True)
    assert request(schedule) == []
    schedule.release(lane("a"), "match")
    assert request(schedule) == [lane("a")]


def test_a_refusal_of_one_lane_delays_nothing_else_and_grows_with_each_failure() -> None:
    schedule = with_lanes(lane("poison"), lane("good"))
    assert len(request(schedule)) == 2
    until_s = schedule.refused(lane("poison"), 100, half)
    schedule.landed(lane("poison"), more=True)
    schedule.landed(lane("good"), more=True)
    assert until_s == 100.5
    assert schedule.next_due_s() == 100.5
    assert request(schedule) == [lane("good")]
    schedule.due(100.4)
    assert request(schedule) == []
    schedule.due(100.5)
    assert request(schedule) == [lane("poison")]
    assert schedule.refused(lane("poison"), 200, half) == 201
    assert schedule.next_due_s() == 201


def test_an_accepted_lane_starts_its_own_backoff_over() -> None:
    schedule = with_lanes(lane("a"))
    for now_s in (0, 100, 200):
        request(schedule)
        schedule.refused(lane("a"), now_s, half)
        schedule.landed(lane("a"), more=True)
        schedule.due(now_s + 50)
    request(schedule)
    schedule.accepted(lane("a"))
    assert schedule.refused(lane("a"), 300, half) == 300.5


def test_an_operators_retry_ends_the_delays() -> None:
    schedule = with_lanes(lane("a"))
    request(schedule)
    schedule.refused(lane("a"), 0, half)
    schedule.landed(lane("a"), more=True)
    schedule.retry()
    assert request(schedule) == [lane("a")]


def test_a_paused_channel_waits_whole_and_a_paused_priority_alone() -> None:
    schedule = with_lanes(lane("a", 1), lane("a", 2), lane("b", 1), lane("b", 2))
    schedule.pause([("a", None), ("b", 2)])
    assert request(schedule) == [lane("b", 1)]
    assert schedule.reasons(lane("a", 1)) == {"paused"}
    schedule.wake(lane("a", 3))
    assert request(schedule) == []
    schedule.pause([])
    assert set(request(schedule)) == {lane("a", 1), lane("a", 2), lane("a", 3), lane("b", 2)}


def test_a_forgotten_lane_is_not_sent() -> None:
    schedule = with_lanes(lane("a"), lane("b"))
    schedule.hold(lane("b"), "x")
    schedule.forget(lane("a"))
    schedule.forget(lane("b"))
    schedule.release(lane("b"), "x")
    assert request(schedule) == []


@settings(max_examples=200)
@given(st.data())
def test_whatever_happens_a_lane_with_something_to_send_is_ready_under_way_or_kept_back(
    data: st.DataObject,
) -> None:
    lanes = [lane(f"c{i}", p) for i in range(3) for p in (0, 5)]
    schedule = Schedule()
    has_data: set[Lane] = set()
    under_way: set[Lane] = set()
    kept: dict[Lane, str] = {}
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 40))):
        each = data.draw(st.sampled_from(lanes))
        step = data.draw(st.sampled_from(["wake", "request", "land", "hold", "refuse", "time"]))
        if step == "wake":
            has_data.add(each)
            schedule.wake(each)
        elif step == "request":
            got = request(schedule, budget=data.draw(st.integers(1, 300)))
            assert not under_way & set(got)
            assert not set(kept) & set(got)
            under_way |= set(got)
        elif step == "land" and each in under_way:
            under_way.discard(each)
            schedule.landed(each, more=True)
        elif step == "hold":
            if kept.get(each) == "hold":
                schedule.release(each, "x")
                del kept[each]
            elif each not in kept:
                schedule.hold(each, "x")
                kept[each] = "hold"
        elif step == "refuse" and each in under_way and each not in kept:
            schedule.refused(each, now_s, lambda: 0.999)
            kept[each] = "delay"
        elif step == "time":
            now_s += 400
            schedule.due(now_s)
            kept = {k: why for k, why in kept.items() if why != "delay"}
        assert schedule.ready == len(has_data - under_way - set(kept))
        assert schedule.under_way == len(under_way)


def operations(lanes: int) -> int:
    """How many calls it takes to send 50 requests when so many lanes wait."""
    schedule = with_lanes(*[lane(f"c{i}", i % 10) for i in range(lanes)])
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        for _ in range(50):
            for each in request(schedule, budget=1):
                schedule.wake(each)
                schedule.landed(each, more=True)
    finally:
        sys.setprofile(None)
    return calls


def test_a_request_costs_the_same_with_twenty_lanes_and_with_a_thousand() -> None:
    assert operations(1000) < 1.2 * operations(20)
