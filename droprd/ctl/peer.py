"""droprctl peer: who this node talks to.

`add` writes peers.d/NAME.toml and keys/NAME.token beside the configuration, and lets the daemon
read them; without a daemon it renews state/public itself, so that applications know the peer at
once. What the daemon (or the check) refuses is taken back. `remove` takes both files away; messages
that wait for the peer stay, and are shown as unconfigured.

A crash in `add` leaves a token without a peer, which a second `add` of that name reports.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from droprd.ctl.control import Control
from droprd.ctl.files import sync_dir, toml_table, write_new
from droprd.ctl.offline import as_daemon, publish, stopped_status
from droprd.ctl.session import EXIT_NO_DAEMON, RELOAD_TIMEOUT_S, Session, json_option
from droprd.errors import ConfigError, DroprdError, NotAnswering, UnknownPeer
from droprd.model import check_name
from droprd.settings.addresses import check_url

TOKEN_BYTES = 32
RESET_TIMEOUT_S = 125.0  # it merges all journals first
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}\Z")


@click.group()
def peer() -> None:
    """Add, list, remove and reset peers."""


def _base(session: Session) -> str:
    return os.path.dirname(session.node().config_file)


def _apply(session: Session) -> bool:
    """Make what is in the files count. True if a daemon took it over, False if there is none.

    Raises: ConfigError where the configuration is at fault, here or at the daemon.
    """
    try:
        control = Control(session.node().socket, session.timeout_s)
    except NotAnswering as error:
        if error.code != "no_daemon":
            raise
    else:
        with control:
            control.call("reload", timeout_s=session.timeout_of(RELOAD_TIMEOUT_S))
        return True
    from droprd.settings.loading import load  # pydantic: 0.2 s

    settings = load(session.node().config_file)
    with as_daemon(settings.node.spool, session.timeout_s) as layout:
        publish(layout, settings)
    return False


@dataclass(frozen=True, slots=True)
class _Written:
    """What a file says of a peer, unchecked: enough to list it and to know where it stands."""

    path: str
    alone: bool
    table: Mapping[str, Any]

    @property
    def urls(self) -> list[str]:
        urls = self.table.get("urls", ())
        found = [self.table.get("url"), *(urls if isinstance(urls, list) else ())]
        return [url for url in found if isinstance(url, str) and url]


def _read_tables(session: Session) -> dict[str, _Written]:
    """Every peer that stands in the main file or in peers.d. Raises: ConfigError."""
    main = session.node().config_file
    found: dict[str, _Written] = {}
    beside = os.path.join(_base(session), "peers.d")
    names = sorted(os.listdir(beside)) if os.path.isdir(beside) else []
    files = [os.path.join(beside, n) for n in names if n.endswith(".toml") and n[0] != "."]
    for path in [main, *files]:
        try:
            with open(path, "rb") as file:
                tables = tomllib.load(file).get("peers", {})
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} cannot be read", why=str(error), hint="run `droprctl config check`"
            ) from None
        for name, table in tables.items() if isinstance(tables, Mapping) else ():
            if isinstance(table, Mapping):
                found.setdefault(name, _Written(path, len(tables) == 1, table))
    return found


def _read_token(source: str) -> str:
    if source == "-":
        text = sys.stdin.read(2048)
    else:
        with open(source, encoding="ascii", errors="replace") as file:
            text = file.read(2048)
    token = text.strip()
    if not _TOKEN.match(token):
        raise DroprdError(
            f"{'stdin' if source == '-' else source} holds no token",
            why="a token is 16 to 512 characters of A-Z a-z 0-9 . _ ~ + / = -",
            hint="take the one that `droprctl peer add` printed on the other node",
            code="bad_token",
        )
    return token


@peer.command()
@click.argument("name")
@click.argument("url", required=False, default="")
@click.option("--token-file", metavar="FILE|-", help="The token the other node has already.")
@click.option("--allow-plain-http", "plain", is_flag=True, help="Send beyond loopback, no TLS.")
@json_option
@click.pass_obj
def add(session: Session, name: str, url: str, token_file: str | None, plain: bool) -> None:
    """Add the peer NAME, reached at URL. Without URL it only sends to this node.

    Without --token-file a token is made and printed: give it to the other node, with
    `droprctl peer add THIS-NODE URL --token-file -`.
    """
    check_name(name, "peer")
    if url:
        try:
            check_url(url, allow_plain_http=plain)
        except ValueError as error:
            raise ConfigError(
                f"peer {name!r} cannot be added",
                faults=[f"URL: {error}"],
                hint="see `droprctl peer add --help`",
            ) from None
    known = _read_tables(session)
    if name in known:
        raise DroprdError(
            f"there is a peer {name!r} already",
            why=f"it stands in {known[name].path}",
            hint=f"remove it first: droprctl peer remove {name}",
            code="peer_exists",
        )
    token = _read_token(token_file) if token_file else secrets.token_urlsafe(TOKEN_BYTES)
    running = _add_files(session, name, url, token, plain)
    if session.as_json:
        shown = {} if token_file else {"token": token}
        session.emit({"peer": name, "url": url, "running": running, **shown})
        return
    session.say(
        f"peer {name} added; "
        + ("the daemon knows it" if running else "no daemon runs, the next one will know it")
    )
    if not token_file:
        session.say("its token, which the other node needs (--token-file):")
        print(token)


def _add_files(session: Session, name: str, url: str, token: str, plain: bool) -> bool:
    """Write both files and make them count. Nothing stays of what is refused."""
    base = _base(session)
    keys, beside = os.path.join(base, "keys"), os.path.join(base, "peers.d")
    for path, mode in ((keys, 0o700), (beside, 0o755)):
        if not os.path.isdir(path):
            os.mkdir(path, mode)
            sync_dir(base)
    owner = os.stat(keys)
    token_path, table_path = f"{keys}/{name}.token", f"{beside}/{name}.toml"
    values: dict[str, Any] = {"url": url} if url else {}
    values["token_file"] = f"keys/{name}.token"
    if plain:
        values["allow_plain_http"] = True
    made: list[str] = []
    try:
        for path, text, mode in (
            (token_path, f"{token}\n", 0o600),
            (table_path, toml_table(f"peers/{name}", values), 0o644),
        ):
            owned = (owner.st_uid, owner.st_gid) if path == token_path else None
            try:
                write_new(path, text, mode, owned if os.geteuid() == 0 else None)
            except FileExistsError:
                raise DroprdError(
                    f"peer {name!r} cannot be added",
                    why=f"{path} is there already, and nothing there is overwritten",
                    hint=f"remove it by hand if it is of no use: rm {path}",
                    code="file_exists",
                ) from None
            made.append(path)
        return _apply(session)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise


@peer.command("list")
@json_option
@click.pass_obj
def list_(session: Session) -> int:
    """List the peers and how they are. Exit 3 if no daemon runs."""
    try:
        with Control(session.node().socket, session.timeout_s) as control:
            state, code = control.server.get("state", "running"), 0
            peers = control.call("list_peers")["peers"]
    except NotAnswering as error:
        if error.code != "no_daemon":
            raise
        state, code = "stopped", EXIT_NO_DAEMON
        peers = _peers_of_files(session)
    # Of a peer that was removed only what waits for it is of interest.
    rows = [
        {"name": name, **about}
        for name, about in peers.items()
        if about["state"] != "unconfigured" or about["queued"]
    ]
    if session.as_json:
        session.emit({"state": state, "peers": rows})
        return code
    from droprd.ctl.drawing import table

    shown = [
        [r["name"], r["state"], str(r["queued"]), " ".join(r["urls"]) or _without_url(r["state"])]
        for r in rows
    ]
    table(["PEER", "STATE", "QUEUED", "URL"], shown)
    if code:
        session.say("the daemon is stopped")
    return code


def _without_url(state: str) -> str:
    # Messages wait for it: it was removed, or never had one.
    return "(no url)" if state == "unconfigured" else "(only sends to us)"


def _peers_of_files(session: Session) -> dict[str, dict[str, Any]]:
    written = _read_tables(session)
    known = stopped_status(session.node(), "")["peers"]
    unknown = {"state": "unknown", "queued": 0}
    return {
        name: {
            "urls": written[name].urls if name in written else [],
            "channels": written[name].table.get("channels", []) if name in written else [],
            "state": known.get(name, unknown)["state"] if name in written else "unconfigured",
            "queued": known.get(name, unknown)["queued"],
        }
        for name in sorted({*written, *known})
    }


@peer.command()
@click.argument("name")
@json_option
@click.pass_obj
def remove(session: Session, name: str) -> None:
    """Remove the peer NAME. Messages that wait for it stay until it is back or purged."""
    check_name(name, "peer")
    known = _read_tables(session)
    if name not in known:
        raise UnknownPeer(
            f"no peer {name!r} is configured",
            why=f"configured are {', '.join(sorted(known))}" if known else "there is none",
            hint="see `droprctl peer list`",
        )
    base = _base(session)
    table_path = os.path.join(base, "peers.d", f"{name}.toml")
    if known[name].path != table_path or not known[name].alone:
        raise DroprdError(
            f"peer {name!r} is not removed",
            why=f"it stands in {known[name].path}, which was written by hand",
            hint=f"take [peers.{name}] out of it, then: droprctl reload",
            code="written_by_hand",
        )
    os.rename(table_path, f"{table_path}.removed")
    try:
        running = _apply(session)
    except BaseException:
        os.rename(f"{table_path}.removed", table_path)
        raise
    os.unlink(f"{table_path}.removed")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(base, "keys", f"{name}.token"))
    session.result(
        {"peer": name, "running": running}, f"peer {name} removed; its token is no longer accepted"
    )


@peer.command(short_help="Let lanes go on that wait for your word.")
@click.argument("name")
@click.option("--replay", is_flag=True, help="Send again what it had confirmed and we still hold.")
@click.option("--continue", "go_on", is_flag=True, help="Go on with what it never confirmed.")
@json_option
@click.pass_obj
def reset(session: Session, name: str, replay: bool, go_on: bool) -> None:
    """Let lanes go on that wait because the peer NAME lost what it had confirmed."""
    check_name(name, "peer")
    if replay == go_on:
        raise click.UsageError("say which: --replay or --continue")
    mode = "replay" if replay else "continue"
    with Control(session.node().socket, session.timeout_s) as control:
        answer: Mapping[str, Any] = control.call(
            "peer_reset", {"peer": name, "mode": mode}, session.timeout_of(RESET_TIMEOUT_S)
        )
    answer = answer or {}
    session.result({"peer": name, "mode": mode, **answer}, f"peer {name} reset ({mode})")
    for line in answer.get("report", ()) if not session.as_json else ():
        print(line)
