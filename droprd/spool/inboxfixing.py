"""What an operator does to messages of the inbox: revive dead letters, or purge. The janitor's.

A dead letter that still lies in its segment is revived in the claims file, as if it had just come.
One that was copied out is appended again by the receiver (`droprd.spool.again`), and this only
notes that it is gone. A purge settles messages that nobody has leased, dead letters among them.

Generators, as in `droprd.spool.fixing`: they yield now and then, with everything done so far in the
claims file, which the janitor syncs within a second, or on stable storage.

Raises: OSError, SpoolBusy, SpoolCorrupt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from droprd.core.claimops import REASON_CORRUPT, Op, Range, op_revive, op_settle
from droprd.core.claims import Claims
from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.core.leasing import runs
from droprd.core.outstate import PURGED
from droprd.model import Lane
from droprd.spool.handle import Spool
from droprd.spool.inbox import FilesStream
from droprd.spool.inboxlookup import InboxView, dead_spans
from droprd.spool.lookup import Chooser, Hit, dead_hits
from droprd.spool.retention import DeadLetters

LOCK_TIMEOUT_S = 2.0
LEASED = "a consumer holds it"
CORRUPT = "its body is gone"
SLICE_MESSAGES = 1000
SLICE_HITS = 500


class InboxFixer:
    """Changes an inbox for an operator."""

    def __init__(self, spool: Spool, dead: DeadLetters, ring: Callable[[str], None]) -> None:
        """`ring(channel)` wakes the consumers of a channel."""
        self._spool = spool
        self._dead = dead
        self._ring = ring
        self._view = InboxView(spool)

    def requeue(self, selection: Selection, *, dry: bool = False) -> Iterator[Fixed]:
        """Lease dead letters afresh that still lie in their segments; with `dry`, only count."""
        fixed = Fixed()
        if selection.wants("dead", "inbox"):
            yield from self._dead_in_segments(selection, fixed, dry, op_revive, reviving=True)
        yield fixed

    def purge(self, selection: Selection, *, dry: bool = False) -> Iterator[Fixed]:
        """Settle messages that wait, and dead letters, as purged; with `dry`, only count."""
        fixed = Fixed()
        if selection.wants("waiting", "inbox"):
            yield from self._purge_waiting(selection, fixed, dry)
        if selection.wants("dead", "inbox"):
            yield from self._dead_in_segments(selection, fixed, dry, _settle_purged)
            yield from self._purge_buried(selection, fixed, dry)
        yield fixed

    # -- in their segments ---------------------------------------------------------------------

    def _dead_in_segments(
        self,
        selection: Selection,
        fixed: Fixed,
        dry: bool,
        make: Callable[[list[Range]], Op],
        *,
        reviving: bool = False,
    ) -> Iterator[Fixed]:
        chooser = Chooser(self._spool, selection)
        for stream in self._view.streams(selection):
            seqs: list[int] = []
            for span, reason, attempts in dead_spans(stream.look(), selection):
                for hit in self._view.dead_of(stream, span, reason, attempts, chooser):
                    fixed.met(hit.chosen.values())
                    if reviving and reason == REASON_CORRUPT:
                        fixed.skipped[CORRUPT] += len(hit.chosen)
                        continue
                    _count(fixed, hit)
                    seqs += [hit.seq + index for index in hit.chosen]
                    if len(seqs) >= SLICE_MESSAGES:
                        self._change_dead(stream, seqs, dry, make)
                        seqs = []
                        yield fixed
            self._change_dead(stream, seqs, dry, make)
            yield fixed

    def _change_dead(
        self, stream: FilesStream, seqs: list[int], dry: bool, make: Callable[[list[Range]], Op]
    ) -> None:
        if not seqs or dry:
            return
        claims = stream.acquire(LOCK_TIMEOUT_S)
        try:
            # What was buried or purged meanwhile is no longer dead here.
            ranges = [
                (a, b) for first, end in runs(seqs) for a, b, _ in claims.dead.between(first, end)
            ]
            if ranges:
                stream.append([make(ranges)])
        finally:
            stream.release()
        self._ring(stream.channel)

    def _purge_waiting(self, selection: Selection, fixed: Fixed, dry: bool) -> Iterator[Fixed]:
        chooser = Chooser(self._spool, selection)
        for stream in self._view.streams(selection):
            claims = stream.look()
            end = stream.end()
            seqs: list[int] = []
            for stored in stream.read(claims.lowest_open()):
                if stored.first >= end:
                    break  # came after this began
                for hit in self._view.waiting_of(stream, claims, stored, chooser):
                    fixed.met(hit.chosen.values())
                    if hit.state == "leased":
                        fixed.skipped[LEASED] += len(hit.chosen)
                        continue
                    _count(fixed, hit)
                    seqs += [hit.seq + index for index in hit.chosen]
                if len(seqs) >= SLICE_MESSAGES:
                    self._settle(stream, seqs, fixed, dry)
                    seqs = []
                    yield fixed
            self._settle(stream, seqs, fixed, dry)
            yield fixed

    def _settle(self, stream: FilesStream, seqs: list[int], fixed: Fixed, dry: bool) -> None:
        if not seqs or dry:
            return
        claims: Claims = stream.acquire(LOCK_TIMEOUT_S)
        try:
            ranges = [piece for first, end in runs(seqs) for piece in claims.idle(first, end)]
            missed = len(seqs) - sum(b - a for a, b in ranges)
            if missed:  # leased a moment ago
                fixed.messages -= missed
                fixed.skipped[LEASED] += missed
            if ranges:
                stream.append([op_settle(ranges, PURGED)])
        finally:
            stream.release()

    # -- in dead.log ---------------------------------------------------------------------------

    def _purge_buried(self, selection: Selection, fixed: Fixed, dry: bool) -> Iterator[Fixed]:
        batch: list[Hit] = []
        for hit in dead_hits(self._spool, selection, "inbox", self._spool.layout.inbox_dead):
            fixed.met(hit.chosen.values())
            _count(fixed, hit)
            batch.append(hit)
            if len(batch) >= SLICE_HITS:
                self._take(batch, dry)
                batch = []
                yield fixed
        self._take(batch, dry)
        self._dead.tidy()
        yield fixed

    def _take(self, batch: list[Hit], dry: bool) -> None:
        if batch and not dry:
            self._dead.take(letters_of([(hit, list(hit.chosen)) for hit in batch], PURGED))


def letters_of(
    hits: list[tuple[Hit, list[int]]], why: str
) -> list[tuple[Lane, list[tuple[bytes, list[int]]], str]]:
    """Letters as their log notes them when they are taken away."""
    lanes: dict[Lane, list[tuple[bytes, list[int]]]] = {}
    for hit, indexes in hits:
        lanes.setdefault(hit.lane, []).append((hit.frame.frame_id, indexes))
    return [(lane, of, why) for lane, of in lanes.items()]


def _settle_purged(ranges: list[Range]) -> Op:
    return op_settle(ranges, PURGED)


def _count(fixed: Fixed, hit: Hit) -> None:
    info, lengths = hit.frame.info, hit.frame.lengths
    size = info.bodies_bytes if info.is_blob else sum(lengths[i] for i in hit.chosen)
    fixed.did(len(hit.chosen), size)
