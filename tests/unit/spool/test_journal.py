"""The journal: what was put is there, once, in order; what failed is not, or is in doubt."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from droprd.core.entry import FILE_HEADER_BYTES
from droprd.core.frame import BODIES_BYTES_MAX
from droprd.model import KIB, Lane
from droprd.spool import journalfile, log
from droprd.spool.blobs import write_blob
from droprd.spool.clock import SystemClock
from droprd.spool.journal import Journal
from droprd.spool.layout import split_outbox_blob_name
from droprd.spool.puts import Put
from tests.spools import Producer, all_frames, bodies_by_id, frames_of, journal_names

LANE = Lane("berlin", "sites", 5)
OTHER = Lane("berlin", "sites", 0)


@pytest.fixture
def producer(tmp_path: Path) -> Producer:
    return Producer(tmp_path / "spool")


def put(journal: Journal, *bodies: bytes) -> list[str]:
    return journal.put(Put(LANE, list(bodies)))


def header(journal_path: str) -> bytes:
    return Path(journal_path).read_bytes()[:FILE_HEADER_BYTES]


# -- putting -----------------------------------------------------------------------------------


def test_what_was_put_is_published_with_its_ids(producer: Producer) -> None:
    journal = producer.journal()
    first = put(journal, b"one")
    many = put(journal, *[b"%d" % n for n in range(2000)])
    assert list(bodies_by_id(producer.layout).items()) == [
        (first[0], b"one"),
        *zip(many, [b"%d" % n for n in range(2000)], strict=True),
    ]


def test_a_put_is_one_sync_however_many_messages_it_holds(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"")
    producer.fs.syncs.clear()
    put(journal, *[bytes(1024)] * 500)
    assert producer.fs.syncs == ["journal.put"]
    assert [f.count for f in all_frames(producer.layout)] == [1, *[32] * 15, 20]


def test_nothing_counts_before_its_sync_and_the_name_is_synced_first(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"x")
    assert producer.fs.syncs == ["journal.create", "journal.create_dir", "journal.put"]


def test_puts_of_one_commit_share_a_frame_where_lane_ttl_and_delay_are_the_same(
    producer: Producer,
) -> None:
    journal = producer.journal()
    puts = [
        Put(LANE, [b"a"]),
        Put(OTHER, [b"b"]),
        Put(LANE, [b"c", b"d"]),
        Put(LANE, [b"e"], ttl_ms=5),
        Put(LANE, [b"f"], delay_ms=7),
    ]
    journal.commit(puts)
    assert producer.fs.syncs.count("journal.put") == 1
    found = [
        (f.lane, [bytes(f.body(i)) for i in range(f.count)], f.info.ttl_ms, f.info.delay_ms)
        for f in all_frames(producer.layout)
    ]
    assert found == [
        (LANE, [b"a", b"c", b"d"], 0, 0),
        (OTHER, [b"b"], 0, 0),
        (LANE, [b"e"], 5, 0),
        (LANE, [b"f"], 0, 7),
    ]
    bodies = bodies_by_id(producer.layout)
    assert [[bodies[i] for i in p.ids] for p in puts] == [list(p.bodies) for p in puts]


def test_messages_with_other_headers_keep_their_own_in_a_shared_frame(producer: Producer) -> None:
    journal = producer.journal()
    journal.commit(
        [
            Put(LANE, [b"a", b"b"], {"h": {"k": "1"}}),
            Put(LANE, [b"c"]),
            Put(LANE, [b"d"], {"t": "text/plain"}),
        ]
    )
    (frame,) = all_frames(producer.layout)
    assert frame.shared == {}
    assert frame.singles == {0: {"h": {"k": "1"}}, 1: {"h": {"k": "1"}}, 3: {"t": "text/plain"}}
    put(journal, b"e", b"f")
    journal.commit([Put(LANE, [b"g", b"h"], {"t": "x"}), Put(LANE, [b"i"], {"t": "x"})])
    frame = all_frames(producer.layout)[-1]
    assert (frame.count, frame.shared, frame.singles) == (3, {"t": "x"}, {})


def test_frames_of_large_headers_stay_within_their_limits(producer: Producer) -> None:
    journal = producer.journal()
    puts = [Put(LANE, [bytes(900)] * 3, {"h": {"k": str(n) * 8000}}) for n in range(5)]
    puts += [Put(LANE, [b""] * 3000, {"h": {"k": "v" * 8000}})]
    journal.commit(puts)
    frames = all_frames(producer.layout)
    assert sum(f.count for f in frames) == 3015
    assert all(len(f.data) <= 64 * KIB for f in frames)


def test_stamps_in_a_journal_ascend_and_lie_between_begin_and_return(producer: Producer) -> None:
    clock = SystemClock()
    journal = producer.journal()
    begin = clock.boot_ns()
    put(journal, *[bytes(1024)] * 100)
    put(journal, b"last")
    end = clock.boot_ns()
    stamps = [f.stamp for f in frames_of(producer.layout, *journal_names(producer.layout))]
    times = [s.boot_ns for s in stamps]
    assert times == sorted(set(times))
    assert begin < times[0]
    assert times[-1] < end
    assert {s.boot_id for s in stamps} == {clock.boot_id()}


@pytest.mark.parametrize("size", [1, 31, 100, 1000, 1024, 20000, BODIES_BYTES_MAX])
def test_bodies_of_every_size_come_back(producer: Producer, size: int) -> None:
    journal = producer.journal()
    bodies = [os.urandom(size) for _ in range(40)]
    bodies[7] = b""
    ids = put(journal, *bodies) + put(journal, *[bytes(size)] * 40)
    found = bodies_by_id(producer.layout)
    assert [found[i] for i in ids] == bodies + [bytes(size)] * 40


# -- files -------------------------------------------------------------------------------------


def test_a_journal_has_mode_0640_whatever_the_umask(producer: Producer) -> None:
    old = os.umask(0o777)
    try:
        put(producer.journal(), b"x")
    finally:
        os.umask(old)
    (name,) = journal_names(producer.layout)
    found = os.stat(producer.layout.journal(name))
    assert stat.S_IMODE(found.st_mode) == 0o640


def test_a_journal_is_held_while_its_producer_lives(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"x")
    (name,) = journal_names(producer.layout)
    file = journalfile.open_journal(producer.fs, producer.layout, name)
    assert file is not None
    assert not file.hold()
    journal.close()
    assert file.hold()
    file.close()


def test_a_full_journal_turns_over_to_the_next_number_and_is_let_go(producer: Producer) -> None:
    journal = producer.journal(bytes_max=FILE_HEADER_BYTES + 10_000)
    ids = [i for _ in range(10) for i in put(journal, bytes(4000))]
    names = journal_names(producer.layout)
    maker = names[0].partition("-")[0]
    assert names == [f"{maker}-{n}.log" for n in range(1, 5)]
    assert list(bodies_by_id(producer.layout)) == ids
    held = []
    for name in names:
        file = journalfile.open_journal(producer.fs, producer.layout, name)
        assert file is not None
        held.append(not file.hold())
        file.close()
    assert held == [False, False, False, True]


def test_the_first_free_journal_of_the_user_is_adopted(producer: Producer) -> None:
    one = producer.journal()
    put(one, b"1")
    one.close()
    producer.fs.syncs.clear()
    two = producer.journal()
    put(two, b"2")
    assert producer.fs.syncs == ["journal.adopt_dir", "journal.put"]
    three = producer.journal()
    put(three, b"3")
    assert len(journal_names(producer.layout)) == 2
    assert list(bodies_by_id(producer.layout).values()) == [b"1", b"2", b"3"]


def test_a_journal_with_zeros_ahead_is_adopted_and_one_of_another_user_is_not(
    producer: Producer,
) -> None:
    one = producer.journal()
    for _ in range(20):
        put(one, b"x")
    one.close()
    (name,) = journal_names(producer.layout)
    assert os.path.getsize(producer.layout.journal(name)) > 64 * KIB
    put(producer.journal(uid=os.geteuid() + 1), b"y")
    assert len(journal_names(producer.layout)) == 2
    put(producer.journal(), b"z")
    assert len(journal_names(producer.layout)) == 2


def test_a_journal_with_a_tail_is_left_to_the_sender(producer: Producer) -> None:
    one = producer.journal()
    put(one, b"1")
    one.close()
    (name,) = journal_names(producer.layout)
    with open(producer.layout.journal(name), "ab") as file:
        file.write(b"DRE1 and no more")
    put(producer.journal(), b"2")
    assert len(journal_names(producer.layout)) == 2


def test_a_journal_without_a_whole_header_is_passed_over(producer: Producer) -> None:
    for content in (b"", b"x" * 100, bytes(5000)):
        name = f"{os.urandom(16).hex()}-1.log"
        Path(producer.layout.journal(name)).write_bytes(content)
    put(producer.journal(), b"x")
    assert len(journal_names(producer.layout)) == 4


def test_a_full_journal_and_one_of_another_spool_are_not_adopted(producer: Producer) -> None:
    one = producer.journal(bytes_max=FILE_HEADER_BYTES + 1000)
    put(one, bytes(1000))
    one.close()
    put(producer.journal(bytes_max=FILE_HEADER_BYTES + 1000), b"x")
    assert len(journal_names(producer.layout)) == 2
    other = Journal(
        producer.fs, SystemClock(), os.urandom, producer.layout, b"?" * 16, uid=os.geteuid()
    )
    put(other, b"y")
    assert len(journal_names(producer.layout)) == 3


def test_an_adopted_journal_turns_over_to_a_name_of_a_new_maker(producer: Producer) -> None:
    one = producer.journal()
    put(one, b"1")
    one.close()
    two = producer.journal(bytes_max=FILE_HEADER_BYTES + 1000)
    put(two, bytes(1000))
    put(two, b"3")
    makers = {n.partition("-")[0] for n in journal_names(producer.layout)}
    assert len(makers) == 2


def test_a_journal_deleted_between_open_and_lock_is_not_held(producer: Producer) -> None:
    one = producer.journal()
    put(one, b"1")
    one.close()
    (name,) = journal_names(producer.layout)
    file = journalfile.open_journal(producer.fs, producer.layout, name)
    assert file is not None
    os.unlink(producer.layout.journal(name))
    assert not file.hold()
    file.close()


# -- blobs -------------------------------------------------------------------------------------


def test_a_blob_has_a_frame_of_its_own_between_its_neighbours(producer: Producer) -> None:
    journal = producer.journal()
    name = journal.pin()
    big = os.urandom(50_000)
    blob = write_blob(producer.fs, producer.layout, name, os.urandom(14) + bytes(2), big)
    ids = journal.put(Put(LANE, [b"a", b"b", blob, b"c"], {"h": {"k": "v"}}, ttl_ms=9))
    journal.unpin(name)
    assert list(bodies_by_id(producer.layout).items()) == list(
        zip(ids, [b"a", b"b", big, b"c"], strict=True)
    )
    frames = all_frames(producer.layout)
    assert [f.info.is_blob for f in frames] == [False, True, False]
    assert frames[1].info.bodies_bytes == len(big)
    assert frames[1].shared == {"h": {"k": "v"}, "d": blob.sha256}
    assert {f.info.ttl_ms for f in frames} == {9}


def test_a_blob_follows_its_frame_when_the_journal_turned_over_meanwhile(
    producer: Producer,
) -> None:
    journal = producer.journal(bytes_max=FILE_HEADER_BYTES + 1000)
    name = journal.pin()
    blob = write_blob(producer.fs, producer.layout, name, os.urandom(14) + bytes(2), b"x" * 50_000)
    put(journal, bytes(1000))
    put(journal, b"in the next one")
    old = journalfile.open_journal(producer.fs, producer.layout, name)
    assert old is not None
    assert not old.hold(), "the blob would be an orphan"
    journal.put(Put(LANE, [blob]))
    journal.unpin(name)
    assert old.hold()
    old.close()
    (found,) = os.listdir(producer.layout.outbox_blobs)
    parts = split_outbox_blob_name(found)
    assert parts is not None
    assert parts[0] == journal_names(producer.layout)[-1] != name
    assert bodies_by_id(producer.layout).popitem()[1] == b"x" * 50_000


# -- the child of a fork -----------------------------------------------------------------------


def test_an_abandoned_journal_keeps_the_lock_of_whoever_shares_it(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"x")
    (name,) = journal_names(producer.layout)
    assert journal._writer is not None
    shared = os.dup(journal._writer.fd)
    journal.abandon()
    file = journalfile.open_journal(producer.fs, producer.layout, name)
    assert file is not None
    assert not file.hold()
    os.close(shared)
    assert file.hold()
    file.close()
    put(journal, b"y")


def test_the_published_end_never_lies_beyond_what_is_synced(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"x")
    (name,) = journal_names(producer.layout)
    path = producer.layout.journal(name)
    seen: list[int] = []

    def look(operation: str, site: str, size: int) -> None:
        if site == "journal.put":
            fd = os.open(path, os.O_RDONLY)
            seen.append(log.read_published(producer.fs, fd))
            os.close(fd)

    end = os.path.getsize(path)
    producer.fs.fail = look
    put(journal, b"y")
    assert seen == [end]
