"""What happens to the inbox's messages when they are over: dead letters kept, segments deleted.

Owns `inbox/dead.log` (written through `DeadLog`) and the deletion of inbox segments and of the
blobs that belong to them. The janitor's.

Guarantees: a segment goes only as a whole, sealed, with a successor, every message in it settled
or dead, all under the claims lock: first its dead letters are copied to dead.log and synced, then
the claims say that it is forgotten, synced, and only then the files go. The body file of a dead
letter stays.

What a crash leaves: dead letters copied twice (the last `RECENT` copied are recognised and not
copied again), or a forgotten segment that is still there, which the next look deletes.

Raises OSError, SpoolBusy, SpoolCorrupt, BadData.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from itertools import pairwise

from droprd.core import entry as entries
from droprd.core import frame as frames
from droprd.core.claimops import REASON_CORRUPT, Now, Range, op_forget
from droprd.core.claims import Claims
from droprd.core.entry import Kind
from droprd.core.leasing import Stored
from droprd.spool import log
from droprd.spool.deadlog import DeadLog, Letters, Taken
from droprd.spool.handle import Spool
from droprd.spool.inbox import FilesStream
from droprd.spool.layout import segment_name, split_inbox_blob_name

LOCK_TIMEOUT_S = 0.5
RECENT = 65536


class DeadLetters:
    """The dead letters of the inbox that were copied out of their channels.

    `counts` are by channel; `blobs` those whose body is a file, as (sender, frame id).
    """

    def __init__(self, spool: Spool) -> None:
        """Read what is there. Raises: OSError, BadData."""
        self._spool = spool
        self._log = DeadLog(spool, spool.layout.inbox_dead, Kind.INBOX_DEAD)
        self._recent: deque[tuple[bytes, tuple[int, ...]]] = deque(maxlen=RECENT)
        self._known: set[tuple[bytes, tuple[int, ...]]] = set()
        self._op = b""
        self.counts: Counter[str] = Counter()
        self.blobs: set[tuple[str, bytes]] = set()
        path = spool.layout.inbox_dead
        if spool.fs.stat(path) is None:
            return
        self._log.recover()
        fd = spool.fs.open(path, os.O_RDONLY)
        try:
            header = log.read_header(spool.fs, fd)
            published = log.read_published(spool.fs, fd)
            for item in log.Walk(spool.fs, fd, header.log_id, promised=published):
                if isinstance(item, log.Entry):
                    self._remember(item)
        finally:
            spool.fs.close(fd)

    def _remember(self, item: log.Entry) -> None:
        note = entries.unpack_note(item.note)
        if not item.frame:
            for lane, letters, _ in note["g"]:
                self._forget(lane[1], lane[0], letters)
            return
        info = frames.peek(item.frame)
        peer, channel, _ = note["l"]
        self._count(peer, channel, info, tuple(index for index, _ in note["i"]))

    def _count(
        self, peer: str, channel: str, info: frames.FrameInfo, indexes: tuple[int, ...]
    ) -> bool:
        """False if it is there already."""
        key = (info.frame_id, indexes)
        if key in self._known:
            return False
        if len(self._recent) == RECENT:
            self._known.discard(self._recent[0])
        self._recent.append(key)
        self._known.add(key)
        self.counts[channel] += len(indexes)
        if info.is_blob:
            self.blobs.add((peer, info.frame_id))
        return True

    def _forget(self, channel: str, peer: str, letters: Letters) -> None:
        for frame_id, indexes in letters:
            self.counts[channel] -= len(indexes)
            self.blobs.discard((peer, frame_id))

    def take(self, taken: Taken) -> None:
        """Note that letters were sent again or purged; their body files go. On disk then."""
        self._op = self._log.take(taken)
        fs, layout = self._spool.fs, self._spool.layout
        for lane, letters, _ in taken:
            blobs = [(lane.peer, f) for f, _ in letters if (lane.peer, f) in self.blobs]
            self._forget(lane.channel, lane.peer, letters)
            for peer, frame_id in blobs:
                # If we stop here: a body file that nobody needs stays.
                if fs.stat(layout.inbox_blob(peer, frame_id)) is not None:
                    fs.unlink(layout.inbox_blob(peer, frame_id))

    def tidy(self) -> None:
        """Write the log anew if most of it is gone."""
        if self._op:
            self._log.compact(self._op)
            self._op = b""

    def bury(self, stored: Stored, reasons: dict[int, str], channel: str) -> None:
        """Copy dead letters of one frame; on disk after `sync`."""
        frame = stored.frame
        if frame is None:
            return  # unreadable: its bytes are in corrupt/
        if self._count(stored.sender, channel, frame.info, tuple(sorted(reasons))):
            self._log.append(stored.sender, frame, reasons)

    def sync(self) -> None:
        """Make what was copied durable. Raises: OSError."""
        self._log.sync()

    def close(self) -> None:
        """Close the file."""
        self._log.close()


class Retention:
    """Deletes the segments whose messages are over."""

    def __init__(self, spool: Spool, dead: DeadLetters) -> None:
        self._spool = spool
        self._dead = dead
        self._settled_ns: dict[tuple[str, int, int], int] = {}  # when it was first seen to be

    def delete_settled(self, stream: FilesStream, sealed: int, retain_s: float, now: Now) -> int:
        """Delete what may go of one stream; `sealed` is its newest sealed segment.

        Returns how many segments went. Raises: OSError, SpoolBusy, SpoolCorrupt.
        """
        segments = stream.log.segments()
        going = self._going(stream, segments, sealed, retain_s, now, stream.look())
        if not going:
            return 0
        claims = stream.acquire(LOCK_TIMEOUT_S)
        try:
            going = self._going(stream, segments, sealed, retain_s, now, claims)
            if not going:
                return 0
            end = going[-1][1][1]
            blobs = self._blobs_of(stream, going)
            keep_corrupt(self._spool, stream, claims, set())
            for first, last, why in claims.dead.between(0, end):
                self._bury(stream, (first, last), why.reason)
            self._dead.sync()
            # If we stop here: dead letters in both places; those copied last are recognised.
            if end > claims.floor:
                stream.append([op_forget(end)])
            stream.sync()
            # If we stop here: forgotten segments without use; the next look deletes them.
            self._delete(stream, [number for number, _ in going], blobs)
        finally:
            stream.release()
        for number, _ in going:
            self._settled_ns.pop((stream.channel, stream.priority, number), None)
        return len(going)

    def _going(
        self,
        stream: FilesStream,
        segments: list[tuple[int, int]],
        sealed: int,
        retain_s: float,
        now: Now,
        claims: Claims,
    ) -> list[tuple[int, Range]]:
        """The segments that may go, oldest first: (number, its seqs)."""
        going: list[tuple[int, Range]] = []
        lowest = claims.lowest_open()
        keeping = False
        for (number, base), (_, end) in pairwise(segments):
            if number > sealed or end > lowest:
                break
            if retain_s and end > claims.floor:
                key = (stream.channel, stream.priority, number)
                since_ns = self._settled_ns.setdefault(key, now.boot_ns)
                keeping |= now.held or now.boot_ns - since_ns < retain_s * 1e9
            if not keeping:
                going.append((number, (base, end)))
        return going

    def _bury(self, stream: FilesStream, dead: Range, reason: str) -> None:
        first, end = dead
        for stored in stream.read(first):
            if stored.first >= end:
                return
            a, b = max(first, stored.first), min(end, stored.end)
            reasons = {seq - stored.first: reason for seq in range(a, b)}
            self._dead.bury(stored, reasons, stream.channel)

    def _blobs_of(
        self, stream: FilesStream, going: list[tuple[int, Range]]
    ) -> list[tuple[str, bytes]]:
        """The blobs that belong to these segments. Reads them only if there are blobs at all."""
        spool = self._spool
        names = map(split_inbox_blob_name, spool.fs.listdir(spool.layout.inbox_blobs))
        there = {(found[0], found[1]) for found in names if found is not None and found[2]}
        if not there:
            return []
        end = going[-1][1][1]
        found = []
        for stored in stream.read(going[0][1][0]):
            if stored.first >= end:
                break
            if stored.frame is not None and stored.frame.info.is_blob:
                found.append((stored.sender, stored.frame.frame_id))
        return [blob for blob in found if blob in there]

    def _delete(
        self, stream: FilesStream, numbers: list[int], blobs: list[tuple[str, bytes]]
    ) -> None:
        fs, layout = self._spool.fs, self._spool.layout
        for sender, frame_id in blobs:
            if (sender, frame_id) not in self._dead.blobs:
                fs.unlink(layout.inbox_blob(sender, frame_id))
        directory = layout.stream(stream.channel, stream.priority)
        for number in numbers:
            fs.unlink(f"{directory}/{segment_name(number)}")
        fs.sync_dir(directory, "retention.delete")


def keep_corrupt(spool: Spool, stream: FilesStream, claims: Claims, known: set[int]) -> int:
    """Copy the entries of messages found corrupt to `corrupt/`, once.

    `known` are the seqs done before, for this process. Returns how many messages are corrupt.
    """
    count = 0
    for first, end, why in claims.dead:
        if why.reason != REASON_CORRUPT:
            continue
        count += end - first
        if first in known:
            continue
        known.add(first)
        for stored in stream.read(first):
            if stored.first >= end:
                break
            if stored.place is None:
                continue
            number, start, _ = stored.place
            segment = spool.layout.inbox_segment(stream.channel, stream.priority, number)
            what = os.path.relpath(segment, spool.layout.root).replace("/", "_")
            # Another start of the janitor may have done it: names tell, without the random part.
            if not any(
                name.startswith(f"{what}-{start}-")
                for name in spool.fs.listdir(spool.layout.corrupt)
            ):
                spool.set_aside(segment, start, stream.log.raw(stored.place))
    return count
