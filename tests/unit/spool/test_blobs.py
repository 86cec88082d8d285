"""Blobs of the outbox: exactly the bytes given, with their checksums, or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import pytest

from droprd.errors import BadData
from droprd.spool.blobs import (
    Blob,
    copy_blob,
    move_blob,
    read_chunks,
    remove_blob,
    write_blob,
)
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout
from tests.spools import new_spool

JOURNAL = "a" * 32 + "-1.log"
FRAME_ID = b"F" * 14 + bytes(2)
Maker = Callable[[OsFs, Layout, bytes], Blob]


def from_bytes(fs: OsFs, layout: Layout, body: bytes) -> Blob:
    return write_blob(fs, layout, JOURNAL, FRAME_ID, body)


def from_file(fs: OsFs, layout: Layout, body: bytes) -> Blob:
    source = Path(layout.root) / "source"
    source.write_bytes(body + b"what came later")
    fd = os.open(source, os.O_RDONLY)
    try:
        return copy_blob(fs, layout, JOURNAL, FRAME_ID, fd, len(body))
    finally:
        os.close(fd)
        source.unlink()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_spool(tmp_path / "spool")


class SyncFs(OsFs):
    """Notes the syncs; fails at the named one, or when a write would pass `room` bytes."""

    def __init__(self, bad_site: str = "") -> None:
        self.bad_site = bad_site
        self.sites: list[str] = []

    def sync(self, fd: int, site: str) -> None:
        self._note(site)
        super().sync(fd, site)

    def sync_dir(self, path: str, site: str) -> None:
        self._note(site)
        super().sync_dir(path, site)

    def _note(self, site: str) -> None:
        self.sites.append(site)
        if site == self.bad_site:
            raise OSError(errno.EIO, "bad disk")


@pytest.mark.parametrize("make", [from_bytes, from_file])
@pytest.mark.parametrize("size", [0, 1, 1 << 20, (33 << 20) + 1])
def test_a_blob_holds_exactly_what_was_given(layout: Layout, make: Maker, size: int) -> None:
    body = os.urandom(size)
    fs = SyncFs()
    blob = make(fs, layout, body)
    path = Path(layout.journal_blob(JOURNAL, FRAME_ID))
    assert path.read_bytes() == body
    assert (blob.size, blob.crc, blob.sha256) == (size, crc32(body), hashlib.sha256(body).digest())
    assert fs.sites == ["blob.put", "blob.put_dir"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("make", [from_bytes, from_file])
@pytest.mark.parametrize("site", ["blob.put", "blob.put_dir"])
def test_a_failed_sync_leaves_no_blob(layout: Layout, make: Maker, site: str) -> None:
    with pytest.raises(OSError, match="bad disk"):
        make(SyncFs(site), layout, b"x" * 100_000)
    assert os.listdir(layout.outbox_blobs) == []


def test_a_source_that_ends_early_leaves_no_blob(layout: Layout, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"short")
    fd = os.open(source, os.O_RDONLY)
    with pytest.raises(OSError, match="ended early"):
        copy_blob(OsFs(), layout, JOURNAL, FRAME_ID, fd, 100)
    os.close(fd)
    assert os.listdir(layout.outbox_blobs) == []


def test_a_blob_can_move_to_another_journal_and_be_removed(layout: Layout) -> None:
    fs = SyncFs()
    blob = from_bytes(fs, layout, b"x")
    other = "b" * 32 + "-2.log"
    move_blob(fs, layout, blob, other)
    assert os.listdir(layout.outbox_blobs) == [f"{other}~{FRAME_ID.hex()}"]
    assert fs.sites[-1] == "blob.move_dir"
    remove_blob(fs, layout, blob)
    remove_blob(fs, layout, blob)
    assert os.listdir(layout.outbox_blobs) == []


def test_chunks_of_a_file_that_shrank_are_refused(layout: Layout) -> None:
    from_bytes(OsFs(), layout, b"12345")
    fd = os.open(layout.journal_blob(JOURNAL, FRAME_ID), os.O_RDONLY)
    assert b"".join(read_chunks(OsFs(), fd, 1, 4)) == b"234"
    with pytest.raises(BadData, match="ends early"):
        list(read_chunks(OsFs(), fd, 0, 6))
    os.close(fd)
