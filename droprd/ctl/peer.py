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
from typing import Any

import click

from droprd.ctl.control import Control
from droprd.ctl.files import sync_dir, toml_table, write_new
from droprd.ctl.offline import as_daemon, publish, stopped_status
from droprd.ctl.session import EXIT_NO_DAEMON, Session, json_option
from droprd.errors import ConfigError, DroprdError, NotAnswering, UnknownPeer
from droprd.model import check_name
from droprd.settings.addresses import check_url

TOKEN_BYTES = 32
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
            control.call("reload")
        return True
    from droprd.settings.loading import load  # pydantic: 0.2 s

    settings = load(session.node().config_file)
    with as_daemon(settings.node.spool, session.timeout_s) as layout:
        publish(layout, settings)
    return False


def _read_tables(session: Session) -> dict[str, str]:
    """Which file every configured peer stands in."""
    main = session.node().config_file
    found: dict[str, str] = {}
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
        for name in tables if isinstance(tables, Mapping) else ():
            found.setdefault(name, path)
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
            why=f"it stands in {known[name]}",
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
    from droprd.settings.loading import load

    settings = load(session.node().config_file)
    try:
        with Control(session.node().socket, session.timeout_s) as control:
            status, code = control.call("status"), 0
    except NotAnswering as error:
        if error.code != "no_daemon":
            raise
        status, code = stopped_status(session.node(), ""), EXIT_NO_DAEMON
    rows = []
    for name in sorted({*settings.peers, *status["peers"]}):
        configured = settings.peers.get(name)
        about = status["peers"].get(name, {})
        row = {
            "name": name,
            "urls": list(configured.addresses) if configured else [],
            "channels": list(configured.channels) if configured else [],
            "state": about.get("state", "unknown") if configured else "unconfigured",
            "queued": about.get("queued", 0),
        }
        rows.append(row)
    if session.as_json:
        session.emit({"state": status["state"], "peers": rows})
        return code
    from droprd.ctl.drawing import table

    shown = [
        [r["name"], r["state"], str(r["queued"]), " ".join(r["urls"]) or "(only sends to us)"]
        for r in rows
    ]
    table(["PEER", "STATE", "QUEUED", "URL"], shown)
    if code:
        session.say("the daemon is stopped")
    return code


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
    with open(known[name], "rb") as file:
        alone = set(tomllib.load(file).get("peers", {})) == {name}
    if known[name] != table_path or not alone:
        raise DroprdError(
            f"peer {name!r} is not removed",
            why=f"it stands in {known[name]}, which was written by hand",
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


@peer.command()
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
        answer = control.call("peer_reset", {"peer": name, "mode": mode})
    session.result({"peer": name, "mode": mode, **answer}, f"peer {name} reset ({mode})")
    for line in answer.get("report", ()) if not session.as_json else ():
        print(line)
