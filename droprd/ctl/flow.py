"""droprctl retry, pause, resume, drain: steering what flows.

A pause is a fact on disk with who, why and until when: without a daemon it is written here, under
the daemon's lock, and the next daemon finds it. A drain is one too; it refuses new messages and
waits for the old ones to be delivered; it never deletes.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from droprd.ctl.control import Control
from droprd.ctl.session import (
    EXIT_DONE,
    EXIT_NO_DAEMON,
    EXIT_PARTLY,
    Session,
    check_target,
    duration,
    json_option,
)
from droprd.errors import NotAnswering, SpoolNotReady, UsageError
from droprd.model import check_name
from droprd.settings.units import format_duration

if TYPE_CHECKING:
    from droprd.spool.state import Pause, Wishes

CHANGE_TIMEOUT_S = 16.0  # a drain waits for the calls of send() that are under way
DRAIN_LOOK_INTERVAL_S = 0.2


def _who() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid {os.getuid()}"


def _named(target: str) -> str:
    return target or "the whole node"


def _change(
    session: Session,
    method: str,
    params: Mapping[str, Any],
    offline: Callable[[Wishes], Wishes],
) -> bool:
    """Have the daemon do it, or do it to the files. Whether a daemon runs."""
    node = session.node()
    try:
        with Control(node.socket, session.timeout_s) as control:
            control.call(method, params, session.timeout_of(CHANGE_TIMEOUT_S))
            return True
    except NotAnswering as error:
        if error.code != "no_daemon":
            raise
    # Imported only when needed: what reads a spool takes as long to load as all the rest.
    from droprd.ctl.offline import change_wishes

    change_wishes(node.spool, session.timeout_s, offline)
    return False


def _warn_of_strangers(session: Session, target: str) -> None:
    """Say so if a target's peer is not known: most likely it is a slip of the pen."""
    from droprd.settings.published import Published
    from droprd.spool.layout import Layout

    peer = target.partition("/")[0]
    with contextlib.suppress(SpoolNotReady):  # it is not for this user to read
        public = Published(Layout(session.node().spool).public).get()
        if peer and peer not in public.peers and peer != public.node:
            known = [name for name, one in public.peers.items() if not one.unconfigured]
            session.say(
                f"warning: no peer {peer!r} is configured; "
                + (f"configured are {', '.join(known)}" if known else "none is")
            )


@click.command()
@click.argument("peer")
@json_option
@click.pass_obj
def retry(session: Session, peer: str) -> None:
    """Try PEER now, whatever its backoff says."""
    check_name(peer, "peer")
    with Control(session.node().socket, session.timeout_s) as control:
        control.call("retry", {"peer": peer})
    session.result({"peer": peer}, f"trying {peer}; see `droprctl why {peer}`")


def _pause_now(for_s: float | None, reason: str, receiving: bool) -> Pause:
    from droprd.spool.clock import SystemClock
    from droprd.spool.state import Pause

    clock = SystemClock()
    lasting_ns = None if for_s is None else round(for_s * 1e9)
    now_ns = clock.wall_ns()
    return Pause(
        who=_who(),
        reason=reason,
        receiving=receiving,
        since_wall_ns=now_ns,
        until_wall_ns=None if lasting_ns is None else now_ns + lasting_ns,
        until_boot_ns=None if lasting_ns is None else clock.boot_ns() + lasting_ns,
        boot=clock.boot_id(),
    )


@click.command()
@click.argument("target", required=False, default="")
@click.option("--for", "for_s", callback=duration, metavar="TIME", help="Resume by itself then.")
@click.option("--reason", default="", help="Why, for those who look later.")
@click.option("--receiving", is_flag=True, help="The node alone: receive nothing either.")
@json_option
@click.pass_obj
def pause(session: Session, target: str, for_s: float | None, reason: str, receiving: bool) -> None:
    """Stop sending to TARGET, or anywhere. New messages are accepted and wait."""
    if target:
        check_target(target)
        if receiving:
            raise click.UsageError("--receiving is for the whole node: give no TARGET")
    if for_s == 0:
        raise UsageError(
            "a pause for 0 s is none", hint="give --for a longer TIME, or leave it out"
        )
    running = _change(
        session,
        "pause",
        {"target": target, "reason": reason, "for_s": for_s, "receiving": receiving},
        lambda wishes: wishes.with_pause(target, _pause_now(for_s, reason, receiving)),
    )
    _warn_of_strangers(session, target)
    lasting = f" for {format_duration(for_s)}" if for_s is not None else ""
    both = " (receiving too)" if receiving else ""
    session.result(
        {"target": target, "for_s": for_s, "running": running},
        f"{_named(target)} paused{both}{lasting}; lift it: droprctl resume {target}".rstrip(),
    )


@click.command()
@click.argument("target", required=False, default="")
@json_option
@click.pass_obj
def resume(session: Session, target: str) -> None:
    """Lift pauses and drains of TARGET and below, or all of them."""
    if target:
        check_target(target)
    running = _change(session, "resume", {"target": target}, lambda wishes: wishes.resumed(target))
    session.result({"target": target, "running": running}, f"{_named(target)} goes on")


def _left(session: Session, target: str, *, running: bool) -> int:
    """How many messages of a target are not delivered yet; what is not merged counts as one.

    From the files where this user may read them: what the sender told may be a second old.
    """
    from droprd.ctl.offline import stopped_status
    from droprd.ctl.outboxfiles import read_waiting
    from droprd.spool.fsops import OsFs
    from droprd.spool.layout import Layout

    node = session.node()
    waiting = read_waiting(OsFs(), Layout(node.spool))
    if waiting is not None:
        return waiting.below(target) or (1 if waiting.unmerged_bytes else 0)
    if running:
        with Control(node.socket, session.timeout_s) as control:
            status = control.call("status")
    else:
        status = stopped_status(node, "")
    peer = target.partition("/")[0]
    queued = sum(one["queued"] for name, one in status["peers"].items() if peer in ("", name))
    return queued or (1 if status["unmerged_bytes"] else 0)


@click.command()
@click.argument("target", required=False, default="")
@json_option
@click.pass_obj
def drain(session: Session, target: str) -> int:
    """Refuse new messages to TARGET and wait until the old ones are delivered.

    Exit 0 when empty, 4 when --timeout ends first, 3 without a daemon unless all is empty. It
    stays in force until `droprctl resume`.
    """
    if target:
        check_target(target)
    running = _change(
        session, "drain", {"target": target}, lambda wishes: wishes.with_drain(target, _who())
    )
    _warn_of_strangers(session, target)
    deadline = time.monotonic() + session.timeout_s
    while True:
        left = _left(session, target, running=running)
        if not left or not running or time.monotonic() >= deadline:
            break
        time.sleep(DRAIN_LOOK_INTERVAL_S)
    text = f"{_named(target)} is empty and stays closed; lift it: droprctl resume {target}".rstrip()
    if left:
        text = f"{_named(target)}: at least {left} left; new messages are refused"
        text += "" if running else "; no daemon runs to deliver what is left"
    session.result({"target": target, "left": left, "running": running}, text)
    if not left:
        return EXIT_DONE
    return EXIT_PARTLY if running else EXIT_NO_DAEMON
