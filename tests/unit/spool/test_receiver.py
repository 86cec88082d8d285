"""The receiver's store: what it takes, what it answers, and what it knows after any end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from droprd.core import chain, entry, frame
from droprd.core.ask import MatchRequest
from droprd.core.frame import Frame, Stamp
from droprd.core.push import Aside, LaneAnswer, LanePush, Push, decode_push, encode_push
from droprd.errors import BadData
from droprd.model import GENESIS, Head, Lane, LaneKey, Void
from droprd.spool import log
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.judging import NOT_PERMITTED, TOO_LARGE, Limits, PeerLimits
from droprd.spool.layout import Layout, make_spool
from droprd.spool.receiver import ReceiverStore

PEER = "hamburg"
SENDER = b"S" * 16


@dataclass
class OneFrame:
    frame_id: bytes
    data: bytes
    count: int
    aside: Aside = field(default_factory=Aside)


def make(
    bodies: Sequence[bytes],
    channel: str = "sites",
    priority: int = 5,
    voids: Sequence[Void] = (),
    elapsed_ms: int | None = None,
    shared: bytes = b"",
) -> OneFrame:
    frame_id = frame.new_frame_id(1, os.urandom(10))
    pieces = frame.build(
        frame_id=frame_id,
        lane=Lane("berlin", channel, priority),
        stamp=Stamp(b"B" * 16, 1, 2),
        bodies=bodies,
        shared=shared,
    )
    data = b"".join(pieces)
    if voids:
        holes = {void.index for void in voids}
        data = b"".join(frame.parse(data).without(holes))
    return OneFrame(frame_id, data, len(bodies), Aside(elapsed_ms, tuple(voids)))


def make_blob(body: bytes, channel: str = "sites") -> OneFrame:
    frame_id = frame.new_frame_id(1, os.urandom(10))
    pieces = frame.build_blob(
        frame_id=frame_id,
        lane=Lane("berlin", channel, 5),
        stamp=Stamp(b"B" * 16, 1, 2),
        blob_bytes=len(body),
        blob_crc=crc32(body),
        shared=frame.pack_map({"d": hashlib.sha256(body).digest()}),
    )
    return OneFrame(frame_id, b"".join(pieces), 1)


def raw(one: OneFrame) -> bytes:
    return entry.pack_entry(b"L" * 16, 9999, 5000, b"", len(one.data)) + one.data


Part = tuple[str, int, Head, Sequence[OneFrame]]


def body_of(*parts: Part, spool_id: bytes = SENDER) -> bytes:
    lanes = []
    tail = []
    for channel, priority, head, sent in parts:
        data = b"".join(map(raw, sent))
        asides = {i: one.aside for i, one in enumerate(sent)}
        lanes.append(LanePush(channel, priority, head, len(sent), len(data), asides))
        tail.append(data)
    return encode_push(Push(spool_id, tuple(lanes))) + b"".join(tail)


def after(head: Head, sent: Sequence[OneFrame]) -> Head:
    return chain.advance(head, [(one.frame_id, one.count) for one in sent])


@dataclass
class Node:
    """A receiving node in a directory."""

    root: str
    fs: OsFs = field(default_factory=OsFs)
    limits: Limits = field(default_factory=Limits)
    urandom: Callable[[int], bytes] = os.urandom

    def __post_init__(self) -> None:
        self.layout = Layout(self.root)
        if not os.path.exists(self.layout.version):
            make_spool(OsFs(), self.root, os.urandom)
        self.store = self.open()

    def open(self) -> ReceiverStore:
        self.store = ReceiverStore(
            self.fs, SystemClock(), self.urandom, self.layout, b"R" * 16, self.limits
        )
        return self.store

    def push(self, *parts: Part, peer: str = PEER, spool_id: bytes = SENDER) -> list[LaneAnswer]:
        push, views = decode_push(body_of(*parts, spool_id=spool_id))
        pending = self.store.push(peer, push, views)
        self.store.commit()
        return list(self.store.answer(pending))

    def send(self, head: Head, *sent: OneFrame, **kwargs: Any) -> LaneAnswer:
        (answer,) = self.push(("sites", 5, head, sent), **kwargs)
        return answer

    def entries(self, channel: str = "sites", priority: int = 5) -> list[tuple[Any, Frame]]:
        """All that a consumer may read, in order."""
        found = []
        directory = self.layout.stream(channel, priority)
        for name in sorted(n for n in os.listdir(directory) if n.endswith(".log")):
            fd = os.open(f"{directory}/{name}", os.O_RDONLY)
            header = log.read_header(OsFs(), fd)
            end = log.read_published(OsFs(), fd)
            for item in log.Walk(OsFs(), fd, header.log_id, promised=end, stop=end):
                assert isinstance(item, log.Entry)
                note = entry.unpack_note(item.note)
                voids = [v[0] for v in note.get("v", ())]
                found.append((note, frame.parse(item.frame, voids)))
            os.close(fd)
        return found

    def ids(self) -> list[bytes]:
        return [one.frame_id for _, one in self.entries()]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(str(tmp_path / "spool"))


def key(channel: str = "sites", spool_id: bytes = SENDER, peer: str = PEER) -> LaneKey:
    return LaneKey(peer, spool_id, channel, 5)


# -- heads ---------------------------------------------------------------------------------------


def test_frames_that_follow_the_head_are_stored_as_they_came(node: Node) -> None:
    sent = [make([b"one", b"two"]), make([b"three"])]
    answer = node.send(GENESIS, *sent)
    assert (answer.verdict, answer.head) == ("ok", after(GENESIS, sent))
    (first, one), (second, other) = node.entries()
    assert [bytes(one.body(0)), bytes(one.body(1)), bytes(other.body(0))] == [
        b"one",
        b"two",
        b"three",
    ]
    assert (first["p"], first["s"], first["n"], first["q"]) == (PEER, SENDER, 0, 0)
    assert (second["n"], second["q"], second["h"]) == (2, 2, answer.head.chain)


def test_another_head_is_a_conflict_that_changes_nothing(node: Node) -> None:
    sent = [make([b"one"])]
    head = node.send(GENESIS, *sent).head
    for wrong in (GENESIS, Head(1, b"x" * 16), Head(2, head.chain)):
        answer = node.send(wrong, make([b"two"]))
        assert (answer.verdict, answer.head) == ("conflict", head)
    assert len(node.entries()) == 1


def test_a_repeated_push_enters_once(node: Node) -> None:
    sent = [make([b"one"])]
    head = node.send(GENESIS, *sent).head
    assert node.send(GENESIS, *sent).verdict == "conflict"
    assert node.ids() == [sent[0].frame_id]
    assert node.store.head(key()) == head


def test_one_lanes_conflict_does_not_undo_another_lanes_frames(node: Node) -> None:
    good, bad = make([b"good"], "good"), make([b"bad"], "bad")
    answers = node.push(
        ("bad", 5, Head(7, b"x" * 16), [bad]),
        ("good", 5, GENESIS, [good]),
        ("good", 3, GENESIS, [make([b"urgent"], "good", 3)]),
    )
    assert [answer.verdict for answer in answers] == ["conflict", "ok", "ok"]
    assert [one.frame_id for _, one in node.entries("good")] == [good.frame_id]
    assert not os.path.exists(node.layout.channel("bad"))


def test_lanes_of_another_spool_or_peer_begin_anew(node: Node) -> None:
    node.send(GENESIS, make([b"one"]))
    assert node.send(GENESIS, make([b"two"]), spool_id=b"T" * 16).verdict == "ok"
    assert node.send(GENESIS, make([b"three"]), peer="bremen").verdict == "ok"
    assert [note["q"] for note, _ in node.entries()] == [0, 1, 2]


def test_a_push_without_frames_only_asks(node: Node) -> None:
    assert node.send(GENESIS).head == GENESIS
    head = node.send(GENESIS, make([b"one"])).head
    assert node.send(head).verdict == "ok"
    assert node.send(GENESIS).head == head
    assert node.store.lanes == 1


def test_a_conflict_with_frames_that_are_not_synced_waits_for_them(node: Node) -> None:
    sent = [make([b"one"])]
    push, views = decode_push(body_of(("sites", 5, GENESIS, sent)))
    first = node.store.push(PEER, push, views)
    second = node.store.push(PEER, push, views)
    assert first.waits
    assert second.waits
    assert node.store.head(key()) == GENESIS
    node.store.commit()
    assert node.store.answer(second)[0].head == after(GENESIS, sent)
    assert node.store.answer(second)[0].verdict == "conflict"


def test_nothing_is_published_before_the_commit(node: Node) -> None:
    node.send(GENESIS, make([b"one"]))
    push, views = decode_push(body_of(("sites", 5, node.store.head(key()), [make([b"two"])])))
    node.store.push(PEER, push, views)
    assert len(node.entries()) == 1
    assert node.store.commit() == {"sites"}
    assert len(node.entries()) == 2


# -- what cannot be read ---------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 5, 30, 49, 60, 120, 160, -1])
def test_a_flipped_byte_refuses_the_whole_push(node: Node, at: int) -> None:
    good, bad = make([b"good"], "good"), make([b"bad body"])
    body = bytearray(body_of(("good", 5, GENESIS, [good]), ("sites", 5, GENESIS, [bad])))
    start = len(body) - len(raw(bad))
    body[start + at if at >= 0 else at] ^= 1
    push, views = decode_push(bytes(body))
    with pytest.raises(BadData):
        node.store.push(PEER, push, views)
    assert node.store.commit() == frozenset()
    assert node.store.lanes == 0


def test_a_frame_of_another_channel_or_priority_is_refused(node: Node) -> None:
    for one in (make([b"x"], "other"), make([b"x"], "sites", 4)):
        with pytest.raises(BadData):
            node.send(GENESIS, one)


def test_maps_that_consumers_could_not_read_are_refused(node: Node) -> None:
    for shared in ({"h": [1]}, {"h": {"k": 1}}, {"t": 5}, {"i": "no id"}):
        with pytest.raises(BadData):
            node.send(GENESIS, make([b"x"], shared=frame.pack_map(shared)))
    with pytest.raises(BadData):
        node.send(GENESIS, make([b"x"], shared=b"\xc1"))


def test_a_void_beyond_the_frame_is_refused(node: Node) -> None:
    one = make([b"x"])
    one.aside = Aside(None, (Void(3, "expired"),))
    with pytest.raises(BadData):
        node.send(GENESIS, one)


# -- voids and refusals ----------------------------------------------------------------------------


def test_voids_and_elapsed_time_are_kept_beside_the_frame(node: Node) -> None:
    one = make([b"a", b"bb", b"c"], voids=[Void(1, "expired")], elapsed_ms=1500)
    assert node.send(GENESIS, one).head == after(GENESIS, [one])
    ((note, stored),) = node.entries()
    assert (note["v"], note["e"]) == ([[1, "expired"]], 1500)
    assert [bytes(stored.body(i)) for i in range(3)] == [b"a", b"", b"c"]


def test_bodies_that_are_too_large_become_voids_and_the_lane_goes_on(tmp_path: Path) -> None:
    limits = Limits(peers={PEER: PeerLimits(max_message_bytes=4)})
    node = Node(str(tmp_path / "spool"), limits=limits)
    mixed = make([b"ok", b"too large", b"purged", b"fine"], voids=[Void(2, "purged")])
    answer = node.send(GENESIS, mixed, make([b"large too"]), make([b"ok"]))
    assert [(r.index, r.reason) for r in answer.refusals] == [(1, TOO_LARGE), (None, TOO_LARGE)]
    (note, stored), (second, _), (third, _) = node.entries()
    assert note["v"] == [[1, TOO_LARGE], [2, "purged"]]
    assert [bytes(stored.body(i)) for i in range(4)] == [b"ok", b"", b"", b"fine"]
    assert second["v"] == [[0, TOO_LARGE]]
    assert (third["q"], "v" in third) == (5, False)


def test_a_frame_full_of_refusals_still_fits_into_an_answer(tmp_path: Path) -> None:
    from droprd.core.push import encode_push_answer

    limits = Limits(peers={PEER: PeerLimits(max_message_bytes=4)})
    node = Node(str(tmp_path / "spool"), limits=limits)
    sent = [make([b"ok"] + [b"large"] * 1023) for _ in range(3)]
    head = GENESIS
    for one in sent:
        answer = node.send(head, *sent[sent.index(one) :])
        assert answer.head == after(head, [one])
        assert len(answer.refusals) == 1023
        encode_push_answer([answer, *[LaneAnswer(head, "conflict")] * 255])
        head = answer.head


@pytest.mark.parametrize("channel", ["secret", "droprd.reports"])
def test_a_channel_that_is_not_permitted_leaves_no_directory(tmp_path: Path, channel: str) -> None:
    limits = Limits(peers={PEER: PeerLimits(channels=frozenset({"sites"}))})
    node = Node(str(tmp_path / "spool"), limits=limits)
    sent = [make([b"a", b"b"], channel), make([b"c"], channel)]
    (answer,) = node.push((channel, 5, GENESIS, sent))
    assert (answer.verdict, answer.head) == ("ok", after(GENESIS, sent))
    (refusal,) = answer.refusals
    assert (refusal.frame_id, refusal.index, refusal.reason) == (None, None, NOT_PERMITTED)
    assert os.listdir(node.layout.channels) == []
    node.open()
    assert node.store.head(key(channel)) == answer.head
    told = node.store.match(PEER, MatchRequest(SENDER, channel, 5, (GENESIS,)))
    assert [v.frame_id for v in told.voids] == [one.frame_id for one in sent]
    assert len(told.frames) == 2


def test_a_peer_cannot_open_lanes_without_end(tmp_path: Path) -> None:
    limits = Limits(peers={PEER: PeerLimits(lanes_max=3, channels=frozenset({"a", "b"}))})
    node = Node(str(tmp_path / "spool"), limits=limits)
    channels = ["a", "b", "c", "d", "e"]
    answers = node.push(*[(c, 5, GENESIS, [make([b"x"], c)]) for c in channels])
    assert [answer.verdict for answer in answers] == ["ok", "ok", "ok", "refused", "refused"]
    assert answers[3].retry_after_s
    (again,) = node.push(("d", 5, GENESIS, [make([b"x"], "d")]))
    assert again.verdict == "refused"
    (known,) = node.push(("a", 5, answers[0].head, [make([b"x"], "a")]))
    assert known.verdict == "ok"
    assert node.push(("d", 5, GENESIS, [make([b"x"], "d")]), peer="bremen")[0].verdict == "ok"
