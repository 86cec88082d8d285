"""LaneCargo: what goes to one peer, from its lanes, and what becomes of the answers.

Joins the outbox store (spool) with a courier. A lane goes through one of three kinds of request:

    push      frames that follow the acknowledged head, several lanes in one request
    upload    a piece of a blob that a push was told to bring first; alone in its request
    match     after a conflict, or for an operator's `peer reset`: page by page; alone

Every answer is judged lane by lane: one lane's conflict or refusal never undoes or delays another.
A lane that meets the same conflict again and again, or whose answer leads nowhere, waits by its own
backoff. Uploads go in pieces of a request's size, so that urgent messages pass between them.

A crash loses what was not committed: it is asked for again, and the receiver's head decides.
Raises what the store raises (OSError, SpoolCorrupt): the worker must end then.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from droprd import logs
from droprd.core import ask, push
from droprd.core.ask import MatchRequest
from droprd.core.push import FRAMES_PER_PUSH_MAX
from droprd.core.schedule import Batch, Offer
from droprd.errors import BadData
from droprd.model import KIB, Lane
from droprd.net.transport import FileRange, Piece
from droprd.spool.fsops import Fs
from droprd.spool.outbox import OutboxStore
from droprd.spool.outgoing import Outgoing
from droprd.spool.settling import Conversation, Outcome
from droprd.workers.courier import Courier, Job

CONFLICTS_IN_A_ROW_MAX = 3
# "One frame" of a blob.
PIECE_BYTES_MIN = 32 * KIB
# Of a preamble, for what travels beside the frames; one frame more always fits.
BESIDE_BYTES_MAX = push.PREAMBLE_BYTES_MAX // 2

log = logging.getLogger("droprd.sender")

Mode = Literal["", "replay", "continue"]
Told = Callable[[str], None]


@dataclass(slots=True)
class _Upload:
    """A blob that must be there before its frame is pushed."""

    frame_id: bytes
    size: int
    have: int
    careful: bool = False


@dataclass(slots=True)
class _Match:
    """A match that has begun; `told` gets its outcome for an operator who waits for it."""

    talk: Conversation
    request: MatchRequest
    told: Told | None = None


class LaneCargo:
    """The cargo of one peer."""

    def __init__(
        self,
        fs: Fs,
        store: OutboxStore,
        courier: Courier,
        commit_soon: Callable[[], None],
        merged: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        """What the courier carries.

        `commit_soon` has what the store noted committed within some milliseconds; `merged` is
        called when the store merged by itself, whichever lanes that touched.
        """
        self.fs = fs
        self.store = store
        self.courier = courier
        self.commit_soon = commit_soon
        self._merged = merged
        self.now = now
        self._rng = random.SystemRandom().random
        self._errands: dict[Lane, _Upload | _Match] = {}
        self._conflicts: dict[Lane, int] = {}

    # Making up a request.

    def load(self, batch: Batch) -> Job | None:
        """See `Cargo.load`."""
        outs: list[Outgoing] = []
        frames, beside_bytes = FRAMES_PER_PUSH_MAX, BESIDE_BYTES_MAX
        while frames > 0 and beside_bytes > 0 and (offer := batch.next()) is not None:
            errand = self._errands.get(offer.lane)
            if errand is not None:
                return self._run_errand(batch, offer, errand)
            out = self._next_push(offer, frames, beside_bytes)
            batch.took(0 if out is None else out.entry_bytes)
            if out is not None:
                outs.append(out)
                frames -= len(out.frames)
                beside_bytes -= _beside_bytes(out)
        return PushJob(self, outs) if outs else None

    def _next_push(self, offer: Offer, frames_max: int, beside_bytes_max: int) -> Outgoing | None:
        """A lane's part of a push, small enough for the preamble that tells of its voids too."""
        while True:
            out = self.store.next_push(offer.lane, offer.bytes_max, frames_max)
            if out is None or len(out.frames) == 1 or _beside_bytes(out) <= beside_bytes_max:
                return out
            self.store.release(out)
            frames_max = max(1, len(out.frames) // 8)

    def _run_errand(self, batch: Batch, offer: Offer, errand: _Upload | _Match) -> Job | None:
        lane = offer.lane
        if isinstance(errand, _Match):
            batch.took(1)
            return MatchJob(self, lane, errand)
        try:
            fd = self.store.open_blob(errand.frame_id)
        except FileNotFoundError:
            batch.took(0)
            self.wait(lane, f"the body {errand.frame_id.hex()} is missing: run droprctl fsck")
            self.courier.schedule.wake(lane)
            return None
        length = min(errand.size - errand.have, max(offer.bytes_max, PIECE_BYTES_MIN))
        batch.took(max(1, length))
        return UploadJob(self, lane, errand, fd, length)

    def match(self, lane: Lane, mode: Mode = "", told: Told | None = None) -> None:
        """Find out where the receiver stands on a lane, held or not."""
        talk, request = self.store.begin_match(lane, mode)
        self._errands[lane] = _Match(talk, request, told)
        self.courier.schedule.send_alone(lane, True)
        self.courier.schedule.wake(lane)

    def is_careful(self, lane: Lane) -> bool:
        """Whether the lane's next push asks for consent before its body: it met a conflict."""
        return lane in self._conflicts

    # What became of a lane.

    def landed(self, lane: Lane) -> None:
        """The lane's request has ended: it goes on, or rests."""
        state = self.store.lane(lane)
        has_errand = lane in self._errands
        if has_errand:
            self.courier.schedule.send_alone(lane, True)
        more = has_errand or not (state.is_idle or state.hold is not None)
        self.courier.schedule.landed(lane, more=more)

    def settled(self, lane: Lane, messages: int) -> None:
        """The receiver took something: whatever was wrong with the lane is over."""
        self.courier.schedule.accepted(lane)
        self.courier.delivered += messages
        self.courier.faults.pop(lane, None)
        self._conflicts.pop(lane, None)

    def wait(self, lane: Lane, why: str, retry_after_s: float | None = None) -> None:
        """The lane alone waits, as long as the peer asked or by its own backoff."""
        self.courier.faults[lane] = why
        now = self.now()
        if retry_after_s is None:
            self.courier.schedule.refused(lane, now, self._rng)
        else:
            self.courier.schedule.delay(lane, now + min(retry_after_s, 3600.0))

    def judged(self, out: Outgoing, outcome: Outcome) -> None:
        """One lane's part of an answered push."""
        lane = out.lane
        if outcome.kind == "settled":
            self.settled(lane, outcome.messages)
        elif outcome.kind == "conflict":
            self._conflict(lane)
        elif outcome.kind == "need":
            self._need(out, outcome)
        elif outcome.kind == "refused":
            self.wait(lane, outcome.text or "refused", outcome.retry_after_s)
        elif outcome.kind == "nothing" and self.store.lane(lane).acked == out.head:
            self.wait(lane, "the receiver took nothing of it and did not say why")

    def _conflict(self, lane: Lane) -> None:
        count = self._conflicts[lane] = self._conflicts.get(lane, 0) + 1
        talk, request = self.store.begin_match(lane)
        self._errands[lane] = _Match(talk, request)
        if count > CONFLICTS_IN_A_ROW_MAX:
            self.wait(
                lane, f"{count} conflicts in a row: another copy of this spool may be running"
            )

    def _need(self, out: Outgoing, outcome: Outcome) -> None:
        if out.blob is None or out.blob[0] not in outcome.need:
            self.wait(out.lane, "the receiver wants a blob that this push did not name")
            return
        frame_id, size = out.blob
        have = outcome.need[frame_id]
        if have >= size:
            self.wait(out.lane, "the receiver wants a blob that it says it has")
            return
        self._errands[out.lane] = _Upload(frame_id, size, have)

    def matched(self, lane: Lane, errand: _Match, result: MatchRequest | Outcome) -> None:
        """A page of a match, or its end."""
        if isinstance(result, MatchRequest):
            errand.request = result
            return
        self._done(lane, errand)
        if result.text:
            level = logging.INFO if result.kind == "found" else logging.WARNING
            logs.event(log, level, f"lane {result.kind}", lane=str(lane), why=result.text)
        if result.kind == "held":
            self.courier.faults[lane] = result.text
        else:
            self.courier.faults.pop(lane, None)
            if result.messages:
                self.courier.schedule.accepted(lane)
                self.courier.delivered += result.messages
        if errand.told is not None:
            errand.told(result.text or result.kind)
        if result.kind == "rebased":
            self._merged()
        self.commit_soon()

    def uploaded(self, lane: Lane, upload: _Upload, have: int) -> None:
        """So much of a blob is there; when it is whole, its frame can be pushed."""
        if have > upload.have:
            self.courier.schedule.accepted(lane)
        upload.have = have
        upload.careful = False
        if have >= upload.size:
            self._done(lane, upload)

    def _done(self, lane: Lane, errand: _Upload | _Match) -> None:
        """The errand is over, unless another one took its place while it was under way."""
        if self._errands.get(lane) is errand:
            del self._errands[lane]


def _beside_bytes(out: Outgoing) -> int:
    """About how many bytes of a preamble tell what travels beside these frames."""
    return sum(
        20 + sum(8 + 4 * len(void.reason) for void in aside.voids) for aside in out.asides.values()
    )


class _LaneJob:
    """What the three kinds of request have in common."""

    method = "POST"
    path = ""
    careful = False
    frames = 1

    def __init__(self, cargo: LaneCargo, lanes: Sequence[Lane]) -> None:
        self.cargo = cargo
        self.lanes = lanes
        self.pieces: Sequence[Piece] = ()
        self.size = 0

    def release(self) -> None:
        """Close what the request had open."""

    def failed(self) -> None:
        """See `Job.failed`."""
        self.release()
        for lane in self.lanes:
            self.cargo.landed(lane)

    def blamed(self, why: str) -> None:
        """See `Job.blamed`."""
        self.release()
        for lane in self.lanes:
            if len(self.lanes) == 1:
                self.cargo.wait(lane, why)
            self.cargo.courier.schedule.send_alone(lane, True)
            self.cargo.landed(lane)


class PushJob(_LaneJob):
    """Frames of one or several lanes."""

    path = "/v1/push"

    def __init__(self, cargo: LaneCargo, outs: Sequence[Outgoing]) -> None:
        super().__init__(cargo, [out.lane for out in outs])
        self._outs = outs
        preamble = push.Push(cargo.store.spool_id, tuple(out.push for out in outs))
        pieces: list[Piece] = [push.encode_push(preamble)]
        for out in outs:
            for piece in out.pieces:
                pieces.append(FileRange(*piece) if isinstance(piece, tuple) else bytes(piece))
        self.pieces = pieces
        self.size = sum(out.entry_bytes for out in outs)
        self.frames = sum(len(out.frames) for out in outs)
        self.careful = any(cargo.is_careful(lane) for lane in self.lanes)

    def release(self) -> None:
        for out in self._outs:
            self.cargo.store.release(out)

    def answered(self, status: int, body: bytes) -> None:
        """See `Job.answered`."""
        if status != 200:
            raise BadData(f"status {status} to a push")
        answers = push.decode_push_answer(body, len(self._outs))
        self.release()
        for out, answer in zip(self._outs, answers, strict=True):
            try:
                outcome = self.cargo.store.on_answer(out, answer)
            except BadData as error:
                self.cargo.wait(out.lane, f"an answer that makes no sense: {error}")
            else:
                self.cargo.judged(out, outcome)
            self.cargo.landed(out.lane)
        self.cargo.commit_soon()


class UploadJob(_LaneJob):
    """A piece of a blob."""

    method = "PUT"

    def __init__(self, cargo: LaneCargo, lane: Lane, upload: _Upload, fd: int, length: int) -> None:
        """`fd` is the blob's; it is closed when the request is over."""
        super().__init__(cargo, [lane])
        self._upload = upload
        self._fd = fd
        self.path = (
            f"/v1/blobs/{cargo.store.spool_id.hex()}/{upload.frame_id.hex()}"
            f"?offset={upload.have}&size={upload.size}"
        )
        self.pieces = [FileRange(self._fd, upload.have, length)]
        self.size = length
        self.careful = upload.careful

    def release(self) -> None:
        if self._fd >= 0:
            self.cargo.fs.close(self._fd)
            self._fd = -1

    def answered(self, status: int, body: bytes) -> None:
        """See `Job.answered`."""
        have = ask.decode_blob_answer(body)
        upload = self._upload
        if have > upload.size or (have <= upload.have and status == 200):
            raise BadData("an upload that leads nowhere", why=f"{have} of {upload.size} bytes")
        self.release()
        if have == upload.have:
            self.cargo.wait(self.lanes[0], "the receiver refuses the piece it asks for")
        self.cargo.uploaded(self.lanes[0], upload, have)
        self.cargo.landed(self.lanes[0])

    def failed(self) -> None:
        # Part of it may have arrived: let the peer say so before the body is sent again.
        self._upload.careful = True
        super().failed()


class MatchJob(_LaneJob):
    """One page of a match."""

    path = "/v1/match"

    def __init__(self, cargo: LaneCargo, lane: Lane, errand: _Match) -> None:
        super().__init__(cargo, [lane])
        self._errand = errand
        body = ask.encode_match(errand.request)
        self.pieces = [body]
        self.size = len(body)

    def answered(self, status: int, body: bytes) -> None:
        """See `Job.answered`."""
        if status != 200:
            raise BadData(f"status {status} to a match")
        answer = ask.decode_match_answer(body)
        lane = self.lanes[0]
        try:
            result = self.cargo.store.on_match(self._errand.talk, answer)
        except BadData as error:
            self.cargo.match(lane, self._errand.talk.mode, self._errand.told)
            self.cargo.wait(lane, f"a match that makes no sense: {error}")
        else:
            self.cargo.matched(lane, self._errand, result)
        self.cargo.landed(lane)
