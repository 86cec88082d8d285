"""The receiver's store: what it takes, what it answers, and what it knows after any end."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from droprd.core import chain, entry, frame
from droprd.core.ask import MatchRequest
from droprd.core.entry import FILE_HEADER_BYTES, Kind
from droprd.core.frame import Buffer, Frame, Stamp
from droprd.core.push import (
    Aside,
    LaneAnswer,
    LanePush,
    Push,
    decode_push,
    encode_push,
    encode_push_answer,
)
from droprd.errors import BadData
from droprd.model import GENESIS, Head, Lane, LaneKey, Void
from droprd.spool import log
from droprd.spool.arrivals import PieceRefused
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.judging import NOT_PERMITTED, TOO_LARGE, Limits, PeerLimits
from droprd.spool.layout import Layout, make_spool
from droprd.spool.receiver import ReceiverStore
from droprd.spool.seals import SealReader

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

    def __post_init__(self) -> None:
        self.layout = Layout(self.root)
        if not os.path.exists(self.layout.version):
            make_spool(OsFs(), self.root, os.urandom)
        self.store = self.open()

    def open(self) -> ReceiverStore:
        spool = Spool(self.fs, SystemClock(), os.urandom, self.layout, b"R" * 16)
        self.store = ReceiverStore(spool, self.limits)
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


# -- starts ----------------------------------------------------------------------------------------


def restart(node: Node, *, clean: bool) -> None:
    """A new store on the same spool, after a clean end or a kill."""
    if clean:
        node.store.close()
    node.open()
    assert node.store.report.damage == []


@pytest.mark.parametrize("clean", [True, False])
def test_heads_and_seqs_go_on_after_a_start(node: Node, clean: bool) -> None:
    head = GENESIS
    for _ in range(4):
        head = node.send(head, make([b"a", b"b"]), make([b"c"])).head
        restart(node, clean=clean)
        assert node.store.head(key()) == head
    assert [note["q"] for note, _ in node.entries()] == [0, 2, 3, 5, 6, 8, 9, 11]


@pytest.mark.parametrize("clean", [True, False])
def test_a_full_segment_is_sealed_before_the_next_begins(tmp_path: Path, clean: bool) -> None:
    node = Node(str(tmp_path / "spool"), limits=Limits(segment_bytes_max=FILE_HEADER_BYTES + 900))
    head = GENESIS
    sent = []
    seals = SealReader(OsFs(), node.layout)
    for _ in range(20):
        sent.append(make([b"x" * 100]))
        head = node.send(head, sent[-1]).head
        if len(sent) % 7 == 0:
            restart(node, clean=clean)
    directory = node.layout.stream("sites", 5)
    segments = sorted(n for n in os.listdir(directory) if n.endswith(".log"))
    assert len(segments) > 5
    assert seals.read() == {("sites", 5): len(segments) - 1}
    assert node.ids() == [one.frame_id for one in sent]
    assert [note["q"] for note, _ in node.entries()] == list(range(20))
    bases = []
    for name in segments:
        fd = os.open(f"{directory}/{name}", os.O_RDONLY)
        bases.append(log.read_header(OsFs(), fd).base)
        os.close(fd)
    assert bases == sorted(set(bases))
    assert bases[0] == 0


def segments_of(node: Node) -> list[str]:
    return sorted(n for n in os.listdir(node.layout.stream("sites", 5)) if n.endswith(".log"))


@pytest.mark.parametrize("clean", [True, False])
def test_what_is_to_make_room_is_sealed_and_has_a_successor_and_the_lane_goes_on(
    node: Node, clean: bool
) -> None:
    seals = SealReader(OsFs(), node.layout)
    sent = [make([b"one", b"two"])]
    head = node.send(GENESIS, *sent).head
    node.store.make_room(1 << 20)
    assert segments_of(node) == ["00000001.log"]  # too small
    node.store.make_room(1)
    node.store.make_room(1)  # what is empty is not turned over
    assert segments_of(node) == ["00000001.log", "00000002.log"]
    assert seals.read() == {("sites", 5): 1}
    restart(node, clean=clean)
    node.store.make_room(1)
    os.unlink(node.layout.inbox_segment("sites", 5, 1))
    sent.append(make([b"three"]))
    assert node.send(head, sent[-1]).verdict == "ok"
    restart(node, clean=clean)
    assert segments_of(node) == ["00000002.log"]
    assert [(note["q"], one.frame_id) for note, one in node.entries()] == [(2, sent[1].frame_id)]
    assert node.store.head(key()) == after(GENESIS, sent)


def test_blobs_count_towards_the_size_of_their_segment(tmp_path: Path) -> None:
    node = Node(str(tmp_path / "spool"), limits=Limits(segment_bytes_max=100_000))
    head = GENESIS
    for number in range(3):
        body = bytes([number]) * 60_000
        blob = make_blob(body)
        put(node, blob, body, 0, len(body))
        head = node.send(head, blob).head
    assert segments_of(node) == ["00000001.log", "00000002.log"]
    restart(node, clean=False)
    node.store.make_room(60_000)
    assert len(segments_of(node)) == 3


def test_heads_outlive_the_segments(tmp_path: Path) -> None:
    node = Node(str(tmp_path / "spool"), limits=Limits(segment_bytes_max=FILE_HEADER_BYTES + 900))
    head = GENESIS
    sent = [make([b"x" * 100]) for _ in range(12)]
    for one in sent:
        head = node.send(head, one).head
    directory = node.layout.stream("sites", 5)
    for number in range(1, SealReader(OsFs(), node.layout).read()["sites", 5] + 1):
        os.unlink(node.layout.inbox_segment("sites", 5, number))
    restart(node, clean=False)
    assert node.store.head(key()) == head
    told = node.store.match(PEER, MatchRequest(SENDER, "sites", 5, (GENESIS,)))
    assert [f for f, _ in told.frames] == [one.frame_id for one in sent]
    assert node.send(head, make([b"more"])).verdict == "ok"
    assert len(os.listdir(directory)) <= 4


def test_a_tail_that_was_never_promised_is_cut(node: Node) -> None:
    head = node.send(GENESIS, make([b"one"])).head
    path = node.layout.inbox_segment("sites", 5, 1)
    fd = os.open(path, os.O_RDWR)
    end = log.read_published(OsFs(), fd)
    os.pwrite(fd, b"garbage" * 20, end)
    os.close(fd)
    restart(node, clean=False)
    assert node.store.head(key()) == head
    assert len(os.listdir(node.layout.corrupt)) == 1
    assert node.send(head, make([b"two"])).verdict == "ok"
    assert [bytes(one.body(0)) for _, one in node.entries()] == [b"one", b"two"]


def flip(path: str, at: int) -> None:
    fd = os.open(path, os.O_RDWR)
    byte = os.pread(fd, 1, at)[0]
    os.pwrite(fd, bytes([byte ^ 0x40]), at)
    os.close(fd)


def test_damage_in_the_middle_is_reported_and_the_head_goes_on(node: Node) -> None:
    sent = [make([b"a", b"b"]), make([b"c" * 50] * 3), make([b"d"])]
    head = GENESIS
    for one in sent:
        head = node.send(head, one).head
    path = node.layout.inbox_segment("sites", 5, 1)
    data = Path(path).read_bytes()
    flip(path, data.index(sent[1].frame_id) - 60)
    node.open()
    assert len(node.store.report.damage) == 1
    assert node.store.report.lost_messages == 3
    assert node.store.head(key()) == head
    assert len(os.listdir(node.layout.corrupt)) == 1
    told = node.store.match(PEER, MatchRequest(SENDER, "sites", 5, (head,)))
    assert (told.common, told.frames) == (head, ())
    more = make([b"e"])
    head = node.send(head, more).head
    told = node.store.match(PEER, MatchRequest(SENDER, "sites", 5, (GENESIS,)))
    assert (told.common, told.floor, told.frames) == (None, 6, ((more.frame_id, 1),))
    restart(node, clean=True)
    assert node.store.match(PEER, MatchRequest(SENDER, "sites", 5, (GENESIS,))) == told


def test_seqs_of_lost_newest_entries_are_not_given_out_again(node: Node) -> None:
    head = node.send(GENESIS, make([b"one"])).head
    last = make([b"two"] * 5)
    node.send(head, last)
    node.store.close()  # lanes.log covers both, so only the first start below looks at them
    os.unlink(node.layout.inbox_lanes_log)
    path = node.layout.inbox_segment("sites", 5, 1)
    flip(path, Path(path).read_bytes().index(last.frame_id) - 60)
    node.open()
    assert node.store.report.damage
    assert node.store.head(key()) == head
    node.send(head, make([b"three"]))
    assert len(os.listdir(node.layout.stream("sites", 5))) == 3
    fd = os.open(node.layout.inbox_segment("sites", 5, 2), os.O_RDONLY)
    assert log.read_header(OsFs(), fd).base > 6
    os.close(fd)


def test_a_damaged_segment_header_is_made_anew(node: Node) -> None:
    sent = [make([b"a"]), make([b"b"])]
    head = node.send(GENESIS, *sent).head
    flip(node.layout.inbox_segment("sites", 5, 1), 20)
    node.open()
    assert len(node.store.report.damage) == 1
    assert node.store.head(key()) == head
    assert node.ids() == [one.frame_id for one in sent]


def test_a_lost_or_unreadable_lanes_log_is_found_again_in_the_segments(tmp_path: Path) -> None:
    node = Node(str(tmp_path / "spool"), limits=Limits(segment_bytes_max=FILE_HEADER_BYTES + 900))
    head = GENESIS
    sent = [make([b"x" * 100]) for _ in range(9)]
    for one in sent:
        head = node.send(head, one).head
    flip(node.layout.inbox_lanes_log, 20)
    node.open()
    assert node.store.report.damage
    assert node.store.head(key()) == head
    os.unlink(node.layout.inbox_lanes_log)
    node.open()
    assert node.store.head(key()) == head
    told = node.store.match(PEER, MatchRequest(SENDER, "sites", 5, (GENESIS,)))
    assert [f for f, _ in told.frames] == [one.frame_id for one in sent]
    assert node.send(head, make([b"more"])).verdict == "ok"


def test_claims_come_with_the_directory(node: Node) -> None:
    node.send(GENESIS, make([b"a"]))
    path = node.layout.claims("sites", 5)
    fd = os.open(path, os.O_RDONLY)
    assert log.read_header(OsFs(), fd).kind == Kind.CLAIMS
    assert os.fstat(fd).st_mode & 0o777 == 0o660
    os.close(fd)


def test_strange_names_among_the_channels_do_not_stop_the_start(node: Node) -> None:
    head = node.send(GENESIS, make([b"a"])).head
    os.mkdir(f"{node.layout.channels}/Lost+Found")
    os.mkdir(f"{node.layout.channel('sites')}/backup")
    for path in (f"{node.layout.channels}/notes", f"{node.layout.channel('sites')}/7"):
        Path(path).write_text("mine")
    restart(node, clean=False)
    assert node.store.head(key()) == head


# -- match -----------------------------------------------------------------------------------------


def ask(node: Node, *heads: Head, after: Head | None = None, voids_after: int = 0) -> Any:
    return node.store.match(PEER, MatchRequest(SENDER, "sites", 5, heads, after, voids_after))


def test_a_match_tells_the_newest_common_head_and_what_follows(tmp_path: Path) -> None:
    node = Node(str(tmp_path / "spool"), limits=Limits(segment_bytes_max=FILE_HEADER_BYTES + 900))
    sent = [make([b"x"] * (1 + i % 3)) for i in range(30)]
    heads = [GENESIS]
    for one in sent:
        heads.append(node.send(heads[-1], one).head)
    for at in (0, 7, 8, 29, 30):
        stranger = Head(heads[at].number + 1, b"?" * 16)
        told = ask(node, stranger, heads[at], *heads[: at // 2])
        assert told.common == heads[at]
        assert told.head == heads[-1]
        assert [f for f, _ in told.frames] == [one.frame_id for one in sent[at:]]
        assert chain.advance(told.common, told.frames) == told.head
    assert ask(node, Head(5, b"?" * 16)).common is None
    assert ask(node).frames == tuple((one.frame_id, one.count) for one in sent)


def test_a_match_about_an_unknown_lane_knows_its_beginning(node: Node) -> None:
    told = ask(node, Head(3, b"?" * 16), GENESIS)
    assert (told.head, told.common, told.frames, told.more) == (GENESIS, GENESIS, (), False)
    assert ask(node, Head(3, b"?" * 16)).common is None


def test_a_match_tells_the_voids_after_a_number(node: Node) -> None:
    sent = [
        make([b"a", b"b"], voids=[Void(1, "expired")]),
        make([b"c", b"d"], voids=[Void(0, "purged"), Void(1, "expired")]),
    ]
    head = node.send(GENESIS, *sent).head
    for clean in (True, False):
        told = ask(node, head)
        assert [(v.frame_id, v.index, v.reason) for v in told.voids] == [
            (sent[0].frame_id, 1, "expired"),
            (sent[1].frame_id, 0, "purged"),
            (sent[1].frame_id, 1, "expired"),
        ]
        assert [v.index for v in ask(node, head, voids_after=2).voids] == [0, 1]
        restart(node, clean=clean)


def test_a_checkpoint_keeps_heads_and_the_newest_frames(tmp_path: Path) -> None:
    limits = Limits(segment_bytes_max=FILE_HEADER_BYTES + 900, match_frames=10)
    node = Node(str(tmp_path / "spool"), limits=limits)
    old = node.send(GENESIS, make([b"x"]), spool_id=b"O" * 16).head
    sent = [make([b"x"], voids=[Void(0, "expired")] if i == 3 else []) for i in range(30)]
    heads = [GENESIS]
    for one in sent:
        heads.append(node.send(heads[-1], one).head)
    before = os.path.getsize(node.layout.inbox_lanes_log)
    node.store.checkpoint()
    assert os.path.getsize(node.layout.inbox_lanes_log) < before
    for _ in range(3):
        told = ask(node, *heads[:25])
        assert (told.head, told.common) == (heads[-1], heads[24])
        assert told.floor >= 15
        assert [f for f, _ in told.frames] == [one.frame_id for one in sent[24:]]
        assert [v.frame_id for v in told.voids] == [sent[3].frame_id]
        assert ask(node, heads[5]).common is None
        assert node.store.head(key(spool_id=b"O" * 16)) == old
        restart(node, clean=True)
        node.store.checkpoint()
    assert node.send(heads[-1], make([b"more"])).verdict == "ok"


# -- blobs -----------------------------------------------------------------------------------------


def put(node: Node, one: OneFrame, body: bytes, offset: int, size: int) -> int:
    arrival = node.store.blobs.arrive(PEER, one.frame_id, offset, size)
    assert arrival is not None
    arrival.write(body)
    return arrival.close()


def test_a_blob_comes_before_its_frame(node: Node) -> None:
    body = os.urandom(100_000)
    one = make_blob(body)
    small = make([b"small"])
    answer = node.send(GENESIS, small, one, make([b"later"]))
    assert (answer.verdict, answer.head) == ("ok", after(GENESIS, [small]))
    needed = node.send(answer.head, one)
    assert (needed.verdict, needed.need) == ("need", {one.frame_id: 0})
    assert put(node, one, body[:40_000], 0, len(body)) == 40_000
    assert node.send(answer.head, one).need == {one.frame_id: 40_000}
    with pytest.raises(PieceRefused) as refused:
        node.store.blobs.arrive(PEER, one.frame_id, 50_000, len(body))
    assert refused.value.have == 40_000
    node.open()  # the sums of what has arrived are forgotten
    assert put(node, one, body[40_000:], 40_000, len(body)) == len(body)
    stored = node.send(answer.head, one)
    assert stored.head == after(answer.head, [one])
    assert Path(node.layout.inbox_blob(PEER, one.frame_id)).read_bytes() == body
    assert node.store.blobs.arrive(PEER, one.frame_id, 0, len(body)) is None


def test_a_blob_that_does_not_match_is_asked_for_again(node: Node) -> None:
    body = os.urandom(50_000)
    one = make_blob(body)
    put(node, one, body[:-1] + b"?", 0, len(body))
    assert node.send(GENESIS, one).need == {one.frame_id: 0}
    put(node, one, body, 0, len(body))
    assert node.send(GENESIS, one).verdict == "ok"


def test_a_later_request_for_a_blob_takes_over(node: Node) -> None:
    body = os.urandom(3000)
    one = make_blob(body)
    hanging = node.store.blobs.arrive(PEER, one.frame_id, 0, 3000)
    assert hanging is not None
    hanging.write(body[:1000])
    newer = node.store.blobs.arrive(PEER, one.frame_id, 1000, 3000)
    assert newer is not None
    with pytest.raises(PieceRefused):
        hanging.write(b"late")
    newer.write(body[1000:])
    hanging.close()
    assert node.send(GENESIS, one).verdict == "need"
    newer.close()
    assert node.send(GENESIS, one).verdict == "ok"


def test_a_blob_that_is_void_or_too_large_is_not_asked_for(tmp_path: Path) -> None:
    limits = Limits(peers={PEER: PeerLimits(max_message_bytes=1000)})
    node = Node(str(tmp_path / "spool"), limits=limits)
    void, large = make_blob(b"x" * 500), make_blob(b"y" * 2000)
    void.aside = Aside(None, (Void(0, "purged"),))
    answer = node.send(GENESIS, void, large)
    assert answer.verdict == "ok"
    assert [(r.frame_id, r.reason) for r in answer.refusals] == [(large.frame_id, TOO_LARGE)]
    assert [note["v"] for note, _ in node.entries()] == [[[0, "purged"]], [[0, TOO_LARGE]]]


# -- room ------------------------------------------------------------------------------------------


class FailingFs(OsFs):
    """Fails writes of more than a file header, or syncs, when told to."""

    write_error = 0
    sync_error = 0
    free = (1 << 40, 1 << 41)

    def write_at(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
        if self.write_error and offset >= FILE_HEADER_BYTES:
            raise OSError(self.write_error, "made to fail")
        super().write_at(fd, pieces, offset)

    def sync(self, fd: int, site: str) -> None:
        if self.sync_error and site == "receiver.append":
            raise OSError(self.sync_error, "made to fail")
        super().sync(fd, site)

    def free_bytes(self, path: str) -> tuple[int, int]:
        return self.free


def test_a_full_disk_refuses_the_frames_and_keeps_the_heads(tmp_path: Path) -> None:
    fs = FailingFs()
    node = Node(str(tmp_path / "spool"), fs=fs)
    head = node.send(GENESIS, make([b"one"])).head
    push, views = decode_push(body_of(("sites", 5, head, [make([b"two"])])))
    first = node.store.push(PEER, push, views)
    batch = node.store.begin()
    assert batch is not None
    more = body_of(("sites", 5, after(head, [two(push, views)]), [make([b"three"])]))
    second = node.store.push(PEER, *decode_push(more))
    fs.write_error = errno.ENOSPC
    node.store.write(batch)
    fs.write_error = 0
    assert node.store.finish(batch) == frozenset()
    node.store.commit()
    assert [node.store.answer(p)[0].verdict for p in (first, second)] == ["refused", "refused"]
    assert node.store.head(key()) == head
    assert node.send(head, make([b"two again"])).verdict == "ok"
    restart(node, clean=False)
    assert [bytes(one.body(0)) for _, one in node.entries()] == [b"one", b"two again"]


def two(push: Push, views: Sequence[memoryview]) -> OneFrame:
    data = bytes(views[0][entry.ENTRY_BYTES :])
    return OneFrame(frame.peek(data).frame_id, data, 1)


def test_after_a_failed_sync_the_store_is_used_no_more(tmp_path: Path) -> None:
    fs = FailingFs()
    node = Node(str(tmp_path / "spool"), fs=fs)
    fs.sync_error = errno.EIO
    with pytest.raises(OSError):
        node.send(GENESIS, make([b"one"]))
    fs.sync_error = 0
    with pytest.raises(log.LogBroken):
        node.send(GENESIS, make([b"one"]))
    assert node.ids() == []


def test_room_is_refused_by_quota_and_by_reserve(tmp_path: Path) -> None:
    fs = FailingFs()
    limits = Limits(
        quota_bytes=300_000,
        segment_bytes_max=50_000,
        peers={PEER: PeerLimits(quota_bytes=100_000)},
    )
    node = Node(str(tmp_path / "spool"), fs=fs, limits=limits)
    assert node.store.no_room(PEER, 50_000) == ""
    head = node.send(GENESIS, *[make([os.urandom(20_000)]) for _ in range(3)]).head
    assert "peer" in node.store.no_room(PEER, 50_000)
    assert node.store.no_room("bremen", 50_000) == ""
    assert node.store.no_room("bremen", 280_000) == "the inbox is full"
    restart(node, clean=False)
    assert "peer" in node.store.no_room(PEER, 50_000)
    node.send(head, make([b"x"]))
    os.unlink(node.layout.inbox_segment("sites", 5, 1))
    node.store.recount()
    assert node.store.no_room(PEER, 50_000) == ""
    fs.free = (10 << 20, 1 << 30)
    assert node.store.no_room("bremen", 1) == "the disk is full"


def test_blobs_count_towards_the_quota(tmp_path: Path) -> None:
    limits = Limits(quota_bytes=100_000)
    node = Node(str(tmp_path / "spool"), limits=limits, fs=FailingFs())
    put(node, make_blob(b"x" * 90_000), b"x" * 90_000, 0, 90_000)
    node.store.recount()
    assert node.store.no_room("bremen", 20_000) == "the inbox is full"
