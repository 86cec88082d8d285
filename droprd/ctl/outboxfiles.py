"""What waits in the outbox of a node without a daemon, by its files: sender.log and the journals.

Only reads; never past what is published, so it may run beside applications that send. Costs one
walk over sender.log, which its checkpoints keep small, and one header a journal, never a walk over
messages. None where the files may not or cannot be read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from droprd.core import entry
from droprd.core.entry import FILE_HEADER_BYTES, Kind
from droprd.core.outstate import OutboxState
from droprd.errors import BadData, SpoolCorrupt
from droprd.spool import log
from droprd.spool.fsops import Fs
from droprd.spool.journalfile import left_behind, list_journals, open_journal
from droprd.spool.layout import Layout

SENDER_LOG_BYTES_MAX = 64 << 20


@dataclass(slots=True)
class Waiting:
    """What is accepted and not delivered: per peer (messages, bytes), and what is not merged."""

    peers: dict[str, tuple[int, int]] = field(default_factory=dict)
    unmerged_bytes: int = 0


def read_waiting(fs: Fs, layout: Layout) -> Waiting | None:
    """What waits in the outbox, or None if that cannot be told."""
    try:
        state = _read_state(fs, layout)
        waiting = Waiting()
        for lane, lane_state in state.lanes.items():
            messages, size = waiting.peers.get(lane.peer, (0, 0))
            waiting.peers[lane.peer] = (
                messages + lane_state.queued,
                size + lane_state.queued_bytes,
            )
        waiting.unmerged_bytes = _unmerged_bytes(fs, layout, state)
    except (OSError, BadData, SpoolCorrupt):
        return None
    return waiting


def _read_state(fs: Fs, layout: Layout) -> OutboxState:
    state = OutboxState()
    try:
        fd = fs.open(layout.sender_log, os.O_RDONLY)
    except FileNotFoundError:
        return state  # nothing was ever merged
    try:
        header = log.read_header(fs, fd)
        published = min(log.read_published(fs, fd), fs.size(fd))
        if header.kind is not Kind.SENDER or published > SENDER_LOG_BYTES_MAX:
            raise BadData("sender.log is too large to be read in passing, or is none")
        for item in log.Walk(fs, fd, header.log_id, promised=published, stop=published):
            if isinstance(item, log.Damage):
                raise BadData("sender.log is damaged", why=f"at byte {item.start}")
            state.apply(entry.unpack_note(item.note))
    finally:
        fs.close(fd)
    return state


def _unmerged_bytes(fs: Fs, layout: Layout, state: OutboxState) -> int:
    total = 0
    ends = left_behind(fs, layout)
    for name in list_journals(fs, layout):
        try:
            journal = open_journal(fs, layout, name)
        except BadData:
            continue  # made and not filled yet: nothing in it was promised
        if journal is None:
            continue
        try:
            merged = state.merged.get(name, FILE_HEADER_BYTES)
            published = min(journal.published(), ends.get(name, journal.size()))
            total += max(0, published - merged)
            beyond = max(published, merged)
            # Its writer was killed between the write and the publishing: it will be merged too.
            found = log.read_entry(fs, journal.fd, journal.header.log_id, beyond)
            if found is not None and name not in ends:
                total += found.head.end - beyond
        finally:
            journal.close()
    return total
