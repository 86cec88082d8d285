"""The journal on a failing disk: what failed is not there, or is in doubt; the rest stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from droprd.core.entry import FILE_HEADER_BYTES
from droprd.errors import SendInDoubt, SpoolFull, SpoolNotReady
from droprd.model import Lane
from droprd.spool import journalfile
from droprd.spool.fsops import Buffer
from droprd.spool.journal import Journal
from droprd.spool.puts import Put
from tests.spools import FaultyFs, Producer, bodies_by_id, frames_of, journal_names

LANE = Lane("berlin", "sites", 5)
OTHER = Lane("berlin", "sites", 0)


@pytest.fixture
def producer(tmp_path: Path) -> Producer:
    return Producer(tmp_path / "spool")


def put(journal: Journal, *bodies: bytes) -> list[str]:
    return journal.put(Put(LANE, list(bodies)))


def header(journal_path: str) -> bytes:
    return Path(journal_path).read_bytes()[:FILE_HEADER_BYTES]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_cut_back_and_the_next_put_works(producer: Producer, code: int) -> None:
    journal = producer.journal()
    put(journal, b"before")
    (name,) = journal_names(producer.layout)
    size = os.path.getsize(producer.layout.journal(name))
    producer.fs.fail = lambda operation, site, size: code if operation == "write" else None
    with pytest.raises(SpoolFull):
        put(journal, *[bytes(1024)] * 100)
    assert os.path.getsize(producer.layout.journal(name)) == size
    producer.fs.fail = lambda operation, site, size: None
    put(journal, b"after")
    assert list(bodies_by_id(producer.layout).values()) == [b"before", b"after"]
    assert journal_names(producer.layout) == [name]


def test_zeros_that_do_not_fit_do_not_refuse_a_message_that_fits(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"1")
    producer.fs.fail = lambda _, site, size: errno.ENOSPC if size > 20_000 else None
    for n in range(10):
        put(journal, b"%d" % n)
    assert len(bodies_by_id(producer.layout)) == 11


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_journal_that_cannot_be_made_leaves_no_file(producer: Producer, operation: str) -> None:
    producer.fs.fail = lambda op, *_: errno.ENOSPC if op == operation else None
    journal = producer.journal()
    for _ in range(3):
        with pytest.raises(SpoolFull):
            put(journal, b"x")
    assert journal_names(producer.layout) == []
    producer.fs.fail = lambda *_: None
    put(journal, b"x")
    assert len(journal_names(producer.layout)) == 1


def test_no_more_is_written_ahead_than_there_is_to_spare(producer: Producer) -> None:
    journal = producer.journal()
    journal.spare_bytes = 1000
    for _ in range(10):
        put(journal, bytes(300))
    (name,) = journal_names(producer.layout)
    file = journalfile.open_journal(producer.fs, producer.layout, name)
    assert file is not None
    assert 0 < file.size() - file.published() <= 1000
    file.close()


def test_a_failed_write_that_could_be_cut_back_was_not_accepted(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"before")
    producer.fs.fail = lambda operation, *_: errno.EIO if operation == "write" else None
    with pytest.raises(SpoolNotReady) as caught:
        put(journal, b"x")
    assert caught.value.code == "spool_unwritable"
    producer.fs.fail = lambda *_: None
    put(journal, b"after")
    assert list(bodies_by_id(producer.layout).values()) == [b"before", b"after"]


def test_a_failed_sync_is_in_doubt_never_repeated_and_noted_in_the_next_journal(
    producer: Producer,
) -> None:
    journal = producer.journal()
    put(journal, b"before")
    (broken,) = journal_names(producer.layout)
    end = os.path.getsize(producer.layout.journal(broken))
    producer.fs.fail = lambda _, site, size: errno.EIO if site == "journal.put" else None
    producer.fs.syncs.clear()
    with pytest.raises(SendInDoubt) as caught:
        put(journal, b"x", b"y")
    assert len(caught.value.ids) == 2
    assert producer.fs.syncs == ["journal.put"]
    assert list(bodies_by_id(producer.layout).values()) == [b"before"]

    producer.fs.fail = lambda *_: None
    producer.fs.syncs.clear()
    put(journal, b"after")
    assert producer.fs.syncs == [
        "journal.create",
        "journal.create_dir",
        "journal.note",
        "journal.put",
    ]
    assert journalfile.left_behind(producer.fs, producer.layout) == {broken: end}
    assert list(bodies_by_id(producer.layout).values()) == [b"before", b"after"]
    assert caught.value.ids[0] not in bodies_by_id(producer.layout, published=False)


def test_a_journal_left_behind_is_held_until_the_note_is_on_disk(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"before")
    (broken,) = journal_names(producer.layout)
    file = journalfile.open_journal(producer.fs, producer.layout, broken)
    assert file is not None
    producer.fs.fail = lambda operation, *_: errno.EIO if operation == "sync" else None
    with pytest.raises(SendInDoubt):
        put(journal, b"x")
    for _ in range(3):
        with pytest.raises(SpoolNotReady):
            put(journal, b"x")
    assert not file.hold()
    producer.fs.fail = lambda _, site, size: errno.EIO if site == "journal.note" else None
    with pytest.raises(SpoolNotReady):
        put(journal, b"x")
    assert not file.hold()
    producer.fs.fail = lambda *_: None
    put(journal, b"after")
    assert file.hold()
    file.close()


@pytest.mark.parametrize("mark_is_lost", [False, True])
def test_a_journal_left_behind_is_never_adopted(producer: Producer, mark_is_lost: bool) -> None:
    journal = producer.journal()
    put(journal, b"before")
    (broken,) = journal_names(producer.layout)
    end = os.path.getsize(producer.layout.journal(broken))
    producer.fs.fail = lambda _, site, size: errno.EIO if site == "journal.put" else None
    with pytest.raises(SendInDoubt):
        put(journal, b"x")
    producer.fs.fail = lambda *_: None
    if mark_is_lost:  # as a power cut takes it
        os.truncate(producer.layout.journal(broken), end)
    journal.close()
    for n in range(3):
        put(producer.journal(), b"%d" % n)
    assert [bytes(f.body(0)) for f in frames_of(producer.layout, broken)] == [b"before"]


def test_a_cut_that_fails_is_in_doubt(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"before")
    producer.fs.fail = lambda operation, site, _: errno.ENOSPC if site != "journal.put" else None
    with pytest.raises(SendInDoubt):
        put(journal, b"x")
    producer.fs.fail = lambda *_: None
    put(journal, b"after")
    assert len(journal_names(producer.layout)) == 2


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_note_about_the_journal_of_another_user_does_not_count(producer: Producer) -> None:
    journal = producer.journal()
    put(journal, b"before")
    (broken,) = journal_names(producer.layout)
    producer.fs.fail = lambda _, site, size: errno.EIO if site == "journal.put" else None
    with pytest.raises(SendInDoubt):
        put(journal, b"x")
    producer.fs.fail = lambda *_: None
    put(journal, b"after")
    assert journalfile.left_behind(producer.fs, producer.layout)
    os.chown(producer.layout.journal(broken), 12345, -1)
    assert journalfile.left_behind(producer.fs, producer.layout) == {}


@pytest.mark.parametrize("when", ["write", "journal.put", "publish"])
def test_an_interrupted_commit_counts_whole_or_not_at_all(producer: Producer, when: str) -> None:
    journal = producer.journal()
    put(journal, b"before")
    armed = True

    def interrupt(operation: str, site: str, size: int) -> int | None:
        nonlocal armed
        is_it = {"write": size > 16, "publish": size == 16}.get(when, site == when)
        if armed and is_it:
            armed = False
            raise KeyboardInterrupt
        return None

    producer.fs.fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        put(journal, *[bytes(1024)] * 100)
    put(journal, b"after")
    assert list(bodies_by_id(producer.layout).values()) == [b"before", b"after"]
    (name,) = journal_names(producer.layout)
    file = journalfile.open_journal(producer.fs, producer.layout, name)
    assert file is not None
    assert file.is_clean()
    file.close()


def test_an_interrupt_after_publishing_leaves_what_was_published(producer: Producer) -> None:
    class Late(FaultyFs):
        armed = False

        def write_at(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
            super().write_at(fd, pieces, offset)
            if self.armed and sum(map(len, pieces)) == 16:
                self.armed = False
                raise KeyboardInterrupt

    fs = producer.fs = Late()
    journal = producer.journal()
    put(journal, b"before")
    fs.armed = True
    with pytest.raises(KeyboardInterrupt):
        put(journal, b"came through")
    put(journal, b"after")
    assert list(bodies_by_id(producer.layout).values()) == [b"before", b"came through", b"after"]


def test_a_file_system_that_refuses_is_a_typed_error(producer: Producer) -> None:
    os.rename(producer.layout.journals, producer.layout.journals + ".gone")
    with pytest.raises(SpoolNotReady, match="no message was accepted"):
        put(producer.journal(), b"x")


def test_a_publishing_that_failed_and_took_effect_anyway_counts(producer: Producer) -> None:
    class Liar(FaultyFs):
        armed = False

        def write_at(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
            super().write_at(fd, pieces, offset)
            if self.armed and sum(map(len, pieces)) == 16:
                self.armed = False
                raise OSError(errno.EIO, "it was written all the same")

    fs = producer.fs = Liar()
    journal = producer.journal()
    put(journal, b"before")
    fs.armed = True
    put(journal, b"published")
    (first,) = journal_names(producer.layout)
    end = os.path.getsize(producer.layout.journal(first)) - 1  # the mark
    put(journal, b"after")
    assert journalfile.left_behind(fs, producer.layout) == {first: end}
    assert list(bodies_by_id(producer.layout).values()) == [b"before", b"published", b"after"]


def test_a_journal_without_entries_is_not_adopted_for_its_header_may_be_a_lie(
    producer: Producer,
) -> None:
    class NoUnlink(FaultyFs):
        def unlink(self, path: str) -> None:
            raise OSError(errno.EIO, "bad disk")

    fs = producer.fs = NoUnlink()
    fs.fail = lambda _, site, size: errno.EIO if site == "journal.create" else None
    journal = producer.journal()
    with pytest.raises(SpoolNotReady):
        put(journal, b"x")
    fs.fail = lambda *_: None
    (lying,) = journal_names(producer.layout)
    put(producer.journal(), b"y")
    assert frames_of(producer.layout, lying) == []
    assert len(bodies_by_id(producer.layout)) == 1
