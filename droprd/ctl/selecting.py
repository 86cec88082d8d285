"""The options by which list, requeue and purge say which messages they mean.

Raises UsageError, InvalidName.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click

from droprd.core.filters import Box, Selection, What, compile_reason, raw_id, with_target
from droprd.ctl.session import duration
from droprd.errors import UsageError
from droprd.model import check_name, is_message_id

_F = TypeVar("_F", bound=Callable[..., Any])


def filter_options(function: _F) -> _F:
    """Add the filters that all three have."""
    for option in reversed(
        (
            click.option("--dead", is_flag=True, help="Dead letters."),
            click.option("--sent", is_flag=True, help="Those that were delivered and are kept."),
            click.option("--inbox", is_flag=True, help="Only what came from TARGET."),
            click.option("--outbox", is_flag=True, help="Only what goes to TARGET."),
            click.option("--channel", metavar="C", help="Only this channel."),
            click.option("--reason", metavar="REGEX", help="Dead letters with such a reason."),
            click.option("--older-than", callback=duration, metavar="TIME", help="Sent before."),
            click.option("--newer-than", callback=duration, metavar="TIME", help="Sent since."),
        )
    ):
        function = option(function)
    return function


def selection_of(
    target: str,
    *,
    what: What,
    inbox: bool,
    outbox: bool,
    channel: str | None,
    reason: str | None,
    older_than: float | None,
    newer_than: float | None,
    **_: Any,
) -> Selection:
    """What the options mean. A TARGET alone means what goes there, as with all commands."""
    if inbox and outbox:
        raise UsageError("--inbox and --outbox exclude each other", hint="leave both out for both")
    if reason is not None and what not in ("dead", "any"):
        raise UsageError("only dead letters have a reason", hint="add --dead")
    box: Box = "inbox" if inbox else "outbox" if outbox or (target and what != "any") else ""
    return with_target(
        Selection(
            what=what,
            box=box,
            channel="" if channel is None else check_name(channel, "channel"),
            reason=None if reason is None else compile_reason(reason),
            older_ms=None if older_than is None else round(older_than * 1000),
            newer_ms=None if newer_than is None else round(newer_than * 1000),
        ),
        target,
    )


def split_words(words: Sequence[str]) -> tuple[str, Iterator[bytes] | None]:
    """(target, ids) of the words behind a command: one TARGET, or ids, or - for ids on stdin."""
    if not words:
        return "", None
    if list(words) == ["-"]:
        return "", _ids_on_stdin()
    if all(is_message_id(word.lower()) for word in words):
        return "", map(raw_id, words)
    if len(words) > 1:
        other = next(word for word in words if not is_message_id(word.lower()))
        raise UsageError(
            f"{other!r} is no message id", hint="give one TARGET, or ids, or - to read ids"
        )
    return words[0], None


def _ids_on_stdin() -> Iterator[bytes]:
    """The first word of each line, so that plain listings can be piped in as well as ids alone."""
    for line in sys.stdin:
        word = line.split(None, 1)[0] if line.strip() else ""
        if word.startswith("{"):
            import json

            word = str(json.loads(line).get("id", ""))
        if word and word != "ID":
            yield raw_id(word)
