"""Known-bad variants of droprd, each with one rule switched off. A simulation must notice each.

A harness that does not fail on these proves nothing by passing. `mutated(name)` applies one while
the context lasts; `sync:SITE` leaves out the syncs of one site instead (see `SimDisk`). Nothing
outside the simulations uses this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from droprd.core import chain
from droprd.core.merge import BootOrder
from droprd.core.push import Push
from droprd.model import Head
from droprd.spool import judging, merging
from droprd.spool.journalfile import JournalFile
from droprd.spool.log import LogWriter
from droprd.spool.merging import Merger
from droprd.spool.receiver import ReceiverStore
from droprd.spool.settling import Settler
from droprd.spool.staging import Pending

SYNC = "sync:"


def _published_before_sync() -> Any:
    def sync(self: LogWriter, site: str, prepare_bytes: int = 0) -> int:
        self.flush(prepare_bytes)
        if self.synced_end != self.end:
            self.publish(self.end)
            self.sync_data(site)
        return self.end

    return patch.object(LogWriter, "sync", sync)


def _answer_before_sync() -> Any:
    original = ReceiverStore.push

    def push(self: ReceiverStore, peer: str, push: Push, parts: Sequence[memoryview]) -> Pending:
        pending = original(self, peer, push, parts)
        pending.waits = False
        return pending

    return patch.object(ReceiverStore, "push", push)


def _journal_deleted_before_its_lanes_are_synced() -> Any:
    original = Merger.retire

    def retire(self: Merger) -> int:
        with patch.object(Merger, "sync_lanes", lambda self: None):
            return original(self)

    return patch.object(Merger, "retire", retire)


def _merge_order_not_kept() -> Any:
    def in_order(
        sources: Sequence[Iterator[Any]], boots: BootOrder, before_ns: int, bytes_max: int
    ) -> Iterator[Any]:
        taken = 0
        for index, source in enumerate(sources):
            for stamped, item in source:
                if taken >= bytes_max:
                    return
                if stamped.boot_id == boots.own and stamped.boot_ns >= before_ns:
                    break
                taken += stamped.bytes
                yield index, item

    return patch.object(merging, "in_order", in_order)


def _journals_read_before_the_clock() -> Any:
    original = Merger.round
    look = Merger._look

    def round_(self: Merger, bytes_max: int = merging.ROUND_BYTES) -> merging.MergeResult:
        look(self, self._spool.clock.boot_ns())
        with patch.object(Merger, "_look", lambda self, now_ns: None):
            return original(self, bytes_max)

    return patch.object(Merger, "round", round_)


def _boots_in_the_order_in_which_they_are_met() -> Any:
    return patch.object(BootOrder, "learn", lambda self, journals: None)


def _high_water_number_instead_of_chain() -> Any:
    def extend(head: Head, frame_id: bytes, count: int) -> Head:
        return Head(head.number + count, bytes(16))

    return patch.object(chain, "extend", extend)


def _chain_check_off() -> Any:
    class _Same(Head):
        """Equal to every head."""

        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = Head.__hash__

    original = judging.Judge.judge

    def judge(self: judging.Judge, peer: str, push: Push, *rest: Any) -> Any:
        for lane in push.lanes:
            object.__setattr__(lane, "head", _Same(*lane.head))
        return original(self, peer, push, *rest)

    return patch.object(judging.Judge, "judge", judge)


def _rebase_without_comparing_ids() -> Any:
    original = Settler._rebase

    def rebase(self: Settler, state: Any, head: Head, talk: Any) -> Any:
        talk.frames = []
        return original(self, state, head, talk)

    return patch.object(Settler, "_rebase", rebase)


def _rebase_without_merging_first() -> Any:
    original = Settler._rebase

    def rebase(self: Settler, state: Any, head: Head, talk: Any) -> Any:
        with patch.object(self, "_merge_all", lambda: None):
            return original(self, state, head, talk)

    return patch.object(Settler, "_rebase", rebase)


def _journals_adopted_without_their_lock() -> Any:
    return patch.object(JournalFile, "hold", lambda self: True)


MUTANTS: dict[str, Callable[[], Any]] = {
    f.__name__.lstrip("_"): f
    for f in (
        _published_before_sync,
        _answer_before_sync,
        _journal_deleted_before_its_lanes_are_synced,
        _merge_order_not_kept,
        _journals_read_before_the_clock,
        _boots_in_the_order_in_which_they_are_met,
        _high_water_number_instead_of_chain,
        _chain_check_off,
        _rebase_without_comparing_ids,
        _journals_adopted_without_their_lock,
    )
}


# These concern what two nodes say to each other; other simulations need not be asked.
PROTOCOL = {
    "answer_before_sync",
    "high_water_number_instead_of_chain",
    "chain_check_off",
    "rebase_without_comparing_ids",
    "rebase_without_merging_first",
}


@contextmanager
def mutated(name: str) -> Iterator[frozenset[str]]:
    """Switch one rule off (none if `name` is empty). Gives the sync sites to leave out."""
    with ExitStack() as stack:
        if name.startswith(SYNC):
            yield frozenset({name.removeprefix(SYNC)})
            return
        if name:
            stack.enter_context(MUTANTS[name]())
        yield frozenset()
