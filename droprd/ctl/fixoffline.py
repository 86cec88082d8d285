"""Requeue and purge while no daemon runs: droprctl opens the spool as the workers would.

Only within `droprd.ctl.offline.as_daemon`. A crash leaves what a crash of the workers leaves, and
the next start mends it. Raises: OSError, DroprdError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.spool.again import again
from droprd.spool.bells import Waiting
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.handle import Spool
from droprd.spool.inboxfixing import InboxFixer
from droprd.spool.judging import Limits
from droprd.spool.layout import Layout, read_version
from droprd.spool.outbox import OutboxStore
from droprd.spool.receiver import ReceiverStore
from droprd.spool.retention import DeadLetters


class Offline:
    """The workers' work for the moment of one command."""

    def __init__(self, layout: Layout, urandom: Callable[[int], bytes]) -> None:
        fs = OsFs()
        facts = read_version(fs, layout.root)
        self._spool = Spool(fs, SystemClock(), urandom, layout, facts.spool_id)
        self._dead = DeadLetters(self._spool)

    def __enter__(self) -> Offline:
        return self

    def __exit__(self, *_: object) -> None:
        self._dead.close()

    def fix(self, verb: str, selection: Selection, dry: bool) -> Fixed:
        """Do it all; what was done."""
        total = Fixed()
        if selection.box != "inbox":
            total.add(self._outbox(verb, selection, dry).as_map())
        if selection.box != "outbox":
            total.add(self._inbox(verb, selection, dry).as_map())
            if verb == "requeue" and selection.wants("dead", "inbox"):
                total.add(self._again(selection, dry).as_map())
        return total

    def _outbox(self, verb: str, selection: Selection, dry: bool) -> Fixed:
        store = OutboxStore.open(self._spool, idle_s=0)
        try:
            fixer = store.fixer()
            done = _last((fixer.purge if verb == "purge" else fixer.requeue)(selection, dry=dry))
            if not dry:
                store.merge_all()
                store.tend()
            return done
        finally:
            store.close()

    def _inbox(self, verb: str, selection: Selection, dry: bool) -> Fixed:
        waiting = Waiting(self._spool.fs, self._spool.layout)
        try:
            fixer = InboxFixer(self._spool, self._dead, lambda channel: waiting.ring([channel]))
            return _last((fixer.purge if verb == "purge" else fixer.requeue)(selection, dry=dry))
        finally:
            waiting.close()

    def _again(self, selection: Selection, dry: bool) -> Fixed:
        store = ReceiverStore(self._spool, Limits())
        fixed = Fixed()
        try:
            for fixed in again(self._spool, store, selection, dry=dry):
                store.commit()
                if fixed.taken:
                    self._dead.take(fixed.taken)
            self._dead.tidy()
        finally:
            store.close()
        return fixed


def _last(steps: Iterator[Fixed]) -> Fixed:
    # Each step is the same value, added up.
    return list(steps)[-1]
