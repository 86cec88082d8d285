"""An inbox in memory, for tests of applications and of consuming itself.

`MemoryInbox` is an inbox for tests of applications: `deliver` puts messages in, and
`droprd.Inbox(store=memory.open)` consumes them, in as many consumers (and threads) as you like,
within one process. `open_writer` gives its other side, into which a receiver pushes.

`Backend` is what `droprd.testing.inboxsuite` needs of a store to try the rules of consuming on it.
"""

from __future__ import annotations

import os
import select
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
from droprd.core.leasing import Stored
from droprd.errors import SpoolBusy
from droprd.model import PRIORITY_DEFAULT, Clock, Lane, message_ids
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import Fs
from droprd.spool.handle import Spool
from droprd.spool.inbox import InboxStore
from droprd.spool.judging import Limits
from droprd.spool.staged import StreamKey
from droprd.testing.memorywriter import MemoryWriter
from droprd.testing.shelves import Ear, Shelf, Shelves

READ_AT_ONCE = 256


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


class MemoryStream:
    """A `Stream` in memory."""

    def __init__(self, shelf: Shelf, channel: str, priority: int) -> None:
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
        return self._shelf.begin()

    def end(self) -> int:
        return self._shelf.end

    def grown(self, seq: int) -> bool:
        return seq < self._shelf.end

    def read(self, seq: int) -> Iterator[Stored]:
        shelf = self._shelf
        while True:
            with shelf.mutex:  # what is settled may be dropped between two looks
                at = max(0, bisect_right(shelf.firsts, seq) - 1)
                piece = [one for one in shelf.stored[at : at + READ_AT_ONCE] if one.end > seq]
            if not piece:
                return
            yield from piece
            seq = piece[-1].end


class MemoryInbox:
    """An inbox in memory, with both its sides.

    `open` makes a consumer's store, to be given to `droprd.Inbox`; `deliver` puts messages in. A
    receiver's side is made by `open_writer`; with `open_consumer` that makes this object what an
    entry point of `droprd.inboxes` may lead to.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._shelves = Shelves(self._clock)

    def open(self) -> MemoryConsumer:
        """A new consumer."""
        return MemoryConsumer(self._shelves)

    def open_consumer(
        self, fs: Fs, clock: Clock, urandom: Callable[[int], bytes], spool: str, /
    ) -> MemoryConsumer:
        """A new consumer, whatever the spool."""
        return self.open()

    def open_writer(self, spool: Spool, limits: Limits, /) -> MemoryWriter:
        """The one writer, whatever the spool."""
        return MemoryWriter(self._shelves, limits)

    def deliver(self, bodies: Sequence[bytes], **about: Any) -> list[str]:
        """Put messages in, as one frame; keywords as of `Arrival`. Returns their ids."""
        channel = about.setdefault("channel", "sites")
        priority = about.setdefault("priority", PRIORITY_DEFAULT)
        arrival = Arrival(self._clock, bodies, seq=0, **about)
        if arrival.blob is not None:
            path = self._shelves.layout.inbox_blob(arrival.note["p"], arrival.frame_id)
            Path(path).write_bytes(arrival.blob)
        self._shelves.shelf((channel, priority)).put(arrival.note, arrival.frame)
        self._shelves.ring([channel])
        return arrival.ids


class MemoryConsumer:
    """The `InboxStore` in memory."""

    def __init__(self, shelves: Shelves) -> None:
        self._shelves = shelves
        self._ear = Ear()
        self._streams: dict[StreamKey, MemoryStream] = {}
        shelves.join(self._ear)

    @property
    def consumer(self) -> bytes:
        return self._ear.consumer

    def hear(self, channels: Collection[str]) -> None:
        self._ear.heard.update(channels)

    def streams(self, channel: str, *, again: bool) -> list[MemoryStream]:
        return [
            self._streams.setdefault(key, MemoryStream(shelf, *key))
            for key, shelf in self._shelves.all()
            if key[0] == channel
        ]

    def channels(self) -> list[str]:
        return sorted({channel for (channel, _), _ in self._shelves.all()})

    def alive(self, consumer: bytes) -> bool:
        return self._shelves.alive(consumer)

    def ring(self, channels: Collection[str]) -> None:
        self._shelves.ring(channels, self.consumer)

    def fileno(self) -> int:
        return self._ear.fd

    def drain(self) -> bool:
        try:
            os.eventfd_read(self._ear.fd)
        except BlockingIOError:
            return False
        return True

    def wait(self, timeout_s: float, watch: Collection[bytes], wakeup_fd: int) -> None:
        poll = select.poll()
        poll.register(self._ear.fd, select.POLLIN)
        poll.register(wakeup_fd, select.POLLIN)
        if all(map(self._shelves.alive, watch)):
            poll.poll(max(1, int(timeout_s * 1000 + 0.999)))

    def blob_path(self, sender: str, frame_id: bytes) -> str:
        return self._shelves.layout.inbox_blob(sender, frame_id)

    def close(self) -> None:
        self._shelves.leave(self.consumer)

    def close_in_child(self) -> None:
        """Vanish as a killed process does."""
        self._shelves.leave(self.consumer)


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
