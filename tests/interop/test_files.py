"""The files an operator copies: each is read by the program it is for."""

from __future__ import annotations

import configparser
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from supervisor.options import ServerOptions

from droprd.angel.main import EXIT_CONFIG
from droprd.errors import ConfigError
from droprd.settings.loading import load
from droprd.settings.values import Settings

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "etc" / "droprd.toml"
UNITS = sorted((ROOT / "etc" / "supervisor").glob("*.conf"))
SERVICE = ROOT / "systemd" / "droprd.service"
DEFAULTS = Settings.from_dict({"node": {"name": "x"}})


def scripts() -> set[str]:
    """The programs that the package installs."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    return set(project["scripts"])


# -- droprd.toml ---------------------------------------------------------------------------------


def test_the_example_configuration_is_accepted_as_it_is() -> None:
    settings = load(str(EXAMPLE), {})
    assert settings.node.name == "hamburg"
    assert settings.node.spool == DEFAULTS.node.spool
    assert settings.control.socket == DEFAULTS.control.socket
    assert settings.peers == {}


def test_the_example_configuration_is_accepted_with_every_line_in_force(tmp_path: Path) -> None:
    lines = []
    for line in EXAMPLE.read_text().splitlines():
        uncommented = line.removeprefix("#")
        lines.append(uncommented if line[:1] == "#" and line[1:2] not in ("", " ") else line)
    (tmp_path / "droprd.toml").write_text("\n".join(lines))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "berlin.token").write_text("t" * 43)
    try:
        settings = load(str(tmp_path / "droprd.toml"), {})
    except ConfigError as error:
        pytest.fail(str(error))
    assert set(settings.peers) == {"berlin"}
    assert set(settings.channels) == {"sites"}


# -- supervisor ----------------------------------------------------------------------------------


def programs(unit: Path, tmp_path: Path) -> dict[str, Any]:
    """The programs of a unit as supervisor's own parser understands them, by name."""
    text = "\n".join(
        line for line in unit.read_text().splitlines() if not line.startswith("user=")
    ).replace("/var/log/", f"{tmp_path}/")
    (tmp_path / "conf.d").mkdir(exist_ok=True)
    (tmp_path / "conf.d" / unit.name).write_text(text)
    conf = tmp_path / "supervisord.conf"
    conf.write_text(
        f"[supervisord]\nlogfile={tmp_path}/s.log\npidfile={tmp_path}/s.pid\n"
        f"[include]\nfiles={tmp_path}/conf.d/{unit.name}\n"
    )
    options = ServerOptions()
    options.realize(["-c", str(conf)], doc="")
    return {
        process.name: process
        for group in options.process_group_configs
        for process in group.process_configs
    }


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_supervisor_understands_the_unit(unit: Path, tmp_path: Path) -> None:
    found = programs(unit, tmp_path)
    daemon = found["droprd"]
    assert shlex.split(daemon.command) == [
        "/usr/bin/droprd",
        "--config",
        "/etc/droprd/droprd.toml",
    ]
    for process in found.values():
        assert Path(shlex.split(process.command)[0]).name in scripts()
    # It stops its workers itself and needs the time for it; starting again does not mend 78.
    assert daemon.stopsignal == 15
    assert daemon.stopwaitsecs > DEFAULTS.daemon.stop_timeout_s
    assert EXIT_CONFIG in daemon.exitcodes
    assert not daemon.stopasgroup
    assert daemon.killasgroup
    assert daemon.redirect_stderr


def test_the_units_run_the_daemon_as_an_ordinary_user() -> None:
    assert UNITS
    for unit in UNITS:
        parser = configparser.RawConfigParser(inline_comment_prefixes=(";",))
        parser.read(unit)
        assert parser.sections()
        assert {parser[section]["user"] for section in parser.sections()} == {"droprd"}


# -- systemd -------------------------------------------------------------------------------------


class _Unit(configparser.RawConfigParser):
    def optionxform(self, optionstr: str) -> str:
        return optionstr


def service() -> _Unit:
    # A setting may stand several times in a unit, and adds up then (systemd.syntax(7)).
    parser = _Unit(strict=False)
    parser.read(SERVICE)
    return parser


def test_the_service_starts_the_daemon_and_believes_what_it_tells() -> None:
    unit = service()
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    about = unit["Service"]
    program, *arguments = shlex.split(about["ExecStart"])
    assert program == "/usr/bin/droprd"
    assert Path(program).name in scripts()
    assert arguments == ["--config", "/etc/droprd/droprd.toml"]
    assert (about["Type"], about["NotifyAccess"]) == ("notify", "main")
    assert int(about["WatchdogSec"]) > 0
    assert about["ExecReload"].endswith("-HUP $MAINPID")
    assert unit["Install"]["WantedBy"] == "multi-user.target"


def test_the_service_leaves_time_to_stop_and_does_not_repeat_what_cannot_help() -> None:
    about = service()["Service"]
    assert int(about["TimeoutStopSec"]) > DEFAULTS.daemon.stop_timeout_s
    assert about["KillMode"] == "mixed"  # SIGTERM to the angel alone: it stops its workers
    assert about["Restart"] == "on-failure"
    assert int(about["RestartPreventExitStatus"]) == EXIT_CONFIG


def test_the_service_may_write_its_spool_and_nothing_else() -> None:
    unit = service()
    about = unit["Service"]
    assert about["User"] == "droprd"
    assert set(about["SupplementaryGroups"].split()) == {
        "droprd-send",
        "droprd-receive",
        "droprd-monitor",
    }
    assert about["ProtectSystem"] == "strict"
    assert about["ReadWritePaths"] == DEFAULTS.node.spool
    assert unit["Unit"]["RequiresMountsFor"] == DEFAULTS.node.spool
    assert Path(DEFAULTS.control.socket).parent == Path("/run") / about["RuntimeDirectory"]
    assert about["NoNewPrivileges"] == "true"
