"""The sender's side of the spool: journals become lanes, lanes become pushes, answers end messages.

Owns everything under `outbox/` except what producers write into their journals. One process, one
thread; every method may touch the disk and returns when that is done.

Guarantees (see the modules it is made of): a frame enters its lane once, in the order of stamps;
nothing is sent that is not committed; a lane segment is deleted only after the receipt that covers
it is synced; counts add up: accepted = queued + delivered + dead + expired + purged.

A crash leaves what `sender.log` says; `OutboxStore.open` makes the lanes agree with it.

Raises: OSError from the disk (the process must end, and recovery decides), SpoolCorrupt.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Literal

from droprd.core import frame
from droprd.core.ask import MatchAnswer, MatchRequest
from droprd.core.entry import FILE_HEADER_BYTES, Kind
from droprd.core.outstate import LaneState, OutboxState, Pos
from droprd.core.push import FRAMES_PER_PUSH_MAX, PUSH_BYTES_MAX, LaneAnswer
from droprd.errors import BadData
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.deadlog import DeadLog
from droprd.spool.fixing import OutboxFixer, letters_note
from droprd.spool.freeing import Freer
from droprd.spool.handle import Spool
from droprd.spool.lanes import LaneFiles
from droprd.spool.mending import mend
from droprd.spool.merging import Merger, MergeResult
from droprd.spool.outgoing import Outgoing, build, elapsed_ms
from droprd.spool.senderlog import SenderLog, open_sender_log
from droprd.spool.settling import HELD_RESET, Conversation, Outcome, Settler

CLOCK_PARTED_NS = 300 * 1_000_000_000
SEGMENT_BYTES_MAX = 16 << 20
UNSYNCED_MERGES_MAX = 2000


class OutboxStore:
    """The outbox as the sender works on it. Made by `open`."""

    def __init__(
        self,
        spool: Spool,
        sender_log: SenderLog,
        *,
        segment_bytes_max: int,
        retain_s: float,
        idle_s: float,
    ) -> None:
        self._spool = spool
        self._log = sender_log
        self._retain_ns = int(retain_s * 1e9)
        self._files = LaneFiles(spool, segment_bytes_max)
        self._dead = DeadLog(spool, spool.layout.outbox_dead, Kind.OUTBOX_DEAD)
        self._merger = Merger(spool, sender_log, self._files, idle_s=idle_s)
        self._settler = Settler(spool, sender_log, self._files, self._dead, self.merge_all)
        self._freer = Freer(spool, lambda: sender_log.state, self._files)
        self._busy: Counter[Lane] = Counter()
        self._settled_ns: dict[tuple[Lane, int], int] = {}
        clock = spool.clock
        self._wall_minus_boot_ns = clock.wall_ns() - clock.boot_ns()
        self.corrupt_bytes = 0
        self.put_back = 0

    @classmethod
    def open(
        cls,
        spool: Spool,
        *,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
        retain_s: float = 86_400,
        idle_s: float = 5,
    ) -> OutboxStore:
        """Open the outbox and mend what a crash left.

        Args:
            retain_s: seconds for which delivered messages stay in the lanes.
            idle_s: seconds without news after which a journal is looked at whether it is still
                held by anybody.

        Raises: SpoolCorrupt, OSError.
        """
        sender_log, damage = open_sender_log(spool)
        store = cls(
            spool, sender_log, segment_bytes_max=segment_bytes_max, retain_s=retain_s, idle_s=idle_s
        )
        store.corrupt_bytes = sum(d.end - d.start for d in damage)
        store.put_back = mend(spool, sender_log.state, store._files)
        store._take_in_letters()
        store._merger.remove_orphans()
        return store

    def _take_in_letters(self) -> None:
        """Count what an operator took out of dead.log just before a crash."""
        changes = self._dead.taken_since(self._log.state.letters_op)
        for op, taken in changes:
            self._log.add(letters_note(op, taken))
        if changes:
            self._log.commit()

    def fixer(self) -> OutboxFixer:
        """What requeues and purges for an operator. Of several, one works at a time."""
        return OutboxFixer(self._spool, self._log, self._dead, self.merge_all, self._freer.add)

    @property
    def state(self) -> OutboxState:
        """Lanes and counts; to be read only."""
        return self._log.state

    def lane(self, lane: Lane) -> LaneState:
        """The state of one lane; to be read only."""
        return self._log.state.lane(lane)

    @property
    def spool_id(self) -> bytes:
        return self._spool.spool_id

    # -- merging -------------------------------------------------------------------------------

    def merge_round(self) -> MergeResult:
        """Take what producers wrote into the lanes; committed when it returns."""
        return self._merger.round()

    def merge_all(self) -> None:
        """Merge until the journals hold nothing more that was there when this began."""
        while self._merger.round().more:
            pass

    def commit(self) -> None:
        """Make receipts durable that were only noted so far."""
        self._log.commit()

    def unmerged_bytes(self) -> int:
        return self._merger.unmerged_bytes()

    # -- pushing -------------------------------------------------------------------------------

    def next_push(
        self,
        lane: Lane,
        bytes_max: int = PUSH_BYTES_MAX,
        frames_max: int = FRAMES_PER_PUSH_MAX,
    ) -> Outgoing | None:
        """What to push next on a lane, at least one frame if any waits; None if nothing does.

        The caller calls `release` when the request is over. One request of a lane at a time.
        """
        state = self._log.state.lane(lane)
        if state.is_idle or state.hold is not None:
            return None
        is_new = False

        def on_void(frame_id: bytes, reasons: dict[int, str]) -> None:
            nonlocal is_new
            is_new = True
            self._log.add(["void", list(lane), frame_id, [[i, r] for i, r in reasons.items()]])

        out = build(
            self._spool.fs,
            self._spool.clock,
            self._files,
            state,
            bytes_max,
            may_expire=not self.clock_parted,
            on_void=on_void,
            on_damage=partial(self._keep_damage, lane),
            blob_is_whole=self._blob_is_whole,
            frames_max=frames_max,
        )
        if is_new:
            # If we stop here: the messages are voided, and their frames go out with holes later.
            self._log.commit()
        if not out.frames:
            self._settler.settle_damaged(state)
            self._log.commit()
            return None
        self._busy[lane] += 1
        return out

    def _keep_damage(self, lane: Lane, segment: int, start: int, end: int) -> None:
        """Set aside bytes of a lane that hold no frame any more."""
        fs = self._spool.fs
        path = self._files.path(lane, segment)
        fd = fs.open(path, os.O_RDONLY)
        try:
            self._spool.set_aside(path, start, fs.read_at(fd, end - start, start))
        finally:
            fs.close(fd)
        self.corrupt_bytes += end - start

    @property
    def clock_parted(self) -> bool:
        """Whether the wall clock has jumped by more than five minutes since the start: then
        nothing is expired or deleted by age."""
        clock = self._spool.clock
        parted_ns = clock.wall_ns() - clock.boot_ns() - self._wall_minus_boot_ns
        return abs(parted_ns) > CLOCK_PARTED_NS

    def accept_clock(self) -> None:
        """An operator, or two peers, vouch for the present wall clock."""
        clock = self._spool.clock
        self._wall_minus_boot_ns = clock.wall_ns() - clock.boot_ns()

    def release(self, out: Outgoing) -> None:
        """The request is over, whatever came of it."""
        if out.is_open:  # a request may be said to be over more than once
            self._busy[out.lane] -= 1
            if not self._busy[out.lane]:
                del self._busy[out.lane]
        out.release(self._spool.fs)

    def open_blob(self, frame_id: bytes) -> int:
        """A descriptor of a blob that waits; the caller closes it."""
        fs, layout = self._spool.fs, self._spool.layout
        try:
            return fs.open(layout.outbox_blob(frame_id), os.O_RDONLY)
        except FileNotFoundError:
            for name in fs.listdir(layout.outbox_blobs):
                if name.endswith(f"~{frame_id.hex()}"):
                    return fs.open(f"{layout.outbox_blobs}/{name}", os.O_RDONLY)
            raise

    def _blob_is_whole(self, frame_id: bytes, size: int) -> bool:
        try:
            fd = self.open_blob(frame_id)
        except FileNotFoundError:
            return False
        try:
            return self._spool.fs.size(fd) == size
        finally:
            self._spool.fs.close(fd)

    def oldest_wall_ns(self, lane: Lane) -> int | None:
        """When the oldest waiting message of a lane was sent, by the wall clock; None if none."""
        info = self._oldest(lane)
        return None if info is None else info.wall_ns

    def _oldest(self, lane: Lane) -> frame.FrameInfo | None:
        state = self._log.state.lane(lane)
        if state.is_idle:
            return None
        for _, _, item in self._files.walk(state, state.cursor):
            if isinstance(item, log.Entry):
                try:
                    return frame.peek(item.frame)
                except BadData:
                    return None
        return None

    def oldest_age_s(self, lane: Lane) -> float | None:
        """Age of the oldest waiting message in seconds, None if none waits."""
        info = self._oldest(lane)
        return None if info is None else elapsed_ms(self._spool.clock, info) / 1000

    # -- answers -------------------------------------------------------------------------------

    def on_answer(self, out: Outgoing, answer: LaneAnswer) -> Outcome:
        """Take the receiver's word on one lane of a push. Durable after `commit` at the latest.

        Raises: BadData if the answer contradicts the push.
        """
        return self._settler.on_answer(out, answer)

    def begin_match(
        self, lane: Lane, mode: Literal["", "replay", "continue"] = ""
    ) -> tuple[Conversation, MatchRequest]:
        """Begin to find out where the receiver stands, after a conflict or for an operator."""
        talk = Conversation(lane, mode)
        return talk, self._settler.match_request(talk)

    def on_match(self, talk: Conversation, answer: MatchAnswer) -> MatchRequest | Outcome:
        """Take a page: what to ask next, or what came of it. Raises: BadData."""
        return self._settler.on_match(talk, answer)

    def held_by_reset(self, peer: str) -> list[Lane]:
        """The lanes of a peer that wait for `peer reset`."""
        return [
            s.lane
            for s in self._log.state.lanes.values()
            if s.lane.peer == peer and s.hold == HELD_RESET
        ]

    # -- tending -------------------------------------------------------------------------------

    def tend(self, *, space_wanted: bool = False) -> None:
        """What need not be done at once: journals merged to their end, segments past retention."""
        self._merger.retire()
        if self._log.wants_checkpoint or len(self._log.state.unsynced) > UNSYNCED_MERGES_MAX:
            # Journals that are held for long must not make the sender's memory grow.
            self._merger.sync_lanes()
        if not self._freer.is_idle:
            self._freer.work(self._busy, self._merger.sync_lanes)
        self._drop_segments(space_wanted)

    def _drop_segments(self, space_wanted: bool) -> None:
        fs, now_ns = self._spool.fs, self._spool.clock.boot_ns()
        doomed: list[tuple[LaneState, int]] = []
        for state in self._log.state.lanes.values():
            last = state.cursor.segment
            if state.is_idle and state.tail.offset > FILE_HEADER_BYTES:
                last = state.tail.segment + 1  # nothing waits: the newest one may go too
            upto = state.first_segment
            is_going = True
            for segment in range(state.first_segment, last):
                since_ns = self._settled_ns.setdefault((state.lane, segment), now_ns)
                is_old = now_ns - since_ns >= self._retain_ns and not self.clock_parted
                is_going &= is_old or (space_wanted and segment < state.tail.segment)
                if is_going:
                    upto = segment + 1
            if upto > state.first_segment:
                doomed.append((state, upto))
        if not doomed:
            return
        self._merger.sync_lanes()  # and with it the receipts that cover what is deleted
        letters: set[bytes] | None = None
        for state, upto in doomed:
            old = range(state.first_segment, upto)
            for segment in old:
                for frame_id in self._blobs_of(state, segment):
                    if letters is None:
                        letters = self._dead.blobs()
                    path = self._spool.layout.outbox_blob(frame_id)
                    if frame_id not in letters and fs.stat(path) is not None:
                        fs.unlink(path)
                path = self._files.path(state.lane, segment)
                if fs.stat(path) is not None:
                    # If we stop here: a segment below the cursor may be gone or there; both are
                    # legal, for nothing in it waits.
                    fs.unlink(path)
                self._settled_ns.pop((state.lane, segment), None)
            self._log.add(["drop", list(state.lane), upto])
        self._log.commit()

    def _blobs_of(self, state: LaneState, segment: int) -> list[bytes]:
        found = []
        for number, _, item in self._files.walk(state, Pos(segment, FILE_HEADER_BYTES)):
            if number != segment:
                break
            if isinstance(item, log.Entry) and item.frame:
                info = frame.peek(item.frame)
                if info.is_blob:
                    found.append(info.frame_id)
        return found

    def waiting_lanes(self) -> Iterator[LaneState]:
        """Lanes with something to push."""
        return (s for s in self._log.state.lanes.values() if not s.is_idle and s.hold is None)

    def close(self, *, commit: bool = True) -> None:
        """Commit what is noted, and close all files."""
        if commit:
            self._log.commit()
        self._merger.close()
        self._files.close()
        self._dead.close()
        self._log.close()
