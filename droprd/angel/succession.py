"""Becoming the daemon of a spool: its lock, and the workers an earlier angel left behind.

Workers hold the lock too (they inherited it), so it is free only when the last one is gone. After
an angel was killed its workers see the end of their links and leave by themselves; we wait up to
10 s. One that does not leave (it is stopped, or hangs) is killed: it belongs to a dead angel, and
nobody else would. One that is stuck in the kernel keeps the lock, and we do not start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable

import psutil

from droprd import logs
from droprd.angel.loop import Loop
from droprd.errors import SpoolBusy
from droprd.spool.daemonlock import DaemonLock, read_holder
from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout

log = logging.getLogger("droprd.angel")

LEAVE_S = 10.0
KILLED_S = 3.0
_LOOK_S = 0.05


def take_lock(
    loop: Loop, fs: Fs, layout: Layout, given_up: Callable[[], bool]
) -> DaemonLock | None:
    """Become the daemon; None if `given_up` before that. Raises: SpoolBusy, naming who holds it."""
    lock = _try(loop, fs, layout, 0.0, given_up)
    if lock is not None or given_up():
        return lock
    holder = read_holder(fs, layout)
    if holder is not None and holder[1] == "droprd" and _lives(holder[0]):
        return DaemonLock.take(fs, layout, "droprd")
    logs.event(log, logging.INFO, "waiting for old workers to leave", spool=layout.root)
    lock = _try(loop, fs, layout, LEAVE_S, given_up)
    if lock is not None or given_up():
        return lock
    left = _left_behind(layout.lock)
    for pid in (one for one in left if _is_worker(one)):
        logs.event(log, logging.WARNING, "old worker killed", pid=pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    lock = _try(loop, fs, layout, KILLED_S, given_up)
    if lock is not None or given_up():
        return lock
    if not left:
        return DaemonLock.take(fs, layout, "droprd")
    raise SpoolBusy(
        f"the spool at {layout.root} is in use",
        pid=left[0],
        why=f"a process of an earlier daemon, pid {left[0]}, does not end; its disk may hang",
        hint="look at the disk, then start again",
    )


def _try(
    loop: Loop, fs: Fs, layout: Layout, for_s: float, given_up: Callable[[], bool]
) -> DaemonLock | None:
    end = loop.now() + for_s
    while True:
        with contextlib.suppress(SpoolBusy):
            return DaemonLock.take(fs, layout, "droprd")
        if loop.now() >= end or given_up():
            return None
        loop.turn(_LOOK_S)


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _left_behind(path: str) -> list[int]:
    """Processes that have the lock file open."""
    found = []
    lock = os.stat(path)
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            for name in os.listdir(f"/proc/{process.pid}/fd"):
                if os.path.samestat(os.stat(f"/proc/{process.pid}/fd/{name}"), lock):
                    found.append(process.pid)
                    break
    return found


def _is_worker(pid: int) -> bool:
    """Whether this is a worker, and not for example a `droprctl` that waits for the lock too."""
    with contextlib.suppress(psutil.Error):
        return "--link" in psutil.Process(pid).cmdline()
    return False
