"""A pause with `receiving` reaches the real receiver: peers are told to wait, nothing is stored."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.angel.angel import MODULES
from tests.system.angelbox import AngelBox, eventually

TOKEN = "a-token-for-tests-0123456789"


@pytest.fixture
def box(tmp_path: Path) -> Iterator[AngelBox]:
    box = AngelBox(tmp_path)
    box.modules = dict(MODULES)
    (tmp_path / "token").write_text(TOKEN)
    box.configure("receiver", listen=["127.0.0.1:0"])
    box.configure("peers.berlin", token_file="token")
    box.start()
    yield box
    box.end()


def push(box: AngelBox) -> tuple[int, str, str | None]:
    """(status, code, Retry-After) of a push that is no push."""
    host, _, port = box.status()["listen"][0].rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    headers = {"Authorization": f"Bearer {TOKEN}", "Droprd-Version": "1"}
    connection.request("POST", "/v1/push", b"nonsense", headers)
    answer = connection.getresponse()
    code = json.loads(answer.read())["code"]
    connection.close()
    return answer.status, code, answer.getheader("Retry-After")


@pytest.mark.parametrize("target", ["", "berlin"])
def test_receiving_can_be_paused_and_resumed(box: AngelBox, target: str) -> None:
    assert push(box)[0] == 400
    box.call("pause", target=target, receiving=True)
    status, code, retry_after_s = push(box)
    assert (status, code) == (503, "paused")
    assert retry_after_s is not None
    box.call("resume", target=target)
    assert push(box)[0] == 400


def test_a_pause_of_sending_alone_lets_peers_push(box: AngelBox) -> None:
    box.call("pause", target="berlin")
    eventually(lambda: box.status()["peers"]["berlin"]["state"] == "paused", "paused")
    assert push(box)[0] == 400


def test_paused_receiving_survives_the_death_of_the_receiver(box: AngelBox) -> None:
    import os
    import signal

    box.call("pause", target="", receiving=True)
    pid = box.running("receiver")
    os.kill(pid, signal.SIGKILL)
    box.running("receiver", but_not=pid)
    assert push(box)[1] == "paused"
