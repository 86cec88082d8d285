"""fsck finds what is not as docs/spool.md says, and nothing on a healthy spool."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from droprd.core import entry
from droprd.model import Lane
from droprd.spool.clock import SystemClock
from droprd.spool.fsck import check_spool
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.journal import Journal
from droprd.spool.layout import Layout, make_spool
from droprd.spool.outbox import OutboxStore
from droprd.spool.puts import Put

FS = OsFs()
LANE = Lane("berlin", "sites", 5)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "spool"
    facts = make_spool(FS, str(root), os.urandom)
    spool = Spool(FS, SystemClock(), os.urandom, Layout(str(root)), facts.spool_id)
    journal = Journal(FS, spool.clock, os.urandom, spool.layout, facts.spool_id, uid=os.getuid())
    for number in range(10):
        journal.put(Put(LANE, [b"body %d" % number]))
    store = OutboxStore.open(spool)
    store.merge_all()
    store._merger.sync_lanes()
    journal.put(Put(LANE, [b"not synced"]))
    store.merge_all()
    journal.put(Put(LANE, [b"not merged"]))
    store.close()
    journal.close()
    return root


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def texts(root: Path) -> list[str]:
    return [str(f) for f in check_spool(FS, str(root)).findings]


def test_a_healthy_spool_has_no_findings(root: Path) -> None:
    report = check_spool(FS, str(root))
    assert report.findings == []
    assert report.ok
    assert report.messages == 23
    assert "all as it should be" in report.summary()


def test_a_flipped_bit_in_a_body_is_found_with_the_message_id(root: Path) -> None:
    path = Path(Layout(str(root)).lane_segment(*LANE, 1))
    flip(path, path.read_bytes().index(b"body 3"))
    report = check_spool(FS, str(root))
    assert not report.ok
    assert "do not match their checksums" in texts(root)[0]


def test_a_lost_entry_in_a_lane_is_found(root: Path) -> None:
    path = Path(Layout(str(root)).lane_segment(*LANE, 1))
    data = path.read_bytes()
    flip(path, data.rindex(entry.ENTRY_MAGIC, 0, data.index(b"body 3")))
    assert any("cannot be read" in t for t in texts(root))


def test_a_missing_lane_in_which_messages_wait_is_found(root: Path) -> None:
    os.unlink(Layout(str(root)).lane_segment(*LANE, 1))
    assert any("messages wait in it" in t for t in texts(root))


def test_a_missing_sender_log_is_found(root: Path) -> None:
    os.unlink(Layout(str(root)).sender_log)
    assert any(t.startswith("error [A2]") for t in texts(root))


def test_a_lane_that_lost_its_tail_is_found_to_be_mended(root: Path) -> None:
    path = Path(Layout(str(root)).lane_segment(*LANE, 1))
    os.truncate(path, path.stat().st_size - 10)
    assert any("[S5]" in t for t in texts(root))


def test_a_blob_is_on_its_way_only_while_it_is_a_part(root: Path) -> None:
    layout = Layout(str(root))
    Path(layout.inbox_blob("berlin", b"w" * 16)).write_bytes(b"whole")
    assert texts(root) == []
    Path(layout.inbox_blob_part("berlin", b"p" * 16)).write_bytes(b"par")
    [text] = texts(root)
    assert text.startswith("note [I7]")
    assert text.endswith(".part: is on its way")


def test_the_check_changes_nothing(root: Path) -> None:
    def picture() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    before = picture()
    check_spool(FS, str(root))
    assert picture() == before
