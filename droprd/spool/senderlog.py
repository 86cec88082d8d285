"""`outbox/sender.log`: the sender's word on what it did. One sync a round covers all of it.

Owns the file and, with it, the `OutboxState`: `add` applies a note to the state and appends it;
`commit` makes everything added durable. A start applies the same notes in the same order.

What a crash leaves: notes up to the last commit, and perhaps some of those after it. A merge that
is not whole in the log never happened; its frames are still in the journals.

`checkpoint` replaces the log by one note. It is only legal when all lanes (data and names) are
synced, because it forgets from which journals the lanes could be mended.

Raises: OSError from the disk, after which the process must end and recovery decide.
"""

from __future__ import annotations

from typing import Any

from droprd.core import entry
from droprd.core.entry import Kind
from droprd.core.outstate import OutboxState
from droprd.errors import SpoolCorrupt
from droprd.spool import log
from droprd.spool.handle import Spool

CHECKPOINT_BYTES = 4 << 20


class SenderLog:
    """The sender's log, open for writing, and the state it stands for."""

    def __init__(self, spool: Spool, writer: log.LogWriter, state: OutboxState) -> None:
        self._spool = spool
        self._writer = writer
        self._checkpoint_at = max(CHECKPOINT_BYTES, 2 * writer.end)
        self.state = state

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the log has grown enough to be replaced."""
        return self._writer.end > self._checkpoint_at

    @property
    def is_committed(self) -> bool:
        """Whether everything added is durable."""
        return self._writer.synced_end == self._writer.end

    def add(self, note: list[Any]) -> None:
        """Apply a note and append it. It counts after `commit`."""
        self.state.apply(note)
        self._writer.append(entry.pack_note(note))

    def commit(self) -> None:
        """Make every added note durable."""
        # If we stop here: the notes never happened. Frames are merged again from their journals,
        # settled ones are found settled again by asking the receiver.
        self._writer.sync("sender.commit", prepare_bytes=1 << 16)

    def checkpoint(self) -> None:
        """Replace the log by one note that says the same. All lanes must be synced."""
        spool = self._spool
        path = spool.layout.sender_log
        new = f"{path}.new"
        if spool.fs.stat(new) is not None:
            spool.fs.unlink(new)
        writer = _create(spool, new)
        writer.append(entry.pack_note(self.state.dump()))
        writer.sync("sender.checkpoint")
        # If we stop here: the old log counts, and says the same.
        spool.fs.rename(new, path)
        spool.fs.sync_dir(spool.layout.outbox, "sender.checkpoint_dir")
        self._writer.close()
        writer.path = path
        self._writer = writer
        self._checkpoint_at = max(CHECKPOINT_BYTES, 2 * writer.end)

    def close(self) -> None:
        """Close the file; what was not committed never happened."""
        self._writer.close()


def _create(spool: Spool, path: str) -> log.LogWriter:
    return log.create(
        spool.fs,
        path,
        Kind.SENDER,
        log_id=spool.urandom(16),
        spool_id=spool.spool_id,
        wall_ns=spool.clock.wall_ns(),
        site="sender",
    )


def open_sender_log(spool: Spool) -> tuple[SenderLog, list[log.Damage]]:
    """Open the log, or make it where there is neither log nor lanes yet.

    Raises: SpoolCorrupt if the log is missing though lanes exist, or cannot be read at all.
    """
    layout = spool.layout
    if spool.fs.stat(layout.sender_log) is None:
        if spool.fs.stat(layout.lanes) is not None and spool.fs.listdir(layout.lanes):
            raise SpoolCorrupt(
                f"{layout.sender_log} is missing",
                why="there are lanes, and only this file knows what of them was delivered",
                hint="restore it from a copy of this spool, or run `droprctl fsck`",
            )
        new = f"{layout.sender_log}.new"
        if spool.fs.stat(new) is not None:
            spool.fs.unlink(new)
        _create(spool, new).close()
        # If we stop here: no log yet. Under its own name it is whole from the first, so that a
        # power cut never leaves a log whose header cannot be read.
        spool.fs.rename(new, layout.sender_log)
        spool.fs.sync_dir(layout.outbox, "sender.create_dir")
    state = OutboxState()
    recovered = log.recover(
        spool.fs,
        layout.sender_log,
        Kind.SENDER,
        site="sender",
        on_entry=lambda item: state.apply(entry.unpack_note(item.note)),
        set_aside=spool.set_aside,
    )
    return SenderLog(spool, recovered.writer, state), recovered.damage
