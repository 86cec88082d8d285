"""What applications and commands may know of a node without its daemon.

`find_node` reads where the node is from the main configuration file (`[node]` and `[control]`
only, with tomllib) and the environment. `Published` reads state/public, which the holder of the
daemon's lock replaces, and looks with one stat(2) whether there is a new one. `public_map` is what
that holder writes there.

Nothing is written here and nothing checked beyond what is used: `droprd.settings.loading` does
that. Light on imports, because every application and every `droprctl` call pays for them. Raises
ConfigError and SpoolNotReady.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from droprd.errors import ConfigError, SpoolNotReady
from droprd.settings.values import (
    CHANNEL_SETTINGS_DEFAULT as CHANNEL_SETTINGS_DEFAULT,  # for clients, who import no other
)
from droprd.settings.values import (
    CONFIG_DEFAULT,
    SOCKET_DEFAULT,
    SPOOL_DEFAULT,
    ChannelSettings,
    NodeSettings,
    Settings,
)

RESERVE_PART = 20  # a twentieth of the file system is kept for acks, reports and deletes
RESERVE_BYTES_MIN = 1 << 20
RESERVE_BYTES_MAX = 1 << 30

_PUBLIC_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class Node:
    """Where a node is. `name` is empty if only its spool is known; see state/public then."""

    name: str
    spool: str
    socket: str = ""
    config_file: str = ""


def find_config(config_file: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    """The configuration file meant: the one given, else $DROPRD_CONFIG, else the usual place."""
    environ = os.environ if environ is None else environ
    return os.path.abspath(config_file or environ.get("DROPRD_CONFIG") or CONFIG_DEFAULT)


def find_node(
    config_file: str | None = None,
    *,
    spool: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Node:
    """The node meant by a configuration file, or by the directory of its spool alone.

    Args:
        config_file: path of droprd.toml; without it $DROPRD_CONFIG, then /etc/droprd/droprd.toml.
        spool: directory of the spool; then no configuration is read.
        environ: for DROPRD_NODE__NAME and the like; the process's own by default.

    Raises: ConfigError if the file is missing (code config_missing) or cannot be read.
    """
    environ = os.environ if environ is None else environ
    if spool is not None:
        return Node("", os.path.abspath(spool))
    path = find_config(config_file, environ)
    by_environment = {
        key: environ.get(f"DROPRD_{key.upper()}")
        for key in ("node__name", "node__spool", "control__socket")
    }
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration at {path}",
            why="no such file",
            hint="make one with `droprctl init`, or name another with --config or $DROPRD_CONFIG",
            code="config_missing",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the configuration {path} cannot be read",
            why=error.strerror or "",
            hint="it must be readable by applications; only keys/ is secret",
            code="config_unreadable",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the configuration {path} is no TOML",
            why=str(error),
            hint="run `droprctl config check`",
        ) from None
    base = os.path.dirname(path)

    def of(section: str, key: str, default: str) -> str:
        table = tables.get(section)
        found = table.get(key) if isinstance(table, dict) else None
        value = by_environment[f"{section}__{key}"] or found or default
        if not isinstance(value, str):
            raise ConfigError(
                f"{path}:{section}.{key} is no text", hint="run `droprctl config check`"
            )
        return value

    return Node(
        name=of("node", "name", ""),
        spool=os.path.join(base, of("node", "spool", SPOOL_DEFAULT)),
        socket=os.path.join(base, of("control", "socket", SOCKET_DEFAULT)),
        config_file=path,
    )


def public_map(
    settings: Settings,
    spool_id: bytes,
    *,
    disk_bytes: int,
    paused: Mapping[str, Mapping[str, Any]] | None = None,
    draining: Iterable[str] = (),
    unconfigured: Iterable[str] = (),
    outbox_full: str | None = None,
    inbox_full: str | None = None,
) -> dict[str, Any]:
    """What state/public has to say; pure.

    Args:
        disk_bytes: size of the file system that holds the spool.
        paused, draining: by target.
        unconfigured: names of peers that were removed while messages wait for them.
        outbox_full, inbox_full: why nothing is accepted at present, or None.
    """
    peers: dict[str, dict[str, Any]] = {
        name: {
            "channels": list(peer.channels) or None,
            "max_message_bytes": settings.max_message_bytes(name),
            "unconfigured": False,
        }
        for name, peer in settings.peers.items()
    }
    for name in unconfigured:
        peers.setdefault(name, {"channels": None, "max_message_bytes": 0, "unconfigured": True})
    reserve = min(max(disk_bytes // RESERVE_PART, RESERVE_BYTES_MIN), RESERVE_BYTES_MAX)
    return {
        "schema": 1,
        "node": settings.node.name,
        "spool_id": spool_id,
        "peers": peers,
        "limits": {
            "max_message_bytes": settings.node.max_message_bytes,
            "outbox_quota_bytes": settings.outbox.quota_bytes,
            "inbox_quota_bytes": settings.inbox.quota_bytes,
            "reserve_bytes": reserve,
        },
        "draining": sorted(draining),
        "paused": {target: dict(one) for target, one in (paused or {}).items()},
        "full": {"outbox": outbox_full, "inbox": inbox_full},
        "channels": {
            name: {"max_attempts": one.max_attempts, "ordered": one.ordered}
            for name, one in settings.channels.items()
        },
    }


@dataclass(frozen=True, slots=True)
class PublicPeer:
    """What a producer must know of a peer. `channels` None means all of them."""

    channels: frozenset[str] | None = None
    max_message_bytes: int = NodeSettings("").max_message_bytes
    unconfigured: bool = False


@dataclass(frozen=True, slots=True)
class Public:
    """state/public at one moment. Targets are "" (the node) or PEER[/CHANNEL[/PRIORITY]]."""

    node: str = ""
    spool_id: bytes = b""
    peers: Mapping[str, PublicPeer] = field(default_factory=dict)
    max_message_bytes: int = NodeSettings("").max_message_bytes
    outbox_quota_bytes: int = 0
    inbox_quota_bytes: int = 0
    reserve_bytes: int = 0
    draining: frozenset[str] = frozenset()
    paused: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    outbox_full: str | None = None
    inbox_full: str | None = None
    channels: Mapping[str, ChannelSettings] = field(default_factory=dict)

    def channel(self, name: str) -> ChannelSettings:
        """How messages of channel `name` are consumed."""
        return self.channels.get(name, CHANNEL_SETTINGS_DEFAULT)

    def draining_target(self, peer: str, channel: str, priority: int) -> str | None:
        """The target whose drain refuses a message to this lane, or None ("" is the node)."""
        if not self.draining:
            return None
        for target in ("", peer, f"{peer}/{channel}", f"{peer}/{channel}/{priority}"):
            if target in self.draining:
                return target
        return None


class Published:
    """state/public, read again when it was replaced. Safe with threads: values are never changed.

    Args:
        path: of the file state/public.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._read: tuple[tuple[int, int, int], Public] | None = None

    def get(self) -> Public:
        """What the file says now. Costs one stat(2) while it has not been replaced.

        Raises: SpoolNotReady (code state_unreadable) if it is missing or cannot be read.
        """
        try:
            now = os.stat(self._path)
            version = (now.st_ino, now.st_mtime_ns, now.st_size)
            read = self._read
            if read is not None and read[0] == version:
                return read[1]
            with open(self._path, "rb") as file:
                # Of the file that was opened, which may be newer than the one looked at.
                now = os.fstat(file.fileno())
                data = file.read(_PUBLIC_BYTES_MAX)
        except OSError as error:
            raise self._unreadable(error.strerror or "") from None
        try:
            public = _decode(msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0))
        except (ValueError, TypeError, AttributeError, KeyError, msgpack.UnpackException) as error:
            raise self._unreadable(f"it is damaged: {error}") from None
        self._read = ((now.st_ino, now.st_mtime_ns, now.st_size), public)
        return public

    def _unreadable(self, why: str) -> SpoolNotReady:
        return SpoolNotReady(
            f"{self._path} cannot be read",
            why=why,
            hint="start droprd once, or run `droprctl init`",
            code="state_unreadable",
        )


def _decode(data: Any) -> Public:
    limits, full = data.get("limits", {}), data.get("full", {})
    largest = int(limits.get("max_message_bytes", NodeSettings("").max_message_bytes))
    return Public(
        node=str(data["node"]),
        spool_id=bytes(data["spool_id"]),
        peers={
            name: PublicPeer(
                channels=frozenset(one["channels"]) if one.get("channels") else None,
                max_message_bytes=int(one.get("max_message_bytes") or largest),
                unconfigured=bool(one.get("unconfigured", False)),
            )
            for name, one in data.get("peers", {}).items()
        },
        max_message_bytes=largest,
        outbox_quota_bytes=int(limits.get("outbox_quota_bytes", 0)),
        inbox_quota_bytes=int(limits.get("inbox_quota_bytes", 0)),
        reserve_bytes=int(limits.get("reserve_bytes", 0)),
        draining=frozenset(data.get("draining", ())),
        paused=dict(data.get("paused", {})),
        outbox_full=full.get("outbox"),
        inbox_full=full.get("inbox"),
        channels={
            name: ChannelSettings(int(one["max_attempts"]), bool(one["ordered"]))
            for name, one in data.get("channels", {}).items()
        },
    )
