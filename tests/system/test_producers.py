"""Real producers: killed, forked, crowded, without rights, without room. What returned is there."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import droprd
from droprd.errors import SpoolFull
from droprd.spool import journalfile
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, SharedRights, make_spool, read_version
from droprd.spool.state import read_public, write_public
from tests.spools import all_frames, bodies_by_id, journal_names, new_spool, publish

ROOT = Path(__file__).parents[2]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
FS = OsFs()

SINGLES = """
import sys, droprd
with droprd.Outbox(sys.argv[1]) as outbox:
    for n in range(10**9):
        print(outbox.send(b"%d" % n, to="berlin"), flush=True)
"""
MANY = """
import sys, droprd
with droprd.Outbox(sys.argv[1]) as outbox:
    for n in range(10**9):
        bodies = [b"%d" % n] + [bytes(1000)] * 200 + [bytes(40_000)]
        print(*outbox.send_many(bodies, to="berlin"), flush=True)
"""
TURNS = """
import sys, droprd
with droprd.Outbox(sys.argv[1]) as outbox:
    for line in sys.stdin:
        print(outbox.send(line.encode(), to="berlin"), flush=True)
"""


def producer(code: str, *args: object, **more: Any) -> subprocess.Popen[str]:
    guard = "import signal; signal.alarm(60)\n"  # so that no test waits for ever
    return subprocess.Popen(
        [sys.executable, "-c", guard + code, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **more,
    )


def run(code: str, *args: object, **more: Any) -> str:
    process = producer(code, *args, **more)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out


def read_lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def is_held(layout: Layout, name: str) -> bool:
    file = journalfile.open_journal(FS, layout, name)
    assert file is not None
    try:
        return not file.hold()
    finally:
        file.close()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_spool(tmp_path / "spool", "berlin")


# -- killed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [SINGLES, MANY], ids=["send", "send_many"])
def test_what_returned_before_a_sigkill_is_in_the_journal(layout: Layout, code: str) -> None:
    returned: list[list[str]] = []
    for round_ in range(5):
        process = producer(code, layout.root)
        lines = read_lines(process, 1 + 7 * round_)
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate(timeout=30)
        # A line that the kill cut short says nothing.
        lines += rest.splitlines() if rest.endswith("\n") else rest.splitlines()[:-1]
        returned += [line.split() for line in lines if line]
    found = bodies_by_id(layout)
    order = {message_id: at for at, message_id in enumerate(found)}
    ids = [message_id for group in returned for message_id in group]
    assert not [i for i in ids if i not in found]
    assert ids == sorted(ids, key=order.__getitem__)
    assert not any(is_held(layout, name) for name in journal_names(layout))
    with droprd.Outbox(layout.root) as outbox:
        assert outbox.send(b"after", to="berlin") in bodies_by_id(layout)


def test_a_send_many_that_was_killed_shows_nothing_to_readers_of_the_synced_end(
    layout: Layout,
) -> None:
    for round_ in range(3):
        process = producer(MANY, layout.root)
        read_lines(process, 1 + round_)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    groups = [bytes(f.body(0)) for f in all_frames(layout) if not f.info.is_blob]
    messages = sum(f.count for f in all_frames(layout))
    assert messages % 202 == 0
    assert len(groups) % 7 == 0


# -- order over processes ----------------------------------------------------------------------


def test_two_producers_that_call_each_other_are_in_order(layout: Layout) -> None:
    pair = [producer(TURNS, layout.root, stdin=subprocess.PIPE) for _ in range(2)]
    ids = []
    for turn in range(200):
        process = pair[turn % 2]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{turn}\n")
        process.stdin.flush()
        ids.append(process.stdout.readline().strip())
    for process in pair:
        process.communicate(timeout=30)
    assert len(journal_names(layout)) == 2
    found = bodies_by_id(layout)
    assert list(found) == ids
    assert [int(body) for body in found.values()] == list(range(200))


# -- fork --------------------------------------------------------------------------------------

FORKS = """
import os, sys, threading, droprd
from tests.spools import journal_names
from droprd.spool.layout import Layout
outbox = droprd.Outbox(sys.argv[1])
ids = [outbox.send(b"before", to="berlin")]
stop = threading.Event()
def work():
    while not stop.is_set():
        ids.append(outbox.send(b"thread", to="berlin"))
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
children = []
for n in range(10):
    child = os.fork()
    if not child:
        message_id = outbox.send(b"child", to="berlin")
        if n % 2:
            outbox.close()
        os.write(1, (message_id + "\\n").encode())
        os._exit(0)
    children.append(child)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
ids.append(outbox.send(b"after", to="berlin"))
print(*ids, "ready", sep="\\n", flush=True)
sys.stdin.read()
"""


def test_children_of_a_fork_have_journals_of_their_own_and_leave_the_parents_locked(
    layout: Layout,
) -> None:
    process = producer(FORKS, layout.root, stdin=subprocess.PIPE)
    assert process.stdout is not None
    lines = [line.strip() for line in iter(process.stdout.readline, "ready\n")]
    assert [is_held(layout, name) for name in journal_names(layout)].count(True) == 1
    process.communicate(timeout=30)
    assert process.returncode == 0
    found = bodies_by_id(layout)
    assert sorted(found) == sorted(lines)
    assert list(found.values()).count(b"child") == 10
    assert not any(is_held(layout, name) for name in journal_names(layout))


# -- rights ------------------------------------------------------------------------------------


def test_files_are_readable_by_the_group_under_umask_077(layout: Layout) -> None:
    code = "import os; os.umask(0o077)\n" + (
        "import sys, droprd\n"
        "with droprd.Outbox(sys.argv[1]) as outbox:\n"
        "    outbox.send(b'x', to='berlin'); outbox.send(bytes(50_000), to='berlin')\n"
    )
    run(code, layout.root)
    for directory in (layout.journals, layout.outbox_blobs):
        (name,) = os.listdir(directory)
        assert stat.S_IMODE(os.stat(f"{directory}/{name}").st_mode) == 0o640


ONE = """
import sys, droprd
try:
    with droprd.Outbox(sys.argv[1]) as outbox:
        outbox.send(b"x", to="berlin"); outbox.send(bytes(50_000), to="berlin")
        print("sent")
except droprd.DroprdError as error:
    print(error.code)
"""
SEND_GID, RECEIVE_GID = 54_321, 54_322


@pytest.mark.root
@AS_ROOT
def test_users_of_the_send_group_share_a_spool_and_others_are_refused(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.stat().st_mode & 0o5 != 0o5:
            parent.chmod(0o755)
    python = subprocess.run(
        [sys.executable, "-c", "import droprd.client.outbox"],
        user=60_001,
        group=60_001,
        extra_groups=[],
        cwd=ROOT,
        check=False,
    )
    if python.returncode:
        pytest.skip("other users may not execute this interpreter")
    private = new_spool(tmp_path / "private", "berlin")
    layout = Layout(str(tmp_path / "spool"))
    rights = SharedRights(uid=60_000, gid=60_000, send_gid=SEND_GID, receive_gid=RECEIVE_GID)
    make_spool(FS, layout.root, os.urandom, rights)
    public = read_public(FS, private)
    assert public is not None
    spool_id = read_version(FS, layout.root).spool_id
    write_public(FS, layout, {**public, "spool_id": spool_id})

    def send(uid: int, *groups: int) -> str:
        return run(ONE, layout.root, user=uid, group=uid, extra_groups=groups).strip()

    assert send(60_001, SEND_GID) == "sent"
    assert send(60_002, SEND_GID) == "sent"
    assert send(60_001, SEND_GID) == "sent"
    assert send(60_003) == "spool_unwritable"
    assert send(60_003, RECEIVE_GID) == "spool_unwritable"
    assert len(bodies_by_id(layout)) == 6
    found = [os.stat(layout.journal(name)) for name in journal_names(layout)]
    assert sorted((s.st_uid, s.st_gid, stat.S_IMODE(s.st_mode)) for s in found) == [
        (60_001, SEND_GID, 0o640),
        (60_002, SEND_GID, 0o640),
    ]
    assert {os.stat(f"{layout.outbox_blobs}/{n}").st_gid for n in os.listdir(layout.outbox_blobs)}
    (other,) = (s for s in found if s.st_uid == 60_002)
    (name,) = (n for n in journal_names(layout) if os.stat(layout.journal(n)) == other)
    remove = "import os, sys; os.unlink(sys.argv[1])"
    process = producer(
        remove,
        layout.journal(name),
        user=60_001,
        group=60_001,
        extra_groups=[SEND_GID],
        stderr=subprocess.DEVNULL,
    )
    process.communicate(timeout=30)
    assert process.returncode == 1, "one producer could remove another's journal"


# -- room --------------------------------------------------------------------------------------

FILL = """
import resource, sys, droprd
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
size, many = int(sys.argv[3]), int(sys.argv[4])
full = 0
with droprd.Outbox(sys.argv[1]) as outbox:
    while full < 3:
        try:
            print(*outbox.send_many([bytes(size)] * many, to="berlin"))
        except droprd.SpoolFull:
            full += 1
"""


def check_whole(layout: Layout, out: str, many: int) -> None:
    """All that returned is there and nothing else, and no journal has a tail."""
    found = bodies_by_id(layout)
    assert found
    assert list(found) == out.split()
    assert len(found) % many == 0
    for name in journal_names(layout):
        file = journalfile.open_journal(FS, layout, name)
        assert file is not None
        assert file.is_clean()
        file.close()
    named = {f.frame_id.hex() for f in all_frames(layout) if f.info.is_blob}
    assert {n.partition("~")[2] for n in os.listdir(layout.outbox_blobs)} == named


def test_a_file_size_limit_is_a_full_spool_and_leaves_nothing_half_written(layout: Layout) -> None:
    out = run(FILL, layout.root, 1 << 20, 1000, 7)
    check_whole(layout, out, 7)
    with droprd.Outbox(layout.root) as outbox:
        outbox.send(b"a process without the limit goes on", to="berlin")
    assert len(journal_names(layout)) == 1


@contextmanager
def mounted(where: Path, *command: str) -> Iterator[Path]:
    where.mkdir()
    done = subprocess.run(["mount", *command, str(where)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


@contextmanager
def small_disk(kind: str, tmp_path: Path) -> Iterator[Path]:
    if kind == "tmpfs":
        with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as where:
            yield where
        return
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as where:
        yield where


@pytest.mark.root
@AS_ROOT
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
@pytest.mark.parametrize(("size", "many"), [(1000, 1), (1000, 100), (50_000, 2)])
def test_a_full_disk_refuses_whole_sends_and_goes_on_when_there_is_room(
    tmp_path: Path, kind: str, size: int, many: int
) -> None:
    with small_disk(kind, tmp_path) as where:
        layout = new_spool(where / "spool", "berlin")
        publish(layout, limits={"reserve_bytes": 1})  # so that the disk itself says no
        filler = where / "filler"
        filler.write_bytes(bytes(FS.free_bytes(str(where))[0] - (2 << 20)))
        out = run(FILL, layout.root, 0, size, many)
        check_whole(layout, out, many)
        filler.unlink()
        with droprd.Outbox(layout.root) as outbox:
            assert outbox.send(bytes(size), to="berlin") in bodies_by_id(layout)


@pytest.mark.root
@AS_ROOT
def test_the_reserve_stays_free_on_a_small_disk(tmp_path: Path) -> None:
    with small_disk("tmpfs", tmp_path) as where:
        layout = new_spool(where / "spool", "berlin")
        publish(layout, limits={"reserve_bytes": 1 << 20})
        out = run(FILL, layout.root, 0, 1000, 10)
        check_whole(layout, out, 10)
        assert FS.free_bytes(str(where))[0] > (1 << 20) - (128 << 10)
        with droprd.Outbox(layout.root) as outbox, pytest.raises(SpoolFull):
            outbox.send_many([bytes(1000)] * 100, to="berlin")
