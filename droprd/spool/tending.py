"""What the janitor does for one stream (channel and priority) of the inbox, again and again.

Owns, beside the consumers, its claims file: ends leases whose time is over or whose consumer has
died, marks expired messages, brings what consumers settled to stable storage, replaces a claims
file that has grown long, and mends one that cannot be read or is missing.

Each look is short: it reads what has come since the last one, at most `FRAMES_A_LOOK` frames. A
crash at any point leaves what consumers leave.

Raises OSError.
"""

from __future__ import annotations

import heapq
import logging
from itertools import islice
from typing import NamedTuple

from droprd.core import leasing
from droprd.core.claimops import Due, Now, op_settle
from droprd.core.claims import Claims
from droprd.errors import SpoolBusy, SpoolCorrupt
from droprd.spool.bells import Waiting
from droprd.spool.claims import create_claims
from droprd.spool.handle import Spool
from droprd.spool.inbox import FilesStream
from droprd.spool.retention import Retention, keep_corrupt

LOCK_TIMEOUT_S = 0.2
FRAMES_A_LOOK = 8192
DELAYED_PASSED = 64  # frames in front that wait for their time, at one look for the oldest
EXPIRIES_MAX = 100_000
COMPACT_BYTES_MIN = 2 << 20
_PIECE_BYTES = 64  # about, of a snapshot

_log = logging.getLogger("droprd.janitor")


class StreamGauges(NamedTuple):
    """How many messages of a stream are ready (delayed ones among them), leased, dead, corrupt.

    `oldest_wall_ns`: since when the oldest that is neither settled, dead nor delayed could have
    been taken, by the wall clock; None if there is none.
    """

    ready: int
    leased: int
    dead: int
    corrupt: int
    oldest_wall_ns: int | None = None


class StreamTender:
    """Looks after one stream."""

    def __init__(self, spool: Spool, waiting: Waiting, channel: str, priority: int) -> None:
        self._spool = spool
        self._waiting = waiting
        self.stream = FilesStream(spool.fs, spool.layout, channel, priority, spool.clock.boot_id())
        self._surveyed = 0  # all before this seq has been looked at for its time to live
        self._expiries: list[tuple[int, int, int, Due]] = []  # boot ns, first, end, moment
        self._corrupt_known: set[int] = set()
        self._front: tuple[int, int | None] = (-1, None)  # its seq, and since when it waits
        self.gauges = StreamGauges(0, 0, 0, 0)
        self.problem = ""

    def tend(self, now: Now, attempts_max: int) -> None:
        """One look. Raises: OSError."""
        self.problem = ""
        stream = self.stream
        try:
            claims = stream.look()
        except FileNotFoundError:
            self._make_claims()
            return
        except SpoolCorrupt as error:
            self._mend(error)
            return
        try:
            if claims.sync_failed:
                raise SpoolCorrupt(f"{stream.claims.path} could not be synced by a consumer")
            self._sync()  # first, for it needs no lock that a stopped process may hold
            delayed = claims.delayed.count
            if claims.offers(now) and claims.delayed.count < delayed:
                self._waiting.ring([stream.channel])  # who polls its descriptor is not woken else
            self._end_leases(claims, now, attempts_max)
            self._survey(now)
            self._expire(now)
            self._compact()
            claims = stream.look()
            corrupt = keep_corrupt(self._spool, stream, claims, self._corrupt_known)
        except SpoolBusy as error:
            self.problem = str(error)
            return
        except SpoolCorrupt as error:
            self._mend(error)
            return
        ready = max(0, stream.end() - claims.fresh) + claims.waiting
        oldest = self._oldest_wall_ns(claims, now)
        self.gauges = StreamGauges(ready, claims.leased, claims.dead.count, corrupt, oldest)

    def delete_settled(self, retention: Retention, sealed: int, retain_s: float, now: Now) -> int:
        """Delete the segments that may go; a stopped consumer that holds the lock delays it."""
        try:
            return retention.delete_settled(self.stream, sealed, retain_s, now)
        except (SpoolBusy, SpoolCorrupt, FileNotFoundError):
            return 0  # `tend` says so, or mends it

    def close(self) -> None:
        """Close all files."""
        self.stream.close()

    def _oldest_wall_ns(self, claims: Claims, now: Now) -> int | None:
        """See `StreamGauges`. The file is read only when the front has moved."""
        firsts = [claims.ready.first(), *(lease.open.first() for lease in claims.leases.values())]
        front = min([claims.fresh, *(first for first in firsts if first is not None)])
        front = max(front, self.stream.begin())
        if front >= self.stream.end():
            self._front = (-1, None)
        elif self._front[0] != front or self._front[1] is None:
            self._front = (front, self._since_wall_ns(front, now))
        return self._front[1]

    def _since_wall_ns(self, front: int, now: Now) -> int | None:
        for stored in islice(self.stream.read(front), DELAYED_PASSED):
            if stored.due is None:
                return stored.arrived_wall_ns or None
            if stored.due.reached(now):
                return stored.due.wall_ns
        return None

    def _end_leases(self, claims: Claims, now: Now, attempts_max: int) -> None:
        stream = self.stream
        dead = [c for c in claims.consumers() if not self._waiting.alive(c)]
        if not leasing.over(claims, stream.begin(), now, attempts_max, dead):
            return
        claims = stream.acquire(LOCK_TIMEOUT_S)
        try:
            ops = leasing.over(claims, stream.begin(), now, attempts_max, dead)
            if ops:
                stream.append(ops)
        finally:
            stream.release()
        self._waiting.ring([stream.channel])

    def _survey(self, now: Now) -> None:
        """Note when frames that have come expire, as many as may be noted."""
        stream = self.stream
        self._surveyed = max(self._surveyed, stream.known().lowest_open())
        for stored in islice(stream.log.read(self._surveyed, parse=False), FRAMES_A_LOOK):
            if len(self._expiries) >= EXPIRIES_MAX:
                break
            self._surveyed = stored.end
            due = stored.expires
            if due is not None:
                left_ns = (
                    due.boot_ns - now.boot_ns
                    if due.boot_id == now.boot_id
                    else due.wall_ns - now.wall_ns
                )
                entry = (now.boot_ns + left_ns, stored.first, stored.end, due)
                heapq.heappush(self._expiries, entry)

    def _expire(self, now: Now) -> None:
        over: list[tuple[int, int]] = []
        while self._expiries and self._expiries[0][0] <= now.boot_ns and not now.held:
            _, first, end, due = heapq.heappop(self._expiries)
            if due.reached(now):
                over.append((first, end))
            else:
                # Of another boot, and the wall clock went back meanwhile.
                again = (now.boot_ns + max(1, due.wall_ns - now.wall_ns), first, end, due)
                heapq.heappush(self._expiries, again)
        if not over:
            return
        stream = self.stream
        try:
            claims = stream.acquire(LOCK_TIMEOUT_S)
        except SpoolBusy:
            for first, end in over:
                heapq.heappush(self._expiries, (now.boot_ns, first, end, Due(b"", 0, 0)))
            raise
        try:
            ranges = [piece for first, end in over for piece in claims.idle(first, end)]
            if ranges:
                stream.append([op_settle(ranges, "expired")])
        finally:
            stream.release()

    def _sync(self) -> None:
        try:
            self.stream.sync()
        except OSError as error:
            # Never again on this file: the kernel may call old data clean. A new one takes over.
            raise SpoolCorrupt(
                f"{self.stream.claims.path} could not be synced", why=str(error)
            ) from error

    def _compact(self) -> None:
        """Replace the claims file once most of it is history."""
        claims_file = self.stream.claims
        needed = _PIECE_BYTES * claims_file.state.pieces()
        if claims_file.end < COMPACT_BYTES_MIN + 4 * needed:
            return
        with claims_file.locked(LOCK_TIMEOUT_S):
            claims_file.replace(self._spool.urandom(16), self._spool.clock.wall_ns())

    def _make_claims(self) -> None:
        """A missing claims file: everything that is still stored comes again."""
        spool, stream = self._spool, self.stream
        path = stream.claims.path
        if not stream.log.segments():
            return  # the receiver is just making this stream
        create_claims(
            spool.fs,
            path,
            log_id=spool.urandom(16),
            spool_id=spool.spool_id,
            wall_ns=spool.clock.wall_ns(),
        )
        _log.error("%s was missing; a new one was made, and stored messages come again", path)

    def _mend(self, error: SpoolCorrupt) -> None:
        spool, claims_file = self._spool, self.stream.claims
        wall_ns = spool.clock.wall_ns()
        try:
            data = claims_file.salvage(spool.urandom(16), spool.spool_id, wall_ns)
        except SpoolBusy as busy:
            self.problem = str(busy)
            return
        if data:
            kept = spool.set_aside(claims_file.path, 0, data)
            _log.error("%s; its bytes are kept in %s", error, kept)
        self._waiting.ring([self.stream.channel])
