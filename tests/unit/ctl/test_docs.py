"""docs/droprctl.md names every command and every option there is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from droprd.ctl.main import COMMANDS, cli

PAGE = (Path(__file__).parents[3] / "docs" / "droprctl.md").read_text()


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name, (module, attribute, _) in COMMANDS.items():
        command = getattr(importlib.import_module(f"droprd.ctl.{module}"), attribute)
        if isinstance(command, click.Group):
            for below, one in command.commands.items():
                yield f"{name} {below}", one
        else:
            yield name, command


@pytest.mark.parametrize(("name", "command"), list(_commands()), ids=lambda one: str(one))
def test_every_command_is_documented_with_its_options(name: str, command: click.Command) -> None:
    start = PAGE.find(f"`{name}")
    assert start >= 0
    about = PAGE[start : start + 1400]
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "json":
            assert option.opts[0] in about, f"{name} {option.opts[0]}"


def test_the_global_options_are_documented() -> None:
    for option in cli.params:
        assert option.opts[0] in PAGE
