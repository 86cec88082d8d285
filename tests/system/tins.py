"""An inbox store as another package would bring it: frames, claims and history in one SQLite file.

It is installed by the tests of the receiver's side, never imported from here. Everything lies in
`<spool>-tins`: the database, a lock for each channel and priority, and, made of droprd's own parts,
bells and the bodies that are files.
"""

from __future__ import annotations

import os
import select
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from droprd.core import chain, match
from droprd.core.ask import MatchAnswer, MatchRequest
from droprd.core.claimops import Op, op_forget
from droprd.core.claims import Claims
from droprd.core.entry import pack_note, unpack_note
from droprd.core.frame import Frame
from droprd.core.leasing import Stored, read_stored
from droprd.core.match import NumberedVoid, Run
from droprd.core.push import LaneAnswer, Push
from droprd.errors import SpoolBusy
from droprd.model import GENESIS, Clock, LaneKey
from droprd.spool.arrivals import Arrivals
from droprd.spool.bells import Waiting, WaitingBell, drain
from droprd.spool.fsops import Fs
from droprd.spool.handle import Spool
from droprd.spool.judging import Limits
from droprd.spool.layout import Layout
from droprd.spool.room import Room
from droprd.spool.staged import Lane, Staged
from droprd.spool.staging import Batch, Pending, Staging, answers_of
from droprd.spool.store import Report

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS streams (channel, priority, next, PRIMARY KEY (channel, priority));
CREATE TABLE IF NOT EXISTS frames (channel, priority, seq, end, sender, note, frame,
    PRIMARY KEY (channel, priority, seq));
CREATE TABLE IF NOT EXISTS claims (id INTEGER PRIMARY KEY, channel, priority, ops);
CREATE TABLE IF NOT EXISTS history (id INTEGER PRIMARY KEY, peer, spool, channel, priority,
    frame_id, count, voids);
"""


def open_tins(spool: str) -> tuple[sqlite3.Connection, Layout]:
    layout = Layout(f"{spool}-tins")
    for directory in (layout.waiting, layout.inbox_blobs, f"{layout.root}/locks"):
        os.makedirs(directory, exist_ok=True)
    db = sqlite3.connect(
        f"{layout.root}/tins.sqlite", timeout=10, isolation_level=None, check_same_thread=False
    )
    db.executescript(SCHEMA)
    return db, layout


class TinStream:
    def __init__(
        self, fs: Fs, layout: Layout, db: sqlite3.Connection, key: tuple[str, int], boot_id: bytes
    ) -> None:
        self.channel, self.priority = self.key = key
        self._fs = fs
        self._db = db
        self._claims = Claims(boot_id)
        self._read_to = 0
        self._lock = os.open(
            f"{layout.root}/locks/{key[0]}-{key[1]}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        )

    def known(self) -> Claims:
        return self._claims

    def look(self) -> Claims:
        found = self._db.execute(
            "SELECT id, ops FROM claims WHERE channel = ? AND priority = ? AND id > ? ORDER BY id",
            (*self.key, self._read_to),
        )
        for self._read_to, ops in found.fetchall():
            self._claims.apply(unpack_note(ops)["ops"])
        return self._claims

    def acquire(self, timeout_s: float) -> Claims:
        if not self._fs.lock(self._lock, timeout_s):
            raise SpoolBusy(f"{self.channel}/{self.priority} is locked")
        return self.look()

    def release(self) -> None:
        self._fs.unlock(self._lock)

    def append(self, ops: Sequence[Op]) -> None:
        self._db.execute(
            "INSERT INTO claims (channel, priority, ops) VALUES (?, ?, ?)",
            (*self.key, pack_note({"ops": list(ops)})),
        )
        self.look()

    def sync(self) -> bool:
        return False

    def begin(self) -> int:
        first = self._one("SELECT min(seq) FROM frames WHERE channel = ? AND priority = ?")
        return self.end() if first is None else first

    def end(self) -> int:
        return self._one("SELECT max(next) FROM streams WHERE channel = ? AND priority = ?") or 0

    def _one(self, query: str) -> Any:
        return self._db.execute(query, self.key).fetchone()[0]

    def grown(self, seq: int) -> bool:
        return seq < self.end()

    def read(self, seq: int) -> Iterator[Stored]:
        while True:
            found = self._db.execute(
                "SELECT note, frame FROM frames WHERE channel = ? AND priority = ? AND end > ?"
                " ORDER BY seq LIMIT 1",
                (*self.key, seq),
            ).fetchone()
            if found is None:
                return
            stored = read_stored(found[0], memoryview(found[1]), (0, 0, 0))
            yield stored
            seq = stored.end

    def close(self) -> None:
        os.close(self._lock)


class TinConsumer:
    def __init__(self, fs: Fs, clock: Clock, urandom: Callable[[int], bytes], spool: str) -> None:
        self._fs = fs
        self._boot_id = clock.boot_id()
        self._db, self._layout = open_tins(spool)
        self._bell = WaitingBell(fs, self._layout, urandom)
        self.consumer = self._bell.consumer
        self._waiting = Waiting(fs, self._layout, self.consumer)
        self._streams: dict[tuple[str, int], TinStream] = {}

    def hear(self, channels: Collection[str]) -> None:
        self._bell.hear(channels)

    def streams(self, channel: str, *, again: bool) -> list[TinStream]:
        found = self._db.execute(
            "SELECT priority FROM streams WHERE channel = ? ORDER BY priority", (channel,)
        ).fetchall()
        for (priority,) in found:
            key = (channel, priority)
            if key not in self._streams:
                self._streams[key] = TinStream(self._fs, self._layout, self._db, key, self._boot_id)
        return [self._streams[channel, priority] for (priority,) in found]

    def channels(self) -> list[str]:
        return [name for (name,) in self._db.execute("SELECT DISTINCT channel FROM streams")]

    def alive(self, consumer: bytes) -> bool:
        return self._waiting.alive(consumer)

    def ring(self, channels: Collection[str]) -> None:
        self._waiting.ring(channels)

    def fileno(self) -> int:
        return self._bell.fd

    def drain(self) -> bool:
        return drain(self._bell.fd)

    def wait(self, timeout_s: float, watch: Collection[bytes], wakeup_fd: int) -> None:
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        poll.register(wakeup_fd, select.POLLIN)
        if all(map(self.alive, watch)):
            poll.poll(max(1, int(min(timeout_s, 0.5 if watch else timeout_s) * 1000 + 1)))

    def blob_path(self, sender: str, frame_id: bytes) -> str:
        return self._layout.inbox_blob(sender, frame_id)

    def close(self) -> None:
        self._waiting.close()
        self._bell.close()
        self._close_files()

    def close_in_child(self) -> None:
        self._waiting.close()
        self._bell.close_in_child()
        self._close_files()

    def _close_files(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._db.close()


class TinWriter:
    def __init__(self, spool: Spool, limits: Limits) -> None:
        self.report = Report()
        self.received = 0
        self._clock = spool.clock
        self._fs = spool.fs
        self._limits = limits
        self._db, self._layout = open_tins(spool.layout.root)
        self._waiting = Waiting(spool.fs, self._layout)
        self._room = Room(spool.fs, self._layout)
        self.blobs = Arrivals(spool.fs, self._layout)
        self._lanes: dict[LaneKey, Lane] = {}
        for *key, frame_id, count in self._db.execute(
            "SELECT peer, spool, channel, priority, frame_id, count FROM history ORDER BY id"
        ):
            lane = self._lanes.setdefault(LaneKey(*key), Lane(LaneKey(*key)))
            lane.head = lane.synced = chain.extend(lane.synced, frame_id, count)
        self._staging = Staging(self._lanes, self.blobs)
        self.recount()

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    @property
    def has_staged(self) -> bool:
        return self._staging.has_staged

    def configure(self, limits: Limits) -> None:
        self._limits = limits

    def push(self, peer: str, push: Push, parts: Sequence[memoryview]) -> Pending:
        return self._staging.push(peer, push, parts, self._limits)

    def wanted_blobs(self, peer: str, push: Push, parts: Sequence[memoryview]) -> list[Frame]:
        return self._staging.wanted_blobs(peer, push, parts, self._limits)

    def answer(self, pending: Pending) -> tuple[LaneAnswer, ...]:
        return answers_of(pending)

    def begin(self) -> Batch | None:
        return self._staging.begin()

    def write(self, batch: Batch) -> None:
        """One transaction: frames, and how far each lane has come."""
        self._db.execute("BEGIN IMMEDIATE")
        for key, staged in batch.streams.items():
            seq = self._db.execute(
                "SELECT max(next) FROM streams WHERE channel = ? AND priority = ?", key
            ).fetchone()[0]
            seq = seq or 0
            for one in staged:
                self._db.execute(
                    "INSERT INTO frames VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        *key,
                        seq,
                        seq + one.count,
                        one.lane.key.peer,
                        pack_note(self._note(one, seq)),
                        b"".join(one.pieces),
                    ),
                )
                self._remember(one)
                seq += one.count
            self._db.execute("REPLACE INTO streams VALUES (?, ?, ?)", (*key, seq))
        for one in batch.refused:
            self._remember(one)
        self._db.execute("COMMIT")

    def _note(self, one: Staged, seq: int) -> dict[str, Any]:
        clock = self._clock
        note: dict[str, Any] = {"p": one.lane.key.peer, "q": seq, "b": clock.boot_id()}
        note |= {"t": clock.boot_ns(), "w": clock.wall_ns()}
        if one.elapsed_ms is not None:
            note["e"] = one.elapsed_ms
        if one.voids:
            note["v"] = [list(void) for void in one.voids]
        return note

    def _remember(self, one: Staged) -> None:
        voids = pack_note({"v": [list(void) for void in one.voids]}) if one.voids else b""
        self._db.execute(
            "INSERT INTO history (peer, spool, channel, priority, frame_id, count, voids)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*one.lane.key, one.frame_id, one.count, voids),
        )

    def finish(self, batch: Batch) -> frozenset[str]:
        for _, staged in batch.stored():
            for one in staged:
                self.received += one.count
                self._room.grow(one.lane.key.peer, one.frame_bytes)
        return self._staging.finish(batch)

    def match(self, peer: str, request: MatchRequest) -> MatchAnswer:
        key = LaneKey(peer, request.spool_id, request.channel, request.priority)
        run = Run(GENESIS, GENESIS, bytearray())
        for frame_id, count, voids in self._db.execute(
            "SELECT frame_id, count, voids FROM history WHERE peer = ? AND spool = ?"
            " AND channel = ? AND priority = ? ORDER BY id",
            key,
        ):
            before = run.end
            run.add(frame_id, count, chain.extend(before, frame_id, count))
            for index, reason in unpack_note(voids)["v"] if voids else ():
                number = before.number + (index or 0)
                run.voids.append(NumberedVoid(number, frame_id, index, reason))
        lane = self._lanes.get(key)
        return match.answer(request, GENESIS if lane is None else lane.synced, 0, (run,))

    def no_room(self, peer: str, length: int) -> str:
        return self._room.lacks(peer, length, self._limits)

    def make_room(self, bytes_min: int) -> None:
        for key in self._db.execute("SELECT channel, priority FROM streams").fetchall():
            stream = TinStream(self._fs, self._layout, self._db, key, self._clock.boot_id())
            claims = stream.acquire(1)
            try:
                below = claims.lowest_open()
                below = min([below, *(first for first, _, _ in claims.dead.between(0, below))])
                gone = []
                for stored in stream.read(0):
                    if stored.end > below:
                        break
                    gone.append(stored)
                if gone:
                    stream.append([op_forget(gone[-1].end)])
                for stored in gone:
                    self._db.execute(
                        "DELETE FROM frames WHERE channel = ? AND priority = ? AND seq = ?",
                        (*key, stored.first),
                    )
            finally:
                stream.release()
                stream.close()

    def recount(self) -> None:
        sizes = self._db.execute("SELECT sender, sum(length(frame)) FROM frames GROUP BY sender")
        self._room.count([dict(sizes.fetchall()), self.blobs.bytes_by_peer()])

    def ring(self, channels: Iterable[str]) -> None:
        self._waiting.ring(channels)

    def close(self) -> None:
        batch = self.begin()
        if batch is not None:
            self.write(batch)
            self.finish(batch)
        self._waiting.close()
        self._db.close()


def open_consumer(
    fs: Fs, clock: Clock, urandom: Callable[[int], bytes], spool: str, /
) -> TinConsumer:
    return TinConsumer(fs, clock, urandom, spool)


def open_writer(spool: Spool, limits: Limits, /) -> TinWriter:
    return TinWriter(spool, limits)
