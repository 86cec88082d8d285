"""What the sender makes of answers: receipts, conflicts, match, rebase, hold, reset.

Owns the decisions of DESIGN section 5 on the sender's side. Nothing here talks to the network: an
answer comes in as a value, and what to ask next goes out as one.

    answer ok        the frames up to its head are settled, refusals become dead letters
    answer conflict  a `Conversation` begins: a match request, page by page, then one of
        found        the receiver's head is one that waits here: a lost answer; settle up to it
        hold         the last common head lies before the acknowledged one: the receiver lost
                     something; an operator decides (`peer reset --replay | --continue`)
        rebase       otherwise this spool was restored or runs twice: frames the receiver has are
                     settled, the others follow its head, in their order
        in doubt     where the receiver no longer holds all ids, waiting frames that were not found
                     become dead letters, never resent by themselves

Guarantees: a dead letter is durable before the receipt that settles its message. What the receiver
stored decides how a message ended. Every change is one note in `sender.log`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from droprd.core import chain, entry, frame
from droprd.core.ask import MATCH_HEADS_MAX, MatchAnswer, MatchRequest
from droprd.core.outstate import (
    PURGED,
    Counts,
    LaneState,
    Pos,
    Skip,
    count_as,
    settle_note,
)
from droprd.core.push import LaneAnswer
from droprd.errors import BadData
from droprd.model import GENESIS, Head, Lane
from droprd.spool import log
from droprd.spool.deadlog import DeadLog
from droprd.spool.handle import Spool
from droprd.spool.lanes import LaneFiles
from droprd.spool.outgoing import Outgoing, SentFrame
from droprd.spool.senderlog import SenderLog

IN_DOUBT = "in doubt"
HELD_RESET = "receiver-reset"
PAGES_MAX = 10_000

Kind = Literal["settled", "conflict", "need", "refused", "found", "rebased", "held", "nothing"]


class Outcome(NamedTuple):
    """What came of an answer.

    Attributes:
        need: bytes already there, by frame id, of blobs that must be uploaded first.
        messages: how many were settled.
        text: for people, where there is something to say.
    """

    kind: Kind
    text: str = ""
    messages: int = 0
    need: Mapping[bytes, int] = {}
    retry_after_s: int | None = None


@dataclass(slots=True)
class Conversation:
    """A match under way on one lane. `mode` is what an operator asked for, if anything."""

    lane: Lane
    mode: Literal["", "replay", "continue"] = ""
    common: Head | None = None
    floor: int = 0
    frames: list[tuple[bytes, int]] = field(default_factory=list)
    voids: dict[bytes, dict[int | None, str]] = field(default_factory=dict)
    pages: int = 0
    voids_after: int = 0


class _Waiting(NamedTuple):
    frame: frame.Frame
    start: Pos
    end: Pos


class Settler:
    """Turns answers into notes."""

    def __init__(
        self,
        spool: Spool,
        sender_log: SenderLog,
        files: LaneFiles,
        dead: DeadLog,
        merge_all: Callable[[], None],
    ) -> None:
        self._spool = spool
        self._log = sender_log
        self._files = files
        self._dead = dead
        self._merge_all = merge_all

    # -- answers to a push ---------------------------------------------------------------------

    def on_answer(self, out: Outgoing, answer: LaneAnswer) -> Outcome:
        """Take the receiver's word on one lane of a push.

        Raises: BadData if the answer contradicts what was asked.
        """
        if answer.verdict == "conflict":
            return Outcome("conflict", "the receiver has another head than expected")
        if answer.verdict == "need":
            return Outcome("need", need=answer.need)
        if answer.verdict == "refused":
            return Outcome("refused", answer.reason, retry_after_s=answer.retry_after_s)
        state = self._log.state.lane(out.lane)
        if state.acked != out.head:
            return Outcome("nothing", "an answer to a request that was given up")
        if answer.head == out.head:
            return Outcome("nothing")
        taken = [n for n, sent in enumerate(out.frames) if sent.head == answer.head]
        if not taken:
            raise BadData(
                "the answer names a head that this push cannot lead to",
                why=f"number {answer.head.number}",
            )
        frames = out.frames[: taken[0] + 1]
        refused: dict[bytes, dict[int | None, str]] = {}
        for refusal in answer.refusals:
            for sent in frames:
                if refusal.frame_id in (None, sent.frame_id):
                    refused.setdefault(sent.frame_id, {})[refusal.index] = refusal.reason
        return self._settle(state, frames, answer.head, refused, "settled")

    def _settle(
        self,
        state: LaneState,
        frames: list[SentFrame],
        head: Head,
        refused: dict[bytes, dict[int | None, str]],
        kind: Kind,
        text: str = "",
    ) -> Outcome:
        counts = Counts()
        closed: list[bytes] = []
        delivered: list[bytes] = []
        settled_bytes = 0
        is_dead = False
        for sent in frames:
            settled_bytes += sent.bodies_bytes
            said = refused.get(sent.frame_id)
            if not said and not sent.voids:
                if sent.frame_id in state.voids:
                    delivered.append(sent.frame_id)
                counts = counts.plus(Counts(delivered=sent.messages))
                continue
            closed.append(sent.frame_id)
            reasons = dict(sent.voids)
            for index, reason in (said or {}).items():
                for i in range(sent.messages) if index is None else (index,):
                    reasons.setdefault(i, reason)
            counts = counts.plus(Counts(delivered=sent.messages - len(reasons)))
            letters: dict[int, str] = {}
            for i, reason in reasons.items():
                kind_of = count_as(reason)
                counts = counts.plus(kind_of)
                if kind_of.dead:
                    letters[i] = reason
            untold = [
                [i, why] for i, why in reasons.items() if i not in sent.voids and i not in letters
            ]
            if untold:
                # Kept with the frame, so that it is never said to have been delivered.
                self._log.add(["void", list(state.lane), sent.frame_id, untold])
            if letters:
                self._bury(state.lane, sent.start, letters)
                is_dead = True
        if is_dead:
            # If we stop here: the letters may be written again with the same receipt.
            self._dead.sync()
        pos = frames[-1].end if frames else state.cursor
        self._note_settled(state, head, pos, counts, settled_bytes, closed, delivered=delivered)
        return Outcome(kind, text, counts.total)

    def _note_settled(
        self,
        state: LaneState,
        head: Head,
        pos: Pos,
        counts: Counts,
        settled_bytes: int,
        closed: list[bytes],
        skips: list[Skip] | None = None,
        delivered: list[bytes] | None = None,
    ) -> None:
        if pos >= state.tail and counts.total < state.queued:
            # Nothing is left to read, and some was promised: its bytes are under corrupt/.
            counts = counts.plus(Counts(dead=state.queued - counts.total))
        self._log.add(
            settle_note(
                state.lane, head, pos, counts, settled_bytes, closed, skips or (), delivered or ()
            )
        )

    def settle_damaged(self, state: LaneState) -> None:
        """The lane's rest holds no frame any more: count what is lost, and go on behind it."""
        self._note_settled(state, state.acked, state.tail, Counts(), state.queued_bytes, [])

    def _bury(self, lane: Lane, at: Pos, reasons: Mapping[int, str]) -> None:
        state = self._log.state.lane(lane)
        for _, _, item in self._files.walk(state, at):
            if isinstance(item, log.Entry):
                self._dead.append(lane.peer, _parse(item), reasons)
            return

    # -- conflicts -----------------------------------------------------------------------------

    def match_request(self, talk: Conversation) -> MatchRequest:
        """What to ask next in a conversation."""
        state = self._log.state.lane(talk.lane)
        lane = talk.lane
        if talk.pages:
            if talk.common is not None:
                after = chain.advance(talk.common, talk.frames)
            else:
                # Nothing in common: the receiver tells what it remembers, found by number alone.
                number = talk.floor + sum(count for _, count in talk.frames)
                after = Head(number, bytes(16))
            return MatchRequest(
                self._spool.spool_id,
                lane.channel,
                lane.priority,
                (),
                after,
                talk.voids_after,
            )
        talk.voids_after = state.acked.number
        heads = [r.head for r in reversed(state.receipts)][: MATCH_HEADS_MAX - 1]
        if GENESIS not in heads:
            heads.append(GENESIS)
        return MatchRequest(
            self._spool.spool_id, lane.channel, lane.priority, tuple(heads), None, talk.voids_after
        )

    def on_match(self, talk: Conversation, answer: MatchAnswer) -> MatchRequest | Outcome:
        """Take a page of a match: ask for the next one, or decide.

        Raises: BadData if the pages do not prove themselves.
        """
        state = self._log.state.lane(talk.lane)
        if not talk.pages:
            talk.common, talk.floor = answer.common, answer.floor
        talk.pages += 1
        talk.frames += answer.frames
        for void in answer.voids:
            talk.voids.setdefault(void.frame_id, {})[void.index] = void.reason
        if answer.voids_to is not None and answer.voids_to > talk.voids_after:
            talk.voids_after = answer.voids_to
            needs_voids = True
        else:
            needs_voids = False
        if talk.pages > PAGES_MAX:
            raise BadData("a match goes on for ever", why=f"{PAGES_MAX} pages and more to come")
        common = talk.common
        if not talk.mode:
            found = self._find(state, answer.head)
            if found is not None:
                if needs_voids:
                    talk.frames.clear()
                    return self.match_request(talk)
                return self._settle_found(state, found, answer.head, talk)
            if self._is_before(state, answer.head, common):
                self._log.add(["hold", list(state.lane), HELD_RESET])
                self._log.commit()
                return Outcome("held", _reset_text(state, answer.head))
        if needs_voids or answer.more:
            return self.match_request(talk)
        if common is not None and chain.advance(common, talk.frames) != answer.head:
            raise BadData("the pages of a match do not lead to the receiver's head")
        return self._rebase(state, answer.head, talk)

    def _is_before(self, state: LaneState, head: Head, common: Head | None) -> bool:
        if head == state.acked:
            return False
        if head.number <= state.acked.number:
            return True
        return common is not None and common.number < state.acked.number

    def _find(self, state: LaneState, head: Head) -> list[SentFrame] | None:
        """The waiting frames up to the receiver's head, if it is one of ours."""
        if head == state.acked:
            return []
        if head.number > state.acked.number + state.queued:
            return None
        frames = []
        at = state.acked
        for item in self._waiting(state):
            info = item.frame.info
            at = chain.extend(at, info.frame_id, info.messages)
            frames.append(
                SentFrame(
                    info.frame_id,
                    info.messages,
                    at,
                    item.start,
                    item.end,
                    state.bytes_at(item.start, item.frame),
                    {},
                )
            )
            if at.number >= head.number:
                return frames if at == head else None
        return None

    def _settle_found(
        self, state: LaneState, frames: list[SentFrame], head: Head, talk: Conversation
    ) -> Outcome:
        if not frames:
            if state.hold is not None:
                self._log.add(["hold", list(state.lane), None])
            return Outcome("found")
        outcome = self._settle(state, frames, head, talk.voids, "found")
        self._log.commit()
        return outcome

    def _waiting(self, state: LaneState) -> Iterator[_Waiting]:
        for segment, _, item in self._files.walk(state, state.cursor):
            if isinstance(item, log.Damage) or not item.frame:
                continue
            start = Pos(segment, item.head.offset)
            if state.skips and state.skip_at(start) is not None:
                continue
            try:
                yield _Waiting(_parse(item), start, Pos(segment, item.head.end))
            except BadData:
                continue

    # -- rebase and reset ----------------------------------------------------------------------

    def _rebase(self, state: LaneState, head: Head, talk: Conversation) -> Outcome:
        self._merge_all()
        text = ""
        if talk.mode == "replay":
            text = self._replay(state, talk)
        has = dict(talk.frames)
        doubt = talk.common is None
        counts = Counts()
        settled_bytes = 0
        closed: list[bytes] = []
        ranges: list[Skip] = []
        first_kept: Pos | None = None
        kept = lost = found = 0
        for item in self._waiting(state):
            info = item.frame.info
            if has.get(info.frame_id) == info.messages:
                found += info.messages
                said = talk.voids.get(info.frame_id, {})
                for i in range(info.messages):
                    reason = said.get(i, said.get(None))
                    counts = counts.plus(count_as(reason) if reason else Counts(delivered=1))
            elif doubt:
                lost += info.messages
                voids = state.voids_at(item.start, info.frame_id, info.messages)
                letters = {i: voids.get(i, IN_DOUBT) for i in range(info.messages)}
                letters = {i: why for i, why in letters.items() if why != PURGED}
                counts = counts.plus(Counts(dead=len(letters), purged=info.messages - len(letters)))
                if letters:
                    self._dead.append(state.lane.peer, item.frame, letters)
            else:
                kept += info.messages
                if first_kept is None:
                    first_kept = item.start
                continue
            settled_bytes += state.bytes_at(item.start, item.frame)
            if info.frame_id in state.voids:
                closed.append(info.frame_id)
            if ranges and ranges[-1].end == item.start:
                ranges[-1] = Skip(ranges[-1].start, item.end, head.number)
            else:
                ranges.append(Skip(item.start, item.end, head.number))
        if lost:
            # If we stop here: the letters are written again by the next rebase.
            self._dead.sync()
        cursor = first_kept or state.tail
        skips = [s for s in ranges if s.start >= cursor]
        self._note_settled(state, head, cursor, counts, settled_bytes, closed, skips)
        # If we stop here: the lane is as before, and the next push meets the same conflict.
        self._log.commit()
        text += (
            f"{state.lane}: {found} of the waiting messages are there already, {kept} follow"
            + (f", {lost} are in doubt and became dead letters" if lost else "")
        )
        return Outcome("rebased", text, counts.total)

    def _replay(self, state: LaneState, talk: Conversation) -> str:
        """Make waiting again what receipts after the last common head had settled."""
        places = [r for r in state.receipts if r.head == talk.common]
        if not places or state.acked == talk.common:
            return ""
        at = max(places[-1].pos, Pos(state.first_segment, 0))
        beyond = state.acked.number - places[-1].head.number
        kept_skips = [s for s in state.skips if s.number <= places[-1].head.number]
        messages = replayed_bytes = 0
        counts = Counts()
        reopened: list[bytes] = []
        for segment, _, item in self._files.walk(state, at):
            if isinstance(item, log.Damage) or not item.frame:
                continue
            here = Pos(segment, item.head.offset)
            if here >= state.cursor and state.skip_at(here) is None:
                continue
            if any(s.start <= here < s.end for s in kept_skips):
                continue
            info = frame.peek(item.frame)
            messages += info.messages
            # What was void stays void.
            reasons = dict(self._log.state.closed.get(info.frame_id, {}))
            if reasons:
                reopened.append(info.frame_id)
            if state.is_purged(here):
                reasons |= {i: PURGED for i in range(info.messages) if i not in reasons}
            elif PURGED not in reasons.values():
                replayed_bytes += info.bodies_bytes
            elif not info.is_blob:
                lengths = _parse(item).lengths
                replayed_bytes += sum(n for i, n in enumerate(lengths) if reasons.get(i) != PURGED)
            counts = counts.plus(Counts(delivered=info.messages - len(reasons)))
            for why in reasons.values():
                counts = counts.plus(count_as(why))
        self._log.add(
            [
                "replay",
                list(state.lane),
                list(places[-1].head),
                list(at),
                list(counts),
                replayed_bytes,
                reopened,
            ]
        )
        cannot = max(0, beyond - messages)
        first = places[-1].head.number + 1
        if cannot:
            return (
                f"{state.lane}: messages {first} to {first + cannot - 1} cannot be sent again, "
                f"the outbox no longer holds them; "
            )
        return f"{state.lane}: {messages} messages are sent again; "


def _parse(item: log.Entry) -> frame.Frame:
    voids: list[int] = []
    if item.note:
        voids = [v[0] for v in entry.unpack_note(item.note).get("v", ())]
    return frame.parse(item.frame, voids)


def _reset_text(state: LaneState, head: Head) -> str:
    return (
        f"{state.lane}: the receiver is at message {head.number}, but had acknowledged "
        f"{state.acked.number}: its spool was lost or restored"
    )
