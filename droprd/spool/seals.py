"""Which segments of the inbox are sealed: the reading side of lanes.log, for who deletes them.

Guarantees: a segment is named only when the seal lies before the published, so synced, end of
lanes.log (`droprd.spool.headlog`, which owns the notes). Each look reads on from the last one.

Raises OSError.
"""

from __future__ import annotations

import os

from droprd.core import entry as entries
from droprd.core.entry import FILE_HEADER_BYTES
from droprd.errors import BadData
from droprd.spool import log
from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout

StreamKey = tuple[str, int]


class SealReader:
    """Reads the seals of one spool."""

    def __init__(self, fs: Fs, layout: Layout) -> None:
        self._fs = fs
        self._path = layout.inbox_lanes_log
        self._log_id = b""
        self._at = FILE_HEADER_BYTES
        self._sealed: dict[StreamKey, int] = {}

    def read(self) -> dict[StreamKey, int]:
        """The newest sealed segment of each (channel, priority); all older ones are sealed too.

        Nothing is sealed as long as lanes.log is not there or its header is not whole.
        Raises: OSError.
        """
        fs = self._fs
        if fs.stat(self._path) is None:
            return {}
        fd = fs.open(self._path, os.O_RDONLY)
        try:
            try:
                header = log.read_header(fs, fd)
            except BadData:
                return {}  # a power cut took it while it was new; the receiver makes it again
            if header.log_id != self._log_id:
                self._log_id, self._at, self._sealed = header.log_id, FILE_HEADER_BYTES, {}
            end = log.read_published(fs, fd)
            if end > self._at:
                for item in log.Walk(fs, fd, header.log_id, self._at, promised=end, stop=end):
                    if isinstance(item, log.Entry):
                        note = entries.unpack_note(item.note)
                        if note["k"] == "s":
                            number = note["n"] if note["f"] else note["n"] - 1
                            self._sealed[note["c"], note["r"]] = number
                self._at = end
        finally:
            fs.close(fd)
        return dict(self._sealed)
