"""The listening sockets: opened by the angel or inherited, handed to the receiver by number.

The angel keeps them open while a receiver comes and goes, so that no connection is refused. They
come from

- systemd: LISTEN_PID, LISTEN_FDS (sd_listen_fds(3));
- supervisor's fcgi-program: a listening socket as descriptor 0;
- `receiver.listen`: each address that no inherited socket is bound to.

Raises DroprdError with code port_in_use (the address is named), address_unusable, or
control_in_use (another daemon answers on the control socket; its pid is named).
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat
import struct
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from droprd.errors import DroprdError, SpoolBusy

MONITOR_GROUP = "droprd-monitor"
BACKLOG = 1024
_FIRST_FD = 3
_CREDENTIALS = struct.Struct("3i")


@dataclass(slots=True)
class Listening:
    """One listening socket. `wanted` is the address as configured, "" for an inherited one."""

    sock: socket.socket
    wanted: str
    address: str
    local: bool = False


def address_text(sock: socket.socket) -> str:
    """The bound address as people write it: HOST:PORT, [HOST]:PORT, unix:/path."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"


def inherited(environment: MutableMapping[str, str]) -> list[Listening]:
    """The listening sockets somebody opened for us. Call it before any file is opened."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    found = []
    if pid == str(os.getpid()) and count.isdecimal():
        for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
            os.set_inheritable(fd, False)
            found.append(socket.socket(fileno=fd))
    if _is_listening(0):
        found.append(socket.socket(fileno=os.dup(0)))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
    return [Listening(sock, "", address_text(sock)) for sock in found]


def _is_listening(fd: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        with socket.socket(fileno=os.dup(fd)) as sock:
            return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def open_missing(wanted: Iterable[str], have: Iterable[Listening]) -> list[Listening]:
    """Sockets for those of the `wanted` addresses that none of `have` serves.

    Raises: DroprdError; none is left open then.
    """
    have = list(have)
    opened: list[Listening] = []
    try:
        for text in wanted:
            if any(text in (one.wanted, one.address) for one in have):
                continue
            for family, address in _resolve(text):
                opened.append(_open(text, family, address))
    except DroprdError:
        for one in opened:
            one.sock.close()
        raise
    return opened


def _resolve(text: str) -> list[tuple[int, Any]]:
    if text.startswith("unix:"):
        return [(socket.AF_UNIX, text.removeprefix("unix:"))]
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(
            host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (ValueError, OSError) as error:
        raise DroprdError(
            f"cannot listen on {text}",
            why=str(error),
            hint="correct `listen` in [receiver]",
            code="address_unusable",
        ) from error
    return [(family, address) for family, _, _, _, address in dict.fromkeys(found)]


def _open(text: str, family: int, address: Any) -> Listening:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            _bind_unix(sock, address, 0o660)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise DroprdError(
                f"cannot listen on {text}",
                why="another program listens there",
                hint="stop it, or change `listen` in [receiver]",
                code="port_in_use",
            ) from error
        raise DroprdError(
            f"cannot listen on {text}",
            why=error.strerror or str(error),
            hint="change `listen` in [receiver]",
            code="address_unusable",
        ) from error
    # A Unix socket still bears the name it was bound to before the rename.
    return Listening(sock, text, text if family == socket.AF_UNIX else address_text(sock))


def _bind_unix(sock: socket.socket, path: str, mode: int, gid: int | None = None) -> None:
    """Bind under another name first: at `path` there is never a socket with wrong rights.

    Replaces a socket on which nobody answers. Raises: OSError (EADDRINUSE if somebody does).
    """
    if answering_pid(path) is not None:
        raise OSError(errno.EADDRINUSE, "somebody answers there", path)
    temporary = f"{path[:-1]}~"  # no longer than the path: a Unix socket's has 107 bytes at most
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    sock.bind(temporary)
    try:
        if gid is not None:
            with contextlib.suppress(PermissionError):
                os.chown(temporary, -1, gid)
        os.chmod(temporary, mode)
        # If we stop here: a name nobody looks at; removed by the next start.
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def answering_pid(path: str) -> int | None:
    """The pid of who accepts connections on the Unix socket `path`, or None."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return 0  # its backlog is full: somebody is there
        except OSError:
            return None
        return peer_credentials(probe)[0]


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the other end of a Unix socket when it connected (or listened)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def monitor_gid() -> int | None:
    """The group that may read status, why and health; None if there is none."""
    try:
        return grp.getgrnam(MONITOR_GROUP).gr_gid
    except KeyError:
        return None


def open_control(path: str) -> socket.socket:
    """The control socket: 0660, of group droprd-monitor where that exists and we may give it.

    Raises: SpoolBusy (control_in_use) if another daemon answers there, DroprdError
    (address_unusable).
    """
    pid = answering_pid(path)
    if pid is not None:
        raise SpoolBusy(
            f"another daemon answers on {path}",
            pid=pid or None,
            why=f"its pid is {pid}" if pid else "it is busy",
            hint="stop it with `droprctl stop`, or give this node its own [control] socket",
            code="control_in_use",
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path), 0o755)
        _bind_unix(sock, path, 0o660, monitor_gid())
        sock.listen(64)
    except OSError as error:
        sock.close()
        raise DroprdError(
            f"cannot open the control socket {path}",
            why=error.strerror or str(error),
            hint="make its directory, or change `socket` in [control]",
            code="address_unusable",
        ) from error
    sock.setblocking(False)
    return sock


def local_path(control: str) -> str:
    """Where the receiver takes this node's own messages: beside the control socket."""
    return f"{control.removesuffix('.sock')}.in"


def open_local(control: str) -> Listening:
    """The receiver's Unix socket for this node's own sender: 0600. Raises: DroprdError."""
    path = local_path(control)
    found = _open(f"unix:{path}", socket.AF_UNIX, path)
    os.chmod(path, 0o600)
    return Listening(found.sock, "", f"unix:{path}", local=True)
