"""`Inbox`: how an application receives messages. Works with the daemon stopped or running.

Owns one consumer's identity and its leases. Safe with threads, which share the identity and its
leases, and after `fork()`: the child closes what it inherited and becomes a consumer of its own
(a message leased before the fork can be settled by either). Another user than the spool's owner
can consume if it is in the group droprd-receive.

What `ack`, `nack` and `reject` write is in the claims file when they return. `flush()`, `close()`
and any `receive()` that begins, or still waits, 20 ms later bring it to stable storage: one sync
for all that was settled meanwhile. The daemon does so within a second. A process that dies frees
its leases at once.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from droprd.client.message import ACKED, LEASED, NACKED, REJECTED, Held, Message
from droprd.client.settling import by_lease, disk, lost_leases, seconds_ns
from droprd.client.stores import open_inbox_store
from droprd.client.taking import Look, Policy, Taker, asked_for
from droprd.client.unsynced import Unsynced
from droprd.core import claimops, leasing
from droprd.core.claimops import Now, Op, Range
from droprd.core.claims import Claims
from droprd.errors import SpoolBusy, UsageError
from droprd.model import Clock
from droprd.settings.published import Public, Published, find_node
from droprd.spool.claims import LOCK_TIMEOUT_S
from droprd.spool.clock import SystemClock
from droprd.spool.inbox import InboxStore, Stream
from droprd.spool.layout import Layout

LOCK_TURN_S = 0.1
REASON_CHARS_MAX = 1024
WALL_CLOCK_PARTED_NS = 300_000_000_000

_open_inboxes: weakref.WeakSet[Inbox] = weakref.WeakSet()


class Inbox:
    """Receives messages on this node.

    Args:
        spool: directory of the spool; without it, the configuration says where it is.
        config: path of droprd.toml; without it $DROPRD_CONFIG, then /etc/droprd/droprd.toml.
        store: makes the store to consume from, instead of the one configured (for tests:
            `droprd.testing.inboxes.MemoryInbox().open`).

    Use it in a `with` statement, or call `close()`: leases still held then end at once.

    Raises: ConfigError if there is no usable configuration; SpoolNotReady if there is no spool, it
        is of another version, or this user may not consume from it.
    """

    def __init__(
        self,
        spool: str | os.PathLike[str] | None = None,
        *,
        config: str | os.PathLike[str] | None = None,
        store: Callable[[], InboxStore] | None = None,
    ) -> None:
        self._clock: Clock = SystemClock()
        self._published: Published | None = None
        if store is not None:
            self._open_store = store
        else:
            node = find_node(
                None if config is None else os.fspath(config),
                spool=None if spool is None else os.fspath(spool),
            )
            self._published = Published(Layout(node.spool).public)
            self._open_store = lambda: open_inbox_store(node, self._clock)
        self._parted_ns = self._clock.wall_ns() - self._clock.boot_ns()
        self._closed = False
        self._opened: tuple[InboxStore, Taker] | None = None
        self._reset()
        with self._mutex:
            self._enter()
        _open_inboxes.add(self)

    def _reset(self) -> None:
        self._mutex = threading.RLock()
        self._opened = None
        self._heard: set[str] = set()
        self._unsynced = Unsynced()
        self._sleepers: set[int] = set()

    def __enter__(self) -> Inbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        opened = getattr(self, "_opened", None)
        if opened is not None:
            # As if this process had died: nothing is written here, others end the leases.
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            with suppress(OSError):
                opened[0].close_in_child()

    # Receiving

    def receive(
        self,
        *channels: str,
        wait_s: float = 0,
        lease_s: float = 60,
        max_messages: int = 100,
    ) -> list[Message]:
        """Lease messages: most urgent priority first, then the channels in turn, then arrival.

        Nobody else gets them until they are settled or the lease ends: after `lease_s`, or at once
        when this process dies. Order within a (sender, channel, priority) is that of sending. A
        message whose lease ended unsettled comes alone.

        Args:
            channels: one or more names; one that does not exist yet is waited for.
            wait_s: how many seconds to wait for a message, if there is none.
            lease_s: how many seconds the messages stay leased.
            max_messages: the most messages to return.

        Returns: the messages; an empty list if none came within `wait_s`.

        Raises: InvalidName, UsageError; SpoolCorrupt if nothing came and claims of these channels
            cannot be read; SpoolNotReady, SpoolFull if they cannot be written.
        """
        names = asked_for(channels, max_messages)
        lease_ns = seconds_ns(lease_s, "lease_s", least=0.001)
        until_s = time.monotonic() + seconds_ns(wait_s, "wait_s") / 1e9
        while True:
            with self._mutex:
                store, taker = self._enter()
                self._unsynced.sync_if_due()
                if not self._heard.issuperset(names):
                    store.hear(names)
                    self._heard.update(names)
                if store.drain():
                    self._wake_sleepers()
                look = Look(self._now(), lease_ns, max_messages)
                with disk("the inbox cannot be read or claimed from"):
                    taker.take(names, look)
            if look.messages:
                return look.messages
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                if look.fault is not None:
                    raise look.fault
                return []
            self._wait(store, min(left_s, look.again_ns / 1e9), look)

    def peek(self, *channels: str, max_messages: int = 100) -> list[Message]:
        """What `receive` would return now, leasing and counting nothing.

        The messages can be read but not settled. Raises: as `receive`.
        """
        names = asked_for(channels, max_messages)
        with self._mutex:
            _, taker = self._enter()
            look = Look(self._now(), 0, max_messages)
            with disk("the inbox cannot be read"):
                taker.peek(names, look)
        if look.fault is not None and not look.messages:
            raise look.fault
        return look.messages

    def fileno(self) -> int:
        """A descriptor for event loops: readable when something may have come.

        It speaks for the channels that `receive` has been called with (call it with `wait_s=0`,
        first once and then whenever this is readable, until it returns nothing).
        """
        with self._mutex:
            return self._enter()[0].fileno()

    # Settling

    def ack(self, messages: Sequence[Message]) -> None:
        """The messages are done: one note for all of a channel and priority.

        Messages acked before are passed over. See `Message.ack` for what survives what.

        Raises: LeaseLost if leases of some have ended; the others are acked all the same.
            SpoolBusy if another process has sat on the channel's claims for ten seconds; SpoolFull,
            SpoolNotReady, SpoolCorrupt if they cannot be written. Try again then.
        """
        self._settle(messages, ACKED, lambda lease, ranges, _: claimops.op_ack(lease, ranges))

    def flush(self) -> None:
        """Bring everything settled so far to stable storage. Raises: SpoolNotReady, SpoolFull."""
        with self._mutex:
            self._enter()
            self._unsynced.sync()

    def close(self) -> None:
        """End the leases still held (their messages come again, each alone), sync, and leave."""
        with self._mutex:
            if self._closed:
                return
            if self._opened is not None:
                store, taker = self._opened
                try:
                    with disk("the inbox cannot be left in order"):
                        self._give_back(store, taker)
                        self._unsynced.sync()
                finally:
                    self._closed = True
                    self._opened = None
                    store.close()
            self._closed = True
            self._wake_sleepers()
        _open_inboxes.discard(self)

    def _nack(self, message: Message, delay_s: float) -> None:
        delay_ns = seconds_ns(delay_s, "delay_s")
        attempts_max = self._policy(message.channel).max_attempts

        def op(lease: int, ranges: Sequence[Range], now: Now) -> Op:
            due = claimops.due_after(now, delay_ns)
            return claimops.op_nack(lease, ranges, due, attempts_max, now.wall_ns)

        self._settle((message,), NACKED, op)

    def _reject(self, message: Message, reason: str) -> None:
        if not isinstance(reason, str):
            raise UsageError(f"the reason {reason!r} is no text")
        text = reason[:REASON_CHARS_MAX]
        self._settle(
            (message,),
            REJECTED,
            lambda lease, ranges, now: claimops.op_reject(lease, ranges, text, now.wall_ns),
        )

    def _extend(self, message: Message, lease_s: float) -> None:
        lease_ns = seconds_ns(lease_s, "lease_s", least=0.001)
        stream = message._held.stream
        lease = 0

        def op(number: int, ranges: Sequence[Range], now: Now) -> Op:
            nonlocal lease
            lease = stream.look().lease_next
            return claimops.op_extend(number, ranges, now.boot_id, now.boot_ns + lease_ns)

        self._settle((message,), LEASED, op)
        message._held = Held(self, stream, lease)

    def _settle(
        self,
        messages: Sequence[Message],
        state: str,
        op: Callable[[int, Sequence[Range], Now], Op],
    ) -> None:
        groups, settled = by_lease(messages)
        lost = [m for m in settled if m._state != state]
        for (stream, lease), its in groups.items():
            give_up_s = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                # Not held for long: other threads may be at work in other channels.
                with self._mutex, disk("a message cannot be settled"):
                    self._enter()
                    try:
                        claims = stream.acquire(LOCK_TURN_S)
                    except SpoolBusy:
                        if time.monotonic() >= give_up_s:
                            raise
                        continue
                    try:
                        lost += self._settle_held(stream, claims, lease, its, state, op)
                    finally:
                        stream.release()
                break
        if lost:
            raise lost_leases(lost)

    def _settle_held(
        self,
        stream: Stream,
        claims: Claims,
        lease: int,
        messages: list[Message],
        state: str,
        op: Callable[[int, Sequence[Range], Now], Op],
    ) -> list[Message]:
        """Settle messages of one lease under its stream's lock. Returns those that are lost."""
        store, _ = self._enter()
        now = self._now()
        lost: list[Message] = []
        ranges = leasing.runs([m._seq for m in messages])
        if not all(claims.holds(lease, a, b, now) for a, b in ranges):
            lost = [m for m in messages if not claims.holds(lease, m._seq, m._seq + 1, now)]
            gone = set(lost)
            messages = [m for m in messages if m not in gone]
            ranges = leasing.runs([m._seq for m in messages])
        if ranges:
            stream.append([op(lease, ranges, now)])
        for m in messages:
            m._state = state
        self._unsynced.add(stream)
        # Acks free nobody's way but in an ordered channel; what goes back may be wanted.
        freed = lease not in claims.leases and self._policy(stream.channel).ordered
        if state == NACKED or freed:
            store.ring([stream.channel])
            self._wake_sleepers()
        return lost

    # Waiting

    def _wait(self, store: InboxStore, timeout_s: float, look: Look) -> None:
        """Sleep until something may have changed. Other threads' rings wake us by `wakeup`."""
        timeout_s = self._unsynced.wait_at_most(timeout_s)
        wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with self._mutex:
                if self._closed:
                    return
                self._sleepers.add(wakeup)
            store.wait(timeout_s, look.watch, wakeup)
        finally:
            with self._mutex:
                self._sleepers.discard(wakeup)
                os.close(wakeup)

    def _wake_sleepers(self) -> None:
        """The ring that we took may have been for another thread's channel."""
        for wakeup in self._sleepers:
            os.eventfd_write(wakeup, 1)

    # Bookkeeping

    def _enter(self) -> tuple[InboxStore, Taker]:
        if self._closed:
            raise UsageError("this inbox is closed", hint="open another")
        if self._opened is None:
            with disk("the inbox cannot be opened"):
                store = self._open_store()
            taker = Taker(self, store, self._policy, self._clock.boot_ns())
            self._opened = store, taker
        return self._opened

    def _policy(self, channel: str) -> Policy:
        if self._published is None:
            return Public().channel(channel)
        return self._published.get().channel(channel)

    def _now(self) -> Now:
        """Nothing expires while the wall clock has parted from the boot-time clock."""
        boot_ns, wall_ns = self._clock.boot_ns(), self._clock.wall_ns()
        held = abs(wall_ns - boot_ns - self._parted_ns) > WALL_CLOCK_PARTED_NS
        return Now(self._clock.boot_id(), boot_ns, wall_ns, held)

    def _give_back(self, store: InboxStore, taker: Taker) -> None:
        now = self._now()
        for stream in taker.taken_from:
            claims = stream.acquire(LOCK_TIMEOUT_S)
            try:
                attempts_max = self._policy(stream.channel).max_attempts
                ours = leasing.over(
                    claims, stream.begin(), now, attempts_max, dead=[store.consumer]
                )
                if ours:
                    stream.append(ours)
            finally:
                stream.release()
            if ours:
                self._unsynced.add(stream)
                store.ring([stream.channel])

    def _blob_path(self, sender: str, frame_id: bytes) -> str:
        with self._mutex:
            return self._enter()[0].blob_path(sender, frame_id)

    def _in_child(self) -> None:
        """After a fork: the parent keeps its identity, the child gets its own when it needs it."""
        opened = self._opened
        self._reset()
        if opened is not None:
            opened[0].close_in_child()


def _after_fork() -> None:
    for inbox in list(_open_inboxes):
        inbox._in_child()


os.register_at_fork(after_in_child=_after_fork)
