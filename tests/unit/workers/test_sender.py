"""The sender as a process of its own, from journals to a far node's inbox."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from droprd.core import frame
from droprd.model import Lane
from droprd.net.service import Refused
from droprd.spool.blobs import write_blob
from droprd.spool.clock import SystemClock
from droprd.spool.hearsay import Hearsay
from droprd.spool.lanes import WRITERS_MAX
from droprd.spool.layout import Layout, make_spool
from droprd.spool.puts import Put
from tests.unit.workers.farnode import FS, FarNode, NearNode, serving, until

Test = Callable[[NearNode, FarNode, int], Awaitable[None]]


def run(tmp_path: Path, test: Test) -> None:
    """Run `test` with a near node, a far node that does not serve yet, and the far node's port."""

    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (tmp_path / "near").mkdir()
        near = NearNode(tmp_path / "near", port)
        root = str(tmp_path / "far")
        far = FarNode(Layout(root), make_spool(FS, root, os.urandom).spool_id)
        try:
            await test(near, far, port)
        finally:
            if near.sender is not None and near.sender.process.poll() is None:
                near.sender.kill()
            near.journal.close()

    asyncio.run(main())


def numbered(count: int, size: int = 20) -> list[bytes]:
    return [f"{i:08d}".encode().ljust(size, b".") for i in range(count)]


def test_what_was_sent_before_the_start_and_after_it_arrives_in_order(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        bodies = numbered(5000)
        near.send(*bodies[:3000])
        async with serving(far, port):
            sender = await near.start()
            for i in range(3000, 5000, 10):
                near.send(*bodies[i : i + 10])
            await until(lambda: len(far.bodies("a")) == 5000)
            assert far.bodies("a") == bodies
            await until(lambda: sender.peer().get("delivered") == 5000)
            assert (sender.peer()["queued"], sender.peer()["state"]) == (0, "open")
            assert await sender.stop() == 0

    run(tmp_path, test)


def test_a_send_reaches_the_peer_at_once_without_waiting_for_a_timer(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        async with serving(far, port):
            await near.start()
            took = []
            for i in range(1, 60):
                began = time.perf_counter()
                near.send(b"x")
                await until(lambda i=i: len(far.bodies("a")) == i)  # type: ignore[misc]
                took.append(time.perf_counter() - began)
                await asyncio.sleep(0.003)
            # All of this runs on a shared machine, with the far node in this test's own loop.
            assert sorted(took)[len(took) // 2] < 0.025

    run(tmp_path, test)


def test_a_lost_ring_costs_at_most_a_second(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        async with serving(far, port):
            await near.start()
            near.send(b"one")
            await until(lambda: far.bodies("a") == [b"one"])
            near.send(b"two", ring=False)
            await until(lambda: len(far.bodies("a")) == 2, 2.5)

    run(tmp_path, test)


def test_a_lost_answer_costs_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        far.lose_answers = 1
        async with serving(far, port):
            sender = await near.start()
            near.send(*numbered(10))
            near.send(*numbered(10), channel="b")
            await until(lambda: sender.peer().get("delivered") == 20)
            assert far.bodies("a") == numbered(10)
            assert far.bodies("b") == numbered(10)

    run(tmp_path, test)


def test_a_killed_sender_goes_on_where_it_was(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        bodies = numbered(20_000, 200)
        async with serving(far, port):
            for i in range(0, 20_000, 500):
                near.send(*bodies[i : i + 500])
            for _ in range(4):
                sender = await near.start()
                have = len(far.bodies("a"))
                await until(lambda have=have: len(far.bodies("a")) > have)  # type: ignore[misc]
                sender.kill()
                if len(far.bodies("a")) == 20_000:
                    break
            sender = await near.start()
            await until(lambda: len(far.bodies("a")) == 20_000)
            assert far.bodies("a") == bodies
            await until(lambda: sender.peer().get("delivered") == 20_000)

    run(tmp_path, test)


def test_a_peer_that_is_away_is_shown_and_gets_everything_when_it_is_back(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        sender = await near.start()
        near.send(*numbered(10))
        await until(lambda: sender.peer().get("state") in ("throttled", "probing"))
        await until(lambda: sender.peer().get("queued") == 10)
        assert "127.0.0.1" in sender.peer()["last_error"]
        await until(lambda: (sender.peer().get("oldest_age_s") or 0) > 0)
        async with serving(far, port):
            await sender.call("retry", peer="berlin")
            await until(lambda: len(far.bodies("a")) == 10)

    run(tmp_path, test)


def test_a_peer_that_calls_is_tried_at_once(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        sender = await near.start()
        near.send(b"one")
        await until(lambda: (sender.peer().get("attempt") or 0) >= 3)
        async with serving(far, port):
            hearsay = Hearsay(near.layout, time.monotonic)
            hearsay.hear("berlin")
            await until(lambda: far.bodies("a") == [b"one"], 2)
            hearsay.close()

    run(tmp_path, test)


def test_a_refused_channel_ends_as_dead_letters_and_delays_no_other(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        far.channels = frozenset({"good"})
        async with serving(far, port):
            sender = await near.start()
            near.send(*numbered(10), channel="bad")
            near.send(*numbered(10), channel="good")
            await until(lambda: far.bodies("good") == numbered(10))
            await until(lambda: sender.gauges.get("dead") == 10)
            assert sender.peer()["queued"] == 0

    run(tmp_path, test)


def test_a_full_peer_is_left_in_peace_as_long_as_it_asks(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        far.refusals.append(Refused(507, "inbox_full", "the inbox is full", retry_after_s=60))
        async with serving(far, port):
            sender = await near.start()
            near.send(b"one")
            await until(lambda: (sender.peer().get("next_try_s") or 0) > 50)
            assert "507" in sender.peer()["last_error"]
            await sender.call("retry", peer="berlin")
            await until(lambda: far.bodies("a") == [b"one"])

    run(tmp_path, test)


def test_a_pause_holds_one_priority_one_channel_or_the_peer(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        near.paused = {"berlin/a/5": {}, "berlin/b": {}}
        async with serving(far, port):
            sender = await near.start()
            near.send(b"a5", channel="a")
            near.send(b"a0", channel="a", priority=0)
            near.send(b"b", channel="b")
            near.send(b"c", channel="c")
            await until(lambda: far.bodies("c") == [b"c"] and far.bodies("a", 0) == [b"a0"])
            await sender.call("resume", target="berlin/b", paused={"berlin/a/5": {}}, draining=[])
            await until(lambda: far.bodies("b") == [b"b"])
            assert not far.bodies("a")
            await sender.call("pause", target="berlin", paused={"berlin": {}}, draining=[])
            await until(lambda: sender.peer().get("state") == "paused")
            await sender.call("resume", target="", paused={}, draining=[])
            await until(lambda: far.bodies("a") == [b"a5"])

    run(tmp_path, test)


def test_a_large_body_travels_in_pieces_and_resumes_where_it_broke_off(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        body = os.urandom(9_000_000)
        name = near.journal.pin()
        frame_id = frame.new_frame_id(SystemClock().wall_ns(), os.urandom(10))
        blob = write_blob(FS, near.layout, name, frame_id, body)
        near.send(b"before")
        near.journal.put(Put(Lane("berlin", "a", 5), [blob]))
        near.journal.unpin(name)
        near.send(b"after")
        async with serving(far, port):
            sender = await near.start()
            await until(lambda: "blob" in far.requests)
            sender.kill()
            await near.start()
            await until(lambda: len(far.bodies("a")) == 3)
            assert far.bodies("a") == [b"before", body, b"after"]

    run(tmp_path, test)


def test_a_receiver_that_lost_its_spool_holds_the_lane_until_the_operator_decides(
    tmp_path: Path,
) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        async with serving(far, port):
            sender = await near.start()
            near.send(*numbered(10))
            await until(lambda: sender.peer().get("delivered") == 10)
        root = str(tmp_path / "fresh")
        fresh = FarNode(Layout(root), make_spool(FS, root, os.urandom).spool_id)
        async with serving(fresh, port):
            near.send(b"new")
            await until(lambda: "held" in sender.peer())
            near.send(b"other", channel="b")
            await until(lambda: fresh.bodies("b") == [b"other"])
            assert not fresh.bodies("a")
            answer = await sender.call("peer_reset", peer="berlin", mode="replay")
            await until(lambda: len(fresh.bodies("a")) == 11)
            assert fresh.bodies("a") == [*numbered(10), b"new"]
            assert answer["lanes"] == 1
            assert "10 messages are sent again" in " ".join(answer["report"])

    run(tmp_path, test)


@pytest.mark.slow
def test_more_lanes_than_files_may_be_open_are_delivered(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        for body in (b"one", b"two"):
            for i in range(WRITERS_MAX + 20):
                near.send(body, channel=f"c{i}", ring=False)
        async with serving(far, port):
            sender = await near.start()
            messages = 2 * (WRITERS_MAX + 20)
            await until(lambda: sender.peer().get("delivered") == messages, 60)
            assert all(bodies == [b"one", b"two"] for bodies in far.got.values())

    run(tmp_path, test)


def test_a_reload_brings_a_new_address_and_a_new_peer(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        right = near.peer["url"]
        near.peer["url"] = "http://127.0.0.1:9"
        sender = await near.start()
        near.send(b"one")
        await until(lambda: (sender.peer().get("last_error") or "") != "")
        async with serving(far, port):
            near.peer["url"] = right
            await sender.call("reload", settings=near.settings().to_dict(), changed=["peers"])
            await until(lambda: far.bodies("a") == [b"one"])

    run(tmp_path, test)


def test_it_stops_at_once_though_a_peer_does_not_answer(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", port))
            mute.listen()
            sender = await near.start()
            near.send(b"one")
            await until(lambda: bool(sender.gauges))
            began = time.monotonic()
            assert await sender.stop() == 0
            assert time.monotonic() - began < 3

    run(tmp_path, test)


def test_a_disk_that_fails_ends_the_sender_and_the_next_one_loses_nothing(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        async with serving(far, port):
            sender = await near.start()
            near.send(*numbered(10))
            await until(lambda: sender.peer().get("delivered") == 10)
            # From now on every write that would make a file longer than this fails.
            resource.prlimit(sender.process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
            near.send(*numbered(10), channel="b")
            assert await sender.ended() == 1
            assert not far.bodies("b")
            near.send(*numbered(10), channel="c")
            sender = await near.start()
            await until(lambda: sender.peer().get("delivered") == 30)
            assert far.bodies("b") == far.bodies("c") == numbered(10)

    run(tmp_path, test)


def test_a_dead_a_mute_and_an_unknown_peer_delay_no_other(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        with socket.socket() as mute, socket.socket() as dead:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            dead.bind(("127.0.0.1", 0))
            near.others = {
                "mute": {"url": f"http://127.0.0.1:{mute.getsockname()[1]}"},
                "dead": {"url": f"http://127.0.0.1:{dead.getsockname()[1]}"},
            }
            async with serving(far, port):
                sender = await near.start()
                for peer in ("mute", "dead", "nobody"):
                    for priority in (0, 5):
                        near.send(*numbered(500), peer=peer, priority=priority)
                began = time.monotonic()
                for i in range(20):
                    near.send(b"%d" % i)
                await until(lambda: len(far.bodies("a")) == 20)
                assert time.monotonic() - began < 5
                await until(lambda: sender.peer("dead").get("state") in ("throttled", "probing"))
                await until(lambda: sender.peer("nobody").get("state") == "unconfigured")
                assert sender.peer("nobody")["queued"] == 1000

    run(tmp_path, test)


def test_a_flood_of_urgent_messages_does_not_starve_the_backlog(tmp_path: Path) -> None:
    async def test(near: NearNode, far: FarNode, port: int) -> None:
        near.send(*numbered(3000, 1000), channel="backlog", priority=9)
        async with serving(far, port):
            await near.start()
            sent = 0
            while len(far.bodies("backlog", 9)) < 3000:
                near.send(*numbered(30, 1000), channel="urgent", priority=0)
                sent += 30
                await asyncio.sleep(0)
                assert sent < 300_000
            await until(lambda: len(far.bodies("urgent", 0)) == sent)

    run(tmp_path, test)
