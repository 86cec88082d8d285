"""Real consumers: crowded, killed, forked, threaded, without the daemon, of other users."""

from __future__ import annotations

import collections
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from droprd.client.inbox import Inbox
from droprd.core import rpc
from droprd.settings.values import Settings
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, SharedRights, make_spool, read_version
from droprd.spool.state import read_public, write_public
from droprd.testing.inboxes import eventually
from droprd.testing.inboxsuite import bodies
from tests.inboxfiles import STREAM, Segments
from tests.spools import new_spool

ROOT = Path(__file__).parents[2]
FS = OsFs()
WITHIN_S = 30.0
RECEIVE_GID = 60_102

DRAIN = """
import sys, droprd
with droprd.Inbox(sys.argv[1]) as inbox:
    while messages := inbox.receive("sites", wait_s=float(sys.argv[2]), max_messages=20):
        print(*(m.body.decode() for m in messages), flush=True)
        inbox.ack(messages)
"""
HOLD = """
import sys, droprd
inbox = droprd.Inbox(sys.argv[1])
print(*(m.body.decode() for m in inbox.receive("sites", lease_s=3600)), flush=True)
sys.stdin.read()
"""
STOP_IN_THE_LOCK = """
import os, signal, sys
from droprd.spool.claims import ClaimsFile
from droprd.spool.fsops import OsFs
claims = ClaimsFile(OsFs(), sys.argv[1], bytes(16))
claims.acquire()
print("holding", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
claims.release()
"""
FORK = """
import os, sys, droprd
inbox = droprd.Inbox(sys.argv[1])
inbox.receive("sites", max_messages=1)[0].ack()
for _ in range(3):
    os.fork()
while messages := inbox.receive("sites", wait_s=1, max_messages=7):
    os.write(1, b"".join(m.body + b"\\n" for m in messages))
    inbox.ack(messages)
inbox.close()
"""
ONE = """
import os, sys, droprd
os.umask(0o077)
try:
    with droprd.Inbox(sys.argv[1]) as inbox:
        for message in inbox.receive("sites", max_messages=1):
            with message.open() as body:
                print(len(body.read()))
            message.ack()
except droprd.DroprdError as error:
    print(error.code)
"""


def consumer(code: str, *args: object, **more: Any) -> subprocess.Popen[str]:
    guard = "import signal; signal.alarm(60)\n"  # so that no test waits for ever
    return subprocess.Popen(
        [sys.executable, "-c", guard + code, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **more,
    )


@pytest.fixture
def segments(tmp_path: Path) -> Segments:
    return Segments(tmp_path / "spool", segment_bytes_max=64 << 10)


def test_several_processes_share_a_channel_and_killed_ones_lose_nothing(
    segments: Segments,
) -> None:
    total = 6000
    processes = [consumer(DRAIN, segments.layout.root, 3) for _ in range(3)]
    victims = [consumer(DRAIN, segments.layout.root, 60) for _ in range(2)]
    outputs: list[str] = []
    readers = [
        threading.Thread(target=lambda p=p: outputs.append(p.communicate()[0]))
        for p in [*processes, *victims]
    ]
    for reader in readers:
        reader.start()
    for start in range(0, total, 40):
        segments.deliver([b"%d" % n for n in range(start, start + 40)])
        if start == 2400:
            victims[0].kill()
        if start == 4400:
            victims[1].kill()
    for reader in readers:
        reader.join(60)
    got = collections.Counter(int(word) for output in outputs for word in output.split())
    assert set(got) == set(range(total))
    again = [n for n, times in got.items() if times > 1]
    assert len(again) <= 40, "only what the killed ones held may come again"
    with Inbox(segments.layout.root) as inbox:
        assert inbox.receive("sites") == []


def test_what_a_killed_process_held_comes_at_once(segments: Segments) -> None:
    segments.deliver([b"1"])
    holder = consumer(HOLD, segments.layout.root, stdin=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "1\n"
    with Inbox(segments.layout.root) as inbox:
        assert inbox.receive("sites") == []
        got: list[bytes] = []
        waiting = threading.Thread(
            target=lambda: got.extend(bodies(inbox.receive("sites", wait_s=WITHIN_S)))
        )
        waiting.start()
        eventually(lambda: bool(inbox._sleepers))
        holder.kill()
        waiting.join(3)  # it would look again by itself after five seconds
        assert got == [b"1"]
    holder.communicate()


def test_a_process_stopped_in_the_lock_delays_only_its_channel(segments: Segments) -> None:
    segments.deliver([b"mine"])
    segments.deliver([b"other"], channel="other")
    stopped = consumer(STOP_IN_THE_LOCK, segments.layout.claims(*STREAM))
    assert stopped.stdout is not None
    assert stopped.stdout.readline() == "holding\n"
    with Inbox(segments.layout.root) as inbox:
        assert bodies(inbox.receive("sites", "other", wait_s=WITHIN_S)) == [b"other"]
        assert inbox.receive("sites") == []
        os.kill(stopped.pid, signal.SIGCONT)
        assert bodies(inbox.receive("sites", wait_s=WITHIN_S)) == [b"mine"]
    stopped.communicate()


def test_a_consumer_may_fork_at_will(segments: Segments) -> None:
    segments.deliver([b"%d" % n for n in range(500)])
    out, _ = consumer(FORK, segments.layout.root).communicate(timeout=60)
    assert sorted(map(int, out.split())) == list(range(1, 500))
    eventually(lambda: not os.listdir(segments.layout.waiting), WITHIN_S)


def test_an_interrupted_consumer_gives_back_what_it_held(segments: Segments) -> None:
    segments.deliver([b"1"])
    code = HOLD.replace("inbox = droprd.Inbox(sys.argv[1])", "") + "\n"
    code = code.replace("print", "with droprd.Inbox(sys.argv[1]) as inbox:\n    print")
    code = code.replace("sys.stdin", "    sys.stdin")
    holder = consumer(code, segments.layout.root, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "1\n"
    holder.send_signal(signal.SIGINT)
    holder.communicate()
    with Inbox(segments.layout.root) as inbox:
        (message,) = inbox.receive("sites")
        assert message.attempt == 2
    assert os.listdir(segments.layout.waiting) == []


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_users_of_the_receive_group_consume_and_others_are_refused(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.stat().st_mode & 0o5 != 0o5:
            parent.chmod(0o755)
    able = subprocess.run(
        [sys.executable, "-c", "import droprd.client.inbox"],
        user=60_001,
        group=60_001,
        extra_groups=[],
        cwd=ROOT,
        check=False,
        stderr=subprocess.DEVNULL,
    )
    if able.returncode:
        pytest.skip("other users may not execute this interpreter")
    private = new_spool(tmp_path / "private")
    layout = Layout(str(tmp_path / "spool"))
    make_spool(FS, layout.root, os.urandom, SharedRights(60_000, 60_000, 60_101, RECEIVE_GID))
    public = read_public(FS, private)
    assert public is not None
    spool_id = read_version(FS, layout.root).spool_id
    write_public(FS, layout, {**public, "spool_id": spool_id})
    segments = Segments(tmp_path / "spool")
    segments.deliver([b"x"])
    segments.deliver([bytes(50_000)])
    for directory in (layout.channel("sites"), layout.stream(*STREAM)):
        os.chmod(directory, 0o2750)
    for blob in os.listdir(layout.inbox_blobs):
        os.chmod(f"{layout.inbox_blobs}/{blob}", 0o640)

    def receive(uid: int, *groups: int) -> str:
        process = consumer(ONE, layout.root, user=uid, group=uid, extra_groups=groups)
        return process.communicate(timeout=60)[0].strip()

    assert receive(60_003) == "spool_rights"
    assert receive(60_001, RECEIVE_GID) == "1"
    assert receive(60_002, RECEIVE_GID) == "50000"
    found = os.stat(layout.claims(*STREAM))
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (RECEIVE_GID, 0o660)


class Janitor:
    """The worker in its own process, with this test as its angel."""

    def __init__(self, segments: Segments) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "droprd.workers.janitor", "--link", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
        )
        theirs.close()
        settings = Settings.from_dict({"node": {"name": "here", "spool": segments.layout.root}})
        facts = {"node": "here", "spool_id": segments.spool.spool_id}
        params = {"settings": settings.to_dict(), "generation": 1, "facts": facts}
        self.gauges: dict[str, Any] = {}
        self._link = ours
        self._decoder = rpc.Decoder()
        ours.settimeout(0.05)
        ours.sendall(rpc.encode(rpc.Request(0, "configure", params)))
        self.seen: set[str] = set()
        eventually(lambda: self.listen() and "ready" in self.seen, WITHIN_S)

    def listen(self) -> bool:
        """Take what it has told."""
        try:
            data = self._link.recv(65536)
        except TimeoutError:
            return True
        assert data, "the janitor is gone"
        for message in self._decoder.feed(data):
            if isinstance(message, rpc.Notification):
                self.seen.add(message.method)
                self.gauges = message.params.get("gauges", self.gauges)
        return True

    def shows(self, ready: int, leased: int, dead: int) -> bool:
        """Whether it counts this on the channel `sites`."""
        self.listen()
        wanted = {"ready": ready, "leased": leased, "dead": dead}
        shown = self.gauges.get("channels", {}).get("sites", {})
        return {key: shown.get(key) for key in wanted} == wanted

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(WITHIN_S)
        self._link.close()
        return code


@pytest.fixture
def janitor(segments: Segments) -> Iterator[Janitor]:
    opened = Janitor(segments)
    yield opened
    if opened.process.poll() is None:
        opened.process.kill()
        opened.process.wait()


def test_the_janitor_frees_what_a_dead_consumer_held_and_removes_its_fifo(
    segments: Segments, janitor: Janitor
) -> None:
    segments.deliver([b"1", b"2"])
    eventually(lambda: janitor.shows(2, 0, 0), WITHIN_S)
    holder = consumer(HOLD, segments.layout.root, stdin=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "1 2\n"
    eventually(lambda: janitor.shows(0, 2, 0), WITHIN_S)
    holder.kill()
    holder.communicate()
    eventually(lambda: janitor.shows(2, 0, 0), WITHIN_S)
    eventually(lambda: janitor.listen() and not os.listdir(segments.layout.waiting), WITHIN_S)
    with Inbox(segments.layout.root) as inbox:
        inbox.receive("sites", max_messages=1)[0].reject("no")
    eventually(lambda: janitor.shows(1, 0, 1), WITHIN_S)
    assert janitor.gauges["dead_letters"] == 1
    assert janitor.gauges["spool"]["bytes"] > 4096
    assert janitor.gauges["spool"]["free_bytes"] > 0
    assert janitor.stop() == 0
