"""What a configuration may say: every key, its type, its bounds. Used in the configuration child.

The models mirror `droprd.settings.values`, with defaults taken from there, and forbid what they do
not know. `read` takes two sources, the files and the environment, gathered by
`droprd.settings.loading`, which also turns pydantic's errors into faults with their paths.

Rules that look at several keys are written as field validators, with the other key declared
before, so that one fault never hides another.
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from droprd.core.thresholds import Thresholds
from droprd.errors import InvalidName
from droprd.model import RESERVED_CHANNEL_PREFIX, check_name
from droprd.settings.addresses import check_listen, check_monitor, check_url
from droprd.settings.units import parse_bytes, parse_duration_s
from droprd.settings.values import (
    ChannelSettings,
    ControlSettings,
    DaemonSettings,
    InboxSettings,
    LogSettings,
    MonitorSettings,
    NodeSettings,
    OutboxSettings,
    PeerSettings,
    ReceiverSettings,
)

_NODE = NodeSettings("")
_CONTROL = ControlSettings()
_OUTBOX = OutboxSettings()
_INBOX = InboxSettings()
_RECEIVER = ReceiverSettings()
_DAEMON = DaemonSettings()
_LOG = LogSettings()
_HEALTH = Thresholds()
_MONITOR = MonitorSettings()
_PEER = PeerSettings()
_CHANNEL = ChannelSettings()


def _named(kind: str) -> BeforeValidator:
    """The check of a node's, peer's or channel's name."""

    def check(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return check_name(value, kind)
        except InvalidName as error:
            raise ValueError(f"{error.what}: {error.why}") from None

    return BeforeValidator(check)


def _not_reserved(name: str) -> str:
    if name.startswith(RESERVED_CHANNEL_PREFIX):
        raise ValueError(f"channels {RESERVED_CHANNEL_PREFIX}* are reserved")
    return name


def _texts(value: Any) -> Any:
    """A list, also as the environment can hold it: JSON, or texts with commas between them."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if isinstance(found, list):
        return found
    return [part.strip() for part in value.split(",") if part.strip()]


Duration = Annotated[float, BeforeValidator(parse_duration_s)]
Size = Annotated[int, BeforeValidator(parse_bytes)]
Texts = Annotated[list[str], BeforeValidator(_texts)]
FilePath = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Node(Section):
    name: Annotated[str, _named("node")]
    spool: FilePath = _NODE.spool
    max_message_bytes: Size = Field(default=_NODE.max_message_bytes, ge=1, le=1 << 40)
    allow_unsafe_filesystem: bool = _NODE.allow_unsafe_filesystem


class Control(Section):
    socket: FilePath = _CONTROL.socket


class Outbox(Section):
    quota_bytes: Size = _OUTBOX.quota_bytes
    sent_retain_s: Duration = _OUTBOX.sent_retain_s
    segment_bytes_max: Size = Field(default=_OUTBOX.segment_bytes_max, ge=1 << 18, le=1 << 30)
    journal_bytes_max: Size = Field(default=_OUTBOX.journal_bytes_max, ge=1 << 18, le=1 << 30)


class Inbox(Section):
    store: str = _INBOX.store
    quota_bytes: Size = _INBOX.quota_bytes
    retain_s: Duration = _INBOX.retain_s
    segment_bytes_max: Size = Field(default=_INBOX.segment_bytes_max, ge=1 << 18, le=1 << 30)
    match_frames: int = Field(default=_INBOX.match_frames, ge=1000, le=10_000_000)

    @field_validator("store")
    @classmethod
    def _installed(cls, store: str) -> str:
        if store != "files":
            others = [point.name for point in entry_points(group="droprd.inboxes")]
            if store not in others:
                there = ", ".join(["files", *others])
                raise ValueError(f"no inbox store {store!r} is installed; there are {there}")
        return store


class Receiver(Section):
    allow_plain_http: bool = _RECEIVER.allow_plain_http
    listen: Texts = Field(default_factory=list)
    header_timeout_s: Duration = Field(default=_RECEIVER.header_timeout_s, ge=1, le=600)
    body_rate_min: Size = _RECEIVER.body_rate_min
    connections_per_address: int = Field(default=_RECEIVER.connections_per_address, ge=1)
    connections_max: int = Field(default=_RECEIVER.connections_max, ge=1)

    @field_validator("listen")
    @classmethod
    def _addresses(cls, listen: list[str], info: ValidationInfo) -> list[str]:
        if len(set(listen)) != len(listen):
            raise ValueError("an address is listed twice")
        # If allow_plain_http is itself at fault it is absent here: it has a fault already.
        allowed = bool(info.data.get("allow_plain_http", True))
        for text in listen:
            check_listen(text, allow_plain_http=allowed)
        return listen


class Daemon(Section):
    hang_timeout_s: Duration = Field(default=_DAEMON.hang_timeout_s, ge=1)
    stop_timeout_s: Duration = Field(default=_DAEMON.stop_timeout_s, ge=1)
    max_rss_mib: int = Field(default=_DAEMON.max_rss_mib, ge=64)
    backoff_max_s: Duration = Field(default=_DAEMON.backoff_max_s, ge=1)


class Log(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"


class Health(Section):
    """0 means never. Warnings come before what is critical."""

    oldest_age_warning_s: Duration = Field(default=_HEALTH.oldest_age_warning_s, ge=0)
    oldest_age_critical_s: Duration = Field(default=_HEALTH.oldest_age_critical_s, ge=0)
    silence_warning_s: Duration = Field(default=_HEALTH.silence_warning_s, ge=0)
    silence_critical_s: Duration = Field(default=_HEALTH.silence_critical_s, ge=0)
    merge_age_warning_s: Duration = Field(default=_HEALTH.merge_age_warning_s, ge=0)
    merge_age_critical_s: Duration = Field(default=_HEALTH.merge_age_critical_s, ge=0)
    inbox_age_warning_s: Duration = Field(default=_HEALTH.inbox_age_warning_s, ge=0)
    inbox_age_critical_s: Duration = Field(default=_HEALTH.inbox_age_critical_s, ge=0)
    free_bytes_warning: Size = Field(default=_HEALTH.free_bytes_warning, ge=0)
    free_bytes_critical: Size = Field(default=_HEALTH.free_bytes_critical, ge=0)
    full_in_warning_s: Duration = Field(default=_HEALTH.full_in_warning_s, ge=0)
    full_in_critical_s: Duration = Field(default=_HEALTH.full_in_critical_s, ge=0)
    dead_letters_warning: int = Field(default=_HEALTH.dead_letters_warning, ge=0)
    dead_letters_critical: int = Field(default=_HEALTH.dead_letters_critical, ge=0)
    failures_critical: int = Field(default=_HEALTH.failures_critical, ge=0)

    @field_validator(
        "oldest_age_critical_s",
        "silence_critical_s",
        "merge_age_critical_s",
        "inbox_age_critical_s",
        "free_bytes_critical",
        "full_in_critical_s",
        "dead_letters_critical",
    )
    @classmethod
    def _worse(cls, critical: float, info: ValidationInfo) -> float:
        name = str(info.field_name).replace("critical", "warning")
        warning = info.data.get(name)
        less_is_worse = name.startswith(("free_bytes", "full_in"))
        if warning and critical and (critical > warning if less_is_worse else critical < warning):
            raise ValueError(f"it would be critical before there is a warning ({name})")
        return critical


class Monitor(Section):
    listen: Annotated[str, AfterValidator(check_monitor)] = _MONITOR.listen


class Peer(Section):
    allow_plain_http: bool = _PEER.allow_plain_http
    url: str = _PEER.url
    urls: Texts = Field(default_factory=list)
    token_file: str = Field(default=_PEER.token_file, pattern=r"^[^\x00]*$")
    channels: Annotated[list[Annotated[str, _named("channel")]], BeforeValidator(_texts)] = Field(
        default_factory=list
    )
    on_receiver_reset: Literal["hold"] = "hold"
    requests_in_flight_max: int = Field(default=_PEER.requests_in_flight_max, ge=1, le=64)
    connect_timeout_s: Duration = Field(default=_PEER.connect_timeout_s, ge=0.1, le=600)
    quota_bytes: Size = _PEER.quota_bytes
    lanes_max: int = Field(default=_PEER.lanes_max, ge=1)
    max_message_bytes: Size = _PEER.max_message_bytes

    @field_validator("url", "urls")
    @classmethod
    def _reachable(cls, value: str | list[str], info: ValidationInfo) -> str | list[str]:
        allowed = bool(info.data.get("allow_plain_http", True))
        for url in [value] if isinstance(value, str) else value:
            if url:
                check_url(url, allow_plain_http=allowed)
        return value


class Channel(Section):
    max_attempts: int = Field(default=_CHANNEL.max_attempts, ge=1)
    ordered: bool = _CHANNEL.ordered


class Configuration(BaseSettings):
    """All tables of the configuration, made by `read`."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    node: Node
    control: Control = Control()
    outbox: Outbox = Outbox()
    inbox: Inbox = Inbox()
    receiver: Receiver = Receiver()
    daemon: Daemon = Daemon()
    log: Log = Log()
    health: Health = Health()
    monitor: Monitor = Monitor()
    peer_defaults: Peer = Peer()
    peers: dict[Annotated[str, _named("peer")], Peer] = Field(default_factory=dict)
    channels: dict[Annotated[str, _named("channel"), AfterValidator(_not_reserved)], Channel] = (
        Field(default_factory=dict)
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Give every peer what `peer_defaults` says and it does not."""
        if not isinstance(data, dict):
            return data
        defaults, peers = data.get("peer_defaults"), data.get("peers")
        if isinstance(defaults, dict) and isinstance(peers, dict):
            filled = {
                name: {**defaults, **one} if isinstance(one, dict) else one
                for name, one in peers.items()
            }
            return {**data, "peers": filled}
        return data


def read(files: dict[str, Any], environment: dict[str, Any]) -> Configuration:
    """The configuration of two sources, of which the environment wins.

    pydantic-settings' own reader of the environment stops at the first value that it cannot parse
    and passes over names it does not know; what `environment` holds has a fault for each of them.

    Raises: pydantic.ValidationError with all faults.
    """

    class Sourced(Configuration):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                InitSettingsSource(settings_cls, environment),
                InitSettingsSource(settings_cls, files),
            )

    return Sourced()  # type: ignore[call-arg]  # the sources bring what is required


SECTIONS: dict[str, type[Section]] = {
    "node": Node,
    "control": Control,
    "outbox": Outbox,
    "inbox": Inbox,
    "receiver": Receiver,
    "daemon": Daemon,
    "log": Log,
    "health": Health,
    "monitor": Monitor,
    "peer_defaults": Peer,
}
TABLES: dict[str, type[Section]] = {"peers": Peer, "channels": Channel}
