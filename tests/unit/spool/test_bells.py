"""Bells: who is woken, who is not, and how a death is seen."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from droprd.spool import bells
from droprd.spool.bells import Bell, Waiting, WaitingBell, waiting_name
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, make_spool

FS = OsFs()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    make_spool(FS, str(tmp_path / "spool"), os.urandom)
    return Layout(str(tmp_path / "spool"))


@pytest.fixture
def consumer(layout: Layout) -> Iterator[Callable[..., WaitingBell]]:
    opened: list[WaitingBell] = []

    def make(*channels: str) -> WaitingBell:
        opened.append(WaitingBell(FS, layout, os.urandom))
        opened[-1].hear(channels)
        return opened[-1]

    yield make
    for bell in opened:
        bell.close()


@pytest.fixture
def waiting(layout: Layout) -> Iterator[Waiting]:
    opened = Waiting(FS, layout)
    yield opened
    opened.close()


def rung(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_the_outbox_bell_wakes_its_listener_again_and_again(layout: Layout) -> None:
    fd = bells.listen(layout.bell)
    bell = Bell(layout.bell)
    for _ in range(2):
        assert not rung(fd)
        bell.ring()
        bell.ring()
        assert rung(fd)
        assert bells.drain(fd)
        assert not bells.drain(fd)
    bell.close()
    os.close(fd)


def test_ringing_for_nobody_and_a_full_bell_do_no_harm(layout: Layout) -> None:
    bell = Bell(layout.bell)
    bell.ring()
    fd = bells.listen(layout.bell)
    for _ in range(70_000):
        bell.ring()
    assert bells.drain(fd)
    os.close(fd)
    bell.ring()
    bell.close()
    Bell(layout.bell + "-missing").ring()


def test_only_those_are_rung_whose_channels_got_something(
    waiting: Waiting, consumer: Callable[..., WaitingBell]
) -> None:
    sites, other = consumer("sites"), consumer("other")
    waiting.ring(["sites"])
    assert rung(sites.fd)
    assert not rung(other.fd)
    other.hear(["sites"])
    bells.drain(sites.fd)
    waiting.ring(["sites", "more"])
    assert rung(sites.fd)
    assert rung(other.fd)


def test_a_consumer_is_alive_until_its_descriptors_are_gone(
    waiting: Waiting, consumer: Callable[..., WaitingBell]
) -> None:
    bell = consumer("sites")
    assert waiting.alive(bell.consumer)
    assert not waiting.alive(b"?" * 16)
    bell.close_in_child()
    assert not waiting.alive(bell.consumer)
    waiting.ring(["sites"])


def test_a_death_wakes_who_watches(waiting: Waiting, consumer: Callable[..., WaitingBell]) -> None:
    bell = consumer("sites")
    fd = waiting.watch(bell.consumer)
    assert fd is not None
    poll = select.poll()
    poll.register(fd, 0)
    assert poll.poll(0) == []
    bell.close_in_child()
    assert poll.poll(0) == [(fd, select.POLLERR)]
    os.close(fd)
    assert waiting.watch(bell.consumer) is None


def test_somebody_else_with_the_fifo_open_does_not_keep_the_dead_alive(
    layout: Layout, waiting: Waiting, consumer: Callable[..., WaitingBell]
) -> None:
    bell = consumer()
    fd = bells.listen(f"{layout.waiting}/{waiting_name(bell.consumer, 0)}")
    bell.close_in_child()
    assert not waiting.alive(bell.consumer)
    os.close(fd)


def test_the_fifos_of_the_dead_are_removed_and_those_of_the_living_stay(
    layout: Layout, waiting: Waiting, consumer: Callable[..., WaitingBell]
) -> None:
    alive, dead = consumer("sites"), consumer("sites")
    dead.close_in_child()
    (Path(layout.waiting) / "something-else").touch()
    assert waiting.remove_orphans() == 1
    assert waiting.alive(alive.consumer)
    alive.close()
    assert os.listdir(layout.waiting) == ["something-else"]


def test_a_fifo_is_for_its_group_whatever_the_umask(
    layout: Layout, consumer: Callable[..., WaitingBell]
) -> None:
    before = os.umask(0o077)
    try:
        bell = consumer()
    finally:
        os.umask(before)
    name = waiting_name(bell.consumer, 0)
    assert os.stat(f"{layout.waiting}/{name}").st_mode & 0o777 == 0o660


@pytest.mark.parametrize(
    "name", ["", "-", "a-b", "0" * 32, "0" * 32 + "-" + "0" * 15, "G" * 32 + "-" + "0" * 16]
)
def test_other_names_are_no_consumers(name: str) -> None:
    assert bells.split_waiting_name(name) is None


def test_the_name_tells_who_and_for_what() -> None:
    bits = bells.channel_bits(["sites", "other"])
    assert bits == bells.channel_bits(["sites"]) | bells.channel_bits(["other"])
    assert bells.split_waiting_name(waiting_name(b"c" * 16, bits)) == (b"c" * 16, bits)
