"""The sender: journals become lanes, lanes reach their peers. Joins the outbox store with couriers.

Owns everything below `outbox/` but the producers' journals, and one courier per peer. One thread,
one event loop, no executor: a round of merging is short, and what waits for the disk here would
wait for it anyway.

From ring to wire there is no timer: the bell wakes the loop, the round merges and commits, the
couriers of the touched lanes start their requests. While rings keep coming, rounds keep a distance
of twice their own duration, so that many sends share one. A ring can be lost: the sender also looks
by itself, at first soon, then less and less often, at last once a second.

Receipts are committed by the next round, or a tenth of a second later if there is none: until then
a crash only makes the receiver say once more what it has.

A crash leaves what sender.log says; the next start mends and goes on. Any error of the disk ends
this process at once, without another write: recovery decides, in a new one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from droprd.core import rpc
from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.errors import DroprdError
from droprd.model import Lane
from droprd.spool import bells
from droprd.spool.handle import Spool
from droprd.spool.hearsay import read_bell
from droprd.spool.layout import Layout
from droprd.spool.outbox import OutboxStore
from droprd.spool.room import reserve_bytes
from droprd.workers import worker
from droprd.workers.cargo import LaneCargo, Mode
from droprd.workers.clockwatch import ClockWatch
from droprd.workers.courier import Courier, Node
from droprd.workers.jobs import Jobs
from droprd.workers.statelog import PeerStates
from droprd.workers.tally import Tally
from droprd.workers.worker import Context

COMMIT_WITHIN_S = 0.1
ROUND_DISTANCE_MAX_S = 0.02
LOOK_FIRST_S = 0.05
LOOK_MAX_S = 1.0
TICK_S = 1.0
TEND_S = 2.0
LEAVE_GRACE_S = 5.0
RESET_WITHIN_S = 100.0
FULL_UNTIL = 0.95

log = logging.getLogger("droprd.sender")


class Sender:
    """The worker `sender`."""

    def __init__(self, context: Context) -> None:
        """Open the outbox, mending what a crash left. Raises: OSError, DroprdError."""
        self._context = context
        self._loop = asyncio.get_running_loop()
        settings = context.settings
        layout = Layout(settings.node.spool)
        spool_id = bytes(context.facts["spool_id"])
        spool = Spool(context.fs, context.clock, context.urandom, layout, spool_id)
        self._outbox_settings = settings.outbox
        self._bell = bells.listen(layout.bell)
        self._store = OutboxStore.open(
            spool,
            segment_bytes_max=settings.outbox.segment_bytes_max,
            retain_s=settings.outbox.sent_retain_s,
        )
        self._jobs = Jobs(self._fix, context.beat, self._after_fix)
        self._tally = Tally(self._store, context.clock)
        self._node = Node(settings.node.name, spool_id, context.clock)
        self._root = layout.root
        self._couriers: dict[str, Courier] = {}
        self._cargos: dict[str, LaneCargo] = {}
        self._failure: BaseException | None = None
        self._next_round_at = 0.0
        self._round_timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._commit_timer: asyncio.TimerHandle | None = None
        self._look_s = LOOK_FIRST_S
        self._round_at = self._loop.time()
        self._tended_at = self._loop.time()
        self._unmerged_bytes = 0
        self._peer_states = PeerStates()
        self._full = ""
        self._leaving = False
        self._clock_watch = ClockWatch(self._store, self._node.name)

    # Life.

    async def run(self) -> None:
        """Work until told to stop. Raises whatever the disk raised."""
        context = self._context
        self._loop.set_exception_handler(self._failed)
        for name in context.settings.peers:
            self._courier(name)
        self._stand()
        self._wake_all()
        for command, handler in (
            ("pause", self._wishes),
            ("resume", self._wishes),
            ("drain", self._wishes),
            ("retry", self._retry),
            ("peer_reset", self._peer_reset),
            ("accept_clock", self._accept_clock),
            ("fix", self._jobs.fix),
            ("reload", self._reload),
        ):
            context.on(command, handler)
        self._loop.add_reader(self._bell, self._rung)
        self._round()
        for courier in self._couriers.values():
            courier.pump()
        context.ready()
        ticking = self._loop.create_task(self._tick())
        ticking.add_done_callback(self._tick_ended)
        try:
            await context.stopping.wait()
        finally:
            ticking.cancel()
            await self._leave()
        if self._failure is not None:
            raise self._failure

    def _failed(self, loop: asyncio.AbstractEventLoop, what: dict[str, Any]) -> None:
        """Something raised where nobody waits for it: this process must not go on."""
        error = what.get("exception")
        if error is None:
            loop.default_exception_handler(what)
            return
        if self._failure is None:
            self._failure = error
        self._context.stopping.set()

    def _tick_ended(self, ticking: asyncio.Task[None]) -> None:
        if not ticking.cancelled():
            self._failed(self._loop, {"exception": ticking.exception()})

    async def _leave(self) -> None:
        self._leaving = True
        self._loop.remove_reader(self._bell)
        for timer in (self._round_timer, self._look_timer, self._commit_timer):
            if timer is not None:
                timer.cancel()
        grace_s = min(LEAVE_GRACE_S, self._context.settings.daemon.stop_timeout_s / 3)
        if self._failure is not None:
            grace_s = 0.0
        await asyncio.gather(*(one.aclose(grace_s) for one in self._couriers.values()))
        # After a failure the disk is not touched again: what was not committed never happened.
        self._store.close(commit=self._failure is None)
        self._context.fs.close(self._bell)

    # Couriers.

    def _courier(self, peer: str) -> Courier:
        courier = self._couriers.get(peer)
        if courier is None:
            local = self._context.facts.get("local_socket", "")

            def cargo(made: Courier) -> LaneCargo:
                context = self._context
                self._cargos[peer] = LaneCargo(
                    context.fs,
                    self._store,
                    made,
                    self._commit_soon,
                    self._wake_all,
                    self._loop.time,
                )
                return self._cargos[peer]

            courier = Courier(self._node, peer, cargo, self._context.beat, local)
            self._couriers[peer] = courier
            courier.configure(self._context.settings.peers.get(peer))
            self._stand_one(courier)
        return courier

    def _stand(self) -> None:
        for courier in self._couriers.values():
            self._stand_one(courier)

    def _stand_one(self, courier: Courier) -> None:
        facts = self._context.facts
        targets = set(facts.get("paused", ()))
        draining = set(facts.get("draining", ()))
        courier.stand(
            paused=bool({"", courier.peer} & targets),
            draining=bool({"", courier.peer} & draining),
            pauses=_below(courier.peer, targets),
        )

    def _wake_all(self) -> None:
        """Have every lane with something to send known to its courier."""
        for state in list(self._store.waiting_lanes()):
            self._courier(state.lane.peer).schedule.wake(state.lane)

    # Rounds.

    def _rung(self) -> None:
        rang, heard = read_bell(self._bell)
        for peer in heard:
            if peer in self._couriers:
                self._couriers[peer].heard()
        if rang:
            self._round_soon()

    def _round_soon(self) -> None:
        if self._round_timer is not None:
            return
        now = self._loop.time()
        if now >= self._next_round_at:
            self._round()
        else:
            self._round_timer = self._loop.call_at(self._next_round_at, self._round)

    def _round(self) -> None:
        if self._round_timer is not None:
            self._round_timer.cancel()
            self._round_timer = None
        began = self._loop.time()
        result = self._store.merge_round()
        now = self._round_at = self._loop.time()
        self._unmerged_bytes = result.unmerged_bytes
        self._next_round_at = now
        if result.lanes:
            self._next_round_at = now + min(2 * (now - began), ROUND_DISTANCE_MAX_S)
            self._look_s = LOOK_FIRST_S
            if self._commit_timer is not None:  # the merge's commit took the receipts along
                self._commit_timer.cancel()
                self._commit_timer = None
            touched = set()
            for lane in result.lanes:
                courier = self._courier(lane.peer)
                courier.schedule.wake(lane)
                touched.add(courier)
            for courier in touched:
                courier.pump()
            self._context.beat()
        if result.more:
            self._round_timer = self._loop.call_at(self._next_round_at, self._round)
        if self._look_timer is not None:
            self._look_timer.cancel()
        self._look_timer = self._loop.call_later(self._look_s, self._look)

    def _look(self) -> None:
        """Nobody rang for a while: look whether a ring was lost."""
        self._look_timer = None
        self._look_s = min(2 * self._look_s, LOOK_MAX_S)
        self._round()

    def _commit_soon(self) -> None:
        if self._commit_timer is None and not self._leaving:
            self._commit_timer = self._loop.call_later(COMMIT_WITHIN_S, self._commit)

    def _commit(self) -> None:
        self._commit_timer = None
        self._store.commit()

    # Now and then.

    async def _tick(self) -> None:
        while True:
            self._context.beat()
            now = self._loop.time()
            self._look_at_room()
            if now - self._tended_at >= TEND_S:
                self._store.tend(space_wanted=bool(self._full) or self._is_tight())
                self._tended_at = self._loop.time()
            self._clock_watch.look(now, self._couriers.values())
            gauges = self._gauges(now)
            self._context.gauges(gauges)
            self._peer_states.look(
                {
                    name: (one["state"], one["last_error"] or "")
                    for name, one in gauges["peers"].items()
                }
            )
            await asyncio.sleep(TICK_S)

    def _look_at_room(self) -> None:
        """Whether the quota is reached; sent messages that are kept then yield."""
        quota = self._context.settings.outbox.quota_bytes
        used = self._tally.queued_bytes + self._unmerged_bytes
        limit = quota * FULL_UNTIL if self._full else quota
        full = quota > 0 and used >= limit
        self._full = f"{used} bytes wait, outbox.quota_bytes is {quota}" if full else ""

    def _is_tight(self) -> bool:
        """Whether the disk comes near its reserve: sent messages that are kept then yield."""
        free, total = self._context.fs.free_bytes(self._root)
        return free < 2 * reserve_bytes(total)

    def _gauges(self, now: float) -> dict[str, Any]:
        waiting = self._tally.peers()
        peers: dict[str, Any] = {}
        for name, courier in self._couriers.items():
            counts = waiting.get(name, {})
            if name in self._context.settings.peers or counts.get("queued"):
                peers[name] = {**courier.gauges(), **counts}
        problem = self._clock_watch.problem
        return {
            "peers": peers,
            "dead": sum(one["dead"] for one in waiting.values()),
            "unmerged_bytes": self._unmerged_bytes,
            "lanes_bytes": self._tally.queued_bytes,  # applications hold it against their quota
            "last_merge_age_s": round(now - self._round_at, 1),
            "full": self._full,
            "corrupt": self._store.corrupt_bytes,
            "problems": [] if problem is None else [problem],
        }

    # Commands.

    async def _wishes(self, params: rpc.Params) -> Any:
        self._stand()
        self._context.gauges(self._gauges(self._loop.time()))
        return {}

    async def _retry(self, params: rpc.Params) -> Any:
        wanted = params.get("peer") or None
        for name, courier in self._couriers.items():
            if wanted in (None, name):
                for lane in self._store.held_by_reset(name):
                    # The receiver may have been put right again.
                    self._cargos[name].match(lane)
                courier.retry()
        return {}

    async def _peer_reset(self, params: rpc.Params) -> Any:
        peer = str(params["peer"])
        mode: Mode = "replay" if params.get("mode") == "replay" else "continue"
        lanes = self._store.held_by_reset(peer)
        courier, cargo = self._courier(peer), self._cargos[peer]
        report: list[str] = []
        waiting = [self._reset_lane(cargo, lane, mode, report) for lane in lanes]
        courier.retry()
        if waiting:
            await asyncio.wait(waiting, timeout=RESET_WITHIN_S)
        left = sum(not one.done() for one in waiting)
        if left:
            report.append(f"{left} lanes wait until {peer} answers: see droprctl why {peer}")
        return {"lanes": len(lanes), "report": report}

    def _reset_lane(
        self, cargo: LaneCargo, lane: Lane, mode: Mode, report: list[str]
    ) -> asyncio.Future[None]:
        done = self._loop.create_future()

        def told(text: str) -> None:
            report.append(text)
            if not done.done():
                done.set_result(None)

        cargo.match(lane, mode, told)
        return done

    def _fix(self, verb: str, selection: Selection, dry: bool) -> Iterator[Fixed]:
        fixer = self._store.fixer()
        return (fixer.purge if verb == "purge" else fixer.requeue)(selection, dry=dry)

    async def _after_fix(self) -> None:
        self._round_soon()  # what was requeued lies in a journal

    async def _accept_clock(self, params: rpc.Params) -> Any:
        self._store.accept_clock()
        return {}

    async def _reload(self, params: rpc.Params) -> Any:
        settings = self._context.settings
        outbox = settings.outbox
        if (outbox.sent_retain_s, outbox.segment_bytes_max) != (
            self._outbox_settings.sent_retain_s,
            self._outbox_settings.segment_bytes_max,
        ):
            raise DroprdError("other settings of the outbox need a fresh sender")
        for name in settings.peers:
            self._courier(name)
        for name, courier in self._couriers.items():
            courier.reconfigure(settings.peers.get(name))
        return {}


def _below(peer: str, targets: Iterable[str]) -> list[tuple[str, int | None]]:
    """(channel, priority or None) of the targets below a peer."""
    result: list[tuple[str, int | None]] = []
    for target in targets:
        parts = target.split("/")
        if len(parts) > 1 and parts[0] == peer:
            result.append((parts[1], int(parts[2]) if len(parts) > 2 else None))
    return result


async def serve(context: Context) -> None:
    """Be the sender until told to stop."""
    await Sender(context).run()


if __name__ == "__main__":
    worker.run("sender", serve)
