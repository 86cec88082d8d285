"""Which messages a command means: a target, ids, and filters, as one value that can be sent.

`Selection` is made by droprctl of what the operator typed, travels to the worker that owns the
messages, and says there of each message whether it is meant. All its conditions must hold.

Pure. Raises UsageError for a selection that cannot be meant, BadData for one that cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast

from droprd.errors import BadData, InvalidName, UsageError
from droprd.model import check_name, check_priority, is_message_id

Box = Literal["", "outbox", "inbox"]
What = Literal["waiting", "dead", "sent", "any"]

IDS_A_CALL: Final = 1000  # 19 KB of the 64 KiB that a call may have
REASON_CHARS_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class Selection:
    """Messages that are meant.

    Attributes:
        what: those that wait, dead letters, those that were sent and are still kept, or any.
        box: of the outbox, the inbox, or both ("").
        peer, channel, priority: the target; "" and None mean all. In the inbox the peer is the
            sender.
        ids: raw message ids (16 bytes); None means all.
        reason: a regular expression that must be found in the reason of a dead letter.
        older_ms, newer_ms: sent at least, and less than, so many milliseconds ago.
    """

    what: What = "any"
    box: Box = ""
    peer: str = ""
    channel: str = ""
    priority: int | None = None
    ids: frozenset[bytes] | None = None
    reason: re.Pattern[str] | None = None
    older_ms: int | None = None
    newer_ms: int | None = None

    def wants(self, what: What, box: Box) -> bool:
        """Whether messages of this kind in this box are meant at all."""
        return self.what in ("any", what) and self.box in ("", box)

    def in_lane(self, peer: str, channel: str, priority: int) -> bool:
        """Whether messages of this lane are meant."""
        return (
            self.peer in ("", peer)
            and self.channel in ("", channel)
            and self.priority in (None, priority)
        )

    def of_age(self, age_ms: int) -> bool:
        """Whether messages sent so long ago are meant."""
        return (self.older_ms is None or age_ms >= self.older_ms) and (
            self.newer_ms is None or age_ms < self.newer_ms
        )

    def has_id(self, raw_id: bytes) -> bool:
        """Whether the message of this id is meant."""
        return self.ids is None or raw_id in self.ids

    def because(self, reason: str) -> bool:
        """Whether messages with this reason are meant."""
        return self.reason is None or self.reason.search(reason) is not None

    @property
    def whole_lanes(self) -> bool:
        """Whether all messages of the lanes that are meant are."""
        return self.ids is None and self.older_ms is None and self.newer_ms is None

    def with_ids(self, ids: Iterable[bytes]) -> Selection:
        """The same of these messages only."""
        return replace(self, ids=frozenset(ids))

    def with_what(self, what: What) -> Selection:
        """The same of another kind of messages."""
        return replace(self, what=what)

    def as_map(self) -> dict[str, Any]:
        """As a value for msgpack; what is not limited is left out."""
        found: dict[str, Any] = {"what": self.what, "box": self.box}
        if self.peer or self.channel or self.priority is not None:
            found |= {"peer": self.peer, "channel": self.channel, "priority": self.priority}
        if self.ids is not None:
            found["ids"] = sorted(self.ids)
        if self.reason is not None:
            found["reason"] = self.reason.pattern
        if self.older_ms is not None:
            found["older_ms"] = self.older_ms
        if self.newer_ms is not None:
            found["newer_ms"] = self.newer_ms
        return found

    def summary(self) -> str:
        """For the log: what was meant, in one short line without any id."""
        parts: list[str] = [self.box or "both boxes", self.what]
        target = [self.peer or "*"]
        target += [self.channel] if self.channel else []
        target += [str(self.priority)] if self.priority is not None else []
        parts.append("/".join(target))
        if self.ids is not None:
            parts.append(f"{len(self.ids)} ids")
        if self.reason is not None:
            parts.append(f"reason {self.reason.pattern!r}")
        if self.older_ms is not None:
            parts.append(f"older than {self.older_ms / 1000:g} s")
        if self.newer_ms is not None:
            parts.append(f"newer than {self.newer_ms / 1000:g} s")
        return ", ".join(parts)


def with_target(selection: Selection, target: str) -> Selection:
    """The same within PEER[/CHANNEL[/PRIORITY]]. Raises: UsageError, InvalidName."""
    if not target:
        return selection
    parts = target.split("/")
    if len(parts) > 3:
        raise UsageError(f"{target!r} is no target", hint="write PEER[/CHANNEL[/PRIORITY]]")
    check_name(parts[0], "peer")
    channel = check_name(parts[1], "channel") if len(parts) > 1 else selection.channel
    priority = selection.priority
    if len(parts) > 2:
        if len(parts[2]) != 1 or not parts[2].isdecimal():
            raise UsageError(f"{parts[2]!r} is no priority", hint="priorities go from 0 to 9")
        priority = check_priority(int(parts[2]))
    return replace(selection, peer=parts[0], channel=channel, priority=priority)


def compile_reason(pattern: str) -> re.Pattern[str]:
    """A regular expression for reasons. Raises: UsageError."""
    if len(pattern) > REASON_CHARS_MAX:
        raise UsageError("the regular expression is too long")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression", why=str(error)) from error


def raw_id(text: str) -> bytes:
    """The 16 bytes of a message id. Raises: UsageError."""
    lowered = text.strip().lower()
    if not is_message_id(lowered):
        raise UsageError(
            f"{text!r} is no message id",
            why="an id is a UUID, as `droprctl send` and `droprctl list` print it",
        )
    return bytes.fromhex(lowered.replace("-", ""))


def text_id(raw: bytes) -> str:
    """A message id in its usual notation."""
    h = raw.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def from_map(found: Any) -> Selection:
    """What `as_map` made. Raises: BadData, UsageError, InvalidName."""
    if not isinstance(found, Mapping):
        raise BadData("a selection is no map")
    what, box = found.get("what", "any"), found.get("box", "")
    if what not in ("waiting", "dead", "sent", "any") or box not in ("", "outbox", "inbox"):
        raise BadData("a selection speaks of kinds of messages that are unknown here")
    peer, channel, priority = found.get("peer", ""), found.get("channel", ""), found.get("priority")
    try:
        if peer:
            check_name(peer, "peer")
        if channel:
            check_name(channel, "channel")
        if priority is not None:
            check_priority(priority)
    except InvalidName as error:
        raise BadData("a selection names what cannot be a name", why=str(error)) from error
    reason = found.get("reason")
    if reason is not None and not isinstance(reason, str):
        raise BadData("the reason of a selection is no text")
    return Selection(
        what=cast(What, what),
        box=cast(Box, box),
        peer=peer,
        channel=channel,
        priority=priority,
        ids=_ids(found.get("ids")),
        reason=None if reason is None else compile_reason(reason),
        older_ms=_milliseconds(found.get("older_ms")),
        newer_ms=_milliseconds(found.get("newer_ms")),
    )


def _ids(found: Any) -> frozenset[bytes] | None:
    if found is None:
        return None
    if not isinstance(found, Sequence) or len(found) > IDS_A_CALL:
        raise BadData("the ids of a selection are no list, or too many")
    if not all(isinstance(one, bytes) and len(one) == 16 for one in found):
        raise BadData("an id of a selection is none")
    return frozenset(found)


def _milliseconds(found: Any) -> int | None:
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise BadData("an age of a selection is no number")
    return found
