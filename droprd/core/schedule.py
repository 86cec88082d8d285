"""Schedule: which lanes of one peer go into its next request.

- Priority first: 0 is most urgent.
- Within a priority, round robin: a lane that was served goes to the end. A lane that was empty
  until now is *live*, one that had more than was taken is *backlog*; they are served in turn, so
  that live traffic does not stand behind a long backlog, and the backlog keeps half beside it.
- Across priorities, every `SHARE_EVERY`-th request begins with the lane that has waited longest,
  whatever its priority: a stream of urgent messages slows the backlog down but never stops it.
- One request of a lane is under way at a time.
- A lane can be *held* (by the operator's pause, or because it waits for one) or *delayed* (its own
  refusal, its own backoff). That is its own affair: nobody else waits.

A lane is known here only while it has something to send, is under way, or is held or delayed.
Every operation costs the same with one lane and with a thousand, but for `pause`, which is rare.

How a request is made up:

    batch = schedule.open(budget.bytes, urgent=budget.urgent)       # None: nothing is ready
    while (offer := batch.next()) is not None:
        push = store.next_push(offer.lane, offer.bytes_max)
        batch.took(bytes)                    # 0: the lane had nothing after all
    …                                        # the lanes in batch.lanes are under way
    schedule.landed(lane, more=…)            # once for each of them

Pure: `now_s` is an argument. Raises KeyError only for a lane landed that was not under way.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from droprd.core.backoff import Backoff, Rng
from droprd.model import PRIORITY_MAX, Lane

SHARE_EVERY = 4
LANES_IN_REQUEST_MAX = 64

_Queue = dict[Lane, int]
"""Lanes in the order in which they are served (a dict keeps it), each with its turn number."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A lane's turn: it may take `bytes_max` bytes, or one frame if that is more."""

    lane: Lane
    bytes_max: int


@dataclass(slots=True)
class _Apart:
    """What is out of the ordinary about a lane."""

    alone: bool = False
    held: set[str] = field(default_factory=set)
    until_s: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)

    def ordinary(self) -> bool:
        return not self.alone and not self.held and not self.until_s and not self.backoff.failures


class Schedule:
    """The lanes of one peer that have something to send."""

    def __init__(self) -> None:
        self._live: list[_Queue] = [{} for _ in range(PRIORITY_MAX + 1)]
        self._backlog: list[_Queue] = [{} for _ in range(PRIORITY_MAX + 1)]
        self._live_next = [True] * (PRIORITY_MAX + 1)
        self._ready = 0
        self._turn = 0
        self._requests = 0
        self._under_way: dict[Lane, bool] = {}
        self._waiting: set[Lane] = set()
        self._apart: dict[Lane, _Apart] = {}
        self._due: list[tuple[float, Lane]] = []
        self._pauses: frozenset[tuple[str, int | None]] = frozenset()

    # What is ready.

    @property
    def ready(self) -> int:
        """How many lanes could be sent from now."""
        return self._ready

    @property
    def under_way(self) -> int:
        """How many lanes are in a request now."""
        return len(self._under_way)

    def urgency(self) -> int | None:
        """The most urgent priority that is ready; None if nothing is."""
        for priority in range(PRIORITY_MAX + 1):
            if self._live[priority] or self._backlog[priority]:
                return priority
        return None

    def next_due_s(self) -> float | None:
        """When the first delayed lane may be tried again (monotonic seconds); None if none is."""
        while self._due:
            until_s, lane = self._due[0]
            apart = self._apart.get(lane)
            if apart is not None and apart.until_s == until_s:
                return until_s
            heapq.heappop(self._due)
        return None

    def reasons(self, lane: Lane) -> frozenset[str]:
        """Why the lane is held; empty if it is not."""
        apart = self._apart.get(lane)
        reasons = set(apart.held) if apart is not None else set()
        if self._is_paused(lane):
            reasons.add("paused")
        return frozenset(reasons)

    # Lanes come and go.

    def wake(self, lane: Lane) -> None:
        """The lane has something to send. To say it twice changes nothing."""
        if lane in self._under_way:
            self._under_way[lane] = True
        elif not self._is_ready(lane):
            if self._is_blocked(lane):
                self._waiting.add(lane)
            else:
                self._enter(self._live, lane)

    def landed(self, lane: Lane, *, more: bool) -> None:
        """The lane's request has ended, however it did; `more`: it has something left to send."""
        woken = self._under_way.pop(lane)
        if not more and not woken:
            return
        if self._is_blocked(lane):
            self._waiting.add(lane)
        else:
            self._enter(self._backlog if more else self._live, lane)

    def forget(self, lane: Lane) -> None:
        """The lane has nothing to send any more (purged, or its peer removed)."""
        self._leave(lane)
        self._waiting.discard(lane)
        self._apart.pop(lane, None)

    def send_alone(self, lane: Lane, alone: bool) -> None:
        """Whether the lane's next requests carry nothing else: an upload, or a suspect."""
        self._set_apart(lane).alone = alone
        self._tidy(lane)

    # Held and delayed lanes.

    def hold(self, lane: Lane, reason: str) -> None:
        """Keep the lane back until `release` names the same reason."""
        self._set_apart(lane).held.add(reason)
        self._reconsider(lane)

    def release(self, lane: Lane, reason: str) -> None:
        """Lift a hold; the lane goes on if nothing else keeps it back."""
        apart = self._apart.get(lane)
        if apart is not None:
            apart.held.discard(reason)
            self._reconsider(lane)

    def delay(self, lane: Lane, until_s: float) -> None:
        """Keep the lane back until a moment (monotonic seconds)."""
        self._set_apart(lane).until_s = until_s
        heapq.heappush(self._due, (until_s, lane))
        self._reconsider(lane)

    def refused(self, lane: Lane, now_s: float, rng: Rng) -> float:
        """The lane alone was refused for now: delay it by its own backoff. Returns until when."""
        apart = self._set_apart(lane)
        apart.backoff = apart.backoff.failed()
        until_s = now_s + apart.backoff.wait_s(rng)
        self.delay(lane, until_s)
        return until_s

    def accepted(self, lane: Lane) -> None:
        """Something of the lane was accepted: its own backoff starts over."""
        apart = self._apart.get(lane)
        if apart is not None:
            apart.backoff = apart.backoff.succeeded()
            apart.alone = False
            self._tidy(lane)

    def due(self, now_s: float) -> None:
        """Let go the lanes whose delay is over."""
        while self._due and self._due[0][0] <= now_s:
            until_s, lane = heapq.heappop(self._due)
            apart = self._apart.get(lane)
            if apart is not None and apart.until_s == until_s:
                apart.until_s = 0.0
                self._reconsider(lane)

    def retry(self) -> None:
        """End all delays: an operator wants a try now."""
        for lane, apart in list(self._apart.items()):
            apart.until_s = 0.0
            apart.backoff = apart.backoff.succeeded()
            self._reconsider(lane)
        self._due.clear()

    def pause(self, targets: Iterable[tuple[str, int | None]]) -> None:
        """Keep back exactly these (channel, priority or None for all of the channel)."""
        self._pauses = frozenset(targets)
        for queues in (self._live, self._backlog):
            for queue in queues:
                for lane in list(queue):
                    self._reconsider(lane)
        for lane in list(self._waiting):
            self._reconsider(lane)

    # Making up a request.

    def open(self, budget: int, *, urgent: bool = False) -> Batch | None:
        """Begin a request of about `budget` bytes; None if nothing is ready.

        `urgent`: of the most urgent priority only.
        """
        if not self._ready:
            return None
        if urgent:
            return Batch(self, budget, only=self.urgency())
        self._requests += 1
        shared = self._requests % SHARE_EVERY == 0
        return Batch(self, budget, first=self._longest_waiting() if shared else None)

    def take(self, priorities: Iterable[int], *, joining: bool) -> Lane | None:
        """For `Batch`: the next lane of the first of `priorities` that has one, now under way.

        `joining`: others are in the request already, so lanes that travel alone stay out.
        """
        for priority in priorities:
            live, backlog = self._live[priority], self._backlog[priority]
            if not live and not backlog:
                continue
            from_live = bool(live) and (self._live_next[priority] or not backlog)
            queue = live if from_live else backlog
            lane = next(iter(queue))
            if joining and self.travels_alone(lane):
                return None
            self._live_next[priority] = not from_live
            del queue[lane]
            self._ready -= 1
            self._under_way[lane] = False
            return lane
        return None

    def travels_alone(self, lane: Lane) -> bool:
        """Whether the lane shares its requests with no other."""
        apart = self._apart.get(lane)
        return apart is not None and apart.alone

    def _longest_waiting(self) -> int:
        turns = [
            (next(iter(queue.values())), priority)
            for queues in (self._live, self._backlog)
            for priority, queue in enumerate(queues)
            if queue
        ]
        return min(turns)[1]

    # The queues.

    def _enter(self, queues: list[_Queue], lane: Lane) -> None:
        self._turn += 1
        queues[lane.priority][lane] = self._turn
        self._ready += 1

    def _leave(self, lane: Lane) -> bool:
        for queues in (self._live, self._backlog):
            if queues[lane.priority].pop(lane, None) is not None:
                self._ready -= 1
                return True
        return False

    def _is_ready(self, lane: Lane) -> bool:
        return lane in self._live[lane.priority] or lane in self._backlog[lane.priority]

    def _is_paused(self, lane: Lane) -> bool:
        if not self._pauses:
            return False
        return bool({(lane.channel, None), (lane.channel, lane.priority)} & self._pauses)

    def _is_blocked(self, lane: Lane) -> bool:
        apart = self._apart.get(lane)
        if apart is not None and (apart.held or apart.until_s):
            return True
        return self._is_paused(lane)

    def _reconsider(self, lane: Lane) -> None:
        if self._is_blocked(lane):
            if self._leave(lane):
                self._waiting.add(lane)
        elif lane in self._waiting:
            self._waiting.discard(lane)
            self._enter(self._backlog, lane)
        self._tidy(lane)

    def _set_apart(self, lane: Lane) -> _Apart:
        return self._apart.setdefault(lane, _Apart())

    def _tidy(self, lane: Lane) -> None:
        apart = self._apart.get(lane)
        if apart is not None and apart.ordinary():
            del self._apart[lane]


class Batch:
    """One request being made up. `lanes` are those that take part; they are under way."""

    def __init__(
        self,
        schedule: Schedule,
        budget: int,
        *,
        first: int | None = None,
        only: int | None = None,
    ) -> None:
        self.lanes: list[Lane] = []
        self.priority = PRIORITY_MAX
        self._schedule = schedule
        self._left = budget
        every = range(PRIORITY_MAX + 1)
        self._priorities: Sequence[int] = every if only is None else (only,)
        self._begin: Sequence[int] = self._priorities if first is None else (first,)
        self._offered: Lane | None = None
        # A few lanes get a request each; many share one, so that none waits for many requests.
        ready = schedule.ready
        self._quantum = budget if ready <= SHARE_EVERY else max(1, budget // min(ready, 16))
        self._closed = False

    def next(self) -> Offer | None:
        """The next lane and what it may take; None when the request is made up."""
        if self._offered is not None:
            raise RuntimeError("took() was not called for the last offer")
        if self._closed or len(self.lanes) >= LANES_IN_REQUEST_MAX:
            return None
        if self.lanes and self._left <= 0:
            return None
        lane = self._schedule.take(self._begin, joining=bool(self.lanes))
        self._begin = self._priorities
        if lane is None:
            return None
        self._offered = lane
        alone = self._schedule.travels_alone(lane)
        self._closed = alone
        return Offer(lane, max(1, self._left if alone else min(self._left, self._quantum)))

    def took(self, size: int) -> None:
        """The lane last offered put `size` bytes into the request; 0: it had nothing after all."""
        lane = self._offered
        if lane is None:
            raise RuntimeError("took() without an offer")
        self._offered = None
        if size == 0:
            self._closed = False
            self._schedule.landed(lane, more=False)
            return
        self._left -= size
        self.lanes.append(lane)
        self.priority = min(self.priority, lane.priority)
