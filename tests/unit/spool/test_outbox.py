"""The outbox store: journals become lanes, lanes become pushes, answers end messages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.core import chain, entry, frame
from droprd.core.ask import MatchAnswer, MatchRequest, StoredVoid
from droprd.core.frame import new_frame_id
from droprd.core.push import LaneAnswer, Refusal
from droprd.model import GENESIS, Head, Lane
from droprd.spool import log
from droprd.spool.blobs import write_blob
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.journal import Journal
from droprd.spool.layout import Layout, make_spool
from droprd.spool.outbox import OutboxStore
from droprd.spool.outgoing import Outgoing
from droprd.spool.puts import Put
from droprd.spool.settling import Outcome

LANE = Lane("berlin", "sites", 5)
FS = OsFs()


class MovingClock(SystemClock):
    """The real clock, moved by hand besides."""

    moved_ns = 0

    def boot_ns(self) -> int:
        return super().boot_ns() + self.moved_ns

    def wall_ns(self) -> int:
        return super().wall_ns() + self.moved_ns


class Receiver:
    """A lane at a receiver, as simple as it can be: a list of frames, a head, voids."""

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, int]] = []
        self.bodies: list[bytes] = []
        self.voids: list[tuple[int, StoredVoid]] = []
        self.refuse: dict[bytes, str] = {}
        self.floor = 0
        self.pages = 0

    @property
    def heads(self) -> list[Head]:
        return [GENESIS, *chain.heads(GENESIS, self.frames)]

    @property
    def head(self) -> Head:
        return self.heads[-1]

    def push(self, out: Outgoing) -> LaneAnswer:
        if out.head != self.head:
            return LaneAnswer(self.head, "conflict")
        data = b"".join(
            os.pread(p[0], p[2], p[1]) if isinstance(p, tuple) else bytes(p) for p in out.pieces
        )
        at = 0
        refusals = []
        for number in range(len(out.frames)):
            head = entry.parse_entry(data, at, None, None)
            assert head is not None
            assert head.note_bytes == 0
            size = entry.ENTRY_BYTES + head.frame_bytes
            aside = out.asides.get(number)
            voids = {v.index: v.reason for v in aside.voids} if aside else {}
            parsed = frame.parse(data[at + entry.ENTRY_BYTES : at + size], voids)
            assert not parsed.bad_bodies()
            for i in range(parsed.count):
                body = bytes(parsed.body(i))
                reason = voids.get(i) or self.refuse.get(body)
                if reason:
                    void = StoredVoid(parsed.frame_id, i, reason)
                    self.voids.append((self.head.number, void))
                    if i not in voids:
                        refusals.append(Refusal(parsed.frame_id, i, reason))
                else:
                    self.bodies.append(body)
            self.frames.append((parsed.frame_id, parsed.count))
            at += size
        assert at == len(data)
        return LaneAnswer(self.head, "ok", refusals=tuple(refusals))

    def match(self, request: MatchRequest) -> MatchAnswer:
        self.pages += 1
        heads = [h for h in self.heads if h.number >= self.floor]
        common = next((h for h in request.heads if h in heads), None)
        since = request.after or common
        numbers = [h.number for h in self.heads]
        start = numbers.index((since or heads[0]).number)
        page = self.frames[start : start + 2]
        voids = tuple(v for number, v in self.voids if number >= request.voids_after)
        more = start + 2 < len(self.frames)
        return MatchAnswer(self.head, common, self.floor, tuple(page), more, voids)


class Node:
    """A spool with a producer and a sender's store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = MovingClock()
        self.layout = Layout(str(root))
        self.store: OutboxStore | None = None
        self.journal: Journal | None = None

    def spool(self) -> Spool:
        version = (self.root / "VERSION").read_text()
        spool_id = bytes.fromhex(version.split("id ")[1].strip())
        return Spool(FS, self.clock, os.urandom, self.layout, spool_id)

    def open(self, **options: float) -> OutboxStore:
        if self.store is not None:
            self.store.close()
        self.store = OutboxStore.open(
            self.spool(),
            idle_s=0,
            retain_s=options.get("retain_s", 1e9),
            segment_bytes_max=int(options.get("segment_bytes_max", 1 << 24)),
        )
        return self.store

    def kill(self) -> None:
        """End the sender and the producer as a SIGKILL does: nothing is committed any more."""
        if self.store is not None:
            self.store.close(commit=False)
            self.store = None
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def send(self, *bodies: bytes, lane: Lane = LANE, ttl_ms: int = 0) -> None:
        if self.journal is None:
            spool = self.spool()
            self.journal = Journal(
                FS, self.clock, os.urandom, self.layout, spool.spool_id, uid=os.getuid()
            )
        self.journal.put(Put(lane, bodies, ttl_ms=ttl_ms))

    def merge(self) -> None:
        assert self.store is not None
        self.store.merge_all()

    def push(self, receiver: Receiver, lane: Lane = LANE, *, answer_lost: bool = False) -> Outcome:
        """One push and, after a conflict, the conversation that follows."""
        store = self.store
        assert store is not None
        out = store.next_push(lane, 1)
        if out is None:
            return Outcome("nothing")
        answer = receiver.push(out)
        store.release(out)
        if answer_lost:
            return Outcome("nothing")
        outcome = store.on_answer(out, answer)
        return self.talk(receiver, lane) if outcome.kind == "conflict" else outcome

    def talk(self, receiver: Receiver, lane: Lane = LANE, mode: str = "") -> Outcome:
        store = self.store
        assert store is not None
        talk, request = store.begin_match(lane, mode)  # type: ignore[arg-type]  # a test's str
        while True:
            answer = store.on_match(talk, receiver.match(request))
            if isinstance(answer, Outcome):
                return answer
            request = answer

    def drain(self, receiver: Receiver, lane: Lane = LANE) -> None:
        for _ in range(10_000):
            outcome = self.push(receiver, lane)
            assert outcome.kind != "held", outcome.text
            if self.store is not None and self.store.lane(lane).is_idle:
                return
        raise AssertionError("the lane does not drain")

    def adds_up(self, lane: Lane = LANE) -> None:
        assert self.store is not None
        state = self.store.lane(lane)
        assert state.accepted == state.queued + state.ended.total


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    root = tmp_path / "spool"
    make_spool(FS, str(root), os.urandom)
    node = Node(root)
    node.open()
    yield node
    node.kill()


def test_what_was_sent_arrives_once_and_in_order(node: Node) -> None:
    receiver = Receiver()
    sent = []
    for number in range(100):
        node.send(b"%d" % number, b"%d and" % number)
        sent += [b"%d" % number, b"%d and" % number]
        if number % 7 == 0:
            node.merge()
            node.push(receiver)
    node.merge()
    node.drain(receiver)
    assert receiver.bodies == sent
    assert node.store is not None
    assert node.store.lane(LANE).ended.delivered == 200
    assert node.store.lane(LANE).queued_bytes == 0


def test_a_restart_goes_on_where_the_receipts_end(node: Node) -> None:
    receiver = Receiver()
    for number in range(20):
        node.send(b"%d" % number)
    node.merge()
    for _ in range(5):
        node.push(receiver)
    node.kill()  # receipts that were not committed are found again by asking
    node.open()
    node.merge()
    node.drain(receiver)
    assert receiver.bodies == [b"%d" % n for n in range(20)]
    node.adds_up()


def test_a_lost_answer_is_found_and_nothing_is_sent_twice(node: Node) -> None:
    receiver = Receiver()
    for number in range(4):
        node.send(b"%d" % number)
    node.merge()
    node.push(receiver, answer_lost=True)
    assert node.push(receiver).kind == "found"
    node.drain(receiver)
    assert receiver.bodies == [b"0", b"1", b"2", b"3"]


def test_lanes_lost_by_a_power_cut_are_mended_from_journals(node: Node) -> None:
    receiver = Receiver()
    for number in range(50):
        node.send(b"%d" % number * 100)
    node.merge()
    node.kill()
    lane = Path(node.layout.lane_segment(*LANE, 1))
    os.truncate(lane, 4096 + 700)
    assert node.open().put_back > 0
    node.merge()
    node.drain(receiver)
    assert receiver.bodies == [b"%d" % n * 100 for n in range(50)]


def test_a_merge_that_was_not_committed_never_happened(node: Node) -> None:
    receiver = Receiver()
    node.send(b"one")
    node.merge()
    before = (node.root / "outbox/sender.log").read_bytes()
    node.send(b"two")
    node.merge()
    node.kill()
    (node.root / "outbox/sender.log").write_bytes(before)
    node.open()
    node.merge()
    node.drain(receiver)
    assert receiver.bodies == [b"one", b"two"]


def test_journals_are_deleted_once_they_are_merged_and_their_producer_is_gone(node: Node) -> None:
    node.send(b"one")
    node.merge()
    assert node.store is not None
    node.store.tend()
    assert os.listdir(node.layout.journals)
    assert node.journal is not None
    node.journal.close()
    node.journal = None
    node.merge()
    node.store.tend()
    assert not os.listdir(node.layout.journals)
    node.kill()
    receiver = Receiver()
    node.open()
    node.drain(receiver)
    assert receiver.bodies == [b"one"]


def test_an_expired_message_goes_out_as_a_hole_and_is_counted(node: Node) -> None:
    receiver = Receiver()
    node.send(b"short-lived", ttl_ms=1000)
    node.send(b"lasting")
    node.merge()
    node.clock.moved_ns += 2_000_000_000
    node.drain(receiver)
    assert receiver.bodies == [b"lasting"]
    assert len(receiver.frames) == 2
    assert node.store is not None
    assert node.store.lane(LANE).ended == (1, 1, 0, 0)


def test_what_the_receiver_stored_decides_whether_a_message_expired(node: Node) -> None:
    receiver = Receiver()
    node.send(b"in time", ttl_ms=1000)
    node.merge()
    node.push(receiver, answer_lost=True)
    node.clock.moved_ns += 2_000_000_000
    node.drain(receiver)
    assert node.store is not None
    assert node.store.lane(LANE).ended.delivered == 1
    assert node.store.lane(LANE).voids == {}


def test_a_message_refused_for_good_becomes_a_dead_letter_and_the_lane_goes_on(node: Node) -> None:
    receiver = Receiver()
    receiver.refuse = {b"bad": "too large"}
    node.send(b"good", b"bad", b"fine")
    node.send(b"last")
    node.merge()
    node.drain(receiver)
    assert receiver.bodies == [b"good", b"fine", b"last"]
    assert node.store is not None
    assert node.store.lane(LANE).ended == (3, 0, 0, 1)
    fd = FS.open(node.layout.outbox_dead, os.O_RDONLY)
    header = log.read_header(FS, fd)
    (letter,) = log.Walk(FS, fd, header.log_id, promised=0)
    assert isinstance(letter, log.Entry)
    note = entry.unpack_note(letter.note)
    assert note["i"] == [[1, "too large"]]
    kept = frame.parse(letter.frame, [v[0] for v in note["v"]])
    assert bytes(kept.body(1)) == b"bad"
    FS.close(fd)


def test_a_restored_outbox_sends_nothing_twice_and_loses_nothing(
    node: Node, tmp_path: Path
) -> None:
    receiver = Receiver()
    for number in range(6):
        node.send(b"%d" % number)
    node.merge()
    node.push(receiver)
    node.kill()
    shutil.copytree(node.root, tmp_path / "copy", ignore=shutil.ignore_patterns("bell"))
    node.open()
    node.send(b"only the original has this")
    node.merge()
    node.drain(receiver)
    node.kill()
    copy = Node(tmp_path / "copy")
    copy.open()
    copy.send(b"after the restore")
    copy.merge()
    assert copy.push(receiver).kind == "rebased"
    copy.drain(receiver)
    assert sorted(receiver.bodies) == sorted(set(receiver.bodies))
    assert receiver.bodies[-1] == b"after the restore"
    assert len(receiver.bodies) == 8
    copy.adds_up()
    copy.kill()


def test_two_copies_of_a_spool_take_turns_and_each_keeps_its_order(
    node: Node, tmp_path: Path
) -> None:
    receiver = Receiver()
    node.send(b"common")
    node.merge()
    node.kill()
    shutil.copytree(node.root, tmp_path / "twin", ignore=shutil.ignore_patterns("bell"))
    node.open()
    twin = Node(tmp_path / "twin")
    twin.open()
    for number in range(5):
        for each, name in ((node, b"a"), (twin, b"b")):
            each.send(name + b"%d" % number)
            each.merge()
            each.drain(receiver)
    twin.kill()
    assert receiver.bodies.count(b"common") == 1
    for name in (b"a", b"b"):
        assert [b for b in receiver.bodies if b[:1] == name] == [name + b"%d" % n for n in range(5)]


def test_what_the_receiver_no_longer_remembers_is_in_doubt(node: Node, tmp_path: Path) -> None:
    receiver = Receiver()
    node.send(b"0")
    node.merge()
    node.drain(receiver)
    node.send(b"waiting")
    node.merge()
    node.kill()
    shutil.copytree(node.root, tmp_path / "copy", ignore=shutil.ignore_patterns("bell"))
    node.open()
    node.drain(receiver)
    for number in range(8):
        node.send(b"more %d" % number)
    node.merge()
    node.drain(receiver)
    receiver.floor = 2
    copy = Node(tmp_path / "copy")
    copy.open()
    outcome = copy.push(receiver)
    assert outcome.kind == "rebased"
    assert "in doubt" in outcome.text
    assert receiver.pages > 2  # it asked for all that is remembered
    assert copy.store is not None
    assert copy.store.lane(LANE).ended.dead == 1
    copy.send(b"new")
    copy.merge()
    copy.drain(receiver)
    assert receiver.bodies.count(b"waiting") == 1
    assert receiver.bodies[-1] == b"new"
    copy.kill()


def test_a_receiver_that_lost_its_spool_holds_the_lane_until_an_operator_decides(
    node: Node,
) -> None:
    receiver = Receiver()
    for number in range(3):
        node.send(b"%d" % number)
    node.merge()
    node.drain(receiver)
    node.send(b"next")
    node.merge()
    fresh = Receiver()
    assert node.push(fresh).kind == "held"
    assert node.store is not None
    assert node.store.next_push(LANE) is None
    assert node.store.held_by_reset("berlin") == [LANE]
    node.kill()
    node.open()
    assert node.store.held_by_reset("berlin") == [LANE]
    assert node.talk(fresh, mode="continue").kind == "rebased"
    node.drain(fresh)
    assert fresh.bodies == [b"next"]


def test_a_replay_sends_again_what_the_receiver_lost(node: Node) -> None:
    receiver = Receiver()
    for number in range(3):
        node.send(b"%d" % number)
    node.merge()
    node.drain(receiver)
    node.send(b"next")
    node.merge()
    fresh = Receiver()
    assert node.push(fresh).kind == "held"
    assert "3 messages are sent again" in node.talk(fresh, mode="replay").text
    node.drain(fresh)
    assert fresh.bodies == [b"0", b"1", b"2", b"next"]
    node.adds_up()


def test_a_replay_says_what_it_cannot_send_again(node: Node) -> None:
    receiver = Receiver()
    store = node.open(retain_s=0, segment_bytes_max=5000)
    for number in range(3):
        node.send(b"%d" % number * 1000)
        node.merge()
        node.drain(receiver)
    store.tend()
    node.send(b"next")
    node.merge()
    fresh = Receiver()
    node.push(fresh)
    text = node.talk(fresh, mode="replay").text
    assert "messages 1 to 3 cannot be sent again" in text
    node.drain(fresh)
    assert fresh.bodies == [b"next"]


def test_a_corrupt_body_in_a_journal_goes_out_as_a_hole(node: Node) -> None:
    receiver = Receiver()
    node.send(b"good", b"BAD BODY", b"fine")
    node.send(b"after")
    (name,) = os.listdir(node.layout.journals)
    path = Path(node.layout.journal(name))
    data = bytearray(path.read_bytes())
    data[data.index(b"BAD BODY")] ^= 1
    path.write_bytes(data)
    node.merge()
    node.drain(receiver)
    assert receiver.bodies == [b"good", b"fine", b"after"]
    assert node.store is not None
    assert node.store.lane(LANE).ended == (3, 0, 0, 1)


def test_a_frame_lost_in_a_lane_is_counted_and_the_rest_goes_on(node: Node) -> None:
    receiver = Receiver()
    for number in range(3):
        node.send(b"body %d" % number)
    node.merge()
    path = Path(node.layout.lane_segment(*LANE, 1))
    data = bytearray(path.read_bytes())
    at = data.index(b"body 1")
    start = data.rindex(entry.ENTRY_MAGIC, 0, at)
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    node.drain(receiver)
    assert receiver.bodies == [b"body 0", b"body 2"]
    assert node.store is not None
    assert node.store.lane(LANE).ended == (2, 0, 0, 1)
    assert os.listdir(node.layout.corrupt)


def test_a_blob_that_vanished_goes_out_as_a_hole_and_the_lane_goes_on(node: Node) -> None:
    receiver = Receiver()
    node.send(b"before")
    assert node.journal is not None
    name = node.journal.pin()
    blob = write_blob(FS, node.layout, name, new_frame_id(1, os.urandom(10)), b"x" * 40_000)
    node.journal.put(Put(LANE, [blob]))
    node.journal.unpin(name)
    node.send(b"after")
    node.merge()
    os.unlink(node.layout.outbox_blob(blob.frame_id))
    node.drain(receiver)
    assert receiver.bodies == [b"before", b"after"]
    assert node.store is not None
    assert node.store.lane(LANE).ended == (2, 0, 0, 1)


def test_what_is_no_journal_does_not_stop_the_others(node: Node) -> None:
    receiver = Receiver()
    names = [f"{n:032x}-1.log" for n in range(5)]
    os.mkfifo(node.layout.journal(names[0]))
    os.symlink("/etc/passwd", node.layout.journal(names[1]))
    os.mkdir(node.layout.journal(names[2]))
    Path(node.layout.journal(names[3])).write_bytes(b"no log")
    Path(node.layout.journal(names[4])).touch()
    node.send(b"good")
    node.merge()
    node.drain(receiver)
    assert receiver.bodies == [b"good"]


def test_a_checkpoint_says_the_same_as_the_notes_it_replaces(node: Node) -> None:
    receiver = Receiver()
    for number in range(20):
        node.send(b"%d" % number, lane=Lane("berlin", f"c{number % 3}", 5))
    node.merge()
    store = node.store
    assert store is not None
    node.push(receiver, Lane("berlin", "c0", 5))
    before = store.state.dump()
    store._merger.sync_lanes()
    store._log.checkpoint()
    node.kill()
    after = node.open().state.dump()
    assert after == before


def test_delivered_segments_are_deleted_after_their_retention(node: Node) -> None:
    receiver = Receiver()
    store = node.open(retain_s=100, segment_bytes_max=5000)
    for number in range(10):
        node.send(b"%d" % number * 2000)
        node.merge()
        node.drain(receiver)
    store.tend()
    directory = os.path.dirname(node.layout.lane_segment(*LANE, 1))
    assert len(os.listdir(directory)) == 10
    node.clock.moved_ns += 101 * 10**9
    store.tend()
    assert len(os.listdir(directory)) == 0
    node.kill()
    node.open()
    node.send(b"and on")
    node.merge()
    node.drain(receiver)
    assert receiver.bodies[-1] == b"and on"
