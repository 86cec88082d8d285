"""The small files below state/, the pauses in them, and the daemon's lock."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from droprd.errors import SpoolBusy, SpoolNotReady
from droprd.spool import state
from droprd.spool.daemonlock import DaemonLock, read_holder
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, make_spool

FS = OsFs()


@dataclass
class FakeClock:
    boot: bytes = bytes(16)
    boot_now: int = 0
    wall_now: int = 0

    def boot_id(self) -> bytes:
        return self.boot

    def boot_ns(self) -> int:
        return self.boot_now

    def wall_ns(self) -> int:
        return self.wall_now


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    make_spool(FS, str(tmp_path / "spool"), os.urandom)
    return Layout(str(tmp_path / "spool"))


def pause(**changes: object) -> state.Pause:
    given: dict[str, object] = {
        "who": "root",
        "reason": "",
        "receiving": False,
        "since_wall_ns": 0,
        "until_wall_ns": 100,
        "until_boot_ns": 50,
        "boot": bytes(16),
    }
    return state.Pause(**{**given, **changes})  # type: ignore[arg-type]  # as read from a file


def test_wishes_are_read_back_as_they_were_written(layout: Layout) -> None:
    wishes = state.Wishes({"berlin/sites": pause()}, {"": "root"})
    state.write_wishes(FS, layout, wishes)
    assert state.read_wishes(FS, layout) == wishes


def test_without_files_there_are_no_wishes_and_nothing_public(layout: Layout) -> None:
    assert state.read_wishes(FS, layout) == state.Wishes()
    assert state.read_public(FS, layout) is None
    assert state.read_gauges(FS, layout, "sender") == {}


def test_within_its_boot_a_pause_ends_by_boot_time_whatever_the_wall_clock_says() -> None:
    assert not pause().over(FakeClock(boot_now=49, wall_now=10**9))
    assert pause().over(FakeClock(boot_now=50, wall_now=0))


def test_after_a_reboot_a_pause_ends_by_the_wall_clock() -> None:
    other = b"x" * 16
    assert not pause().over(FakeClock(other, 10**9, 99))
    assert pause().over(FakeClock(other, 0, 100))


def test_a_pause_without_an_end_lasts() -> None:
    endless = pause(until_wall_ns=None, until_boot_ns=None)
    assert not endless.over(FakeClock(boot_now=10**18, wall_now=10**18))


def test_resume_lifts_what_lies_at_and_below_its_target() -> None:
    targets = ("", "berlin", "berlin/sites", "berlin/sites/5", "berlin2")
    wishes = state.Wishes({t: pause() for t in targets}, dict.fromkeys(targets, "root"))
    assert set(wishes.resumed("berlin").pauses) == {"", "berlin2"}
    assert set(wishes.resumed("berlin/sites").drains) == {"", "berlin", "berlin2"}
    assert wishes.resumed("") == state.Wishes({}, {})


@pytest.mark.parametrize("rubbish", [b"", b"\x93", b"\x01", b"\xc1", b"\x81\xa6pauses\x05"])
def test_rubbish_in_pauses_is_an_error_that_names_the_file(layout: Layout, rubbish: bytes) -> None:
    Path(layout.pauses).write_bytes(rubbish)
    with pytest.raises(SpoolNotReady) as caught:
        state.read_wishes(FS, layout)
    assert caught.value.code == "state_unreadable"
    assert layout.pauses in caught.value.what


def test_rubbish_in_gauges_is_ignored(layout: Layout) -> None:
    state.write_hint(FS, layout.gauges("sender"), b"\xc1")
    assert state.read_gauges(FS, layout, "sender") == {}
    state.write_hint(FS, layout.gauges("sender"), state.pack({"dead": 1}))
    assert state.read_gauges(FS, layout, "sender") == {"dead": 1}


def test_only_one_holds_the_lock_and_the_others_learn_who(layout: Layout) -> None:
    lock = DaemonLock.take(FS, layout, "droprd")
    with pytest.raises(SpoolBusy) as caught:
        DaemonLock.take(FS, layout, "droprctl")
    assert caught.value.pid == os.getpid()
    assert read_holder(FS, layout) == (os.getpid(), "droprd")
    lock.release()
    DaemonLock.take(FS, layout, "droprctl").release()
    assert read_holder(FS, layout) == (os.getpid(), "droprctl")


def test_a_lock_file_with_rubbish_names_nobody(layout: Layout) -> None:
    Path(layout.lock).write_bytes(b"\xff\xfe x y")
    assert read_holder(FS, layout) is None
