"""The restart table: every cell, and what must hold on any way through it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droprd.core.restart import (
    ALIVE,
    TABLE,
    Action,
    Event,
    State,
    backoff_s,
    event_of_end,
    step,
)

ENDS = {Event.EXITED, Event.KILLED, Event.EXITED_CONFIG, Event.SPAWN_FAILED}


def test_every_cell_is_filled() -> None:
    assert set(TABLE) == set(State)
    for row in TABLE.values():
        assert set(row) == set(Event)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_a_process_is_spawned_only_where_there_is_none(state: State, event: Event) -> None:
    after, actions = step(state, event)
    if Action.SPAWN in actions:
        assert after is State.STARTING
        assert state not in ALIVE or event in ENDS
    if after not in ALIVE and state in ALIVE:
        assert event in ENDS
    if {Action.ASK, Action.ABORT, Action.KILL} & set(actions):
        assert state in ALIVE
        assert after is State.STOPPING


@pytest.mark.parametrize("state", State)
def test_stop_leads_to_stopping_where_there_is_a_process_and_to_stopped_elsewhere(
    state: State,
) -> None:
    after, _ = step(state, Event.STOP)
    assert after is (State.STOPPING if state in ALIVE else State.STOPPED)


@pytest.mark.parametrize("state", State)
def test_only_exit_78_is_fatal(state: State) -> None:
    for event in Event:
        if state is not State.FATAL and step(state, event)[0] is State.FATAL:
            assert event is Event.EXITED_CONFIG


@pytest.mark.parametrize("state", State)
def test_running_begins_only_with_ready(state: State) -> None:
    for event in Event:
        if step(state, event)[0] is State.RUNNING and state is not State.RUNNING:
            assert (state, event) == (State.STARTING, Event.READY)


def test_a_killed_worker_is_replaced_at_once() -> None:
    assert step(State.RUNNING, Event.KILLED) == (State.STARTING, (Action.SPAWN,))


def test_a_worker_that_dies_before_its_first_work_waits() -> None:
    for event in (Event.EXITED, Event.KILLED, Event.SPAWN_FAILED):
        assert step(State.STARTING, event) == (State.BACKOFF, (Action.DELAY,))


def test_a_hung_worker_is_aborted_then_killed_then_started_again() -> None:
    state, actions = step(State.RUNNING, Event.HUNG)
    assert (state, actions) == (State.STOPPING, (Action.ABORT,))
    state, actions = step(state, Event.GRACE_OVER)
    assert (state, actions) == (State.STOPPING, (Action.KILL,))
    assert step(state, Event.KILLED) == (State.STOPPED, (Action.AGAIN,))


def test_a_worker_that_ignores_sigkill_is_never_doubled() -> None:
    for event in set(Event) - ENDS:
        after, actions = step(State.STOPPING, event)
        assert after is State.STOPPING
        assert Action.SPAWN not in actions


def test_a_configuration_that_cannot_be_used_waits_for_another_one() -> None:
    state, _ = step(State.STARTING, Event.EXITED_CONFIG)
    assert state is State.FATAL
    assert step(state, Event.DELAY_OVER) == (State.FATAL, ())
    assert step(state, Event.START) == (State.STARTING, (Action.SPAWN,))


@given(st.lists(st.sampled_from(Event)))
def test_on_any_way_there_is_never_more_than_one_process(events: list[Event]) -> None:
    state, alive = State.STOPPED, False
    for event in events:
        if event in ENDS and not alive:
            continue
        if event is Event.SPAWN_FAILED and state is not State.STARTING:
            continue
        alive = alive and event not in ENDS
        state, actions = step(state, event)
        if Action.SPAWN in actions:
            assert not alive
            alive = True
        assert alive == (state in ALIVE)


def test_the_backoff_doubles_to_its_cap_and_never_gives_up() -> None:
    assert [backoff_s(n, 60) for n in range(1, 10)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff_s(10**6, 60) == 60


def test_the_end_of_a_process_is_told_apart_by_its_code() -> None:
    assert event_of_end(78) is Event.EXITED_CONFIG
    assert event_of_end(-9) is Event.KILLED
    assert event_of_end(0) is Event.EXITED
    assert event_of_end(-6) is Event.EXITED
