"""Several users of one node: who may send, receive, look, and change; everything under umask 077.

The users and groups exist in a mount namespace of their own only, in which copies of /etc/passwd
and /etc/group are in the place of the real ones: nothing is left on the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from droprd.testing.node import Node, wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be other users"),
]

ROOT = Path(__file__).parents[2]
IDS = {name: 61_000 + n for n, name in enumerate(("droprd", "anna", "otto", "mona", "eve"))}
GROUPS = {
    "droprd-send": (61_101, ["droprd", "anna"]),
    "droprd-receive": (61_102, ["droprd", "otto"]),
    "droprd-monitor": (61_103, ["droprd", "mona"]),
}
ENTER = 'umask 077 && mount --bind "$1" /etc/passwd && mount --bind "$2" /etc/group && shift 2 &&'

SEND = """
import sys, droprd
try:
    with droprd.Outbox(config=sys.argv[1]) as outbox:
        ids = outbox.send_many([b"one", b"two"], to="hamburg", channel="sites")
        ids.append(outbox.send(bytes(100_000), to="hamburg", channel="sites"))
        ids.append(outbox.send_file(sys.argv[1], to="hamburg", channel="sites"))
        print(*ids)
except droprd.DroprdError as error:
    print(error.code, "|", error)
"""
RECEIVE = """
import sys, time, droprd
try:
    with droprd.Inbox(config=sys.argv[1]) as inbox:
        want, end = int(sys.argv[2]), time.monotonic() + 30
        while want > 0 and time.monotonic() < end:
            for message in inbox.receive("sites", wait_s=1):
                with message.open() as body:
                    print(message.id, message.sender, len(body.read()))
                message.ack()
                want -= 1
except droprd.DroprdError as error:
    print(error.code, "|", error)
"""


class Box:
    """One shared node, and the means to be one of its users."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.chmod(0o755)
        self.files = [path / "passwd", path / "group"]
        people = "".join(f"{n}:x:{i}:{i}::/nonexistent:/bin/sh\n" for n, i in IDS.items())
        groups = "".join(f"{n}:x:{i}:\n" for n, i in IDS.items())
        groups += "".join(f"{n}:x:{i}:{','.join(who)}\n" for n, (i, who) in GROUPS.items())
        for file, more in zip(self.files, (people, groups), strict=True):
            file.write_text(Path("/etc", file.name).read_text() + more)
            file.chmod(0o644)
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        self.python = self._python()
        self.node = Node(
            path / "node", "hamburg", prefix=self.be("root"), python=self.python, env=self.env
        )
        self.node.ctl("peer", "add", "berlin", "http://127.0.0.1:9")

    def be(self, user: str) -> list[str]:
        """What is put before a command that this user runs."""
        setpriv = ""
        if user != "root":
            setpriv = f"setpriv --reuid {IDS[user]} --regid {IDS[user]} --init-groups --"
        script = f'{ENTER} cd / && exec {setpriv} "$@"'
        return ["unshare", "--mount", "sh", "-c", script, "sh", *map(str, self.files)]

    def run(self, user: str, command: Sequence[object]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.be(user), *map(str, command)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=self.env,
            timeout=60,
            check=False,
        )

    def code(self, user: str, code: str, *args: object) -> str:
        done = self.run(user, [self.python, "-c", code, self.node.config, *args])
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def ctl(self, user: str, *words: str) -> tuple[int, Any, str]:
        """Exit code, what is on stdout as JSON, and the code of the error on stderr."""
        directory = str(self.node.directory)
        command = [self.python, "-m", "droprd.ctl.main", "-C", directory, *words, "--json"]
        done = self.run(user, command)
        assert "Traceback" not in done.stderr, done.stderr
        error = json.loads(done.stderr) if done.stderr.startswith("{") else {}
        shown = json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout
        return done.returncode, shown, error.get("code", "")

    def start(self) -> None:
        """Start the daemon as its own user."""
        self.node.prefix = self.be("droprd")
        self.node.start()

    def _python(self) -> str:
        """An interpreter with droprd that every user may execute."""
        probe = "import droprd, msgpack, aiohttp, pycurl; print(droprd.__file__)"
        able = self.run("eve", [sys.executable, "-c", probe])
        if able.stdout.startswith(f"{ROOT}/"):
            return sys.executable
        if "unshare" in able.stderr or "mount" in able.stderr:
            pytest.skip(f"no mount namespaces here: {able.stderr.strip()}")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        made = self.path / "venv"
        ask = ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        found = subprocess.run(ask, capture_output=True, text=True, check=False)
        if found.stdout.strip() != version:
            pytest.skip(f"/usr/bin/python3 is not Python {version}, which has our dependencies")
        subprocess.run(
            ["/usr/bin/python3", "-m", "venv", "--without-pip", str(made)], check=True, umask=0o022
        )
        (packages,) = made.glob("lib/python*/site-packages")
        # Neither what only developers need, nor what leads back to this checkout.
        left = shutil.ignore_patterns("mypy*", "ruff*", "pip*", "__pycache__", "__editable__*")
        for source in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            shutil.copytree(source, packages, dirs_exist_ok=True, symlinks=True, ignore=left)
        shutil.copytree(ROOT / "droprd", packages / "droprd", dirs_exist_ok=True, ignore=left)
        subprocess.run(["chmod", "-R", "a+rX", str(made)], check=True)
        del self.env["PYTHONPATH"]
        return str(made / "bin" / "python")


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    path = Path(tempfile.mkdtemp(prefix="droprd-"))
    try:
        made = Box(path)
        try:
            made.start()
            yield made
        finally:
            made.node.close()
    finally:
        shutil.rmtree(path)


def owner_and_group(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def test_the_send_group_sends_and_the_receive_group_receives(box: Box) -> None:
    ids = box.code("anna", SEND).split()
    assert len(ids) == 4
    assert box.ctl("anna", "send", "hamburg", "by hand", "--channel", "sites")[0] == 0
    got = [line.split() for line in box.code("otto", RECEIVE, 5).splitlines()]
    size = box.node.config.stat().st_size
    assert [one[0] for one in got[:4]] == ids
    assert [int(one[2]) for one in got] == [3, 3, 100_000, size, 7]
    assert {one[1] for one in got} == {"hamburg"}
    code, shown, _ = box.ctl("otto", "receive", "sites")
    assert (code, shown) == (0, "")


def test_who_is_in_neither_group_is_refused_and_told_why(box: Box) -> None:
    for user, program in (("eve", SEND), ("eve", RECEIVE), ("otto", SEND), ("anna", RECEIVE)):
        code, _, text = box.code(user, program, 1).partition(" | ")
        assert code in ("spool_rights", "spool_unwritable"), (user, program)
        assert "ermission" in text or "permitted" in text
    for user, *words in (
        ("eve", "send", "hamburg", "x"),
        ("eve", "receive", "sites"),
        ("otto", "send", "hamburg", "x"),
        ("anna", "receive", "sites"),
    ):
        exit_code, _, code = box.ctl(user, *words)
        assert exit_code == 1
        assert code in ("spool_rights", "spool_unwritable")


def test_the_monitor_group_reads_status_and_changes_nothing(box: Box) -> None:
    for words in (["status"], ["why", "berlin"], ["health"], ["peer", "list"]):
        exit_code, shown, _ = box.ctl("mona", *words)
        assert exit_code == 0, words
        assert shown, words
    for words in (["pause"], ["resume"], ["drain"], ["stop"], ["reload"], ["retry", "berlin"]):
        exit_code, _, code = box.ctl("mona", *words)
        assert (exit_code, code) == (1, "not_permitted"), words
    exit_code, shown, _ = box.ctl("droprd", "status")
    assert exit_code == 0
    assert (shown["paused"], shown["draining"], shown["state"]) == ({}, [], "running")


def test_others_may_not_even_look(box: Box) -> None:
    for user in ("eve", "anna", "otto"):
        exit_code, shown, code = box.ctl(user, "status")
        assert (exit_code, shown, code) == (1, "", "not_permitted")


def test_nobody_but_the_daemon_reads_its_secrets_and_other_peoples_messages(box: Box) -> None:
    secret = box.node.directory / "keys" / "berlin.token"
    assert box.run("droprd", ["cat", secret]).returncode == 0
    box.ctl("anna", "send", "berlin", "x")
    wait_until(lambda: box.ctl("droprd", "status")[1]["unmerged_bytes"] == 0, "it is merged")
    lanes = box.node.spool / "outbox" / "lanes"
    for user in ("anna", "otto", "mona", "eve"):
        assert box.run(user, ["cat", secret]).returncode != 0
        assert box.run(user, ["grep", "-r", ".", lanes]).stdout == ""


def test_what_root_does_leaves_nothing_that_the_daemon_may_not_write(box: Box) -> None:
    assert box.node.stop() == 0
    assert box.ctl("root", "pause", "hamburg", "--reason", "moving")[0] == 0
    assert box.ctl("root", "send", "hamburg", "from root", "--channel", "roots")[0] == 0
    assert box.ctl("mona", "resume")[::2] == (1, "not_permitted")
    box.start()
    assert box.ctl("root", "resume")[0] == 0
    code, shown, _ = box.ctl("root", "receive", "roots", "--wait", "20s")
    assert (code, shown["body"]) == (0, "from root")
    for path in box.node.spool.rglob("*"):
        assert path.stat().st_uid in (IDS["droprd"], IDS["anna"], IDS["otto"]), path
    code, report, _ = box.ctl("droprd", "fsck")
    assert code == 0
    assert report["findings"] == []
    ids = box.code("anna", SEND).split()
    got = box.code("otto", RECEIVE, 4).split()
    assert got[::3] == ids
