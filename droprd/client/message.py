"""`Message`: one message that a consumer has leased.

Values are cut out of the frame only when they are asked for. What settles a message is passed on
to the `Inbox` it came from. A body over 32 KiB is a file and is checked against its checksum as it
is read: a mismatch raises SpoolCorrupt and makes the message a dead letter with reason `corrupt`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, BinaryIO, Protocol
from zlib import crc32

from droprd.core.claimops import REASON_CORRUPT
from droprd.core.frame import Frame
from droprd.core.leasing import Stored
from droprd.errors import LeaseLost, SpoolCorrupt
from droprd.model import is_message_id, message_id
from droprd.spool.inbox import Stream

LEASED, ACKED, NACKED, REJECTED, LOST = "leased", "acked", "nacked", "rejected", "lost"
_CHUNK_BYTES = 1 << 18


class Settler(Protocol):
    """What a message needs of the inbox it came from."""

    def ack(self, messages: Sequence[Message]) -> None: ...
    def _nack(self, message: Message, delay_s: float) -> None: ...
    def _reject(self, message: Message, reason: str) -> None: ...
    def _extend(self, message: Message, lease_s: float) -> None: ...
    def _blob_path(self, sender: str, frame_id: bytes) -> str: ...


class Held:
    """One lease of one stream, shared by the messages in it. Lease 0: only looked at."""

    __slots__ = ("inbox", "lease", "stream")

    def __init__(self, inbox: Settler, stream: Stream, lease: int) -> None:
        self.inbox = inbox
        self.stream = stream
        self.lease = lease


class Message:
    """A message from the inbox, leased to this consumer until it is settled or the lease ends.

    Settle it with `ack` (done), `nack` (try again later) or `reject` (dead letter). A message that
    is not settled before its lease ends comes again, to this consumer or to another.

    Attributes:
        attempt: how often it has been leased, this time included; the first is 1.
    """

    __slots__ = ("_held", "_seq", "_state", "_stored", "attempt")

    def __init__(self, held: Held, stored: Stored, seq: int, attempt: int) -> None:
        self._held = held
        self._stored = stored
        self._seq = seq
        self._state = LEASED
        self.attempt = attempt

    def __repr__(self) -> str:
        return (
            f"<Message {self.id} from {self.sender} on {self.channel}/{self.priority}, "
            f"{self.size} bytes, attempt {self.attempt}, {self._state}>"
        )

    @property
    def _index(self) -> int:
        return self._seq - self._stored.first

    @property
    def _frame(self) -> Frame:
        frame = self._stored.frame
        assert frame is not None  # a hole is never leased
        return frame

    def _of(self, key: str) -> Any:
        """A value that belongs to this message alone."""
        frame = self._frame
        if not frame.info.maps_bytes:
            # What all of one message share is its own.
            return frame.shared.get(key) if frame.info.messages == 1 else None
        return frame.singles.get(self._index, {}).get(key)

    @property
    def id(self) -> str:
        """The id that `send()` returned: a UUIDv7 in its usual notation."""
        own = self._of("i")
        if isinstance(own, str) and is_message_id(own):
            return own  # it was requeued, in a new frame
        return message_id(self._frame.frame_id, self._index)

    @property
    def sender(self) -> str:
        """The node it came from: this node's own name for the credential that brought it."""
        return self._stored.sender

    @property
    def channel(self) -> str:
        """The channel it was sent on."""
        return self._held.stream.channel

    @property
    def priority(self) -> int:
        """0 (most urgent) to 9."""
        return self._held.stream.priority

    @property
    def body(self) -> bytes:
        """The body as it was sent. A large one is read into memory whole; see `open`.

        Raises: SpoolCorrupt if a large body is missing or damaged.
        """
        stored = self._stored
        if stored.bodies is None:
            with self.open() as file:
                return file.read()
        return bytes(stored.bodies[self._seq - stored.first])

    @property
    def size(self) -> int:
        """The length of the body in bytes."""
        info = self._frame.info
        return info.bodies_bytes if info.is_blob else self._frame.lengths[self._index]

    @property
    def headers(self) -> Mapping[str, Any]:
        """The headers it was sent with."""
        merged: dict[str, Any] = {}
        for found in (self._frame.shared.get("h"), self._of("h")):
            if isinstance(found, dict):
                merged.update(found)
        return merged

    @property
    def content_type(self) -> str | None:
        """What the sender said the body is, or None."""
        found = self._of("t") or self._frame.shared.get("t")
        return found if isinstance(found, str) else None

    @property
    def created(self) -> datetime:
        """When it was sent, by the sender's wall clock (UTC)."""
        return datetime.fromtimestamp(self._frame.info.wall_ns / 1e9, UTC)

    def open(self) -> BinaryIO:
        """The body as a file to read from, for bodies that should not sit in memory.

        Its end is reached without an error only if the body is as it was sent.

        Raises: SpoolCorrupt, here or while reading.
        """
        frame = self._frame
        if not frame.info.is_blob:
            return io.BytesIO(self.body)
        path = self._held.inbox._blob_path(self.sender, frame.frame_id)
        try:
            raw = io.FileIO(path)
        except FileNotFoundError:
            raise self._damaged("its file is missing") from None
        return io.BufferedReader(_Checked(raw, self), _CHUNK_BYTES)

    def ack(self) -> None:
        """The message is done. Acking again does nothing.

        When this returns, it survives the death of this process; a power cut may take it until the
        next `receive()` or `flush()`, and the message then comes again.

        Raises: LeaseLost if the lease has ended.
        """
        self._held.inbox.ack((self,))

    def nack(self, delay_s: float = 0) -> None:
        """Give the message back; it can be leased again after `delay_s` seconds.

        After `max_attempts` of its channel it becomes a dead letter instead.

        Raises: LeaseLost if the lease has ended.
        """
        self._held.inbox._nack(self, delay_s)

    def reject(self, reason: str) -> None:
        """Make the message a dead letter: nobody gets it again unless an operator requeues it.

        Raises: LeaseLost if the lease has ended.
        """
        self._held.inbox._reject(self, reason)

    def extend(self, lease_s: float) -> None:
        """Hold the lease of this message for `lease_s` seconds from now.

        Raises: LeaseLost if the lease has ended.
        """
        self._held.inbox._extend(self, lease_s)

    def _damaged(self, why: str) -> SpoolCorrupt:
        if self._state == LEASED and self._held.lease:
            with suppress(LeaseLost):
                self.reject(REASON_CORRUPT)
        return SpoolCorrupt(
            f"the body of message {self.id} cannot be read",
            why=why,
            hint="it is a dead letter now; run `droprctl fsck`",
        )


class _Checked(io.RawIOBase):
    """The file of a large body; its end is an error if the bytes were not those that were sent."""

    def __init__(self, raw: io.FileIO, message: Message) -> None:
        self._raw = raw
        self._message = message
        self._crc = 0
        self._read_bytes = 0

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int:
        n = self._raw.readinto(buffer) or 0
        if n:
            self._crc = crc32(memoryview(buffer)[:n], self._crc)
            self._read_bytes += n
            return n
        frame = self._message._frame
        if self._read_bytes != frame.info.bodies_bytes or self._crc != frame.crcs[0]:
            raise self._message._damaged("its bytes do not match their checksum")
        return 0

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()
