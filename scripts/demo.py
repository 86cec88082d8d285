"""The demo: every line of Python's standard library goes from node hamburg to node berlin.

One process sends the lines in batches, another sends single urgent messages meanwhile. In the
middle berlin is stopped for some seconds, and a sender and a receiver are killed. At the end the
lines that berlin's consumer put together must have the same SHA-256 as the input.

Exit 0 and a last line `demo: N sent, N received, 0 lost, 0 duplicated`, or exit 1.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import droprd
from droprd.testing.node import Node, pair, wait_until

BATCH = 500
URGENT_EVERY_S = 0.05
DOWN_S = 4.0
WITHIN_S = 100.0
context = multiprocessing.get_context("spawn")


def lines(limit: int) -> Iterator[bytes]:
    """Every line of the standard library, `site-packages` left out, up to `limit`."""
    root = Path(sysconfig.get_path("stdlib"))
    left = limit
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        for line in path.read_bytes().splitlines(keepends=True):
            if left <= 0:
                return
            left -= 1
            yield line


def produce(spool: str, limit: int, sent: Any, result: SimpleQueue[str]) -> None:
    """Send all lines in batches; the count is shared, the hash goes to `result`."""
    digest = hashlib.sha256()
    with droprd.Outbox(spool=spool) as outbox:
        batch: list[bytes] = []
        for line in lines(limit):
            digest.update(line)
            batch.append(line)
            if len(batch) == BATCH:
                outbox.send_many(batch, to="berlin", channel="lines")
                sent.value += len(batch)
                batch = []
        if batch:
            outbox.send_many(batch, to="berlin", channel="lines")
            sent.value += len(batch)
    result.put(digest.hexdigest())


def hurry(spool: str, sent: Any, stop: Any) -> None:
    """Send single urgent messages until told to stop."""
    with droprd.Outbox(spool=spool) as outbox:
        while not stop.is_set():
            outbox.send(b"%d" % sent.value, to="berlin", channel="urgent", priority=0)
            sent.value += 1
            stop.wait(URGENT_EVERY_S)


def consume(spool: str, received: Any, stop: Any, result: SimpleQueue[Any]) -> None:
    """Put the lines together again; count what comes twice or out of order."""
    digest = hashlib.sha256()
    seen: set[str] = set()
    twice = 0
    urgent = 0
    with droprd.Inbox(spool=spool) as inbox:
        while True:
            is_last = stop.is_set()
            messages = inbox.receive("urgent", "lines", wait_s=0.5, max_messages=1000)
            for message in messages:
                if message.id in seen:
                    twice += 1
                    continue
                seen.add(message.id)
                if message.channel == "lines":
                    digest.update(message.body)
                else:
                    urgent += int(message.body) == urgent
            inbox.ack(messages)
            received.value = len(seen)
            if is_last and not messages:
                break
    result.put((digest.hexdigest(), len(seen), twice, urgent))


class Show:
    """Progress: a line that is overwritten on a terminal, one every few seconds elsewhere."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._is_live = sys.stderr.isatty()
        self._next = 0.0

    def step(self, text: str) -> None:
        """Something happened."""
        print(f"{'' if not self._is_live else chr(13)}[{self.seconds:5.1f} s] {text}", flush=True)

    def progress(self, sent: int, received: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.2 if self._is_live else 3)
        text = f"[{self.seconds:5.1f} s] {sent:,} sent, {received:,} received"
        print(
            f"\r{text}   " if self._is_live else text,
            end="" if self._is_live else "\n",
            file=sys.stderr,
            flush=True,
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def run(work: Path, limit: int) -> int:
    """The whole demo in `work`; the exit code."""
    show = Show()
    hamburg, berlin = pair(work)
    nodes: list[Node] = [hamburg, berlin]
    show.step(f"two nodes in {work}")
    processes: list[Any] = []
    try:
        for node in nodes:
            node.start()
        show.step("both daemons run")
        sent, hurried, received = (context.Value("q", 0) for _ in range(3))
        hurry_stop, stop = context.Event(), context.Event()
        produced: SimpleQueue[str] = context.SimpleQueue()
        consumed: SimpleQueue[Any] = context.SimpleQueue()
        processes = [
            context.Process(target=produce, args=(str(hamburg.spool), limit, sent, produced)),
            context.Process(target=hurry, args=(str(hamburg.spool), hurried, hurry_stop)),
            context.Process(target=consume, args=(str(berlin.spool), received, stop, consumed)),
        ]
        for process in processes:
            process.start()

        def turn(condition: Any, what: str) -> None:
            def check() -> bool:
                show.progress(sent.value + hurried.value, received.value)
                for process in processes:
                    if process.exitcode not in (None, 0):
                        raise AssertionError("an application of the demo failed")
                return bool(condition())

            wait_until(check, what, WITHIN_S)

        turn(lambda: received.value > 20_000, "the first messages arrive")
        show.step("berlin is stopped")
        berlin.stop()
        until = time.monotonic() + DOWN_S
        turn(lambda: time.monotonic() > until - DOWN_S / 2, "some seconds pass")
        show.step("meanwhile `droprctl status` and `droprctl why berlin` on hamburg say:")
        print(hamburg.ctl("status").stdout.decode())
        print(hamburg.ctl("why", "berlin").stdout.decode(), flush=True)
        turn(lambda: time.monotonic() > until, "some seconds pass")
        berlin.start()
        show.step("berlin runs again")
        here = received.value
        turn(lambda: received.value > here + 10_000, "messages arrive again")
        show.step(f"sender {hamburg.kill_worker('sender')} of hamburg is killed")
        here = received.value
        turn(lambda: received.value > here + 10_000, "messages arrive after the sender's death")
        show.step(f"receiver {berlin.kill_worker('receiver')} of berlin is killed")
        turn(lambda: processes[0].exitcode == 0, "everything is sent")
        hurry_stop.set()
        turn(lambda: processes[1].exitcode == 0, "the last urgent message is sent")
        total = sent.value + hurried.value
        show.step(f"all {total:,} messages are handed over")
        turn(lambda: received.value >= total, "everything is received")
        stop.set()
        turn(lambda: processes[2].exitcode == 0, "the consumer ends")
        wanted = produced.get()
        found, unique, twice, urgent = consumed.get()
        show.step(f"SHA-256 sent {wanted[:16]}…, received {found[:16]}…")
        lost = total - unique
        is_good = found == wanted and urgent == hurried.value and not lost and not twice
        seconds = show.seconds
        print(f"{total / seconds:,.0f} messages a second, {seconds:.1f} s in all")
        if not is_good:
            print("the received lines are not those that were sent", file=sys.stderr)
        print(f"demo: {total} sent, {unique} received, {lost} lost, {twice} duplicated", flush=True)
        return 0 if is_good else 1
    except AssertionError as error:
        print(f"\ndemo: failed: {error}", file=sys.stderr)
        for node in nodes:
            print(f"--- {node.name} said:\n{node.said()}", file=sys.stderr)
        return 1
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for node in nodes:
            node.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=500_000, help="at most so many lines")
    parser.add_argument("--keep", metavar="DIR", help="work in DIR and leave everything there")
    options = parser.parse_args()
    if options.keep:
        os.makedirs(options.keep)
        return run(Path(options.keep).resolve(), options.lines)
    with tempfile.TemporaryDirectory(prefix="droprd-demo-") as work:
        return run(Path(work), options.lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        sys.exit(1)
