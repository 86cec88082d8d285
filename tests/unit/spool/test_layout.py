"""A spool is made once, by `make_spool` only, and everything else is refused unchanged."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from droprd.errors import InvalidName, SpoolNotReady, UsageError
from droprd.spool import layout
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, SharedRights, make_spool, read_version


def _tree(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path)] = (mode, path.read_bytes() if stat.S_ISREG(mode) else b"")
    return found


def test_a_spool_that_was_made_is_recognised(tmp_path: Path) -> None:
    root = str(tmp_path / "spool")
    made = make_spool(OsFs(), root, os.urandom)
    assert read_version(OsFs(), root) == made
    assert len(made.spool_id) == 16


def test_two_spools_have_different_ids(tmp_path: Path) -> None:
    one = make_spool(OsFs(), str(tmp_path / "a"), os.urandom)
    two = make_spool(OsFs(), str(tmp_path / "b"), os.urandom)
    assert one.spool_id != two.spool_id


def test_a_private_spool_is_closed_to_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_spool(OsFs(), str(tmp_path / "spool"), os.urandom)
    finally:
        os.umask(before)
    for path in [tmp_path / "spool", *(tmp_path / "spool").rglob("*")]:
        assert path.lstat().st_mode & 0o077 == 0, path


def test_an_empty_directory_becomes_a_private_spool(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    root.mkdir(mode=0o755)
    (root / "lost+found").mkdir()
    make_spool(OsFs(), str(root), os.urandom)
    assert root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("done", range(1, len(layout.RIGHTS) + 1))
def test_a_half_made_spool_is_no_spool_and_can_be_finished(tmp_path: Path, done: int) -> None:
    root = tmp_path / "spool"
    for rights in layout.RIGHTS[:done]:
        path = root / rights.path
        if rights.kind == "dir":
            path.mkdir()
        elif rights.kind == "fifo":
            os.mkfifo(path)
        else:
            path.touch()
    with pytest.raises(SpoolNotReady) as caught:
        read_version(OsFs(), str(root))
    assert caught.value.code == "spool_missing"
    made = make_spool(OsFs(), str(root), os.urandom)
    assert read_version(OsFs(), str(root)) == made


@pytest.mark.parametrize("what", ["spool", "stranger", "file"])
def test_what_is_there_is_never_touched(tmp_path: Path, what: str) -> None:
    root = tmp_path / "spool"
    if what == "spool":
        make_spool(OsFs(), str(root), os.urandom)
    elif what == "stranger":
        (root / "outbox").mkdir(parents=True)
        (root / "outbox" / "sender.log").write_bytes(b"messages")
    else:
        root.write_bytes(b"something")
    before = _tree(tmp_path)
    with pytest.raises(SpoolNotReady) as caught:
        make_spool(OsFs(), str(root), os.urandom)
    assert caught.value.code == "spool_exists"
    assert _tree(tmp_path) == before


def test_a_missing_directory_is_a_missing_spool(tmp_path: Path) -> None:
    for root in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SpoolNotReady) as caught:
            read_version(OsFs(), str(root))
        assert caught.value.code == "spool_missing"
        assert "droprctl init" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", [b"droprd-spool 2\nid " + b"0" * 32 + b"\n", b"", b"droprd-spool 1\n", b"\0" * 60]
)
def test_a_spool_of_another_version_is_refused_unchanged(tmp_path: Path, text: bytes) -> None:
    root = tmp_path / "spool"
    make_spool(OsFs(), str(root), os.urandom)
    (root / "VERSION").write_bytes(text)
    before = _tree(tmp_path)
    with pytest.raises(SpoolNotReady) as caught:
        read_version(OsFs(), str(root))
    assert caught.value.code == "spool_version"
    assert _tree(tmp_path) == before


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_shared_spool_lets_its_groups_in_where_they_make_files(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    make_spool(OsFs(), str(root), os.urandom, SharedRights(64001, 64002, 64003, 64004))

    def of(path: str) -> tuple[int, int, int]:
        found = (root / path).lstat()
        return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)

    assert of("") == (64001, 64002, 0o755)
    assert of("outbox/journals") == (64001, 64003, 0o3770)
    assert of("outbox/blobs") == (64001, 64003, 0o3770)
    assert of("inbox/waiting") == (64001, 64004, 0o3770)
    assert of("inbox/channels") == (64001, 64004, 0o2750)
    assert of("outbox/bell") == (64001, 64003, 0o660)
    assert of("VERSION") == (64001, 64002, 0o644)
    assert of("corrupt") == (64001, 64002, 0o700)


def test_names_of_files_are_read_back() -> None:
    assert layout.segment_number(layout.segment_name(7)) == 7
    assert layout.segment_number(layout.segment_name(123456789)) == 123456789
    for strange in ("7.log", "0000000a.log", "000000007.log", "00000007.log.new", "+0000007.log"):
        assert layout.segment_number(strange) is None
    maker = bytes(range(16))
    name = layout.journal_name(maker, 12)
    assert layout.split_journal_name(name) == (maker, 12)
    paths = Layout("/s")
    blob = os.path.basename(paths.journal_blob(name, maker))
    assert layout.split_outbox_blob_name(blob) == (name, maker)
    assert layout.split_outbox_blob_name(maker.hex()) == (None, maker)
    assert layout.split_outbox_blob_name("x") is None
    arriving = os.path.basename(paths.inbox_blob_part("berlin", maker))
    assert layout.split_inbox_blob_name(arriving) == ("berlin", maker, False)
    assert layout.split_inbox_blob_name(f"berlin~{maker.hex()}") == ("berlin", maker, True)


def test_a_name_from_outside_never_leaves_the_spool() -> None:
    paths = Layout("/s")
    for bad in ("..", "a/b", "", "A", "../../etc"):
        with pytest.raises(InvalidName):
            paths.lane(bad, "common", 5)
        with pytest.raises(InvalidName):
            paths.stream(bad, 5)
        with pytest.raises(InvalidName):
            paths.inbox_blob(bad, bytes(16))
    with pytest.raises(UsageError):
        paths.stream("common", 10)
