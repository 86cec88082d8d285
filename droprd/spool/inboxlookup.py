"""Where messages of the inbox are: channel segments with their claims, dead.log. In order.

Only reads, beside a running daemon or without one, and streams: memory follows the claims and what
is asked for, never the backlog.

    waiting    not settled: ready, delayed or leased
    dead       a dead letter that nobody has taken away, in its segment or copied to dead.log

Raises: OSError, BadData, SpoolCorrupt.
"""

from __future__ import annotations

from collections.abc import Iterator

from droprd.core.claimops import Range
from droprd.core.claims import Claims
from droprd.core.filters import Selection
from droprd.core.leasing import Stored
from droprd.model import Lane
from droprd.spool.handle import Spool
from droprd.spool.inbox import FilesStream, channel_names, stream_priorities
from droprd.spool.layout import segment_name
from droprd.spool.lookup import Chooser, Hit, dead_hits


class InboxView:
    """The messages of an inbox by its files."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def streams(self, selection: Selection) -> Iterator[FilesStream]:
        """The streams that are meant, one after another; each is closed before the next."""
        fs, layout = self._spool.fs, self._spool.layout
        for channel in sorted(channel_names(fs, layout)):
            for priority in stream_priorities(fs, layout, channel):
                if selection.in_lane(selection.peer, channel, priority):
                    stream = FilesStream(fs, layout, channel, priority, self._spool.clock.boot_id())
                    try:
                        yield stream
                    finally:
                        stream.close()

    def waiting(self, selection: Selection) -> Iterator[Hit]:
        """Messages that nobody has settled, in order of arrival."""
        chooser = Chooser(self._spool, selection)
        for stream in self.streams(selection):
            claims = stream.look()
            for stored in stream.read(claims.lowest_open()):
                yield from self.waiting_of(stream, claims, stored, chooser)

    def waiting_of(
        self, stream: FilesStream, claims: Claims, stored: Stored, chooser: Chooser
    ) -> Iterator[Hit]:
        """Those of one frame, by their state."""
        groups: dict[str, dict[int, bytes]] = {}
        attempts: dict[int, int] = {}
        frame = stored.frame
        if frame is None or not _is_meant(stored, stream, chooser):
            return
        chosen = chooser.choose(frame)
        if not chosen:
            return
        for state, first, end, count in standing(claims, stored.first, stored.end):
            for seq in range(first, end):
                index = seq - stored.first
                if index in chosen and index not in stored.voids:
                    groups.setdefault(state, {})[index] = chosen[index]
                    attempts[index] = count
        for state, some in groups.items():
            yield _hit(self._spool, stream, stored, state, some, {}, attempts)

    def dead(self, selection: Selection) -> Iterator[Hit]:
        """The dead letters: first those copied out, then those in their segments, in order."""
        yield from dead_hits(self._spool, selection, "inbox", self._spool.layout.inbox_dead)
        chooser = Chooser(self._spool, selection)
        for stream in self.streams(selection):
            for span, reason, attempts in dead_spans(stream.look(), selection):
                yield from self.dead_of(stream, span, reason, attempts, chooser)

    def dead_of(
        self, stream: FilesStream, span: Range, reason: str, attempts: int, chooser: Chooser
    ) -> Iterator[Hit]:
        """Those of one run of dead letters."""
        for stored in stream.read(span[0]):
            if stored.first >= span[1]:
                return
            if stored.frame is None or not _is_meant(stored, stream, chooser):
                continue
            some = {
                index: one
                for index, one in chooser.choose(stored.frame).items()
                if span[0] <= stored.first + index < span[1]
            }
            if some:
                reasons = dict.fromkeys(some, reason)
                tries = dict.fromkeys(some, attempts)
                yield _hit(self._spool, stream, stored, "dead", some, reasons, tries)


def dead_spans(claims: Claims, selection: Selection) -> list[tuple[Range, str, int]]:
    """The runs of dead letters whose reason is meant: (seqs, reason, attempts)."""
    return [
        ((first, end), why.reason, why.attempts)
        for first, end, why in claims.dead
        if selection.because(why.reason)
    ]


def standing(claims: Claims, first: int, end: int) -> list[tuple[str, int, int, int]]:
    """(state, first, end, attempts) of what is not settled of some seqs: ready, delayed, leased."""
    found = [("ready", a, b, wait.attempts) for a, b, wait in claims.ready.between(first, end)]
    found += [("delayed", a, b, wait.attempts) for a, b, wait in claims.delayed.between(first, end)]
    for lease in claims.leases.values():
        found += [("leased", a, b, attempts) for a, b, attempts in lease.open.between(first, end)]
    if end > claims.fresh:
        found.append(("ready", max(first, claims.fresh), end, 0))
    return sorted(found, key=lambda one: one[1])


def _is_meant(stored: Stored, stream: FilesStream, chooser: Chooser) -> bool:
    frame = stored.frame
    return (
        frame is not None
        and chooser.selection.in_lane(stored.sender, stream.channel, stream.priority)
        and chooser.may_mean(frame.info)
    )


def _hit(
    spool: Spool,
    stream: FilesStream,
    stored: Stored,
    state: str,
    chosen: dict[int, bytes],
    reasons: dict[int, str],
    attempts: dict[int, int],
) -> Hit:
    assert stored.frame is not None
    number = 0 if stored.place is None else stored.place[0]
    return Hit(
        "inbox",
        state,
        Lane(stored.sender, stream.channel, stream.priority),
        stored.frame,
        chosen,
        reasons,
        attempts,
        path=f"inbox/channels/{stream.channel}/{stream.priority}/{segment_name(number)}",
        seq=stored.first,
    )
