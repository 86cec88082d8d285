"""What a merge round works with: journals as sources of frames, and what goes into each lane.

Owns no file; `droprd.spool.merging` opens journals and lanes, and decides. A frame whose bodies do
not match their checksums goes on with those left out; a frame that cannot be read at all, and bytes
that hold none, are handed to whoever keeps damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from droprd.core import entry, frame
from droprd.core.frame import Buffer
from droprd.core.merge import Stamped
from droprd.core.outstate import MergedLane
from droprd.errors import BadData
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.fsops import Fs

CORRUPT = "corrupt"


@dataclass(slots=True)
class Journal:
    """A journal as the sender reads it."""

    name: str
    fd: int
    log_id: bytes
    limit: int
    is_ours: bool = False  # we hold its lock, and `limit` is its final end
    seen_ns: int = 0  # when it last had something new


class Item:
    """A frame on its way from a journal into its lane."""

    __slots__ = ("bad", "end", "frame", "note", "offset", "pieces", "size")

    def __init__(self, parsed: frame.Frame, offset: int, end: int, bad: Sequence[int]) -> None:
        self.frame = parsed
        self.offset = offset
        self.end = end
        self.bad = bad
        self.note = b""
        self.pieces: list[Buffer] = [parsed.data]
        self.size = len(parsed.data)
        if bad:
            self.note = entry.pack_note({"v": [[i, CORRUPT] for i in bad]})
            self.pieces = parsed.without(bad)
            self.size = sum(map(len, self.pieces))

    @property
    def entry_bytes(self) -> int:
        return entry.ENTRY_BYTES + len(self.note) + self.size


class Source:
    """The frames of one journal from where it was merged to, for one round."""

    def __init__(
        self, fs: Fs, journal: Journal, start: int, damaged: Callable[[Journal, int, int], None]
    ) -> None:
        """`damaged(journal, start, end)` is told of promised bytes that cannot be read."""
        self._journal = journal
        self._damaged = damaged
        self.position = start
        self.is_done = False
        self.walk = log.Walk(
            fs, journal.fd, journal.log_id, start, promised=journal.limit, stop=journal.limit
        )

    def __iter__(self) -> Iterator[tuple[Stamped, Item]]:
        for item in self.walk:
            if isinstance(item, log.Damage):
                self._damaged(self._journal, item.start, item.end)
                continue
            if not item.frame:
                continue
            try:
                parsed = frame.parse(item.frame)
            except BadData:
                self._damaged(self._journal, item.head.offset, item.head.end)
                continue
            found = Item(parsed, item.head.offset, item.head.end, parsed.bad_bodies())
            info = parsed.info
            yield Stamped(info.boot_id, info.boot_ns, found.size), found
        self.is_done = True

    def took(self, item: Item) -> tuple[int, int]:
        """The range of the journal that this item covers, with what lay before it."""
        start = self.position
        self.position = item.end
        return start, item.end


class Part:
    """What a round appends to one lane."""

    def __init__(self, segment: int, writer: log.LogWriter) -> None:
        self._segment = segment
        self._writer = writer
        self._start = writer.end
        self.messages = 0
        self.bytes = 0
        self.voids: list[tuple[bytes, Sequence[int]]] = []

    def append(self, item: Item) -> None:
        self._writer.append(item.note, item.pieces, item.size)
        self.messages += item.frame.count
        self.bytes += item.frame.info.bodies_bytes
        if item.bad:
            self.voids.append((item.frame.frame_id, item.bad))

    def merged(self, lane: Lane) -> MergedLane:
        return MergedLane(
            lane, self._segment, self._start, self._writer.end, self.messages, self.bytes
        )
