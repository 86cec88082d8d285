"""The consumer's side of an inbox: the rules on both stores, and what only files can suffer."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.errors import LeaseLost, SpoolCorrupt, SpoolFull, SpoolNotReady
from droprd.spool.claims import ClaimsFile
from droprd.spool.fsops import OsFs
from droprd.spool.inbox import FilesStream, InboxStore
from droprd.testing.inboxes import MemoryInbox
from droprd.testing.inboxsuite import InboxStoreSuite, OrderedInbox, bodies
from tests.inboxfiles import STREAM, Segments

ENTRY, NOTE = 52, 90


class TestFilesInbox(InboxStoreSuite):
    def make(self, tmp_path: Path) -> Segments:
        return Segments(tmp_path / "spool")


class TestFilesInboxWithTinySegments(InboxStoreSuite):
    def make(self, tmp_path: Path) -> Segments:
        return Segments(tmp_path / "spool", segment_bytes_max=4500)


class _Memory(MemoryInbox):
    def __init__(self) -> None:
        super().__init__()
        self.killed: list[InboxStore] = []

    def kill(self, store: InboxStore) -> None:
        store.close_in_child()
        self.killed.append(store)


class TestMemoryInbox(InboxStoreSuite):
    def make(self, tmp_path: Path) -> _Memory:
        return _Memory()


@pytest.fixture
def segments(tmp_path: Path) -> Segments:
    return Segments(tmp_path / "spool")


@pytest.fixture
def inbox(segments: Segments) -> Iterator[Inbox]:
    with Inbox(segments.layout.root) as opened:
        yield opened


def dead_reasons(segments: Segments) -> list[tuple[int, int, str]]:
    stream = FilesStream(segments.fs, segments.layout, *STREAM, segments.clock.boot_id())
    try:
        return [(first, end, why.reason) for first, end, why in stream.look().dead]
    finally:
        stream.close()


def test_a_corrupt_body_is_a_dead_letter_and_the_rest_goes_on(
    segments: Segments, inbox: Inbox
) -> None:
    segments.deliver([b"first", b"SECOND", b"third"])
    data = Path(segments.layout.inbox_segment(*STREAM, 1)).read_bytes()
    segments.damage(0, data.index(b"SECOND") - segments.offsets[0][2], b"sECOND")
    segments.deliver([b"fourth"])
    assert bodies(inbox.receive("sites")) == [b"first", b"third", b"fourth"]
    assert dead_reasons(segments) == [(1, 2, "corrupt")]


def test_an_unreadable_entry_is_dead_letters_as_many_as_it_held(
    segments: Segments, inbox: Inbox
) -> None:
    for n in range(4):
        segments.deliver([b"%d" % n] * 3)
    segments.damage(1, 0, b"XXXX")
    segments.damage(2, ENTRY + NOTE + 40, bytes(60))
    assert bodies(inbox.receive("sites")) == [b"0"] * 3 + [b"3"] * 3
    assert dead_reasons(segments) == [(3, 9, "corrupt")]


def test_a_frame_whose_count_is_damaged_costs_no_other(segments: Segments, inbox: Inbox) -> None:
    for n in range(4):
        segments.deliver([b"%d" % n] * 3)
    data = Path(segments.layout.inbox_segment(*STREAM, 1)).read_bytes()
    count_at = data.index(b"DRF1", segments.offsets[1][2]) + 10
    segments.damage(1, count_at - segments.offsets[1][2], b"\x09\x00")
    messages = inbox.receive("sites", max_messages=5)
    assert bodies(messages) == [b"0"] * 3 + [b"2"] * 2
    segments.open().close()
    with Inbox(segments.layout.root) as other:  # has to skip over it, unparsed
        assert bodies(other.receive("sites")) == [b"2"] + [b"3"] * 3


def test_damage_at_the_end_is_left_to_the_receiver(segments: Segments, inbox: Inbox) -> None:
    segments.deliver([b"0"])
    segments.deliver([b"1"])
    segments.damage(1, 0, b"XXXX")
    assert bodies(inbox.receive("sites")) == [b"0"]
    assert inbox.receive("sites") == []
    assert dead_reasons(segments) == []
    segments.deliver([b"2"])
    assert bodies(inbox.receive("sites")) == [b"2"]
    assert dead_reasons(segments) == [(1, 2, "corrupt")]


def test_in_an_ordered_channel_a_corrupt_message_holds_its_sender(segments: Segments) -> None:
    segments.deliver([b"first", b"SECOND", b"third"])
    segments.deliver([b"other"], sender="berlin")
    segments.deliver([b"fourth"])
    data = Path(segments.layout.inbox_segment(*STREAM, 1)).read_bytes()
    segments.damage(0, data.index(b"SECOND") - segments.offsets[0][2], b"sECOND")
    with OrderedInbox(store=segments.open) as inbox:
        messages = inbox.receive("sites")
        assert bodies(messages) == [b"first", b"other"]
        inbox.ack(messages)
        assert inbox.receive("sites") == []
        claims = ClaimsFile(segments.fs, segments.layout.claims(*STREAM), segments.clock.boot_id())
        with claims.locked():
            claims.append([[6, [[1, 2]], "purged"]])
        claims.close()
        assert bodies(inbox.receive("sites")) == [b"third", b"fourth"]


def test_seqs_that_were_never_used_are_passed_over(segments: Segments, inbox: Inbox) -> None:
    segments.segment_bytes_max = 1
    segments.deliver([b"0"])
    segments.next_seq[STREAM] = 1000
    segments.deliver([b"1"])
    messages = inbox.receive("sites")
    assert bodies(messages) == [b"0", b"1"]
    inbox.ack(messages)
    stream = FilesStream(segments.fs, segments.layout, *STREAM, segments.clock.boot_id())
    assert stream.look().lowest_open() == 1001
    stream.close()


def test_segments_that_went_while_claims_were_lost_are_forgotten(segments: Segments) -> None:
    segments.segment_bytes_max = 1
    for n in range(3):
        segments.deliver([b"%d" % n])
    os.unlink(segments.layout.inbox_segment(*STREAM, 1))
    with Inbox(segments.layout.root) as inbox:
        assert bodies(inbox.receive("sites")) == [b"1", b"2"]


def test_reading_goes_on_in_a_segment_that_was_deleted_meanwhile(
    segments: Segments, inbox: Inbox
) -> None:
    segments.deliver([b"x" * 30_000, b"y"])
    assert bodies(inbox.receive("sites", max_messages=1)) == [b"x" * 30_000]
    os.unlink(segments.layout.inbox_segment(*STREAM, 1))
    assert bodies(inbox.receive("sites")) == [b"y"]


def test_what_is_not_published_is_not_delivered(segments: Segments, inbox: Inbox) -> None:
    segments.deliver([b"0"])
    _, writer = segments.writers[STREAM]
    published = writer.synced_end
    segments.deliver([b"1"])
    writer.publish(published)
    assert bodies(inbox.receive("sites")) == [b"0"]


def test_claims_that_cannot_be_read_stop_only_their_channel(
    segments: Segments, inbox: Inbox
) -> None:
    segments.deliver([b"0"])
    segments.deliver([b"1"], channel="other")
    with open(segments.layout.claims(*STREAM), "r+b") as file:
        file.write(b"rubbish")
    assert bodies(inbox.receive("sites", "other")) == [b"1"]
    with pytest.raises(SpoolCorrupt):
        inbox.receive("sites")


def test_a_stopped_process_with_the_lock_delays_only_its_channel(
    segments: Segments, inbox: Inbox
) -> None:
    segments.deliver([b"0"])
    segments.deliver([b"1"], channel="other")
    stopped = ClaimsFile(segments.fs, segments.layout.claims(*STREAM), segments.clock.boot_id())
    with stopped.locked():
        assert bodies(inbox.receive("sites", "other")) == [b"1"]
        assert inbox.receive("sites") == []
    assert bodies(inbox.receive("sites", wait_s=10)) == [b"0"]
    stopped.close()


class NoRoom(OsFs):
    """A disk that is full from `full` on."""

    full = False

    def write_at(self, fd, pieces, offset):  # type: ignore[no-untyped-def]
        if self.full:
            super().write_at(fd, [bytes(pieces[0])[:20]], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write_at(fd, pieces, offset)


def test_an_ack_that_finds_no_room_says_so_and_can_be_tried_again(segments: Segments) -> None:
    segments.deliver([b"0"])
    segments.fs = fs = NoRoom()
    with Inbox(store=segments.open) as inbox:
        (message,) = inbox.receive("sites")
        fs.full = True
        with pytest.raises(SpoolFull):
            message.ack()
        fs.full = False
        message.ack()
        inbox.flush()
    with Inbox(segments.layout.root) as inbox:
        assert inbox.receive("sites") == []


def test_a_missing_spool_and_a_foreign_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpoolNotReady) as caught:
        Inbox(tmp_path / "nowhere")
    assert caught.value.code == "spool_missing"


def test_a_forked_child_is_a_consumer_of_its_own(segments: Segments, inbox: Inbox) -> None:
    segments.deliver([b"0", b"1"])
    (mine,) = inbox.receive("sites", max_messages=1)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            got = inbox.receive("sites")
            inbox.ack(got)
            inbox.close()
            os.write(writing, b",".join(bodies(got)))
        finally:
            os._exit(0)
    os.close(writing)
    assert os.read(reading, 100) == b"1"
    os.close(reading)
    assert os.waitpid(pid, 0)[1] == 0
    assert inbox.receive("sites") == []
    mine.ack()
    with pytest.raises(LeaseLost):
        mine.nack()


def test_a_message_may_be_settled_by_a_child_once(segments: Segments, inbox: Inbox) -> None:
    segments.deliver([b"0"])
    (message,) = inbox.receive("sites")
    pid = os.fork()
    if pid == 0:
        try:
            message.ack()
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with pytest.raises(LeaseLost):
        message.nack()


def test_a_forgotten_inbox_frees_its_leases(segments: Segments, inbox: Inbox) -> None:
    segments.deliver([b"0"])
    forgotten = Inbox(segments.layout.root)
    assert len(forgotten.receive("sites")) == 1
    del forgotten
    with pytest.warns(ResourceWarning):
        gc.collect()
    assert bodies(inbox.receive("sites")) == [b"0"]


def test_importing_the_inbox_is_light() -> None:
    code = (
        "import droprd.client.inbox, sys;"
        "heavy = {'aiohttp', 'pycurl', 'pydantic', 'asyncio'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
