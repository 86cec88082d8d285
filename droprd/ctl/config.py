"""droprctl config: whether the configuration can be used, and what it comes to."""

from __future__ import annotations

from typing import Any

import click

from droprd.ctl.files import toml_table
from droprd.ctl.session import EXIT_FAILED, Session, json_option
from droprd.errors import ConfigError
from droprd.settings.published import find_config
from droprd.settings.values import Settings


@click.group()
def config() -> None:
    """Check and show the configuration."""


def _load(session: Session) -> Settings:
    from droprd.settings.loading import load  # pydantic: 0.2 s

    return load(find_config(session.config_file))


@config.command(short_help="Check the configuration: all faults at once.")
@json_option
@click.pass_obj
def check(session: Session) -> int:
    """Check the configuration: all faults at once, exit 1 if there is one."""
    if not session.as_json:
        settings = _load(session)
        session.say(f"{settings.config_file}: ok, node {settings.node.name}")
        return 0
    try:
        settings = _load(session)
    except ConfigError as error:
        session.emit({"ok": False, "code": error.code, "faults": list(error.faults)})
        return EXIT_FAILED
    session.emit({"ok": True, "config_file": settings.config_file, "faults": []})
    return 0


@config.command(short_help="Show all settings in force.")
@json_option
@click.pass_obj
def show(session: Session) -> None:
    """Show all settings in force: files, environment and defaults together."""
    values: dict[str, Any] = _load(session).to_dict()
    if session.as_json:
        session.emit(values)
        return
    print(f"# {values.pop('config_file')}, peers.d, environment and defaults")
    for section, table in values.items():
        if section in ("peers", "channels"):
            for name, one in table.items():
                print("\n" + toml_table(f"{section}/{name}", one), end="")
        else:
            print("\n" + toml_table(section, table), end="")
