"""Peers are added and removed whole, with tokens that nobody else can read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from droprd.settings.loading import load
from droprd.settings.published import Published
from droprd.spool.daemonlock import DaemonLock
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout

from .conftest import Call


def _files(node: Path) -> list[str]:
    return sorted(os.listdir(node / "keys") + os.listdir(node / "peers.d"))


def _public(node: Path) -> Published:
    return Published(Layout(str(node / "spool")).public)


def test_a_token_is_made_and_printed_bare(node: Path, droprctl: Call) -> None:
    added = droprctl("-C", node, "peer", "add", "berlin", "https://berlin.example:7707")
    assert added.code == 0
    token = added.out.removesuffix("\n")
    assert len(token) >= 32
    assert "\n" not in token
    file = node / "keys" / "berlin.token"
    assert file.read_text() == f"{token}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    peer = load(str(node / "droprd.toml"), {}).peers["berlin"]
    assert peer.url == "https://berlin.example:7707"
    assert peer.token_file == str(file)
    assert token not in added.err


def test_without_a_daemon_applications_know_the_peer_at_once(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://berlin.example:7707")
    assert not _public(node).get().peers["berlin"].unconfigured
    droprctl("-C", node, "peer", "remove", "berlin")
    assert _public(node).get().peers["berlin"].unconfigured
    assert _files(node) == []


def test_the_other_nodes_token_is_taken_over(node: Path, tmp_path: Path, droprctl: Call) -> None:
    given = tmp_path / "given"
    given.write_text("  a-token-of-another-node \n")
    added = droprctl(
        "-C", node, "peer", "add", "berlin", "https://berlin.example", "--token-file", given
    )
    assert (added.code, added.out) == (0, "")
    assert (node / "keys" / "berlin.token").read_text() == "a-token-of-another-node\n"


def test_a_peer_that_only_sends_needs_no_url(node: Path, droprctl: Call) -> None:
    added = droprctl("-C", node, "peer", "add", "shop", "--json")
    assert added.json["token"]
    assert load(str(node / "droprd.toml"), {}).peers["shop"].addresses == ()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["Berlin", "https://b.example"], "invalid_name"),
        (["berlin", "http://b.example"], "config_invalid"),
        (["berlin", "b.example"], "config_invalid"),
        (["berlin", "https://b.example", "--token-file", "/nonexistent"], "system"),
        (["berlin", "https://b.example", "--token-file", "/dev/null"], "bad_token"),
    ],
)
def test_what_cannot_be_added_leaves_nothing(
    node: Path, droprctl: Call, words: list[str], code: str
) -> None:
    refused = droprctl("-C", node, "peer", "add", *words, "--json")
    assert refused.code != 0
    assert refused.error["code"] == code
    assert _files(node) == []


def test_a_token_of_two_peers_is_refused_and_taken_back(
    node: Path, tmp_path: Path, droprctl: Call
) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://berlin.example")
    token = tmp_path / "token"
    token.write_text((node / "keys" / "berlin.token").read_text())
    refused = droprctl(
        "-C", node, "peer", "add", "paris", "https://p.example", "--token-file", token, "--json"
    )
    assert refused.error["code"] == "config_invalid"
    assert "same token" in refused.error["faults"][0]
    assert _files(node) == ["berlin.token", "berlin.toml"]


def test_a_peer_is_added_once(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://berlin.example")
    before = (node / "keys" / "berlin.token").read_text()
    again = droprctl("-C", node, "peer", "add", "berlin", "https://other.example", "--json")
    assert again.error["code"] == "peer_exists"
    assert (node / "keys" / "berlin.token").read_text() == before


def test_a_peer_written_by_hand_is_not_removed(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://berlin.example")
    os.rename(node / "peers.d" / "berlin.toml", node / "peers.d" / "all.toml")
    refused = droprctl("-C", node, "peer", "remove", "berlin", "--json")
    assert refused.error["code"] == "written_by_hand"
    unknown = droprctl("-C", node, "peer", "remove", "rome", "--json")
    assert unknown.error["code"] == "unknown_peer"
    assert _files(node) == ["all.toml", "berlin.token"]


def test_while_somebody_else_is_the_daemon_nothing_is_changed(node: Path, droprctl: Call) -> None:
    lock = DaemonLock.take(OsFs(), Layout(str(node / "spool")), "droprd")
    try:
        refused = droprctl(
            "-C", node, "--timeout", "10ms", "peer", "add", "berlin", "https://b.example", "--json"
        )
    finally:
        lock.release()
    assert refused.error["code"] == "spool_busy"
    assert str(os.getpid()) in refused.error["why"]
    assert _files(node) == []


def test_peers_are_listed_with_exit_3_without_a_daemon(node: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "berlin", "https://berlin.example")
    listed = droprctl("-C", node, "peer", "list", "--json")
    assert listed.code == 3
    (peer,) = listed.json["peers"]
    assert (peer["name"], peer["urls"]) == ("berlin", ["https://berlin.example"])
    assert "https://berlin.example" in droprctl("-C", node, "peer", "list").out


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_leaves_nothing_behind_that_the_daemon_may_not_write(droprctl: Call) -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own is closed to other users
        os.chmod(directory, 0o755)
        node = Path(directory) / "n"
        droprctl("init", "--dir", node, "--name", "hamburg")
        for path in [node / "keys", node / "spool", *(node / "spool").rglob("*")]:
            os.chown(path, 64001, 64001)
        assert droprctl("-C", node, "peer", "add", "berlin", "https://b.example").code == 0
        assert droprctl("-C", node, "pause", "berlin").code == 0
        assert droprctl("-C", node, "send", "berlin", "x").code == 0
        assert droprctl("-C", node, "receive", "common").code == 0
        assert droprctl("-C", node, "peer", "remove", "berlin").code == 0
        for path in [*(node / "keys").rglob("*"), *(node / "spool").rglob("*")]:
            assert path.lstat().st_uid == 64001, path
        assert os.geteuid() == 0
