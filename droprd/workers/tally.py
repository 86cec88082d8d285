"""Tally: what waits in the outbox, per peer, for `status` and `why`.

All of it comes from the store's state in memory, but for the age of the oldest message of a lane:
that is in the lane's file. It is looked up when the lane's front has moved, for a few lanes at a
time, the longest unseen first; so the cost stays the same with a thousand lanes. A lane whose front
has just moved has no age until it is looked up: it is being delivered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from droprd.core.outstate import LaneState, Pos
from droprd.model import Clock, Lane
from droprd.spool.outbox import OutboxStore

LOOKUPS_MAX = 20


@dataclass(slots=True)
class _Front:
    cursor: Pos
    wall_ns: int | None


class Tally:
    """Counts what waits."""

    def __init__(self, store: OutboxStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._fronts: dict[Lane, _Front] = {}

    def peers(self) -> dict[str, dict[str, Any]]:
        """Per peer: queued, bytes, oldest_age_s, delivered, dead, held (a reason, if any is)."""
        peers: dict[str, dict[str, Any]] = {}
        moved: list[LaneState] = []
        wall_ns = self._clock.wall_ns()
        for lane, state in self._store.state.lanes.items():
            shown = peers.get(lane.peer)
            if shown is None:
                shown = peers[lane.peer] = {
                    "queued": 0,
                    "bytes": 0,
                    "oldest_age_s": None,
                    "delivered": 0,
                    "dead": 0,
                }
            shown["delivered"] += state.ended.delivered
            shown["dead"] += state.ended.dead
            if state.hold is not None:
                shown["held"] = f"{lane.channel}/{lane.priority}: {state.hold}"
            if state.is_idle:
                self._fronts.pop(lane, None)
                continue
            shown["queued"] += state.queued
            shown["bytes"] += state.queued_bytes
            front = self._fronts.get(lane)
            if front is None or front.cursor != state.cursor:
                moved.append(state)
            elif front.wall_ns is not None:
                age_s = round(max(0, wall_ns - front.wall_ns) / 1e9, 1)
                shown["oldest_age_s"] = max(age_s, shown["oldest_age_s"] or 0.0)
        self._look_up(moved)
        return peers

    def _look_up(self, moved: list[LaneState]) -> None:
        # Lanes never seen come first; a lane just looked up goes to the end.
        order = {lane: place for place, lane in enumerate(self._fronts)}
        moved.sort(key=lambda state: order.get(state.lane, -1))
        for state in moved[:LOOKUPS_MAX]:
            self._fronts.pop(state.lane, None)
            self._fronts[state.lane] = _Front(state.cursor, self._store.oldest_wall_ns(state.lane))

    @property
    def queued_bytes(self) -> int:
        """Bytes of all bodies that wait in lanes."""
        return sum(state.queued_bytes for state in self._store.state.lanes.values())
