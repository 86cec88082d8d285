"""droprctl status --ages: how many messages wait for each peer, by how long they have waited.

Reads sender.log and the headers of the frames that wait, about a microsecond a frame; no bodies, no
checksums (`fsck` does). What is not merged yet is left out. Needs the rights to read the spool.

Raises: NotPermitted, OSError, BadData.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

from droprd.core.entry import ENTRY_BYTES, ENTRY_MAGIC, FILE_HEADER_BYTES
from droprd.core.outstate import LaneState, Pos
from droprd.ctl.drawing import table
from droprd.ctl.outboxfiles import read_outbox_state
from droprd.ctl.session import Session
from droprd.errors import NotPermitted
from droprd.settings.units import format_duration
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout

BUCKETS_S = (300, 600, 1200, 2400, 4800, 9600, 19_200, 38_400, 76_800)
_CHUNK_BYTES = 4 << 20
_ENTRY = struct.Struct("<4sII")
_STAMP = struct.Struct("<16sQq")
_STAMP_AT, _COUNT_AT, _FRAME_ID_AT = 44, 10, 28
_HEAD_BYTES = 96


def ages(session: Session, peer: str | None) -> dict[str, Any]:
    """{buckets_s, peers: {name: [messages younger than each bucket …, older]}}."""
    layout = Layout(session.node().spool)
    fs = OsFs()
    try:
        state = read_outbox_state(fs, layout)
        clock = SystemClock()
        boot_id, boot_ns, wall_ns = clock.boot_id(), clock.boot_ns(), clock.wall_ns()
        peers: dict[str, list[int]] = {}
        for lane in state.lanes.values():
            if lane.is_idle or peer not in (None, lane.lane.peer):
                continue
            counts = peers.setdefault(lane.lane.peer, [0] * (len(BUCKETS_S) + 1))
            for its_boot, its_ns, its_wall_ns, messages in _waiting(layout, lane):
                age_ns = boot_ns - its_ns if its_boot == boot_id else wall_ns - its_wall_ns
                counts[_bucket(age_ns // 1_000_000_000)] += messages
    except PermissionError as error:
        raise NotPermitted(
            "this user may not see how long messages have waited",
            why=f"{error.filename}: {error.strerror}",
            hint="run this as the owner of the spool or as root",
        ) from error
    return {"buckets_s": list(BUCKETS_S), "peers": dict(sorted(peers.items()))}


def _bucket(age_s: int) -> int:
    for number, limit_s in enumerate(BUCKETS_S):
        if age_s < limit_s:
            return number
    return len(BUCKETS_S)


def _waiting(layout: Layout, lane: LaneState) -> Iterator[tuple[bytes, int, int, int]]:
    """(boot id, boot ns, wall ns, messages) of each frame that waits."""
    peer, channel, priority = lane.lane
    special = bool(lane.skips or lane.purges or lane.voids)
    for segment in range(lane.cursor.segment, lane.tail.segment + 1):
        try:
            fd = os.open(layout.lane_segment(peer, channel, priority, segment), os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            stop = lane.tail.offset if segment == lane.tail.segment else os.fstat(fd).st_size
            start = lane.cursor.offset if segment == lane.cursor.segment else FILE_HEADER_BYTES
            for offset, data, at, count in _frames(fd, start, stop):
                messages = count
                if special:
                    pos = Pos(segment, offset)
                    if lane.skip_at(pos) is not None:
                        continue
                    frame_id = data[at + _FRAME_ID_AT : at + _FRAME_ID_AT + 16]
                    messages -= len(lane.voids_at(pos, frame_id, count))
                if messages:
                    yield (*_STAMP.unpack_from(data, at + _STAMP_AT), messages)
        finally:
            os.close(fd)


def _frames(fd: int, start: int, stop: int) -> Iterator[tuple[int, bytes, int, int]]:
    """(offset of the entry, bytes, where the frame is in them, its messages)."""
    while start < stop:
        data = os.pread(fd, min(_CHUNK_BYTES, stop - start), start)
        at, size = 0, len(data)
        while at + ENTRY_BYTES + _HEAD_BYTES <= size:
            magic, note_bytes, frame_bytes = _ENTRY.unpack_from(data, at)
            if magic != ENTRY_MAGIC:
                return  # damaged: the rest of this file is for `fsck`
            frame_at = at + ENTRY_BYTES + note_bytes
            if frame_at + _HEAD_BYTES > size:
                break
            if frame_bytes:
                yield (
                    start + at,
                    data,
                    frame_at,
                    int.from_bytes(data[frame_at + _COUNT_AT : frame_at + _COUNT_AT + 2], "little"),
                )
            at = frame_at + frame_bytes
        if not at:
            return
        start += at


def print_ages(found: dict[str, Any]) -> None:
    """The table: a row a peer, a column a bucket, each twice as long as the one before."""
    names = [f"<{format_duration(limit_s)}" for limit_s in BUCKETS_S]
    header = ["PEER", "ALL", *names, f"{format_duration(BUCKETS_S[-1])}+"]
    rows = [
        [peer, str(sum(counts)), *(str(n) if n else "-" for n in counts)]
        for peer, counts in found["peers"].items()
    ]
    if rows:
        table(header, rows)
    else:
        print("nothing waits")
