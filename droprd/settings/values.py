"""The settings of a node as plain values: what every process of droprd works with.

Checked by `droprd.settings.schema` in the configuration child, then handed to the angel and its
workers as msgpack: `to_dict` makes what `from_dict` reads back. No pydantic here, no files, no
checks. Paths are absolute, peers carry their defaults already, sizes are bytes, times are seconds.

`from_dict` ignores keys it does not know and fills in what is missing, so that an angel and a
worker of neighbouring versions understand each other. It raises BadData for what is no map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

from droprd.core.thresholds import Thresholds
from droprd.errors import BadData
from droprd.model import KIB, MIB

SPOOL_DEFAULT = "/var/spool/droprd"
SOCKET_DEFAULT = "/run/droprd/control.sock"
CONFIG_DEFAULT = "/etc/droprd/droprd.toml"

HOLD = "hold"


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Who this node is and where its spool lies."""

    name: str
    spool: str = SPOOL_DEFAULT
    max_message_bytes: int = 1024 * MIB
    allow_unsafe_filesystem: bool = False


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """Where the daemon answers `droprctl`."""

    socket: str = SOCKET_DEFAULT


@dataclass(frozen=True, slots=True)
class OutboxSettings:
    """How much the outbox may hold and for how long delivered messages stay; quota 0 is none."""

    quota_bytes: int = 0
    sent_retain_s: float = 86_400.0
    segment_bytes_max: int = 16 * MIB
    journal_bytes_max: int = 16 * MIB


@dataclass(frozen=True, slots=True)
class InboxSettings:
    """How much the inbox may hold, for how long settled messages stay, and what is remembered."""

    store: str = "files"
    quota_bytes: int = 0
    retain_s: float = 0.0
    segment_bytes_max: int = 16 * MIB
    match_frames: int = 100_000


@dataclass(frozen=True, slots=True)
class ReceiverSettings:
    """Where the receiver listens ("HOST:PORT" or "unix:/path") and what one client may do."""

    listen: tuple[str, ...] = ()
    allow_plain_http: bool = False
    header_timeout_s: float = 10.0
    body_rate_min: int = 256
    connections_per_address: int = 64
    connections_max: int = 1024


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """How the angel treats its workers."""

    hang_timeout_s: float = 30.0
    stop_timeout_s: float = 20.0
    max_rss_mib: int = 512
    backoff_max_s: float = 60.0


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is logged (debug, info, warning, error) and how (auto, text, json)."""

    level: str = "info"
    format: str = "auto"


@dataclass(frozen=True, slots=True)
class MonitorSettings:
    """Where metrics and health are served by HTTP ("HOST:PORT" or "unix:/path"); "" is nowhere."""

    listen: str = ""


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """One peer: where it answers, what proves us to it and it to us, and its limits.

    `channels` empty means all. A limit of 0 means the node's own.
    """

    url: str = ""
    urls: tuple[str, ...] = ()
    token_file: str = ""
    channels: tuple[str, ...] = ()
    allow_plain_http: bool = False
    on_receiver_reset: str = HOLD
    requests_in_flight_max: int = 4
    connect_timeout_s: float = 10.0
    quota_bytes: int = 0
    lanes_max: int = 1000
    max_message_bytes: int = 0

    @property
    def addresses(self) -> tuple[str, ...]:
        """All addresses in the order in which they are tried; empty for a peer that only sends."""
        rest = tuple(u for u in self.urls if u != self.url)
        return (self.url, *rest) if self.url else rest


@dataclass(frozen=True, slots=True)
class ChannelSettings:
    """How messages of one channel are consumed."""

    max_attempts: int = 10
    ordered: bool = False


CHANNEL_SETTINGS_DEFAULT = ChannelSettings()
HEALTH_DEFAULT = Thresholds()


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the configuration says. `config_file` is where it was read."""

    node: NodeSettings
    control: ControlSettings = ControlSettings()
    outbox: OutboxSettings = OutboxSettings()
    inbox: InboxSettings = InboxSettings()
    receiver: ReceiverSettings = ReceiverSettings()
    daemon: DaemonSettings = DaemonSettings()
    log: LogSettings = LogSettings()
    health: Thresholds = HEALTH_DEFAULT
    monitor: MonitorSettings = MonitorSettings()
    peers: Mapping[str, PeerSettings] = field(default_factory=dict)
    channels: Mapping[str, ChannelSettings] = field(default_factory=dict)
    config_file: str = ""

    def channel(self, name: str) -> ChannelSettings:
        """The settings of channel `name`, which needs no declaration."""
        return self.channels.get(name, CHANNEL_SETTINGS_DEFAULT)

    def max_message_bytes(self, peer: str) -> int:
        """The largest body that may go to or come from `peer`."""
        known = self.peers.get(peer)
        if known is None or known.max_message_bytes == 0:
            return self.node.max_message_bytes
        return min(known.max_message_bytes, self.node.max_message_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Maps, lists, texts, numbers and truth values only: fit for msgpack and JSON."""
        result: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if is_dataclass(value) and not isinstance(value, type):
                result[f.name] = _to_map(value)
            elif isinstance(value, Mapping):
                result[f.name] = {name: _to_map(one) for name, one in value.items()}
            else:
                result[f.name] = value
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """What `to_dict` made. Raises: BadData."""
        if not isinstance(data, Mapping):
            raise BadData("the settings are no map")
        return cls(
            node=_from_map(NodeSettings, data.get("node")),
            control=_from_map(ControlSettings, data.get("control", {})),
            outbox=_from_map(OutboxSettings, data.get("outbox", {})),
            inbox=_from_map(InboxSettings, data.get("inbox", {})),
            receiver=_from_map(ReceiverSettings, data.get("receiver", {})),
            daemon=_from_map(DaemonSettings, data.get("daemon", {})),
            log=_from_map(LogSettings, data.get("log", {})),
            health=_from_map(Thresholds, data.get("health", {})),
            monitor=_from_map(MonitorSettings, data.get("monitor", {})),
            peers={n: _from_map(PeerSettings, m) for n, m in data.get("peers", {}).items()},
            channels={
                n: _from_map(ChannelSettings, m) for n, m in data.get("channels", {}).items()
            },
            config_file=str(data.get("config_file", "")),
        )


T = TypeVar("T")


def _to_map(value: Any) -> dict[str, Any]:
    result = {}
    for f in fields(value):
        one = getattr(value, f.name)
        result[f.name] = list(one) if isinstance(one, tuple) else one
    return result


def _from_map(cls: type[T], data: Any) -> T:
    if not isinstance(data, Mapping):
        raise BadData(f"{cls.__name__} is no map")
    known = {}
    for f in fields(cls):  # type: ignore[arg-type]  # only called with dataclasses
        if f.name in data:
            one = data[f.name]
            known[f.name] = tuple(one) if isinstance(one, list) else one
    try:
        return cls(**known)
    except TypeError as error:
        raise BadData(f"{cls.__name__} is not complete", why=str(error)) from error


# Limits that are part of the format rather than of the configuration.
HEADERS_BYTES_MAX = 8 * KIB
