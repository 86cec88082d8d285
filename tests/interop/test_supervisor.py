"""Our unit files in a real supervisord: start, stop, inherited socket, and the health listener."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from supervisor.xmlrpc import SupervisorTransport

from tests.system.angelbox import RUN, AngelBox, eventually
from tests.system.test_angel import ACCEPTS, answer_of, gone

ETC = Path(__file__).parents[2] / "etc" / "supervisor"


class Supervisord:
    """A real supervisord with one of our files, its paths turned to a temporary directory."""

    def __init__(self, box: AngelBox) -> None:
        self.box = box
        self.process: subprocess.Popen[bytes] | None = None
        # The daemon with the small workers of the test, as a command.
        wrapper = box.path / "droprd"
        wrapper.write_text(f"import sys\nsys.argv[1:1] = [{_json(box)!r}]\n{RUN}")
        self._commands = {
            "/usr/bin/droprd ": f"{sys.executable} {wrapper} ",
            "/usr/bin/droprd-supervisor-listener ": (
                f"{sys.executable} -m droprd.monitor.supervisor --timeout 1 --strikes 1 --young 1 "
            ),
        }

    def start(self, unit: str, **changes: str) -> None:
        text = (ETC / unit).read_text()
        for old, new in {
            **self._commands,
            "/etc/droprd/droprd.toml": str(self.box.path / "droprd.toml"),
            "/var/log/": f"{self.box.path}/",
            "TICK_60": "TICK_5",
            **changes,
        }.items():
            assert old in text or old not in changes
            text = text.replace(old, new)
        text = re.sub(r"(?m)^user=.*\n", "", text)
        conf = self.box.path / "supervisord.conf"
        conf.write_text(
            f"[supervisord]\nnodaemon=true\nlogfile={self.box.path}/supervisord.log\n"
            f"pidfile={self.box.path}/supervisord.pid\nchildlogdir={self.box.path}\n"
            f"[unix_http_server]\nfile={self.box.path}/sv.sock\n"
            "[rpcinterface:supervisor]\n"
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n"
            + text
        )
        self.box.configure()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(conf)],
            env=self.box.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(lambda: self.box.status().get("state") == "running", "the daemon runs", 30)

    @property
    def rpc(self) -> Any:
        transport = SupervisorTransport("", "", f"unix://{self.box.path}/sv.sock")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport).supervisor

    def pid(self) -> int:
        found = self.rpc.getProcessInfo("droprd")["pid"]
        assert isinstance(found, int)
        return found

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(40)


def _json(box: AngelBox) -> str:
    import json

    return json.dumps(box.modules)


@pytest.fixture
def supervisord(tmp_path: Path) -> Iterator[Supervisord]:
    box = AngelBox(tmp_path)
    supervisord = Supervisord(box)
    yield supervisord
    supervisord.end()


def test_the_program_unit_starts_and_stops_the_daemon(supervisord: Supervisord) -> None:
    supervisord.start("droprd.conf")
    eventually(
        lambda: supervisord.rpc.getProcessInfo("droprd")["statename"] == "RUNNING", "running"
    )
    pid = supervisord.pid()
    workers = [w["pid"] for w in supervisord.box.status()["workers"].values()]
    supervisord.rpc.stopProcess("droprd")
    assert all(gone(one) for one in (pid, *workers))
    assert supervisord.rpc.getProcessInfo("droprd")["statename"] == "STOPPED"


def test_the_listener_restarts_a_daemon_that_does_not_answer(supervisord: Supervisord) -> None:
    supervisord.start("droprd.conf")
    eventually(
        lambda: supervisord.rpc.getProcessInfo("droprd-health")["statename"] == "RUNNING", "running"
    )
    pid = supervisord.pid()
    # It is there, and does nothing: supervisord alone would never notice.
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: (supervisord.box.path / "droprd-health.log").exists(), "log")
    eventually(
        lambda: "daemon restarted" in (supervisord.box.path / "droprd-health.log").read_text(),
        "the listener acts",
        30,
    )
    os.kill(pid, signal.SIGCONT)
    eventually(lambda: supervisord.pid() not in (0, pid), "another daemon", 30)
    eventually(lambda: supervisord.box.status().get("state") == "running", "it runs", 30)


def test_the_listener_keeps_its_hands_off_a_paused_node(supervisord: Supervisord) -> None:
    supervisord.start("droprd.conf")
    supervisord.box.call("pause", target="", reason="moving the disk")
    pid = supervisord.pid()
    os.kill(pid, signal.SIGSTOP)
    listener = supervisord.box.path / "droprd-health.log"
    try:
        # Two ticks pass: one would have been enough.
        before = supervisord.rpc.getProcessInfo("droprd-health")["now"]
        eventually(
            lambda: supervisord.rpc.getProcessInfo("droprd-health")["now"] - before > 11,
            "two ticks",
            30,
        )
        assert "restarted" not in listener.read_text()
        assert supervisord.pid() == pid
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_fcgi_unit_hands_over_a_listening_socket(supervisord: Supervisord) -> None:
    supervisord.box.worker("receiver", ACCEPTS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    supervisord.box.configure("receiver", listen=[f"127.0.0.1:{port}"])
    supervisord.start("droprd-fcgi.conf", **{"127.0.0.1:7707": f"127.0.0.1:{port}"})
    assert answer_of(("127.0.0.1", port)) == b"1"
    supervisord.rpc.stopProcess("droprd:droprd")
    supervisord.rpc.startProcess("droprd:droprd")
    eventually(lambda: supervisord.box.status().get("state") == "running", "it runs", 30)
    assert answer_of(("127.0.0.1", port)) == b"1"
