"""Where messages of the outbox are: journals, lanes, dead.log. Found frame by frame, in order.

Only reads, beside a running daemon or without one, and streams: memory follows what is asked for,
never the backlog. The sender uses the same on its own state; it alone may act on what it finds.

    waiting    accepted, not known to have ended; not merged yet, or in a lane
    sent       settled as delivered and still kept
    dead       a dead letter that nobody has taken away

Raises: OSError, BadData, SpoolCorrupt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from droprd.core import entry, frame
from droprd.core.entry import FILE_HEADER_BYTES
from droprd.core.filters import Selection
from droprd.core.frame import Frame, FrameInfo
from droprd.core.outstate import LaneState, OutboxState, Pos
from droprd.errors import BadData
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.deadlog import gone_letters, read_letters
from droprd.spool.handle import Spool
from droprd.spool.journalfile import left_behind, list_journals, open_journal
from droprd.spool.lanes import LaneFiles
from droprd.spool.outgoing import elapsed_ms

NOWHERE = Pos(0, 0)


@dataclass(slots=True)
class Hit:
    """Messages of one frame that are meant.

    Attributes:
        state: "waiting", "sent" or "dead", or how the message ended: "expired", "purged".
        lane: its lane; in the inbox its peer is the sender.
        chosen: raw ids by index.
        reasons: why, by index, where there is a reason.
        attempts: how often each was leased, by index (inbox only).
        start, end: its place, if it lies in a lane; in a dead log the segment is 0.
        path: the file it lies in, relative to the spool.
        seq: in the inbox, the seq of the frame's first message.
    """

    box: str
    state: str
    lane: Lane
    frame: Frame
    chosen: dict[int, bytes]
    reasons: Mapping[int, str] = field(default_factory=dict)
    attempts: Mapping[int, int] = field(default_factory=dict)
    start: Pos = NOWHERE
    end: Pos = NOWHERE
    path: str = ""
    seq: int = -1


def own_ids(parsed: Frame) -> list[bytes]:
    """The raw ids of all messages of a frame; requeued ones keep their own."""
    info = parsed.info
    if info.maps_bytes or (info.messages == 1 and info.shared_bytes):
        return [bytes.fromhex(text.replace("-", "")) for text in parsed.ids()]
    prefix = info.frame_id[:14]
    return [prefix + index.to_bytes(2, "big") for index in range(info.messages)]


class Chooser:
    """Says of frames which of their messages a selection means."""

    def __init__(self, spool: Spool, selection: Selection) -> None:
        self._clock = spool.clock
        self.selection = selection
        ids = selection.ids
        self._prefixes = None if ids is None else {one[:14] for one in ids}

    def may_mean(self, info: FrameInfo) -> bool:
        """Whether it is worth parsing the frame."""
        if (
            self._prefixes is not None
            and info.frame_id[:14] not in self._prefixes
            and not info.maps_bytes
            and not (info.messages == 1 and info.shared_bytes)
        ):
            return False
        selection = self.selection
        if selection.older_ms is None and selection.newer_ms is None:
            return True
        return selection.of_age(elapsed_ms(self._clock, info))

    def choose(self, parsed: Frame) -> dict[int, bytes]:
        """The messages of a frame that are meant, as far as ids say."""
        ids = own_ids(parsed)
        wanted = self.selection.ids
        if wanted is None:
            return dict(enumerate(ids))
        return {i: one for i, one in enumerate(ids) if one in wanted}


def parse_stored(item: log.Entry) -> Frame:
    """The frame of a lane's entry. Raises: BadData."""
    try:
        stored = entry.unpack_note(item.note) if item.note else {}
        return frame.parse(item.frame, [v[0] for v in stored.get("v", ())])
    except (LookupError, TypeError, AttributeError) as error:
        raise BadData("a frame's note cannot be read", why=str(error)) from error


class OutboxView:
    """The messages of an outbox, by its files and what the sender's log says of them."""

    def __init__(self, spool: Spool, state: OutboxState) -> None:
        self._spool = spool
        self._state = state
        self._files = LaneFiles(spool, 0)

    def lanes(self, selection: Selection) -> list[LaneState]:
        """The lanes that are meant, in the order of their names."""
        return [
            self._state.lanes[lane]
            for lane in sorted(self._state.lanes)
            if selection.in_lane(*lane)
        ]

    def waiting(self, selection: Selection) -> Iterator[Hit]:
        """Messages that have not ended, lane by lane; those still in journals come last."""
        chooser = Chooser(self._spool, selection)
        for state in self.lanes(selection):
            if state.is_idle:
                continue
            for start, end, parsed in self.frames(state, state.cursor, state.tail, chooser):
                if not (state.skips and state.skip_at(start)):
                    voids = state.voids_at(start, parsed.frame_id, parsed.count)
                    chosen = chooser.choose(parsed)
                    for hit in _by_void(state.lane, parsed, chosen, voids, (start, end)):
                        hit.path = self._path(state.lane, start)
                        yield hit
        yield from self._unmerged(selection, chooser)

    def sent(self, selection: Selection, known: Kept | None = None) -> Iterator[Hit]:
        """Messages that were delivered and are still kept, lane by lane."""
        known = Kept(self._spool, self._state) if known is None else known
        chooser = Chooser(self._spool, selection)
        for state in self.lanes(selection):
            for start, end, parsed in self.settled_frames(state, chooser):
                lost = known.lost(state, start, parsed)
                chosen = {i: one for i, one in chooser.choose(parsed).items() if i not in lost}
                if chosen:
                    hit = Hit("outbox", "sent", state.lane, parsed, chosen, start=start, end=end)
                    hit.path = self._path(state.lane, start)
                    yield hit

    def ended(self, selection: Selection) -> Iterator[Hit]:
        """Settled messages that were not delivered, as far as it is still known: expired, purged;
        dead letters come from `dead`."""
        chooser = Chooser(self._spool, selection)
        for state in self.lanes(selection):
            for start, end, parsed in self.settled_frames(state, chooser):
                reasons = dict(self._state.closed.get(parsed.frame_id, ()))
                if state.is_purged(start):
                    reasons |= {i: "purged" for i in range(parsed.count) if i not in reasons}
                chosen = {i: one for i, one in chooser.choose(parsed).items() if i in reasons}
                for hit in _by_void(state.lane, parsed, chosen, reasons, (start, end)):
                    hit.path = self._path(state.lane, start)
                    yield hit

    def dead(self, selection: Selection) -> Iterator[Hit]:
        """The dead letters of the outbox, oldest first."""
        return dead_hits(self._spool, selection, "outbox", self._spool.layout.outbox_dead)

    def settled_frames(
        self, state: LaneState, chooser: Chooser, start: Pos | None = None
    ) -> Iterator[tuple[Pos, Pos, Frame]]:
        """The frames of a lane that are settled and kept, from `start` on."""
        begin = Pos(state.first_segment, FILE_HEADER_BYTES) if start is None else start
        stop = max([state.cursor, *(skip.end for skip in state.skips)])
        for at, end, parsed in self.frames(state, begin, stop, chooser):
            if at < state.cursor or state.skip_at(at) is not None:
                yield at, end, parsed

    def frames(
        self, state: LaneState, start: Pos, stop: Pos, chooser: Chooser
    ) -> Iterator[tuple[Pos, Pos, Frame]]:
        """(start, end, frame) of what a lane holds between two places and may be meant."""
        for segment, _, item in self._files.walk(state, start):
            if isinstance(item, log.Damage) or not item.frame:
                continue
            at = Pos(segment, item.head.offset)
            if at >= stop:
                return
            try:
                if chooser.may_mean(frame.peek(item.frame)):
                    yield at, Pos(segment, item.head.end), parse_stored(item)
            except BadData:
                continue  # fsck and the sender tell of it

    def _unmerged(self, selection: Selection, chooser: Chooser) -> Iterator[Hit]:
        fs, layout = self._spool.fs, self._spool.layout
        broken = left_behind(fs, layout)
        for name in list_journals(fs, layout):
            journal = None
            with suppress(BadData):
                journal = open_journal(fs, layout, name)
            if journal is None:
                continue
            try:
                start = self._state.merged.get(name, FILE_HEADER_BYTES)
                end = min(journal.published(), broken.get(name, 1 << 62))
                log_id = journal.header.log_id
                for item in log.Walk(fs, journal.fd, log_id, start, promised=end, stop=end):
                    if isinstance(item, log.Damage) or not item.frame:
                        continue
                    with suppress(BadData):
                        info = frame.peek(item.frame)
                        parsed = frame.parse(item.frame)
                        if selection.in_lane(*parsed.lane) and chooser.may_mean(info):
                            chosen = chooser.choose(parsed)
                            if chosen:
                                yield Hit(
                                    "outbox",
                                    "waiting",
                                    parsed.lane,
                                    parsed,
                                    chosen,
                                    path=f"outbox/journals/{name}",
                                )
            finally:
                journal.close()

    def _path(self, lane: Lane, pos: Pos) -> str:
        return f"outbox/lanes/{lane}/{pos.segment:08d}.log"


class Kept:
    """Which settled messages were not delivered. Reads dead.log once."""

    def __init__(self, spool: Spool, state: OutboxState) -> None:
        self._state = state
        self._dead: dict[bytes, set[int]] = {}
        path = spool.layout.outbox_dead
        for letter in read_letters(spool.fs, path, gone_letters(spool.fs, path)):
            self._dead.setdefault(letter.frame.frame_id, set()).update(letter.reasons)

    def lost(self, state: LaneState, at: Pos, parsed: Frame) -> set[int]:
        """The indexes of those of a settled frame."""
        if state.is_purged(at):
            return set(range(parsed.count))
        lost = set(self._state.closed.get(parsed.frame_id, ()))
        lost |= self._dead.get(parsed.frame_id, set())
        return lost | set(parsed.voids)


def dead_hits(
    spool: Spool, selection: Selection, box: str, path: str, start: int = FILE_HEADER_BYTES
) -> Iterator[Hit]:
    """The living letters of a dead log that are meant, from offset `start` on."""
    chooser = Chooser(spool, selection)
    gone = gone_letters(spool.fs, path)
    for letter in read_letters(spool.fs, path, gone, start):
        if not selection.in_lane(*letter.lane) or not chooser.may_mean(letter.frame.info):
            continue
        chosen = {
            i: one
            for i, one in chooser.choose(letter.frame).items()
            if i in letter.reasons and selection.because(letter.reasons[i])
        }
        if chosen:
            yield Hit(
                box,
                "dead",
                letter.lane,
                letter.frame,
                chosen,
                letter.reasons,
                start=Pos(0, letter.start),
                end=Pos(0, letter.end),
                path=f"{box}/dead.log",
            )


def _by_void(
    lane: Lane,
    parsed: Frame,
    chosen: dict[int, bytes],
    voids: Mapping[int, str],
    place: Sequence[Pos],
) -> Iterator[Hit]:
    """Those that wait, and those that will go out, or have gone out, as holes: by their reason."""
    groups: dict[str, dict[int, bytes]] = {}
    for index, one in chosen.items():
        why = voids.get(index)
        groups.setdefault("waiting" if why is None else why, {})[index] = one
    for why, some in groups.items():
        reasons = {} if why == "waiting" else dict.fromkeys(some, why)
        yield Hit("outbox", why, lane, parsed, some, reasons, start=place[0], end=place[1])
