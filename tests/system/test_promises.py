"""Each promise of the design, kept by real nodes: real daemons, real disks, real signals.

P9 and everything about kill -9 is in test_killing.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import droprd
from droprd.core import entry
from droprd.core.outstate import Counts, LaneState, OutboxState
from droprd.model import GENESIS
from droprd.spool import log
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout
from droprd.testing.node import Node, free_port, pair, wait_until
from tests.system.disks import MIB, Disk, tmpfs
from tests.system.test_receiver import Peer, make, push_body
from tests.system.wallclock import WallClock

FS = OsFs()
WITHIN_S = 60.0
DEAD = f"http://127.0.0.1:{free_port()}"


# -- what the tests share ------------------------------------------------------------------------


def start(*nodes: Node) -> None:
    for node in nodes:
        node.start(wait=False)
    for node in nodes:
        node.wait_running()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes that know each other; no daemon runs yet."""
    hamburg, berlin = pair(tmp_path)
    yield hamburg, berlin
    hamburg.close()
    berlin.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """Two nodes that run through several tests, each of which has channels of its own."""
    hamburg, berlin = pair(
        tmp_path_factory.mktemp("running"), settings="[channels.poisoned]\nmax_attempts = 2\n"
    )
    hamburg.ctl("peer", "add", "rome", DEAD)
    start(hamburg, berlin)
    yield hamburg, berlin
    hamburg.close()
    berlin.close()


def program(node: Node, code: str, *args: object, **more: Any) -> subprocess.Popen[str]:
    """A program beside this test, with the node's environment."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import signal; signal.alarm(120)\n{code}", *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=node.env,
        **more,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def numbered(first: int, end: int) -> list[bytes]:
    return [b"%d" % n for n in range(first, end)]


def take(node: Node, count: int, *channels: str) -> list[bytes]:
    """The bodies of `count` messages in the order of their arrival, acknowledged."""
    got: list[bytes] = []
    with node.inbox() as inbox:

        def more() -> bool:
            messages = inbox.receive(*(channels or ("common",)), wait_s=0.5, max_messages=500)
            inbox.ack(messages)
            got.extend(message.body for message in messages)
            return len(got) >= count

        wait_until(more, f"{count} messages arrive, {len(got)} did", WITHIN_S)
    return got


def is_empty(node: Node, *channels: str) -> bool:
    with node.inbox() as inbox:
        return inbox.receive(*(channels or ("common",))) == []


def delivered(node: Node, peer: str = "berlin") -> None:
    """Wait until nothing waits for `peer`."""
    wait_until(lambda: node.queued(peer) == 0, f"everything is delivered to {peer}", WITHIN_S)


def sound(*nodes: Node) -> None:
    """Every file of these spools is as the table says; sums, chains and checksums are right."""
    for node in nodes:
        report = json.loads(node.ctl("fsck", "--json", check=False).stdout)
        wrong = [found for found in report["findings"] if found["level"] != "note"]
        assert report["ok"], wrong
        assert wrong == []


def ledger(node: Node, peer: str = "berlin") -> dict[tuple[str, int], LaneState]:
    """The sums of each lane to `peer`, by channel and priority, as they stand on the disk."""
    state = OutboxState()
    fd = FS.open(Layout(str(node.spool)).sender_log, os.O_RDONLY)
    try:
        header, end = log.read_header(FS, fd), log.read_published(FS, fd)
        for item in log.Walk(FS, fd, header.log_id, promised=end, stop=end):
            assert isinstance(item, log.Entry)
            state.apply(entry.unpack_note(item.note))
    finally:
        FS.close(fd)
    return {
        (one.lane.channel, one.lane.priority): one
        for one in state.lanes.values()
        if one.lane.peer == peer
    }


def cut_off(node: Node, disk: Disk) -> None:
    """End the node as a power cut does: its disk first, then all its processes."""
    disk.shut_down()
    assert node.process is not None
    os.killpg(node.process.pid, signal.SIGKILL)
    node.process.wait()
    node.process = None

    def unmounted() -> bool:
        done = subprocess.run(["umount", str(disk.where)], check=False, capture_output=True)
        return done.returncode == 0

    wait_until(unmounted, "the dead node lets go of its disk")
    disk.mount()


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path, request.param, 64 if request.param == "ext4" else 320)
    yield made
    made.close()


def node_on(disk: Disk, name: str, log: Path) -> Node:
    node = Node(disk.where / name, name)
    node.log = log
    return node


# -- P1 durable, P2 once and in order ------------------------------------------------------------

SEND_FOR_EVER = """
import sys, droprd
number = 0
with droprd.Outbox(sys.argv[1]) as outbox:
    while True:
        body = b"%d" % number
        outbox.send(body if number % 40 else body.ljust(40_000), to="berlin")
        print(number, flush=True)
        number += 1
"""


@pytest.mark.root
def test_what_send_returned_survives_the_loss_of_the_disk_under_way(
    disk: Disk, tmp_path: Path
) -> None:
    hamburg = node_on(disk, "hamburg", tmp_path / "hamburg.log")
    berlin = Node(tmp_path / "berlin", "berlin")
    hamburg.knows(berlin)
    os.sync()  # what is tested begins here
    try:
        start(hamburg, berlin)
        producer = program(hamburg, SEND_FOR_EVER, hamburg.spool, stderr=subprocess.DEVNULL)
        while int(line_of(producer)) < 300:
            pass
        cut_off(hamburg, disk)
        rest = producer.communicate(timeout=30)[0].split()
        returned = int(rest[-1]) + 1 if rest else 301
        hamburg.start()
        got = take(berlin, returned)
        delivered(hamburg)
        got += take(berlin, 0)
        # The one send() that was under way may have arrived; it did not return.
        assert len(got) in (returned, returned + 1)
        assert [int(body) for body in got] == list(range(len(got)))
        sound(hamburg, berlin)
    finally:
        hamburg.close()
        berlin.close()


# -- P6 honest -----------------------------------------------------------------------------------


@pytest.mark.root
def test_what_counts_as_delivered_survives_the_loss_of_the_peers_disk(
    disk: Disk, tmp_path: Path
) -> None:
    hamburg = Node(tmp_path / "hamburg", "hamburg")
    berlin = node_on(disk, "berlin", tmp_path / "berlin.log")
    hamburg.knows(berlin)
    os.sync()
    try:
        start(hamburg, berlin)
        with hamburg.outbox() as outbox:
            for first in range(0, 2000, 20):
                outbox.send_many(numbered(first, first + 20), to="berlin")
                if first == 1000:
                    wait_until(
                        lambda: ledger(hamburg)["common", 5].ended.delivered > 200, "some arrive"
                    )
                    cut_off(berlin, disk)
        wait_until(lambda: hamburg.status()["unmerged_bytes"] == 0, "all are merged")
        hamburg.stop()
        told = ledger(hamburg)["common", 5].ended.delivered
        shown = hamburg.status()["peers"]["berlin"]["queued"]
        assert told + shown == 2000
        berlin.start()  # its peer is away and can send nothing again
        got = take(berlin, told)
        assert got == numbered(0, len(got))
        hamburg.start()
        got += take(berlin, 2000 - len(got))
        assert got == numbered(0, 2000)
        delivered(hamburg)
        assert is_empty(berlin)
        sound(hamburg, berlin)
    finally:
        hamburg.close()
        berlin.close()


# -- P2 once, in order ---------------------------------------------------------------------------


def test_a_spool_restored_from_a_copy_loses_and_doubles_nothing_that_is_known(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    hamburg, berlin = nodes
    start(hamburg, berlin)
    with hamburg.outbox() as outbox:
        outbox.send_many(numbered(0, 20), to="berlin")
        delivered(hamburg)
        hamburg.ctl("pause", "berlin")
        outbox.send_many(numbered(20, 40), to="berlin")
        wait_until(lambda: hamburg.status()["unmerged_bytes"] == 0, "they are merged")
    hamburg.stop()
    copy = tmp_path / "copy"
    shutil.copytree(hamburg.spool, copy, ignore=shutil.ignore_patterns("bell"))  # a FIFO
    hamburg.ctl("resume")
    hamburg.start()
    with hamburg.outbox() as outbox:
        outbox.send_many(numbered(40, 60), to="berlin")
    delivered(hamburg)
    hamburg.stop()
    # The disk is lost, and what there was of it comes back: 20 to 39 are already in Berlin.
    (hamburg.spool / "outbox" / "bell").rename(copy / "outbox" / "bell")
    shutil.rmtree(hamburg.spool)
    copy.rename(hamburg.spool)
    hamburg.ctl("resume")
    with hamburg.outbox() as outbox:
        outbox.send_many(numbered(60, 80), to="berlin")
    hamburg.start()
    delivered(hamburg)
    assert take(berlin, 80) == numbered(0, 80)
    assert is_empty(berlin)
    sound(hamburg, berlin)


def test_priorities_and_channels_keep_each_their_own_order(running: tuple[Node, Node]) -> None:
    hamburg, berlin = running
    lanes = [(channel, priority) for channel in ("red", "blue") for priority in (0, 5, 9)]
    with hamburg.outbox() as outbox:
        for number in range(40):
            for channel, priority in lanes:
                outbox.send(b"%d" % number, to="berlin", channel=channel, priority=priority)
    got: dict[tuple[str, int], list[bytes]] = {lane: [] for lane in lanes}
    with berlin.inbox() as inbox:

        def more() -> bool:
            for message in inbox.receive("red", "blue", wait_s=0.5):
                got[message.channel, message.priority].append(message.body)
                message.ack()
            return sum(map(len, got.values())) >= 240

        wait_until(more, "all arrive", WITHIN_S)
    assert all(bodies == numbered(0, 40) for bodies in got.values())


# -- P3 nothing vanishes -------------------------------------------------------------------------


def test_every_message_ends_somewhere_and_the_sums_add_up(nodes: tuple[Node, Node]) -> None:
    hamburg, berlin = nodes
    with open(berlin.directory / "peers.d" / "hamburg.toml", "a") as file:
        file.write('channels = ["open"]\nmax_message_bytes = 50000\n')
    start(hamburg, berlin)
    hamburg.ctl("pause", "berlin")
    with hamburg.outbox() as outbox:
        outbox.send_many(numbered(0, 10), to="berlin", channel="open")
        outbox.send_many([b"late"] * 5, to="berlin", channel="open", ttl_s=0.05)
        outbox.send(bytes(50_001), to="berlin", channel="open")
        outbox.send_many(numbered(10, 20), to="berlin", channel="open")
        outbox.send_many([b"forbidden"] * 3, to="berlin", channel="closed")
    wait_until(lambda: hamburg.status()["peers"]["berlin"]["queued"] == 29, "all 29 are counted")
    hamburg.ctl("resume")
    delivered(hamburg)
    lanes = ledger(hamburg)
    assert lanes["open", 5].ended == Counts(delivered=20, expired=5, dead=1)
    assert lanes["closed", 5].ended == Counts(dead=3)
    for lane in lanes.values():
        assert lane.accepted == lane.queued + lane.ended.total
        assert lane.queued == 0
    assert hamburg.status()["dead_letters"] == 4
    with berlin.inbox() as inbox:
        messages = inbox.receive("open", wait_s=5)
        assert [message.body for message in messages] == numbered(0, 20)
        messages[0].reject("no such site")
        inbox.ack(messages[1:])
    wait_until(lambda: berlin.status()["dead_letters"] == 1, "the rejected one is a dead letter")
    assert not (berlin.spool / "inbox" / "channels" / "closed").exists()
    sound(hamburg, berlin)


# -- P4 neighbours do not suffer -----------------------------------------------------------------

STOP_IN_THE_LOCK = """
import os, signal, sys
from droprd.spool.claims import ClaimsFile
from droprd.spool.fsops import OsFs
from droprd.spool.clock import SystemClock
claims = ClaimsFile(OsFs(), sys.argv[1], SystemClock().boot_id())
claims.acquire()
print("holding", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
claims.release()
"""


def test_a_consumer_stopped_with_the_lock_delays_only_its_channel_and_priority(
    running: tuple[Node, Node],
) -> None:
    hamburg, berlin = running
    with hamburg.outbox() as outbox:
        outbox.send(b"first", to="berlin", channel="held")
        assert take(berlin, 1, "held") == [b"first"]
        claims = Layout(str(berlin.spool)).claims("held", 5)
        stopped = program(berlin, STOP_IN_THE_LOCK, claims)
        assert line_of(stopped) == "holding"
        try:
            outbox.send(b"behind it", to="berlin", channel="held")
            outbox.send(b"more urgent", to="berlin", channel="held", priority=1)
            outbox.send(b"elsewhere", to="berlin", channel="free")
            delivered(hamburg)
            with berlin.inbox() as inbox:
                got: set[bytes] = set()
                began = time.monotonic()

                def more() -> bool:
                    for message in inbox.receive("held", "free", wait_s=1):
                        got.add(message.body)
                        message.ack()
                    return len(got) >= 2

                wait_until(more, "the others come")
                assert time.monotonic() - began < 5
                assert got == {b"more urgent", b"elsewhere"}
                assert inbox.receive("held") == []
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
            stopped.communicate(timeout=30)
    assert take(berlin, 1, "held") == [b"behind it"]
    assert {worker["restarts"] for worker in berlin.status()["workers"].values()} == {0}


DIES_OF_POISON = """
import os, sys, droprd
with droprd.Inbox(sys.argv[1]) as inbox:
    while messages := inbox.receive("poisoned", wait_s=1):
        for message in messages:
            if message.body == b"poison":
                os._exit(9)
            message.ack()
            inbox.flush()
            print(message.body.decode(), flush=True)
"""


def test_a_poison_message_becomes_a_dead_letter_and_its_channel_goes_on(
    running: tuple[Node, Node],
) -> None:
    hamburg, berlin = running
    with hamburg.outbox() as outbox:
        outbox.send_many(
            [*numbered(0, 5), b"poison", *numbered(5, 10)], to="berlin", channel="poisoned"
        )
    delivered(hamburg)
    survived: list[int] = []
    deaths = 0
    while deaths < 5:
        consumer = program(berlin, DIES_OF_POISON, berlin.spool)
        survived += map(int, consumer.communicate(timeout=60)[0].split())
        if consumer.returncode == 0:
            break
        deaths += 1
    assert deaths == 2  # max_attempts of this channel
    assert survived == list(range(10))
    wait_until(lambda: berlin.status()["channels"]["poisoned"]["dead"] == 1, "it is a dead letter")
    assert berlin.status()["channels"]["poisoned"]["ready"] == 0


def test_a_dead_peer_with_a_backlog_delays_no_other(running: tuple[Node, Node]) -> None:
    hamburg, berlin = running
    with hamburg.outbox() as outbox, berlin.inbox() as inbox:
        for _ in range(20):
            outbox.send_many([bytes(1000)] * 100, to="rome", channel="sites")
        inbox.receive("sites")
        waits = []
        for number in range(20):
            began = time.monotonic()
            outbox.send(b"%d" % number, to="berlin", channel="sites")
            (message,) = inbox.receive("sites", wait_s=10, max_messages=1)
            waits.append(time.monotonic() - began)
            message.ack()
            assert message.body == b"%d" % number
    assert sorted(waits)[10] < 0.5
    wait_until(
        lambda: hamburg.status()["peers"]["rome"]["queued"] == 2000, "the backlog is counted"
    )
    assert hamburg.status()["peers"]["rome"]["state"] in ("throttled", "probing")


def test_stopped_workers_are_replaced_within_the_hang_timeout_and_ten_seconds(
    tmp_path: Path,
) -> None:
    hang_timeout_s = 2
    hamburg, berlin = pair(tmp_path, settings=f"[daemon]\nhang_timeout_s = {hang_timeout_s}\n")
    try:
        start(hamburg, berlin)
        old = {
            (node, worker): node.kill_worker(worker, signal.SIGSTOP)
            for node, worker in [
                (hamburg, "sender"),
                (berlin, "receiver"),
                (berlin, "janitor"),
            ]
        }
        began = time.monotonic()
        with hamburg.outbox() as outbox:
            outbox.send_many(numbered(0, 100), to="berlin")
        for (node, worker), pid in old.items():

            def replaced(node: Node = node, worker: str = worker, pid: int = pid) -> bool:
                shown = node.status()["workers"][worker]
                return bool(shown["state"] == "running" and shown["pid"] != pid)

            left_s = hang_timeout_s + 10 - (time.monotonic() - began)
            wait_until(replaced, f"another {worker} runs", left_s)
        assert take(berlin, 100) == numbered(0, 100)
        delivered(hamburg)
        sound(hamburg, berlin)
    finally:
        hamburg.close()
        berlin.close()


# -- P5 bounded ----------------------------------------------------------------------------------


def test_a_full_outbox_refuses_to_send_while_acknowledging_and_delivering_go_on(
    tmp_path: Path,
) -> None:
    hamburg, berlin = pair(tmp_path, settings="[outbox]\nquota_bytes = 400000\n")
    try:
        berlin.start()
        with berlin.outbox() as outbox:
            outbox.send_many(numbered(0, 10), to="hamburg")
        hamburg.start()
        with hamburg.outbox() as outbox, hamburg.inbox() as inbox:
            messages = inbox.receive("common", wait_s=20)
            hamburg.ctl("pause", "berlin")
            count = fill(outbox, 10_000)
            wait_until(lambda: hamburg.status()["outbox_full"], "the status says so")
            with pytest.raises(droprd.SpoolFull):
                outbox.send(b"not one more", to="berlin")
            # Full as it is: what was leased is acknowledged, and more comes in.
            inbox.ack(messages)
            inbox.flush()
            with berlin.outbox() as other:
                other.send(b"to the full one", to="hamburg")
            (message,) = inbox.receive("common", wait_s=20)
            message.ack()
            assert message.body == b"to the full one"
            assert "outbox_full" in hamburg.ctl("health", "--json", check=False).stdout.decode()
            hamburg.ctl("resume")
            delivered(hamburg)

            def accepted() -> bool:
                with contextlib.suppress(droprd.SpoolFull):
                    return bool(outbox.send(b"last", to="berlin"))
                return False

            wait_until(accepted, "there is room again")
        got = take(berlin, count + 1)
        assert got[:count] == [b"%d" % n + bytes(10_000) for n in range(count)]
        assert got[count:] == [b"last"]
        sound(hamburg, berlin)
    finally:
        hamburg.close()
        berlin.close()


def fill(outbox: droprd.Outbox, size: int) -> int:
    """Send until the spool is full; how many were accepted."""
    for count in range(10_000):
        try:
            outbox.send(b"%d" % count + bytes(size), to="berlin")
        except droprd.SpoolFull:
            return count
    raise AssertionError("the spool is never full")


def test_a_full_inbox_answers_507_the_sender_waits_and_all_comes_in_the_end(
    tmp_path: Path,
) -> None:
    hamburg, berlin = pair(
        tmp_path, settings="[inbox]\nquota_bytes = 1000000\nsegment_bytes_max = 262144\n"
    )
    try:
        start(hamburg, berlin)
        with hamburg.outbox() as outbox:
            for number in range(300):
                outbox.send(b"%d" % number + bytes(10_000), to="berlin")

        def told() -> bool:
            peer = hamburg.status()["peers"]["berlin"]
            return bool(peer["state"] == "throttled" and "507" in str(peer["last_error"]))

        wait_until(told, "the sender is told to wait, and says so")
        wait_until(lambda: berlin.status()["receiver"]["full"], "berlin says that it is full")
        status = berlin.status()
        arrived = status["receiver"]["received"]
        assert 10_000 * arrived <= 1_000_000
        wait_until(lambda: hamburg.queued("berlin") == 300 - arrived, "all others are queued")
        assert "no_room" in json.dumps(status["receiver"]["refused"])
        got: list[bytes] = []

        def more() -> bool:
            got.extend(take(berlin, 0))
            hamburg.ctl("retry", "berlin")  # or it would wait as long as it was told to
            return len(got) >= 300

        wait_until(more, "the rest comes as room is made", WITHIN_S)
        assert got == [b"%d" % n + bytes(10_000) for n in range(300)]
        delivered(hamburg)
        wait_until(lambda: not berlin.status()["receiver"]["full"], "it is full no more")
        sound(hamburg, berlin)
    finally:
        hamburg.close()
        berlin.close()


@pytest.mark.root
def test_a_full_disk_refuses_whole_sends_and_everything_drains_once_there_is_room(
    tmp_path: Path,
) -> None:
    with tmpfs(tmp_path / "memory", 16) as where:
        hamburg = Node(where / "hamburg", "hamburg")
        hamburg.config.write_text(
            hamburg.config.read_text().replace("[node]", "[node]\nallow_unsafe_filesystem = true")
        )
        hamburg.log = tmp_path / "hamburg.log"
        berlin = Node(tmp_path / "berlin", "berlin")
        hamburg.knows(berlin)
        try:
            hamburg.start()
            berlin.start()
            hamburg.ctl("pause", "berlin")
            filler = where / "filler"
            filler.write_bytes(bytes(FS.free_bytes(str(where))[0] - 3 * MIB))
            with hamburg.outbox() as outbox:
                count = fill(outbox, 10_000)
                # Not even the reserve is left now, and what is refused leaves nothing behind.
                free = FS.free_bytes(str(where))[0]
                (where / "rest").write_bytes(bytes(max(0, free - 4096)))
                with pytest.raises(droprd.SpoolFull):
                    outbox.send_many([bytes(10_000)] * 20, to="berlin")
                with pytest.raises(droprd.SpoolFull):
                    outbox.send(bytes(200_000), to="berlin")
            sound(hamburg)
            assert hamburg.status()["state"] == "running"
            (where / "rest").unlink()
            filler.unlink()
            hamburg.ctl("resume")
            got = take(berlin, count)
            assert got == [b"%d" % n + bytes(10_000) for n in range(count)]
            delivered(hamburg)
            assert is_empty(berlin)
            sound(hamburg, berlin)
        finally:
            hamburg.close()
            berlin.close()


# -- P7 no trust ---------------------------------------------------------------------------------

PATHS = ["../../../escaped", "..", "/etc/escaped", "a/b", ".hidden", "UPPER", "droprd.own"]


def test_no_name_from_outside_becomes_a_path(running: tuple[Node, Node]) -> None:
    hamburg, berlin = running
    before = set(berlin.directory.rglob("*"))
    token = (berlin.directory / "keys" / "hamburg.token").read_text().strip()
    peer = Peer(berlin.port, token)
    for channel in PATHS:
        for claimed, carried in ((channel, channel), (channel, "sites"), ("fresh", channel)):
            with contextlib.suppress(droprd.DroprdError):  # what cannot be built cannot be sent
                body = push_body(GENESIS, [make(b"x", channel=carried)], claimed)
                status, _ = peer.request("POST", "/v1/push", body)
                assert status in (200, 400)
        with hamburg.outbox() as outbox, pytest.raises(droprd.InvalidName):
            outbox.send(b"x", to="berlin", channel=channel)
        if not channel.startswith("droprd."):
            with berlin.inbox() as inbox, pytest.raises(droprd.InvalidName):
                inbox.receive(channel)
            done = hamburg.ctl("send", "berlin", "x", "--channel", channel, check=False)
            assert done.returncode == 2
    for target in ("../../etc", f"{'5' * 32}/../../x"):
        status, _ = peer.request("PUT", f"/v1/blobs/{target}?offset=0&size=1", b"x")
        assert 400 <= status < 500
    stranger = Peer(berlin.port, "a-token-that-nobody-ever-gave-out")
    assert stranger.request("POST", "/v1/push", b"")[0] == 401
    made = {path for path in set(berlin.directory.rglob("*")) - before if path.is_dir()}
    assert made == set()
    assert not list(berlin.directory.parent.glob("**/escaped*"))
    assert berlin.status()["state"] == "running"
    sound(berlin)


def test_who_a_peer_is_comes_from_its_token_and_not_from_what_it_says(
    running: tuple[Node, Node],
) -> None:
    _, berlin = running
    token = berlin.ctl("peer", "add", "elbe", "--token-file", "-", stdin=b"e" * 43).stdout
    assert token == b""
    peer = Peer(berlin.port, "e" * 43)
    # The frame says what it likes; it is stored as coming from the owner of the token.
    status, _ = peer.request("POST", "/v1/push", push_body(GENESIS, [make(b"x")], "sites"))
    assert status == 200
    with berlin.inbox() as inbox:
        (message,) = inbox.receive("sites", wait_s=5)
        assert (message.sender, message.body) == ("elbe", b"x")
        message.ack()


# -- P8 no clock ---------------------------------------------------------------------------------

HOLD = """
import sys, droprd
with droprd.Inbox(sys.argv[1]) as inbox:
    messages = inbox.receive("common", wait_s=30, lease_s=3600, max_messages=10)
    print(*(m.body.decode() for m in messages), flush=True)
    sys.stdin.readline()
    inbox.ack(messages)
"""
DAY_S = 86_400


@pytest.mark.parametrize("jump_s", [-DAY_S, 365 * DAY_S], ids=["a day back", "a year ahead"])
def test_a_jump_of_the_wall_clock_loses_doubles_reorders_and_expires_nothing(
    tmp_path: Path, jump_s: int
) -> None:
    clock = WallClock(tmp_path)
    hamburg = Node(tmp_path / "hamburg", "hamburg", env=clock.env)
    berlin = Node(tmp_path / "berlin", "berlin", env=clock.env)
    hamburg.knows(berlin)

    def send(first: int, end: int) -> None:
        lines = b"\n".join(numbered(first, end))
        hamburg.ctl("send", "berlin", "--lines", "--ttl", "1h", stdin=lines)

    try:
        start(hamburg, berlin)
        send(0, 50)
        delivered(hamburg)
        holder = program(berlin, HOLD, berlin.spool, stdin=subprocess.PIPE)
        assert line_of(holder).split() == [str(n) for n in range(10)]
        hamburg.ctl("pause", "berlin")
        send(50, 100)
        wait_until(lambda: hamburg.status()["unmerged_bytes"] == 0, "they are merged")
        clock.turn(jump_s)
        send(100, 150)
        wait_until(lambda: "clock" in str(hamburg.status()["problems"]), "it is said")
        hamburg.stop()
        hamburg.start()  # what waits is older than the clock says, or newer than it says
        hamburg.ctl("resume")
        delivered(hamburg)
        assert ledger(hamburg)["common", 5].ended == Counts(delivered=150)
        got = berlin.ctl("receive", "common", "--max", "200", "--wait", "5s").stdout
        assert got.split() == numbered(10, 150)
        assert berlin.ctl("receive", "common").stdout == b""
        holder.communicate("go on\n", timeout=30)
        assert holder.returncode == 0
        assert berlin.ctl("receive", "common").stdout == b""
        sound(hamburg, berlin)
    finally:
        hamburg.close()
        berlin.close()
