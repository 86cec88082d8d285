"""Requeues and purges in a worker: a slice at a time, between everything else it does.

An operator's command may concern a hundred thousand messages. The worker goes on with its own work
between slices, and answers within about `ANSWER_S`: done, or the number of the job to be asked on.
Whoever asks no more leaves a job that is dropped by the next one; what was done stays done.

Raises DroprdError for a job that is unknown: the worker was replaced meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from droprd.core import rpc
from droprd.core.filters import Selection, from_map
from droprd.core.fixed import Fixed
from droprd.errors import DroprdError

ANSWER_S = 1.0

Begin = Callable[[str, Selection, bool], Iterator[Fixed]]


class Jobs:
    """The one job of a worker, if any."""

    def __init__(
        self,
        begin: Begin,
        beat: Callable[[], None],
        after: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`begin(verb, selection, dry)` begins a job; `after` is awaited after each slice."""
        self._begin = begin
        self._beat = beat
        self._after = after
        self._number = 0
        self._job: Iterator[Fixed] | None = None
        self._lock = asyncio.Lock()

    async def fix(self, params: rpc.Params) -> dict[str, Any]:
        """Answer `fix` {verb, selection, dry} or {job}.

        Returns what `Fixed.as_map` makes, with `taken` and `job`, which is None when all is done.
        """
        async with self._lock:
            if params.get("job") is None:
                self._drop()
                selection = from_map(params.get("selection"))
                self._job = self._begin(str(params.get("verb")), selection, bool(params.get("dry")))
                self._number += 1
            elif self._job is None or params["job"] != self._number:
                raise DroprdError(
                    "the command was interrupted in the middle",
                    why="another one came, or the worker was replaced; what was done stays done",
                    hint="give it again for the rest",
                    code="interrupted",
                )
            return await self._go_on()

    async def _go_on(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        end = loop.time() + ANSWER_S
        job = self._job
        assert job is not None
        fixed = Fixed()
        try:
            for fixed in job:
                self._beat()
                if self._after is not None:
                    await self._after()
                await asyncio.sleep(0)
                if fixed.taken or loop.time() >= end:
                    return {**fixed.as_map(), "taken": fixed.taken, "job": self._number}
        except BaseException:
            self._job = None
            raise
        self._job = None
        return {**fixed.as_map(), "taken": [], "job": None}

    def _drop(self) -> None:
        if self._job is not None:
            close = getattr(self._job, "close", None)
            if close is not None:
                close()
            self._job = None
