"""ClockWatch: after a jump of the wall clock, whom to believe.

While the wall clock has parted from the boot-time clock by more than five minutes, the store
expires and deletes nothing by age. This lifts that hold once two peers' greetings, made after the
jump was seen, agree with the new wall clock; an operator may lift it too. Greetings are exchanged
at once when the jump is seen. Comparing two nodes' clocks serves this and warnings, nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Protocol

from droprd import logs
from droprd.spool.outbox import OutboxStore
from droprd.workers.courier import CLOCKS_APART_NS

PEERS_WANTED = 2
PROBLEM = (
    "the wall clock has jumped: nothing is expired or deleted by age until two peers agree with "
    "it; if it is right now: droprctl restart sender"
)

log = logging.getLogger("droprd.sender")


class Greeter(Protocol):
    """What is looked at of a courier: when it was last greeted, and what that said."""

    @property
    def peer(self) -> str: ...
    @property
    def hello_at(self) -> float: ...
    @property
    def clock_apart_ns(self) -> int | None: ...
    def greet(self) -> None: ...


class ClockWatch:
    """Watches the wall clock of one node; `own_name` is not asked."""

    def __init__(self, store: OutboxStore, own_name: str) -> None:
        self._store = store
        self._own_name = own_name
        self._parted_at: float | None = None

    @property
    def problem(self) -> str | None:
        """What to tell people; None if nothing is wrong."""
        return None if self._parted_at is None else PROBLEM

    def look(self, now_s: float, couriers: Collection[Greeter]) -> None:
        """Look at the clock; greet when it has just jumped, accept it when two peers agree."""
        if not self._store.clock_parted:
            self._parted_at = None
            return
        if self._parted_at is None:
            self._parted_at = now_s
            logs.event(log, logging.ERROR, PROBLEM)
            for courier in couriers:
                courier.greet()
            return
        parted_at = self._parted_at
        agreeing = [
            courier.peer
            for courier in couriers
            if courier.peer != self._own_name
            and courier.hello_at > parted_at
            and courier.clock_apart_ns is not None
            and abs(courier.clock_apart_ns) <= CLOCKS_APART_NS
        ]
        if len(agreeing) >= PEERS_WANTED:
            self._store.accept_clock()
            self._parted_at = None
            logs.event(log, logging.WARNING, "wall clock accepted", peers=",".join(agreeing))
