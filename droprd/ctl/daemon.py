"""droprctl reload, restart, stop: what concerns the daemon as a whole. Exit 3 if none runs."""

from __future__ import annotations

import os

import click

from droprd.ctl.control import Control
from droprd.ctl.session import EXIT_DONE, EXIT_PARTLY, RELOAD_TIMEOUT_S, Session, json_option

# A stop may take as long as `daemon.stop_timeout_s` (20 s by default) and a little more.
STOP_WAIT_S = 30.0


@click.command()
@json_option
@click.pass_obj
def reload(session: Session) -> None:
    """Let the daemon read its configuration again. A faulty one is reported, the old one stays."""
    with Control(session.node().socket, session.timeout_s) as control:
        answer = control.call("reload", timeout_s=session.timeout_of(RELOAD_TIMEOUT_S)) or {}
    session.result(answer, "the daemon has read its configuration")


@click.command()
@click.argument("worker", required=False)
@json_option
@click.pass_obj
def restart(session: Session, worker: str | None) -> None:
    """Replace WORKER (sender, receiver, janitor), or all of them, by new processes."""
    with Control(session.node().socket, session.timeout_s) as control:
        answer = control.call("restart", {"worker": worker} if worker else {}) or {}
    session.result(answer, f"{worker or 'all workers'}: restarting; see `droprctl status`")


@click.command()
@json_option
@click.pass_obj
def stop(session: Session) -> int:
    """Stop the daemon, and wait until it has. Exit 4 if it takes too long."""
    node = session.node()
    with Control(node.socket, session.timeout_s) as control:
        control.call("stop")
        wait_s = session.timeout_of(STOP_WAIT_S)
        gone = control.wait_closed(wait_s) and _lock_is_free(node.spool, wait_s)
    session.result(
        {"state": "stopped" if gone else "stopping"},
        "the daemon has stopped" if gone else "the daemon is stopping: see `droprctl status`",
    )
    return EXIT_DONE if gone else EXIT_PARTLY


def _lock_is_free(root: str, timeout_s: float) -> bool:
    """Whether the last process of the daemon is gone within `timeout_s`."""
    from droprd.spool.fsops import OsFs
    from droprd.spool.layout import Layout

    fs = OsFs()
    fd = fs.open(Layout(root).lock, os.O_RDONLY)
    try:
        return fs.lock(fd, timeout_s)
    finally:
        fs.close(fd)
