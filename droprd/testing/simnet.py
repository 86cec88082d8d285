"""A simulated network: requests and answers that are lost, delayed, repeated and reordered.

It carries the very bytes that would travel (`droprd.core.push`, `droprd.core.ask`). What is under
way survives the death of whoever sent it; who receives an answer is up to the sender, which may
have given up long ago.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal


@dataclass(frozen=True, slots=True)
class Piece:
    """What the head of a blob's request says."""

    frame_id: bytes
    offset: int
    size: int


@dataclass(eq=False, slots=True)
class Request:
    """A request under way.

    Attributes:
        peer: whom the receiver takes the sender for.
        asker: the process that waits for the answer.
    """

    kind: Literal["push", "match", "blob"]
    peer: str
    body: bytes
    asker: object
    piece: Piece | None = None


@dataclass(eq=False, slots=True)
class Reply:
    """The answer to a request."""

    request: Request
    body: bytes


class Network:
    """What is under way. With `calm`, nothing is lost and nothing repeated."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self.calm = False
        self.lossy = rng.choice((0.02, 0.2))
        self.requests: list[Request] = []
        self.replies: list[Reply] = []

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self.requests or self.replies)

    def ask(self, request: Request) -> None:
        """Send a request; perhaps it never arrives, perhaps twice."""
        if self.calm or self._rng.random() > self.lossy:
            self.requests.append(request)
        if not self.calm and self._rng.random() < self.lossy:
            self.requests.append(request)

    def answer(self, reply: Reply) -> None:
        """Send an answer; perhaps it never arrives."""
        if self.calm or self._rng.random() > self.lossy:
            self.replies.append(reply)

    def next_request(self) -> Request | None:
        """A request that arrives now, not always the oldest."""
        return self.requests.pop(self._place(len(self.requests))) if self.requests else None

    def next_reply(self) -> Reply | None:
        """An answer that arrives now."""
        return self.replies.pop(self._place(len(self.replies))) if self.replies else None

    def _place(self, length: int) -> int:
        is_late = not self.calm and self._rng.random() < 0.2
        return self._rng.randrange(length) if is_late else 0
