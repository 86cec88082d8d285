"""Applications find their node and what they must know of it with the daemon stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest

from droprd.errors import ConfigError, SpoolNotReady
from droprd.settings.published import (
    PublicPeer,
    Published,
    find_config,
    find_node,
    public_map,
)
from droprd.settings.values import ChannelSettings, NodeSettings, PeerSettings, Settings


def _public(path: Path, **more: Any) -> None:
    data = {"schema": 1, "node": "hamburg", "spool_id": b"x" * 16, **more}
    new = path.with_suffix(".new")
    new.write_bytes(msgpack.packb(data))
    os.replace(new, path)


def test_the_node_is_found_by_its_configuration(tmp_path: Path) -> None:
    main = tmp_path / "droprd.toml"
    main.write_text('[node]\nname = "hamburg"\nspool = "spool"\n[peers.x]\nanything = 1\n')
    node = find_node(environ={"DROPRD_CONFIG": str(main)})
    assert (node.name, node.spool, node.config_file) == (
        "hamburg",
        str(tmp_path / "spool"),
        str(main),
    )
    assert node.socket == "/run/droprd/control.sock"
    node = find_node(str(main), environ={"DROPRD_NODE__SPOOL": "/else", "DROPRD_CONFIG": "/no"})
    assert node.spool == "/else"


def test_the_usual_place_is_the_default() -> None:
    assert find_config(environ={}) == "/etc/droprd/droprd.toml"


def test_a_spool_can_be_named_without_any_configuration(tmp_path: Path) -> None:
    node = find_node(spool=str(tmp_path), environ={"DROPRD_CONFIG": "/nothing"})
    assert (node.name, node.spool) == ("", str(tmp_path))


@pytest.mark.parametrize("text", ["[node", "[node]\nname = 1\n", b"\xff"])
def test_a_configuration_that_cannot_be_used_is_a_typed_error(
    tmp_path: Path, text: str | bytes
) -> None:
    main = tmp_path / "droprd.toml"
    main.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError):
        find_node(str(main), environ={})
    with pytest.raises(ConfigError) as caught:
        find_node(str(tmp_path / "no.toml"), environ={})
    assert caught.value.code == "config_missing"


def test_what_is_published_is_seen_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "public"
    _public(path, peers={"berlin": {"channels": ["sites"], "max_message_bytes": 10}})
    published = Published(str(path))
    first = published.get()
    assert first.node == "hamburg"
    assert first.peers["berlin"].channels == frozenset({"sites"})
    assert first.peers["berlin"].max_message_bytes == 10
    assert published.get() is first
    _public(
        path,
        peers={"berlin": {"channels": None}},
        draining=["berlin/sites"],
        full={"outbox": "quota", "inbox": None},
        limits={"max_message_bytes": 99},
        channels={"sites": {"max_attempts": 3, "ordered": True}},
    )
    second = published.get()
    assert second.peers["berlin"].channels is None
    assert second.peers["berlin"].max_message_bytes == 99
    assert second.draining_target("berlin", "sites", 5) == "berlin/sites"
    assert second.draining_target("berlin", "other", 5) is None
    assert second.outbox_full == "quota"
    assert second.channel("sites").ordered
    assert second.channel("other").max_attempts == 10


def test_what_the_daemon_publishes_is_what_applications_read(tmp_path: Path) -> None:
    settings = Settings(
        node=NodeSettings("hamburg", max_message_bytes=100),
        peers={"berlin": PeerSettings(channels=("sites",), max_message_bytes=10)},
        channels={"sites": ChannelSettings(3, True)},
    )
    data = public_map(
        settings,
        b"s" * 16,
        disk_bytes=100 << 20,
        draining=[""],
        unconfigured=["gone"],
        inbox_full="quota",
    )
    (tmp_path / "public").write_bytes(msgpack.packb(data))
    public = Published(str(tmp_path / "public")).get()
    assert public.peers["berlin"] == PublicPeer(frozenset({"sites"}), 10, False)
    assert public.peers["gone"].unconfigured
    assert public.reserve_bytes == 5 << 20
    assert public.draining_target("x", "y", 1) == ""
    assert (public.outbox_full, public.inbox_full) == (None, "quota")
    assert public.channel("sites") == ChannelSettings(3, True)
    assert public.spool_id == b"s" * 16


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x80", b"\x81\xa4node\xa1x"])
def test_a_damaged_or_missing_file_is_a_typed_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "public"
    with pytest.raises(SpoolNotReady):
        Published(str(path)).get()
    path.write_bytes(data)
    with pytest.raises(SpoolNotReady) as caught:
        Published(str(path)).get()
    assert caught.value.code == "state_unreadable"


def test_applications_do_not_pay_for_the_checks_of_the_daemon() -> None:
    code = (
        "import sys, droprd.settings.published; "
        "print([m for m in ('pydantic', 'click', 'aiohttp', 'pycurl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
