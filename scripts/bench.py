"""Figures of droprd on this machine, through the public API and real daemons, all syncs on.

Machines are noisy: the disk's own figure (append and fdatasync of the same pieces) is taken in the
same run, in turns with ours, and what counts is the ratio. `--table` prints Markdown.

    raw 1 KiB, raw 100 KiB      append + fdatasync of a growing file, one process
    put one at a time           send() of 1 KiB, the daemon stopped
    put by 100                  send_many() of 100 messages of 1 KiB, the daemon stopped
    end to end by 100           one producer, two nodes, one consumer that acknowledges everything
    idle latency                from the call of send() to the consumer, one message at a time
    memory                      PSS of all daemon processes of a node with messages queued
    droprctl status             the whole process, start of Python included
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import droprd
from droprd.testing.node import Node, pair, wait_until

KIB = 1024
BODY = os.urandom(KIB)
context = multiprocessing.get_context("spawn")


class Figure(NamedTuple):
    """One measured figure with the floor it should reach (None: none)."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool | None:
        if self.floor is None:
            return None
        return self.value <= self.floor if self.at_most else self.value >= self.floor


def per_second(work: Callable[[], object], seconds: float) -> float:
    """How often a second `work` can be done."""
    done = 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        work()
        done += 1
    return done / spent


class Raw:
    """Append and fdatasync of one piece, as a program without droprd would do it."""

    def __init__(self, path: Path, size: int) -> None:
        self._data = os.urandom(size)
        self._fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_TRUNC, 0o600)

    def __call__(self) -> None:
        os.write(self._fd, self._data)
        os.fdatasync(self._fd)


def bench_put(work: Path, seconds: float, runs: int) -> list[Figure]:
    """Putting, beside the raw disk in turns; the median of the ratios pair by pair."""
    hamburg, _ = pair(work)
    figures = []
    with hamburg.outbox() as outbox:
        batch = [BODY] * 100
        for name, size, put, each, floor in (
            ("put one at a time", KIB, lambda: outbox.send(BODY, to="berlin"), 1, 0.75),
            ("put by 100", 100 * KIB, lambda: outbox.send_many(batch, to="berlin"), 100, 0.6),
        ):
            raw = Raw(work / f"raw-{size}", size)
            pairs = []
            for _ in range(runs):
                pairs.append((per_second(raw, seconds), per_second(put, seconds)))
            ratio = statistics.median(ours / theirs for theirs, ours in pairs)
            figures += [
                Figure(
                    f"raw disk, {size // KIB} KiB",
                    statistics.median(p[0] for p in pairs) * each,
                    "msg/s",
                ),
                Figure(name, statistics.median(p[1] for p in pairs) * each, "msg/s"),
                Figure(f"{name} / raw disk", ratio, "x", floor),
            ]
    return figures


def _produce(spool: str, count: int, began: Any) -> None:
    batch = [BODY] * 100
    with droprd.Outbox(spool=spool) as outbox:
        began.value = time.monotonic()
        for _ in range(count // 100):
            outbox.send_many(batch, to="berlin")


def _consume(spool: str, count: int, received: Any, ended: Any) -> None:
    with droprd.Inbox(spool=spool) as inbox:
        while received.value < count:
            messages = inbox.receive("common", wait_s=1, max_messages=1000)
            for message in messages:
                if len(message.body) != KIB:
                    raise AssertionError("a body of another size arrived")
            inbox.ack(messages)
            received.value += len(messages)
        ended.value = time.monotonic()


def bench_end_to_end(work: Path, count: int, runs: int) -> list[Figure]:
    """From the first put to the last receipt, everything up."""
    rates = []
    for number in range(runs):
        directory = work / str(number)
        directory.mkdir()
        hamburg, berlin = pair(directory)
        try:
            hamburg.start()
            berlin.start()
            began, ended, received = (context.Value(c, 0) for c in ("d", "d", "q"))
            jobs = [
                context.Process(target=_consume, args=(str(berlin.spool), count, received, ended)),
                context.Process(target=_produce, args=(str(hamburg.spool), count, began)),
            ]
            for job in jobs:
                job.start()
            for job in jobs:
                job.join(180)
                if job.exitcode != 0:
                    raise AssertionError(f"a process of the benchmark failed\n{hamburg.said()}")
            rates.append(count / (ended.value - began.value))
        finally:
            hamburg.close()
            berlin.close()
    return [
        Figure(f"end to end by 100, {count:,} messages", statistics.median(rates), "msg/s", 50_000)
    ]


def bench_latency(work: Path, count: int) -> list[Figure]:
    """One message at a time on idle nodes."""
    hamburg, berlin = pair(work)
    try:
        hamburg.start()
        berlin.start()
        spans = []
        with hamburg.outbox() as outbox, berlin.inbox() as inbox:
            for number in range(count + 20):
                began = time.perf_counter()
                outbox.send(BODY, to="berlin")
                (message,) = inbox.receive("common", wait_s=10)
                if number >= 20:
                    spans.append((time.perf_counter() - began) * 1000)
                message.ack()
    finally:
        hamburg.close()
        berlin.close()
    spans.sort()
    return [
        Figure("idle latency p50", spans[len(spans) // 2], "ms", 3, at_most=True),
        Figure("idle latency p99", spans[int(len(spans) * 0.99)], "ms"),
    ]


def pss_mib(node: Node) -> float:
    """PSS of the angel and its workers."""
    assert node.process is not None
    angel = psutil.Process(node.process.pid)
    return sum(p.memory_full_info().pss for p in [angel, *angel.children(recursive=True)]) / (
        1 << 20
    )


def bench_memory(work: Path, count: int) -> list[Figure]:
    """A node with many messages queued for a peer that is down; `droprctl status` on it."""
    hamburg, _ = pair(work)
    try:
        hamburg.start()
        idle = pss_mib(hamburg)
        batch = [b"x" * 100] * 1000
        with hamburg.outbox() as outbox:
            for _ in range(count // 1000):
                outbox.send_many(batch, to="berlin")
        wait_until(
            lambda: hamburg.status()["peers"]["berlin"]["queued"] == count, "all are merged", 120
        )
        full = pss_mib(hamburg)
        took = []
        for _ in range(11):
            began = time.perf_counter()
            hamburg.ctl("status", "--json")
            took.append(time.perf_counter() - began)
    finally:
        hamburg.close()
    return [
        Figure("memory of a node, idle", idle, "MiB"),
        Figure(f"memory of a node, {count:,} queued", full, "MiB", 120, at_most=True),
        Figure("droprctl status", statistics.median(took), "s", 0.3, at_most=True),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="put e2e latency memory; all by default")
    parser.add_argument("--dir", help="where to work; the disk that is measured")
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--table", action="store_true", help="print Markdown")
    options = parser.parse_args()
    quick = options.quick
    parts: dict[str, Callable[[Path], list[Figure]]] = {
        "put": lambda work: bench_put(work, 1.0 if quick else 2.0, 3 if quick else 5),
        "e2e": lambda work: bench_end_to_end(
            work, 100_000 if quick else 300_000, 1 if quick else 3
        ),
        "latency": lambda work: bench_latency(work, 200 if quick else 1000),
        "memory": lambda work: bench_memory(work, 100_000 if quick else 1_000_000),
    }
    unknown = set(options.parts) - set(parts)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="droprd-bench-", dir=options.dir) as scratch:
        for name, part in parts.items():
            if options.parts and name not in options.parts:
                continue
            print(f"{name} …", file=sys.stderr, flush=True)
            work = Path(scratch) / name
            work.mkdir()
            figures += part(work)
    if options.table:
        print("| figure | value | floor |\n|---|--:|--:|")
    for figure in figures:
        sign = "≤" if figure.at_most else "≥"
        floor = f"{sign} {figure.floor:g}" if figure.floor is not None else ""
        value = f"{figure.value:,.2f}" if figure.value < 100 else f"{figure.value:,.0f}"
        if options.table:
            print(f"| {figure.name} | {value} {figure.unit} | {floor} |")
        else:
            verdict = {None: "", True: "holds", False: "MISSED"}[figure.holds]
            print(f"{figure.name:42} {value:>12} {figure.unit:6} {floor:>10} {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
