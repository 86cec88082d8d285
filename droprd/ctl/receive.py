"""droprctl receive: take messages out of a channel, for shells and for looking.

Works with the daemon stopped. A message is acknowledged after it has been written and flushed, one
by one: whoever is killed in between gets it again. What was taken and not written (an interrupt, a
pipe that was closed) goes back. `--peek` leases and counts nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import click

from droprd.ctl.drawing import printable
from droprd.ctl.session import SCHEMA, Session, duration, json_option
from droprd.errors import LeaseLost, UsageError
from droprd.model import check_name

if TYPE_CHECKING:
    from droprd.client.message import Message

BATCH_MAX = 100


def as_document(message: Message) -> dict[str, Any]:
    """A message as JSON: `body` is text, or `body_base64` where it is no UTF-8."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "id": message.id,
        "sender": message.sender,
        "channel": message.channel,
        "priority": message.priority,
        "attempt": message.attempt,
        "created": message.created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "headers": dict(message.headers),
    }
    if message.content_type is not None:
        document["content_type"] = message.content_type
    body = message.body
    try:
        document["body"] = body.decode()
    except UnicodeDecodeError:
        document["body_base64"] = base64.b64encode(body).decode()
    return document


def _write(message: Message, *, as_json: bool, raw: bool) -> None:
    out = sys.stdout.buffer
    if as_json:
        # Headers are of any type msgpack has; what JSON has no form for is shown as text.
        text = json.dumps(as_document(message), ensure_ascii=False, default=str)
        out.write(text.encode(errors="replace") + b"\n")
    elif raw or not sys.stdout.isatty():
        with message.open() as body:
            shutil.copyfileobj(body, out, 1 << 18)
        if not raw:
            out.write(b"\n")
    else:
        text = message.body.decode(errors="backslashreplace")
        out.write("\n".join(printable(line) for line in text.split("\n")).encode() + b"\n")
    out.flush()


@click.command()
@click.argument("channel")
@click.option("--max", "count_max", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--wait", "wait_s", callback=duration, metavar="TIME", help="For each message. [0]")
@click.option("--raw", is_flag=True, help="The bodies alone, with nothing between them.")
@click.option("--peek", is_flag=True, help="Only look: nothing is leased, counted or acked.")
@json_option
@click.pass_obj
def receive(
    session: Session, channel: str, count_max: int, wait_s: float | None, raw: bool, peek: bool
) -> None:
    """Take messages out of CHANNEL: one, or up to --max. Exit 0 also if there is none."""
    check_name(channel, "channel")
    if raw and session.as_json:
        raise UsageError("--raw and --json are two forms of the same", hint="give one of them")

    from droprd.client.inbox import Inbox
    from droprd.ctl.owner import never_as_root

    node = session.node()
    with never_as_root(node.spool), Inbox(config=node.config_file) as inbox:
        if peek:
            for message in inbox.peek(channel, max_messages=count_max):
                _write(message, as_json=session.as_json, raw=raw)
            return
        left = count_max
        while left:
            batch = inbox.receive(channel, wait_s=wait_s or 0, max_messages=min(left, BATCH_MAX))
            if not batch:
                return
            done = 0
            try:
                for message in batch:
                    _write(message, as_json=session.as_json, raw=raw)
                    message.ack()
                    done += 1
            finally:
                for message in batch[done:]:
                    with contextlib.suppress(LeaseLost):  # then it went back by itself
                        message.nack()
            left -= len(batch)
