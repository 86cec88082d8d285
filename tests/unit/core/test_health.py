"""Health is judged by progress and age."""

from __future__ import annotations

from typing import Any

import pytest

from droprd.core.health import Level, judge
from droprd.core.thresholds import Thresholds

RUNNING = {"state": "running", "pid": 1, "restarts": 0}


def status(**changes: Any) -> dict[str, Any]:
    return {"state": "running", "workers": {"sender": RUNNING}, "peers": {}, **changes}


def peer(**changes: Any) -> dict[str, Any]:
    return {"berlin": {"state": "open", "queued": 5, "oldest_age_s": 1, **changes}}


def codes(document: dict[str, Any]) -> dict[str, Level]:
    return {reason.code: reason.level for reason in judge(document).reasons}


def test_a_node_that_works_is_ok() -> None:
    health = judge(status(peers=peer()))
    assert (health.verdict, health.reasons, health.summary()) == (Level.OK, (), "ok")


@pytest.mark.parametrize(
    ("age_s", "level"), [(899, Level.OK), (900, Level.WARNING), (4 * 3600, Level.CRITICAL)]
)
def test_the_age_of_the_oldest_message_decides(age_s: float, level: Level) -> None:
    assert judge(status(peers=peer(oldest_age_s=age_s))).verdict is level


def test_a_peer_that_takes_no_byte_is_noticed_though_all_processes_run() -> None:
    assert codes(status(peers=peer(accepted_age_s=5 * 3600))) == {"peer_silent": Level.CRITICAL}


def test_an_old_silence_with_nothing_queued_is_no_fault() -> None:
    assert judge(status(peers=peer(queued=0, accepted_age_s=10**6))).verdict is Level.OK


def test_what_an_operator_paused_is_no_fault() -> None:
    assert judge(status(peers=peer(state="paused", oldest_age_s=10**6))).verdict is Level.OK


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        ({"state": "backoff", "failures": 1}, {"worker_backoff": Level.WARNING}),
        ({"state": "backoff", "failures": 5}, {"worker_backoff": Level.CRITICAL}),
        ({"state": "fatal"}, {"worker_fatal": Level.CRITICAL}),
        ({"state": "stopping", "stuck": True, "pid": 9}, {"worker_stuck": Level.CRITICAL}),
        ({"state": "stopped"}, {"worker_away": Level.WARNING}),
        ({"state": "running"}, {}),
        ({"state": "running", "failures": 1}, {"worker_restarting": Level.WARNING}),
        ({"state": "starting", "failures": 9}, {"worker_restarting": Level.CRITICAL}),
        (
            {"state": "running", "silent_s": 16, "killed_in_s": 14},
            {"worker_hung": Level.WARNING},
        ),
        (
            {"state": "running", "silent_s": 20, "killed_in_s": 10},
            {"worker_hung": Level.CRITICAL},
        ),
    ],
)
def test_a_worker_that_does_not_run_is_named(
    worker: dict[str, Any], expected: dict[str, Level]
) -> None:
    assert codes(status(workers={"sender": worker})) == expected


def test_a_full_disk_dead_letters_corruption_and_a_stopped_daemon_are_named() -> None:
    found = codes(
        {
            "state": "stopped",
            "spool": {"free_bytes": 1},
            "outbox_full": True,
            "receiver": {"full": True},
            "dead_letters": 2,
            "corrupt": 1,
            "lost": 1,
            "problems": ["the wall clock has jumped"],
        }
    )
    assert found == {
        "daemon_stopped": Level.CRITICAL,
        "outbox_full": Level.CRITICAL,
        "inbox_full": Level.CRITICAL,
        "disk_space": Level.CRITICAL,
        "corrupt": Level.CRITICAL,
        "lost": Level.CRITICAL,
        "dead_letters": Level.WARNING,
        "problem": Level.WARNING,
    }


def test_a_sender_that_does_not_merge_is_noticed() -> None:
    assert codes(status(unmerged_bytes=10, last_merge_age_s=20)) == {"not_merging": Level.WARNING}
    assert codes(status(unmerged_bytes=10, last_merge_age_s=60)) == {"not_merging": Level.CRITICAL}
    assert codes(status(unmerged_bytes=0, last_merge_age_s=60)) == {}


def test_a_held_lane_and_a_removed_peer_are_named() -> None:
    assert codes(status(peers=peer(held="the receiver was reset")))["lane_held"] is Level.CRITICAL
    assert codes(status(peers=peer(state="unconfigured"))) == {"peer_unconfigured": Level.WARNING}


def test_the_worst_reason_comes_first_and_thresholds_can_be_given() -> None:
    health = judge(status(peers=peer(oldest_age_s=20), dead_letters=1), Thresholds(1, 10))
    assert [r.level for r in health.reasons] == [Level.CRITICAL, Level.WARNING]
    assert health.summary() == "critical: the oldest message for berlin waits for 20 s (and 1 more)"
    assert health.to_dict()["verdict"] == "critical"


def test_a_threshold_of_zero_is_none() -> None:
    limits = Thresholds(oldest_age_warning_s=0, oldest_age_critical_s=0, dead_letters_warning=0)
    document = status(peers=peer(oldest_age_s=10**9), dead_letters=10**6)
    assert judge(document, limits).verdict is Level.OK


@pytest.mark.parametrize(
    ("spool", "expected"),
    [
        ({"free_bytes": 1 << 40, "full_in_s": 5 * 3600}, {}),
        ({"free_bytes": 1 << 40, "full_in_s": 3600}, {"disk_fills": Level.WARNING}),
        ({"free_bytes": 1 << 40, "full_in_s": 600}, {"disk_fills": Level.CRITICAL}),
        ({"free_bytes": 100 << 20, "full_in_s": None}, {"disk_space": Level.WARNING}),
        ({"free_bytes": 0}, {}),
    ],
)
def test_a_disk_that_fills_up_is_noticed_before_it_is_full(
    spool: dict[str, Any], expected: dict[str, Level]
) -> None:
    assert codes(status(spool=spool)) == expected


def test_a_channel_that_nobody_consumes_is_named() -> None:
    health = judge(status(channels={"sites": {"ready": 3, "oldest_age_s": 7200}}))
    assert (
        health.summary() == "warning: the oldest message of channel sites waits for 2 h to be taken"
    )
    assert codes(status(channels={"sites": {"ready": 3, "oldest_age_s": 60}})) == {}


def test_paused_receiving_is_told_because_it_holds_up_others() -> None:
    paused = {"": {"who": "ann", "reason": "a new disk", "receiving": True}}
    assert judge(status(paused=paused)).summary() == (
        "warning: receiving was paused by ann (a new disk)"
    )
    assert codes(status(paused={"": {"who": "ann", "receiving": False}})) == {}


def test_a_peer_that_is_not_reached_is_told_though_nothing_waits() -> None:
    away = peer(queued=0, state="throttled", since_s=3600)
    assert codes(status(peers=away)) == {"peer_unreached": Level.WARNING}
