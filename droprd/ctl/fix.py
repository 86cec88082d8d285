"""droprctl requeue, purge: send messages again, or delete them, by target, ids or filters.

The daemon does it, a slice a call, so that nothing else has to wait; without one, droprctl takes
the daemon's lock and does it itself. Ids go in batches, in the order in which they are given;
within a batch, messages keep the order in which they were sent.

An interrupt between two slices leaves the rest as it was.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from droprd.core.filters import IDS_A_CALL, Selection, text_id
from droprd.core.fixed import Fixed
from droprd.ctl.control import Control
from droprd.ctl.selecting import filter_options, selection_of, split_words
from droprd.ctl.session import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PARTLY,
    Session,
    check_target,
    json_option,
)
from droprd.errors import NotAnswering, UsageError
from droprd.settings.units import format_bytes

SLICE_TIMEOUT_S = 30.0
MISSING_SHOWN = 20

# Who does what: (worker, boxes of a selection that concern it).
_WORKERS = {
    "requeue": (("sender", "outbox"), ("janitor", "inbox"), ("receiver", "inbox")),
    "purge": (("sender", "outbox"), ("janitor", "inbox")),
}


@click.command(short_help="Send dead letters, or sent messages, again.")
@click.argument("words", nargs=-1, metavar="[TARGET | ID... | -]")
@filter_options
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@json_option
@click.pass_obj
def requeue(
    session: Session, /, words: Sequence[str], dead: bool, sent: bool, dry_run: bool, **filters: Any
) -> int:
    """Put dead letters (or with --sent, delivered messages that are kept) at the tail once more.

    They keep their ids and their order; a consumer may see them again. Dead letters of the inbox
    are leased afresh.

    \b
    droprctl requeue berlin --dead
    droprctl list --dead --reason max_attempts | droprctl requeue -
    droprctl requeue berlin/sites --sent --newer-than 2h
    """
    if dead and sent:
        raise UsageError("--dead and --sent exclude each other", hint="give one of them")
    target, ids = split_words(words)
    what = "sent" if sent else "dead" if dead or ids is None else "any"
    _want_something(words, dead or sent, filters)
    selection = selection_of(target, what=what, **filters)  # type: ignore[arg-type]
    fixed, running = _do(session, "requeue", selection, ids, dry_run)
    return _tell(session, "requeued", fixed, running, dry_run)


@click.command(short_help="Delete messages.")
@click.argument("words", nargs=-1, metavar="[TARGET | ID... | -]")
@filter_options
@click.option("--dry-run", is_flag=True, help="Only say how many it would be.")
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@json_option
@click.pass_obj
def purge(
    session: Session,
    /,
    words: Sequence[str],
    dead: bool,
    sent: bool,
    dry_run: bool,
    yes: bool,
    **filters: Any,
) -> int:
    """Delete messages that wait for TARGET (with --dead, dead letters), and say how many.

    What may have reached the peer already is settled by its answer: it cannot be taken back.
    Messages that a consumer holds are left alone. With ids, waiting ones and dead letters go.

    \b
    droprctl purge berlin/sites --older-than 7d --dry-run
    droprctl purge --dead --reason "no such site" --yes
    droprctl list --inbox --channel sites | droprctl purge - --yes
    """
    if dead and sent:
        raise UsageError("--dead and --sent exclude each other", hint="give one of them")
    target, ids = split_words(words)
    what = "dead" if dead else "sent" if sent else "waiting" if ids is None else "any"
    _want_something(words, dead or sent, filters)
    if what == "waiting" and not target and not filters["inbox"]:
        filters["outbox"] = True  # what came from others goes only if that is said
    selection = selection_of(target, what=what, **filters)  # type: ignore[arg-type]
    if not yes and not dry_run:
        if not sys.stdin.isatty():
            raise UsageError(
                "purge deletes messages, and there is no terminal to ask on",
                hint="add --yes, or --dry-run to see how many it would be",
            )
        listed = None if ids is None else list(ids)
        found, _ = _do(session, "purge", selection, None if listed is None else iter(listed), True)
        if found.messages and not click.confirm(
            f"Delete {found.messages} messages ({format_bytes(found.size)})?", err=True
        ):
            return EXIT_FAILED
        ids = None if listed is None else iter(listed)
    fixed, running = _do(session, "purge", selection, ids, dry_run)
    return _tell(session, "purged", fixed, running, dry_run)


def _want_something(words: Sequence[str], kind: bool, filters: dict[str, Any]) -> None:
    if not words and not kind and not any(value not in (None, False) for value in filters.values()):
        raise UsageError(
            "nothing says which messages are meant",
            hint="give a TARGET, ids, - to read ids from stdin, or a filter such as --dead",
        )
    if len(words) == 1 and words[0] != "-" and "/" in words[0]:
        check_target(words[0])


class _Outcome(Fixed):
    """What was done, and which of the ids asked for were met nowhere."""

    missing: list[bytes]


def _do(
    session: Session, verb: str, selection: Selection, ids: Iterator[bytes] | None, dry: bool
) -> tuple[_Outcome, bool]:
    """Have it done; what was, and whether a daemon runs."""
    total = _Outcome()
    total.missing = []
    node = session.node()
    try:
        with Control(node.socket, session.timeout_s) as control:
            for one in _batches(selection, ids):
                found: set[bytes] = set()
                for worker, box in _WORKERS[verb]:
                    if one.box in ("", box):
                        found |= _ask(session, control, worker, verb, one, dry, total)
                total.missing += _unmet(one, found)
        return total, True
    except NotAnswering as error:
        if error.code != "no_daemon" or total.messages:
            raise
    from droprd.ctl.fixoffline import Offline
    from droprd.ctl.offline import as_daemon

    with as_daemon(node.spool, session.timeout_s) as layout, Offline(layout, os.urandom) as daemon:
        for one in _batches(selection, ids):
            fixed = daemon.fix(verb, one, dry)
            total.add(fixed.as_map())
            total.missing += _unmet(one, fixed.found)
    return total, False


def _batches(selection: Selection, ids: Iterator[bytes] | None) -> Iterator[Selection]:
    if ids is None:
        yield selection
        return
    while batch := list(itertools.islice(ids, IDS_A_CALL)):
        yield selection.with_ids(batch)


def _unmet(selection: Selection, found: set[bytes]) -> list[bytes]:
    return [] if selection.ids is None else sorted(selection.ids - found)


def _ask(
    session: Session,
    control: Control,
    worker: str,
    verb: str,
    selection: Selection,
    dry: bool,
    total: Fixed,
) -> set[bytes]:
    """One job of one worker to its end; the ids it met."""
    job = None
    params: dict[str, Any] = {"selection": selection.as_map(), "dry": dry}
    timeout_s = session.timeout_of(SLICE_TIMEOUT_S)
    while True:
        answer = control.call("fix", {"worker": worker, "verb": verb, **params}, timeout_s)
        job = answer["job"]
        if job is None:
            total.add(answer)
            return {bytes(one) for one in answer["found"]}
        params = {"job": job, "dry": dry}
        if sys.stderr.isatty() and not session.quiet:
            print(f"\r{total.messages + answer['messages']} messages", end="\r", file=sys.stderr)


def _tell(session: Session, done: str, fixed: _Outcome, running: bool, dry: bool) -> int:
    missing = [text_id(one) for one in fixed.missing]
    skipped = {why: count for why, count in fixed.skipped.items() if count}
    if dry:
        done = f"would be {done}"
    session.result(
        {
            "messages": fixed.messages,
            "bytes": fixed.size,
            "skipped": skipped,
            "missing": missing,
            "dry_run": dry,
            "running": running,
        },
        f"{fixed.messages} messages ({format_bytes(fixed.size)}) {done}",
    )
    where = (
        "among the dead letters and kept messages"
        if done.endswith("requeued")
        else "among the dead letters and messages that wait"
    )
    if not session.as_json:
        for why, count in skipped.items():
            session.say(f"{count} were left: {why}")
        for one in missing[:MISSING_SHOWN]:
            session.say(f"not {where}: {one}; see: droprctl why {one}")
        if len(missing) > MISSING_SHOWN:
            session.say(f"nor are {len(missing) - MISSING_SHOWN} others")
    if not missing:
        return EXIT_DONE
    return EXIT_PARTLY if fixed.messages else EXIT_FAILED
