"""Consumers of an inbox under test, for `droprd.testing.inboxsuite`: fixtures and helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.client.message import Message
from droprd.settings.values import ChannelSettings
from droprd.spool.inbox import InboxStore
from droprd.testing.inboxes import Backend


def bodies(messages: list[Message]) -> list[bytes]:
    """What the messages say."""
    return [message.body for message in messages]


class OrderedInbox(Inbox):
    """An inbox whose channels are all ordered."""

    def _policy(self, channel: str) -> ChannelSettings:
        return ChannelSettings(max_attempts=3, ordered=True)


class ImpatientInbox(Inbox):
    """An inbox whose channels allow two attempts."""

    def _policy(self, channel: str) -> ChannelSettings:
        return ChannelSettings(max_attempts=2)


class ConsumerFixtures:
    """An inbox under test, and its consumers."""

    def make(self, tmp_path: Path) -> Backend:
        """An empty inbox, below `tmp_path` if it needs files."""
        raise NotImplementedError

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        return self.make(tmp_path)

    @pytest.fixture
    def stores(self) -> list[InboxStore]:
        return []

    @pytest.fixture
    def consumer(
        self, backend: Backend, stores: list[InboxStore]
    ) -> Iterator[Callable[..., Inbox]]:
        """Opens consumers, and closes them after the test; `stores` are theirs, in order."""
        opened: list[Inbox] = []

        def open_store() -> InboxStore:
            stores.append(backend.open())
            return stores[-1]

        def make(kind: type[Inbox] = Inbox) -> Inbox:
            opened.append(kind(store=open_store))
            return opened[-1]

        yield make
        for inbox in opened:
            if inbox._opened is not None and inbox._opened[0] not in self.killed(backend):
                inbox.close()

    def killed(self, backend: Backend) -> list[InboxStore]:
        """The stores that the test has killed."""
        killed: list[InboxStore] = getattr(backend, "killed", [])
        return killed
