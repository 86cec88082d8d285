"""What the janitor does for a stream: leases, expiry, syncs, compaction, repair, deletion."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.core import chain
from droprd.core import entry as entries
from droprd.core import frame as frames
from droprd.core.claimops import Now, op_revive
from droprd.core.push import LanePush, Push, decode_push, encode_push
from droprd.model import GENESIS, Lane
from droprd.spool import log
from droprd.spool import tending as tending_module
from droprd.spool.bells import Waiting
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.judging import Limits
from droprd.spool.receiver import ReceiverStore
from droprd.spool.retention import DeadLetters, Retention
from droprd.spool.seals import SealReader
from droprd.spool.tending import StreamTender
from droprd.testing.inboxes import eventually
from droprd.testing.inboxsuite import bodies
from tests.inboxfiles import STREAM, Segments
from tests.spools import new_spool

HOUR_NS = 3600 * 10**9


@pytest.fixture
def segments(tmp_path: Path) -> Segments:
    return Segments(tmp_path / "spool", segment_bytes_max=4500)


@pytest.fixture
def tender(segments: Segments) -> Iterator[StreamTender]:
    waiting = Waiting(segments.fs, segments.layout)
    opened = StreamTender(segments.spool, waiting, *STREAM)
    yield opened
    opened.close()
    waiting.close()


@pytest.fixture
def inbox(segments: Segments) -> Iterator[Inbox]:
    with Inbox(segments.layout.root) as opened:
        yield opened


@pytest.fixture
def tend(segments: Segments, tender: StreamTender) -> Callable[..., None]:
    def look(later_ns: int = 0, *, held: bool = False) -> None:
        tender.tend(now(segments, later_ns, held=held), 10)

    return look


def now(segments: Segments, later_ns: int = 0, *, held: bool = False) -> Now:
    clock = segments.clock
    return Now(clock.boot_id(), clock.boot_ns() + later_ns, clock.wall_ns() + later_ns, held)


def dead_log(segments: Segments) -> list[tuple[str, list[list[object]], list[bytes]]]:
    """(sender, [[index, reason]…], bodies kept) of each entry of inbox/dead.log."""
    fd = os.open(segments.layout.inbox_dead, os.O_RDONLY)
    try:
        header = log.read_header(segments.fs, fd)
        found = []
        for item in log.Walk(segments.fs, fd, header.log_id, promised=0):
            assert isinstance(item, log.Entry)
            note = entries.unpack_note(item.note)
            left_out = [index for index, _ in note["v"]]
            frame = frames.parse(bytes(item.frame), left_out)
            kept = [bytes(frame.body(i)) for i, _ in note["i"] if i not in left_out]
            found.append((note["l"][0], note["i"], kept))
        return found
    finally:
        os.close(fd)


def test_it_counts_what_is_ready_leased_and_dead(
    segments: Segments, inbox: Inbox, tender: StreamTender, tend: Callable[..., None]
) -> None:
    segments.deliver([b"1", b"2", b"3", b"4"])
    messages = inbox.receive("sites", max_messages=3)
    messages[0].ack()
    messages[1].reject("no")
    tend()
    assert tender.gauges[:4] == (1, 1, 1, 0)


def test_it_ends_leases_by_time_and_by_death(
    segments: Segments, tender: StreamTender, tend: Callable[..., None]
) -> None:
    segments.deliver([b"1", b"2"])
    stores = [segments.open(), segments.open()]
    dead, living = (Inbox(store=lambda store=store: store) for store in stores)  # type: ignore[misc]
    dead.receive("sites", max_messages=1)
    living.receive("sites", max_messages=1, lease_s=60)
    tend()
    assert tender.gauges.leased == 2
    stores[0].close_in_child()
    tend()
    assert tender.gauges.leased == 1
    tend(2 * 60 * 10**9)
    assert tender.gauges[:4] == (2, 0, 0, 0)
    living.close()


def test_it_marks_expired_messages_wherever_they_wait(
    segments: Segments, inbox: Inbox, tender: StreamTender, tend: Callable[..., None]
) -> None:
    for n in range(60):
        segments.deliver([b"%d" % n], ttl_ms=60_000 if n % 2 else 0)
    inbox.receive("sites", max_messages=3)[1].nack()
    tend()
    assert tender.gauges.ready == 58
    tend(61 * 10**9, held=True)
    assert tender.stream.look().counts["expired"] == 0
    tend(61 * 10**9)
    assert tender.stream.look().counts["expired"] == 30
    assert tender.gauges.ready == 30


def test_it_syncs_what_consumers_settled(
    segments: Segments, inbox: Inbox, tender: StreamTender, tend: Callable[..., None]
) -> None:
    segments.deliver([b"1"])
    inbox.receive("sites")[0].ack()
    tend()
    fd = os.open(segments.layout.claims(*STREAM), os.O_RDONLY)
    assert log.read_published(segments.fs, fd) == os.fstat(fd).st_size
    os.close(fd)


def test_it_wakes_a_consumer_that_polls_when_a_delay_is_over(
    segments: Segments, inbox: Inbox, tend: Callable[..., None]
) -> None:
    segments.deliver([b"1"])
    inbox.receive("sites")[0].nack(delay_s=3600)
    assert inbox._opened is not None
    store = inbox._opened[0]
    tend()
    assert not store.drain()
    tend(2 * HOUR_NS)
    assert store.drain()


def test_it_shortens_claims_while_consumers_go_on(
    segments: Segments,
    inbox: Inbox,
    tend: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tending_module, "COMPACT_BYTES_MIN", 10_000)
    segments.deliver([b"%d" % n for n in range(200)])
    path = segments.layout.claims(*STREAM)
    got = []
    for _ in range(200):
        (message,) = inbox.receive("sites", max_messages=1)
        got.append(message.body)
        message.ack()
        tend()
        assert os.path.getsize(path) < 12_000
    assert got == [b"%d" % n for n in range(200)]
    assert inbox.receive("sites") == []


def test_it_mends_claims_that_cannot_be_read_and_keeps_their_bytes(
    segments: Segments, tend: Callable[..., None]
) -> None:
    segments.deliver([b"1", b"2"])
    path = Path(segments.layout.claims(*STREAM))
    with Inbox(segments.layout.root) as inbox:
        inbox.receive("sites", max_messages=1)[0].ack()
    with open(path, "r+b") as file:
        file.seek(entries.FILE_HEADER_BYTES + 70)
        file.write(b"XXX")
    damaged = path.read_bytes()
    tend()
    (kept,) = Path(segments.layout.corrupt).iterdir()
    assert kept.read_bytes() == damaged
    with Inbox(segments.layout.root) as inbox:
        assert bodies(inbox.receive("sites")) == [b"1", b"2"]


def test_missing_claims_are_made_anew(segments: Segments, tend: Callable[..., None]) -> None:
    segments.deliver([b"1"])
    os.unlink(segments.layout.claims(*STREAM))
    with Inbox(segments.layout.root) as inbox:
        assert inbox.receive("sites") == []
        tend()
        assert bodies(inbox.receive("sites", wait_s=10)) == [b"1"]


def test_corrupt_bytes_are_kept_once(
    segments: Segments, inbox: Inbox, tender: StreamTender, tend: Callable[..., None]
) -> None:
    segments.deliver([b"one", b"TWO"])
    data = Path(segments.layout.inbox_segment(*STREAM, 1)).read_bytes()
    segments.damage(0, data.index(b"TWO") - segments.offsets[0][2], b"two")
    assert bodies(inbox.receive("sites")) == [b"one"]
    for _ in range(2):
        tend()
        tender._corrupt_known.clear()  # as another start of the janitor would be
    assert tender.gauges.corrupt == 1
    (kept,) = Path(segments.layout.corrupt).iterdir()
    assert b"onetwo" in kept.read_bytes()


# Deleting


def consume(segments: Segments, rejecting: bytes = b"") -> None:
    with Inbox(segments.layout.root) as inbox:
        while messages := inbox.receive("sites"):
            for message in messages:
                if rejecting and message.body.startswith(rejecting):
                    message.reject("unwanted")
                else:
                    message.ack()


def test_settled_segments_go_and_dead_letters_are_kept(
    segments: Segments, tender: StreamTender
) -> None:
    large = b"dead" * 10_000
    ids = [segments.deliver([b"x" * 1500, b"dead %d" % n])[1] for n in range(6)]
    segments.deliver([large])
    segments.deliver([b"y" * 40_000])
    segments.deliver([b"last"])
    segments.deliver([b"last" * 1000])
    segments.deliver([b"last"])
    consume(segments, rejecting=b"dead")
    dead = DeadLetters(segments.spool)
    retention = Retention(segments.spool, dead)
    before = len(segments.segments())
    assert before > 2
    gone = tender.delete_settled(retention, segments.sealed()[STREAM], 0, now(segments))
    assert gone == before - 1
    assert len(segments.segments()) == 1
    found = dead_log(segments)
    assert [kept for _, _, kept in found[:6]] == [[b"dead %d" % n] for n in range(6)]
    assert {sender for sender, _, _ in found} == {"hamburg"}
    assert found[0][1] == [[1, "unwanted"]]
    assert dead.counts == {"sites": 7}
    assert len(ids) == 6
    (blob,) = Path(segments.layout.inbox_blobs).iterdir()
    assert blob.read_bytes() == large
    dead.close()
    again = DeadLetters(segments.spool)
    assert again.counts == {"sites": 7}
    assert len(again.blobs) == 1
    assert tender.stream.look().counts["buried"] == 7


def test_a_segment_stays_while_a_message_in_it_is_open_or_it_is_not_sealed(
    segments: Segments, inbox: Inbox, tender: StreamTender
) -> None:
    for n in range(4):
        segments.deliver([b"x" * 5000, b"%d" % n])
    messages = inbox.receive("sites")
    inbox.ack(messages[1:])
    retention = Retention(segments.spool, DeadLetters(segments.spool))
    assert tender.delete_settled(retention, 3, 0, now(segments)) == 0
    messages[0].ack()
    assert tender.delete_settled(retention, 1, 0, now(segments)) == 1
    assert tender.delete_settled(retention, 3, 0, now(segments)) == 2
    segments.deliver([b"goes on"])
    assert bodies(inbox.receive("sites")) == [b"goes on"]


def test_settled_segments_are_retained_as_long_as_was_asked_for(
    segments: Segments, tender: StreamTender
) -> None:
    for _ in range(3):
        segments.deliver([b"x" * 5000])
    consume(segments)
    retention = Retention(segments.spool, DeadLetters(segments.spool))
    for later_ns, held, gone in [
        (0, False, 0),
        (HOUR_NS - 10**9, False, 0),
        (2 * HOUR_NS, True, 0),
        (2 * HOUR_NS, False, 2),
    ]:
        at = now(segments, later_ns, held=held)
        assert tender.delete_settled(retention, 2, 3600, at) == gone


def test_a_crash_while_deleting_buries_no_dead_letter_twice(
    segments: Segments, tender: StreamTender
) -> None:
    for n in range(3):
        segments.deliver([b"x" * 5000, b"dead %d" % n])
    consume(segments, rejecting=b"dead")
    first = DeadLetters(segments.spool)
    stream = tender.stream
    for a, b, why in list(stream.look().dead):
        Retention(segments.spool, first)._bury(stream, (a, b), why.reason)
    first.sync()  # here the janitor dies
    first.close()
    dead = DeadLetters(segments.spool)
    assert tender.delete_settled(Retention(segments.spool, dead), 2, 0, now(segments)) == 2
    assert dead.counts == {"sites": 3}
    assert len(dead_log(segments)) == 3


def test_a_forgotten_segment_that_a_crash_left_goes_at_the_next_look(
    segments: Segments, tender: StreamTender
) -> None:
    for _ in range(3):
        segments.deliver([b"x" * 5000])
    consume(segments)
    path = Path(segments.layout.inbox_segment(*STREAM, 1))
    data = path.read_bytes()
    retention = Retention(segments.spool, DeadLetters(segments.spool))
    assert tender.delete_settled(retention, 1, 0, now(segments)) == 1
    path.write_bytes(data)
    assert tender.delete_settled(retention, 1, 0, now(segments)) == 1
    assert not path.exists()


def test_a_revived_dead_letter_keeps_its_segment(segments: Segments, tender: StreamTender) -> None:
    for n in range(3):
        segments.deliver([b"x" * 5000, b"dead %d" % n])
    consume(segments, rejecting=b"dead")
    tender.stream.acquire(1)
    tender.stream.append([op_revive([(1, 2)])])
    tender.stream.release()
    retention = Retention(segments.spool, DeadLetters(segments.spool))
    assert tender.delete_settled(retention, 2, 0, now(segments)) == 0
    with Inbox(segments.layout.root) as inbox:
        (message,) = inbox.receive("sites")
        assert (message.body, message.attempt) == (b"dead 0", 1)
        message.ack()
    eventually(lambda: tender.delete_settled(retention, 2, 0, now(segments)) == 2)


def test_what_the_real_receiver_sealed_goes_and_it_goes_on(tmp_path: Path) -> None:
    layout = new_spool(tmp_path / "spool")
    spool = Spool(OsFs(), SystemClock(), os.urandom, layout, b"R" * 16)
    store = ReceiverStore(spool, Limits(segment_bytes_max=10_000))
    head = GENESIS
    for n in range(10):
        frame_id = frames.new_frame_id(n, os.urandom(10))
        lane, stamp = Lane("berlin", *STREAM), frames.Stamp(b"B" * 16, 1, 2)
        pieces = frames.build(
            frame_id=frame_id, lane=lane, stamp=stamp, bodies=[b"%d" % n, b"x" * 4000]
        )
        frame = b"".join(pieces)
        raw = entries.pack_entry(b"L" * 16, 9999, 5000, b"", len(frame)) + frame
        push = Push(b"S" * 16, (LanePush(*STREAM, head, 1, len(raw), {}),))
        store.push("hamburg", *decode_push(encode_push(push) + raw))
        store.commit()
        head = chain.extend(head, frame_id, 2)
    with Inbox(layout.root) as inbox:
        messages = inbox.receive("sites", max_messages=15)
        assert bodies(messages)[:15:2] == [b"%d" % n for n in range(8)]
        inbox.ack(messages)
        waiting = Waiting(spool.fs, layout)
        tender = StreamTender(spool, waiting, *STREAM)
        at = Now(spool.clock.boot_id(), spool.clock.boot_ns(), spool.clock.wall_ns())
        tender.tend(at, 10)
        assert tender.gauges.ready == 5
        before = [n for n, _ in tender.stream.log.segments()]
        retention = Retention(spool, DeadLetters(spool))
        assert tender.delete_settled(retention, SealReader(spool.fs, layout).read()[STREAM], 0, at)
        assert len(tender.stream.log.segments()) < len(before)
        store.close()
        ReceiverStore(spool, Limits(segment_bytes_max=10_000)).close()
        assert bodies(inbox.receive("sites"))[-2] == b"9"
        tender.close()
        waiting.close()


def test_the_oldest_message_that_could_be_taken_is_known(
    segments: Segments, tender: StreamTender, tend: Callable[..., None], inbox: Inbox
) -> None:
    tend()
    assert tender.gauges.oldest_wall_ns is None
    before_ns = segments.clock.wall_ns()
    segments.deliver([b"a"])
    segments.deliver([b"b"])
    after_ns = segments.clock.wall_ns()
    tend()
    oldest_ns = tender.gauges.oldest_wall_ns
    assert oldest_ns is not None
    assert before_ns <= oldest_ns <= after_ns
    (first,) = inbox.receive(STREAM[0], max_messages=1)
    tend()
    assert tender.gauges.oldest_wall_ns == oldest_ns, "a lease alone is no progress"
    first.ack()
    inbox.flush()
    tend()
    assert tender.gauges.oldest_wall_ns is not None
    assert tender.gauges.oldest_wall_ns > oldest_ns
    for message in inbox.receive(STREAM[0]):
        message.nack(delay_s=3600)
    inbox.flush()
    tend()
    assert tender.gauges.oldest_wall_ns is None, "what is delayed waits for its time, not for us"
