"""droprctl send: hand over messages from the command line, a file, or stdin.

Works with the daemon stopped, as all of the outbox does. Prints the id of each message, one a line,
once it is on disk. With --lines each line is a message; lines that are there at the same time share
one sync, and none waits for the next.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from droprd.ctl.session import Session, duration, json_option
from droprd.errors import MessageTooLarge, UsageError
from droprd.model import CHANNEL_DEFAULT, PRIORITY_DEFAULT

READ_BYTES = 1 << 18
LINE_BYTES_MAX = 1 << 30


def _headers(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> Any:
    headers = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise UsageError(f"{one!r} is no header", hint="write --header KEY=VALUE")
        headers[key] = value
    return headers or None


def read_lines(fd: int) -> Iterator[list[bytes]]:
    """The lines of a descriptor without their ends, in lists of those that came together.

    Raises: MessageTooLarge for a line over LINE_BYTES_MAX.
    """
    parts: list[bytes] = []
    size = 0
    while data := os.read(fd, READ_BYTES):
        first, *others = data.split(b"\n")
        parts.append(first)
        size += len(first)
        if size > LINE_BYTES_MAX:
            raise MessageTooLarge(
                "a line is too long",
                why=f"it has more than {LINE_BYTES_MAX} bytes",
                hint="lines before it were sent; send this one with --file, without --lines",
            )
        if others:
            yield [b"".join(parts), *others[:-1]]
            parts = [others[-1]]
            size = len(others[-1])
    if size:
        yield [b"".join(parts)]


def _read_all(fd: int) -> bytes:
    parts = []
    while data := os.read(fd, READ_BYTES):
        parts.append(data)
    return b"".join(parts)


@click.command()
@click.argument("peer")
@click.argument("body", required=False)
@click.option("--channel", default=CHANNEL_DEFAULT, show_default=True)
@click.option("--priority", type=int, default=PRIORITY_DEFAULT, show_default=True, help="0 to 9.")
@click.option("--ttl", "ttl_s", callback=duration, metavar="TIME", help="Expire after it.")
@click.option("--delay", "delay_s", callback=duration, metavar="TIME", help="Not before.")
@click.option("--header", "headers", multiple=True, callback=_headers, metavar="KEY=VALUE")
@click.option("--content-type", help="What the body is.")
@click.option("--file", "path", metavar="PATH", help="The content of this file, of any size.")
@click.option("--lines", is_flag=True, help="Each line of stdin, or of --file, is a message.")
@json_option
@click.pass_obj
def send(
    session: Session,
    peer: str,
    body: str | None,
    channel: str,
    priority: int,
    ttl_s: float | None,
    delay_s: float | None,
    headers: dict[str, str] | None,
    content_type: str | None,
    path: str | None,
    lines: bool,
) -> None:
    """Hand over a message for PEER: BODY, a file, or stdin (BODY left out, or -)."""
    if path is not None and body is not None:
        raise click.UsageError("BODY and --file are both a message; give one of them")
    if lines and body not in (None, "-"):
        raise click.UsageError("--lines reads stdin or --file, not BODY")
    if path == "-":
        raise click.UsageError("--file takes a file; to read stdin leave it out")
    if path is not None and os.path.isdir(path):
        raise click.UsageError(f"--file takes a file, {path} is a directory")
    if body is None and path is None and sys.stdin.isatty():
        raise click.UsageError("nothing to send: give BODY, --file, or - to type it")

    from droprd.client.outbox import Outbox
    from droprd.ctl.owner import never_as_root

    how: dict[str, Any] = {
        "to": peer,
        "channel": channel,
        "priority": priority,
        "ttl_s": ttl_s,
        "delay_s": delay_s,
        "headers": headers,
        "content_type": content_type,
    }
    node = session.node()
    with never_as_root(node.spool), Outbox(config=node.config_file) as outbox:
        if lines:
            fd = sys.stdin.fileno() if path is None else os.open(path, os.O_RDONLY)
            for group in read_lines(fd):
                _print_ids(session, outbox.send_many(group, **how))
        elif path is not None:
            _print_ids(session, [outbox.send_file(path, **how)])
        elif body is not None and body != "-":
            _print_ids(session, [outbox.send(os.fsencode(body), **how)])
        else:
            _print_ids(session, [outbox.send(_read_all(sys.stdin.fileno()), **how)])


def _print_ids(session: Session, ids: list[str]) -> None:
    if session.as_json:
        for one in ids:
            session.emit({"id": one})
    elif ids:
        print("\n".join(ids))
    sys.stdout.flush()
