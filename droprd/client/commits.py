"""Commits: how the threads of one Outbox share one journal and one sync.

A thread leaves its put in a queue and asks for the lock. Whoever gets it commits all that is in the
queue; the others find their puts done when their turn comes. So those that wait during one sync
share the next one, and nobody waits for a thread that does nothing.

Guarantees: the gate is held (shared) from before the drain flags are read until the sync is over,
so that after taking it once alone a drain knows of no send in flight. Before a fork the lock is
taken, so that the child finds the journal whole; there every inherited descriptor is closed, no
lock is released, and the next send opens a journal of the child's own.

Raises what the put's error is; SpoolBusy if a drain holds the gate too long; UsageError if a
signal handler sends in the middle of its own thread's send.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from droprd.client.admission import Room, check_not_draining
from droprd.core.frame import new_frame_id
from droprd.errors import DroprdError, SendInDoubt, SpoolBusy, UsageError
from droprd.model import MIB, Clock
from droprd.settings.published import Published
from droprd.spool.bells import Bell
from droprd.spool.blobs import Blob, copy_blob, remove_blob, write_blob
from droprd.spool.fsops import Fs
from droprd.spool.journal import Journal, refusal
from droprd.spool.layout import Layout
from droprd.spool.puts import Put

GATE_TIMEOUT_S = 10.0
BATCH_BYTES = 4 * MIB


class Commits:
    """One journal for many threads."""

    def __init__(
        self,
        fs: Fs,
        clock: Clock,
        urandom: Callable[[int], bytes],
        layout: Layout,
        spool_id: bytes,
        published: Published,
        room: Room,
        *,
        uid: int,
    ) -> None:
        self._fs = fs
        self._room = room
        self._clock = clock
        self._urandom = urandom
        self._layout = layout
        self._published = published
        self._journal = Journal(fs, clock, urandom, layout, spool_id, uid=uid)
        self._bell = Bell(layout.bell)
        self._gate: int | None = None
        self._closed = False
        self._new_locks()

    def _new_locks(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._waiting: deque[Put] = deque()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        me = threading.get_ident()
        if self._owner == me:
            raise UsageError(
                "a signal handler may not send while it interrupts a send of the same thread",
                hint="let the handler set a flag, and send from the main program",
            )
        with self._lock:
            self._owner = me
            try:
                yield
            finally:
                self._owner = None

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this Outbox is closed", hint="make a new one")

    # -- putting -------------------------------------------------------------------------------

    def put(self, put: Put) -> list[str]:
        """Bring it to stable storage, together with what others put meanwhile; its ids."""
        self._waiting.append(put)
        try:
            with self._alone():
                self._check_open()
                while not put.done:
                    # Empty only if an interrupt took our put out of the queue and went no further.
                    self._commit(self._batch() or [put])
        except BaseException:
            with suppress(ValueError):
                self._waiting.remove(put)
            raise
        if put.error is not None:
            raise put.error
        self._bell.ring()
        return put.ids

    def _batch(self) -> list[Put]:
        batch: list[Put] = []
        size = 0
        while self._waiting and size < BATCH_BYTES:
            put = self._waiting.popleft()
            batch.append(put)
            size += put.size
        return batch

    def _commit(self, batch: list[Put]) -> None:
        try:
            self._pass_gate()
            try:
                admitted = self._not_drained(batch)
                if admitted:
                    self._journal.spare_bytes = self._room.spare_bytes()
                    self._journal.commit(admitted)
            finally:
                if self._gate is not None:
                    self._fs.unlock(self._gate)
        except DroprdError as error:
            for put in batch:
                if not put.done:
                    put.error = type(error)(
                        error.what, why=error.why, hint=error.hint, code=error.code
                    )
                    put.done = True
        finally:
            # After an interrupt: what is undecided did not count, the other threads do it again.
            self._waiting.extendleft(put for put in reversed(batch) if not put.done)

    def _pass_gate(self) -> None:
        try:
            if self._gate is None:
                self._gate = self._fs.open(self._layout.gate, os.O_RDONLY)
            is_open = self._fs.lock(self._gate, GATE_TIMEOUT_S, shared=True)
        except OSError as error:
            raise refusal(error, self._layout.gate) from error
        if not is_open:
            raise SpoolBusy(
                "no message was accepted",
                why=f"{self._layout.gate} is locked: a drain is beginning",
                hint="try again",
            )

    def _not_drained(self, batch: list[Put]) -> list[Put]:
        public = self._published.get()
        if not public.draining:
            return batch
        admitted = []
        for put in batch:
            try:
                check_not_draining(public, put.lane)
            except DroprdError as error:
                put.error = error
                put.done = True
            else:
                admitted.append(put)
        return admitted

    # -- blobs ---------------------------------------------------------------------------------

    @contextmanager
    def blobs(self) -> Iterator[BlobMaker]:
        """For one put: makes its blobs; those that no frame names in the end are removed."""
        with self._alone():
            self._check_open()
            journal = self._journal.pin()
        maker = BlobMaker(self._fs, self._clock, self._urandom, self._layout, journal)
        try:
            yield maker
        except SendInDoubt:
            raise  # a frame that may arrive names them
        except (DroprdError, OSError):
            for blob in maker.made:
                remove_blob(self._fs, self._layout, blob)
            raise
        finally:
            with self._alone():
                self._journal.unpin(journal)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the journal, once the commit in flight is over; no more puts after that."""
        with self._alone():
            self._closed = True
            self._journal.close()
            self._close_rest()

    def _close_rest(self) -> None:
        self._bell.close()
        gate, self._gate = self._gate, None
        if gate is not None:
            self._fs.close(gate)

    def before_fork(self) -> None:
        """Wait until no commit is in flight."""
        if self._owner != threading.get_ident():
            self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        if self._owner != threading.get_ident():
            self._lock.release()

    def after_fork_in_child(self) -> None:
        """Forget the parent's files, without unlocking what is the parent's."""
        self._new_locks()
        self._journal.abandon()
        self._close_rest()


class BlobMaker:
    """Makes the blobs of one put, named after the journal that is pinned for them."""

    def __init__(
        self,
        fs: Fs,
        clock: Clock,
        urandom: Callable[[int], bytes],
        layout: Layout,
        journal: str,
    ) -> None:
        self._fs = fs
        self._clock = clock
        self._urandom = urandom
        self._layout = layout
        self._journal = journal
        self.made: list[Blob] = []

    def from_bytes(self, body: bytes) -> Blob:
        """A blob of bytes in memory. Raises: SpoolFull, SpoolNotReady."""
        with self._refused():
            blob = write_blob(self._fs, self._layout, self._journal, self._new_id(), body)
        self.made.append(blob)
        return blob

    def from_file(self, fd: int, size: int) -> Blob:
        """A blob of the first `size` bytes of an open file. Raises: SpoolFull, SpoolNotReady."""
        with self._refused():
            blob = copy_blob(self._fs, self._layout, self._journal, self._new_id(), fd, size)
        self.made.append(blob)
        return blob

    def _new_id(self) -> bytes:
        return new_frame_id(self._clock.wall_ns(), self._urandom(10))

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise refusal(error, self._layout.outbox_blobs) from error
