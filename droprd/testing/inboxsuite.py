"""The rules of consuming as tests that every `InboxStore` must pass.

For whoever makes a store: subclass `InboxStoreSuite` in a test module, and say in `make` how a
`Backend` for yours is made.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random

import pytest

from droprd.client.inbox import Inbox
from droprd.client.message import Message
from droprd.errors import InvalidName, LeaseLost, SpoolCorrupt, UsageError
from droprd.settings.values import ChannelSettings
from droprd.spool.inbox import InboxStore
from droprd.testing.inboxes import Backend, eventually
from droprd.testing.inboxstory import Story


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


class InboxStoreSuite:
    """Subclass it, name the subclass `Test…`, and override `make`."""

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

    # Receiving

    def test_messages_come_in_order_with_all_that_was_sent(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        ids = backend.deliver([b"one", b"two"], headers={"site": 4711}, sender="hamburg")
        ids += backend.deliver([b"three"])
        messages = consumer().receive("sites")
        assert bodies(messages) == [b"one", b"two", b"three"]
        assert [m.id for m in messages] == ids
        assert {(m.sender, m.channel, m.priority, m.attempt) for m in messages} == {
            ("hamburg", "sites", 5, 1)
        }
        assert messages[0].headers == {"site": 4711}
        assert messages[2].headers == {}
        assert messages[0].size == 3
        with messages[1].open() as file:
            assert file.read() == b"two"

    def test_the_most_urgent_come_first_then_the_channels_in_turn(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        inbox = consumer()
        backend.deliver([b"b"] * 3, channel="b")
        backend.deliver([b"a"] * 3, channel="a")
        backend.deliver([b"urgent"], channel="b", priority=0)
        assert bodies(inbox.receive("a", "b", max_messages=1)) == [b"urgent"]
        found = [inbox.receive("a", "b", max_messages=1)[0].body for _ in range(6)]
        assert sorted(found) == [b"a"] * 3 + [b"b"] * 3
        assert {found[0], found[1]} == {b"a", b"b"}

    def test_a_frame_may_be_leased_in_pieces(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"%d" % n for n in range(10)])
        inbox = consumer()
        got = [bodies(inbox.receive("sites", max_messages=4)) for _ in range(4)]
        assert [len(one) for one in got] == [4, 4, 2, 0]
        assert [body for one in got for body in one] == [b"%d" % n for n in range(10)]

    def test_a_leased_message_is_invisible_to_the_others(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"x"])
        first, second = consumer(), consumer()
        assert bodies(first.receive("sites")) == [b"x"]
        assert second.receive("sites") == []
        assert first.receive("sites") == []

    def test_an_acked_message_never_comes_again(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2", b"3"])
        inbox = consumer()
        messages = inbox.receive("sites", lease_s=0.05)
        messages[1].ack()
        inbox.ack([messages[2], messages[0]])
        inbox.ack(messages)
        inbox.flush()
        assert inbox.receive("sites", wait_s=0.1) == []

    def test_a_requeued_message_keeps_its_id(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        own = "01890a5d-ac96-774b-bcce-b302099a0001"
        ids = backend.deliver([b"new", b"requeued"], own_ids={1: own})
        assert [m.id for m in consumer().receive("sites")] == [ids[0], own]

    def test_a_large_body_is_a_file(self, backend: Backend, consumer: Callable[..., Inbox]) -> None:
        large = bytes(range(256)) * 400
        backend.deliver([large])
        (message,) = consumer().receive("sites")
        assert message.size == len(large)
        assert message.body == large
        with message.open() as file:
            assert file.read(1000) == large[:1000]

    def test_a_damaged_large_body_becomes_a_dead_letter(
        self, backend: Backend, stores: list[InboxStore], consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"x" * 100_000])
        (message,) = consumer().receive("sites")
        frame = message._frame
        Path(stores[0].blob_path(message.sender, frame.frame_id)).write_bytes(b"y" * 100_000)
        with pytest.raises(SpoolCorrupt):
            message.body  # noqa: B018  # reading is the test
        assert [d.reason for _, _, d in stores[0].streams("sites", again=True)[0].look().dead] == [
            "corrupt"
        ]

    def test_peeking_leases_and_counts_nothing(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2"])
        inbox = consumer()
        assert bodies(inbox.peek("sites")) == [b"1", b"2"]
        peeked = inbox.peek("sites", max_messages=1)
        assert bodies(peeked) == [b"1"]
        with pytest.raises(LeaseLost):
            peeked[0].ack()
        assert [m.attempt for m in inbox.receive("sites")] == [1, 1]

    def test_voided_messages_are_passed_over(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2", b"3", b"4"], voids={0: "expired", 2: "purged"})
        backend.deliver([b"5"], voids={0: "expired"})
        inbox = consumer()
        messages = inbox.receive("sites")
        assert bodies(messages) == [b"2", b"4"]
        inbox.ack(messages)
        assert inbox.receive("sites") == []

    def test_arguments_that_mean_nothing_are_refused(self, consumer: Callable[..., Inbox]) -> None:
        inbox = consumer()
        with pytest.raises(InvalidName):
            inbox.receive("No Such")
        with pytest.raises(UsageError):
            inbox.receive()
        with pytest.raises(UsageError):
            inbox.receive("sites", max_messages=0)
        with pytest.raises(UsageError):
            inbox.receive("sites", lease_s=0)
        with pytest.raises(UsageError):
            inbox.receive("sites", wait_s=-1)

    # What is not acked

    def test_a_nacked_message_comes_back_at_once_counted(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2"])
        inbox = consumer()
        inbox.receive("sites")[0].nack()
        (again,) = inbox.receive("sites")
        assert (again.body, again.attempt) == (b"1", 2)

    def test_a_nack_with_delay_is_waited_for(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1"])
        inbox = consumer()
        inbox.receive("sites")[0].nack(delay_s=0.2)
        assert inbox.receive("sites") == []
        assert bodies(inbox.receive("sites", wait_s=10)) == [b"1"]

    def test_a_nack_wakes_a_waiting_consumer(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1"])
        first, second = consumer(), consumer()
        (message,) = first.receive("sites")
        got: list[Message] = []
        waiting = threading.Thread(target=lambda: got.extend(second.receive("sites", wait_s=10)))
        waiting.start()
        eventually(lambda: bool(second._sleepers))
        message.nack()
        waiting.join(4)  # less than the look that would come without a ring
        assert bodies(got) == [b"1"]

    def test_a_lease_that_runs_out_loses_the_message(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1"])
        first, second = consumer(), consumer()
        (lost,) = first.receive("sites", lease_s=0.1)
        (found,) = second.receive("sites", wait_s=10)
        assert found.attempt == 2
        with pytest.raises(LeaseLost):
            lost.ack()
        with pytest.raises(LeaseLost):
            lost.nack()
        found.ack()

    def test_an_extended_lease_lasts(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2"])
        inbox = consumer()
        messages = inbox.receive("sites", lease_s=0.3)
        messages[0].extend(60)
        assert bodies(inbox.receive("sites", wait_s=10)) == [b"2"]
        messages[0].extend(60)
        messages[0].ack()
        with pytest.raises(LeaseLost):
            messages[1].ack()

    def test_messages_left_unsettled_come_again_each_alone(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2", b"3"])
        backend.deliver([b"4"])
        inbox = consumer()
        inbox.receive("sites", lease_s=0.05, max_messages=3)
        assert bodies(inbox.receive("sites")) == [b"4"]
        got = []
        for _ in range(3):
            (message,) = inbox.receive("sites", wait_s=10)
            message.ack()
            got.append((message.body, message.attempt))
        assert got == [(b"1", 2), (b"2", 2), (b"3", 2)]

    def test_closing_gives_back_what_was_not_settled(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2"])
        first, second = consumer(), consumer()
        messages = first.receive("sites")
        messages[0].ack()
        first.close()
        first.close()
        assert bodies(second.receive("sites")) == [b"2"]
        with pytest.raises(UsageError):
            messages[1].ack()

    def test_a_dead_consumers_messages_come_at_once(
        self, backend: Backend, stores: list[InboxStore], consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1"])
        first, second = consumer(), consumer()
        first.receive("sites", lease_s=3600)
        got: list[Message] = []
        waiting = threading.Thread(target=lambda: got.extend(second.receive("sites", wait_s=10)))
        waiting.start()
        eventually(lambda: bool(second._sleepers))
        backend.kill(stores[0])
        waiting.join(4)
        assert bodies(got) == [b"1"]

    def test_a_message_out_of_attempts_is_a_dead_letter(
        self, backend: Backend, stores: list[InboxStore], consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"poison"])
        inbox = consumer(ImpatientInbox)
        for _ in range(2):
            inbox.receive("sites")[0].nack()
        assert inbox.receive("sites") == []
        dead = list(stores[0].streams("sites", again=True)[0].look().dead)
        assert [(d.reason, d.attempts) for _, _, d in dead] == [("max_attempts", 2)]

    def test_a_rejected_message_is_a_dead_letter_with_its_reason(
        self, backend: Backend, stores: list[InboxStore], consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1"])
        inbox = consumer()
        inbox.receive("sites")[0].reject("no such site")
        assert inbox.receive("sites") == []
        dead = list(stores[0].streams("sites", again=True)[0].look().dead)
        assert [(a, b, d.reason) for a, b, d in dead] == [(0, 1, "no such site")]

    def test_only_the_lost_ones_of_many_are_reported(
        self, backend: Backend, consumer: Callable[..., Inbox]
    ) -> None:
        backend.deliver([b"1", b"2", b"3"])
        first, second = consumer(), consumer()
        messages = first.receive("sites", max_messages=1, lease_s=0.05)
        messages += first.receive("sites", max_messages=2)
        (stolen,) = second.receive("sites", wait_s=10)
        with pytest.raises(LeaseLost, match=messages[0].id):
            first.ack(messages)
        stolen.ack()
        assert second.receive("sites") == []

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

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_consumers_do_each_message_ends_once(
        self, backend: Backend, stores: list[InboxStore], consumer: Callable[..., Inbox], seed: int
    ) -> None:
        story = Story(backend, stores, consumer, Random(seed))
        for _ in range(250):
            story.step()
        story.settle_everything()
