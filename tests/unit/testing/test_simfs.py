"""The simulated disk forgets what a real one may forget, and keeps what a real one must keep."""

from __future__ import annotations

import copy
import errno
import os
from random import Random

import pytest

from droprd.testing.simdisk import SECTOR_BYTES, SimDisk
from droprd.testing.simfs import Crash, Fault, SimFs

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL


def content(disk: SimDisk, path: str) -> bytes | None:
    fs = SimFs(disk, Random(0))
    if fs.stat(path) is None:
        return None
    fd = fs.open(path, os.O_RDONLY)
    data = fs.read_at(fd, fs.size(fd), 0)
    fs.close(fd)
    return data


def outcomes(disk: SimDisk, *paths: str, cuts: int = 400) -> set[tuple[bytes | None, ...]]:
    """Everything that power cuts of this disk left, by file."""
    found = set()
    for seed in range(cuts):
        cut = copy.deepcopy(disk)
        cut.power_cut(Random(seed))
        found.add(tuple(content(cut, p) for p in paths))
    return found


def made(fs: SimFs, path: str, data: bytes) -> int:
    fd = fs.open(path, NEW)
    fs.write_at(fd, [data], 0)
    return fd


@pytest.fixture
def fs() -> SimFs:
    return SimFs(SimDisk(), Random(1))


def test_what_is_written_can_be_read(fs: SimFs) -> None:
    fd = made(fs, "/a", b"hello")
    fs.write_at(fd, [b"J", b"EL"], 0)
    fs.write_at(fd, [b"!"], 8)
    assert fs.read_at(fd, 100, 0) == b"JELlo\0\0\0!"
    assert fs.read_at(fd, 2, 1) == b"EL"
    assert fs.size(fd) == 9
    fs.truncate(fd, 3)
    fs.truncate(fd, 5)
    assert fs.read_at(fd, 100, 0) == b"JEL\0\0"


def test_synced_bytes_and_names_survive_every_power_cut(fs: SimFs) -> None:
    fd = made(fs, "/a", b"x" * 2000)
    fs.sync(fd, "site")
    fs.sync_dir("/", "site")
    assert outcomes(fs.disk, "/a") == {(b"x" * 2000,)}


def test_a_synced_file_without_a_synced_name_may_be_gone(fs: SimFs) -> None:
    fd = made(fs, "/a", b"x")
    fs.sync(fd, "site")
    assert outcomes(fs.disk, "/a") == {(None,), (b"x",)}


def test_a_name_may_be_durable_before_its_bytes(fs: SimFs) -> None:
    made(fs, "/a", b"x" * 10)
    fs.sync_dir("/", "site")
    assert {(b"",), (b"x" * 10,), (bytes(10),)} <= outcomes(fs.disk, "/a")


def test_unsynced_writes_are_torn_at_sectors_and_survive_in_any_order(fs: SimFs) -> None:
    fd = made(fs, "/a", b"0" * 4 * SECTOR_BYTES)
    fs.sync(fd, "site")
    fs.sync_dir("/", "site")
    fs.write_at(fd, [b"1" * 2 * SECTOR_BYTES], 0)
    fs.write_at(fd, [b"2" * 2 * SECTOR_BYTES], 2 * SECTOR_BYTES)
    found = outcomes(fs.disk, "/a")
    whole = {bytes(o[0][i * SECTOR_BYTES] for i in range(4)) for o in found if o[0]}
    assert {b"0000", b"1122", b"1000", b"0022", b"1100", b"0102"[:2] + b"00"} <= whole | {b"0100"}
    assert b"0022" in whole, "a later write may survive without the earlier one"
    for (data,) in found:
        assert data is not None
        for i in range(4):
            sector = data[i * SECTOR_BYTES : (i + 1) * SECTOR_BYTES]
            assert len(set(sector)) == 1, "a sector is one write's or the other's"


def test_a_sector_holds_only_what_was_in_it_at_some_moment(fs: SimFs) -> None:
    fd = made(fs, "/a", b"aaaa")
    fs.sync(fd, "site")
    fs.sync_dir("/", "site")
    fs.write_at(fd, [b"b"], 0)
    fs.write_at(fd, [b"c"], 3)
    assert outcomes(fs.disk, "/a") == {(b"aaaa",), (b"baaa",), (b"baac",)}


def test_old_bytes_come_back_under_an_unsynced_cut(fs: SimFs) -> None:
    fd = made(fs, "/a", b"old" * 500)
    fs.sync(fd, "site")
    fs.sync_dir("/", "site")
    fs.truncate(fd, 0)
    fs.write_at(fd, [b"n" * SECTOR_BYTES], 0)
    found = {o[0] for o in outcomes(fs.disk, "/a")}
    old = b"old" * 500
    assert b"n" * SECTOR_BYTES + old[SECTOR_BYTES:] in found
    assert b"n" * SECTOR_BYTES in found
    assert old in found
    assert b"" in found


def test_a_synced_cut_brings_nothing_back(fs: SimFs) -> None:
    fd = made(fs, "/a", b"old" * 500)
    fs.sync(fd, "site")
    fs.sync_dir("/", "site")
    fs.truncate(fd, 100)
    fs.sync(fd, "site")
    fs.write_at(fd, [b"n"], 100)
    assert {o[0] for o in outcomes(fs.disk, "/a")} <= {
        (b"old" * 500)[:100] + tail for tail in (b"", b"n", b"\0")
    }


def test_a_kill_keeps_everything_but_descriptors_and_locks(fs: SimFs) -> None:
    fd = made(fs, "/a", b"kept")
    assert fs.try_lock(fd)
    other = SimFs(fs.disk, Random(2))
    other_fd = other.open("/a", os.O_RDWR)
    assert not other.try_lock(other_fd)
    fs.die()
    assert other.try_lock(other_fd)
    assert content(fs.disk, "/a") == b"kept"


def test_the_dead_do_nothing_more(fs: SimFs) -> None:
    fd = made(fs, "/a", b"x")
    fs.die()
    for call in (
        lambda: fs.write_at(fd, [b"y"], 0),
        lambda: fs.read_at(fd, 1, 0),
        lambda: fs.sync(fd, "s"),
        lambda: fs.unlink("/a"),
        lambda: fs.open("/a", os.O_RDONLY),
        lambda: fs.listdir("/"),
        lambda: fs.stat("/a"),
    ):
        with pytest.raises(Crash):
            call()
    assert content(fs.disk, "/a") == b"x"


def test_shared_locks_go_together_and_exclude_an_exclusive_one(fs: SimFs) -> None:
    made(fs, "/gate", b"")
    a, b, c = (fs.open("/gate", os.O_RDWR) for _ in range(3))
    assert fs.try_lock(a, shared=True)
    assert fs.try_lock(b, shared=True)
    assert not fs.try_lock(c)
    fs.unlock(a)
    fs.close(b)
    assert fs.try_lock(c)
    assert not fs.try_lock(a, shared=True)


def test_names_survive_in_any_combination_until_their_directory_is_synced(fs: SimFs) -> None:
    for name in ("/a", "/b"):
        fs.close(made(fs, name, b""))
    fs.sync_dir("/", "site")
    fs.unlink("/a")
    fs.unlink("/b")
    fs.close(made(fs, "/c", b""))
    found = outcomes(fs.disk, "/a", "/b", "/c")
    assert len(found) == 8
    fs.sync_dir("/", "site")
    assert outcomes(fs.disk, "/a", "/b", "/c") == {(None, None, b"")}


def test_a_rename_is_all_or_nothing(fs: SimFs) -> None:
    for name, data in (("/a", b"old"), ("/a.new", b"new")):
        fd = made(fs, name, data)
        fs.sync(fd, "site")
    fs.sync_dir("/", "site")
    fs.rename("/a.new", "/a")
    assert outcomes(fs.disk, "/a", "/a.new") == {(b"old", b"new"), (b"new", None)}


def test_a_rename_between_directories_is_durable_with_either_of_them(fs: SimFs) -> None:
    fs.mkdir("/d")
    fd = made(fs, "/a", b"data")
    fs.sync(fd, "site")
    fs.sync_dir("/", "site")
    fs.rename("/a", "/d/b")
    fs.sync_dir("/d", "site")
    assert outcomes(fs.disk, "/a", "/d/b") == {(None, b"data")}


def test_a_file_in_an_unsynced_directory_may_be_gone_with_it(fs: SimFs) -> None:
    fs.mkdir("/d")
    fd = made(fs, "/d/a", b"data")
    fs.sync(fd, "site")
    fs.sync_dir("/d", "site")
    assert outcomes(fs.disk, "/d/a") == {(None,), (b"data",)}


def test_after_a_failed_sync_the_next_one_promises_nothing(fs: SimFs) -> None:
    fd = made(fs, "/a", b"x")
    fs.sync_dir("/", "site")
    fs.interrupt = lambda fs, operation: Fault.EIO
    fs.alarm = fs.steps + 1
    with pytest.raises(OSError, match="Input/output"):
        fs.sync(fd, "site")
    assert fs.read_at(fd, 1, 0) == b"x", "the cache goes on showing it"
    found = set()
    for seed in range(50):
        disk = SimDisk()
        again = SimFs(disk, Random(seed))
        fd = made(again, "/a", b"x")
        again.sync_dir("/", "site")
        again.interrupt = lambda fs, operation: Fault.EIO
        again.alarm = again.steps + 1
        with pytest.raises(OSError):
            again.sync(fd, "site")
        again.sync(fd, "site")
        found |= outcomes(disk, "/a", cuts=5)
    assert {(b"",), (b"x",)} <= found


def test_a_disabled_site_syncs_nothing_and_is_counted() -> None:
    disk = SimDisk(disable_sites=frozenset({"lazy"}))
    fs = SimFs(disk, Random(1))
    fd = made(fs, "/a", b"x")
    fs.sync_dir("/", "honest")
    fs.sync(fd, "lazy")
    assert (b"",) in outcomes(disk, "/a")
    assert disk.syncs == {"honest": 1, "lazy": 1}


def test_a_crash_comes_before_or_within_a_chosen_step(fs: SimFs) -> None:
    fd = made(fs, "/a", b"")
    seen = []

    def interrupt(fs: SimFs, operation: str) -> Fault:
        seen.append(operation)
        return Fault.DIE_HALFWAY

    fs.interrupt = interrupt
    fs.alarm = fs.steps + 2
    fs.write_at(fd, [b"one"], 0)
    with pytest.raises(Crash):
        fs.write_at(fd, [b"2" * 10_000], 3)
    assert seen == ["write"]
    left = content(fs.disk, "/a")
    assert left is not None
    assert left.startswith(b"one")
    assert len(left) in (3, 4096, 8192, 10_003), "kernels stop between pages only"


def test_a_full_disk_takes_overwrites_but_no_growth(fs: SimFs) -> None:
    fd = made(fs, "/a", b"abcdef")
    fs.disk.full = True
    fs.write_at(fd, [b"X"], 0)
    with pytest.raises(OSError) as caught:
        fs.write_at(fd, [b"y" * 100], 6)
    assert caught.value.errno == errno.ENOSPC
    assert fs.read_at(fd, 6, 0) == b"Xbcdef"


def test_a_copy_of_a_disk_goes_its_own_way(fs: SimFs) -> None:
    fd = made(fs, "/a", b"x")
    twin = fs.disk.clone()
    fs.write_at(fd, [b"y"], 0)
    assert content(twin, "/a") == b"x"
    twin.power_cut(Random(1))
    assert content(twin, "/a") == b"x", "a finished copy is durable"
    fs.disk.put_back(twin)
    assert content(fs.disk, "/a") == b"x"


def test_missing_files_and_taken_names_raise_what_the_system_raises(fs: SimFs) -> None:
    with pytest.raises(FileNotFoundError):
        fs.open("/nothing", os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        fs.open("/no/dir", NEW)
    with pytest.raises(FileNotFoundError):
        fs.unlink("/nothing")
    fs.mkdir("/d")
    with pytest.raises(FileExistsError):
        fs.mkdir("/d")
    fs.close(made(fs, "/d/a", b""))
    with pytest.raises(FileExistsError):
        fs.open("/d/a", NEW)
    with pytest.raises(OSError, match="not empty"):
        fs.rmdir("/d")
    assert fs.stat("/d/nothing") is None
    assert fs.stat("/none/nothing") is None
    assert fs.listdir("/d") == ["a"]
    found = fs.stat("/d")
    assert found is not None
    assert found.is_dir


def test_the_same_seed_gives_the_same_disk() -> None:
    def run() -> bytes | None:
        disk = SimDisk()
        fs = SimFs(disk, Random(3))
        fd = made(fs, "/a", os.urandom(0) + bytes(range(256)) * 20)
        fs.sync_dir("/", "site")
        fs.write_at(fd, [b"z" * 3000], 700)
        disk.power_cut(Random(5))
        return content(disk, "/a")

    assert run() == run()
