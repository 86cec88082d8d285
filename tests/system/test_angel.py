"""The angel with real processes, real signals and small real workers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from droprd.errors import DroprdError, UnknownPeer, UsageError
from droprd.net.control import Control
from droprd.spool import state
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout
from tests.system.angelbox import GOOD, AngelBox, eventually

HANGS = """
    import asyncio, time
    from droprd.workers import worker

    async def serve(context):
        context.ready()
        time.sleep(600)

    worker.run(NAME, serve)
"""

DEAF = """
    import asyncio, signal
    from droprd.workers import worker

    async def serve(context):
        context.ready()
        while True:
            context.beat()
            await asyncio.sleep(0.1)

    worker.run(NAME, serve)
"""

CRASHES = """
    raise SystemExit(3)
"""

REFUSES = """
    from droprd.errors import ConfigError
    from droprd.workers import worker

    async def serve(context):
        raise ConfigError("no")

    worker.run(NAME, serve)
"""

FAT = """
    import asyncio
    from droprd.workers import worker

    async def serve(context):
        context.ready()
        block = bytearray(b"x") * (200 << 20) if context.generation == 1 else b""
        while not context.stopping.is_set():
            context.beat()
            await asyncio.sleep(0.05)

    worker.run(NAME, serve)
"""

ACCEPTS = """
    import asyncio, socket
    from droprd.workers import worker

    async def serve(context):
        async def connected(reader, writer):
            writer.write(b"%d" % context.generation)
            writer.close()
        for one in context.listeners:
            family = socket.AF_UNIX if one.address.startswith("unix:") else socket.AF_INET
            await asyncio.start_server(connected, sock=socket.socket(fileno=one.fd))
        context.ready()
        while not context.stopping.is_set():
            context.beat()
            await asyncio.sleep(0.05)

    worker.run(NAME, serve)
"""


@pytest.fixture
def box(tmp_path: Path) -> Iterator[AngelBox]:
    box = AngelBox(tmp_path)
    yield box
    box.end()


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def answer_of(address: tuple[str, int]) -> bytes:
    with socket.create_connection(address, 10) as sock:
        return sock.recv(100)


def address_of(box: AngelBox) -> tuple[str, int]:
    host, _, port = box.status()["listen"][0].rpartition(":")
    return host, int(port)


# -- start and stop ----------------------------------------------------------------------------


def test_it_starts_three_workers_and_stops_them_on_sigterm(box: AngelBox) -> None:
    box.start()
    status = box.status()
    assert {name: w["state"] for name, w in status["workers"].items()} == {
        "sender": "running",
        "receiver": "running",
        "janitor": "running",
    }
    pids = [w["pid"] for w in status["workers"].values()]
    assert box.stop() == 0
    assert all(gone(pid) for pid in pids)
    assert not box.socket.exists()


def test_a_worker_that_does_not_stop_is_killed_within_the_stop_timeout(box: AngelBox) -> None:
    box.worker("sender", DEAF)
    box.configure(stop_timeout_s=4)
    box.start()
    pid = box.running("sender")
    before = time.monotonic()
    assert box.stop() == 0
    assert time.monotonic() - before < 4
    assert gone(pid)


def test_the_control_socket_answers_while_a_worker_is_slow_to_stop(box: AngelBox) -> None:
    box.worker("sender", DEAF)
    box.start()
    box.call("restart", worker="sender")
    assert box.of("sender")["state"] == "stopping"
    assert box.of("janitor")["state"] == "running"


def test_stop_by_the_control_socket(box: AngelBox) -> None:
    box.start()
    with Control(str(box.socket), 5) as control:
        control.call("stop")
        assert control.wait_closed(10)
    assert box.wait() == 0


def test_version_and_usage_need_no_configuration() -> None:
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "droprd.angel.main", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "droprd")


# -- what makes a start impossible ---------------------------------------------------------------


def test_faults_of_the_configuration_end_it_with_78_all_at_once(box: AngelBox) -> None:
    box.configure(stop_timeout_s="x", hang_timeout_seconds=3)
    box.start(ready=False)
    assert box.wait() == 78
    assert "stop_timeout_s" in box.log
    assert "hang_timeout_seconds" in box.log


def test_a_missing_spool_is_refused_and_not_made(box: AngelBox) -> None:
    (box.spool / "VERSION").unlink()
    box.start(ready=False)
    assert box.wait() == 1
    assert "code=spool_missing" in box.log


def test_a_second_daemon_names_the_pid_of_the_first(box: AngelBox) -> None:
    box.start()
    assert box.process is not None
    first, pid = box.process, box.process.pid
    box.start(ready=False)
    assert box.wait() == 1
    assert f"code=spool_busy pid={pid}" in box.log
    box.process = first
    assert box.status()["state"] == "running"


def test_a_control_socket_on_which_another_daemon_answers_is_not_taken(box: AngelBox) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(box.socket))
        other.listen()
        box.start(ready=False)
        assert box.wait() == 1
    assert f"code=control_in_use pid={os.getpid()}" in box.log
    assert box.socket.exists()


def test_a_stale_control_socket_is_replaced(box: AngelBox) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(box.socket))
    box.start()
    assert box.socket.stat().st_mode & 0o777 == 0o660


def test_a_port_in_use_is_named(box: AngelBox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        box.configure("receiver", listen=[address])
        box.start(ready=False)
        assert box.wait() == 1
    assert "code=port_in_use" in box.log
    assert address in box.log


def test_a_file_system_in_memory_is_refused_unless_allowed(box: AngelBox, tmp_path: Path) -> None:
    memory = Path("/dev/shm") / f"droprd-{os.getpid()}-{tmp_path.name}"
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    box.spool.rename(box.path / "old")
    subprocess.run(["cp", "-a", str(box.path / "old"), str(memory)], check=True)
    try:
        box.spool.symlink_to(memory)
        box.start(ready=False)
        assert box.wait() == 1
        assert "code=unsafe_filesystem" in box.log
        box.environment["DROPRD_NODE__ALLOW_UNSAFE_FILESYSTEM"] = "true"
        box.start()
        assert any("tmpfs" in text for text in box.status()["problems"])
        assert box.stop() == 0
    finally:
        box.end()
        subprocess.run(["rm", "-rf", str(memory)], check=True)


# -- restarts ------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_at_once(box: AngelBox) -> None:
    box.start()
    pid = box.running("sender")
    others = box.running("janitor")
    os.kill(pid, signal.SIGKILL)
    box.running("sender", but_not=pid)
    assert box.of("sender")["restarts"] == 1
    assert box.running("janitor") == others


def test_a_worker_that_dies_before_its_first_work_backs_off_and_is_not_given_up(
    box: AngelBox,
) -> None:
    box.worker("sender", CRASHES)
    box.start()
    eventually(lambda: box.of("sender").get("failures", 0) >= 2, box.log)
    reasons = {reason["code"] for reason in box.call("health")["reasons"]}
    assert "worker_backoff" in reasons
    box.worker("sender", GOOD)
    box.running("sender")


def test_exit_78_waits_for_another_configuration(box: AngelBox) -> None:
    box.worker("sender", REFUSES)
    box.start()
    eventually(lambda: box.of("sender").get("state") == "fatal", box.log)
    assert box.call("health")["verdict"] == "critical"
    box.worker("sender", GOOD)
    assert box.of("sender")["restarts"] == 0
    box.call("reload")
    box.running("sender")


def test_a_worker_that_hangs_writes_its_stacks_and_is_replaced(box: AngelBox) -> None:
    box.worker("sender", HANGS)
    box.configure(hang_timeout_s=3)
    box.start()
    pid = box.running("sender")
    box.worker("sender", GOOD)
    box.running("sender", but_not=pid)
    assert box.logged('event="worker hangs"')
    assert "angelbox_sender.py" in box.log  # the stack, by faulthandler
    assert box.logged("signal=SIGABRT")


def test_a_stopped_worker_is_killed_and_replaced(box: AngelBox) -> None:
    box.configure(hang_timeout_s=3)
    box.start()
    pid = box.running("janitor")
    os.kill(pid, signal.SIGSTOP)
    box.running("janitor", but_not=pid)
    assert gone(pid)


def test_a_stopped_angel_takes_the_silence_for_its_own(box: AngelBox) -> None:
    box.configure(hang_timeout_s=3)
    box.start()
    pid = box.running("sender")
    box.signal(signal.SIGSTOP)
    end = time.monotonic() + 4.5
    eventually(lambda: time.monotonic() > end, "time passes")
    box.signal(signal.SIGCONT)
    end = time.monotonic() + 1.5
    eventually(lambda: time.monotonic() > end, "time passes")
    assert box.running("sender") == pid


def test_a_worker_that_grew_too_large_is_replaced_gracefully(box: AngelBox) -> None:
    box.worker("sender", FAT)
    box.configure(max_rss_mib=150)
    box.start()
    eventually(lambda: box.of("sender").get("restarts") == 1, "recycled")
    assert box.logged("over max_rss_mib")
    assert not box.logged("worker=sender .*signal=SIGKILL")


def test_a_restart_of_the_receiver_refuses_no_connection(box: AngelBox) -> None:
    box.worker("receiver", ACCEPTS)
    box.configure("receiver", listen=["127.0.0.1:0"])
    box.start()
    address = address_of(box)
    assert answer_of(address) == b"1"
    pid = box.running("receiver")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: answer_of(address) == b"2", "another receiver answers")


WRITES = """
    import asyncio, os
    from droprd.workers import worker

    async def serve(context):
        context.ready()
        fd = os.open(os.environ["FROZEN"] + "/file", os.O_WRONLY | os.O_CREAT)
        while not context.stopping.is_set():
            context.beat()
            os.write(fd, b"x")
            os.fsync(fd)
            await asyncio.sleep(0.05)

    worker.run(NAME, serve)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be frozen; it is thawed whatever happens."""
    image, point = tmp_path / "image", tmp_path / "disk"
    point.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    made = subprocess.run(
        f"mkfs.ext4 -q {image} && mount -o loop {image} {point}", shell=True, capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("no loop mount here")
    yield point
    subprocess.run(["fsfreeze", "-u", str(point)], capture_output=True)
    subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to freeze a disk")
def test_a_worker_that_is_stuck_in_the_kernel_is_reported_and_never_doubled(
    box: AngelBox, disk: Path
) -> None:
    box.worker("sender", WRITES)
    box.environment["FROZEN"] = str(disk)
    box.configure(hang_timeout_s=3)
    box.start()
    pid = box.running("sender")
    subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
    eventually(lambda: box.of("sender").get("stuck"), "reported")
    assert box.of("sender") == {"state": "stopping", "pid": pid, "restarts": 0, "stuck": True}
    assert "worker_stuck" in {r["code"] for r in box.call("health")["reasons"]}
    assert box.of("janitor")["state"] == "running"
    subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
    box.running("sender", but_not=pid)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to freeze a disk")
def test_the_angel_answers_and_ends_in_time_while_the_disk_of_the_spool_hangs(
    box: AngelBox, disk: Path
) -> None:
    subprocess.run(["mv", str(box.spool), str(disk / "spool")], check=True)
    box.spool.symlink_to(disk / "spool")
    box.worker("sender", WRITES)
    box.environment["FROZEN"] = str(disk)
    box.configure(stop_timeout_s=5)
    box.start()
    subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
    with pytest.raises(DroprdError) as caught:
        box.call("pause", target="")
    assert caught.value.code == "timeout"
    assert box.call("hello")["node"] == "hamburg"
    pid = box.of("sender")["pid"]
    box.signal(signal.SIGTERM)
    assert box.wait(5) == 1
    assert box.logged(f'event="process left behind" name=sender pid={pid}')
    assert box.logged('event="process left behind" name=writer')
    first = box.process
    box.start(ready=False)
    assert box.wait(25) == 1
    assert box.logged("code=spool_busy pid=")
    box.process = first
    subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
    eventually(lambda: gone(pid), "it ends")


def test_a_command_that_breaks_a_worker_is_answered_and_the_worker_replaced(
    box: AngelBox,
) -> None:
    box.start()
    pid = box.running("sender")
    assert box.call("accept_clock") == {"workers": ["janitor", "receiver", "sender"]}
    box.running("sender", but_not=pid)
    assert box.logged("KeyError")


# -- the angel's own death -----------------------------------------------------------------------


def test_workers_leave_when_the_angel_is_killed_and_the_next_one_takes_over(box: AngelBox) -> None:
    box.start()
    pids = [box.running(name) for name in ("sender", "receiver", "janitor")]
    box.signal(signal.SIGKILL)
    box.wait()
    box.start()
    assert all(gone(pid) for pid in pids)
    assert box.stop() == 0


def test_a_stopped_old_worker_is_waited_for_then_killed(box: AngelBox) -> None:
    box.start()
    pid = box.running("sender")
    os.kill(pid, signal.SIGSTOP)
    box.signal(signal.SIGKILL)
    box.wait()
    box.start(ready=False)
    eventually(lambda: box.status().get("state") == "running", "takes over", 25)
    assert gone(pid)
    assert box.logged(f'event="old worker killed" pid={pid}')


# -- reload --------------------------------------------------------------------------------------


def test_reload_tells_what_changed_and_keeps_the_workers(box: AngelBox) -> None:
    box.start()
    pid = box.running("sender")
    box.configure(max_rss_mib=400)
    assert box.call("reload") == {"changed": ["daemon"]}
    assert box.running("sender") == pid
    eventually(lambda: "reload ['changed', 'settings']" in box.status()["problems"], "told")


def test_a_bad_new_configuration_is_reported_and_the_old_one_stays(box: AngelBox) -> None:
    box.start()
    box.configure(stop_timeout_s="never")
    with pytest.raises(DroprdError) as caught:
        box.call("reload")
    assert caught.value.code == "config_invalid"
    assert "stop_timeout_s" in caught.value.why
    box.signal(signal.SIGHUP)
    eventually(lambda: box.logged("old configuration stays", 2), "reported by SIGHUP too")
    assert box.status()["state"] == "running"


def test_the_name_of_the_node_cannot_change_while_it_runs(box: AngelBox) -> None:
    box.start()
    box.configure()
    text = (box.path / "droprd.toml").read_text()
    (box.path / "droprd.toml").write_text(text.replace("hamburg", "bremen"))
    with pytest.raises(DroprdError) as caught:
        box.call("reload")
    assert caught.value.code == "restart_needed"
    assert box.status()["node"] == "hamburg"


def test_a_reload_opens_new_addresses_and_closes_old_ones(box: AngelBox) -> None:
    box.worker("receiver", ACCEPTS)
    box.configure("receiver", listen=["127.0.0.1:0"])
    box.start()
    old, pid = address_of(box), box.running("receiver")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    box.configure("receiver", listen=[f"127.0.0.1:{port}"])
    box.call("reload")
    box.running("receiver", but_not=pid)
    assert answer_of(("127.0.0.1", port)) == b"2"
    with pytest.raises(ConnectionRefusedError):
        answer_of(old)


def test_an_address_that_is_taken_leaves_the_old_ones_in_place(box: AngelBox) -> None:
    box.worker("receiver", ACCEPTS)
    box.configure("receiver", listen=["127.0.0.1:0"])
    box.start()
    old = address_of(box)
    with socket.create_server(("127.0.0.1", 0)) as other:
        box.configure("receiver", listen=[f"127.0.0.1:{other.getsockname()[1]}"])
        with pytest.raises(DroprdError) as caught:
            box.call("reload")
    assert caught.value.code == "port_in_use"
    assert answer_of(old) == b"1"


# -- inherited sockets, process 1, systemd ---------------------------------------------------------


def test_a_socket_on_descriptor_0_is_used(box: AngelBox) -> None:
    box.worker("receiver", ACCEPTS)
    with socket.create_server(("127.0.0.1", 0)) as mine:
        address = mine.getsockname()
        box.configure("receiver", listen=[f"127.0.0.1:{address[1]}"])
        box.start(stdin=mine)
        assert box.status()["listen"] == [f"127.0.0.1:{address[1]}"]
        assert answer_of(address) == b"1"


def test_sockets_of_systemd_are_used(box: AngelBox) -> None:
    box.worker("receiver", ACCEPTS)
    with socket.create_server(("127.0.0.1", 0)) as mine:
        address = mine.getsockname()
        # As systemd does it: the sockets from 3 on, and the pid of the process that is exec'd.
        box.prefix = [
            "bash",
            "-c",
            f'exec 3<&{mine.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"',
            "bash",
        ]
        box.start(pass_fds=(mine.fileno(),))
        assert answer_of(address) == b"1"


def test_readiness_status_watchdog_and_stopping_are_told_to_systemd(box: AngelBox) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(box.path / "notify"))
        manager.settimeout(10)
        box.environment["NOTIFY_SOCKET"] = str(box.path / "notify")
        box.environment["WATCHDOG_USEC"] = "600000"
        box.start()
        told: list[str] = []
        while not {"READY=1", "WATCHDOG=1"} <= set(told):
            told += manager.recv(4096).decode().split("\n")
        box.stop()
        with contextlib.suppress(BlockingIOError):
            manager.setblocking(False)
            while True:
                told += manager.recv(4096).decode().split("\n")
    assert any(one.startswith("STATUS=running: 0 peers") for one in told)
    assert "STOPPING=1" in told
    assert any(one.startswith("EXTEND_TIMEOUT_USEC=") for one in told)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")
def test_as_process_1_it_waits_for_orphans(box: AngelBox) -> None:
    orphans = """
    import asyncio, os
    from droprd.workers import worker

    async def serve(context):
        if os.fork() == 0:          # a child …
            if os.fork() == 0:      # … whose own child outlives it
                os._exit(0)
            os._exit(0)
        os.wait()
        context.ready()
        while not context.stopping.is_set():
            context.beat()
            await asyncio.sleep(0.05)

    worker.run(NAME, serve)
    """
    box.worker("janitor", orphans)
    box.prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    box.start()
    assert box.call("hello")["pid"] == 1
    assert box.process is not None
    (angel,) = psutil.Process(box.process.pid).children()
    eventually(
        lambda: [c.name() for c in angel.children() if c.status() == psutil.STATUS_ZOMBIE] == [],
        "no zombies",
    )
    angel.send_signal(signal.SIGTERM)
    assert box.wait() == 0


# -- the control socket --------------------------------------------------------------------------


def test_hello_comes_first(box: AngelBox) -> None:
    from droprd.core import rpc

    box.start()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(box.socket))
        sock.sendall(rpc.encode(rpc.Request(1, "status", {})))
        (answer,) = rpc.Decoder().feed(sock.recv(65536))
        assert isinstance(answer, rpc.Response)
        assert answer.error is not None
        assert answer.error.code == "hello_first"


def test_rubbish_ends_the_connection_and_nothing_else(box: AngelBox) -> None:
    box.start()
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", b"\xc1", os.urandom(100_000), b"\x91" * 5000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(box.socket))
            with contextlib.suppress(ConnectionError):
                sock.sendall(rubbish)
                assert sock.recv(65536) == b""
    assert box.status()["state"] == "running"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_another_user_may_not_use_the_control_socket(tmp_path: Path) -> None:
    from droprd.angel.control import identify

    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert identify(ours, 0).may_change
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        os.chmod(path, 0o777)
        for parent in [*tmp_path.parents, tmp_path]:
            if parent != Path("/") and parent.stat().st_mode & 0o777 == 0o700:
                os.chmod(parent, 0o711)
        pid = os.fork()
        if pid == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX) as sock:
                os._exit(sock.connect_ex(path))
        accepted, _ = listening.accept()
        with accepted:
            caller = identify(accepted, 0)
        assert os.waitpid(pid, 0)[1] == 0
    assert (caller.uid, caller.may_change, caller.may_read) == (65534, False, False)


def test_a_pause_is_on_disk_tells_the_workers_and_survives_a_restart(box: AngelBox) -> None:
    box.start()
    told = box.call("pause", target="berlin/sites", reason="moving", for_s=3600)
    assert told["reason"] == "moving"
    expected = "pause ['draining', 'paused', 'target']"
    eventually(lambda: expected in box.status()["problems"], "the workers are told")
    layout = Layout(str(box.spool))
    assert "berlin/sites" in state.read_wishes(OsFs(), layout).pauses
    public = state.read_public(OsFs(), layout)
    assert public is not None
    assert public["paused"]["berlin/sites"]["reason"] == "moving"
    box.stop()
    box.start()
    assert "berlin/sites" in box.status()["paused"]
    box.call("resume", target="berlin")
    assert box.status()["paused"] == {}


def test_a_pause_ends_by_itself(box: AngelBox) -> None:
    box.start()
    box.call("pause", target="", for_s=0.2)
    eventually(lambda: box.status()["paused"] == {}, "over")
    layout = Layout(str(box.spool))
    eventually(lambda: state.read_wishes(OsFs(), layout).pauses == {}, "gone from the disk")


def test_a_drain_waits_for_those_who_are_sending(box: AngelBox) -> None:
    box.start()
    fs, layout = OsFs(), Layout(str(box.spool))
    gate = fs.open(layout.gate, os.O_RDWR)
    assert fs.try_lock(gate, shared=True)
    with Control(str(box.socket), 20) as control:
        import threading

        answers: list[object] = []
        asking = threading.Thread(
            target=lambda: answers.append(control.call("drain", {"target": ""}))
        )
        asking.start()
        eventually(lambda: (state.read_public(fs, layout) or {})["draining"] == [""], "published")
        assert answers == []
        fs.close(gate)
        asking.join(10)
    assert answers == [{"target": "", "all": True}]


def test_what_is_no_target_is_refused(box: AngelBox) -> None:
    box.start()
    for target in ("BERLIN", "berlin/sites/10", "berlin/sites/x", "a/b/1/2", "/", "berlin//1", 5):
        with pytest.raises(UsageError):
            box.call("pause", target=target)
    with pytest.raises(UsageError):
        box.call("pause", target="berlin", for_s=-1)
    assert box.status()["paused"] == {}


def test_calls_that_name_an_unknown_peer_or_worker_are_refused(box: AngelBox) -> None:
    box.start()
    with pytest.raises(UnknownPeer):
        box.call("retry", peer="paris")
    with pytest.raises(UnknownPeer):
        box.call("why", peer="paris")
    with pytest.raises(UsageError):
        box.call("restart", worker="cook")
    with pytest.raises(DroprdError) as caught:
        box.call("dance")
    assert caught.value.code == "unknown_method"


def test_the_last_gauges_are_kept_for_a_stopped_daemon(box: AngelBox) -> None:
    box.start()
    box.stop()
    assert state.read_gauges(OsFs(), Layout(str(box.spool)), "sender") == {"commands": []}
