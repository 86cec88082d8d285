"""Work that may block, done in a forked child one after another: the angel never waits for a disk.

The angel has no threads, so a fork is safe. The child keeps the daemon's lock open while it works:
no other daemon starts before the write is over. If the angel dies, the work is still finished.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection

from droprd.angel.loop import Loop, reset_signals
from droprd.errors import DroprdError

_TEXT_BYTES_MAX = 4096

Done = Callable[[DroprdError | None], None]


class Aside:
    """A queue of such work."""

    def __init__(self, loop: Loop, keep_open: Collection[int]) -> None:
        """`keep_open` are the descriptors the children keep beside 0, 1, 2: the lock."""
        self._loop = loop
        self._keep = set(keep_open)
        self._waiting: deque[tuple[Callable[[], None], Done]] = deque()
        self.pid: int | None = None

    @property
    def busy(self) -> bool:
        """Whether work is under way, by the child `pid`."""
        return self.pid is not None

    def do(self, work: Callable[[], None], done: Done) -> None:
        """Do `work` in a child, then call `done` with None, or with the error it ended with."""
        self._waiting.append((work, done))
        if not self.busy:
            self._next()

    def _next(self) -> None:
        self.pid = None
        if not self._waiting:
            return
        work, done = self._waiting.popleft()
        out, into = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(out)
            os.close(into)
            done(_not_written(str(error)))
            self._next()
            return
        if pid == 0:
            self._child(work, into)
        os.close(into)
        self.pid = pid

        def ended(code: int) -> None:
            text = os.read(out, _TEXT_BYTES_MAX).decode("utf-8", "replace")
            os.close(out)
            why = text or f"the child that writes it ended with {code}"
            done(_not_written(why) if code != 0 else None)
            self._next()

        self._loop.on_end(pid, ended)

    def _child(self, work: Callable[[], None], into: int) -> None:
        code = 1
        try:
            reset_signals()
            keep = sorted({0, 1, 2, into, *self._keep})
            for low, high in zip(keep, [*keep[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
                os.closerange(low + 1, high)
            work()
            code = 0
        except OSError as error:
            os.write(into, str(error).encode()[:_TEXT_BYTES_MAX])
        finally:
            # Whatever happened: a child must never come back as a second angel.
            os._exit(code)


def _not_written(why: str) -> DroprdError:
    return DroprdError(
        "the state of the node could not be written",
        why=why,
        hint="look at the disk of the spool",
        code="state_not_written",
    )
