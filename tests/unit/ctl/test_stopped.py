"""Without a daemon, droprctl says what the files say, and changes what it may."""

from __future__ import annotations

from pathlib import Path

import msgpack

from droprd.settings.published import Published
from droprd.spool import state
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout

from .conftest import Call


def _layout(node: Path) -> Layout:
    return Layout(str(node / "spool"))


def test_status_comes_from_the_files_and_exits_3(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://b.example")
    gauges = {
        "peers": {
            "berlin": {
                "state": "throttled",
                "queued": 7,
                "bytes": 700,
                "oldest_age_s": 60,
                "last_error": "connection refused\x1b[31m",
                "next_try_s": 5,
            }
        },
        "dead": 2,
        "unmerged_bytes": 0,
    }
    Path(_layout(node).gauges("sender")).write_bytes(msgpack.packb(gauges))
    Path(_layout(node).gauges("janitor")).write_bytes(b"\xc1 damaged")
    shown = droprctl("-C", node, "status", "--json")
    assert shown.code == 3
    document = shown.json
    assert (document["schema"], document["node"], document["state"]) == (1, "hamburg", "stopped")
    assert document["peers"]["berlin"]["state"] == "throttled"
    assert document["peers"]["berlin"]["next_try_s"] is None
    assert document["dead_letters"] == 2
    assert document["spool"]["free_bytes"] > 0
    plain = droprctl("-C", node, "status")
    assert plain.code == 3
    assert "\x1b" not in plain.out
    assert "connection refused" in plain.out
    one = droprctl("-C", node, "status", "berlin", "--json")
    assert list(one.json["peers"]) == ["berlin"]
    assert droprctl("-C", node, "status", "rome", "--json").error["code"] == "unknown_peer"


def test_why_and_health_say_that_the_daemon_is_stopped(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://b.example")
    why = droprctl("-C", node, "why", "berlin", "--json")
    assert why.code == 3
    assert "stopped" in why.json["cause"]
    assert why.json["command"] == f"droprd --config {node}/droprd.toml"
    assert droprctl("-C", node, "why", "rome").code == 1
    health = droprctl("-C", node, "health", "--json")
    assert (health.code, health.json["verdict"]) == (3, "critical")
    assert health.json["reasons"][0]["command"] == why.json["command"]


def test_a_pause_is_a_fact_on_disk(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://b.example")
    paused = droprctl(
        "-C", node, "pause", "berlin/sites", "--for", "2h", "--reason", "moving", "--json"
    )
    assert (paused.code, paused.json["for_s"]) == (0, 7200)
    wish = state.read_wishes(OsFs(), _layout(node)).pauses["berlin/sites"]
    assert wish.reason == "moving"
    assert wish.until_wall_ns is not None
    assert wish.until_wall_ns - wish.since_wall_ns == 7200 * 10**9
    assert "berlin/sites" in Published(_layout(node).public).get().paused
    assert droprctl("-C", node, "status", "--json").json["paused"]["berlin/sites"]["who"]
    assert droprctl("-C", node, "resume", "berlin").code == 0
    assert not state.read_wishes(OsFs(), _layout(node)).pauses
    assert not Published(_layout(node).public).get().paused


def test_a_target_that_nobody_knows_is_taken_with_a_warning(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://b.example")
    for words in (["pause", "berln/sites"], ["drain", "berln"]):
        taken = droprctl("-C", node, *words)
        assert taken.code == 0
        assert "warning: no peer 'berln' is configured; configured are berlin" in taken.err
    assert "warning" not in droprctl("-C", node, "pause", "berlin").err
    assert "warning" not in droprctl("-C", node, "pause").err


def test_a_drain_is_recorded_and_judged_by_what_is_left(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://b.example")
    empty = droprctl("-C", node, "drain", "berlin", "--json")
    assert (empty.code, empty.json["left"]) == (0, 0)
    assert Published(_layout(node).public).get().draining_target("berlin", "x", 5) == "berlin"
    refused = droprctl("-C", node, "send", "berlin", "too late", "--json")
    assert (refused.code, refused.error["code"]) == (1, "draining")
    assert droprctl("-C", node, "resume").code == 0
    assert not Published(_layout(node).public).get().draining
    assert droprctl("-C", node, "send", "berlin", "in time").code == 0
    left = droprctl("-C", node, "drain", "berlin", "--json")
    assert (left.code, left.json["left"]) == (3, 1)


def test_what_was_sent_without_a_daemon_is_counted(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://b.example")
    assert droprctl("-C", node, "status", "--json").json["unmerged_bytes"] == 0
    droprctl("-C", node, "send", "berlin", "x" * 1000)
    shown = droprctl("-C", node, "status", "--json").json
    assert 1000 < shown["unmerged_bytes"] < 2000


def test_messages_are_handed_over_with_the_daemon_stopped(
    node: Path, tmp_path: Path, droprctl: Call
) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://b.example")
    (tmp_path / "lines").write_bytes(b"one\ntwo\n\nlast")
    sent = droprctl("-C", node, "send", "berlin", "--lines", "--file", tmp_path / "lines")
    assert (sent.code, len(set(sent.out.split()))) == (0, 4)
    refused = droprctl("-C", node, "send", "rome", "x", "--json")
    assert (refused.code, refused.error["code"]) == (1, "unknown_peer")
    none = droprctl("-C", node, "receive", "sites", "--json")
    assert (none.code, none.out, none.err) == (0, "", "")


def test_fsck_says_that_all_is_well_or_what_is_not(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://b.example")
    droprctl("-C", node, "send", "berlin", "a message")
    well = droprctl("-C", node, "fsck", "--json")
    assert (well.code, well.json["ok"]) == (0, True)
    (journal,) = Path(_layout(node).journals).iterdir()
    data = bytearray(journal.read_bytes())
    data[data.index(b"a message")] ^= 1
    journal.write_bytes(data)
    damaged = droprctl("-C", node, "fsck", "--json")
    assert (damaged.code, damaged.json["ok"]) == (1, False)
    assert journal.name in droprctl("-C", node, "fsck").out
