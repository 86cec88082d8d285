"""droprctl status, why, health: what the node does, why it does not, and whether it is well.

All three ask the daemon, which answers from what its workers told it, without walking the spool.
Without a daemon they say what the files say, with "state": "stopped", and exit 3.
"""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from droprd.ctl.control import Control
from droprd.ctl.drawing import printable, table
from droprd.ctl.session import EXIT_DONE, EXIT_FAILED, EXIT_NO_DAEMON, Session, json_option
from droprd.errors import NotAnswering, UnknownPeer
from droprd.model import is_message_id
from droprd.settings.units import format_bytes, format_duration
from droprd.settings.values import CONFIG_DEFAULT

WATCH_INTERVAL_S = 1.0

Map = Mapping[str, Any]


def _ask(
    session: Session,
    method: str,
    params: Map,
    from_files: Callable[[Map], Map],
) -> tuple[Map, int]:
    """The daemon's answer, or what `from_files` makes of a stopped node's status; and the exit."""
    node = session.node()
    try:
        with Control(node.socket, session.timeout_s) as control:
            answer: Map = control.call(method, params)
            return answer, EXIT_DONE
    except NotAnswering as error:
        if error.code != "no_daemon":
            raise
    # Imported only when needed: what reads a spool takes as long to load as all the rest.
    from droprd.ctl.offline import stopped_status
    from droprd.ctl.version import version

    return from_files(stopped_status(node, version())), EXIT_NO_DAEMON


def _start(session: Session) -> str:
    """What to type to start the node's daemon."""
    config_file = session.node().config_file
    if config_file == CONFIG_DEFAULT:
        return "systemctl start droprd"
    return f"droprd --config {shlex.quote(config_file)}"


@click.command()
@click.argument("peer", required=False)
@click.option("--watch", is_flag=True, help="Again every second, until interrupted.")
@click.option("--ages", is_flag=True, help="How long messages have waited, by peer.")
@json_option
@click.pass_obj
def status(session: Session, peer: str | None, watch: bool, ages: bool) -> int:
    """Show what the node, its workers, peers and channels do; with PEER only that peer."""
    while True:
        if ages:
            _show_ages(session, peer, watch)
            if not watch:
                return EXIT_DONE
            continue
        document, code = _ask(session, "status", {}, lambda found: found)
        if peer is not None:
            if peer not in document["peers"]:
                raise UnknownPeer(
                    f"no peer {peer!r} is configured and nothing waits for it",
                    hint="see `droprctl peer list`",
                )
            document = {**document, "peers": {peer: document["peers"][peer]}}
        if session.as_json:
            session.emit(document)
        else:
            if watch and sys.stdout.isatty():
                click.clear()
            _print_status(document)
        if not watch:
            return code
        sys.stdout.flush()
        time.sleep(WATCH_INTERVAL_S)


def local_time(text: str) -> str:
    """A time of a JSON document for people: local, with its offset."""
    when = datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone()
    return when.isoformat(sep=" ", timespec="seconds")


def _age(seconds: Any) -> str:
    return "-" if seconds is None else format_duration(float(seconds))


def _show_ages(session: Session, peer: str | None, watch: bool) -> None:
    from droprd.ctl import ages

    found = ages.ages(session, peer)
    if session.as_json:
        session.emit(found)
    else:
        if watch and sys.stdout.isatty():
            click.clear()
        ages.print_ages(found)
    if watch:
        sys.stdout.flush()
        time.sleep(WATCH_INTERVAL_S)


def _print_status(document: Map) -> None:
    state = document["state"]
    line = f"{document['node']}: {state}"
    if state != "stopped":
        line += f" for {format_duration(document['uptime_s'])}"
    print(f"{line}, droprd {document['version']}, as of {local_time(document['as_of'])}")
    spool = document["spool"]
    dead = document["dead_letters"]
    print(
        f"spool {format_bytes(spool['bytes'])}, {format_bytes(spool['free_bytes'])} free; "
        f"{dead} dead letter{'' if dead == 1 else 's'}; "
        f"{format_bytes(document['unmerged_bytes'])} not merged yet"
    )
    for target, pause in document.get("paused", {}).items():
        reason = f" ({printable(pause['reason'])})" if pause.get("reason") else ""
        until = f" until {_wall(pause['until_wall_ns'])}" if pause.get("until_wall_ns") else ""
        both = ", receiving too," if pause.get("receiving") else ""
        print(f"paused: {target or 'the whole node'}{both} by {pause.get('who')}{reason}{until}")
    for target in document.get("draining", ()):
        print(f"draining: {target or 'the whole node'}")
    for problem in document.get("problems", ()):
        print(f"problem: {printable(problem)}")
    _section(
        ["WORKER", "STATE", "PID", "RESTARTS"],
        [
            [name, one["state"], str(one.get("pid") or "-"), str(one.get("restarts", 0))]
            for name, one in document["workers"].items()
        ],
    )
    _section(
        ["PEER", "STATE", "QUEUED", "BYTES", "OLDEST", "NEXT TRY", "LAST ERROR"],
        [
            [
                name,
                one["state"],
                str(one["queued"]),
                format_bytes(one["bytes"]),
                _age(one["oldest_age_s"]),
                _age(one["next_try_s"]),
                one["last_error"] or "",
            ]
            for name, one in document["peers"].items()
        ],
    )
    _section(
        ["CHANNEL", "READY", "LEASED", "DEAD"],
        [
            [name, str(one["ready"]), str(one["leased"]), str(one["dead"])]
            for name, one in document["channels"].items()
        ],
    )


def _section(header: list[str], rows: list[list[str]]) -> None:
    if rows:
        print()
        table(header, rows)


def _wall(wall_ns: int) -> str:
    when = datetime.datetime.fromtimestamp(wall_ns / 1e9).astimezone()
    return when.isoformat(sep=" ", timespec="seconds")


@click.command()
@click.argument("peer", metavar="PEER | ID")
@json_option
@click.pass_obj
def why(session: Session, peer: str) -> int:
    """Say why messages to PEER, or the one message ID, do not move, and what to do."""

    def ask(name: str) -> tuple[Map, int]:
        def from_files(found: Map) -> Map:
            from droprd.core.status import why_peer

            return why_peer(found, name, _start(session))

        return _ask(session, "why", {"peer": name}, from_files)

    answer: tuple[Map, int]
    if is_message_id(peer.lower()):
        from droprd.ctl.whymessage import why_message

        answer = why_message(session, peer, ask)
    else:
        answer = ask(peer)
    document, code = answer
    if session.as_json:
        session.emit(document)
    else:
        print(printable(document["text"]))
    return code


@click.command()
@json_option
@click.pass_obj
def health(session: Session) -> int:
    """Say whether all is well: exit 0, or 1 with the reasons; 3 without a daemon."""

    def from_files(found: Map) -> Map:
        from droprd.core.health import judge

        document = judge(found).to_dict()
        for reason in document["reasons"]:
            if reason["code"] == "daemon_stopped":
                reason["command"] = _start(session)
        return document

    document, code = _ask(session, "health", {}, from_files)
    if session.as_json:
        session.emit(document)
    else:
        print(document["verdict"])
        for reason in document["reasons"]:
            print(f"{reason['level']}: {printable(reason['text'])}")
            if reason.get("command"):
                print(f"  {reason['command']}")
    if code == EXIT_DONE and document["verdict"] != "ok":
        return EXIT_FAILED
    return code
