"""A log of dead letters: messages that will not be delivered, kept with their reason.

Owns `outbox/dead.log` (the sender) and `inbox/dead.log` (the janitor). An entry is a note
{"l": [peer, channel, priority], "i": [[index, reason]…], "v": [[index, ""]…]} and the frame, in
which only the bodies of the dead messages remain ("v" names those left out). Dead letters are never
deleted by age. An operator takes them away, to send them again or for good: then a note without a
frame follows, {"o": 16 bytes that name this change, "g": [[lane, [[frame id, indexes]…], why]…]},
and speaks of the letters before it. Once most of the file is gone it is written anew.

A crash may leave a dead letter that no settled receipt speaks of: it is written first, and written
again when the receipt comes again; readers take one of a message.

Raises: OSError; BadData for a file that is no such log.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from droprd.core import entry
from droprd.core import frame as frames
from droprd.core.entry import FILE_HEADER_BYTES, Kind
from droprd.core.frame import Frame
from droprd.errors import BadData
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.fsops import Fs
from droprd.spool.handle import Spool

COMPACT_BYTES_MIN = 256 << 10

Letters = Sequence[tuple[bytes, Sequence[int]]]
Taken = Sequence[tuple[Lane, Letters, str]]
"""Which letters of which lanes were taken away, and why."""


class Letter(NamedTuple):
    """The dead letters of one frame. `lane.peer` is the other node; `start`, `end` its place."""

    lane: Lane
    frame: Frame
    reasons: dict[int, str]
    start: int
    end: int


class DeadLog:
    """Dead letters, appended by their one writer."""

    def __init__(self, spool: Spool, path: str, kind: Kind) -> None:
        self._spool = spool
        self._path = path
        self._kind = kind
        self._writer: log.LogWriter | None = None

    def _open(self) -> log.LogWriter:
        if self._writer is None:
            spool = self._spool
            if spool.fs.stat(self._path) is None:
                new = f"{self._path}.new"
                if spool.fs.stat(new) is not None:
                    spool.fs.unlink(new)
                # Under its own name it is whole from the first: a power cut must not leave a log
                # whose header cannot be read.
                self._writer = self._create(new)
                spool.fs.rename(new, self._path)
                spool.fs.sync_dir(os.path.dirname(self._path), "dead.create_dir")
                self._writer.path = self._path
            else:
                self._writer = log.recover(
                    spool.fs, self._path, self._kind, site="dead", set_aside=spool.set_aside
                ).writer
        return self._writer

    def recover(self) -> None:
        """If there is a file, make all that was promised in it known to those who only read: a
        power cut takes back what was published last."""
        if self._spool.fs.stat(self._path) is not None:
            self._open()

    def _create(self, path: str) -> log.LogWriter:
        spool = self._spool
        return log.create(
            spool.fs,
            path,
            self._kind,
            log_id=spool.urandom(16),
            spool_id=spool.spool_id,
            wall_ns=spool.clock.wall_ns(),
            site="dead",
        )

    def append(self, peer: str, frame: Frame, reasons: Mapping[int, str]) -> None:
        """Keep these messages of a frame; `peer` is the other node. On disk after `sync`."""
        kept = {i for i, reason in reasons.items() if reason != "corrupt"} - set(frame.voids)
        left_out = {i for i in range(frame.count) if i not in kept}
        pieces = frame.without(left_out)
        note = {
            "l": [peer, frame.lane.channel, frame.lane.priority],
            "i": [[index, reason] for index, reason in reasons.items()],
            "v": [[index, ""] for index in sorted(left_out)],
        }
        self._open().append(entry.pack_note(note), pieces, sum(map(len, pieces)))

    def take(self, taken: Taken) -> bytes:
        """Note that letters are taken away. On disk when it returns the name of this change."""
        op = self._spool.urandom(16)
        gone = [[list(lane), [[f, list(i)] for f, i in of], why] for lane, of, why in taken]
        self._open().append(entry.pack_note({"o": op, "g": gone}))
        self.sync()
        return op

    def taken_since(self, op: bytes) -> list[tuple[bytes, Taken]]:
        """The changes after the one of that name, oldest first; all if `op` is empty."""
        self.recover()
        found: list[tuple[bytes, Taken]] = []
        known = not op
        for item in _entries(self._spool.fs, self._path):
            if isinstance(item, log.Entry) and not item.frame:
                its_op, taken = _taken(item)
                if known:
                    found.append((its_op, taken))
                known |= its_op == op
        return found

    def blobs(self) -> set[bytes]:
        """The frame ids of the letters whose body is a file."""
        fs, path = self._spool.fs, self._path
        self.sync()
        found = read_letters(fs, path, gone_letters(fs, path))
        return {one.frame.frame_id for one in found if one.frame.info.is_blob}

    def compact(self, op: bytes) -> None:
        """Write the file anew if most of it is gone. `op` is the last change; all who count have
        taken it in."""
        fs, path = self._spool.fs, self._path
        size = self._open().end
        gone = gone_letters(fs, path)
        living = sum(one.end - one.start for one in read_letters(fs, path, gone))
        if living and (size < COMPACT_BYTES_MIN or 2 * living > size):
            return
        new = f"{path}.new"
        if fs.stat(new) is not None:
            fs.unlink(new)
        writer = self._create(new)
        writer.append(entry.pack_note({"o": op, "g": []}))
        for one in read_letters(fs, path, gone):
            note = {
                "l": list(one.lane),
                "i": [[index, why] for index, why in one.reasons.items()],
                "v": [[index, ""] for index in sorted(one.frame.voids)],
            }
            data = one.frame.data
            writer.append(entry.pack_note(note), [data], len(data))
            writer.flush()
        writer.seal("dead.compact")
        # If we stop here: the old file counts, and says the same.
        fs.rename(new, path)
        fs.sync_dir(os.path.dirname(path), "dead.compact_dir")
        self._open().close()
        writer.path = path
        self._writer = writer

    def sync(self) -> None:
        """Make what was appended durable."""
        if self._writer is not None:
            self._writer.sync("dead.sync")

    def close(self) -> None:
        """Close the file; what was not synced is not promised."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Gone:
    """Which letters were taken away, and where the log says so."""

    def __init__(self) -> None:
        self._at: dict[bytes, dict[int, int]] = {}

    def add(self, taken: Taken, offset: int) -> None:
        """The note at `offset` says so."""
        for _, letters, _ in taken:
            for frame_id, indexes in letters:
                self._at.setdefault(frame_id, {}).update(dict.fromkeys(indexes, offset))

    def living(self, frame_id: bytes, reasons: dict[int, str], offset: int) -> dict[int, str]:
        """What is left of the letters at `offset`."""
        gone = self._at.get(frame_id)
        if gone is None:
            return reasons
        return {i: why for i, why in reasons.items() if gone.get(i, -1) < offset}


def gone_letters(fs: Fs, path: str) -> Gone:
    """All that was taken away, as far as the file still says so. Reads it once."""
    gone = Gone()
    for item in _entries(fs, path):
        if isinstance(item, log.Entry) and not item.frame:
            gone.add(_taken(item)[1], item.head.offset)
    return gone


def read_letters(
    fs: Fs, path: str, gone: Gone, start: int = FILE_HEADER_BYTES, stop: int | None = None
) -> Iterator[Letter]:
    """The living letters from `start` on, each frame's once where copies follow closely."""
    seen: dict[tuple[bytes, tuple[int, ...]], None] = {}
    for item in _entries(fs, path, start, stop):
        if not isinstance(item, log.Entry) or not item.frame:
            continue
        try:
            letter = _letter(item)
        except BadData:
            continue  # fsck tells of it
        reasons = gone.living(letter.frame.frame_id, letter.reasons, letter.start)
        key = letter.frame.frame_id, tuple(sorted(reasons))
        if not reasons or key in seen:
            continue
        seen[key] = None
        if len(seen) > 4096:
            del seen[next(iter(seen))]
        yield letter._replace(reasons=reasons)


def _entries(
    fs: Fs, path: str, start: int = FILE_HEADER_BYTES, stop: int | None = None
) -> Iterator[log.Entry | log.Damage]:
    try:
        fd = fs.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        header = log.read_header(fs, fd)
        published = log.read_published(fs, fd)
        end = published if stop is None else min(stop, published)
        yield from log.Walk(fs, fd, header.log_id, start, promised=end, stop=end)
    finally:
        fs.close(fd)


def _letter(item: log.Entry) -> Letter:
    try:
        note = entry.unpack_note(item.note)
        frame = frames.parse(bytes(item.frame), [v[0] for v in note["v"]])
        lane = Lane(*note["l"])
        reasons = {int(index): str(why) for index, why in note["i"]}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadData("a dead letter cannot be read", why=str(error)) from error
    return Letter(lane, frame, reasons, item.head.offset, item.head.end)


def _taken(item: log.Entry) -> tuple[bytes, Taken]:
    try:
        note = entry.unpack_note(item.note)
        taken = [
            (Lane(*lane), [(bytes(f), [int(i) for i in of]) for f, of in letters], str(why))
            for lane, letters, why in note["g"]
        ]
        return bytes(note["o"]), taken
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadData("a note in a dead log cannot be read", why=str(error)) from error


def count(items: Iterable[log.Entry | log.Damage]) -> int:
    """How many messages these entries of a dead log hold, those taken away left out."""
    total = 0
    for item in items:
        if isinstance(item, log.Entry) and item.frame:
            total += len(entry.unpack_note(item.note)["i"])
        elif isinstance(item, log.Entry):
            total -= sum(len(of) for _, letters, _ in _taken(item)[1] for _, of in letters)
    return total
