"""The words everyone uses: names, ids, lanes, heads, verdicts. Values only; no files, no clock.

A message id is a UUIDv7 (RFC 9562): the frame id, whose low 16 bits are zero, plus the message's
index in the frame. So an id costs nothing to make, and names its frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from droprd.errors import InvalidName, UsageError

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")

_INDEXES = [f"{i:04x}" for i in range(1024)]  # as many as a frame may have messages

PRIORITY_MIN = 0
PRIORITY_MAX = 9
PRIORITY_DEFAULT = 5
CHANNEL_DEFAULT = "common"
RESERVED_CHANNEL_PREFIX = "droprd."

KIB = 1024
MIB = 1024 * KIB


def check_name(name: str, kind: str) -> str:
    """Return `name` if it may name a node, peer or channel (`kind` is that word, for the error).

    Raises: InvalidName.
    """
    if not isinstance(name, str) or not NAME_PATTERN.match(name) or _UUID.match(name):
        raise InvalidName(
            f"{name!r} cannot name a {kind}",
            why="names are 1 to 64 characters of a-z 0-9 . _ -, begin with a letter or digit, "
            "and are no UUID",
            hint=f"choose another {kind} name",
        )
    return name


def check_priority(priority: int) -> int:
    """Return `priority` if it lies in 0 (most urgent) to 9. Raises: UsageError."""
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 9:
        raise UsageError(
            f"priority {priority!r} is not possible",
            why="priorities go from 0 (most urgent) to 9",
            hint="use 5 if unsure",
        )
    return priority


def is_message_id(text: str) -> bool:
    """Whether `text` has the form of a message id."""
    return bool(_UUID.match(text))


def message_id(frame_id: bytes, index: int) -> str:
    """The id of message `index` of a frame, in the usual UUID notation."""
    h = frame_id[:14].hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}{index:04x}"


def message_ids(frame_id: bytes, count: int) -> list[str]:
    """The ids of all messages of a frame, in order."""
    h = frame_id[:14].hex()
    prefix = f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"
    return [prefix + index for index in _INDEXES[:count]]


def split_message_id(text: str) -> tuple[bytes, int]:
    """(frame id, index) of a message id. Raises ValueError if it is none."""
    if not is_message_id(text):
        raise ValueError(f"{text!r} is no message id")
    raw = bytes.fromhex(text.replace("-", ""))
    return raw[:14] + b"\0\0", int.from_bytes(raw[14:], "big")


class Lane(NamedTuple):
    """One direction of one stream as the sending node knows it: order holds within it."""

    peer: str
    channel: str
    priority: int

    def __str__(self) -> str:
        return f"{self.peer}/{self.channel}/{self.priority}"


class LaneKey(NamedTuple):
    """The same stream as the receiving node knows it; `peer` is its own name for the sender."""

    peer: str
    spool_id: bytes
    channel: str
    priority: int

    def __str__(self) -> str:
        return f"{self.peer}/{self.channel}/{self.priority} of spool {self.spool_id.hex()[:8]}"


class Head(NamedTuple):
    """How far a lane has come: how many messages, and the chain after the last frame.

    Equal heads mean equal history. The chain depends on frame ids, counts and order alone.
    """

    number: int
    chain: bytes


GENESIS = Head(0, bytes(16))


@dataclass(frozen=True, slots=True)
class Void:
    """A message that was accepted and whose body will not be delivered, with its reason."""

    index: int
    reason: str


class Clock(Protocol):
    """Where time comes from. Order and durability use boot time; only people read wall time."""

    def boot_id(self) -> bytes:
        """16 bytes that name this boot of this machine."""
        ...

    def boot_ns(self) -> int:
        """Nanoseconds since boot, suspended time included (CLOCK_BOOTTIME)."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since 1970 UTC. May jump."""
        ...
