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
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.fsops import Fs
from droprd.spool.journalfile import left_behind, list_journals, open_journal
from droprd.spool.layout import Layout

SENDER_LOG_BYTES_MAX = 64 << 20


@dataclass(slots=True)
class Waiting:
    """What is accepted and not delivered: per lane (messages, bytes), and what is not merged."""

    lanes: dict[Lane, tuple[int, int]] = field(default_factory=dict)
    unmerged_bytes: int = 0

    def peers(self) -> dict[str, tuple[int, int]]:
        """Per peer (messages, bytes)."""
        result: dict[str, tuple[int, int]] = {}
        for lane, (messages, size) in self.lanes.items():
            before = result.get(lane.peer, (0, 0))
            result[lane.peer] = (before[0] + messages, before[1] + size)
        return result

    def below(self, target: str) -> int:
        """How many messages wait in the lanes of a target ("" is the node)."""
        return sum(
            messages
            for lane, (messages, _) in self.lanes.items()
            if not target or f"{lane}/".startswith(f"{target}/")
        )


def read_waiting(fs: Fs, layout: Layout) -> Waiting | None:
    """What waits in the outbox, or None if that cannot be told."""
    try:
        # Journals first: what is merged meanwhile is then in the state, and nothing is missed.
        ends = _journal_ends(fs, layout)
        state = read_outbox_state(fs, layout)
    except (OSError, BadData, SpoolCorrupt):
        return None
    return Waiting(
        {lane: (one.queued, one.queued_bytes) for lane, one in state.lanes.items()},
        sum(
            max(0, end - state.merged.get(name, FILE_HEADER_BYTES))
            for name, end in ends.items()
            if fs.stat(layout.journal(name)) is not None  # else merged whole, and forgotten
        ),
    )


def read_outbox_state(fs: Fs, layout: Layout) -> OutboxState:
    """What sender.log says. Raises: OSError, BadData."""
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


def _journal_ends(fs: Fs, layout: Layout) -> dict[str, int]:
    """How far each journal will be merged."""
    ends: dict[str, int] = {}
    broken = left_behind(fs, layout)
    for name in list_journals(fs, layout):
        try:
            journal = open_journal(fs, layout, name)
        except BadData:
            continue  # made and not filled yet: nothing in it was promised
        if journal is None:
            continue
        try:
            end = journal.published()
            # Its writer may have been killed before it published: that will be merged too.
            found = log.read_entry(fs, journal.fd, journal.header.log_id, end)
            ends[name] = broken.get(name, end if found is None else found.head.end)
        finally:
            journal.close()
    return ends
