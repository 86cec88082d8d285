"""What an operator does to messages of the outbox: send them again, or purge them. The sender's.

`requeue` puts dead letters, or messages that were sent and are still kept, at the tail of their
lanes: into a journal of the sender's own, as any producer would, so that merging stays the only
way into lanes. Their frames are new, so nobody takes them for a repeat; the messages keep their own
ids inside. `purge` makes messages that wait void, takes dead letters away, and gives up kept ones.

Both are generators that yield now and then, with everything done so far on stable storage; the
sender may do other work in between. They end when nothing is left that was there at the beginning.

What a crash leaves: some of it done. A letter that was put and not yet noted as taken away is in
both places, and may be requeued twice; it is never in none.

Raises: OSError (the process must end), DroprdError for what a full disk refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.core.frame import Frame, new_frame_id
from droprd.core.outstate import PURGED, REQUEUED, LaneState, Pos
from droprd.model import Lane
from droprd.spool.blobs import Blob, copy_blob, merged_blob
from droprd.spool.deadlog import DeadLog
from droprd.spool.handle import Spool
from droprd.spool.journal import Journal
from droprd.spool.lookup import Chooser, Hit, Kept, OutboxView
from droprd.spool.puts import Put
from droprd.spool.senderlog import SenderLog

BODY_GONE = "its body is gone"
SHARES_FRAME = "it shares its frame with others that are kept"
SLICE_MESSAGES = 1000
SLICE_BYTES = 4 << 20
SLICE_FRAMES = 500

Free = Callable[[Lane, Pos, Pos], None]


class OutboxFixer:
    """Changes an outbox for an operator. Made by `OutboxStore.fixer`."""

    def __init__(
        self,
        spool: Spool,
        sender_log: SenderLog,
        dead: DeadLog,
        merge_all: Callable[[], None],
        free: Free,
    ) -> None:
        """`free(lane, start, end)` is told what the disk need no longer hold."""
        self._spool = spool
        self._log = sender_log
        self._dead = dead
        self._merge_all = merge_all
        self._free = free

    # -- requeue -------------------------------------------------------------------------------

    def requeue(self, selection: Selection, *, dry: bool = False) -> Iterator[Fixed]:
        """Send dead letters or kept messages again; with `dry`, only count."""
        fixed = Fixed()
        self._merge_all()
        again = _Again(self._spool, selection.ids is not None)
        try:
            if selection.wants("dead", "outbox"):
                yield from self._requeue(again, fixed, self._view().dead(selection), dry)
                if not dry and fixed.messages:
                    self._dead.compact(self._log.state.letters_op)
            if selection.wants("sent", "outbox"):
                yield from self._requeue(again, fixed, self._sent_before(selection), dry)
        finally:
            again.close()
        yield fixed

    def _view(self) -> OutboxView:
        return OutboxView(self._spool, self._log.state)

    def _sent_before(self, selection: Selection) -> Iterator[Hit]:
        """Kept messages as of now: not what we are about to put, once it is delivered."""
        clock = self._spool.clock
        boot_id, now_ns = clock.boot_id(), clock.boot_ns()
        for hit in self._view().sent(selection):
            info = hit.frame.info
            if info.boot_id != boot_id or info.boot_ns < now_ns:
                yield hit

    def _requeue(
        self, again: _Again, fixed: Fixed, hits: Iterator[Hit], dry: bool
    ) -> Iterator[Fixed]:
        batch: list[Hit] = []
        for looked, hit in enumerate(hits):
            fixed.met(hit.chosen.values())
            again.take(hit, fixed, dry=dry)
            batch.append(hit)
            if again.is_full or len(batch) >= SLICE_FRAMES:
                self._put(again, batch, fixed, dry)
                batch = []
                yield fixed
            elif looked % SLICE_FRAMES == SLICE_FRAMES - 1:
                yield fixed
        self._put(again, batch, fixed, dry)
        yield fixed

    def _put(self, again: _Again, batch: list[Hit], fixed: Fixed, dry: bool) -> None:
        done = again.put(fixed, dry=dry)
        letters = [(hit, done[id(hit)]) for hit in batch if hit.state == "dead" and id(hit) in done]
        if letters and not dry:
            # If we stop here: they are queued, and dead letters still.
            self._take(letters, REQUEUED)

    def _take(self, letters: list[tuple[Hit, list[int]]], why: str) -> None:
        """Note that letters are taken away, in their log and in the counts."""
        lanes: dict[Lane, list[tuple[bytes, list[int]]]] = {}
        for hit, indexes in letters:
            lanes.setdefault(hit.lane, []).append((hit.frame.frame_id, indexes))
        taken = [(lane, of, why) for lane, of in lanes.items()]
        op = self._dead.take(taken)
        # If we stop here: the next start takes the counts from dead.log.
        self._log.add(letters_note(op, taken))
        self._log.commit()
        for hit, _ in letters:
            if hit.frame.info.is_blob:
                # If we stop here: a file that its segment takes along, if that is still there.
                _unlink(self._spool, hit.frame.frame_id)

    # -- purge ---------------------------------------------------------------------------------

    def purge(self, selection: Selection, *, dry: bool = False) -> Iterator[Fixed]:
        """Purge messages that wait, dead letters, or kept ones; with `dry`, only count."""
        fixed = Fixed()
        self._merge_all()
        if selection.wants("waiting", "outbox"):
            for state in self._view().lanes(selection):
                yield from self._purge_lane(state, selection, fixed, dry)
        if selection.wants("dead", "outbox"):
            yield from self._purge_dead(selection, fixed, dry)
        if selection.what == "sent" and selection.wants("sent", "outbox"):
            yield from self._purge_sent(selection, fixed, dry)
        yield fixed

    def _purge_lane(
        self, state: LaneState, selection: Selection, fixed: Fixed, dry: bool
    ) -> Iterator[Fixed]:
        if state.is_idle:
            return
        chooser = Chooser(self._spool, selection)
        slice_ = _Purge()
        frames = self._view().frames(state, state.cursor, state.tail, chooser)
        for start, end, parsed in frames:
            if start < state.cursor or state.skip_at(start) is not None:
                continue  # it was settled while others had their turn
            voids = state.voids_at(start, parsed.frame_id, parsed.count)
            met = chooser.choose(parsed)
            fixed.met(met.values())
            chosen = [i for i in met if i not in voids]
            if not chosen:
                continue
            size = slice_.add(state, start, end, parsed, chosen, voids)
            fixed.did(len(chosen), size)
            if slice_.frames >= SLICE_FRAMES:
                self._void(state, slice_, dry)
                slice_ = _Purge()
                yield fixed
        self._void(state, slice_, dry)
        yield fixed

    def _void(self, state: LaneState, purge: _Purge, dry: bool) -> None:
        if dry or not purge.frames:
            return
        lane = list(state.lane)
        for frame_id, indexes in purge.voids:
            self._log.add(["void", lane, frame_id, [[i, PURGED] for i in indexes]])
        self._log.add(["purge", lane, [[list(a), list(b)] for a, b in purge.ranges], purge.bytes])
        # If we stop here: they are void, and their frames go out with holes.
        self._log.commit()
        for start, end in purge.ranges:
            self._free(state.lane, start, end)

    def _purge_dead(self, selection: Selection, fixed: Fixed, dry: bool) -> Iterator[Fixed]:
        batch: list[tuple[Hit, list[int]]] = []
        for hit in self._view().dead(selection):
            fixed.met(hit.chosen.values())
            fixed.did(len(hit.chosen), sum(size_of(hit.frame, i) for i in hit.chosen))
            batch.append((hit, list(hit.chosen)))
            if len(batch) >= SLICE_FRAMES:
                if not dry:
                    self._take(batch, PURGED)
                batch = []
                yield fixed
        if batch and not dry:
            self._take(batch, PURGED)
        if fixed.messages and not dry:
            self._dead.compact(self._log.state.letters_op)
        yield fixed

    def _purge_sent(self, selection: Selection, fixed: Fixed, dry: bool) -> Iterator[Fixed]:
        """Give up kept messages: whole frames only."""
        chooser = Chooser(self._spool, selection)
        kept = Kept(self._spool, self._log.state)
        view = self._view()
        for state in view.lanes(selection):
            slice_ = _Purge()
            for start, end, parsed in view.settled_frames(state, chooser):
                lost = kept.lost(state, start, parsed)
                chosen = [i for i in chooser.choose(parsed) if i not in lost]
                fixed.met(chooser.choose(parsed).values())
                if not chosen:
                    continue
                if len(chosen) + len(lost) < parsed.count:
                    fixed.skipped[SHARES_FRAME] += len(chosen)
                    continue
                slice_.ranges.append((start, end))
                slice_.frames += 1
                fixed.did(len(chosen), sum(size_of(parsed, i) for i in chosen))
                if slice_.frames >= SLICE_FRAMES:
                    self._void(state, slice_, dry)
                    slice_ = _Purge()
                    yield fixed
            self._void(state, slice_, dry)
            yield fixed


class _Purge:
    """What one slice of a purge makes void in one lane."""

    def __init__(self) -> None:
        self.ranges: list[tuple[Pos, Pos]] = []
        self.voids: list[tuple[bytes, list[int]]] = []
        self.bytes = 0
        self.frames = 0

    def add(
        self,
        state: LaneState,
        start: Pos,
        end: Pos,
        parsed: Frame,
        chosen: list[int],
        voids: Mapping[int, str],
    ) -> int:
        """Take these messages of a frame in; returns their bytes."""
        self.frames += 1
        if len(chosen) + len(voids) == parsed.count:
            size = state.bytes_at(start, parsed)
            self.ranges.append((start, end))
        else:
            size = sum(size_of(parsed, i) for i in chosen)
            self.voids.append((parsed.frame_id, chosen))
        self.bytes += size
        return size


class _Again:
    """Messages on their way into a journal once more."""

    def __init__(self, spool: Spool, once: bool) -> None:
        """`once`: of the copies of one message only the first one is taken."""
        self._spool = spool
        self._journal: Journal | None = None
        self._pinned: list[str] = []
        self._seen: set[bytes] | None = set() if once else None
        self._puts: list[tuple[Hit, int, Put]] = []
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether it is time to `put`."""
        return len(self._puts) >= SLICE_MESSAGES or self._bytes >= SLICE_BYTES

    def take(self, hit: Hit, fixed: Fixed, *, dry: bool) -> None:
        """Take the chosen messages of a frame, as far as they have bodies."""
        frame = hit.frame
        bad = {*frame.bad_bodies(), *frame.voids}
        for index, raw in sorted(hit.chosen.items()):
            if self._seen is not None:
                if raw in self._seen:
                    continue
                self._seen.add(raw)
            body: bytes | Blob | None = None
            if index not in bad:
                body = self._blob(frame, dry) if frame.info.is_blob else bytes(frame.body(index))
            if body is None:
                fixed.skipped[BODY_GONE] += 1
                continue
            put = Put(hit.lane, [body], values_of(frame, index, raw), ttl_ms=frame.info.ttl_ms)
            self._puts.append((hit, index, put))
            self._bytes += put.size

    def put(self, fixed: Fixed, *, dry: bool) -> dict[int, list[int]]:
        """Put what was taken; the indexes done of each hit, by its `id`."""
        done: dict[int, list[int]] = {}
        run: list[Put] = []
        lives: dict[Lane, int] = {}
        for hit, index, put in self._puts:
            done.setdefault(id(hit), []).append(index)
            fixed.did(1, size_of(hit.frame, index))
            # One commit groups by time to live: another one must wait for the next.
            if lives.setdefault(put.lane, put.ttl_ms) != put.ttl_ms:
                self._commit(run, dry)
                run, lives = [], {put.lane: put.ttl_ms}
            run.append(put)
        self._commit(run, dry)
        self._puts, self._bytes = [], 0
        for name in self._pinned:
            if self._journal is not None:
                self._journal.unpin(name)
        self._pinned = []
        return done

    def _commit(self, puts: list[Put], dry: bool) -> None:
        if not puts or dry:
            return
        self._open().commit(puts)
        for put in puts:
            if put.error is not None:
                raise put.error

    def _open(self) -> Journal:
        if self._journal is None:
            spool = self._spool
            self._journal = Journal(
                spool.fs,
                spool.clock,
                spool.urandom,
                spool.layout,
                spool.spool_id,
                uid=os.geteuid(),
            )
        return self._journal

    def _blob(self, frame: Frame, dry: bool) -> Blob | bytes | None:
        spool = self._spool
        path = merged_blob(spool.fs, spool.layout, frame.frame_id)
        if path is None:
            return None
        fd = spool.fs.open(path, os.O_RDONLY)
        try:
            if spool.fs.size(fd) != frame.info.bodies_bytes:
                return None
            if dry:
                return b""
            name = self._open().pin()
            self._pinned.append(name)
            new_id = new_frame_id(spool.clock.wall_ns(), spool.urandom(10))
            return copy_blob(spool.fs, spool.layout, name, new_id, fd, frame.info.bodies_bytes)
        finally:
            spool.fs.close(fd)

    def close(self) -> None:
        """Let go of the journal: it is merged to its end then."""
        if self._journal is not None:
            self._journal.close()


def letters_note(op: bytes, taken: Any) -> list[Any]:
    """The note in sender.log that follows one in dead.log."""
    return [
        "letters",
        op,
        [[list(lane), [[f, list(i)] for f, i in of], w] for lane, of, w in taken],
    ]


def values_of(frame: Frame, index: int, raw: bytes) -> dict[str, Any]:
    """What the maps of a frame say of one message, with its own id."""
    values = {**frame.shared, **frame.singles.get(index, {})}
    values.pop("d", None)  # of a blob: the copy has one of its own
    h = raw.hex()
    values["i"] = f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"
    return values


def size_of(frame: Frame, index: int) -> int:
    """The bytes of one body."""
    return frame.info.bodies_bytes if frame.info.is_blob else frame.lengths[index]


def _unlink(spool: Spool, frame_id: bytes) -> None:
    path = merged_blob(spool.fs, spool.layout, frame_id)
    if path is not None:
        spool.fs.unlink(path)
