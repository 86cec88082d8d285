"""`Outbox`: every call is all or nothing, and says what was wrong with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import droprd
from droprd.core.frame import BODIES_BYTES_MAX
from droprd.errors import (
    ConfigError,
    Draining,
    DroprdError,
    InvalidName,
    MessageTooLarge,
    SpoolFull,
    SpoolNotReady,
    UnknownPeer,
    UsageError,
)
from droprd.model import split_message_id
from droprd.spool import bells
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout
from droprd.spool.state import pack
from tests.spools import all_frames, bodies_by_id, journal_names, new_spool, publish

Call = dict[str, Any]
TO: Call = {"to": "berlin", "channel": "sites"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return new_spool(tmp_path / "spool", "berlin", "paris")


@pytest.fixture
def outbox(layout: Layout) -> Iterator[droprd.Outbox]:
    with droprd.Outbox(layout.root) as outbox:
        yield outbox


# -- what is accepted --------------------------------------------------------------------------


def test_a_message_lies_in_the_journal_when_send_returns(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    message_id = outbox.send(
        b"site 4711 changed",
        to="berlin",
        channel="sites",
        priority=2,
        ttl_s=1.5,
        delay_s=60,
        content_type="text/plain",
        headers={"site": "4711"},
    )
    (frame,) = all_frames(layout)
    assert frame.ids() == [message_id]
    assert bytes(frame.body(0)) == b"site 4711 changed"
    assert frame.lane == ("berlin", "sites", 2)
    assert (frame.info.ttl_ms, frame.info.delay_ms) == (1500, 60_000)
    assert frame.shared == {"t": "text/plain", "h": {"site": "4711"}}


def test_the_defaults_are_channel_common_priority_5_and_no_time_to_live(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    outbox.send(b"", to="berlin")
    (frame,) = all_frames(layout)
    assert frame.lane == ("berlin", "common", 5)
    assert (frame.info.ttl_ms, frame.info.delay_ms, frame.shared) == (0, 0, {})


def test_send_many_keeps_the_order_and_gives_an_id_each(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    bodies = [os.urandom(n % 3000) for n in range(3000)]
    ids = outbox.send_many(iter(bodies), **TO)
    assert list(bodies_by_id(layout).items()) == list(zip(ids, bodies, strict=True))
    assert len(set(ids)) == 3000
    assert outbox.send_many([], **TO) == []


def test_large_bodies_among_small_ones_keep_their_place(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    bodies = [b"a", os.urandom(BODIES_BYTES_MAX + 1), b"b", os.urandom(3 << 20), b"c"]
    ids = outbox.send_many(bodies, **TO)
    assert list(bodies_by_id(layout).items()) == list(zip(ids, bodies, strict=True))
    assert [f.info.is_blob for f in all_frames(layout)] == [False, True, False, True, False]


@pytest.mark.parametrize("size", [0, 5, BODIES_BYTES_MAX, BODIES_BYTES_MAX + 1, 5 << 20])
def test_a_file_is_sent_as_one_message(
    layout: Layout, outbox: droprd.Outbox, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "backup"
    path.write_bytes(os.urandom(size))
    message_id = outbox.send_file(path, **TO, headers={"name": "backup"})
    assert bodies_by_id(layout) == {message_id: path.read_bytes()}
    assert all_frames(layout)[0].shared["h"] == {"name": "backup"}


def test_bytearrays_and_memoryviews_are_copied(layout: Layout, outbox: droprd.Outbox) -> None:
    body = bytearray(b"abc")
    one = outbox.send(cast(bytes, body), **TO)
    two, three = outbox.send_many(cast(list[bytes], [body, memoryview(b"def")]), **TO)
    assert bodies_by_id(layout) == {one: b"abc", two: b"abc", three: b"def"}


def test_a_node_may_send_to_itself(layout: Layout, outbox: droprd.Outbox) -> None:
    outbox.send(b"x", to="hamburg")
    assert all_frames(layout)[0].lane.peer == "hamburg"


def test_ids_name_their_frame(layout: Layout, outbox: droprd.Outbox) -> None:
    ids = outbox.send_many([b"x"] * 3, **TO)
    (frame,) = all_frames(layout)
    assert [split_message_id(i) for i in ids] == [(frame.frame_id, n) for n in range(3)]


def test_the_configuration_leads_to_the_spool(layout: Layout, tmp_path: Path) -> None:
    main = tmp_path / "droprd.toml"
    main.write_text('[node]\nname = "hamburg"\nspool = "spool"\n')
    with droprd.Outbox(config=main) as outbox:
        outbox.send(b"x", to="berlin")
    assert len(all_frames(layout)) == 1


def test_the_senders_bell_rings(layout: Layout, outbox: droprd.Outbox) -> None:
    fd = bells.listen(layout.bell)
    outbox.send(b"x", **TO)
    assert os.read(fd, 10) == b"\0"
    os.close(fd)
    outbox.send(b"nobody listens", **TO)


# -- what is refused ---------------------------------------------------------------------------

REFUSED: list[tuple[type[DroprdError], str, Call]] = [
    (UnknownPeer, "unknown_peer", {"to": "rome"}),
    (UnknownPeer, "unknown_peer", {"to": "removed"}),
    (InvalidName, "invalid_name", {"to": "Berlin"}),
    (InvalidName, "invalid_name", {"to": ""}),
    (InvalidName, "invalid_name", {"to": None}),
    (InvalidName, "invalid_name", {"to": "../x"}),
    (InvalidName, "invalid_name", {"channel": "a/b"}),
    (InvalidName, "invalid_name", {"channel": "x" * 65}),
    (InvalidName, "invalid_name", {"channel": "droprd.reports"}),
    (UsageError, "channel_not_permitted", {"to": "paris", "channel": "sites"}),
    (UsageError, "usage", {"priority": 10}),
    (UsageError, "usage", {"priority": -1}),
    (UsageError, "usage", {"priority": True}),
    (UsageError, "usage", {"priority": "5"}),
    (UsageError, "usage", {"ttl_s": 0}),
    (UsageError, "usage", {"ttl_s": -1}),
    (UsageError, "usage", {"ttl_s": float("nan")}),
    (UsageError, "usage", {"ttl_s": float("inf")}),
    (UsageError, "usage", {"ttl_s": 1e12}),
    (UsageError, "usage", {"ttl_s": "60"}),
    (UsageError, "usage", {"ttl_s": True}),
    (UsageError, "usage", {"delay_s": -0.1}),
    (UsageError, "usage", {"content_type": b"text/plain"}),
    (UsageError, "usage", {"content_type": "\ud800"}),
    (UsageError, "usage", {"headers": {"a": 1}}),
    (UsageError, "usage", {"headers": {1: "a"}}),
    (UsageError, "usage", {"headers": ["a"]}),
    (MessageTooLarge, "message_too_large", {"headers": {"a": "x" * 8192}}),
]


@pytest.mark.parametrize(("error", "code", "call"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_bad_call_is_refused_with_its_code_and_leaves_nothing(
    layout: Layout, outbox: droprd.Outbox, tmp_path: Path, error: type, code: str, call: Call
) -> None:
    publish(layout, peers={"removed": {"channels": None, "unconfigured": True}})
    publish(layout, peers={"paris": {"channels": ["orders"], "max_message_bytes": 100}})
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    for send in (
        lambda: outbox.send(b"x", **{**TO, **call}),
        lambda: outbox.send_many([b"x", bytes(100_000)], **{**TO, **call}),
        lambda: outbox.send_file(path, **{**TO, **call}),
    ):
        with pytest.raises(error) as caught:
            send()
        assert isinstance(caught.value, DroprdError)
        assert caught.value.code == code
    assert journal_names(layout) == []
    assert os.listdir(layout.outbox_blobs) == []


@pytest.mark.parametrize("bodies", ["text", b"bytes", 5, None, ["text"], [b"x", 5], [None]])
def test_send_many_wants_many_bytes(layout: Layout, outbox: droprd.Outbox, bodies: Any) -> None:
    with pytest.raises(UsageError):
        outbox.send_many(bodies, **TO)
    assert journal_names(layout) == []


@pytest.mark.parametrize("body", ["text", 5, None, [b"x"]])
def test_send_wants_bytes(layout: Layout, outbox: droprd.Outbox, body: Any) -> None:
    with pytest.raises(UsageError, match="no bytes"):
        outbox.send(body, **TO)
    assert journal_names(layout) == []


def test_an_error_of_the_callers_iterator_leaves_nothing(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    def rows() -> Iterator[bytes]:
        yield b"x"
        raise LookupError("the caller's own")

    with pytest.raises(LookupError):
        outbox.send_many(rows(), **TO)
    assert journal_names(layout) == []


def test_bodies_over_the_peers_or_the_nodes_limit_are_refused(
    layout: Layout, outbox: droprd.Outbox, tmp_path: Path
) -> None:
    publish(
        layout,
        peers={"paris": {"channels": None, "max_message_bytes": 100, "unconfigured": False}},
        limits={"max_message_bytes": 1000},
    )
    publish(layout, peers={"berlin": {"channels": None, "unconfigured": False}})
    outbox.send(bytes(100), to="paris")
    outbox.send(bytes(1000), to="berlin")
    path = tmp_path / "file"
    path.write_bytes(bytes(101))
    with pytest.raises(MessageTooLarge):
        outbox.send(bytes(101), to="paris")
    with pytest.raises(MessageTooLarge):
        outbox.send_many([b"", bytes(101)], to="paris")
    with pytest.raises(MessageTooLarge):
        outbox.send_file(path, to="paris")
    with pytest.raises(MessageTooLarge):
        outbox.send(bytes(1001), to="berlin")
    assert len(bodies_by_id(layout)) == 2


@pytest.mark.parametrize("target", ["", "berlin", "berlin/sites", "berlin/sites/5"])
def test_a_drain_refuses_what_it_covers_until_it_is_lifted(
    layout: Layout, outbox: droprd.Outbox, target: str
) -> None:
    publish(layout, draining=[target])
    with pytest.raises(Draining, match=f"droprctl resume {target}".strip()):
        outbox.send(b"x", **TO)
    if target:
        outbox.send(b"another lane", to="paris")
    publish(layout, draining=[])
    outbox.send(b"x", **TO)


def test_a_drain_that_begins_while_a_send_waits_at_the_gate_refuses_it(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    fs = OsFs()
    gate = fs.open(layout.gate, os.O_RDWR)
    assert fs.try_lock(gate)
    errors: list[BaseException] = []

    def send() -> None:
        try:
            outbox.send(b"x", **TO)
        except Draining as error:
            errors.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    while not outbox._commits._lock.locked():
        pass  # it has been admitted, and waits for the gate
    publish(layout, draining=[""])
    fs.close(gate)
    thread.join(10)
    assert [type(e) for e in errors] == [Draining]
    assert bodies_by_id(layout) == {}


def test_the_gate_is_free_between_sends(layout: Layout, outbox: droprd.Outbox) -> None:
    outbox.send(b"x", **TO)
    fs = OsFs()
    gate = fs.open(layout.gate, os.O_RDWR)
    assert fs.try_lock(gate)
    fs.close(gate)


def test_a_full_outbox_refuses_before_anything_is_written(
    layout: Layout, outbox: droprd.Outbox, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    publish(layout, full={"outbox": "the quota of the outbox is used up"})
    with pytest.raises(SpoolFull, match="quota"):
        outbox.send(b"x", **TO)
    with pytest.raises(SpoolFull):
        outbox.send_file(path, **TO)
    assert journal_names(layout) == []


def test_the_reserve_is_kept(layout: Layout) -> None:
    publish(layout, limits={"reserve_bytes": 1 << 62})
    with droprd.Outbox(layout.root) as outbox, pytest.raises(SpoolFull, match="reserve"):
        outbox.send(b"x", **TO)
    assert journal_names(layout) == []


def test_the_quota_counts_journals_and_blobs(layout: Layout) -> None:
    publish(layout, limits={"outbox_quota_bytes": 1 << 20})
    with droprd.Outbox(layout.root) as outbox:
        outbox.send(bytes(700_000), **TO)
        with pytest.raises(SpoolFull, match="quota"):
            outbox.send(bytes(700_000), **TO)
        with pytest.raises(SpoolFull):
            outbox.send_many([bytes(1024)] * 400, **TO)
        outbox.send(b"small", **TO)
    assert len(bodies_by_id(layout)) == 2
    assert len(os.listdir(layout.outbox_blobs)) == 1


def test_what_the_sender_left_counts_and_what_it_merged_does_not(layout: Layout) -> None:
    publish(layout, limits={"outbox_quota_bytes": 1 << 20})
    merged = Path(layout.outbox_blob(b"F" * 14 + bytes(2)))
    merged.write_bytes(bytes(2 << 20))
    with droprd.Outbox(layout.root) as outbox:
        outbox.send(b"x", **TO)
    Path(layout.gauges("sender")).write_bytes(pack({"peers": {"berlin": {"bytes": 1 << 20}}}))
    with droprd.Outbox(layout.root) as outbox, pytest.raises(SpoolFull, match="quota"):
        outbox.send(b"x", **TO)


def test_while_a_sender_listens_its_word_about_the_quota_counts(layout: Layout) -> None:
    publish(layout, limits={"outbox_quota_bytes": 1 << 16})
    fd = bells.listen(layout.bell)
    with droprd.Outbox(layout.root) as outbox:
        outbox.send(bytes(1 << 20), **TO)
        publish(layout, full={"outbox": "so many bytes wait"})
        with pytest.raises(SpoolFull, match="so many bytes wait"):
            outbox.send(b"x", **TO)
    os.close(fd)


def test_what_is_no_regular_file_cannot_be_sent(
    layout: Layout, outbox: droprd.Outbox, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(UsageError, match="regular file"):
            outbox.send_file(path, **TO)
    with pytest.raises(FileNotFoundError):
        outbox.send_file(tmp_path / "nothing", **TO)
    assert journal_names(layout) == []


def test_a_closed_outbox_sends_no_more(outbox: droprd.Outbox) -> None:
    outbox.close()
    outbox.close()
    with pytest.raises(UsageError, match="closed"):
        outbox.send(b"x", **TO)


def test_a_spool_that_is_none_is_refused_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "unmounted").mkdir()
    for where in ("unmounted", "nothing"):
        with pytest.raises(SpoolNotReady) as caught:
            droprd.Outbox(tmp_path / where)
        assert caught.value.code == "spool_missing"
    assert os.listdir(tmp_path / "unmounted") == []
    with pytest.raises(ConfigError):
        droprd.Outbox(config=tmp_path / "droprd.toml")


def test_a_spool_of_another_version_is_refused(layout: Layout) -> None:
    Path(layout.version).write_text("droprd-spool 2\nnew things\n")
    with pytest.raises(SpoolNotReady) as caught:
        droprd.Outbox(layout.root)
    assert caught.value.code == "spool_version"


# -- threads and time --------------------------------------------------------------------------


def test_threads_that_wait_share_a_sync_and_each_keeps_its_order(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    returned: dict[int, list[str]] = {n: [] for n in range(16)}

    def work(number: int) -> None:
        for count in range(30):
            if count % 10 == 9:
                returned[number] += outbox.send_many([b"%d" % number] * 3, **TO)
            else:
                returned[number].append(
                    outbox.send(b"%d" % number, **TO, headers={"n": str(number % 2)})
                )

    threads = [threading.Thread(target=work, args=(n,)) for n in returned]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = bodies_by_id(layout)
    assert sum(map(len, returned.values())) == len(found)
    order = {message_id: at for at, message_id in enumerate(found)}
    for number, ids in returned.items():
        assert [found[i] for i in ids] == [b"%d" % number] * 36
        assert sorted(ids, key=order.__getitem__) == ids
    assert len(all_frames(layout)) < len(found), "no two threads ever shared a frame"


def test_one_threads_blob_does_not_hold_up_the_journal_of_the_others(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    done = threading.Event()

    def large() -> None:
        while not done.is_set():
            outbox.send(bytes(1 << 20), to="paris")

    thread = threading.Thread(target=large)
    thread.start()
    ids = [outbox.send(b"%d" % n, **TO) for n in range(50)]
    done.set()
    thread.join(30)
    found = bodies_by_id(layout)
    assert [found[i] for i in ids] == [b"%d" % n for n in range(50)]


def test_a_send_inside_an_interrupted_send_is_refused_instead_of_waiting_for_itself(
    layout: Layout, outbox: droprd.Outbox
) -> None:
    with outbox._commits._alone(), pytest.raises(UsageError, match="signal handler"):
        outbox.send(b"x", **TO)
    outbox.send(b"y", **TO)
    assert list(bodies_by_id(layout).values()) == [b"y"]


def test_an_outbox_that_is_forgotten_lets_go_of_its_journal(layout: Layout) -> None:
    for _ in range(3):
        droprd.Outbox(layout.root).send(b"x", **TO)
    assert len(journal_names(layout)) == 1


def test_importing_droprd_loads_nothing_until_it_is_used() -> None:
    code = (
        "import sys, droprd; before = set(sys.modules); "
        "assert not [m for m in before if m.startswith('droprd.')], before; "
        "assert 'msgpack' not in before and 'asyncio' not in before; "
        "from droprd import *; "
        "assert all(hasattr(droprd, n) for n in droprd.__all__); "
        "assert not {'aiohttp', 'pycurl', 'pydantic', 'asyncio'} & set(sys.modules); "
        "assert droprd.__version__[0].isdigit(); "
        "assert set(droprd.__all__) < set(dir(droprd))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError):
        _ = droprd.nothing_of_ours
