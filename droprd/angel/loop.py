"""One selector, timers, signals, and the ends of child processes: all that the angel waits for.

No threads, no asyncio. Callbacks run one after another and must never block; what may block (a
disk that hangs) is done by a child process, see aside.py. An exception in a callback ends `run`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Callback = Callable[[], object]


@dataclass(order=True, slots=True)
class Timer:
    """One call in the future; `cancel` makes it none."""

    at: float
    number: int
    callback: Callback | None = field(compare=False)

    def cancel(self) -> None:
        self.callback = None


@dataclass(slots=True)
class _Watch:
    read: Callback | None
    write: Callback | None


class Loop:
    """Waits and calls. Times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[Timer] = []
        self._numbers = itertools.count()
        self._signals: dict[int, Callback] = {}
        self._children: set[int] = set()
        self._signal_in, self._signal_out = socket.socketpair()
        for end in (self._signal_in, self._signal_out):
            end.setblocking(False)
        self.watch(self._signal_out.fileno(), self._signalled)
        signal.set_wakeup_fd(self._signal_in.fileno(), warn_on_full_buffer=False)

    def now(self) -> float:
        return time.monotonic()

    def watch(self, fd: int, read: Callback | None = None, write: Callback | None = None) -> None:
        """Call `read` while `fd` can be read, `write` while it can be written; replaces the old."""
        events = (selectors.EVENT_READ if read else 0) | (selectors.EVENT_WRITE if write else 0)
        self.forget(fd)
        if events:
            self._selector.register(fd, events, _Watch(read, write))

    def forget(self, fd: int) -> None:
        """Watch `fd` no more. Must come before its close."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def later(self, delay_s: float, callback: Callback) -> Timer:
        """Call once after `delay_s` seconds."""
        timer = Timer(self.now() + delay_s, next(self._numbers), callback)
        heapq.heappush(self._timers, timer)
        return timer

    def every(self, interval_s: float, callback: Callback) -> None:
        """Call again and again, `interval_s` seconds after the last call."""

        def again() -> None:
            callback()
            self.later(interval_s, again)

        self.later(interval_s, again)

    def on_signal(self, number: int, callback: Callback) -> None:
        """Call when the process gets signal `number`."""
        self._signals[number] = callback
        signal.signal(number, lambda *_: None)

    def on_end(self, pid: int, callback: Callable[[int], None]) -> int:
        """Call with the code (-N: died by signal N) when our child `pid` has ended.

        Returns its pidfd, to signal it with. It is waited for, and the pidfd closed, by then.
        """
        pidfd = os.pidfd_open(pid)
        self._children.add(pid)

        def readable() -> None:
            ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
            if ended is None:
                return
            self.forget(pidfd)
            os.close(pidfd)
            self._children.discard(pid)
            died = ended.si_code != os.CLD_EXITED
            callback(-ended.si_status if died else ended.si_status)

        self.watch(pidfd, readable)
        return pidfd

    def reap_strangers(self) -> None:
        """Wait for ended children that are none of ours: process 1 inherits all orphans."""
        with contextlib.suppress(ChildProcessError):
            while True:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                # One of ours is left to its own callback; strangers behind it to the next call.
                if ended is None or ended.si_pid in self._children:
                    return
                os.waitpid(ended.si_pid, 0)

    def run(self, until: Callable[[], bool]) -> None:
        """Wait and call until `until` holds."""
        while not until():
            self.turn()

    def turn(self, timeout_s: float = 60.0) -> None:
        """One round: what can be read or written first, then the timers that are due."""
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        if self._timers:
            timeout_s = min(timeout_s, max(0.0, self._timers[0].at - self.now()))
        for key, events in self._selector.select(timeout_s):
            watch: _Watch = key.data
            if events & selectors.EVENT_READ and watch.read and self._current(key.fd, watch):
                watch.read()
            if events & selectors.EVENT_WRITE and watch.write and self._current(key.fd, watch):
                watch.write()
        now = self.now()
        while self._timers and self._timers[0].at <= now:
            timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()

    def _current(self, fd: int, watch: _Watch) -> bool:
        # An earlier callback of this round may have closed the descriptor or watched another one.
        key = self._selector.get_map().get(fd)
        return key is not None and key.data is watch

    def _signalled(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._signal_out.recv(4096):
                callback = self._signals.get(number)
                if callback is not None:
                    callback()


def reset_signals() -> None:
    """In a forked child: signals act as they do by default, and wake nobody else's loop."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
