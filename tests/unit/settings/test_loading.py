"""The configuration is read whole, and all of its faults are told at once, each with its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest

from droprd.errors import ConfigError
from droprd.settings.loading import load
from droprd.settings.values import PeerSettings, Settings

MINIMAL = '[node]\nname = "hamburg"\nspool = "spool"\n[control]\nsocket = "control.sock"\n'


def _token(tmp_path: Path, name: str) -> None:
    keys = tmp_path / "keys"
    keys.mkdir(exist_ok=True)
    (keys / f"{name}.token").write_text(f"token-of-{name}-0123456789\n")


def _write(tmp_path: Path, text: str, **peers: str) -> str:
    main = tmp_path / "droprd.toml"
    main.write_text(MINIMAL + text)
    (tmp_path / "peers.d").mkdir(exist_ok=True)
    for name, content in peers.items():
        (tmp_path / "peers.d" / f"{name}.toml").write_text(content)
    return str(main)


def _faults(path: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {})
    base = os.path.dirname(path)
    return sorted(fault.replace(f"{base}/", "") for fault in caught.value.faults)


def _only_fault(path: str, environ: dict[str, str] | None = None) -> str:
    faults = _faults(path, environ)
    assert len(faults) == 1, faults
    return faults[0]


def test_a_short_file_gives_all_defaults_and_absolute_paths(tmp_path: Path) -> None:
    settings = load(_write(tmp_path, ""), {})
    assert settings.node.name == "hamburg"
    assert settings.node.spool == str(tmp_path / "spool")
    assert settings.control.socket == str(tmp_path / "control.sock")
    assert settings.node.max_message_bytes == 1 << 30
    assert settings.outbox.sent_retain_s == 86_400
    assert settings.inbox.match_frames == 100_000
    assert settings.daemon.hang_timeout_s == 30
    assert settings.peers == {}


def test_settings_survive_the_way_to_the_workers(tmp_path: Path) -> None:
    _token(tmp_path, "berlin")
    settings = load(
        _write(
            tmp_path,
            '[peers.berlin]\nurl = "https://b.example:7707"\ntoken_file = "keys/berlin.token"\n'
            'channels = ["sites"]\n[channels.sites]\nordered = true\n'
            '[receiver]\nlisten = ["127.0.0.1:7707", "unix:r.sock"]\n',
        ),
        {},
    )
    assert settings.receiver.listen == ("127.0.0.1:7707", f"unix:{tmp_path}/r.sock")
    assert Settings.from_dict(msgpack.unpackb(msgpack.packb(settings.to_dict()))) == settings


def test_peers_d_is_merged_and_its_paths_are_relative_to_the_main_file(tmp_path: Path) -> None:
    _token(tmp_path, "berlin")
    _token(tmp_path, "paris")
    path = _write(
        tmp_path,
        "[peer_defaults]\nrequests_in_flight_max = 2\n"
        '[peers.paris]\nurl = "https://p.example"\ntoken_file = "keys/paris.token"\n',
        berlin='[peers.berlin]\nurl = "https://b.example"\ntoken_file = "keys/berlin.token"\n'
        "requests_in_flight_max = 3\n",
    )
    settings = load(path, {})
    assert set(settings.peers) == {"berlin", "paris"}
    assert settings.peers["berlin"].token_file == str(tmp_path / "keys" / "berlin.token")
    assert settings.peers["berlin"].requests_in_flight_max == 3
    assert settings.peers["paris"].requests_in_flight_max == 2


def test_every_setting_can_come_from_the_environment(tmp_path: Path) -> None:
    _token(tmp_path, "berlin")
    settings = load(
        _write(tmp_path, "[log]\nlevel = 'debug'\n"),
        {
            "DROPRD_NODE__NAME": "kiel",
            "DROPRD_LOG__LEVEL": "error",
            "DROPRD_OUTBOX__SENT_RETAIN_S": "2h",
            "DROPRD_NODE__MAX_MESSAGE_BYTES": "64 MiB",
            "DROPRD_RECEIVER__LISTEN": "127.0.0.1:7707,[::1]:7707",
            "DROPRD_RECEIVER__ALLOW_PLAIN_HTTP": "false",
            "DROPRD_PEERS__BERLIN__URL": "https://b.example",
            "DROPRD_PEERS__BERLIN__TOKEN_FILE": "keys/berlin.token",
            "DROPRD_CONFIG": "/not/a/setting",
            "HOME": "/root",
        },
    )
    assert settings.node.name == "kiel"
    assert settings.log.level == "error"
    assert settings.outbox.sent_retain_s == 7200
    assert settings.node.max_message_bytes == 64 << 20
    assert settings.receiver.listen == ("127.0.0.1:7707", "[::1]:7707")
    assert settings.peers["berlin"].url == "https://b.example"


def test_all_faults_are_reported_at_once_each_with_its_place(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        'spol = "x"\n[recever]\n[receiver]\nlisten = ["0.0.0.0:7707"]\n'
        "[channels.sites]\nmax_atempts = 3\n[daemon]\nmax_rss_mib = 1\n",
        paris='[peers.paris]\nurl = "http://paris.example"\n[node]\nname = "x"\n',
        rome="[peers.rome\n",
    )
    faults = _faults(path, {"DROPRD_LOG__LEVEL": "loud", "DROPRD_NODE_NAME": "x"})
    starts = [
        "droprd.toml:channels.sites.max_atempts: is not known; did you mean 'max_attempts'?",
        "droprd.toml:control.spol: is not known; known are socket",
        "droprd.toml:daemon.max_rss_mib: must be at least 64",
        "droprd.toml:receiver.listen: plain http on 0.0.0.0",
        "droprd.toml:recever: is not known; did you mean 'receiver'?",
        "environment DROPRD_LOG__LEVEL: must be 'debug', 'info', 'warning' or 'error'",
        "environment DROPRD_NODE_NAME: two underscores",
        "peers.d/paris.toml:node: only [peers.NAME] tables belong here",
        "peers.d/paris.toml:peers.paris.url: plain http to paris.example",
        "peers.d/rome.toml: is no TOML",
    ]
    assert len(faults) == len(starts), faults
    for fault, start in zip(faults, starts, strict=True):
        assert fault.startswith(start)


def test_a_missing_name_and_a_missing_file_are_faults(tmp_path: Path) -> None:
    (tmp_path / "droprd.toml").write_text("")
    assert _only_fault(str(tmp_path / "droprd.toml")).startswith(
        "droprd.toml:node.name: is missing"
    )
    with pytest.raises(ConfigError) as caught:
        load(str(tmp_path / "nothing.toml"), {})
    assert caught.value.code == "config_missing"


def test_a_fault_of_the_peer_defaults_is_said_once(tmp_path: Path) -> None:
    _token(tmp_path, "a")
    _token(tmp_path, "b")
    path = _write(
        tmp_path,
        "[peer_defaults]\nlanes_max = 0\n"
        '[peers.a]\ntoken_file = "keys/a.token"\n[peers.b]\ntoken_file = "keys/b.token"\n',
    )
    assert _only_fault(path) == "droprd.toml:peer_defaults.lanes_max: must be at least 1"


@pytest.mark.parametrize(
    "url",
    [
        "http://berlin.example:7707",
        "http://10.0.0.1",
        "http://[2001:db8::1]:1",
        "ftp://berlin.example",
        "berlin.example:7707",
        "https://",
        "https://user:pw@berlin.example",
        "https://berlin.example:99999",
        "https://berlin.example:0",
        "https://berlin.example/?x=1",
        "unix://relative.sock",
        "unix:",
        "https://[::1",
    ],
)
def test_a_url_that_cannot_or_must_not_be_used_is_a_fault(tmp_path: Path, url: str) -> None:
    _token(tmp_path, "b")
    path = _write(tmp_path, f'[peers.b]\ntoken_file = "keys/b.token"\nurl = "{url}"\n')
    assert _only_fault(path).startswith("droprd.toml:peers.b.url: ")
    path = _write(tmp_path, f'[peers.b]\ntoken_file = "keys/b.token"\nurls = ["{url}"]\n')
    assert _only_fault(path).startswith("droprd.toml:peers.b.urls: ")


@pytest.mark.parametrize(
    "url",
    [
        "https://berlin.example:7707",
        "http://127.0.0.1:7707",
        "http://localhost:7707",
        "http://[::1]:7707",
        "unix:///run/b.sock",
        "unix:/run/b.sock",
    ],
)
def test_a_url_that_may_be_used_is_none(tmp_path: Path, url: str) -> None:
    _token(tmp_path, "b")
    path = _write(tmp_path, f'[peers.b]\ntoken_file = "keys/b.token"\nurl = "{url}"\n')
    assert load(path, {}).peers["b"].addresses == (url,)


def test_plain_http_beyond_this_machine_must_be_asked_for(tmp_path: Path) -> None:
    _token(tmp_path, "b")
    path = _write(
        tmp_path,
        '[receiver]\nallow_plain_http = true\nlisten = ["0.0.0.0:7707"]\n'
        '[peers.b]\ntoken_file = "keys/b.token"\nurl = "http://b.example"\nallow_plain_http = true',
    )
    settings = load(path, {})
    assert settings.receiver.listen == ("0.0.0.0:7707",)
    assert settings.peers["b"].url == "http://b.example"


@pytest.mark.parametrize(
    "address", ["7707", "localhost", "localhost:", ":7707", "::1:7707", "127.0.0.1:70000", "unix:"]
)
def test_an_address_that_cannot_be_listened_on_is_a_fault(tmp_path: Path, address: str) -> None:
    path = _write(tmp_path, f'[receiver]\nlisten = ["{address}"]\n')
    assert _only_fault(path).startswith("droprd.toml:receiver.listen: ")


def test_tokens_exist_are_well_formed_and_belong_to_one_peer_each(tmp_path: Path) -> None:
    _token(tmp_path, "a")
    (tmp_path / "keys" / "short.token").write_text("secret")
    path = _write(
        tmp_path,
        '[peers.a]\ntoken_file = "keys/a.token"\n[peers.b]\ntoken_file = "keys/a.token"\n'
        '[peers.c]\ntoken_file = "keys/c.token"\n[peers.d]\ntoken_file = "keys/short.token"\n'
        '[peers.e]\nurl = "https://e.example"\n',
    )
    faults = _faults(path)
    assert len(faults) == 4
    assert faults[0] == "droprd.toml:peers.b.token_file: is the same token as that of 'a'"
    assert "cannot be read: No such file" in faults[1]
    assert "holds no token" in faults[2]
    assert faults[3].startswith("droprd.toml:peers.e: has no token_file")
    assert "secret" not in "".join(faults)


def test_a_peer_that_stands_in_two_files_is_a_fault(tmp_path: Path) -> None:
    _token(tmp_path, "a")
    text = '[peers.a]\ntoken_file = "keys/a.token"\n'
    path = _write(tmp_path, text, a=text)
    assert _only_fault(path).startswith("peers.d/a.toml:peers.a: this peer is also in")


def test_names_outside_the_pattern_are_faults(tmp_path: Path) -> None:
    path = _write(tmp_path, '[peers.Bad]\n[channels."droprd.x"]\n[channels."a/b"]\n')
    faults = _faults(path, {"DROPRD_NODE__NAME": "../x"})
    assert [fault.split(": ")[0] for fault in faults] == [
        "droprd.toml:channels.a/b",
        "droprd.toml:channels.droprd.x",
        "droprd.toml:peers.Bad",
        "environment DROPRD_NODE__NAME",
    ]


def test_a_socket_path_too_long_for_the_system_is_a_fault(tmp_path: Path) -> None:
    fault = _only_fault(_write(tmp_path, ""), {"DROPRD_CONTROL__SOCKET": "/" + "x" * 108})
    assert "at most 107 bytes" in fault


def test_tables_that_are_none_are_faults(tmp_path: Path) -> None:
    (tmp_path / "droprd.toml").write_text("node = 1\npeers = 2\nlog = []\n")
    assert _faults(str(tmp_path / "droprd.toml")) == [
        "droprd.toml:log: is no table",
        "droprd.toml:node: is no table",
        "droprd.toml:peers: is no table",
    ]


def test_the_configuration_child_emits_settings_or_faults(tmp_path: Path) -> None:
    path = _write(tmp_path, "")
    command = [sys.executable, "-m", "droprd.settings.loading", "--emit", "--config"]
    environ = {"PATH": os.environ["PATH"]}
    done = subprocess.run([*command, path], capture_output=True, check=False, env=environ)
    assert done.returncode == 0
    assert Settings.from_dict(msgpack.unpackb(done.stdout)["ok"]) == load(path, {})
    _write(tmp_path, "x = 1\n")
    done = subprocess.run([*command, path], capture_output=True, check=False, env=environ)
    assert done.returncode == 78
    assert msgpack.unpackb(done.stdout) == {
        "faults": [f"{path}:control.x: is not known; known are socket"]
    }


def test_addresses_of_a_peer_stand_in_order_without_doubles() -> None:
    peer = PeerSettings(url="https://a", urls=("https://b", "https://a"))
    assert peer.addresses == ("https://a", "https://b")
    assert PeerSettings().addresses == ()
