"""What can be asked on the control socket, and what each call does.

    hello                                   who answers, and whether the caller may change things
    status  why {peer}  health  list_peers  what is so
    pause {target, receiving, for_s, reason}  resume {target}  drain {target}
    retry {peer}  peer_reset {peer, mode}   passed on to the sender
    accept_clock                            passed on to all workers: believe the wall clock again
    fix {worker, verb, selection, dry} or   requeue and purge: one job of a worker, a slice a call,
        {worker, verb, job}                 until `job` in the answer is nil
    reload  restart {worker}  stop          the daemon itself

A target is "", PEER, PEER/CHANNEL or PEER/CHANNEL/PRIORITY. What changes the node is on disk
before it is answered.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from droprd import logs
from droprd.angel.angel import Angel
from droprd.angel.control import Call, Method
from droprd.core import rpc
from droprd.core.filters import from_map
from droprd.core.status import SCHEMA, why_peer
from droprd.errors import DroprdError, InvalidName, UnknownPeer, UsageError
from droprd.model import check_name, check_priority
from droprd.spool.state import Pause, Wishes

RESET_DEADLINE_S = 120.0
RELOAD_DEADLINE_S = 40.0
FIX_DEADLINE_S = 30.0
# A drain answers once no send() that began before it is still under way.
GATE_WITHIN_S = 10.0
_GATE_LOOK_S = 0.02

log = logging.getLogger("droprd.angel")


def methods(angel: Angel) -> dict[str, Method]:
    """All calls, by name."""
    commands = _Commands(angel)
    return {
        "hello": Method(commands.hello, changes=False),
        "status": Method(commands.status, changes=False),
        "why": Method(commands.why, changes=False),
        "health": Method(commands.health, changes=False),
        "list_peers": Method(commands.list_peers, changes=False),
        "pause": Method(commands.pause),
        "resume": Method(commands.resume),
        "drain": Method(commands.drain, deadline_s=GATE_WITHIN_S + 5),
        "retry": Method(commands.retry),
        "peer_reset": Method(commands.peer_reset, deadline_s=RESET_DEADLINE_S),
        "accept_clock": Method(commands.accept_clock),
        "fix": Method(commands.fix, deadline_s=FIX_DEADLINE_S, logs=False),
        "reload": Method(commands.reload, deadline_s=RELOAD_DEADLINE_S),
        "restart": Method(commands.restart),
        "stop": Method(commands.stop),
    }


class _Commands:
    def __init__(self, angel: Angel) -> None:
        self._angel = angel

    # -- what is so ------------------------------------------------------------------------------

    def hello(self, call: Call) -> None:
        angel = self._angel
        call.answer(
            {
                "schema": SCHEMA,
                "node": angel.settings.node.name,
                "version": angel.version,
                "state": angel.state,
                "pid": os.getpid(),
                "may_change": call.caller.may_change,
            }
        )

    def status(self, call: Call) -> None:
        call.answer(self._angel.status())

    def why(self, call: Call) -> None:
        call.answer(why_peer(self._angel.status(), _text(call, "peer")))

    def health(self, call: Call) -> None:
        call.answer(self._angel.health().to_dict())

    def list_peers(self, call: Call) -> None:
        about = self._angel.status()["peers"]
        known = self._angel.settings.peers
        call.answer(
            {
                "schema": SCHEMA,
                "peers": {
                    name: {
                        "urls": list(known[name].addresses) if name in known else [],
                        "channels": list(known[name].channels) if name in known else [],
                        "state": one["state"],
                        "queued": one["queued"],
                    }
                    for name, one in about.items()
                },
            }
        )

    # -- pauses and drains -----------------------------------------------------------------------

    def pause(self, call: Call) -> None:
        target = self._target(call)
        for_s = call.params.get("for_s")
        if for_s is not None and (
            isinstance(for_s, bool) or not isinstance(for_s, (int, float)) or not 0 < for_s < 1e9
        ):
            raise UsageError(f"cannot pause for {for_s!r} s", why="for_s is a positive number")
        clock = self._angel.clock
        lasting_ns = None if for_s is None else round(for_s * 1e9)
        pause = Pause(
            who=call.caller.name,
            reason=str(call.params.get("reason") or "")[:500],
            receiving=call.params.get("receiving") is True,
            since_wall_ns=clock.wall_ns(),
            until_wall_ns=None if lasting_ns is None else clock.wall_ns() + lasting_ns,
            until_boot_ns=None if lasting_ns is None else clock.boot_ns() + lasting_ns,
            boot=clock.boot_id(),
        )
        self._change(
            call,
            "pause",
            target,
            lambda wishes: wishes.with_pause(target, pause),
            lambda: call.answer({"target": target, **pause.as_map()}),
        )

    def resume(self, call: Call) -> None:
        target = self._target(call)
        self._change(
            call,
            "resume",
            target,
            lambda wishes: wishes.resumed(target),
            lambda: call.answer({"target": target}),
        )

    def drain(self, call: Call) -> None:
        target, who = self._target(call), call.caller.name
        self._change(
            call,
            "drain",
            target,
            lambda wishes: wishes.with_drain(target, who),
            lambda: self._close_gate(lambda closed: call.answer({"target": target, "all": closed})),
        )

    def _change(
        self,
        call: Call,
        method: str,
        target: str,
        change: Callable[[Wishes], Wishes],
        then: Callable[[], None],
    ) -> None:
        """Change the wishes on disk, tell the workers of `method`, then `then`."""

        def written(error: DroprdError | None) -> None:
            if error is not None:
                call.fail(error)
            else:
                self._angel.tell_wishes(method, target, lambda _: then())

        self._angel.change_wishes(change, written)

    def _close_gate(self, done: Callable[[bool], None]) -> None:
        """Wait until every send() that has not seen the drain yet is over."""
        angel = self._angel
        try:
            gate = angel.fs.open(angel.layout.gate, os.O_RDWR)
        except OSError:
            done(False)
            return
        end = angel.loop.now() + GATE_WITHIN_S

        def look() -> None:
            closed = angel.fs.try_lock(gate)
            if closed or angel.loop.now() >= end:
                angel.fs.close(gate)
                done(closed)
            else:
                angel.loop.later(_GATE_LOOK_S, look)

        look()

    # -- passed on -------------------------------------------------------------------------------

    def retry(self, call: Call) -> None:
        peer = self._known_peer(call)
        self._sender(call, "retry", {"peer": peer}, 4.0)

    def peer_reset(self, call: Call) -> None:
        peer, mode = self._known_peer(call), call.params.get("mode")
        if mode not in ("replay", "continue"):
            raise UsageError(
                f"a peer cannot be reset by {mode!r}",
                why="the mode is replay or continue",
                hint=f"droprctl peer reset {peer} --replay, or --continue",
            )
        self._sender(call, "peer_reset", {"peer": peer, "mode": mode}, RESET_DEADLINE_S - 5)

    def accept_clock(self, call: Call) -> None:
        self._angel.tell("accept_clock", {}, lambda told: call.answer({"workers": sorted(told)}))

    def fix(self, call: Call) -> None:
        worker, verb = _text(call, "worker"), _text(call, "verb")
        if worker not in self._angel.workers or verb not in ("requeue", "purge"):
            raise UsageError(f"the {worker} cannot {verb}")
        selection = call.params.get("selection")
        what = "" if selection is None else from_map(selection).summary()
        params = {k: v for k, v in call.params.items() if k in ("verb", "selection", "dry", "job")}

        def answered(response: rpc.Response) -> None:
            done = response.result if response.error is None else {}
            audit(done, response.error)
            if not done.get("taken"):
                call.pass_on(response)
                return

            # Appended again by the receiver; the janitor notes that they are no dead letters now.
            def noted(note: rpc.Response) -> None:
                call.pass_on(response if note.error is None else note)

            taken = {"taken": done["taken"]}
            self._angel.workers["janitor"].call("take_letters", taken, FIX_DEADLINE_S / 3, noted)

        def audit(done: Mapping[str, Any], error: rpc.RpcError | None) -> None:
            is_first, is_last = selection is not None, error or done.get("job") is None
            if call.params.get("dry") or not (is_first or is_last):
                return
            logs.event(
                log,
                logging.INFO,
                verb,
                user=call.caller.name,
                worker=worker,
                what=what or None,
                messages=done.get("messages"),
                done="no" if error or done.get("job") is not None else "yes",
                why=None if error is None else error.what,
            )

        self._angel.workers[worker].call("fix", params, FIX_DEADLINE_S / 2, answered)

    def _sender(
        self, call: Call, method: str, params: Mapping[str, Any], deadline_s: float
    ) -> None:
        def answered(response: rpc.Response) -> None:
            call.pass_on(response)

        self._angel.workers["sender"].call(method, params, deadline_s, answered)

    # -- the daemon itself -----------------------------------------------------------------------

    def reload(self, call: Call) -> None:
        def done(result: dict[str, Any] | DroprdError) -> None:
            if isinstance(result, DroprdError):
                call.fail(result)
            else:
                call.answer(result)

        self._angel.reload(done)

    def restart(self, call: Call) -> None:
        name = call.params.get("worker")
        workers = self._angel.workers
        if name is not None and name not in workers:
            raise UsageError(
                f"there is no worker {name!r}", why=f"the workers are {', '.join(workers)}"
            )
        chosen = [name] if name is not None else list(workers)
        for one in chosen:
            workers[one].recycle(f"asked for by {call.caller.name}")
        call.answer({"restarted": chosen})

    def stop(self, call: Call) -> None:
        call.answer({"pid": os.getpid()})
        self._angel.loop.later(0, lambda: self._angel.stop(f"asked for by {call.caller.name}"))

    # -- arguments -------------------------------------------------------------------------------

    def _known_peer(self, call: Call) -> str:
        peer = check_name(_text(call, "peer"), "peer")
        if peer not in self._angel.settings.peers:
            known = ", ".join(self._angel.settings.peers)
            raise UnknownPeer(
                f"no peer {peer!r} is configured",
                why=f"configured are {known}" if known else "no peer is configured",
                hint="see `droprctl peer list`",
            )
        return peer

    def _target(self, call: Call) -> str:
        target = _text(call, "target", "")
        parts = target.split("/") if target else []
        with contextlib.suppress(InvalidName, UsageError, ValueError):
            for kind, part in zip(("peer", "channel"), parts, strict=False):
                check_name(part, kind)
            if len(parts) == 3 and parts[2].isdecimal() and len(parts[2]) == 1:
                check_priority(int(parts[2]))
            elif len(parts) > 2:
                raise UsageError("too many parts")
            return target
        raise UsageError(
            f"{target!r} is no target", why="a target is PEER[/CHANNEL[/PRIORITY]], or left out"
        )


def _text(call: Call, name: str, default: str | None = None) -> str:
    value = call.params.get(name, default)
    if not isinstance(value, str):
        raise UsageError(f"the call needs {name}", why=f"{name} is a text")
    return value
