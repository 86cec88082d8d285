"""When supervisor's listener restarts the daemon, and when it keeps its hands off."""

from __future__ import annotations

from droprd.monitor.supervisor import HOUR_S, Judge, Look

SILENT = Look(answers=False)
FINE = Look(answers=True)


def test_a_daemon_that_is_silent_at_three_looks_in_a_row_is_restarted() -> None:
    judge = Judge(3, 3)
    assert [bool(judge.restart(SILENT, now)) for now in (0, 60, 120)] == [False, False, True]


def test_one_good_look_forgives_the_bad_ones() -> None:
    judge = Judge(2, 3)
    looks = [SILENT, FINE, SILENT, SILENT]
    assert [bool(judge.restart(look, 0)) for look in looks] == [False, False, False, True]


def test_there_is_a_cap_of_restarts_an_hour() -> None:
    judge = Judge(1, 2)
    assert [bool(judge.restart(SILENT, now)) for now in (0, 60, 120, HOUR_S - 1)] == [
        True,
        True,
        False,
        False,
    ]
    assert judge.restart(SILENT, HOUR_S)


def test_a_paused_or_draining_node_is_never_restarted() -> None:
    judge = Judge(1, 3)
    assert judge.restart(Look(answers=False, hands_off=True), 0) == ""
    stuck = Look(answers=True, critical=frozenset({"not_merging"}), hands_off=True)
    assert judge.restart(stuck, 0) == ""


def test_only_what_a_fresh_process_mends_leads_to_a_restart() -> None:
    judge = Judge(1, 3)
    hopeless = frozenset({"oldest_age", "disk_space", "dead_letters", "worker_stuck"})
    assert judge.restart(Look(answers=True, critical=hopeless), 0) == ""
    assert judge.restart(Look(answers=True, critical=frozenset({"not_merging"})), 0)
