"""What a receiver tells of a lane's history to a sender that has lost the thread.

Owns the answer to a match: which of the asker's heads is the newest that lies in this lane's
history, which frames follow it, page by page, and which of the later messages were stored as voids.

The history is told in *runs*: frames that follow each other without a gap, from one head to
another, so that the chain proves each of them. They are looked at newest first, and only as far
back as the question needs.

Pure. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from struct import Struct

from droprd.core import chain
from droprd.core.ask import ANSWER_FRAMES_MAX, MatchAnswer, MatchRequest, StoredVoid
from droprd.model import Head

_FRAME = Struct("<16sH")
FRAME_BYTES = _FRAME.size

VOIDS_BYTES_MAX = 16 * 1024
"""Of a match answer; with ANSWER_FRAMES_MAX frames it stays below 64 KiB."""
_VOID_BYTES = 28  # of a void in an answer, without its reason
UNKNOWN_CHAIN = bytes(16)


@dataclass(frozen=True, slots=True)
class NumberedVoid:
    """A stored void and the number of its message in the lane.

    `index` None stands for the whole frame; the number is then that of its first message.
    """

    number: int
    frame_id: bytes
    index: int | None
    reason: str


@dataclass(slots=True)
class Run:
    """Frames of one lane that follow each other, from the head `start` to the head `end`.

    `packed` holds frame ids and counts, 18 bytes each. It is empty where only voids of older
    frames are remembered; `start` and `end` are equal then.
    """

    start: Head
    end: Head
    packed: bytes | bytearray
    voids: list[NumberedVoid] = field(default_factory=list)

    def add(self, frame_id: bytes, count: int, end: Head) -> None:
        """One more frame, after which the head is `end`. `packed` must be a bytearray."""
        self.packed += _FRAME.pack(frame_id, count)
        self.end = end

    def frames(self) -> Iterator[tuple[bytes, int]]:
        """(frame id, count) of all frames in order."""
        return _FRAME.iter_unpack(self.packed)

    def __len__(self) -> int:
        return len(self.packed) // FRAME_BYTES


def newest(run: Run) -> Run:
    """An empty run that begins where `run` ends."""
    return Run(run.end, run.end, bytearray())


def join(parts: Iterable[Run], frames_max: int) -> Iterator[Run]:
    """The same history in runs of at most `frames_max` frames; `parts` are given oldest first."""
    open_run: Run | None = None
    for part in parts:
        if open_run is not None and (
            part.start != open_run.end or len(open_run) + len(part) > frames_max
        ):
            yield open_run
            open_run = None
        if open_run is None:
            open_run = Run(part.start, part.end, bytearray(part.packed), list(part.voids))
        else:
            open_run.packed += part.packed
            open_run.voids += part.voids
            open_run.end = part.end
    if open_run is not None:
        yield open_run


def drop_oldest(run: Run, keep: int) -> Run:
    """The newest `keep` frames of a run; all its voids stay."""
    gone = len(run) - keep
    if gone <= 0:
        return run
    cut = gone * FRAME_BYTES
    head = chain.advance(run.start, Run(run.start, run.end, run.packed[:cut]).frames())
    return Run(head, run.end, run.packed[cut:], run.voids)


def answer(
    request: MatchRequest,
    head: Head,
    floor: int,
    runs: Iterable[Run],
    *,
    frames_max: int = ANSWER_FRAMES_MAX,
) -> MatchAnswer:
    """Answer a match about a lane whose synced head is `head`.

    `runs` tells its history newest first and without a gap back to the number `floor`; of older
    runs only the voids are told. Frames follow `request.after`, else the common head, else (none
    is known) the floor. An `after` whose chain is all zero is found by its number alone: whoever
    reads on from the floor cannot know the chain.
    """
    after = request.after
    common = head if head in request.heads else None
    start = after if after is not None and _is_at(after, head) else None
    collected: list[Run] = []
    for run in runs:
        if run.start.number < floor:
            # Beyond a gap: what follows such a head is not known, so it cannot be a common one.
            run = Run(run.start, run.end, b"", run.voids)
            collected.append(run)
            if run.start.number <= request.voids_after:
                break
            continue
        collected.append(run)
        if common is None:
            common = _newest_in(run, request.heads)
        if start is None and after is not None:
            start = _newest_in(run, (after,))
        found = start if after is not None else common
        if found is not None and run.start.number <= min(found.number, request.voids_after):
            break
    collected.reverse()
    if after is not None:
        first = head.number if start is None else start.number
    else:
        first = floor if common is None else common.number
    frames, more = _page(collected, first, frames_max)
    voids, voids_to = _voids(collected, request.voids_after)
    return MatchAnswer(head, common, floor, frames, more, voids, voids_to)


def _is_at(asked: Head, known: Head) -> bool:
    return asked.number == known.number and asked.chain in (known.chain, UNKNOWN_CHAIN)


def _newest_in(run: Run, wanted: Iterable[Head]) -> Head | None:
    """The newest of the wanted heads that lies in this run, its ends included."""
    low, high = run.start.number, run.end.number
    numbers = {h.number: h for h in wanted if low <= h.number <= high}
    if not numbers:
        return None
    best: Head | None = None
    for known in (run.start, *chain.heads(run.start, run.frames())):
        asked = numbers.get(known.number)
        if asked is not None and (
            asked == known or (asked.chain == UNKNOWN_CHAIN and asked.number)
        ):
            best = known
    return best


def _page(
    collected: list[Run], first: int, frames_max: int
) -> tuple[tuple[tuple[bytes, int], ...], bool]:
    frames: list[tuple[bytes, int]] = []
    for run in collected:
        number = run.start.number
        if run.end.number <= first:
            continue
        for frame_id, count in run.frames():
            if number >= first:
                if len(frames) == frames_max:
                    return tuple(frames), True
                frames.append((frame_id, count))
            number += count
    return tuple(frames), False


def _voids(collected: list[Run], voids_after: int) -> tuple[tuple[StoredVoid, ...], int | None]:
    voids = sorted(
        (v for run in collected for v in run.voids if v.number >= voids_after),
        key=lambda v: v.number,
    )
    told: list[StoredVoid] = []
    used = 0
    for void in voids:
        used += _VOID_BYTES + len(void.reason.encode())
        if used > VOIDS_BYTES_MAX and told:
            return tuple(told), void.number
        told.append(StoredVoid(void.frame_id, void.index, void.reason))
    return tuple(told), None
