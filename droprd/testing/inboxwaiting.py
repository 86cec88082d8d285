"""The rules of consuming that have to do with time, order and waiting: part of
`droprd.testing.inboxsuite`.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from itertools import count

from droprd.client.inbox import Inbox
from droprd.client.message import Message
from droprd.spool.inbox import InboxStore
from droprd.testing.consumers import ConsumerFixtures, OrderedInbox, bodies
from droprd.testing.inboxes import Backend, eventually


class WaitingRules(ConsumerFixtures):
    """See `InboxStoreSuite`."""

    # Time

    def test_an_expired_message_is_not_delivered(
        self, backend: Backend, stores: list[InboxStore], consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"late"], ttl_ms=50, elapsed_ms=50)
        backend.deliver([b"good"], ttl_ms=3_600_000, elapsed_ms=50)
        assert bodies(consumer().receive("sites")) == [b"good"]
        assert stores[0].streams("sites", again=True)[0].look().counts["expired"] == 1

    def test_a_delayed_message_is_waited_for_and_holds_up_nobody(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"later"], delay_ms=400, elapsed_ms=100)
        backend.deliver([b"now"])
        inbox = consumer()
        assert bodies(inbox.receive("sites")) == [b"now"]
        (later,) = inbox.receive("sites", wait_s=10)
        assert (later.body, later.attempt) == (b"later", 1)

    # Ordered channels

    def test_an_ordered_channel_has_one_consumer_at_a_time(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2"])
        backend.deliver([b"urgent"], priority=1)
        first, second = consumer(OrderedInbox), consumer(OrderedInbox)
        (message,) = first.receive("sites", max_messages=1)
        assert message.body == b"urgent"
        assert second.receive("sites") == []
        (another,) = first.receive("sites", max_messages=1)
        got: list[Message] = []
        waiting = threading.Thread(target=lambda: got.extend(second.receive("sites", wait_s=10)))
        waiting.start()
        eventually(lambda: bool(second._sleepers))
        first.ack([message, another])
        waiting.join(4)
        assert bodies(got) == [b"2"]

    def test_in_an_ordered_channel_a_nacked_head_blocks_its_sender_only(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"h1", b"h2"], sender="hamburg")
        backend.deliver([b"b1"], sender="berlin")
        backend.deliver([b"h3"], sender="hamburg")
        inbox = consumer(OrderedInbox)
        inbox.receive("sites", max_messages=1)[0].nack(delay_s=0.3)
        assert bodies(inbox.receive("sites")) == [b"b1"]
        assert inbox.receive("sites") == []
        assert bodies(inbox.receive("sites", wait_s=10)) == [b"h1", b"h2", b"h3"]

    # Waiting

    def test_a_channel_that_does_not_exist_yet_is_waited_for(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        inbox = consumer()
        assert inbox.receive("sites") == []
        got: list[Message] = []
        waiting = threading.Thread(target=lambda: got.extend(inbox.receive("sites", wait_s=10)))
        waiting.start()
        eventually(lambda: bool(inbox._sleepers))
        backend.deliver([b"first"])
        waiting.join(4)
        assert bodies(got) == [b"first"]

    def test_threads_of_one_inbox_wake_each_other(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        inbox = consumer()
        got: dict[str, list[bytes]] = {"a": [], "b": []}

        def work(channel: str) -> None:
            got[channel] += bodies(inbox.receive(channel, wait_s=10))

        threads = [threading.Thread(target=work, args=(channel,)) for channel in got]
        for thread in threads:
            thread.start()
        eventually(lambda: len(inbox._sleepers) == 2)
        backend.deliver([b"for b"], channel="b")
        threads[1].join(4)
        backend.deliver([b"for a"], channel="a")
        threads[0].join(4)
        assert got == {"a": [b"for a"], "b": [b"for b"]}

    def test_a_nack_wakes_another_thread_of_the_same_inbox(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1"])
        inbox = consumer()
        (message,) = inbox.receive("sites")
        got: list[Message] = []
        waiting = threading.Thread(target=lambda: got.extend(inbox.receive("sites", wait_s=10)))
        waiting.start()
        eventually(lambda: bool(inbox._sleepers))
        message.nack()
        waiting.join(4)
        assert bodies(got) == [b"1"]

    def test_its_descriptor_becomes_readable_when_something_comes(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        inbox = consumer()
        assert inbox.receive("sites") == []
        assert not select.select([inbox.fileno()], [], [], 0)[0]
        backend.deliver([b"1"])
        assert select.select([inbox.fileno()], [], [], 10)[0]
        assert bodies(inbox.receive("sites")) == [b"1"]
        assert not select.select([inbox.fileno()], [], [], 0)[0]

    def test_many_threads_get_every_message_once(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        for start in range(0, 2000, 50):
            backend.deliver([b"%d" % n for n in range(start, start + 50)])
        inboxes = [consumer(), consumer()]
        got: list[bytes] = []
        turns = count()

        def work() -> None:
            inbox = inboxes[next(turns) % 2]
            while messages := inbox.receive("sites", max_messages=30, wait_s=0.3):
                got.extend(bodies(messages))
                inbox.ack(messages)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(map(int, got)) == list(range(2000))
