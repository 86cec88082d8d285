"""A receiver's side of an inbox under test, as its peers and its consumers see it.

`WriterBackend` is what `droprd.testing.receiversuite` needs of a store to try its rules
on; `Receiving` is one such inbox with its writer, pushed to and consumed from.
"""

from __future__ import annotations

from typing import Protocol

from droprd.client.inbox import Inbox
from droprd.core.ask import MatchAnswer, MatchRequest
from droprd.core.push import LaneAnswer
from droprd.model import Head
from droprd.spool.inbox import InboxStore
from droprd.spool.judging import Limits, PeerLimits
from droprd.spool.store import InboxWriter
from droprd.testing.inboxsuite import bodies
from droprd.testing.pushing import SENDER, LanePart, Sent, push_of

PEER = "hamburg"
MATCH_FRAMES = 50


class WriterBackend(Protocol):
    """An inbox under test."""

    def open_writer(self, limits: Limits) -> InboxWriter:
        """Its one writer: the first, or one after the last was closed or killed."""
        ...

    def open_consumer(self) -> InboxStore:
        """A new consumer."""
        ...

    def kill_writer(self, writer: InboxWriter) -> None:
        """Make it vanish as if its process had been killed."""
        ...

    def tend(self) -> None:
        """Let whatever else this store runs beside its writer delete what may be deleted."""
        ...


class Receiving:
    """A receiver as its peers and its consumers see it."""

    def __init__(self, backend: WriterBackend) -> None:
        self._backend = backend
        self.limits = Limits(match_frames=MATCH_FRAMES)
        self.writer = backend.open_writer(self.limits)
        self._inboxes: list[Inbox] = []

    def limit(self, **peer: object) -> None:
        """Other limits for the peer, while it runs."""
        known = PeerLimits(**peer)  # type: ignore[arg-type]  # as the test says
        self.limits = Limits(match_frames=MATCH_FRAMES, peers={PEER: known})
        self.writer.configure(self.limits)

    def commit(self) -> frozenset[str]:
        """What the worker does with all that waits."""
        batch = self.writer.begin()
        if batch is None:
            return frozenset()
        self.writer.write(batch)
        channels = self.writer.finish(batch)
        self.writer.ring(channels)
        return channels

    def push(
        self, *lanes: LanePart, peer: str = PEER, spool_id: bytes = SENDER
    ) -> list[LaneAnswer]:
        """Push, commit if it must be waited for, and hear the answers."""
        pending = self.writer.push(peer, *push_of(*lanes, spool_id=spool_id))
        if pending.waits:
            self.commit()
        return list(self.writer.answer(pending))

    def send(
        self, head: Head, *sent: Sent, peer: str = PEER, spool_id: bytes = SENDER
    ) -> LaneAnswer:
        """Push to one lane."""
        (answer,) = self.push(("sites", 5, head, sent), peer=peer, spool_id=spool_id)
        return answer

    def put(self, one: Sent, offset: int, end: int) -> int:
        """Bring a piece of a body. Returns how much of it is there."""
        arrival = self.writer.blobs.arrive(PEER, one.frame_id, offset, len(one.blob))
        assert arrival is not None
        arrival.write(one.blob[offset:end])
        return arrival.close()

    def ask(self, *heads: Head, voids_after: int = 0) -> MatchAnswer:
        """A match about the lane of `send`."""
        request = MatchRequest(SENDER, "sites", 5, heads, None, voids_after)
        return self.writer.match(PEER, request)

    def kill(self) -> None:
        """Its process is killed, and another one starts."""
        self._backend.kill_writer(self.writer)
        self.writer = self._backend.open_writer(self.limits)

    def restart(self) -> None:
        """It is stopped, and another one starts."""
        self.writer.close()
        self.writer = self._backend.open_writer(self.limits)

    def inbox(self) -> Inbox:
        """A consumer."""
        self._inboxes.append(Inbox(store=self._backend.open_consumer))
        return self._inboxes[-1]

    def got(self, channel: str = "sites") -> list[bytes]:
        """All that can be consumed, in order; it stays."""
        return bodies(self.inbox().peek(channel, max_messages=10_000))

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.close()
        self.writer.close()
