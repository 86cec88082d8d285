"""Admission: whether a message may be accepted now: what the node published, and the room left.

Guarantees: nothing is refused halfway, for all of this is asked before anything is written. The
reserve (5 % of the file system, 1 MiB to 1 GiB) stays free for acks, reports and deletes. Looking
costs little: the file system is asked twice a second or every 8 MiB, the quota as often. While a
sender runs, its word counts (`outbox_full`); without one the quota is measured here.

Raises UnknownPeer, InvalidName, UsageError, MessageTooLarge, Draining, SpoolFull.
"""

from __future__ import annotations

import os

from droprd.errors import (
    Draining,
    InvalidName,
    MessageTooLarge,
    SpoolFull,
    UnknownPeer,
    UsageError,
)
from droprd.model import MIB, RESERVED_CHANNEL_PREFIX, Clock, Lane, check_name, check_priority
from droprd.settings.published import (
    RESERVE_BYTES_MAX,
    RESERVE_BYTES_MIN,
    RESERVE_PART,
    Public,
)
from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout, split_outbox_blob_name
from droprd.spool.state import read_gauges

LOOK_EVERY_NS = 500_000_000
LOOK_EVERY_BYTES = 8 * MIB
SPARE_PART = 8  # of the room left; several producers may write ahead at once


def lane_for(public: Public, to: str, channel: str, priority: int) -> Lane:
    """The lane of a message. Raises: InvalidName, UsageError, UnknownPeer, Draining."""
    check_name(to, "peer")
    check_name(channel, "channel")
    check_priority(priority)
    if channel.startswith(RESERVED_CHANNEL_PREFIX):
        raise InvalidName(
            f"channel {channel!r} is reserved",
            why=f"names that begin with {RESERVED_CHANNEL_PREFIX!r} are droprd's own",
            hint="choose another channel name",
        )
    peer = public.peers.get(to)
    if (peer is None or peer.unconfigured) and to != public.node:
        raise UnknownPeer(
            f"there is no peer {to!r}",
            why="it was removed" if peer is not None else f"node {public.node!r} has none so named",
            hint="`droprctl peer list` shows the peers, `droprctl peer add` makes one",
        )
    if peer is not None and peer.channels is not None and channel not in peer.channels:
        raise UsageError(
            f"peer {to!r} has no channel {channel!r}",
            why=f"its channels are {', '.join(sorted(peer.channels))}",
            hint=f"add it to `channels` of [peers.{to}]",
            code="channel_not_permitted",
        )
    lane = Lane(to, channel, priority)
    check_not_draining(public, lane)
    return lane


def check_not_draining(public: Public, lane: Lane) -> None:
    """Raises: Draining."""
    target = public.draining_target(*lane)
    if target is not None:
        raise Draining(
            f"no new message for {lane} is accepted",
            why=f"{target or 'the node'} is being drained",
            hint=f"`{f'droprctl resume {target}'.strip()}` lifts it",
        )


def check_size(public: Public, to: str, size: int) -> None:
    """Raises: MessageTooLarge."""
    peer = public.peers.get(to)
    largest = peer.max_message_bytes if peer is not None else public.max_message_bytes
    if size > largest:
        raise MessageTooLarge(
            f"a body of {size} bytes is too large for {to!r}",
            why=f"at most {largest} bytes are accepted (max_message_bytes)",
            hint="send it in parts, or raise the limit at both nodes",
        )


class Room:
    """How much the outbox may still grow."""

    def __init__(self, fs: Fs, clock: Clock, layout: Layout) -> None:
        self._fs = fs
        self._clock = clock
        self._layout = layout
        self._looked_ns: int | None = None
        self._left = 0
        self._taken = 0
        self._why = ""

    def take(self, public: Public, size: int) -> None:
        """Count on `size` bytes. Raises: SpoolFull; OSError if the file system cannot be asked."""
        if public.outbox_full is not None:
            raise self._full(public.outbox_full)
        now_ns = self._clock.boot_ns()
        if (
            self._looked_ns is None
            or size > self._left
            or self._taken > LOOK_EVERY_BYTES
            or now_ns - self._looked_ns > LOOK_EVERY_NS
        ):
            self._look(public)
            self._looked_ns = now_ns
        if size > self._left:
            raise self._full(self._why)
        self._left -= size
        self._taken += size

    def spare_bytes(self) -> int:
        """How much may be written ahead without getting near the reserve."""
        return max(0, self._left // SPARE_PART)

    def _look(self, public: Public) -> None:
        free, total = self._fs.free_bytes(self._layout.journals)
        reserve = public.reserve_bytes or min(
            max(total // RESERVE_PART, RESERVE_BYTES_MIN), RESERVE_BYTES_MAX
        )
        self._taken = 0
        self._left = free - reserve
        self._why = f"{free} bytes are free on its file system, {reserve} are kept in reserve"
        quota = public.outbox_quota_bytes
        if quota and not self._sender_listens():
            used = self._used()
            if quota - used < self._left:
                self._left = quota - used
                self._why = f"{used} bytes wait or may wait, outbox.quota_bytes is {quota}"

    def _sender_listens(self) -> bool:
        """Whether a sender runs: it knows what waits, and says so in `outbox_full`."""
        try:
            self._fs.close(self._fs.open(self._layout.bell, os.O_WRONLY))
        except OSError:
            return False
        return True

    def _used(self) -> int:
        """What may wait while no sender runs: all in journals, their blobs, and what it left.

        Rather too much: of a journal that was in use when the sender stopped, a part is merged.
        """
        peers = read_gauges(self._fs, self._layout, "sender").get("peers")
        left = peers.values() if isinstance(peers, dict) else ()
        used = sum(int(one.get("bytes") or 0) for one in left if isinstance(one, dict))
        for directory in (self._layout.journals, self._layout.outbox_blobs):
            for name in self._fs.listdir(directory):
                parts = split_outbox_blob_name(name)
                is_merged = parts is not None and parts[0] is None
                found = None if is_merged else self._fs.stat(f"{directory}/{name}")
                if found is not None:
                    used += found.blocks_bytes
        return used

    def _full(self, why: str) -> SpoolFull:
        return SpoolFull(
            "the spool has no room for this message",
            why=why,
            hint="free space, wait for deliveries, or see `droprctl status`",
        )
