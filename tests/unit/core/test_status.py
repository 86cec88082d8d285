"""Gauges become a status document, and a peer's state becomes sentences."""

from __future__ import annotations

from typing import Any

import pytest

from droprd.core.status import duration, rfc3339, status_document, why_peer
from droprd.errors import UnknownPeer


def document(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "node": "hamburg",
        "version": "0.1.0",
        "state": "running",
        "uptime_s": 12.34567,
        "as_of_ns": 1_700_000_000_123_456_789,
        "workers": {"sender": {"state": "running", "pid": 7, "restarts": 0}},
        "gauges": {},
        "peers": ["berlin"],
    }
    return status_document(**{**given, **changes})


def test_a_status_names_every_field_even_before_any_worker_spoke() -> None:
    status = document()
    assert status["schema"] == 1
    assert status["as_of"] == "2023-11-14T22:13:20.123Z"
    assert status["peers"]["berlin"]["state"] == "unknown"
    assert status["peers"]["berlin"]["queued"] == 0
    assert status["spool"] == {"bytes": 0, "free_bytes": 0}
    assert (status["dead_letters"], status["unmerged_bytes"]) == (0, 0)


def test_the_gauges_of_all_workers_are_put_together() -> None:
    status = document(
        gauges={
            "sender": {
                "peers": {"berlin": {"state": "open", "queued": 3, "bytes": 9}},
                "dead": 2,
                "unmerged_bytes": 5,
            },
            "receiver": {"received": 8, "full": True},
            "janitor": {
                "channels": {"sites": {"ready": 4}},
                "dead_letters": 1,
                "spool": {"bytes": 10, "free_bytes": 11},
            },
        }
    )
    assert status["peers"]["berlin"]["queued"] == 3
    assert status["channels"] == {"sites": {"ready": 4, "leased": 0, "dead": 0}}
    assert status["dead_letters"] == 3
    assert status["unmerged_bytes"] == 5
    assert status["spool"] == {"bytes": 10, "free_bytes": 11}
    assert status["receiver"]["full"] is True


@pytest.mark.parametrize("rubbish", [None, 1, "x", [1], {"peers": 5, "dead": "x", "problems": 3}])
def test_gauges_of_another_form_are_left_out(rubbish: Any) -> None:
    status = document(gauges={"sender": rubbish, "receiver": rubbish, "janitor": rubbish})
    assert status["peers"]["berlin"]["state"] == "unknown"
    assert status["dead_letters"] == 0


def test_a_peer_that_is_no_longer_configured_is_shown_as_such() -> None:
    gauges = {"sender": {"peers": {"paris": {"state": "throttled", "queued": 1}}}}
    assert document(gauges=gauges)["peers"]["paris"]["state"] == "unconfigured"


def test_why_says_cause_since_attempt_next_try_and_what_to_type() -> None:
    berlin = {
        "state": "throttled",
        "queued": 12,
        "bytes": 4096,
        "oldest_age_s": 700,
        "last_error": "connection refused",
        "next_try_s": 31,
        "since_s": 710,
        "attempt": 9,
    }
    why = why_peer(document(gauges={"sender": {"peers": {"berlin": berlin}}}), "berlin")
    assert why["command"] == "droprctl retry berlin"
    assert why["text"] == (
        "berlin is throttled: it does not take messages: connection refused. "
        "So for 11 min, attempt 9. 12 messages (4096 bytes) wait, the oldest for 11 min. "
        "The next try is in 31 s. Type: droprctl retry berlin"
    )


def test_why_of_a_paused_peer_names_who_paused_it_and_the_way_out() -> None:
    since_ns = 1_700_000_000_123_456_789 - 60 * 10**9
    paused = {"berlin": {"who": "root", "reason": "moving", "since_wall_ns": since_ns}}
    why = why_peer(document(paused=paused), "berlin")
    assert why["cause"] == "it was paused by root (moving)"
    assert why["command"] == "droprctl resume berlin"
    assert why["since_s"] == 60
    why = why_peer(document(paused={"": {"who": "root", "reason": ""}}), "berlin")
    assert why["cause"] == "the whole node was paused by root"
    assert why["command"] == "droprctl resume"


def test_why_of_a_dead_sender_blames_the_sender_first() -> None:
    status = document(workers={"sender": {"state": "backoff", "pid": None, "restarts": 4}})
    assert why_peer(status, "berlin")["cause"] == "the sender of this node is backoff"


def test_why_of_an_unknown_peer_names_those_that_are_known() -> None:
    with pytest.raises(UnknownPeer) as caught:
        why_peer(document(), "paris")
    assert "berlin" in caught.value.why


def test_durations_are_short() -> None:
    assert [duration(s) for s in (0, 45, 150, 7000, 12_000, 200_000)] == [
        "0 s",
        "45 s",
        "2 min",
        "1 h 56 min",
        "3 h 20 min",
        "2 d 7 h",
    ]


def test_times_are_rfc_3339_in_utc() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00.000Z"
