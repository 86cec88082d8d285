"""The receiver's side of an inbox: the rules on both stores."""

from __future__ import annotations

import os
from pathlib import Path

from droprd.core.claimops import Now
from droprd.spool.bells import Waiting
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.inbox import FilesInbox, InboxStore
from droprd.spool.judging import Limits
from droprd.spool.layout import Layout, make_spool
from droprd.spool.receiver import ReceiverStore
from droprd.spool.retention import DeadLetters, Retention
from droprd.spool.seals import SealReader
from droprd.spool.store import InboxWriter
from droprd.spool.tending import StreamTender
from droprd.testing.inboxes import MemoryInbox
from droprd.testing.receiversuite import ReceiverSuite

FS = OsFs()


class Files:
    """A spool."""

    def __init__(self, root: Path) -> None:
        make_spool(FS, str(root), os.urandom)
        self._clock = SystemClock()
        self._spool = Spool(FS, self._clock, os.urandom, Layout(str(root)), b"R" * 16)

    def open_writer(self, limits: Limits) -> InboxWriter:
        return ReceiverStore(self._spool, limits)

    def open_consumer(self) -> InboxStore:
        return FilesInbox(FS, self._clock, os.urandom, self._spool.layout.root)

    def kill_writer(self, writer: InboxWriter) -> None:
        pass  # what it had in memory is never looked at again

    def tend(self) -> None:
        """What the janitor does."""
        clock, waiting = self._clock, Waiting(FS, self._spool.layout)
        now = Now(clock.boot_id(), clock.boot_ns(), clock.wall_ns(), False)
        dead = DeadLetters(self._spool)
        for key, sealed in SealReader(FS, self._spool.layout).read().items():
            tender = StreamTender(self._spool, waiting, *key)
            tender.tend(now, 10)
            tender.delete_settled(Retention(self._spool, dead), sealed, 0, now)
            tender.close()
        dead.close()
        waiting.close()


class TestFilesWriter(ReceiverSuite):
    def make(self, tmp_path: Path) -> Files:
        return Files(tmp_path / "spool")


class Memory:
    def __init__(self, spool: Spool) -> None:
        self._memory = MemoryInbox()
        self._spool = spool

    def open_writer(self, limits: Limits) -> InboxWriter:
        return self._memory.open_writer(self._spool, limits)

    def open_consumer(self) -> InboxStore:
        return self._memory.open()

    def kill_writer(self, writer: InboxWriter) -> None:
        pass

    def tend(self) -> None:
        pass


class TestMemoryWriter(ReceiverSuite):
    def make(self, tmp_path: Path) -> Memory:
        layout = Layout(str(tmp_path))
        return Memory(Spool(FS, SystemClock(), os.urandom, layout, b"R" * 16))
