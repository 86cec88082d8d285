"""The consumer's side of an inbox: the interface `InboxStore`, and the one that is made of files.

A store gives a consumer its identity, the *streams* (one channel and priority each) with their
claims and frames, the bodies that are files, and a way to wait and to wake others. All rules of
consuming are in `droprd.core.leasing` and `droprd.client.inbox`, the same for every store.

`FilesInbox` reads the log files itself, so it works whether the daemon runs or not; it writes
nothing but claims and its own FIFO. Its guarantees are those of `droprd.spool.claims`,
`droprd.spool.channelreader` and `droprd.spool.bells`.

A crash of the consumer frees its FIFO's lock, by which the others see that its leases have ended.
Raises SpoolNotReady, SpoolBusy, SpoolCorrupt, OSError.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from droprd.core.claimops import Op
from droprd.core.claims import Claims
from droprd.core.leasing import Stored
from droprd.errors import InvalidName, SpoolNotReady
from droprd.model import Clock, check_name
from droprd.spool import bells
from droprd.spool.channelreader import ChannelReader
from droprd.spool.claims import ClaimsFile
from droprd.spool.fsops import Fs
from droprd.spool.layout import RECEIVE_GROUP, Layout, read_version


class Stream(Protocol):
    """One channel and priority. Used by one thread at a time."""

    channel: str
    priority: int

    def known(self) -> Claims:
        """The claims as this consumer last read them; costs nothing."""
        ...

    def look(self) -> Claims:
        """The claims as last written, without the lock: they may be old at once."""
        ...

    def acquire(self, timeout_s: float) -> Claims:
        """Take the lock and return the claims as they are. Raises: SpoolBusy, SpoolCorrupt."""
        ...

    def release(self) -> None:
        """Give the lock back."""
        ...

    def append(self, ops: Sequence[Op]) -> None:
        """Change the claims, for every consumer to see. Only while holding the lock."""
        ...

    def sync(self) -> bool:
        """Bring the claims to stable storage; True if there was something to bring."""
        ...

    def begin(self) -> int:
        """The seq of the oldest message stored."""
        ...

    def end(self) -> int:
        """The seq after the newest message stored."""
        ...

    def grown(self, seq: int) -> bool:
        """Whether there may be a message `seq` or a later one."""
        ...

    def read(self, seq: int) -> Iterator[Stored]:
        """The frames from the one that holds `seq` on."""
        ...


class InboxStore(Protocol):
    """An inbox as one consumer sees it."""

    @property
    def consumer(self) -> bytes:
        """16 bytes by which the others know this consumer."""
        ...

    def hear(self, channels: Collection[str]) -> None:
        """Be woken by these channels too. Before looking, so that nothing is missed."""
        ...

    def streams(self, channel: str, *, again: bool) -> Sequence[Stream]:
        """The streams of a channel, most urgent first. With `again`, looks for new ones."""
        ...

    def channels(self) -> list[str]:
        """The channels that are there."""
        ...

    def alive(self, consumer: bytes) -> bool:
        """Whether another consumer's process lives."""
        ...

    def ring(self, channels: Collection[str]) -> None:
        """Wake the other consumers of these channels."""
        ...

    def fileno(self) -> int:
        """A descriptor that becomes readable when something has come."""
        ...

    def drain(self) -> bool:
        """Forget what woke us, before looking. True if something had."""
        ...

    def wait(self, timeout_s: float, watch: Collection[bytes], wakeup_fd: int) -> None:
        """Wait until rung, a watched consumer has died, `wakeup_fd` is readable, or the timeout."""
        ...

    def blob_path(self, sender: str, frame_id: bytes) -> str:
        """Where the body of a blob frame lies, to be opened for reading."""
        ...

    def close(self) -> None:
        """Leave the inbox. Leases still held end."""
        ...

    def close_in_child(self) -> None:
        """After a fork: close all descriptors, leave all names and locks to the parent."""
        ...


class FilesStream:
    """A `Stream` of files: the segments and the claims of one directory."""

    def __init__(self, fs: Fs, layout: Layout, channel: str, priority: int, boot_id: bytes) -> None:
        self.channel = channel
        self.priority = priority
        self.claims = ClaimsFile(fs, layout.claims(channel, priority), boot_id)
        self.log = ChannelReader(fs, layout.stream(channel, priority))
        self.look = self.claims.look
        self.acquire = self.claims.acquire
        self.release = self.claims.release
        self.append = self.claims.append
        self.sync = self.claims.sync
        self.begin = self.log.begin
        self.end = self.log.end
        self.grown = self.log.grown
        self.read = self.log.read

    def known(self) -> Claims:
        """See `Stream.known`."""
        return self.claims.state

    def close(self) -> None:
        """Close all files; the next use opens them again."""
        self.claims.close()
        self.log.close()


def stream_priorities(fs: Fs, layout: Layout, channel: str) -> list[int]:
    """The priorities of a channel that can be consumed: those whose claims file is there."""
    try:
        names = fs.listdir(layout.channel(channel))
    except (FileNotFoundError, NotADirectoryError):
        return []
    priorities = [int(name) for name in names if name in "0123456789"]
    return [p for p in priorities if fs.stat(layout.claims(channel, p)) is not None]


def channel_names(fs: Fs, layout: Layout) -> list[str]:
    """The channels of an inbox. Raises: OSError."""
    names = []
    for name in fs.listdir(layout.channels):
        with suppress(InvalidName):
            names.append(check_name(name, "channel"))
    return names


class FilesInbox:
    """The `InboxStore` of files, in the spool at `root`.

    Raises: SpoolNotReady if there is no spool, or its inbox may not be used by this user.
    """

    def __init__(self, fs: Fs, clock: Clock, urandom: Callable[[int], bytes], root: str) -> None:
        read_version(fs, root)
        self._fs = fs
        self._boot_id = clock.boot_id()
        self._layout = layout = Layout(root)
        self._streams: dict[str, list[FilesStream]] = {}
        try:
            self._bell = bells.WaitingBell(fs, layout, urandom)
        except OSError as error:
            raise SpoolNotReady(
                f"this user cannot consume from the spool at {root}",
                why=f"{layout.waiting}: {error.strerror}",
                hint=f"join the group {RECEIVE_GROUP}, or use the spool's own user",
                code="spool_rights",
            ) from error
        self.consumer = self._bell.consumer
        self._waiting = bells.Waiting(fs, layout, self.consumer)

    def hear(self, channels: Collection[str]) -> None:
        """See `InboxStore.hear`."""
        self._bell.hear(channels)

    def streams(self, channel: str, *, again: bool) -> list[FilesStream]:
        """See `InboxStore.streams`."""
        known = self._streams.get(channel)
        if known is not None and not again:
            return known
        have = {stream.priority: stream for stream in known or ()}
        found = [
            have.get(p) or FilesStream(self._fs, self._layout, channel, p, self._boot_id)
            for p in stream_priorities(self._fs, self._layout, channel)
        ]
        self._streams[channel] = found
        return found

    def channels(self) -> list[str]:
        """See `InboxStore.channels`."""
        return channel_names(self._fs, self._layout)

    def alive(self, consumer: bytes) -> bool:
        """See `InboxStore.alive`."""
        return self._waiting.alive(consumer)

    def ring(self, channels: Collection[str]) -> None:
        """See `InboxStore.ring`."""
        self._waiting.ring(channels)

    def fileno(self) -> int:
        """See `InboxStore.fileno`."""
        return self._bell.fd

    def drain(self) -> bool:
        """See `InboxStore.drain`."""
        return bells.drain(self._bell.fd)

    def wait(self, timeout_s: float, watch: Collection[bytes], wakeup_fd: int) -> None:
        """See `InboxStore.wait`."""
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        poll.register(wakeup_fd, select.POLLIN)
        watched: list[int] = []
        try:
            for consumer in watch:
                fd = self._waiting.watch(consumer)
                if fd is None:
                    return
                watched.append(fd)
                poll.register(fd, 0)  # only its error, when the last reader has gone
            poll.poll(max(1, int(timeout_s * 1000 + 0.999)))
        finally:
            for fd in watched:
                os.close(fd)

    def blob_path(self, sender: str, frame_id: bytes) -> str:
        """See `InboxStore.blob_path`."""
        return self._layout.inbox_blob(sender, frame_id)

    def close(self) -> None:
        """See `InboxStore.close`."""
        self._close_streams()
        self._waiting.close()
        self._bell.close()

    def close_in_child(self) -> None:
        """See `InboxStore.close_in_child`. Also what a killed process leaves, for tests."""
        self._close_streams()
        self._waiting.close()
        self._bell.close_in_child()

    def _close_streams(self) -> None:
        for streams in self._streams.values():
            for stream in streams:
                stream.close()
