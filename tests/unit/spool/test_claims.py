"""The claims file: shared, torn, replaced, damaged, on a disk that fails."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.core.claimops import op_ack, op_lease, op_reject
from droprd.core.entry import FILE_HEADER_BYTES
from droprd.errors import SpoolBusy, SpoolCorrupt
from droprd.spool import log
from droprd.spool.claims import ClaimsFile, create_claims
from droprd.spool.fsops import OsFs
from droprd.testing.inboxes import eventually

BOOT = b"b" * 16
ME = b"m" * 16


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "claims")
    create_claims(OsFs(), path, log_id=b"i" * 16, spool_id=bytes(16), wall_ns=1)
    return path


@pytest.fixture
def claims(path: str) -> Iterator[ClaimsFile]:
    opened = ClaimsFile(OsFs(), path, BOOT)
    yield opened
    opened.close()


@pytest.fixture
def other(path: str) -> Iterator[ClaimsFile]:
    opened = ClaimsFile(OsFs(), path, BOOT)
    yield opened
    opened.close()


def lease(claims: ClaimsFile, first: int, end: int) -> int:
    with claims.locked() as state:
        number = state.lease_next
        claims.append([op_lease(ME, BOOT, 10**18, [(first, end)])])
    return number


def test_its_group_may_write_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        path = str(tmp_path / "claims")
        create_claims(OsFs(), path, log_id=b"i" * 16, spool_id=bytes(16), wall_ns=1)
    finally:
        os.umask(before)
    assert os.stat(path).st_mode & 0o777 == 0o660


def test_whoever_holds_the_lock_has_read_what_the_others_wrote(
    claims: ClaimsFile, other: ClaimsFile
) -> None:
    number = lease(claims, 0, 10)
    with other.locked() as state:
        assert state.leased == 10
        other.append([op_ack(number, [(0, 10)])])
    with claims.locked() as state:
        assert state.counts["acked"] == 10


def test_looking_without_the_lock_shows_what_was_written(
    claims: ClaimsFile, other: ClaimsFile
) -> None:
    assert other.look().leased == 0
    lease(claims, 0, 10)
    assert other.look().leased == 10


def test_the_lock_is_given_up_on_in_time(claims: ClaimsFile, other: ClaimsFile) -> None:
    with claims.locked():
        with pytest.raises(SpoolBusy):
            other.acquire(0.01)
    other.acquire(0.01)
    other.release()


def test_a_note_that_somebody_died_over_is_cut(path: str, claims: ClaimsFile) -> None:
    lease(claims, 0, 10)
    whole = os.path.getsize(path)
    lease(claims, 10, 20)
    claims.close()
    os.truncate(path, os.path.getsize(path) - 5)
    assert claims.look().leased == 10
    assert lease(claims, 10, 11) == 2
    assert os.path.getsize(path) < whole + 200
    claims.close()
    assert claims.look().leased == 11


def test_zeros_after_a_power_cut_are_no_notes(path: str, claims: ClaimsFile) -> None:
    lease(claims, 0, 10)
    claims.close()
    os.truncate(path, os.path.getsize(path) + 5000)
    lease(claims, 10, 20)
    claims.close()
    assert claims.look().leased == 20


def test_damage_in_what_was_synced_is_told(path: str, claims: ClaimsFile) -> None:
    lease(claims, 0, 10)
    assert claims.sync()
    claims.close()
    with open(path, "r+b") as file:
        file.seek(FILE_HEADER_BYTES + 60)
        file.write(b"X")
    with pytest.raises(SpoolCorrupt):
        claims.look()
    with pytest.raises(SpoolCorrupt):
        claims.acquire()


def test_a_damaged_file_is_replaced_by_its_readable_part(
    path: str, claims: ClaimsFile, other: ClaimsFile
) -> None:
    number = lease(claims, 0, 10)
    at = claims.end
    with claims.locked():
        claims.append([op_ack(number, [(0, 10)])])
    claims.sync()
    claims.close()
    with open(path, "r+b") as file:
        file.seek(at + 55)
        file.write(b"X")
    damaged = Path(path).read_bytes()
    assert other.salvage(b"j" * 16, bytes(16), 2) == damaged
    assert claims.look().leased == 10
    assert other.look().leased == 10


def test_a_file_without_a_header_is_replaced_by_an_empty_one(path: str, claims: ClaimsFile) -> None:
    Path(path).write_bytes(b"rubbish")
    with pytest.raises(SpoolCorrupt):
        claims.look()
    assert claims.salvage(b"j" * 16, bytes(16), 2) == b"rubbish"
    assert claims.look().fresh == 0


def test_a_shorter_file_takes_over_under_the_others_feet(
    path: str, claims: ClaimsFile, other: ClaimsFile
) -> None:
    for n in range(200):
        number = lease(claims, n, n + 1)
        with claims.locked():
            claims.append(
                [
                    op_reject(number, [(n, n + 1)], "no", 1)
                    if n == 7
                    else op_ack(number, [(n, n + 1)])
                ]
            )
    assert other.look().fresh == 200
    size = os.path.getsize(path)
    with claims.locked():
        claims.replace(b"j" * 16, 2)
    assert os.path.getsize(path) < size / 5
    assert other.look().counts["acked"] == 199
    assert lease(other, 200, 201) == 201
    assert list(claims.look().dead) == [(7, 8, ("no", 1, 1))]
    assert claims.look().leased == 1


def test_who_waited_for_the_lock_of_a_replaced_file_takes_the_new_one(
    claims: ClaimsFile, other: ClaimsFile
) -> None:
    other.look()
    with claims.locked():
        waiting = threading.Thread(target=lease, args=(other, 0, 5))
        waiting.start()
        claims.replace(b"j" * 16, 2)
    waiting.join(10)
    assert claims.look().leased == 5


def test_one_sync_serves_all(path: str, claims: ClaimsFile, other: ClaimsFile) -> None:
    lease(claims, 0, 5)
    other.look()
    assert claims.sync()
    assert not claims.sync()
    assert not other.sync()
    fd = os.open(path, os.O_RDONLY)
    assert log.read_published(OsFs(), fd) == os.path.getsize(path)
    os.close(fd)


class BadDisk(OsFs):
    """Fails each sync."""

    def sync(self, fd: int, site: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_after_a_failed_sync_nothing_more_goes_into_that_file(path: str, other: ClaimsFile) -> None:
    claims = ClaimsFile(BadDisk(), path, BOOT)
    number = lease(claims, 0, 5)
    with pytest.raises(OSError, match="Input/output"):
        claims.sync()
    with pytest.raises(SpoolCorrupt):
        claims.sync()
    with claims.locked(), pytest.raises(SpoolCorrupt):
        claims.append([op_ack(number, [(0, 5)])])
    assert other.salvage(b"j" * 16, bytes(16), 2)
    with claims.locked() as state:
        assert state.leased == 5
        claims.append([op_ack(number, [(0, 5)])])
    claims.close()


def test_many_threads_with_views_of_their_own_agree(path: str) -> None:
    views = [ClaimsFile(OsFs(), path, BOOT) for _ in range(4)]

    def work(view: ClaimsFile) -> None:
        for _ in range(100):
            with view.locked() as state:
                number, first = state.lease_next, state.fresh
                view.append([op_lease(ME, BOOT, 10**18, [(first, first + 1)])])
            with view.locked():
                view.append([op_ack(number, [(first, first + 1)])])

    threads = [threading.Thread(target=work, args=(view,)) for view in views]
    for thread in threads:
        thread.start()
    eventually(lambda: not any(thread.is_alive() for thread in threads), within_s=60)
    for view in views:
        assert view.look().counts["acked"] == 400
        view.close()


def test_a_failed_sync_is_told_to_all_who_share_the_file(path: str, other: ClaimsFile) -> None:
    claims = ClaimsFile(BadDisk(), path, BOOT)
    lease(claims, 0, 5)
    with pytest.raises(OSError, match="Input/output"):
        claims.sync()
    claims.close()
    with pytest.raises(SpoolCorrupt):
        lease(other, 5, 6)
    with pytest.raises(SpoolCorrupt):
        other.sync()
    other.salvage(b"j" * 16, bytes(16), 2)
    lease(other, 5, 6)
    assert other.sync()
