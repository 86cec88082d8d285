"""Mending: after a start, the lanes are made what the committed merges say.

A power cut may leave any part of what was written to a lane since it was last synced. The journals
behind it are still there, for they are deleted only after the lanes are synced. So each lane is cut
where it stops being whole, and what is missing is read from the journals again, in the order in
which it was merged, and put back in its place, byte for byte.

What a crash in here leaves: a lane that is mended in part; the next start goes on.

Raises: OSError; SpoolCorrupt if the journals no longer hold what a lane lacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from droprd.core import frame
from droprd.core.entry import FILE_HEADER_BYTES
from droprd.core.outstate import OutboxState
from droprd.errors import BadData, SpoolCorrupt
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.handle import Spool
from droprd.spool.lanes import LaneFiles
from droprd.spool.rounds import Item


def mend(spool: Spool, state: OutboxState, files: LaneFiles) -> int:
    """Make the lanes what the committed merges in `state` say. Returns frames put back.

    Raises: SpoolCorrupt if journals no longer hold what a lane lacks.
    """
    ends: dict[Lane, dict[int, int]] = {}
    for merge in state.unsynced:
        for part in merge.lanes:
            ends.setdefault(part.lane, {})[part.segment] = part.end
    for lane_state in state.lanes.values():
        segments = ends.setdefault(lane_state.lane, {})
        if lane_state.tail.offset > FILE_HEADER_BYTES:
            segments.setdefault(lane_state.tail.segment, lane_state.tail.offset)
    missing: dict[Lane, dict[int, int]] = {}
    for lane, segments in ends.items():
        gaps = files.mend(state.lane(lane), sorted(segments.items()))
        if gaps:
            missing[lane] = gaps
    put_back = 0
    for merge in state.unsynced if missing else ():
        at = {p.lane: [p.segment, p.start] for p in merge.lanes}
        if not any(p.segment in missing.get(p.lane, {}) for p in merge.lanes):
            continue
        bad = {(name, offset): indexes for name, offset, indexes in merge.bad}
        for name, start, end in merge.runs:
            for item in _reread(spool, name, start, end, bad):
                place = at[item.frame.lane]
                gap = missing.get(item.frame.lane, {}).get(place[0])
                size = item.entry_bytes
                if gap is not None and place[1] >= gap:
                    files.append_missing(
                        item.frame.lane, place[0], place[1], item.note, item.pieces, item.size
                    )
                    put_back += 1
                place[1] += size
        for part in merge.lanes:
            if at[part.lane][1] != part.end:
                raise SpoolCorrupt(
                    f"lane {part.lane} cannot be mended",
                    why="its journals no longer hold what was merged from them",
                    hint="run `droprctl fsck`",
                )
    # If we stop here: these lanes are mended again. Later they would be called synced although
    # nobody has them open.
    for lane, gaps in missing.items():
        for segment in gaps:
            files.sync_mended(lane, segment)
    return put_back


def _reread(
    spool: Spool, name: str, start: int, end: int, bad: dict[tuple[str, int], Sequence[int]]
) -> Iterator[Item]:
    fs = spool.fs
    fd = fs.open(spool.layout.journal(name), os.O_RDONLY)
    try:
        log_id = log.read_header(fs, fd).log_id
        for item in log.Walk(fs, fd, log_id, start, promised=end, stop=end):
            if isinstance(item, log.Entry) and item.frame:
                try:
                    parsed = frame.parse(item.frame)
                except BadData:
                    continue
                yield Item(
                    parsed,
                    item.head.offset,
                    item.head.end,
                    bad.get((name, item.head.offset), ()),
                )
    finally:
        fs.close(fd)
