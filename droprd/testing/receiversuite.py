"""The rules of receiving as tests that the receiver's side of every inbox must pass.

For whoever makes a store: subclass `ReceiverSuite` in a test module, and say in `make` how a
`WriterBackend` for yours is made. `droprd.testing.inboxsuite` has the consumer's side; here
consumers only look at what has come.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from droprd.errors import BadData
from droprd.model import GENESIS, Head, Void
from droprd.spool.arrivals import PieceRefused
from droprd.spool.judging import NOT_PERMITTED, TOO_LARGE
from droprd.testing.inboxes import eventually
from droprd.testing.inboxsuite import bodies
from droprd.testing.pushing import (
    Sent,
    after,
    blob_frame_of,
    frame_of,
    push_body_of,
    push_of,
)
from droprd.testing.receiving import MATCH_FRAMES, PEER, Receiving, WriterBackend


class ReceiverSuite:
    """Subclass it, name the subclass `Test…`, and override `make`."""

    def make(self, tmp_path: Path) -> WriterBackend:
        """An empty inbox, below `tmp_path` if it needs files."""
        raise NotImplementedError

    @pytest.fixture
    def backend(self, tmp_path: Path) -> WriterBackend:
        return self.make(tmp_path)

    @pytest.fixture
    def node(self, backend: WriterBackend) -> Iterator[Receiving]:
        receiving = Receiving(backend)
        yield receiving
        receiving.close()

    # Heads

    def test_what_is_pushed_is_received_as_it_was_sent(self, node: Receiving) -> None:
        sent = [frame_of([b"one", b"two"]), frame_of([b"three"])]
        answer = node.send(GENESIS, *sent)
        assert (answer.verdict, answer.head) == ("ok", after(GENESIS, sent))
        node.push(("sites", 1, GENESIS, [frame_of([b"urgent"], priority=1)]))
        messages = node.inbox().receive("sites")
        assert bodies(messages) == [b"urgent", b"one", b"two", b"three"]
        assert {(m.sender, m.channel) for m in messages} == {(PEER, "sites")}
        assert [m.priority for m in messages] == [1, 5, 5, 5]
        assert node.writer.received == 4
        assert node.writer.lanes == 2

    def test_nothing_is_told_or_seen_before_it_is_stored(self, node: Receiving) -> None:
        sent = [frame_of([b"one"])]
        push, parts = push_of(("sites", 5, GENESIS, sent))
        first = node.writer.push(PEER, push, parts)
        second = node.writer.push(PEER, push, parts)  # a conflict with what is not stored yet
        assert (first.waits, second.waits) == (True, True)
        assert node.writer.has_staged
        assert node.ask(after(GENESIS, sent)).head == GENESIS
        assert node.got() == []
        assert node.commit() == {"sites"}
        assert not node.writer.has_staged
        assert node.writer.answer(first)[0].verdict == "ok"
        assert node.writer.answer(second)[0].verdict == "conflict"
        assert node.writer.answer(second)[0].head == after(GENESIS, sent)
        assert node.got() == [b"one"]
        assert node.writer.begin() is None

    def test_another_head_is_a_conflict_that_changes_nothing(self, node: Receiving) -> None:
        sent = [frame_of([b"one"])]
        head = node.send(GENESIS, *sent).head
        for wrong in (GENESIS, Head(1, b"x" * 16), Head(2, head.chain)):
            answer = node.send(wrong, frame_of([b"two"]))
            assert (answer.verdict, answer.head) == ("conflict", head)
        assert node.send(GENESIS, *sent).verdict == "conflict"
        assert node.got() == [b"one"]

    def test_one_lanes_conflict_does_not_undo_another_lanes_frames(self, node: Receiving) -> None:
        good, bad = frame_of([b"good"], "good"), frame_of([b"bad"], "bad")
        answers = node.push(("bad", 5, Head(7, b"x" * 16), [bad]), ("good", 5, GENESIS, [good]))
        assert [answer.verdict for answer in answers] == ["conflict", "ok"]
        assert (node.got("good"), node.got("bad")) == ([b"good"], [])

    def test_lanes_of_another_spool_or_peer_begin_anew(self, node: Receiving) -> None:
        node.send(GENESIS, frame_of([b"one"]))
        assert node.send(GENESIS, frame_of([b"two"]), spool_id=b"T" * 16).verdict == "ok"
        assert node.send(GENESIS, frame_of([b"three"]), peer="bremen").verdict == "ok"
        assert node.got() == [b"one", b"two", b"three"]

    def test_a_push_without_frames_only_asks(self, node: Receiving) -> None:
        assert node.send(GENESIS).head == GENESIS
        head = node.send(GENESIS, frame_of([b"one"])).head
        assert node.send(head).verdict == "ok"
        assert (node.send(GENESIS).verdict, node.send(GENESIS).head) == ("conflict", head)

    def test_what_comes_during_a_commit_waits_for_the_next(self, node: Receiving) -> None:
        first, second = frame_of([b"one"]), frame_of([b"two"])
        node.writer.push(PEER, *push_of(("sites", 5, GENESIS, [first])))
        batch = node.writer.begin()
        assert batch is not None
        assert batch.frame_bytes == len(first.data)
        head = after(GENESIS, [first])
        pending = node.writer.push(PEER, *push_of(("sites", 5, head, [second])))
        node.writer.write(batch)
        assert node.writer.finish(batch) == {"sites"}
        assert node.writer.has_staged
        assert node.commit() == {"sites"}
        assert node.writer.answer(pending)[0].head == after(head, [second])
        assert node.got() == [b"one", b"two"]

    @pytest.mark.parametrize("at", [5, 49, 120, -1])
    def test_a_push_that_cannot_be_read_changes_nothing(self, node: Receiving, at: int) -> None:
        good, bad = frame_of([b"good"], "good"), frame_of([b"bad body"])
        whole = push_body_of(("good", 5, GENESIS, [good]), ("sites", 5, GENESIS, [bad]))
        push, parts = push_of(("good", 5, GENESIS, [good]), ("sites", 5, GENESIS, [bad]))
        assert len(whole) > sum(map(len, parts))
        broken = bytearray(parts[1])
        broken[at] ^= 1
        with pytest.raises(BadData):
            node.writer.push(PEER, push, [parts[0], memoryview(bytes(broken))])
        assert node.commit() == frozenset()
        assert node.writer.lanes == 0

    # What a process leaves

    @pytest.mark.parametrize("clean", [True, False])
    def test_the_next_process_goes_on_where_the_last_one_was(
        self, node: Receiving, clean: bool
    ) -> None:
        head = node.send(GENESIS, frame_of([b"one"]), frame_of([b"two"])).head
        if clean:
            node.restart()
        else:
            # What was never answered may be forgotten, but not cut a lane short.
            lost = ("sites", 5, head, [frame_of([b"never answered"])])
            node.writer.push(PEER, *push_of(lost))
            node.kill()
        assert node.send(GENESIS).head == head
        assert node.send(head, frame_of([b"three"])).verdict == "ok"
        assert node.got() == [b"one", b"two", b"three"]

    def test_a_kill_between_writing_and_answering_doubles_nothing(self, node: Receiving) -> None:
        sent = [frame_of([b"one"])]
        node.writer.push(PEER, *push_of(("sites", 5, GENESIS, sent)))
        batch = node.writer.begin()
        assert batch is not None
        node.writer.write(batch)
        node.kill()
        answer = node.send(GENESIS, *sent)
        assert answer.verdict in ("ok", "conflict")
        assert answer.head == after(GENESIS, sent)
        assert node.got() == [b"one"]

    @pytest.mark.parametrize("seed", range(3))
    def test_whatever_happens_each_frame_enters_once_in_order(
        self, node: Receiving, seed: int
    ) -> None:
        rng = Random(seed)
        lanes = {channel: (GENESIS, list[Sent]()) for channel in ("a", "b", "c")}
        told: dict[str, list[bytes]] = {channel: [] for channel in lanes}
        for step in range(120):
            channel = rng.choice(list(lanes))
            head, waiting = lanes[channel]
            if rng.random() < 0.6 or not waiting:
                body = b"%d" % step
                waiting.append(frame_of([body] * rng.randrange(1, 4), channel))
                told[channel] += [body] * waiting[-1].count
            sent = waiting[: rng.randrange(1, 4)]
            pending = node.writer.push(PEER, *push_of((channel, 5, head, sent)))
            fate = rng.random()
            if fate < 0.1:
                node.kill()
                continue
            if fate < 0.3:
                continue  # another push is taken before the commit
            node.commit()
            (answer,) = node.writer.answer(pending)
            if fate < 0.5:
                continue  # the answer is lost
            done = 0
            while after(head, waiting[:done]) != answer.head:
                done += 1
            lanes[channel] = (answer.head, waiting[done:])
        for channel, (head, waiting) in lanes.items():
            (answer,) = node.push((channel, 5, head, waiting))
            if answer.verdict == "conflict":
                done = next(
                    n for n in range(len(waiting) + 1) if after(head, waiting[:n]) == answer.head
                )
                node.push((channel, 5, answer.head, waiting[done:]))
            assert node.got(channel) == told[channel]

    # Verdicts

    def test_voids_and_time_on_the_way_are_kept(self, node: Receiving) -> None:
        voided = frame_of([b"a", b"bb", b"c"], voids=[Void(1, "expired")])
        late = frame_of([b"late"], ttl_ms=1000, elapsed_ms=1000)
        node.send(GENESIS, voided, late, frame_of([b"d"]))
        assert bodies(node.inbox().receive("sites")) == [b"a", b"c", b"d"]

    def test_bodies_that_are_too_large_become_voids_and_the_lane_goes_on(
        self, node: Receiving
    ) -> None:
        node.limit(max_message_bytes=4)
        sent = [frame_of([b"ok", b"too large"]), frame_of([b"large too"]), frame_of([b"fine"])]
        answer = node.send(GENESIS, *sent)
        assert answer.head == after(GENESIS, sent)
        assert [(r.index, r.reason) for r in answer.refusals] == [(1, TOO_LARGE), (None, TOO_LARGE)]
        assert bodies(node.inbox().receive("sites")) == [b"ok", b"fine"]

    def test_of_a_channel_that_is_not_permitted_only_the_head_is_kept(
        self, node: Receiving
    ) -> None:
        node.limit(channels=frozenset({"sites"}))
        sent = [frame_of([b"a", b"b"], "secret")]
        (answer,) = node.push(("secret", 5, GENESIS, sent))
        assert (answer.verdict, answer.head) == ("ok", after(GENESIS, sent))
        assert [r.reason for r in answer.refusals] == [NOT_PERMITTED]
        assert "secret" not in node.inbox()._enter()[0].channels()
        node.kill()
        (again,) = node.push(("secret", 5, GENESIS, sent))
        assert (again.verdict, again.head) == ("conflict", answer.head)

    def test_a_lane_too_many_is_refused_for_now(self, node: Receiving) -> None:
        node.limit(lanes_max=1)
        head = node.send(GENESIS, frame_of([b"one"])).head
        (answer,) = node.push(("other", 5, GENESIS, [frame_of([b"x"], "other")]))
        assert (answer.verdict, answer.head) == ("refused", GENESIS)
        assert answer.retry_after_s
        node.limit(lanes_max=2)
        assert node.send(head, frame_of([b"two"])).verdict == "ok"
        assert node.push(("other", 5, GENESIS, [frame_of([b"x"], "other")]))[0].verdict == "ok"

    # Match

    @pytest.mark.parametrize("ending", ["none", "clean", "killed"])
    def test_a_match_tells_the_common_head_and_what_follows(
        self, node: Receiving, ending: str
    ) -> None:
        voided = frame_of([b"b", b"c"], voids=[Void(1, "purged")])
        sent = [frame_of([b"a"]), voided, frame_of([b"d"])]
        head = GENESIS
        heads = []
        for one in sent:
            head = node.send(head, one).head
            heads.append(head)
        if ending != "none":
            node.restart() if ending == "clean" else node.kill()
        told = node.ask(Head(9, b"x" * 16), heads[0])
        assert (told.head, told.common, told.more) == (head, heads[0], False)
        assert told.frames == tuple((one.frame_id, one.count) for one in sent[1:])
        assert [(v.frame_id, v.index, v.reason) for v in told.voids] == [
            (voided.frame_id, 1, "purged")
        ]
        assert node.ask(head, voids_after=3).voids == ()

    def test_the_newest_frames_are_remembered_beyond_their_messages(
        self, node: Receiving, backend: WriterBackend
    ) -> None:
        sent = [frame_of([b"x"]) for _ in range(3 * MATCH_FRAMES)]
        node.send(GENESIS, *sent)
        inbox = node.inbox()
        inbox.ack(inbox.receive("sites", max_messages=1000))
        node.writer.make_room(1)
        backend.tend()
        node.restart()
        known = after(GENESIS, sent[: -MATCH_FRAMES + 1])
        told = node.ask(known)
        assert told.common == known
        assert [frame_id for frame_id, _ in told.frames] == [
            one.frame_id for one in sent[-MATCH_FRAMES + 1 :]
        ]

    def test_of_a_lane_that_is_not_known_nothing_is_remembered(self, node: Receiving) -> None:
        told = node.ask(Head(3, b"x" * 16))
        assert (told.head, told.common, told.frames) == (GENESIS, None, ())

    # Bodies that are files

    def test_a_large_body_comes_before_its_frame(self, node: Receiving) -> None:
        one, small = blob_frame_of(bytes(range(256)) * 400), frame_of([b"small"])
        answer = node.send(GENESIS, small, one)
        assert answer.head == after(GENESIS, [small])
        needed = node.send(answer.head, one)
        assert (needed.verdict, needed.need) == ("need", {one.frame_id: 0})
        assert node.put(one, 0, 40_000) == 40_000
        with pytest.raises(PieceRefused) as refused:
            node.writer.blobs.arrive(PEER, one.frame_id, 50_000, len(one.blob))
        assert refused.value.have == 40_000
        node.kill()
        have = node.send(answer.head, one).need[one.frame_id]
        assert have <= 40_000
        assert node.put(one, have, len(one.blob)) == len(one.blob)
        (wanted,) = node.writer.wanted_blobs(PEER, *push_of(("sites", 5, answer.head, [one])))
        assert node.writer.blobs.missing(PEER, wanted) is None
        assert node.send(answer.head, one).verdict == "ok"
        assert node.writer.blobs.arrive(PEER, one.frame_id, 0, len(one.blob)) is None
        first, second = node.inbox().receive("sites")
        assert (first.body, second.body) == (b"small", one.blob)

    def test_a_large_body_that_does_not_match_is_asked_for_again(self, node: Receiving) -> None:
        one = blob_frame_of(b"x" * 50_000)
        right, one.blob = one.blob, b"y" * 50_000
        node.put(one, 0, 50_000)
        assert node.send(GENESIS, one).need == {one.frame_id: 0}
        one.blob = right
        node.put(one, 0, 50_000)
        assert node.send(GENESIS, one).verdict == "ok"

    def test_a_later_request_for_a_body_takes_over(self, node: Receiving) -> None:
        one = blob_frame_of(b"z" * 50_000)
        hanging = node.writer.blobs.arrive(PEER, one.frame_id, 0, 50_000)
        assert hanging is not None
        hanging.write(one.blob[:1000])
        newer = node.writer.blobs.arrive(PEER, one.frame_id, 1000, 50_000)
        assert newer is not None
        with pytest.raises(PieceRefused):
            hanging.write(b"late")
        newer.write(one.blob[1000:])
        hanging.close()
        assert node.send(GENESIS, one).verdict == "need"
        newer.close()
        assert node.send(GENESIS, one).verdict == "ok"

    # Room and bells

    def test_a_quota_refuses_until_what_is_settled_has_gone(
        self, node: Receiving, backend: WriterBackend
    ) -> None:
        node.limit(quota_bytes=60_000)
        head = GENESIS
        for _ in range(2):
            assert node.writer.no_room(PEER, 20_000) == ""
            head = node.send(head, frame_of([b"x" * 20_000])).head
        assert node.writer.no_room(PEER, 30_000)
        assert node.writer.no_room("bremen", 30_000) == ""
        inbox = node.inbox()
        inbox.ack(inbox.receive("sites"))
        inbox.flush()
        node.writer.make_room(1)
        backend.tend()
        node.writer.recount()
        assert node.writer.no_room(PEER, 30_000) == ""
        assert node.send(head, frame_of([b"more"])).verdict == "ok"
        assert bodies(inbox.receive("sites")) == [b"more"]

    def test_making_room_takes_nothing_that_is_not_settled(
        self, node: Receiving, backend: WriterBackend
    ) -> None:
        head = node.send(GENESIS, *[frame_of([b"%d" % n]) for n in range(5)]).head
        inbox = node.inbox()
        messages = inbox.receive("sites")
        inbox.ack([messages[0], messages[2]])
        messages[3].reject("no such site")
        node.writer.make_room(1)
        backend.tend()
        node.writer.recount()
        node.send(head, frame_of([b"5"]))
        messages[1].nack()
        messages[4].nack()
        got = [m for _ in range(3) for m in inbox.receive("sites", max_messages=1)]
        assert sorted(bodies(got)) == [b"1", b"4", b"5"]

    def test_a_waiting_consumer_is_rung(self, node: Receiving) -> None:
        inbox = node.inbox()
        got: list[bytes] = []
        waiting = threading.Thread(
            target=lambda: got.extend(bodies(inbox.receive("sites", wait_s=10)))
        )
        waiting.start()
        eventually(lambda: bool(inbox._sleepers))
        node.send(GENESIS, frame_of([b"here"]))
        waiting.join(4)  # less than the look that would come without a ring
        assert got == [b"here"]
