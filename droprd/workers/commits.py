"""Commits of the inbox: one after another, each for all that waited; and jobs between them.

A commit runs in a thread, so that others are served meanwhile; but if nobody else is asking and the
disk was quick lately it runs at once: a hop to a thread and back takes as long as a sync.

What needs the store to itself (a match, new limits, a fresh count) is done between two commits.

A commit that fails ends everything: who waits gets the error, `failed` tells the worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from droprd.errors import DroprdError
from droprd.model import KIB
from droprd.spool.staging import Batch
from droprd.spool.store import InboxWriter

INLINE_BYTES_MAX = 256 * KIB
INLINE_SYNC_S_MAX = 0.002


class Commits:
    """One commit after another, each for all that waited; and jobs between them."""

    def __init__(self, store: InboxWriter) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begun_at: float | None = None
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(1, "droprd-commit")
        self._waiters: list[asyncio.Future[None]] = []
        self._jobs: list[tuple[asyncio.Future[Any], Callable[[], Any]]] = []
        self._task: asyncio.Task[None] | None = None
        self._sync_s = 0.0

    async def committed(self, *, alone: bool) -> None:
        """Return when all that is staged now is on stable storage. `alone`: nobody else asks."""
        if alone and self._task is None and self._sync_s < INLINE_SYNC_S_MAX:
            batch = self._store.begin()
            if batch is None:
                return
            if batch.frame_bytes <= INLINE_BYTES_MAX:
                try:
                    self._write(batch)
                    self._finish(batch)
                except (OSError, DroprdError) as error:
                    self._fail(error)
                    raise
                return
            self._task = self._loop.create_task(self._run(batch))
        future = self._loop.create_future()
        self._waiters.append(future)
        self._start()
        await future

    async def between(self, job: Callable[[], Any]) -> Any:
        """Do `job` while no commit is under way and nothing is staged."""
        if self._task is None and not self._store.has_staged:
            return job()
        future = self._loop.create_future()
        self._jobs.append((future, job))
        self._start()
        return await future

    async def close(self) -> None:
        """Wait for the commit under way."""
        if self._task is not None:
            await self._task
        self._threads.shutdown()

    def _start(self) -> None:
        if self._task is None:
            self._task = self._loop.create_task(self._run(None))

    async def _run(self, batch: Batch | None) -> None:
        try:
            while batch is not None or self._store.has_staged or self._waiters or self._jobs:
                # Whoever is waiting now has staged before; those who come during the commit wait
                # for the next one.
                waiters, self._waiters = self._waiters, []
                if batch is None:
                    batch = self._store.begin()
                if batch is not None:
                    await self._loop.run_in_executor(self._threads, self._write, batch)
                    self._finish(batch)
                    batch = None
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(None)
                if not self._store.has_staged:
                    self._do_jobs()
        except (OSError, DroprdError) as error:
            for waiter in (*waiters, *self._waiters, *(future for future, _ in self._jobs)):
                if not waiter.done():
                    waiter.set_exception(error)
            self._fail(error)
        finally:
            self._task = None

    def _do_jobs(self) -> None:
        jobs, self._jobs = self._jobs, []
        for future, job in jobs:
            if future.done():
                continue
            try:
                future.set_result(job())
            except (OSError, DroprdError) as error:
                future.set_exception(error)

    def _write(self, batch: Batch) -> None:
        begun = self._loop.time()
        self.begun_at = begun
        self._store.write(batch)
        self._sync_s = self._loop.time() - begun
        self.begun_at = None

    def _finish(self, batch: Batch) -> None:
        self._store.ring(self._store.finish(batch))

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
