"""The janitor: looks after the inbox. Ends leases, expires, syncs claims, deletes what is over.

Twice a second it looks at every stream (`droprd.spool.tending`), so that what consumers settled is
on stable storage within a second, and the leases of a dead consumer are free even if nobody else
waits for them. It deletes whole segments whose messages are over (`droprd.spool.retention`), the
waiting FIFOs of dead consumers, and parts of blobs that nobody has gone on with for a day; and it
counts: channels, dead letters, bytes. Where `[monitor] listen` is set, it serves health by HTTP.

A store of another package (`[inbox] store`) looks after itself: then it only measures.

Messages arrive and are consumed without it. A crash of it leaves what consumers' crashes leave.
An error of the disk ends this process; a new one begins afresh.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from droprd import logs
from droprd.core import rpc
from droprd.core.claimops import Now
from droprd.core.filling import Filling
from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.model import Lane
from droprd.spool.bells import Waiting
from droprd.spool.handle import Spool
from droprd.spool.inbox import channel_names
from droprd.spool.inboxfixing import InboxFixer
from droprd.spool.layout import Layout, split_inbox_blob_name
from droprd.spool.plugins import FILES
from droprd.spool.retention import DeadLetters, Retention
from droprd.spool.seals import SealReader
from droprd.spool.tending import StreamTender
from droprd.workers import worker
from droprd.workers.jobs import Jobs
from droprd.workers.worker import Context

if TYPE_CHECKING:
    from droprd.workers.exporter import Exporter

TICK_S = 0.5
DELETE_EVERY_S = 1.0
CLEAN_EVERY_S = 5.0
PART_KEPT_S = 86_400
MEASURE_EVERY_S = 5.0
MEASURE_SHARE = 50  # measuring may take one part in so many of the time
WALL_CLOCK_PARTED_NS = 300_000_000_000

log = logging.getLogger("droprd.janitor")


class Janitor:
    """The worker `janitor`."""

    def __init__(self, context: Context) -> None:
        """Open what is there. Raises: OSError, BadData."""
        self._context = context
        layout = Layout(context.settings.node.spool)
        spool_id = bytes(context.facts["spool_id"])
        self._spool = Spool(context.fs, context.clock, context.urandom, layout, spool_id)
        self._waiting = Waiting(context.fs, layout)
        self._dead = DeadLetters(self._spool)
        self._retention = Retention(self._spool, self._dead)
        self._seals = SealReader(context.fs, layout)
        self._tenders: dict[tuple[str, int], StreamTender] = {}
        self._parts: dict[str, tuple[int, int]] = {}  # size, and boot ns when first seen so
        self._parted_ns = context.clock.wall_ns() - context.clock.boot_ns()
        self._bytes = 0
        self._filling = Filling()
        self._next_s = {"delete": 0.0, "clean": 0.0, "measure": 0.0}

    def tick(self, at_s: float) -> dict[str, Any]:
        """One look at everything; `at_s` is monotonic. Returns the gauges. Raises: OSError."""
        if self._context.settings.inbox.store == FILES:
            self._tend_files(at_s)
        return self._gauges(at_s)

    def _tend_files(self, at_s: float) -> None:
        now = self._now()
        deleting = self._due("delete", at_s, DELETE_EVERY_S)
        sealed = self._seals.read() if deleting else {}
        settings = self._context.settings
        self._find_streams()
        for key, tender in self._tenders.items():
            self._context.beat()
            tender.tend(now, settings.channel(key[0]).max_attempts)
            if key in sealed:
                gone = tender.delete_settled(
                    self._retention, sealed[key], settings.inbox.retain_s, now
                )
                if gone:
                    logs.event(
                        log, logging.DEBUG, "segments deleted", channel=key[0], segments=gone
                    )
        if self._due("clean", at_s, CLEAN_EVERY_S):
            self._waiting.remove_orphans()
            self._remove_parts(now)
            self._dead.tidy()

    def fix(self, verb: str, selection: Selection, dry: bool) -> Iterator[Fixed]:
        """Begin to revive or purge what an operator means."""
        fixer = InboxFixer(self._spool, self._dead, lambda channel: self._waiting.ring([channel]))
        return (fixer.purge if verb == "purge" else fixer.requeue)(selection, dry=dry)

    async def take_letters(self, params: rpc.Params) -> dict[str, Any]:
        """Note that the receiver has appended these letters again."""
        self._dead.take(
            [
                (Lane(*lane), [(bytes(f), list(of)) for f, of in letters], str(why))
                for lane, letters, why in params["taken"]
            ]
        )
        return {}

    def close(self) -> None:
        """Close all files."""
        for tender in self._tenders.values():
            tender.close()
        self._waiting.close()
        self._dead.close()

    def _now(self) -> Now:
        """Nothing is expired, or deleted by age, while the wall clock has parted from boot time."""
        clock = self._context.clock
        boot_ns, wall_ns = clock.boot_ns(), clock.wall_ns()
        held = abs(wall_ns - boot_ns - self._parted_ns) > WALL_CLOCK_PARTED_NS
        return Now(clock.boot_id(), boot_ns, wall_ns, held)

    def _due(self, what: str, at_s: float, every_s: float) -> bool:
        if at_s < self._next_s[what]:
            return False
        self._next_s[what] = at_s + every_s
        return True

    def _find_streams(self) -> None:
        fs, layout = self._spool.fs, self._spool.layout
        for channel in channel_names(fs, layout):
            for name in fs.listdir(layout.channel(channel)):
                key = channel, int(name) if name in "0123456789" else -1
                if key[1] >= 0 and key not in self._tenders:
                    self._tenders[key] = StreamTender(self._spool, self._waiting, *key)

    def _remove_parts(self, now: Now) -> None:
        """Remove parts of blobs that have not grown for a day, as far as this process has seen."""
        fs, directory = self._spool.fs, self._spool.layout.inbox_blobs
        seen: dict[str, tuple[int, int]] = {}
        for name in fs.listdir(directory):
            found = split_inbox_blob_name(name)
            if found is None or found[2]:
                continue
            there = fs.stat(f"{directory}/{name}")
            if there is None:
                continue
            size, since_ns = self._parts.get(name, (-1, 0))
            if size != there.size:
                since_ns = now.boot_ns
            if now.boot_ns - since_ns > PART_KEPT_S * 1_000_000_000 and not now.held:
                fs.unlink(f"{directory}/{name}")
                logs.event(log, logging.INFO, "part of a blob removed", name=name)
            else:
                seen[name] = there.size, since_ns
        self._parts = seen

    def _gauges(self, at_s: float) -> dict[str, Any]:
        now = self._now()
        channels: dict[str, dict[str, Any]] = {
            name: {"ready": 0, "leased": 0, "dead": count}
            for name, count in self._dead.counts.items()
        }
        corrupt = 0
        problems = []
        for (channel, _), tender in self._tenders.items():
            one = channels.setdefault(channel, {"ready": 0, "leased": 0, "dead": 0})
            one["ready"] += tender.gauges.ready
            one["leased"] += tender.gauges.leased
            one["dead"] += tender.gauges.dead
            since_ns = tender.gauges.oldest_wall_ns
            if since_ns is not None and not now.held:
                age_s = round(max(0, now.wall_ns - since_ns) / 1e9)
                one["oldest_age_s"] = max(age_s, one.get("oldest_age_s", 0))
            corrupt += tender.gauges.corrupt
            if tender.problem:
                problems.append(tender.problem)
        if at_s >= self._next_s["measure"]:
            self._measure(at_s)
        free_bytes, _ = self._spool.fs.free_bytes(self._spool.layout.root)
        self._filling.look(at_s, free_bytes)
        return {
            "channels": channels,
            "spool": {"bytes": self._bytes, "free_bytes": free_bytes},
            "full_in_s": self._filling.full_in_s,
            "dead_letters": sum(one["dead"] for one in channels.values()),
            "corrupt": corrupt,
            "problems": problems,
        }

    def _measure(self, at_s: float) -> None:
        """Walk the spool for its size: seldom, and the more seldom the longer it takes."""
        began_ns = self._context.clock.boot_ns()
        self._bytes = _tree_bytes(self._spool.layout.root, self._context)
        took_s = (self._context.clock.boot_ns() - began_ns) / 1e9
        self._next_s["measure"] = at_s + max(MEASURE_EVERY_S, took_s * MEASURE_SHARE)


def _tree_bytes(path: str, context: Context) -> int:
    """Bytes that a directory takes on the disk. What vanishes meanwhile does not count."""
    total = 0
    pending = [path]
    while pending:
        context.beat()
        try:
            with os.scandir(pending.pop()) as found:
                for one in found:
                    try:
                        if one.is_dir(follow_symlinks=False):
                            pending.append(one.path)
                        else:
                            total += one.stat(follow_symlinks=False).st_blocks * 512
                    except FileNotFoundError:
                        continue
        except (FileNotFoundError, PermissionError):
            continue
    return total


def _exporter(context: Context) -> Exporter | None:
    """What serves health by HTTP, if that is wanted; else its libraries are not even imported."""
    if not context.settings.monitor.listen:
        return None
    from droprd.workers.exporter import Exporter

    return Exporter(context.settings.control.socket, context.settings.monitor.listen)


async def serve(context: Context) -> None:
    """Be the janitor until told to stop."""
    # A few files are open for each channel and priority.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    janitor = Janitor(context)
    loop = asyncio.get_running_loop()
    exporter = _exporter(context)

    async def reload(params: rpc.Params) -> dict[str, Any]:
        # Each tick reads the settings afresh; only an address is not left by itself.
        nonlocal exporter
        if (exporter.listen if exporter else "") != context.settings.monitor.listen:
            if exporter is not None:
                await exporter.close()
            exporter = _exporter(context)
        return {}

    def look() -> None:
        gauges = janitor.tick(loop.time())
        if exporter is not None and exporter.problem:
            gauges["problems"].append(exporter.problem)
        context.gauges(gauges)

    context.on("reload", reload)
    context.on("fix", Jobs(janitor.fix, context.beat).fix)
    context.on("take_letters", janitor.take_letters)
    try:
        look()
        context.ready()
        while not context.stopping.is_set():
            try:
                await asyncio.wait_for(context.stopping.wait(), TICK_S)
            except TimeoutError:
                look()
                context.beat()
    finally:
        if exporter is not None:
            await exporter.close()
        janitor.close()


if __name__ == "__main__":
    worker.run("janitor", serve)
