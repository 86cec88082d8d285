"""An inbox whose receiver is the test: segments as a receiver writes them, for real consumers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from droprd.core.entry import Kind, pack_note
from droprd.spool import log
from droprd.spool.bells import Waiting
from droprd.spool.claims import create_claims
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import Fs, OsFs
from droprd.spool.handle import Spool
from droprd.spool.inbox import FilesInbox, InboxStore
from droprd.spool.layout import Layout
from droprd.spool.seals import StreamKey
from droprd.testing.inboxes import Arrival
from tests.spools import new_spool

STREAM = ("sites", 5)


class Segments:
    """Writes what a receiver would write, segment by segment, and rings."""

    def __init__(self, root: Path, segment_bytes_max: int = 1 << 20) -> None:
        self.fs: Fs = OsFs()
        self.clock = SystemClock()
        self.layout = Layout(str(root)) if root.exists() else new_spool(root)
        self.spool = Spool(self.fs, self.clock, os.urandom, self.layout, bytes(16))
        self.segment_bytes_max = segment_bytes_max
        self.writers: dict[tuple[str, int], tuple[int, log.LogWriter]] = {}
        self.next_seq: dict[tuple[str, int], int] = {}
        self.waiting = Waiting(self.fs, self.layout)
        self.killed: list[InboxStore] = []
        self.offsets: list[tuple[tuple[str, int], int, int]] = []

    def open(self) -> FilesInbox:
        return FilesInbox(self.fs, self.clock, os.urandom, self.layout.root)

    def kill(self, store: InboxStore) -> None:
        store.close_in_child()
        self.killed.append(store)

    def deliver(self, bodies: Sequence[bytes], **about: Any) -> list[str]:
        channel = about.setdefault("channel", "sites")
        priority = about.setdefault("priority", 5)
        key = (channel, priority)
        writer = self.writer(key)
        arrival = Arrival(self.clock, bodies, seq=self.next_seq.get(key, 0), **about)
        if arrival.blob is not None:
            path = self.layout.inbox_blob(arrival.note["p"], arrival.frame_id)
            Path(path).write_bytes(arrival.blob)
        self.offsets.append((key, self.writers[key][0], writer.end))
        writer.append(pack_note(arrival.note), [arrival.frame], len(arrival.frame))
        writer.sync("test")
        self.next_seq[key] = self.next_seq.get(key, 0) + arrival.count
        self.waiting.ring([channel])
        return arrival.ids

    def sealed(self) -> dict[StreamKey, int]:
        """What lanes.log would say: all segments but the newest of each stream are sealed."""
        return {key: number - 1 for key, (number, _) in self.writers.items()}

    def damage(self, nth: int, at: int, data: bytes) -> None:
        """Overwrite bytes of the `nth` frame delivered, `at` bytes behind its entry's start."""
        key, number, offset = self.offsets[nth]
        with open(self.layout.inbox_segment(*key, number), "r+b") as file:
            file.seek(offset + at)
            file.write(data)

    def segments(self, key: tuple[str, int] = STREAM) -> list[str]:
        """The segment files of a stream."""
        return [n for n in os.listdir(self.layout.stream(*key)) if n.endswith(".log")]

    def writer(self, key: tuple[str, int]) -> log.LogWriter:
        number, writer = self.writers.get(key, (0, None))
        if writer is not None and writer.end < self.segment_bytes_max:
            return writer
        if writer is not None:
            writer.seal("test")
            writer.close()
        else:
            os.makedirs(self.layout.stream(*key), exist_ok=True)
            create_claims(
                self.fs,
                self.layout.claims(*key),
                log_id=os.urandom(16),
                spool_id=bytes(16),
                wall_ns=1,
            )
        writer = log.create(
            self.fs,
            self.layout.inbox_segment(*key, number + 1),
            Kind.CHANNEL,
            log_id=os.urandom(16),
            spool_id=bytes(16),
            wall_ns=1,
            site="test",
            base=self.next_seq.get(key, 0),
        )
        self.writers[key] = (number + 1, writer)
        return writer
