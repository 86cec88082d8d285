"""droprctl list, cat, trace: single messages, wherever they are, by the spool's own files.

All three work with the daemon or without it, and stream: the first lines of a long list come at
once, and nothing is held in memory. They need the rights to read the spool: those of its owner, or
root's.
"""

from __future__ import annotations

import base64
import datetime
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from droprd.core.filters import Selection, raw_id, text_id
from droprd.ctl.drawing import printable
from droprd.ctl.selecting import filter_options, selection_of
from droprd.ctl.session import SCHEMA, Session, json_option
from droprd.errors import DroprdError, NotPermitted, SpoolCorrupt, UsageError
from droprd.settings.units import format_bytes, format_duration

if TYPE_CHECKING:
    from droprd.spool.handle import Spool
    from droprd.spool.lookup import Hit, OutboxView

_LINE = "{:36}  {:6}  {:8}  {:>10}  {:>8}  {:>8}  {}"


class Views:
    """The spool of a node, opened for reading."""

    def __init__(self, session: Session) -> None:
        from droprd.ctl.outboxfiles import read_outbox_state
        from droprd.spool.clock import SystemClock
        from droprd.spool.fsops import OsFs
        from droprd.spool.handle import Spool
        from droprd.spool.inboxlookup import InboxView
        from droprd.spool.layout import Layout, read_version
        from droprd.spool.lookup import OutboxView

        root = session.node().spool
        fs = OsFs()
        facts = read_version(fs, root)
        self.spool: Spool = Spool(fs, SystemClock(), os.urandom, Layout(root), facts.spool_id)
        try:
            self.state = read_outbox_state(fs, self.spool.layout)
        except PermissionError as error:
            raise NotPermitted(
                "this user may not read single messages",
                why=f"{error.filename or root}: {error.strerror}",
                hint="run this as the owner of the spool or as root",
            ) from error
        self.outbox: OutboxView = OutboxView(self.spool, self.state)
        self.inbox = InboxView(self.spool)

    def hits(self, selection: Selection) -> Iterator[Hit]:
        """What is meant, in order: of the outbox first."""
        if selection.wants("dead", "outbox"):
            yield from self.outbox.dead(selection)
        if selection.wants("waiting", "outbox"):
            yield from self.outbox.waiting(selection)
        if selection.wants("sent", "outbox"):
            yield from self.outbox.sent(selection)
        if selection.what == "any" and selection.box != "inbox":
            yield from self.outbox.ended(selection)
        if selection.wants("dead", "inbox"):
            yield from self.inbox.dead(selection)
        if selection.wants("waiting", "inbox"):
            yield from self.inbox.waiting(selection)


@click.command(name="list", short_help="List messages that wait, or dead letters.")
@click.argument("target", required=False, default="")
@filter_options
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many.")
@json_option
@click.pass_obj
def list_messages(
    session: Session, /, target: str, dead: bool, sent: bool, limit: int | None, **filters: Any
) -> None:
    """List the messages that wait here, oldest first; of TARGET only those that go there.

    The first word of each line is the id: pipe it into `droprctl requeue -` or `purge -`.

    \b
    droprctl list --dead
    droprctl list --dead --reason max_attempts | droprctl requeue -
    droprctl list berlin/sites --older-than 2h --limit 20
    """
    if dead and sent:
        raise UsageError("--dead and --sent exclude each other", hint="give one of them")
    selection = selection_of(
        target, what="dead" if dead else "sent" if sent else "waiting", **filters
    )
    if not session.as_json and sys.stdout.isatty():
        print(_LINE.format("ID", "BOX", "STATE", "SIZE", "AGE", "ATTEMPTS", "LANE, REASON"))
    views = Views(session)
    rows = (one for hit in views.hits(selection) for one in _rows(views.spool, hit))
    for row in itertools.islice(rows, limit):
        if session.as_json:
            session.emit(row)
            continue
        about = f"{row['peer']}/{row['channel']}/{row['priority']}"
        reason = f"  {printable(row['reason'])}" if row["reason"] else ""
        print(
            _LINE.format(
                row["id"],
                row["box"],
                row["state"],
                format_bytes(row["size"]),
                format_duration(row["age_s"]),
                "-" if row["attempts"] is None else row["attempts"],
                about + reason,
            )
        )


def _rows(spool: Spool, hit: Hit) -> Iterator[dict[str, Any]]:
    from droprd.spool.outgoing import elapsed_ms

    info = hit.frame.info
    age_s = round(elapsed_ms(spool.clock, info) / 1000, 3)
    for index, raw in sorted(hit.chosen.items()):
        yield {
            "id": text_id(raw),
            "box": hit.box,
            "state": hit.state,
            "peer": hit.lane.peer,
            "channel": hit.lane.channel,
            "priority": hit.lane.priority,
            "size": info.bodies_bytes if info.is_blob else hit.frame.lengths[index],
            "age_s": age_s,
            "created": _time(info.wall_ns),
            "attempts": hit.attempts.get(index) if hit.box == "inbox" else None,
            "reason": hit.reasons.get(index) or None,
        }


def _time(wall_ns: int) -> str:
    when = datetime.datetime.fromtimestamp(wall_ns / 1e9, datetime.UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _no_such(message_id: str) -> DroprdError:
    return DroprdError(
        f"there is no message {message_id} here",
        why="it never was, or it was delivered and is no longer kept",
        hint="see `droprctl list`, and the other node",
        code="no_such_id",
    )


@click.command(short_help="Write the body of a message.")
@click.argument("message_id", metavar="ID")
@json_option
@click.pass_obj
def cat(session: Session, message_id: str) -> None:
    """Write the body of the message ID to stdout, wherever it is; with --json, all there is of it.

    \b
    droprctl cat 0199c5d2-5cb4-7bd1-a5d0-7a6a1e2c0000 > body
    """
    raw = raw_id(message_id)
    views = Views(session)
    is_there = False
    for hit in views.hits(Selection(ids=frozenset((raw,)))):
        is_there = True
        for index in hit.chosen:
            path = _body_file(views.spool, hit, index)
            if path is not None:
                _write(session, views.spool, hit, index, path)
                return
    if not is_there:
        raise _no_such(message_id)
    raise SpoolCorrupt(
        f"the body of {message_id} is gone",
        why="it was purged, or its bytes could not be read",
        hint=f"see `droprctl trace {message_id}`",
    )


def _body_file(spool: Spool, hit: Hit, index: int) -> str | None:
    """The file that holds a body, "" if its frame does, None if nothing does."""
    frame = hit.frame
    if index in frame.voids or index in frame.bad_bodies():
        return None
    if not frame.info.is_blob:
        return ""
    layout, name = spool.layout, frame.frame_id
    if hit.box == "inbox":
        path = layout.inbox_blob(hit.lane.peer, name)
    elif hit.path.startswith("outbox/journals/"):
        path = layout.journal_blob(os.path.basename(hit.path), name)
    else:
        from droprd.spool.blobs import merged_blob

        path = merged_blob(spool.fs, layout, name) or layout.outbox_blob(name)
    found = spool.fs.stat(path)
    return path if found is not None and found.size == frame.info.bodies_bytes else None


def _write(session: Session, spool: Spool, hit: Hit, index: int, path: str) -> None:
    out = sys.stdout.buffer
    if not session.as_json:
        if path:
            with open(path, "rb") as body:
                shutil.copyfileobj(body, out, 1 << 18)
        else:
            out.write(hit.frame.body(index))
        out.flush()
        return
    only = {index: hit.chosen[index]}
    hit.chosen = only
    document = next(_rows(spool, hit))
    values = {**hit.frame.shared, **hit.frame.singles.get(index, {})}
    document["headers"] = dict(values.get("h", {}))
    if "t" in values:
        document["content_type"] = values["t"]
    if path:
        with open(path, "rb") as file:
            data = file.read()
    else:
        data = bytes(hit.frame.body(index))
    try:
        document["body"] = data.decode()
    except UnicodeDecodeError:
        document["body_base64"] = base64.b64encode(data).decode()
    print(json.dumps({"schema": SCHEMA, **document}, ensure_ascii=False, default=str))


@click.command(short_help="Tell where a message is, and every step it took.")
@click.argument("message_id", metavar="ID")
@json_option
@click.pass_obj
def trace(session: Session, message_id: str) -> None:
    """Tell every step that the message ID took on this node, as far as it is still known.

    A message that was requeued is found in each place where it is.
    """
    document = trace_document(session, message_id)
    if session.as_json:
        session.emit(document)
        return
    for step in document["steps"]:
        when = step["at"] or "-"
        print(f"{when:24}  {step['step']:10}  {printable(step['text'])}")


def trace_document(session: Session, message_id: str) -> dict[str, Any]:
    """The steps of a message. Raises: DroprdError if it is not here."""
    raw = raw_id(message_id)
    views = Views(session)
    steps: list[dict[str, Any]] = []
    found: list[tuple[int, Hit, int]] = []
    for hit in views.hits(Selection(ids=frozenset((raw,)))):
        for index in hit.chosen:
            steps += _steps(hit, index)
            found.append((_RANKS.get(hit.state, len(_RANKS)), hit, index))
    if not steps:
        raise _no_such(message_id)
    steps.sort(key=lambda step: step["at"] or "~")
    # Of several places, the one that something may still come of.
    _, hit, index = min(found, key=lambda one: one[0])
    return {
        "id": message_id.lower(),
        "state": hit.state,
        "lane": f"{hit.lane}",
        "reason": hit.reasons.get(index) or None,
        "steps": steps,
    }


_RANKS = {
    state: rank
    for rank, state in enumerate(("leased", "ready", "delayed", "waiting", "dead", "sent"))
}
_TEXTS = {
    "waiting": "waits for {lane}",
    "sent": "was delivered to {lane}, and is kept",
    "dead": "is a dead letter: {reason}",
    "ready": "waits for a consumer, after {attempts} attempts",
    "delayed": "waits for its time, after {attempts} attempts",
    "leased": "a consumer holds it, attempt {attempts}",
    "purged": "was purged by an operator",
    "expired": "its time to live ended",
    "requeued": "was a dead letter, and was requeued",
}


def _steps(hit: Hit, index: int) -> list[dict[str, Any]]:
    info = hit.frame.info
    came = "handed over for" if hit.box == "outbox" else "sent by"
    text = _TEXTS.get(hit.state, "ended: {reason}").format(
        lane=hit.lane, reason=hit.reasons.get(index, ""), attempts=hit.attempts.get(index, 0)
    )
    return [
        {
            "at": _time(info.wall_ns),
            "step": "sent",
            "box": hit.box,
            "path": hit.path,
            "text": f"{came} {hit.lane}",
        },
        {
            "at": None,
            "step": "delivered" if hit.state == "sent" else hit.state,
            "box": hit.box,
            "path": hit.path,
            "text": f"{text}; in {hit.path}",
        },
    ]
