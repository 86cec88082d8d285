"""/metrics, /healthz and /readyz of a real node."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from droprd.testing.node import Node, free_port, wait_until


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def node(tmp_path: Path, port: int) -> Iterator[Node]:
    made = Node(tmp_path / "hamburg", "hamburg", settings=f'[monitor]\nlisten = "127.0.0.1:{port}"')
    yield made
    made.close()


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def values(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    status, text = get(port, "/metrics")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in (text_string_to_metric_families(text) if status == 200 else ())
        for sample in family.samples
    }


def value(port: int, name: str, **labels: str) -> float | None:
    return values(port).get((name, frozenset(labels.items())))


def test_counters_do_not_fall_when_a_worker_is_killed(node: Node, port: int) -> None:
    node.start()
    with node.outbox() as outbox:
        for _ in range(3):
            outbox.send(b"x", to="hamburg", channel="sites")
    received = "droprd_received_messages_total"
    wait_until(lambda: value(port, received) == 3, "three were received")
    delivered = "droprd_peer_delivered_messages_total"
    wait_until(lambda: value(port, delivered, peer="hamburg") in (3, None), "and delivered")
    node.kill_worker("receiver")
    restarts = "droprd_worker_restarts_total"
    wait_until(lambda: value(port, restarts, worker="receiver") == 1, "the restart is counted")
    node.wait_running()
    assert value(port, received) == 3
    with node.outbox() as outbox:
        outbox.send(b"x", to="hamburg", channel="sites")
    wait_until(lambda: value(port, received) == 4, "counted on")
    ready = "droprd_channel_ready_messages"
    wait_until(lambda: value(port, ready, channel="sites") == 4, "the janitor counted them")


def test_health_and_readiness_are_told_apart(node: Node, port: int) -> None:
    node.start()
    wait_until(lambda: get(port, "/healthz")[0] == 200, "healthy")
    status, text = get(port, "/readyz")
    assert (status, json.loads(text)["schema"]) == (200, 1)
    # A disk that is full is critical; no restart would help.
    with open(node.config, "a", encoding="utf-8") as file:
        file.write('[health]\nfree_bytes_warning = "1000TiB"\nfree_bytes_critical = "999TiB"\n')
    node.ctl("reload")
    wait_until(lambda: get(port, "/readyz")[0] == 503, "not ready")
    assert get(port, "/healthz")[0] == 200


def test_a_hung_daemon_is_told_in_time(node: Node, port: int) -> None:
    node.start()
    wait_until(lambda: get(port, "/healthz")[0] == 200, "healthy")
    assert node.process is not None
    os.kill(node.process.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: get(port, "/healthz")[0] == 503, "not healthy", 15)
    finally:
        os.kill(node.process.pid, signal.SIGCONT)
    wait_until(lambda: get(port, "/healthz")[0] == 200, "healthy again")


def test_a_port_in_use_is_a_problem_and_no_end(node: Node, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        node.start()
        wait_until(
            lambda: any(f"127.0.0.1:{port}" in one for one in node.status()["problems"]),
            "the problem is shown",
        )
    wait_until(lambda: get(port, "/healthz")[0] == 200, "tried again", 20)
    wait_until(lambda: not node.status()["problems"], "and forgotten")


def test_a_reload_turns_it_on_and_off_and_moves_it(node: Node, port: int) -> None:
    text = node.config.read_text()
    node.config.write_text(text.replace(f"127.0.0.1:{port}", ""))
    node.start()
    assert get(port, "/healthz")[0] == 0
    janitor = psutil.Process(node.worker_pid("janitor"))
    assert not any("aiohttp" in one.path for one in janitor.memory_maps())
    path = node.directory / "health.sock"
    node.config.write_text(text.replace(f"127.0.0.1:{port}", f"unix:{path.name}"))
    node.ctl("reload")
    wait_until(path.is_socket, "the socket is there")

    class ByPath(HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(str(path))

    connection = ByPath("localhost")
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()
    node.config.write_text(text)
    node.ctl("reload")
    wait_until(lambda: get(port, "/healthz")[0] == 200, "it moved")
    assert not path.exists()


def test_it_listens_on_loopback_only(node: Node) -> None:
    node.config.write_text(node.config.read_text().replace("127.0.0.1:", "0.0.0.0:"))
    done = node.ctl("config", "check", check=False)
    assert done.returncode != 0
    assert "loopback" in done.stderr.decode()
