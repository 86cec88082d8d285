"""What all commands share: which node is meant, how long to wait, how to speak, how to end.

`Session` is made from the global options and handed to every command by click. Results go to
stdout, prose to stderr and only where nobody said -q. Commands raise DroprdError, or return their
exit code where it is not 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from droprd.errors import DroprdError, InvalidName, NotAnswering, UsageError
from droprd.model import check_name, check_priority
from droprd.settings.published import Node, find_node
from droprd.settings.units import parse_duration_s

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_DAEMON = 3
EXIT_PARTLY = 4
EXIT_INTERRUPTED = 130

TIMEOUT_S = 5.0
RELOAD_TIMEOUT_S = 45.0  # the configuration is checked by a new process
SCHEMA = 1  # of every JSON document

_F = TypeVar("_F", bound=Callable[..., Any])


def exit_code(error: DroprdError) -> int:
    """The exit code that tells of `error`."""
    if isinstance(error, NotAnswering) or error.code == "timeout":
        return EXIT_NO_DAEMON
    if isinstance(error, UsageError | InvalidName):
        return EXIT_USAGE
    return EXIT_FAILED


@dataclass
class Session:
    """One call of droprctl."""

    config_file: str | None = None
    timeout_given_s: float | None = None
    quiet: bool = False
    as_json: bool = False
    _node: Node | None = None

    @property
    def timeout_s(self) -> float:
        """How long one call of the daemon may take."""
        return TIMEOUT_S if self.timeout_given_s is None else self.timeout_given_s

    def timeout_of(self, usual_s: float) -> float:
        """The same for a call that usually may take `usual_s`, unless --timeout is given."""
        return usual_s if self.timeout_given_s is None else self.timeout_given_s

    def node(self) -> Node:
        """The node that is meant. Raises: ConfigError."""
        if self._node is None:
            self._node = find_node(self.config_file)
        return self._node

    def say(self, text: str) -> None:
        """Prose for people, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def emit(self, document: Mapping[str, Any]) -> None:
        """A JSON document, with its schema."""
        print(json.dumps({"schema": SCHEMA, **document}, ensure_ascii=False))

    def result(self, document: Mapping[str, Any], text: str) -> None:
        """What was done: the document with --json, else the prose."""
        if self.as_json:
            self.emit(document)
        else:
            self.say(text)


def _set_json(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.ensure_object(Session).as_json = True


def json_option(function: _F) -> _F:
    """Add --json, which makes results and errors JSON."""
    return click.option(
        "--json", is_flag=True, expose_value=False, callback=_set_json, help="JSON for programs."
    )(function)


def duration(_ctx: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """Callback of an option that takes a TIME: its seconds. Raises: UsageError."""
    return None if value is None else parse_duration_s(value)


def check_target(target: str) -> str:
    """Return `target` if it is PEER[/CHANNEL[/PRIORITY]]. Raises: InvalidName, UsageError."""
    parts = target.split("/")
    if len(parts) > 3:
        raise UsageError(f"{target!r} is no target", hint="write PEER[/CHANNEL[/PRIORITY]]")
    check_name(parts[0], "peer")
    if len(parts) > 1:
        check_name(parts[1], "channel")
    if len(parts) > 2:
        if not parts[2].isdecimal():
            raise UsageError(f"{parts[2]!r} is no priority", hint="priorities go from 0 to 9")
        check_priority(int(parts[2]))
    return target
