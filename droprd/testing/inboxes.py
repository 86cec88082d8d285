"""An inbox in memory, for tests of applications and of consuming itself.

`MemoryInbox` is an inbox for tests of applications: `deliver` puts messages in, and
`droprd.Inbox(store=memory.open)` consumes them, in as many consumers (and threads) as you like,
within one process.

`Backend` is what `droprd.testing.inboxsuite` needs of a store to try the rules of consuming on it.
"""

from __future__ import annotations

import os
import select
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

from droprd.core import frame as frames
from droprd.core.claimops import Op
from droprd.core.claims import Claims
from droprd.core.entry import pack_note
from droprd.core.leasing import Stored, read_stored
from droprd.errors import SpoolBusy
from droprd.model import PRIORITY_DEFAULT, Clock, Lane, message_ids
from droprd.spool.clock import SystemClock
from droprd.spool.inbox import InboxStore


class Arrival:
    """One frame as a receiver would store it: the note's map and the frame's bytes.

    `elapsed_ms` is how long it was on its way, `voids` are the reasons of messages without a body,
    `own_ids` the ids of requeued ones, each by index in the frame.
    """

    def __init__(
        self,
        clock: Clock,
        bodies: Sequence[bytes],
        *,
        seq: int,
        channel: str = "sites",
        priority: int = PRIORITY_DEFAULT,
        sender: str = "hamburg",
        ttl_ms: int = 0,
        delay_ms: int = 0,
        elapsed_ms: int = 0,
        headers: Mapping[str, Any] | None = None,
        voids: Mapping[int, str] | None = None,
        own_ids: Mapping[int, str] | None = None,
    ) -> None:
        boot_id, boot_ns, wall_ns = clock.boot_id(), clock.boot_ns(), clock.wall_ns()
        self.frame_id = frames.new_frame_id(wall_ns, os.urandom(10))
        lane = Lane("here", channel, priority)
        stamp = frames.Stamp(boot_id, boot_ns, wall_ns)
        shared = frames.pack_map({"h": dict(headers)} if headers else {})
        singles = [(index, {"i": own}) for index, own in (own_ids or {}).items()]
        self.blob: bytes | None = None
        if len(bodies) == 1 and len(bodies[0]) > frames.BODIES_BYTES_MAX:
            self.blob = bodies[0]
            pieces = frames.build_blob(
                frame_id=self.frame_id,
                lane=lane,
                stamp=stamp,
                blob_bytes=len(bodies[0]),
                blob_crc=crc32(bodies[0]),
                shared=shared,
                ttl_ms=ttl_ms,
                delay_ms=delay_ms,
            )
        else:
            pieces = frames.build(
                frame_id=self.frame_id,
                lane=lane,
                stamp=stamp,
                bodies=bodies,
                shared=shared,
                singles=singles,
                ttl_ms=ttl_ms,
                delay_ms=delay_ms,
            )
        data = b"".join(pieces)
        self.note: dict[str, Any] = {"p": sender, "s": bytes(16), "n": seq, "h": bytes(16)}
        self.note |= {"q": seq, "b": boot_id, "t": boot_ns, "w": wall_ns, "e": elapsed_ms}
        if voids:
            self.note["v"] = [[index, reason] for index, reason in voids.items()]
            data = b"".join(frames.parse(data).without(list(voids)))
        self.frame = data
        self.count = len(bodies)
        self.ids = message_ids(self.frame_id, self.count)
        for index, own in (own_ids or {}).items():
            self.ids[index] = own


class _Shelf:
    """All of one channel and priority, shared by the consumers of a `MemoryInbox`."""

    def __init__(self, boot_id: bytes) -> None:
        self.claims = Claims(boot_id)
        self.stored: list[Stored] = []
        self.firsts: list[int] = []
        self.lock = threading.Lock()

    @property
    def end(self) -> int:
        return self.stored[-1].end if self.stored else 0


class MemoryStream:
    """A `Stream` in memory."""

    def __init__(self, shelf: _Shelf, channel: str, priority: int) -> None:
        self._shelf = shelf
        self.channel = channel
        self.priority = priority

    def known(self) -> Claims:
        return self._shelf.claims

    def look(self) -> Claims:
        return self._shelf.claims

    def acquire(self, timeout_s: float) -> Claims:
        if not self._shelf.lock.acquire(timeout=timeout_s):
            raise SpoolBusy(f"{self.channel}/{self.priority} is locked")
        return self._shelf.claims

    def release(self) -> None:
        self._shelf.lock.release()

    def append(self, ops: Sequence[Op]) -> None:
        self._shelf.claims.apply(ops)

    def sync(self) -> bool:
        return False

    def begin(self) -> int:
        return 0

    def end(self) -> int:
        return self._shelf.end

    def grown(self, seq: int) -> bool:
        return seq < self._shelf.end

    def read(self, seq: int) -> Iterator[Stored]:
        shelf = self._shelf
        at = max(0, bisect_right(shelf.firsts, seq) - 1)
        while at < len(shelf.stored):
            if shelf.stored[at].end > seq:
                yield shelf.stored[at]
            at += 1


class MemoryInbox:
    """An inbox in memory. `open` makes a consumer's store, to be given to `droprd.Inbox`."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._shelves: dict[tuple[str, int], _Shelf] = {}
        self._consumers: dict[bytes, MemoryConsumer] = {}
        self._mutex = threading.Lock()
        self._blobs: tempfile.TemporaryDirectory[str] | None = None

    def open(self) -> MemoryConsumer:
        """A new consumer."""
        consumer = MemoryConsumer(self)
        with self._mutex:
            self._consumers[consumer.consumer] = consumer
        return consumer

    def deliver(self, bodies: Sequence[bytes], **about: Any) -> list[str]:
        """Put messages in, as one frame; keywords as of `Arrival`. Returns their ids."""
        channel = about.setdefault("channel", "sites")
        priority = about.setdefault("priority", PRIORITY_DEFAULT)
        with self._mutex:
            shelf = self._shelves.setdefault((channel, priority), _Shelf(self._clock.boot_id()))
            arrival = Arrival(self._clock, bodies, seq=shelf.end, **about)
            stored = read_stored(pack_note(arrival.note), memoryview(arrival.frame), (0, 0, 0))
            if arrival.blob is not None:
                Path(self.blob_path(arrival.frame_id)).write_bytes(arrival.blob)
            shelf.firsts.append(stored.first)
            shelf.stored.append(stored)
        self.ring([channel])
        return arrival.ids

    def ring(self, channels: Collection[str] | None, own: bytes = b"") -> None:
        """Wake the consumers of these channels, or all."""
        with self._mutex:
            for consumer in self._consumers.values():
                if consumer.consumer != own and (
                    channels is None or not consumer.heard.isdisjoint(channels)
                ):
                    os.eventfd_write(consumer.fd, 1)

    def leave(self, consumer: bytes) -> None:
        """A consumer is gone; those who wait for its leases look again."""
        with self._mutex:
            gone = self._consumers.pop(consumer, None)
            if gone is not None:
                os.close(gone.fd)
        self.ring(None)

    def alive(self, consumer: bytes) -> bool:
        """Whether that consumer is there."""
        return consumer in self._consumers

    def shelves(self, channel: str) -> list[tuple[int, _Shelf]]:
        """The priorities of a channel, most urgent first."""
        with self._mutex:
            return sorted(
                ((p, shelf) for (c, p), shelf in self._shelves.items() if c == channel),
                key=lambda one: one[0],
            )

    def channels(self) -> list[str]:
        """The channels that have got something."""
        with self._mutex:
            return sorted({channel for channel, _ in self._shelves})

    def blob_path(self, frame_id: bytes) -> str:
        """The file of a large body."""
        if self._blobs is None:
            self._blobs = tempfile.TemporaryDirectory(prefix="droprd-memory-inbox-")
        return f"{self._blobs.name}/{frame_id.hex()}"


class MemoryConsumer:
    """The `InboxStore` in memory."""

    def __init__(self, shared: MemoryInbox) -> None:
        self.consumer = os.urandom(16)
        self.heard: set[str] = set()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._shared = shared
        self._streams: dict[tuple[str, int], MemoryStream] = {}

    def hear(self, channels: Collection[str]) -> None:
        self.heard.update(channels)

    def streams(self, channel: str, *, again: bool) -> list[MemoryStream]:
        return [
            self._streams.setdefault((channel, p), MemoryStream(shelf, channel, p))
            for p, shelf in self._shared.shelves(channel)
        ]

    def channels(self) -> list[str]:
        return self._shared.channels()

    def alive(self, consumer: bytes) -> bool:
        return self._shared.alive(consumer)

    def ring(self, channels: Collection[str]) -> None:
        self._shared.ring(channels, self.consumer)

    def fileno(self) -> int:
        return self.fd

    def drain(self) -> bool:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def wait(self, timeout_s: float, watch: Collection[bytes], wakeup_fd: int) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(wakeup_fd, select.POLLIN)
        if all(map(self._shared.alive, watch)):
            poll.poll(max(1, int(timeout_s * 1000 + 0.999)))

    def blob_path(self, sender: str, frame_id: bytes) -> str:
        return self._shared.blob_path(frame_id)

    def close(self) -> None:
        self._shared.leave(self.consumer)

    def close_in_child(self) -> None:
        """Vanish as a killed process does."""
        self._shared.leave(self.consumer)


class Backend(Protocol):
    """A store under test."""

    def deliver(self, bodies: Sequence[bytes], **about: Any) -> list[str]:
        """Put messages in, as one frame; keywords as of `Arrival`. Returns their ids."""
        ...

    def open(self) -> InboxStore:
        """A new consumer."""
        ...

    def kill(self, store: InboxStore) -> None:
        """Make that consumer vanish as if its process had been killed."""
        ...


def eventually(condition: Callable[[], bool], within_s: float = 10) -> None:
    """Wait until the condition holds; fail if it does not in time."""
    until_s = time.monotonic() + within_s
    never = threading.Event()
    while not condition():
        assert time.monotonic() < until_s, "this did not come true in time"
        never.wait(0.002)
