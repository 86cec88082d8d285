"""What a receiver tells of a lane: the newest common head, the frames behind it, the voids."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from droprd.core import chain
from droprd.core.ask import MatchAnswer, MatchRequest, encode_match_answer
from droprd.core.match import NumberedVoid, Run, answer, drop_oldest, join
from droprd.model import GENESIS, Head

SPOOL = b"S" * 16
STRANGER = b"?" * 16


def frames_of(counts: list[int]) -> list[tuple[bytes, int]]:
    return [(index.to_bytes(14, "big") + bytes(2), count) for index, count in enumerate(counts)]


def runs_of(frames: list[tuple[bytes, int]], size: int, start: Head = GENESIS) -> list[Run]:
    """Oldest first, each of `size` frames; the first message of every third frame is void."""
    runs: list[Run] = []
    head = start
    for index, (frame_id, count) in enumerate(frames):
        if index % size == 0:
            runs.append(Run(head, head, bytearray()))
        if index % 3 == 0:
            runs[-1].voids.append(NumberedVoid(head.number, frame_id, 0, "expired"))
        head = chain.extend(head, frame_id, count)
        runs[-1].add(frame_id, count, head)
    return runs


def ask(
    runs: list[Run],
    *heads: Head,
    after: Head | None = None,
    voids_after: int = 0,
    floor: int = 0,
    frames_max: int = 1800,
) -> MatchAnswer:
    head = runs[-1].end if runs else GENESIS
    request = MatchRequest(SPOOL, "sites", 5, heads, after, voids_after)
    told = answer(request, head, floor, reversed(runs), frames_max=frames_max)
    encode_match_answer(told)
    return told


@given(st.lists(st.integers(1, 1024), min_size=1, max_size=40), st.integers(1, 9), st.data())
def test_all_pages_together_lead_from_the_common_head_to_the_newest(
    counts: list[int], size: int, data: st.DataObject
) -> None:
    frames = frames_of(counts)
    runs = runs_of(frames, size)
    heads = [GENESIS, *chain.heads(GENESIS, frames)]
    at = data.draw(st.integers(0, len(frames)))
    known = [heads[at], *data.draw(st.lists(st.sampled_from(heads[: at + 1]), max_size=3))]
    strange = [Head(h.number, STRANGER) for h in heads]
    told = ask(runs, *strange[-3:], *known, frames_max=7)
    assert told.common == heads[at]
    got = list(told.frames)
    while told.more:
        told = ask(runs, after=chain.advance(heads[at], got), frames_max=7)
        got += told.frames
    assert got == frames[at:]
    assert chain.advance(heads[at], got) == told.head


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 9), st.integers(0, 600))
def test_voids_are_told_from_a_number_on(counts: list[int], size: int, number: int) -> None:
    runs = runs_of(frames_of(counts), size)
    told = ask(runs, runs[-1].end if runs else GENESIS, voids_after=number)
    wanted = [v.frame_id for run in runs for v in run.voids if v.number >= number]
    assert [v.frame_id for v in told.voids] == wanted


def test_many_voids_come_in_pages() -> None:
    runs = runs_of(frames_of([1] * 30), 30)
    runs[0].voids = [NumberedVoid(i, i.to_bytes(16, "big"), None, "r" * 400) for i in range(120)]
    got: list[bytes] = []
    number: int | None = 0
    while number is not None:
        told = ask(runs, runs[0].end, voids_after=number)
        got += [void.frame_id for void in told.voids]
        number = told.voids_to
    assert got == [i.to_bytes(16, "big") for i in range(120)]


def test_frames_before_the_floor_are_not_told_and_no_common_head() -> None:
    frames = frames_of([2] * 10)
    runs = runs_of(frames, 5)
    told = ask(runs, Head(4, STRANGER), GENESIS, floor=10)
    assert told.common is None
    assert list(told.frames) == frames[5:]
    assert [v.index for v in told.voids] == [0, 0, 0, 0]
    assert ask(runs, runs[0].end, floor=10).common == runs[0].end


def test_whoever_reads_on_from_the_floor_knows_only_numbers() -> None:
    frames = frames_of([2] * 10)
    runs = runs_of(frames, 3)
    told = ask(runs, Head(4, STRANGER), frames_max=4)
    assert (told.common, list(told.frames), told.more) == (None, frames[:4], True)
    told = ask(runs, after=Head(8, bytes(16)), frames_max=40)
    assert list(told.frames) == frames[4:]


def test_an_unknown_after_gets_an_empty_page() -> None:
    told = ask(runs_of(frames_of([1] * 5), 2), after=Head(3, STRANGER))
    assert (told.frames, told.more) == ((), False)


def test_the_beginning_is_common_only_if_everything_since_is_remembered() -> None:
    assert ask([], GENESIS).common == GENESIS
    assert ask(runs_of(frames_of([1]), 1), GENESIS).common == GENESIS
    assert ask(runs_of(frames_of([1]), 1), Head(0, STRANGER)).common is None


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 40))
def test_joined_and_shortened_runs_tell_the_same_history(
    counts: list[int], size: int, keep: int
) -> None:
    frames = frames_of(counts)
    runs = runs_of(frames, size)
    joined = list(join(runs, 12))
    assert [f for run in joined for f in run.frames()] == frames
    assert all(len(run) <= 12 for run in joined)
    assert all(a.end == b.start for a, b in itertools.pairwise(joined))
    assert [v for run in joined for v in run.voids] == [v for run in runs for v in run.voids]
    short = drop_oldest(joined[-1], keep)
    assert len(short) == min(keep, len(joined[-1]))
    assert chain.advance(short.start, short.frames()) == runs[-1].end
