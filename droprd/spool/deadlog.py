"""A log of dead letters: messages that will not be delivered, kept with their reason.

Owns `outbox/dead.log` (the sender) and `inbox/dead.log` (the janitor). An entry is a note
{"l": [peer, channel, priority], "i": [[index, reason]…], "v": [[index, ""]…]} and the frame, in
which only the bodies of the dead messages remain ("v" names those left out). Dead letters are never
deleted by age.

A crash may leave a dead letter that no settled receipt speaks of: it is written first, and written
again when the receipt comes again; readers take the last of a message.

Raises: OSError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from droprd.core import entry
from droprd.core.entry import Kind
from droprd.core.frame import Frame
from droprd.spool import log
from droprd.spool.handle import Spool


class DeadLog:
    """Dead letters, appended by their one writer."""

    def __init__(self, spool: Spool, path: str, kind: Kind) -> None:
        self._spool = spool
        self._path = path
        self._kind = kind
        self._writer: log.LogWriter | None = None

    def _open(self) -> log.LogWriter:
        if self._writer is None:
            spool = self._spool
            if spool.fs.stat(self._path) is None:
                self._writer = log.create(
                    spool.fs,
                    self._path,
                    self._kind,
                    log_id=spool.urandom(16),
                    spool_id=spool.spool_id,
                    wall_ns=spool.clock.wall_ns(),
                    site="dead",
                )
            else:
                self._writer = log.recover(
                    spool.fs, self._path, self._kind, site="dead", set_aside=spool.set_aside
                ).writer
        return self._writer

    def append(self, peer: str, frame: Frame, reasons: Mapping[int, str]) -> None:
        """Keep these messages of a frame; `peer` is the other node. On disk after `sync`."""
        kept = {i for i, reason in reasons.items() if reason != "corrupt"} - set(frame.voids)
        left_out = {i for i in range(frame.count) if i not in kept}
        pieces = frame.without(left_out)
        note = {
            "l": [peer, frame.lane.channel, frame.lane.priority],
            "i": [[index, reason] for index, reason in reasons.items()],
            "v": [[index, ""] for index in sorted(left_out)],
        }
        self._open().append(entry.pack_note(note), pieces, sum(map(len, pieces)))

    def sync(self) -> None:
        """Make what was appended durable."""
        if self._writer is not None:
            self._writer.sync("dead.sync")

    def close(self) -> None:
        """Close the file; what was not synced is not promised."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def count(items: Iterable[log.Entry | log.Damage]) -> int:
    """How many messages these entries of a dead log hold."""
    total = 0
    for item in items:
        if isinstance(item, log.Entry):
            total += len(entry.unpack_note(item.note)["i"])
    return total
