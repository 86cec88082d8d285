"""How a consumer takes messages: which streams it looks at, in which order, and what it waits for.

`Taker.take` goes through the streams of some channels, most urgent priority first, then the
channels in turn, and leases what `droprd.core.leasing` chooses. A stream in which nothing can be
leased costs two small reads and no lock. A stream whose lock a stopped process holds is passed
over for a moment, so that it delays only its own channel and priority.

What it learns on the way is left in `Look`: when something will change by itself, whose death
would free messages, and what could not be read.

Raises OSError. Not safe with threads: its inbox sees to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from droprd.client.message import Held, Message, Settler
from droprd.core import claimops, leasing
from droprd.core.claimops import Now
from droprd.core.claims import Claims
from droprd.errors import SpoolBusy, SpoolCorrupt, UsageError
from droprd.model import check_name
from droprd.spool.inbox import InboxStore, Stream

LOCK_TIMEOUT_S = 0.25
CONTENDED_TURNS = 8
BUSY_PAUSE_NS = 1_000_000_000
MISSING_PAUSE_NS = 250_000_000
DEATHS_EVERY_NS = 100_000_000
RELIST_EVERY_NS = 50_000_000
LOOK_AGAIN_NS = 5_000_000_000  # should a ring be lost


class Policy(Protocol):
    """How messages of a channel are consumed (`settings.values.ChannelSettings`)."""

    @property
    def max_attempts(self) -> int: ...
    @property
    def ordered(self) -> bool: ...


class Look:
    """One look at the streams: what was leased, and what to wait for if that is nothing."""

    def __init__(self, now: Now, lease_ns: int, room: int) -> None:
        self.now = now
        self.lease_ns = lease_ns
        self.room = room
        self.messages: list[Message] = []
        self.alone = False
        self.again_ns = LOOK_AGAIN_NS
        self.watch: set[bytes] = set()
        self.fault: SpoolCorrupt | None = None

    @property
    def full(self) -> bool:
        return self.alone or len(self.messages) >= self.room


class Taker:
    """Takes messages for one consumer. `taken_from` are the streams that it has leased from."""

    def __init__(
        self, inbox: Settler, store: InboxStore, policy: Callable[[str], Policy], boot_ns: int
    ) -> None:
        self._inbox = inbox
        self._store = store
        self._policy = policy
        self._turn = 0
        self._listed_ns = boot_ns - RELIST_EVERY_NS
        self._asked_ns: dict[Stream, int] = {}  # when last whether its consumers live
        self._busy_until_ns: dict[Stream, int] = {}
        self.taken_from: set[Stream] = set()

    def take(self, channels: Sequence[str], look: Look) -> None:
        """Lease up to `look.room` messages of these channels."""
        self._turn += 1
        now_ns = look.now.boot_ns
        again = now_ns - self._listed_ns >= RELIST_EVERY_NS
        if again:
            self._listed_ns = now_ns
        for stream in self._in_order(channels, again):
            self._take_from(stream, look)
            if look.full:
                return
        if not again and not look.messages:
            known = set(self._in_order(channels, False))
            for stream in self._in_order(channels, True):
                if stream not in known and not look.full:
                    self._take_from(stream, look)
            self._listed_ns = now_ns

    def peek(self, channels: Sequence[str], look: Look) -> None:
        """What `take` would lease, without leasing anything."""
        for stream in self._in_order(channels, True):
            with self._faults(stream, look):
                claims = stream.look()
                choice = leasing.choose(
                    claims,
                    stream.read,
                    room=look.room - len(look.messages),
                    now=look.now,
                    first_of_all=True,
                    ordered=self._policy(stream.channel).ordered,
                )
                look.messages += _messages(Held(self._inbox, stream, 0), choice)
            if len(look.messages) >= look.room:
                return

    def _in_order(self, channels: Sequence[str], again: bool) -> list[Stream]:
        """Most urgent first, then the channels in turn."""
        turn = self._turn % len(channels)
        found: list[tuple[int, int, Stream]] = []
        for place, channel in enumerate([*channels[turn:], *channels[:turn]]):
            found += [
                (stream.priority, place, stream)
                for stream in self._store.streams(channel, again=again)
            ]
        found.sort(key=lambda one: one[:2])
        return [stream for _, _, stream in found]

    def _take_from(self, stream: Stream, look: Look) -> None:
        now = look.now
        busy = self._busy_until_ns.get(stream, 0) - now.boot_ns
        if busy > 0:
            look.again_ns = min(look.again_ns, busy)
            return
        with self._faults(stream, look):
            claims = stream.known()
            likely = stream.grown(claims.fresh)
            if not likely:
                claims = stream.look()
                likely = stream.grown(claims.fresh) or claims.offers(now)
            dead = self._dead(stream, claims, now, sure=not likely)
            if likely or dead or claims.overdue(now):
                policy = self._policy(stream.channel)
                with ExitStack() as locks:
                    if policy.ordered and not self._alone_there(locks, stream, look, policy):
                        return
                    if not policy.ordered:
                        claims = _acquire(stream)
                        locks.callback(stream.release)
                    self._lease(stream, stream.look() if policy.ordered else claims, dead, look)
            if not look.messages:
                self._note_waits(stream.known(), look)

    def _lease(self, stream: Stream, claims: Claims, dead: list[bytes], look: Look) -> None:
        """Lease from a stream whose lock is held."""
        now = look.now
        policy = self._policy(stream.channel)
        if not dead:  # what was known before the lock may have been old
            idle = not stream.grown(claims.fresh) and not claims.offers(now)
            dead = self._dead(stream, claims, now, sure=idle)
        self._end_leases(stream, claims, dead, now)
        while True:
            choice = leasing.choose(
                claims,
                stream.read,
                room=look.room - len(look.messages),
                now=now,
                first_of_all=not look.messages,
                ordered=policy.ordered,
            )
            ops = choice.ops(now)
            held = Held(self._inbox, stream, claims.lease_next)
            if choice.picks:
                until_ns = now.boot_ns + look.lease_ns
                ops.append(
                    claimops.op_lease(self._store.consumer, now.boot_id, until_ns, choice.ranges)
                )
            if ops:
                stream.append(ops)
            if choice.picks or not choice.again:
                break
        if choice.picks:
            self.taken_from.add(stream)
            look.alone = choice.alone
            look.messages += _messages(held, choice)

    def _end_leases(self, stream: Stream, claims: Claims, dead: list[bytes], now: Now) -> None:
        attempts_max = self._policy(stream.channel).max_attempts
        ops = leasing.over(claims, stream.begin(), now, attempts_max, dead)
        if ops:
            stream.append(ops)
            # Of what came back we may take only one; others may wait for the rest.
            self._store.ring([stream.channel])

    def _alone_there(self, locks: ExitStack, stream: Stream, look: Look, policy: Policy) -> bool:
        """In an ordered channel: lock all its priorities; False if another consumer is at work.

        A priority made meanwhile is seen by whoever looks after taking these locks, and nobody
        can lease from it without them.
        """
        taken: set[int] = set()
        while True:
            streams = self._store.streams(stream.channel, again=True)
            fresh = [s for s in streams if s.priority not in taken]
            if not fresh:
                break
            if taken and min(s.priority for s in fresh) < max(taken):
                locks.close()  # always in the same order, or two could wait for each other
                taken.clear()
                fresh = list(streams)
            for one in sorted(fresh, key=lambda s: s.priority):
                _acquire(one)
                locks.callback(one.release)
                taken.add(one.priority)
        for one in streams:
            claims = one.look()
            dead = self._dead(one, claims, look.now, sure=True)
            self._end_leases(one, claims, dead, look.now)
            if claims.consumers() - {self._store.consumer}:
                self._note_waits(claims, look)
                return False
        return True

    def _dead(self, stream: Stream, claims: Claims, now: Now, *, sure: bool) -> list[bytes]:
        """Consumers with leases here that have died. Asked rarely while there is other work."""
        others = claims.consumers() - {self._store.consumer}
        if not others:
            return []
        if not sure and now.boot_ns - self._asked_ns.get(stream, 0) < DEATHS_EVERY_NS:
            return []
        self._asked_ns[stream] = now.boot_ns
        return [consumer for consumer in others if not self._store.alive(consumer)]

    def _note_waits(self, claims: Claims, look: Look) -> None:
        change_ns = claims.next_change_ns(look.now)
        if change_ns is not None:
            look.again_ns = min(look.again_ns, change_ns)
        look.watch |= claims.consumers() - {self._store.consumer}

    @contextmanager
    def _faults(self, stream: Stream, look: Look) -> Iterator[None]:
        """One stream's trouble is not the others'."""
        try:
            yield
        except FileNotFoundError:
            look.again_ns = min(look.again_ns, MISSING_PAUSE_NS)  # being made, or replaced
        except SpoolBusy:
            self._busy_until_ns[stream] = look.now.boot_ns + BUSY_PAUSE_NS
            look.again_ns = min(look.again_ns, BUSY_PAUSE_NS)
        except SpoolCorrupt as error:
            look.fault = error
            look.again_ns = min(look.again_ns, BUSY_PAUSE_NS)


def _acquire(stream: Stream) -> Claims:
    """Take a stream's lock, patiently while others use it in turn. Raises: SpoolBusy if one sits
    on it."""
    for _ in range(CONTENDED_TURNS):
        before = _progress(stream.known())
        try:
            return stream.acquire(LOCK_TIMEOUT_S)
        except SpoolBusy:
            if _progress(stream.look()) == before:
                raise
    return stream.acquire(LOCK_TIMEOUT_S)


def _progress(claims: Claims) -> tuple[int, ...]:
    return claims.lease_next, claims.fresh, claims.leased, claims.waiting, claims.dead.count


def _messages(held: Held, choice: leasing.Choice) -> list[Message]:
    return [
        Message(held, pick.stored, seq, pick.attempt)
        for pick in choice.picks
        for seq in range(pick.first, pick.end)
    ]


def asked_for(channels: Sequence[str], max_messages: int) -> list[str]:
    """The channels somebody wants to receive from, each once. Raises: InvalidName, UsageError."""
    if not channels:
        raise UsageError("no channel to receive from", hint="name at least one")
    if not isinstance(max_messages, int) or max_messages < 1:
        raise UsageError(f"max_messages={max_messages!r} is not possible", hint="ask for 1")
    return [check_name(name, "channel") for name in dict.fromkeys(channels)]
