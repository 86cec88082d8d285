"""The log: what was synced is read again, whatever happened to the file since."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from droprd.core.entry import ENTRY_BYTES, FILE_HEADER_BYTES, Kind
from droprd.core.frame import Stamp, build, new_frame_id
from droprd.errors import BadData
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.fsops import Buffer, OsFs

LANE = Lane("berlin", "sites", 5)


def new_log(directory: Path, fs: OsFs | None = None) -> log.LogWriter:
    return log.create(
        fs or OsFs(),
        str(directory / "a.log"),
        Kind.LANE,
        log_id=b"L" * 16,
        spool_id=b"S" * 16,
        wall_ns=1,
        site="test",
    )


def frame(bodies: Sequence[bytes]) -> tuple[list[Buffer], int]:
    pieces = build(
        frame_id=new_frame_id(1, os.urandom(10)),
        lane=LANE,
        stamp=Stamp(b"B" * 16, 1, 2),
        bodies=bodies,
    )
    return pieces, sum(map(len, pieces))


def walk(path: Path, promised: int | None = None) -> tuple[list[bytes], list[log.Damage], int]:
    fs = OsFs()
    fd = fs.open(str(path), os.O_RDONLY)
    try:
        header = log.read_header(fs, fd)
        limit = log.read_published(fs, fd) if promised is None else promised
        walker = log.Walk(fs, fd, header.log_id, promised=limit)
        items = list(walker)
        notes = [bytes(i.note) for i in items if isinstance(i, log.Entry)]
        return notes, [i for i in items if isinstance(i, log.Damage)], walker.end
    finally:
        fs.close(fd)


def test_what_was_synced_is_read_again_in_order(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    for number in range(200):
        pieces, size = frame([b"x" * number] * 3)
        writer.append(b"%d" % number, pieces, size)
    end = writer.sync("test")
    notes, damage, walked_to = walk(tmp_path / "a.log")
    assert notes == [b"%d" % n for n in range(200)]
    assert not damage
    assert walked_to == end


def test_nothing_is_published_before_it_is_synced(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    writer.append(b"note")
    writer.flush()
    assert log.read_published(writer.fs, writer.fd) == FILE_HEADER_BYTES
    end = writer.sync("test")
    assert log.read_published(writer.fs, writer.fd) == end


def test_a_torn_tail_is_cut_and_set_aside(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    writer.append(b"one")
    end = writer.sync("test")
    pieces, size = frame([b"body" * 100])
    writer.append(b"", pieces, size)
    writer.flush()
    os.ftruncate(writer.fd, writer.end - 10)
    writer.close()
    aside: list[tuple[int, int]] = []
    recovered = log.recover(
        OsFs(),
        str(tmp_path / "a.log"),
        Kind.LANE,
        site="test",
        set_aside=lambda path, offset, data: aside.append((offset, len(data))),
    )
    assert recovered.writer.end == end
    assert not recovered.damage
    assert aside == [(end, ENTRY_BYTES + size - 10)]
    assert os.path.getsize(tmp_path / "a.log") == end


def test_damage_before_the_synced_end_is_reported_and_the_rest_is_kept(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    offsets = [writer.append(b"note %d" % n) for n in range(10)]
    writer.sync("test")
    os.pwrite(writer.fd, b"?", offsets[4] + ENTRY_BYTES + 2)
    notes, damage, _ = walk(tmp_path / "a.log")
    assert notes == [b"note %d" % n for n in range(10) if n != 4]
    assert damage == [log.Damage(offsets[4], offsets[5])]


def test_damage_is_noticed_by_a_later_entry_though_the_published_end_is_old(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    first = writer.append(b"first")
    writer.sync("test")
    second = writer.append(b"second")
    writer.sync("test")
    os.pwrite(writer.fd, b"?", first + ENTRY_BYTES)
    notes, damage, _ = walk(tmp_path / "a.log", promised=FILE_HEADER_BYTES)
    assert notes == [b"second"]
    assert damage == [log.Damage(first, second)]


def test_stale_bytes_of_the_same_log_elsewhere_never_count(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    first = writer.append(b"same size")
    second = writer.append(b"same size")
    end = writer.sync("test")
    stale = os.pread(writer.fd, second - first, first)
    os.pwrite(writer.fd, stale, end)
    notes, damage, walked_to = walk(tmp_path / "a.log")
    assert len(notes) == 2
    assert not damage
    assert walked_to == end


def test_every_flipped_bit_of_an_entry_is_detected(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    pieces, size = frame([b"a", b"bc"])
    start = writer.append(b"note", pieces, size)
    end = writer.append(b"after")
    writer.sync("test")
    good = os.pread(writer.fd, end - start, start)
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        os.pwrite(writer.fd, bad, start)
        walker = log.Walk(writer.fs, writer.fd, b"L" * 16, promised=0)
        items = [i for i in walker if isinstance(i, log.Entry)]
        whole = [i for i in items if i.head.offset == start]
        assert not whole or not log.frame_is_whole(whole[0].frame, whole[0].note), bit


def test_a_cut_back_takes_the_bytes_off_the_disk(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    writer.append(b"kept")
    end = writer.sync("test")
    writer.append(b"dropped")
    writer.flush()
    writer.cut_back("test")
    assert os.path.getsize(tmp_path / "a.log") == end
    writer.append(b"next")
    writer.sync("test")
    assert walk(tmp_path / "a.log")[0] == [b"kept", b"next"]


class FailingSync(OsFs):
    def __init__(self) -> None:
        self.failing = False
        self.calls = 0

    def sync(self, fd: int, site: str) -> None:
        self.calls += 1
        if self.failing:
            raise OSError(errno.EIO, "injected")
        super().sync(fd, site)


def test_a_failed_sync_is_never_repeated(tmp_path: Path) -> None:
    fs = FailingSync()
    writer = new_log(tmp_path, fs)
    writer.append(b"one")
    fs.failing = True
    with pytest.raises(OSError, match="injected"):
        writer.sync("test")
    calls = fs.calls
    fs.failing = False
    writer.append(b"two")
    with pytest.raises(log.LogBroken):
        writer.sync("test")
    assert fs.calls == calls


def test_a_prepared_log_reads_like_any_other(tmp_path: Path) -> None:
    writer = new_log(tmp_path)
    for number in range(50):
        writer.append(b"%d" % number)
        writer.sync("test", prepare_bytes=1000)
    writer.close()
    notes, damage, _ = walk(tmp_path / "a.log")
    assert len(notes) == 50
    assert not damage
    assert log.recover(OsFs(), str(tmp_path / "a.log"), Kind.LANE, site="test").writer.end


def test_a_file_of_another_kind_or_version_is_refused(tmp_path: Path) -> None:
    new_log(tmp_path).close()
    with pytest.raises(BadData):
        log.recover(OsFs(), str(tmp_path / "a.log"), Kind.CLAIMS, site="test")
    (tmp_path / "b.log").write_bytes(b"nonsense" * 1000)
    with pytest.raises(BadData):
        log.recover(OsFs(), str(tmp_path / "b.log"), Kind.LANE, site="test")
