"""The rules of consuming as tests that every `InboxStore` must pass.

For whoever makes a store: subclass `InboxStoreSuite` in a test module, and say in `make` how a
`Backend` for yours is made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from droprd.client.inbox import Inbox
from droprd.client.message import Message
from droprd.errors import InvalidName, LeaseLost, SpoolCorrupt, UsageError
from droprd.spool.inbox import InboxStore
from droprd.testing.consumers import ImpatientInbox, OrderedInbox, bodies
from droprd.testing.inboxes import Backend, eventually
from droprd.testing.inboxstory import Story
from droprd.testing.inboxwaiting import WaitingRules

__all__ = ["ImpatientInbox", "InboxStoreSuite", "OrderedInbox", "bodies"]


class InboxStoreSuite(WaitingRules):
    """Subclass it, name the subclass `Test…`, and override `make`."""

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

    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_consumers_do_each_message_ends_once(
        self, backend: Backend, stores: list[InboxStore], consumer: Callable[..., Inbox], seed: int
    ) -> None:
        story = Story(backend, stores, consumer, Random(seed))
        for _ in range(250):
            story.step()
        story.settle_everything()
