"""droprctl init: a new node in a directory of its own.

    DIR/droprd.toml     0644, written last: a directory without it is no node yet
    DIR/keys            0700, every secret
    DIR/peers.d         0755, one file a peer, written by `peer add`
    DIR/run             0755, the control socket
    DIR/spool           unless --spool names another directory

Refuses to touch what is there, and takes back what it made if it cannot finish. Run as root where
the groups droprd-send and droprd-receive exist, the spool belongs to the user droprd (if there is
one) and lets both groups in; otherwise all is the caller's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pwd
import shutil
from collections.abc import Callable

import click

from droprd.ctl.files import sync_dir, toml_table, write_new
from droprd.ctl.offline import publish
from droprd.ctl.session import Session, json_option
from droprd.errors import ConfigError, DroprdError
from droprd.model import check_name
from droprd.settings.addresses import SOCKET_PATH_BYTES_MAX, check_listen
from droprd.settings.values import NodeSettings, Settings
from droprd.spool.fsops import OsFs
from droprd.spool.layout import (
    RECEIVE_GROUP,
    SEND_GROUP,
    Layout,
    SharedRights,
    check_can_make,
    make_spool,
    read_version,
)
from droprd.spool.mounts import mount_of

DAEMON_USER = "droprd"


def shared_rights() -> SharedRights | None:
    """Whom a new spool belongs to if it is to be shared by groups; None if it is private."""
    if os.geteuid() != 0:
        return None
    try:
        send, receive = grp.getgrnam(SEND_GROUP), grp.getgrnam(RECEIVE_GROUP)
    except KeyError:
        return None
    try:
        user = pwd.getpwnam(DAEMON_USER)
        uid, gid = user.pw_uid, user.pw_gid
    except KeyError:
        uid, gid = 0, 0
    return SharedRights(uid, gid, send.gr_gid, receive.gr_gid)


def _check(directory: str, spool: str, listen: str | None, *, plain: bool) -> None:
    faults = []
    if listen is not None:
        try:
            check_listen(listen, allow_plain_http=plain)
        except ValueError as error:
            faults.append(f"--listen: {error}")
    socket = os.fsencode(f"{directory}/run/control.sock")
    if len(socket) > SOCKET_PATH_BYTES_MAX:
        faults.append(
            f"--dir: the control socket's path may have {SOCKET_PATH_BYTES_MAX} bytes, "
            f"in this directory it has {len(socket)}"
        )
    if faults:
        raise ConfigError("this node cannot be made", faults=faults)
    _check_free(directory, spool)


def _check_free(directory: str, spool: str) -> None:
    for path in (f"{directory}/droprd.toml", f"{directory}/keys", f"{directory}/peers.d"):
        if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
            raise DroprdError(
                f"no node can be made in {directory}",
                why=f"{path} is there already, and nothing there is touched",
                hint="choose another directory, or look at that node: "
                f"droprctl -C {directory} status",
                code="node_exists",
            )
    check_can_make(OsFs(), spool)


def _text(name: str, spool: str, listen: str | None, *, plain: bool) -> str:
    receiver = {"listen": [listen] if listen else []} | (
        {"allow_plain_http": True} if plain else {}
    )
    return "\n".join(
        [
            "# A node of droprd. All settings and their defaults: etc/droprd.toml of the package,",
            "# or `droprctl config show`. Relative paths are relative to this file.",
            "",
            toml_table("node", {"name": name, "spool": spool}),
            toml_table("control", {"socket": "run/control.sock"}),
            toml_table("receiver", receiver),
        ]
    )


@click.command()
@click.option("--dir", "directory", metavar="DIR", help="Where the node's files go.")
@click.option("--name", required=True, help="The node's name.")
@click.option("--listen", metavar="HOST:PORT", help="Where to receive; without it it only sends.")
@click.option("--spool", metavar="DIR", help="Where the messages go. [DIR/spool]")
@click.option("--allow-plain-http", "plain", is_flag=True, help="Listen beyond loopback, no TLS.")
@json_option
@click.pass_obj
def init(
    session: Session,
    directory: str | None,
    name: str,
    listen: str | None,
    spool: str | None,
    plain: bool,
) -> None:
    """Make a new node: configuration, keys and spool."""
    check_name(name, "node")
    if directory is None:
        if session.config_file is None:
            raise click.UsageError("say where: --dir DIR")
        directory = os.path.dirname(os.path.abspath(session.config_file))
    directory = os.path.abspath(directory)
    root = os.path.abspath(spool) if spool else f"{directory}/spool"
    _check(directory, root, listen, plain=plain)
    undo: list[Callable[[], object]] = []
    try:
        _make(directory, root, name, listen, plain, undo)
    except BaseException:
        for step in reversed(undo):
            with contextlib.suppress(OSError):
                step()
        raise
    shared = shared_rights()
    if shared is not None:
        session.say(
            f"the spool belongs to uid {shared.uid}, which must be a member of {SEND_GROUP} and "
            f"{RECEIVE_GROUP}; so must users whose programs send or receive"
        )
    mount = mount_of(root)
    if mount is not None and mount.unsafe:
        session.say(
            f"warning: {root} lies on {mount.kind}, where messages are not safe ({mount.unsafe}); "
            "the daemon will not start there unless [node] allow_unsafe_filesystem = true"
        )
    session.result(
        {"node": name, "dir": directory, "spool": root},
        f"node {name} made in {directory}\n"
        f"next: droprctl -C {directory} peer add NAME URL, and start it: "
        f"droprd --config {directory}/droprd.toml",
    )


def _make(
    directory: str,
    root: str,
    name: str,
    listen: str | None,
    plain: bool,
    undo: list[Callable[[], object]],
) -> None:
    shared = shared_rights()
    owner = (shared.uid, shared.gid) if shared is not None else None

    def make_dir(path: str, mode: int, belongs: tuple[int, int] | None = None) -> None:
        if not os.path.isdir(path):
            os.mkdir(path)
            undo.append(lambda: os.rmdir(path))
        os.chmod(path, mode)
        if belongs is not None:
            os.chown(path, *belongs)

    parent = directory
    missing = []
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    for path in reversed(missing):
        make_dir(path, 0o755)
        sync_dir(os.path.dirname(path))
    # Two at once would each undo what the other made.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)  # closed, and unlocked, by our end
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _check_free(directory, root)
    make_dir(f"{directory}/keys", 0o700, owner)
    make_dir(f"{directory}/peers.d", 0o755)
    make_dir(f"{directory}/run", 0o755, owner)

    os.makedirs(os.path.dirname(root), exist_ok=True)
    was_there = os.path.isdir(root)
    try:
        facts = make_spool(OsFs(), root, os.urandom, shared)
    except OSError:
        _take_back(root, was_there)
        raise

    # Only from here on is it certain that what lies there is ours.
    def take_back() -> None:
        if read_version(OsFs(), root) == facts:
            _take_back(root, was_there)

    undo.append(take_back)
    publish(Layout(root), Settings(node=NodeSettings(name=name, spool=root)))
    if owner is not None:
        os.chown(Layout(root).public, *owner)
    shown = os.path.relpath(root, directory) if root.startswith(f"{directory}/") else root
    # If we stop here: a spool and keys without a configuration; `init` says what is in its way.
    write_new(f"{directory}/droprd.toml", _text(name, shown, listen, plain=plain), 0o644)
    sync_dir(directory)


def _take_back(root: str, was_there: bool) -> None:
    """Remove a spool that was just made; a directory that was there before stays, empty."""
    for name in os.listdir(root):
        if name != "lost+found":
            path = os.path.join(root, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    if not was_there:
        os.rmdir(root)
