"""Being the daemon for a moment: what droprctl does itself while no daemon runs.

`as_daemon` takes the daemon's lock, run as root only after it became the spool's owner, so that
nothing is left behind that the daemon may not write. `publish` renews state/public.
`stopped_status` reads what the files say and needs no lock.

A crash leaves each file old or new. Raises SpoolBusy while a daemon runs (starts, or stops).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from droprd.core.status import WORKERS, status_document
from droprd.ctl.outboxfiles import read_waiting
from droprd.ctl.owner import as_owner
from droprd.errors import SpoolNotReady
from droprd.settings.published import Node, Published, public_map
from droprd.settings.values import Settings
from droprd.spool import state
from droprd.spool.clock import SystemClock
from droprd.spool.daemonlock import DaemonLock
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, read_version


@contextlib.contextmanager
def as_daemon(root: str, timeout_s: float) -> Iterator[Layout]:
    """Hold the daemon's lock of the spool at `root`, as its owner.

    Raises: SpoolBusy, SpoolNotReady, NotPermitted.
    """
    fs = OsFs()
    read_version(fs, root)
    layout = Layout(root)
    with as_owner(root):
        lock = DaemonLock.take(fs, layout, "droprctl", timeout_s)
        try:
            yield layout
        finally:
            lock.release()


def publish(layout: Layout, settings: Settings, wishes: state.Wishes | None = None) -> None:
    """Renew state/public from the settings. Only within `as_daemon`, or for a spool just made."""
    fs = OsFs()
    facts = read_version(fs, layout.root)
    wishes = state.read_wishes(fs, layout) if wishes is None else wishes
    old = state.read_public(fs, layout) or {}
    # Peers that were known and are no more: messages may wait for them.
    gone = set(old.get("peers", {})) - set(settings.peers)
    full = old.get("full", {})
    values = public_map(
        settings,
        facts.spool_id,
        disk_bytes=fs.free_bytes(layout.root)[1],
        paused=wishes.paused(),
        draining=wishes.drains,
        unconfigured=gone,
        outbox_full=full.get("outbox"),
        inbox_full=full.get("inbox"),
    )
    state.write_public(fs, layout, values)


def change_wishes(
    root: str, timeout_s: float, change: Callable[[state.Wishes], state.Wishes]
) -> None:
    """Apply `change` to the pauses and drains on disk, for applications and the next daemon.

    Raises: SpoolBusy, SpoolNotReady, NotPermitted.
    """
    fs = OsFs()
    with as_daemon(root, timeout_s) as layout:
        wishes = change(state.read_wishes(fs, layout).current(SystemClock()))
        state.write_wishes(fs, layout, wishes)
        # If we stop here: the wish stands, applications learn of it when the daemon starts.
        values = state.read_public(fs, layout)
        if values is not None:
            values.update(paused=wishes.paused(), draining=sorted(wishes.drains))
            state.write_public(fs, layout, values)


def _last_gauges(fs: OsFs, layout: Layout) -> dict[str, dict[str, Any]]:
    """What the workers told last, with what waits in the outbox as it is now."""
    gauges = {worker: state.read_gauges(fs, layout, worker) for worker in WORKERS}
    waiting = read_waiting(fs, layout)
    if waiting is None:
        return gauges
    # The sender told neither what was sent since nor, if it was killed, what was delivered last.
    sender = gauges["sender"]
    told = sender.get("peers")
    peers = {
        name: {**one, "queued": 0, "bytes": 0}
        for name, one in (told.items() if isinstance(told, dict) else ())
        if isinstance(one, dict)
    }
    for name, (queued, size) in waiting.peers().items():
        peers.setdefault(name, {}).update(queued=queued, bytes=size)
    sender.update(peers=peers, unmerged_bytes=waiting.unmerged_bytes)
    return gauges


def stopped_status(node: Node, version: str) -> dict[str, Any]:
    """The status document of a node without a daemon, from state/ alone. Raises: SpoolNotReady."""
    fs = OsFs()
    layout = Layout(node.spool)
    read_version(fs, node.spool)
    peers: list[str] = []
    channels: list[str] = []
    paused: dict[str, Any] = {}
    draining: list[str] = []
    name = node.name
    with contextlib.suppress(SpoolNotReady):  # nobody wrote it yet: there is nothing to tell
        public = Published(layout.public).get()
        name = name or public.node
        peers = [peer for peer, one in public.peers.items() if not one.unconfigured]
        channels = list(public.channels)
        paused = {target: dict(one) for target, one in public.paused.items()}
        draining = sorted(public.draining)
    newest = max(
        (found.mtime_ns for worker in WORKERS if (found := fs.stat(layout.gauges(worker)))),
        default=time.time_ns(),
    )
    free, _ = fs.free_bytes(layout.root)
    document = status_document(
        node=name,
        version=version,
        state="stopped",
        uptime_s=0.0,
        as_of_ns=newest,
        workers={worker: {"state": "stopped", "pid": None, "restarts": 0} for worker in WORKERS},
        gauges=_last_gauges(fs, layout),
        peers=peers,
        channels=channels,
        paused=paused,
        draining=draining,
        spool={"free_bytes": free},
    )
    for about in document["peers"].values():
        about["next_try_s"] = None  # nobody will try
    document["spool"]["free_bytes"] = free
    return document
