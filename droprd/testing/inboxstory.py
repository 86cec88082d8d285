"""A random story of consumers, for `droprd.testing.inboxsuite`: what must be true all the while."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from droprd.client.inbox import Inbox
from droprd.client.message import Message
from droprd.spool.inbox import InboxStore
from droprd.testing.inboxes import Backend


class Story:
    """Consumers that do at random what consumers do, and what must be true all the while."""

    def __init__(
        self,
        backend: Backend,
        stores: list[InboxStore],
        consumer: Callable[..., Inbox],
        rng: Random,
    ) -> None:
        self.backend = backend
        self.stores = stores
        self.consumer = consumer
        self.rng = rng
        self.sent = 0
        self.attempts: dict[bytes, int] = {}
        self.ended: dict[bytes, str] = {}
        self.alone: set[bytes] = set()
        self.newest = -1
        self.working: list[tuple[Inbox, InboxStore, list[Message]]] = []
        for _ in range(3):
            self.join()

    def join(self) -> None:
        self.working.append((self.consumer(), self.stores[-1], []))

    def step(self) -> None:
        rng = self.rng
        if rng.random() < 0.3:
            count = rng.randrange(1, 8)
            self.backend.deliver([b"%d" % n for n in range(self.sent, self.sent + count)])
            self.sent += count
            return
        inbox, store, held = worker = rng.choice(self.working)
        what = rng.random()
        if what < 0.45:
            self.receive(inbox, held)
        elif what < 0.95 and held:
            message = held.pop(rng.randrange(len(held)))
            self.settle(message)
        elif what > 0.97:
            for message in held:
                if self.attempts[message.body] < 10:
                    self.alone.add(message.body)
                else:
                    self.ended[message.body] = "out of attempts"
            if rng.random() < 0.5:
                inbox.close()
            else:
                self.backend.kill(store)
            self.working.remove(worker)
            self.join()

    def receive(self, inbox: Inbox, held: list[Message]) -> None:
        messages = inbox.receive("sites", lease_s=3600, max_messages=self.rng.randrange(1, 9))
        elsewhere = {m.body for _, _, others in self.working for m in others}
        for message in messages:
            body = message.body
            assert body not in elsewhere, "leased twice at a time"
            assert body not in self.ended, f"came again though {self.ended[body]}"
            assert message.attempt == self.attempts.get(body, 0) + 1
            if message.attempt == 1:
                assert int(body) > self.newest, "not in order of arrival"
                self.newest = int(body)
            if body in self.alone:
                assert len(messages) == 1, "what was left unsettled did not come alone"
                self.alone.discard(body)
            self.attempts[body] = message.attempt
        held += messages

    def settle(self, message: Message) -> None:
        body, how = message.body, self.rng.choice(("ack", "ack", "nack", "reject", "extend"))
        if how == "ack":
            message.ack()
            self.ended[body] = "acked"
        elif how == "nack":
            message.nack()
            if message.attempt == 10:
                self.ended[body] = "out of attempts"
        elif how == "reject":
            message.reject("no")
            self.ended[body] = "rejected"
        else:
            message.extend(3600)
            message.ack()
            self.ended[body] = "acked"

    def settle_everything(self) -> None:
        for inbox, _, held in self.working:
            inbox.ack(held)
            self.ended.update((message.body, "acked") for message in held)
            held.clear()
        last, _, held = self.working[0]
        while True:
            self.receive(last, held)
            if not held:
                break
            last.ack(held)
            self.ended.update((message.body, "acked") for message in held)
            held.clear()
        assert set(self.ended) == {b"%d" % n for n in range(self.sent)}
