"""Courier: all that goes to one peer. Joins its flow and schedule (core) with its transports (net).

Owns the requests under way to one peer and the timer for the next try. It knows nothing of what it
carries: a `Cargo` makes up the `Job`s, and is told how each ended. So whatever happens to one peer
stays with its courier, and no peer waits for another.

- `wake` when lanes got something, `pump` when anything changed: as many requests start as the flow
  allows. There is no polling in between; the timer is set for the end of the wait, if there is one.
- A peer whose wait is over and that has nothing waiting is greeted: the greeting is the probe, and
  tells the peer that this node is back.
- An answer that blames what was sent is not held against the peer (`core.judgement`): the lanes of
  that request go one by one, and one that is blamed alone waits alone.

A crash loses nothing: what was not answered is sent again, and the receiver's head decides.
Raises nothing; what the store raises ends the worker.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from droprd import logs
from droprd.core import ask
from droprd.core.judgement import BLAMED_IN_A_ROW_MAX, Judgement
from droprd.core.peerflow import Line, PeerFlow, Ticket
from droprd.core.push import VERSION
from droprd.core.schedule import Batch, Schedule
from droprd.errors import BadData
from droprd.model import MIB, PRIORITY_MAX, Clock, Lane
from droprd.net.transport import Piece
from droprd.settings.values import PeerSettings
from droprd.workers.asking import Asking, Failure

CLOCKS_APART_NS = 300 * 10**9
LANES_SHOWN_MAX = 20
REFUSED_LATELY_S = 300.0

log = logging.getLogger("droprd.sender")


@dataclass(frozen=True, slots=True)
class Node:
    """Who is sending."""

    name: str
    spool_id: bytes
    clock: Clock


class Job(Protocol):
    """One request: what it says and carries, and what becomes of it. Exactly one call ends it."""

    method: str
    path: str
    pieces: Sequence[Piece]
    lanes: Sequence[Lane]
    size: int
    frames: int
    careful: bool

    def answered(self, status: int, body: bytes) -> None:
        """The peer answered. All lanes have landed when this returns. Raises: BadData, before."""
        ...

    def failed(self) -> None:
        """It came to nothing: all lanes land as they were."""
        ...

    def blamed(self, why: str) -> None:
        """The peer finds fault with it: lanes go alone, a lane that was alone waits."""
        ...


class Cargo(Protocol):
    """Makes up requests to one peer."""

    def load(self, batch: Batch) -> Job | None:
        """Fill a request. None if none of the lanes had anything after all."""
        ...


class Courier:
    """Carries what there is for one peer."""

    def __init__(
        self,
        node: Node,
        peer: str,
        cargo: Callable[[Courier], Cargo],
        progress: Callable[[], None],
        local_socket: str = "",
    ) -> None:
        """`progress` is called whenever a request got somewhere; `cargo` makes the peer's cargo."""
        self.peer = peer
        self.schedule = Schedule()
        self.delivered = 0
        self.faults: dict[Lane, str] = {}
        self.clock_apart_ns: int | None = None
        self.hello_at = float("-inf")
        self._node = node
        self._loop = asyncio.get_running_loop()
        self._progress = progress
        self._local_socket = local_socket
        self._settings: PeerSettings | None = None
        self._rng = random.SystemRandom().random
        self._asking = Asking(peer, PeerSettings(), ())
        self.flow = PeerFlow(self._rng, self._loop.time())
        self._cargo = cargo(self)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._blamed = 0
        self._token: str | None = None
        self._leaving = False
        self._waiting_since: float | None = None
        self._refused_at = float("-inf")
        self._greeted = False

    # What is known of the peer from outside.

    def configure(self, settings: PeerSettings | None) -> None:
        """Take the peer's settings; None: it is not configured (any more)."""
        self._settings = settings
        settings = settings or PeerSettings()
        addresses = settings.addresses
        if self.peer == self._node.name and self._local_socket:
            addresses = (f"unix:{self._local_socket}",)
        old = self.flow
        self.flow = PeerFlow(
            self._rng,
            self._loop.time(),
            addresses=len(addresses),
            requests_max=settings.requests_in_flight_max,
        )
        self.flow.paused, self.flow.draining = old.paused, old.draining
        self.flow.configured = bool(addresses)
        self._blamed = 0
        self._greeted = False
        self._spawn(self._asking.retire())
        self._asking = Asking(self.peer, settings, addresses)

    def reconfigure(self, settings: PeerSettings | None) -> None:
        """Take new settings if they are new; the token may have changed in any case."""
        if settings == self._settings:
            self._asking.forget_token()
            if self.flow.failures:
                self.retry()
        else:
            self.configure(settings)

    def stand(
        self, *, paused: bool, draining: bool, pauses: Sequence[tuple[str, int | None]]
    ) -> None:
        """What operators asked for: the peer as a whole, and single channels and priorities."""
        resumed = self.flow.paused and not paused
        self.flow.paused, self.flow.draining = paused, draining
        self.schedule.pause(pauses)
        if resumed:
            self.retry()
        else:
            self.pump()

    def heard(self) -> None:
        """The peer itself called."""
        self.flow.heard(self._loop.time())
        self.pump()

    def retry(self) -> None:
        """Try now, whatever was waited for; greet if there is nothing else to say."""
        self.flow.retry(self._loop.time())
        self.schedule.retry()
        self._greeted = False
        self.pump()

    def greet(self) -> None:
        """Say hello once more when that is possible: clocks are to be compared."""
        self._greeted = False
        self.pump()

    # The work.

    def pump(self) -> None:
        """Start whatever may start now, and set the timer for what may start later."""
        if self._leaving:
            return
        now = self._loop.time()
        flow, schedule = self.flow, self.schedule
        schedule.due(now)
        while (urgency := schedule.urgency()) is not None:
            budget = flow.budget(now, urgency, schedule.ready)
            if budget is None:
                break
            batch = schedule.open(budget.bytes, urgent=budget.urgent)
            job = None if batch is None else self._cargo.load(batch)
            if batch is not None and job is not None:
                ticket = flow.start(now, batch.priority, job.size)
                self._spawn(self._carry(flow, self._asking, ticket, job))
        if not self._greeted or (flow.line is Line.THROTTLED and not schedule.ready):
            self._greet(now)
        if not schedule.ready and not schedule.under_way:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        self._set_timer(now)

    def _greet(self, now: float) -> None:
        if self.flow.budget(now, PRIORITY_MAX, 0) is not None:
            self._greeted = True
            ticket = self.flow.start(now)
            self._spawn(self._say_hello(self.flow, self._asking, ticket))

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.schedule.next_due_s()
        wait_s = self.flow.next_try_s(now)
        if wait_s is not None:
            due = now + wait_s if due is None else min(due, now + wait_s)
        if due is not None and not self.flow.stopped:
            # Never at once: what is due now and could not start waits for something else.
            self._timer = self._loop.call_at(max(due, now + 0.001), self.pump)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The store could not go on: nor can this worker. Recovery decides after a new start.
            self._loop.call_exception_handler({"message": "courier failed", "exception": error})
            return
        self.pump()

    # One request.

    async def _carry(self, flow: PeerFlow, asking: Asking, ticket: Ticket, job: Job) -> None:
        try:
            reply = await asking.ask(
                ticket.address,
                job.method,
                job.path,
                job.pieces,
                careful=job.careful or self._lately_refused(job.size),
                lanes=len(job.lanes),
            )
        except asyncio.CancelledError:
            flow.cancelled(ticket)
            job.failed()
            raise
        now = self._loop.time()
        if isinstance(reply, Failure):
            if reply.judgement is Judgement.WAIT:
                self._refused_at = now
            if reply.blames(job.frames):
                self._blame(flow, ticket, job, reply.text, now)
            else:
                reply.tell(flow, ticket, now)
                job.failed()
            return
        try:
            job.answered(reply.status, reply.body)
        except BadData as error:
            flow.failed(ticket, now, f"an answer that makes no sense: {error}", broken=False)
            job.failed()
            return
        self._blamed = 0
        flow.accepted(ticket, now)
        self._progress()

    def _lately_refused(self, size: int) -> bool:
        """Whether a 503 or 507 is likely, and better seen before a large body is sent."""
        return size > MIB and self._loop.time() - self._refused_at < REFUSED_LATELY_S

    def _blame(self, flow: PeerFlow, ticket: Ticket, job: Job, why: str, now: float) -> None:
        self._blamed += 1
        job.blamed(why)
        logs.event(
            log, logging.WARNING, "request refused", peer=self.peer, lanes=len(job.lanes), why=why
        )
        if self._blamed > BLAMED_IN_A_ROW_MAX:
            flow.failed(ticket, now, why, broken=False)
        else:
            flow.accepted(ticket, now)
            flow.last_error = why

    async def _say_hello(self, flow: PeerFlow, asking: Asking, ticket: Ticket) -> None:
        node = self._node
        hello = ask.Hello(node.name, VERSION, node.clock.wall_ns(), node.spool_id)
        try:
            body = ask.encode_hello(hello)
            reply = await asking.ask(ticket.address, "POST", "/v1/hello", [body])
        except asyncio.CancelledError:
            flow.cancelled(ticket)
            raise
        now = self._loop.time()
        if isinstance(reply, Failure):
            reply.tell(flow, ticket, now)
            return
        try:
            answer = ask.decode_hello(reply.body)
        except BadData as error:
            flow.failed(ticket, now, f"an answer that makes no sense: {error}", broken=False)
            return
        apart = answer.wall_ns - node.clock.wall_ns()
        self.clock_apart_ns = apart
        self.hello_at = now
        if abs(apart) > CLOCKS_APART_NS:
            logs.event(log, logging.WARNING, "clocks differ", peer=self.peer, seconds=apart / 1e9)
        if answer.node != self.peer:
            logs.event(
                log, logging.INFO, "peer calls itself otherwise", peer=self.peer, itself=answer.node
            )
        flow.accepted(ticket, now)
        self._progress()

    # The end, and what is shown.

    @property
    def busy(self) -> bool:
        """Whether requests are under way."""
        return bool(self._tasks)

    async def aclose(self, grace_s: float) -> None:
        """Start nothing more, give what is under way `grace_s` seconds, break off the rest."""
        self._leaving = True
        if self._timer is not None:
            self._timer.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        await self._asking.retire()

    def _silence_s(self, now: float) -> int | None:
        """For how long the peer has taken nothing although something waits, in seconds."""
        if self._waiting_since is None:
            return None
        return round(now - max(self._waiting_since, self.flow.last_accepted_s or 0.0))

    def gauges(self) -> dict[str, Any]:
        """How it goes with this peer, for `status` and `why`."""
        now = self._loop.time()
        flow = self.flow
        next_try_s = flow.next_try_s(now)
        shown: dict[str, Any] = {
            "state": flow.state,
            "last_error": flow.last_error or None,
            "next_try_s": None if next_try_s is None else round(next_try_s, 1),
            "since_s": round(now - flow.since_s),
            "attempt": flow.failures,
            "delivered": self.delivered,
            "requests": flow.in_flight,
            "rate": None if flow.rate is None else round(flow.rate),
            "accepted_age_s": self._silence_s(now),
        }
        if self._asking.addresses:
            shown["address"] = self._asking.addresses[flow.address]
        if self.clock_apart_ns is not None:
            shown["clock_apart_s"] = round(self.clock_apart_ns / 1e9)
        if self.faults:
            shown["lanes"] = {
                f"{lane.channel}/{lane.priority}": why
                for lane, why in list(self.faults.items())[:LANES_SHOWN_MAX]
            }
        return shown
