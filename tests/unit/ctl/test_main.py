"""Every error says what, why and what next, with a stable code and the right exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from droprd.ctl.main import COMMANDS

from .conftest import Call


def test_help_names_every_command_without_importing_them(droprctl: Call) -> None:
    shown = droprctl("--help")
    assert shown.code == 0
    assert all(f"\n  {name} " in shown.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_says_what_it_does(droprctl: Call, name: str) -> None:
    shown = droprctl(name, "--help")
    assert shown.code == 0
    assert COMMANDS[name][2].split()[0].rstrip(".,") in shown.out or shown.out.count("\n") > 5


@pytest.mark.parametrize(
    "words",
    [
        ["statsu"],
        ["status", "--jsn"],
        ["--timeout", "soon", "status"],
        ["-C", "a", "--config", "b", "status"],
        ["pause", "a/b/c/d"],
        ["pause", "a/b/x"],
        ["pause", "a/b/10"],
        ["pause", "berlin", "--receiving"],
        ["pause", "--for", "3 fortnights"],
        ["retry"],
        ["retry", "Berlin"],
        ["peer", "reset", "berlin"],
        ["peer", "reset", "berlin", "--replay", "--continue"],
        ["send", "berlin", "x", "--file", "y"],
        ["send", "berlin", "x", "--lines"],
        ["send", "berlin", "x", "--header", "novalue"],
        ["receive", "sites", "--max", "0"],
        ["send", "berlin", "--file", "-"],
        ["send", "berlin", "--file", "/", "--lines"],
        ["pause", "--for", "0"],
        ["--config", "/", "status"],
        ["-C", __file__, "status"],
    ],
)
def test_what_cannot_be_meant_is_usage(droprctl: Call, words: list[str]) -> None:
    refused = droprctl(*words)
    assert refused.code == 2
    assert refused.out == ""
    assert refused.err.startswith("droprctl: ")
    assert len(refused.err.splitlines()) == 2


@pytest.mark.parametrize("words", [[], ["peer"], ["config"]])
def test_a_command_left_out_shows_the_help(droprctl: Call, words: list[str]) -> None:
    shown = droprctl(*words)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err == droprctl(*words, "--help").out
    assert "..." not in shown.err.split("Commands:")[1]


def test_with_json_an_error_is_one_object(droprctl: Call) -> None:
    for words in (
        ["receive", "sites", "--raw", "--json"],
        ["--json", "statsu"],
        ["send", "--json"],
    ):
        refused = droprctl(*words)
        assert (refused.code, refused.error["code"], refused.out) == (2, "usage", "")


def test_a_misspelt_command_is_guessed(droprctl: Call) -> None:
    assert "did you mean 'status'?" in droprctl("statsu").err


def test_without_a_daemon_what_only_it_can_do_exits_3(node: Path, droprctl: Call) -> None:
    for words in (["retry", "berlin"], ["reload"], ["restart"], ["stop"]):
        refused = droprctl("-C", node, *words, "--json")
        assert (refused.code, refused.error["code"]) == (3, "no_daemon")
        assert refused.error["schema"] == 1
        assert refused.error["hint"]


def test_a_missing_configuration_says_where_and_what_to_do(tmp_path: Path, droprctl: Call) -> None:
    for words in (["status"], ["config", "check"], ["peer", "list"], ["pause"]):
        refused = droprctl("-C", tmp_path, *words)
        assert refused.code == 1
        assert f"{tmp_path}/droprd.toml" in refused.err
        assert "droprctl init" in refused.err


def test_a_missing_spool_and_a_strange_one_have_codes(node: Path, droprctl: Call) -> None:
    version = node / "spool" / "VERSION"
    version.write_text("droprd-spool 999\nid " + "0" * 32 + "\n")
    for words in (["status"], ["pause"], ["peer", "add", "b", "https://b.example"]):
        assert droprctl("-C", node, *words, "--json").error["code"] == "spool_version"
    version.unlink()
    for words in (["status"], ["pause"], ["peer", "add", "b", "https://b.example"]):
        assert droprctl("-C", node, *words, "--json").error["code"] == "spool_missing"
    assert list((node / "keys").iterdir()) == []


def test_config_check_tells_all_faults_at_once(node: Path, droprctl: Call) -> None:
    assert droprctl("-C", node, "config", "check").code == 0
    with (node / "droprd.toml").open("a") as file:
        file.write("[nodes]\n[daemon]\nmax_rss_mib = 1\n")
    told = droprctl("-C", node, "config", "check", "--json")
    assert (told.code, told.json["ok"], len(told.json["faults"])) == (1, False, 2)
    plain = droprctl("-C", node, "config", "check")
    assert plain.code == 1
    assert "did you mean 'node'?" in plain.err
    assert droprctl("-C", node, "config", "show", "--json").error["code"] == "config_invalid"


def test_config_show_can_be_read_back(node: Path, tmp_path: Path, droprctl: Call) -> None:
    droprctl("-C", node, "peer", "add", "a.b-c", "https://b.example")
    text = droprctl("-C", node, "config", "show").out
    shown = droprctl("-C", node, "config", "show", "--json").json
    (tmp_path / "again.toml").write_text(text)
    again = droprctl("--config", tmp_path / "again.toml", "config", "show", "--json").json
    assert {**again, "config_file": ""} == {**shown, "config_file": ""}


def test_quiet_leaves_results_and_errors(node: Path, droprctl: Call) -> None:
    assert droprctl("-q", "-C", node, "pause").err == ""
    assert droprctl("-q", "-C", node, "stop").err != ""


def test_the_common_commands_start_light() -> None:
    """No module that takes long to import, and none of the daemon's."""
    code = (
        "import sys\n"
        "from droprd.ctl import main, show, flow, daemon, send, receive\n"
        "heavy = ('aiohttp', 'pycurl', 'pydantic', 'rich', 'asyncio', 'psutil', 'droprd.angel',\n"
        "         'droprd.spool.log')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
