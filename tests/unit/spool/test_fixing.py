"""Requeue and purge: what an operator does to messages, and what a crash in it leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.core.outstate import OutboxState
from droprd.model import Lane
from droprd.spool.again import again
from droprd.spool.deadlog import gone_letters, read_letters
from droprd.spool.fsck import check_spool
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.inboxfixing import InboxFixer
from droprd.spool.judging import Limits
from droprd.spool.layout import make_spool
from droprd.spool.lookup import OutboxView
from droprd.spool.receiver import ReceiverStore
from droprd.spool.retention import DeadLetters
from tests.spools import new_spool
from tests.unit.spool.test_outbox import LANE, Node, Receiver

ALL = Selection()
DEAD = Selection(what="dead")
SENT = Selection(what="sent")
WAITING = Selection(what="waiting")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    root = tmp_path / "spool"
    make_spool(OsFs(), str(root), os.urandom)
    node = Node(root)
    node.open()
    yield node
    node.kill()


def end(steps: Iterator[Fixed]) -> Fixed:
    return list(steps)[-1]


def requeue(node: Node, selection: Selection) -> Fixed:
    assert node.store is not None
    done = end(node.store.fixer().requeue(selection))
    node.merge()
    node.adds_up()
    return done


def purge(node: Node, selection: Selection) -> Fixed:
    assert node.store is not None
    done = end(node.store.fixer().purge(selection))
    node.adds_up()
    return done


def state(node: Node) -> OutboxState:
    assert node.store is not None
    return node.store.state


def ids(node: Node, kind: str) -> list[str]:
    """Message ids of the outbox, in order."""
    view = OutboxView(node.spool(), state(node))
    hits = {"dead": view.dead, "sent": view.sent, "waiting": view.waiting}[kind](ALL)
    return [one.hex() for hit in hits if hit.state == kind for one in hit.chosen.values()]


def test_sent_messages_go_out_again_in_new_frames_with_their_own_ids(node: Node) -> None:
    receiver = Receiver()
    for number in range(5):
        node.send(b"%d" % number, b"%d more" % number)
    node.merge()
    node.drain(receiver)
    before = ids(node, "sent")
    frames_before = len(receiver.frames)
    assert requeue(node, SENT).messages == 10
    assert ids(node, "waiting") == before
    node.drain(receiver)
    assert receiver.bodies[10:] == receiver.bodies[:10]
    assert len({frame_id for frame_id, _ in receiver.frames}) == len(receiver.frames)
    assert len(receiver.frames) > frames_before
    counts = node.store.lane(LANE).ended if node.store else None
    assert counts is not None
    assert counts.delivered == 20


def test_a_single_id_is_requeued_once_however_many_copies_there_are(node: Node) -> None:
    receiver = Receiver()
    node.send(b"a")
    node.send(b"b")
    node.merge()
    node.drain(receiver)
    wanted = frozenset((bytes.fromhex(ids(node, "sent")[0]),))
    for _ in range(2):
        assert requeue(node, Selection(ids=wanted)).messages == 1
        node.drain(receiver)
    assert receiver.bodies == [b"a", b"b", b"a", b"a"]


def test_refused_messages_are_requeued_and_no_longer_dead(node: Node) -> None:
    receiver = Receiver()
    receiver.refuse[b"bad"] = "no such channel"
    node.send(b"good", b"bad", b"fine")
    node.merge()
    node.drain(receiver)
    dead = ids(node, "dead")
    assert len(dead) == 1
    assert dead[0] not in ids(node, "sent")
    receiver.refuse.clear()
    assert requeue(node, DEAD).messages == 1
    assert ids(node, "dead") == []
    node.drain(receiver)
    assert receiver.bodies == [b"good", b"fine", b"bad"]
    assert state(node).lane(LANE).ended.dead == 0
    assert dead[0] in ids(node, "sent")  # the copy; the hole it left is not one
    assert len(ids(node, "sent")) == 3


def test_counts_follow_dead_log_when_a_crash_came_in_between(node: Node) -> None:
    receiver = Receiver()
    receiver.refuse[b"bad"] = "no"
    node.send(b"bad")
    node.merge()
    node.drain(receiver)
    assert node.store is not None
    node.store.commit()
    (hit,) = OutboxView(node.spool(), state(node)).dead(ALL)
    node.store._dead.take([(hit.lane, [(hit.frame.frame_id, [0])], "purged")])
    node.kill()  # before sender.log says so too
    node.open()
    assert state(node).lane(LANE).ended.dead == 0
    assert state(node).lane(LANE).ended.purged == 1
    node.adds_up()
    node.open()
    assert state(node).lane(LANE).ended.purged == 1


def test_purged_messages_go_out_as_holes_and_their_bytes_come_back(node: Node) -> None:
    receiver = Receiver()
    for number in range(4):
        node.send(b"%d" % number * 20_000)
    node.send(b"small", b"other")
    node.merge()
    chosen = frozenset(
        bytes.fromhex(one) for one in [*ids(node, "waiting")[1:3], ids(node, "waiting")[4]]
    )
    done = purge(node, Selection(what="waiting", ids=chosen))
    assert (done.messages, done.size) == (3, 40_005)
    assert state(node).lane(LANE).queued_bytes == 40_005
    lane = Path(node.layout.lane_segment(*LANE, 1))
    before = lane.stat().st_blocks
    assert node.store is not None
    node.store.tend()
    assert lane.stat().st_blocks < before
    assert check_spool(OsFs(), node.layout.root).ok
    node.kill()
    node.open()
    node.drain(receiver)
    assert receiver.bodies == [b"0" * 20_000, b"3" * 20_000, b"other"]
    assert {void.reason for _, void in receiver.voids} == {"purged"}
    ended = state(node).lane(LANE).ended
    assert (ended.delivered, ended.purged) == (3, 3)
    assert state(node).lane(LANE).queued_bytes == 0
    assert len(ids(node, "sent")) == 3


def test_a_purge_of_what_is_on_its_way_lets_the_receivers_word_decide(node: Node) -> None:
    receiver = Receiver()
    node.send(b"first" * 4000)
    node.send(b"second" * 4000)
    node.merge()
    assert node.store is not None
    out = node.store.next_push(LANE, 1)
    assert out is not None
    assert purge(node, WAITING).messages == 2
    node.store.tend()  # must not touch what is on its way
    answer = receiver.push(out)
    node.store.release(out)
    node.store.on_answer(out, answer)
    node.drain(receiver)
    assert receiver.bodies == [b"first" * 4000]
    ended = state(node).lane(LANE).ended
    assert (ended.delivered, ended.purged) == (1, 1)
    assert state(node).lane(LANE).queued_bytes == 0


def test_what_was_purged_stays_void_when_a_receiver_that_lost_all_is_sent_it_again(
    node: Node,
) -> None:
    receiver = Receiver()
    for number in range(3):
        node.send(b"%d" % number)
    node.merge()
    one = frozenset((bytes.fromhex(ids(node, "waiting")[1]),))
    purge(node, Selection(what="waiting", ids=one))
    node.drain(receiver)
    assert receiver.bodies == [b"0", b"2"]
    fresh = Receiver()
    node.send(b"3")
    node.merge()
    assert node.push(fresh).kind == "held"
    node.talk(fresh, mode="replay")
    node.drain(fresh)
    assert fresh.bodies == [b"0", b"2", b"3"]
    node.adds_up()
    ended = state(node).lane(LANE).ended
    assert (ended.delivered, ended.purged) == (3, 1)


def test_filters_choose_by_target_and_age(node: Node) -> None:
    other = Lane("paris", "sites", 5)
    node.send(b"old")
    node.send(b"elsewhere", lane=other)
    node.clock.moved_ns = 3_600_000_000_000
    node.send(b"new")
    old = Selection(what="waiting", peer="berlin", older_ms=1_800_000)
    assert purge(node, old).messages == 1
    assert len(ids(node, "waiting")) == 2
    assert purge(node, Selection(what="waiting", peer="paris", priority=4)).messages == 0


def test_letters_copied_out_are_appended_again_in_order(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    new_spool(root, "hamburg")
    node = Node(root)
    spool: Spool = node.spool()
    letters = DeadLetters(spool)
    view: list[bytes] = []
    node.open()
    node.send(b"one", b"two", b"three")
    node.send(b"four")
    node.merge()
    for hit in OutboxView(spool, state(node)).waiting(ALL):
        reasons = {index: "no such site" for index in hit.chosen if index != 1}
        letters._log.append("hamburg", hit.frame, reasons)
        view += [hit.chosen[index] for index in reasons]
    letters.sync()
    store = ReceiverStore(spool, Limits())
    letters = DeadLetters(spool)
    assert letters.counts == {"sites": 3}
    for fixed in again(spool, store, Selection(what="dead", peer="hamburg")):
        store.commit()
        if fixed.taken:
            letters.take(fixed.taken)
    assert fixed.messages == 3
    assert letters.counts == {"sites": 0}
    letters.tidy()
    path = spool.layout.inbox_dead
    assert list(read_letters(spool.fs, path, gone_letters(spool.fs, path))) == []
    store.close()
    with Inbox(spool=str(root)) as inbox:
        messages = inbox.receive("sites")
        assert [message.body for message in messages] == [b"one", b"three", b"four"]
        assert [message.id.replace("-", "") for message in messages] == [one.hex() for one in view]
        assert {message.sender for message in messages} == {"hamburg"}
        messages[0].reject("again")
        messages[1].ack()
        messages[2].nack()
    rung: list[str] = []
    fixer = InboxFixer(spool, letters, rung.append)
    assert end(fixer.requeue(DEAD)).messages == 1
    assert rung == ["sites"]
    assert end(fixer.purge(Selection(what="waiting", box="inbox"))).messages == 2
    ReceiverStore(spool, Limits()).close()
    assert check_spool(OsFs(), str(root)).ok
    node.kill()
