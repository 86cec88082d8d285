"""The receiver's side of an inbox: the interface `InboxWriter` (consumers have `InboxStore`).

An inbox has one writer. It takes pushes, answers how far each lane has come, and keeps the bodies
that are files as they arrive. `droprd.spool.receiver.ReceiverStore` is the one made of files;
`droprd.testing.receiversuite` holds what every other one must keep.

All methods are called from one thread, but for these, which may be slow and run in threads of
their own: `write` (one at a time), `BlobArrival.write` and `close`, and `ArrivingBlobs.missing`.
Between `begin` and `finish` only `no_room`, `push`, `wanted_blobs`, `answer` of what does not wait,
and `blobs` are used.

Of the rules, `droprd.spool.staging` (verdicts, heads, answers), `droprd.core.match` (history) and
`droprd.spool.arrivals` (blobs in a directory) may be used by every store.

What an answer says has survived a power cut if the store promises that at all; nothing is told, in
a conflict or a match either, that a crash could take back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from droprd.core.ask import MatchAnswer, MatchRequest
from droprd.core.frame import Buffer, Frame
from droprd.core.push import LaneAnswer, Push
from droprd.spool.judging import Limits
from droprd.spool.staging import Batch, Pending


class Damaged(NamedTuple):
    """What a start found damaged: it lies in corrupt/."""

    path: str
    start: int
    end: int


class Report(NamedTuple):
    """What opening the store found."""

    damage: Sequence[Damaged] = ()
    lost_messages: int = 0


class BlobArrival(Protocol):
    """One request's pieces of one blob."""

    def write(self, data: Buffer, /) -> None:
        """Append. Raises: PieceRefused if a later request took over; BadData; OSError."""
        ...

    def close(self) -> int:
        """End this request; a complete blob is then stored. Returns how many bytes are there."""
        ...


class ArrivingBlobs(Protocol):
    """The bodies too large for a frame, as they arrive, before their frames do."""

    def arrive(self, peer: str, frame_id: bytes, offset: int, size: int, /) -> BlobArrival | None:
        """Take pieces from `offset` on, of a blob of `size` bytes; None if it is whole already.

        Raises: PieceRefused if what is there does not end at `offset`; OSError.
        """
        ...

    def missing(self, peer: str, frame: Frame, /) -> int | None:
        """None if the body of a blob frame is there, whole and right; else how many bytes are.

        Raises: BadData if a blob of that name belongs to another frame; OSError.
        """
        ...


class InboxWriter(Protocol):
    """An inbox as its receiver sees it."""

    @property
    def report(self) -> Report:
        """What opening it found."""
        ...

    @property
    def lanes(self) -> int:
        """How many lanes are known."""
        ...

    @property
    def received(self) -> int:
        """How many messages were stored since it was opened."""
        ...

    @property
    def blobs(self) -> ArrivingBlobs:
        """The bodies that are files."""
        ...

    @property
    def has_staged(self) -> bool:
        """Whether frames wait for a commit."""
        ...

    def configure(self, limits: Limits) -> None:
        """Other limits from now on. Nothing is staged or under way."""
        ...

    def push(self, peer: str, push: Push, parts: Sequence[memoryview]) -> Pending:
        """Judge a push and take what continues its lanes. Raises: BadData (nothing was taken)."""
        ...

    def wanted_blobs(self, peer: str, push: Push, parts: Sequence[memoryview]) -> list[Frame]:
        """The blob frames of a push, for `blobs.missing` in a thread before `push`.

        Raises: BadData."""
        ...

    def begin(self) -> Batch | None:
        """Take all that waits, to be written; None if nothing does."""
        ...

    def write(self, batch: Batch) -> None:
        """Store a batch; streams without room go to `batch.failed`.

        Raises OSError, DroprdError: the store is then broken, and its process must end.
        """
        ...

    def finish(self, batch: Batch) -> frozenset[str]:
        """Let the heads go on. Returns the channels that got something, to be rung."""
        ...

    def answer(self, pending: Pending) -> tuple[LaneAnswer, ...]:
        """The answers to a push, one a lane, after the commit it waits for is finished."""
        ...

    def match(self, peer: str, request: MatchRequest) -> MatchAnswer:
        """What is remembered of a lane."""
        ...

    def no_room(self, peer: str, length: int) -> str:
        """Why a request of `length` bytes must be refused by its head, or an empty text."""
        ...

    def make_room(self, bytes_min: int) -> None:
        """Let go of what consumers have settled, where it takes `bytes_min` bytes and more.

        Called every 20 seconds, every 2 while there is no room, then with 1.
        Raises: OSError, DroprdError.
        """
        ...

    def recount(self) -> None:
        """Count afresh what `no_room` rests on. Called after `make_room`."""
        ...

    def ring(self, channels: Iterable[str]) -> None:
        """Wake the consumers of these channels."""
        ...

    def close(self) -> None:
        """Store all that waits, and leave. Not called on a broken store."""
        ...
