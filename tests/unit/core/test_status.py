"""Gauges become a status document, and a peer's state becomes sentences."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def _in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times for people are local times."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def why_of(peer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return why_peer(document(gauges={"sender": {"peers": {"berlin": peer}}}, **changes), "berlin")


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
    assert why["cause"] == "it has taken nothing: connection refused"
    # 22:13:20 UTC, less 710 s
    assert why["text"] == (
        "12 messages for berlin wait: it has taken nothing since 22:01 (attempt 9): "
        "connection refused; next try in 31 s; to try now: droprctl retry berlin"
    )


def test_why_of_a_paused_peer_names_who_paused_it_and_the_way_out() -> None:
    since_ns = 1_700_000_000_123_456_789 - 60 * 10**9
    paused = {"berlin": {"who": "root", "reason": "moving", "since_wall_ns": since_ns}}
    why = why_peer(document(paused=paused), "berlin")
    assert why["cause"] == "it has been paused by root (moving)"
    assert why["text"] == (
        "nothing waits for berlin; it has been paused by root for 60 s (moving); "
        "to go on: droprctl resume berlin"
    )
    assert why["command"] == "droprctl resume berlin"
    assert why["since_s"] == 60
    why = why_peer(document(paused={"": {"who": "root", "reason": ""}}), "berlin")
    assert why["cause"] == "the whole node has been paused by root"
    assert why["command"] == "droprctl resume"


def test_why_of_a_dead_sender_blames_the_sender_first() -> None:
    status = document(workers={"sender": {"state": "backoff", "pid": None, "restarts": 4}})
    cause = why_peer(status, "berlin")["cause"]
    assert cause == "the sender of this node failed and waits for its next start"


def test_why_tells_what_to_do_about_each_state() -> None:
    waiting = {"state": "throttled", "queued": 1, "since_s": 9, "attempt": 3, "next_try_s": 5000}
    refused = why_of({**waiting, "last_error": "401 unknown token"})
    assert refused["text"] == (
        "1 message for berlin waits: it has taken nothing for 9 s (attempt 3): 401 unknown token; "
        "compare the tokens of both nodes (peers.berlin.token_file); "
        "next try at 23:36; to try now: droprctl retry berlin"
    )
    long_ago = why_of({**waiting, "since_s": 100_000, "attempt": 0, "next_try_s": 0.2})
    assert "nothing since 2023-11-13 18:26: the last try failed; next try now;" in long_ago["text"]
    moving = why_of({"state": "open", "queued": 2})
    assert moving["text"] == "2 messages for berlin are on their way."
    blamed = why_of({"state": "open", "queued": 1, "last_error": "400 too odd"})
    assert blamed["text"] == (
        "1 message for berlin is on its way, though a request was refused: 400 too odd."
    )
    assert why_of({"state": "open", "queued": 0})["text"] == "nothing waits for berlin."
    held = why_of({"state": "open", "queued": 2, "held": "sites/5: it lost 7 messages"})
    assert (
        "2 messages for berlin wait: held is sites/5: it lost 7 messages; to go on: "
        in (held["text"])
    )
    below = why_of({"state": "open", "queued": 2}, paused={"berlin/sites": {"who": "root"}})
    assert below["command"] == "droprctl resume berlin/sites"
    drained = why_of({"state": "open", "queued": 2}, draining=["berlin"])
    assert drained["command"] == "droprctl resume berlin"


def test_why_of_a_stopped_node_tells_how_to_start_it_and_what_is_not_counted() -> None:
    gauges = {"sender": {"peers": {"berlin": {"queued": 0}}, "unmerged_bytes": 70}}
    why = why_peer(document(state="stopped", gauges=gauges), "berlin", "droprd -C n")
    assert why["text"] == (
        "nothing waits for berlin, not counting 70 bytes that are not merged yet; "
        "the daemon of this node is stopped; to start it: droprd -C n"
    )


def test_a_pause_stands_for_no_next_try() -> None:
    throttled = {"state": "throttled", "queued": 1, "next_try_s": 7, "since_s": 1, "attempt": 2}
    until_ns = 1_700_000_000_123_456_789 + 60 * 10**9
    why = why_of(throttled, paused={"berlin": {"who": "root", "until_wall_ns": until_ns}})
    assert why["next_try_s"] is None
    assert why["text"] == (
        "1 message for berlin waits: it has been paused by root, until 22:14; "
        "to go on: droprctl resume berlin"
    )
    both = why_of(throttled, paused={"": {"who": "root", "receiving": True}})
    assert both["cause"] == "the whole node has been paused, receiving too, by root"


def test_a_peer_without_a_url_is_told_from_one_that_was_removed() -> None:
    no_url = why_of({"state": "unconfigured", "queued": 1})
    assert no_url["command"] == "droprctl reload"
    assert "set peers.berlin.url" in no_url["text"]
    removed = why_of({"state": "throttled", "queued": 1}, peers=[])
    assert (removed["state"], removed["command"]) == (
        "unconfigured",
        "droprctl peer add berlin URL",
    )


def test_what_a_node_sends_to_itself_is_no_stranger_s() -> None:
    own = {"hamburg": {"state": "open", "queued": 1}, "rome": {"state": "open", "queued": 0}}
    peers = document(gauges={"sender": {"peers": own}})["peers"]
    assert peers["hamburg"]["state"] == "open"
    assert "rome" not in peers  # removed, and nothing waits for it


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
