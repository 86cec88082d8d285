"""`droprd-supervisor-listener`: an event listener for supervisord that keeps the daemon useful.

supervisord restarts a daemon that ends. It does not see one that runs and does nothing. On each
TICK event this listener asks the daemon's control socket for its health and restarts the program
through supervisor's XML-RPC, when that can help and only then:

- it did not answer, or its sender merged nothing though messages wait, at so many looks in a row;
- supervisord says it is RUNNING (nobody stopped it on purpose), and has been for a while;
- no pause and no drain is in force: an operator is at work, hands off;
- and at most so often an hour: what three restarts did not mend, a fourth does not either.

A dead peer, a full disk, dead letters: no restart helps, so none is made. All decisions are
`Judge`'s, a pure state machine; the rest asks and obeys. Standard output belongs to supervisor's
protocol; this program says what it does on standard error.

    [eventlistener:droprd-health]
    command=droprd-supervisor-listener --program droprd --config /etc/droprd/droprd.toml
    events=TICK_60
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO
from xmlrpc.client import Fault

from supervisor import childutils
from supervisor.states import ProcessStates
from supervisor.xmlrpc import Faults

from droprd import logs
from droprd.core.health import RESTART_HELPS
from droprd.errors import DroprdError
from droprd.net.control import Control
from droprd.settings.published import Published, find_node
from droprd.spool.layout import Layout

log = logging.getLogger("droprd.monitor")

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the daemon found."""

    answers: bool
    critical: frozenset[str] = frozenset()
    hands_off: bool = False


@dataclass(slots=True)
class Judge:
    """Whether to restart. `strikes_max` bad looks in a row; `per_hour` restarts an hour."""

    strikes_max: int
    per_hour: int
    strikes: int = 0
    restarts: deque[float] = field(default_factory=deque)

    def restart(self, look: Look, now: float) -> str:
        """Why to restart now, or "" if not. `now` in seconds of a monotonic clock."""
        why = ""
        if not look.answers:
            why = "it does not answer"
        elif look.critical & RESTART_HELPS:
            why = ", ".join(sorted(look.critical & RESTART_HELPS))
        if not why or look.hands_off:
            self.strikes = 0
            return ""
        self.strikes += 1
        while self.restarts and now - self.restarts[0] >= HOUR_S:
            self.restarts.popleft()
        if self.strikes < self.strikes_max or len(self.restarts) >= self.per_hour:
            return ""
        self.strikes = 0
        self.restarts.append(now)
        return why


def look_at(config: str | None, timeout_s: float) -> Look:
    """Ask the daemon. Pauses and drains of one that does not answer are read from its spool."""
    node = find_node(config)
    try:
        with Control(node.socket, timeout_s, "droprd-supervisor-listener") as control:
            status, health = control.call("status"), control.call("health")
    except DroprdError:
        public = None
        with contextlib.suppress(DroprdError, OSError):
            public = Published(Layout(node.spool).public).get()
        hands_off = public is not None and bool(public.paused or public.draining)
        return Look(answers=False, hands_off=hands_off)
    critical = {r["code"] for r in health["reasons"] if r["level"] == "critical"}
    return Look(
        answers=True,
        critical=frozenset(critical),
        hands_off=bool(status.get("paused") or status.get("draining")),
    )


class Listener:
    """Answers supervisord's events, one after another."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        environment: MutableMapping[str, str],
        stdin: TextIO,
        stdout: TextIO,
    ) -> None:
        self._arguments = arguments
        self._stdin = stdin
        self._stdout = stdout
        self._supervisor = childutils.getRPCInterface(environment).supervisor
        self._judge = Judge(arguments.strikes, arguments.per_hour)

    def run(self) -> None:
        """Until supervisord closes the pipe."""
        while True:
            try:
                headers, _ = childutils.listener.wait(self._stdin, self._stdout)
            except (KeyError, ValueError):
                return  # end of file: no header line came
            if headers.get("eventname", "").startswith("TICK"):
                self.tick()
            childutils.listener.ok(self._stdout)

    def tick(self) -> None:
        """One look, and what follows from it."""
        program = self._arguments.program
        try:
            about: Mapping[str, Any] = self._supervisor.getProcessInfo(program)
            up_s = about["now"] - about["start"]
            if about["state"] != ProcessStates.RUNNING or up_s < self._arguments.young:
                self._judge.strikes = 0
                return
            look = look_at(self._arguments.config, self._arguments.timeout)
            why = self._judge.restart(look, time.monotonic())
            if why:
                self._restart(program, why)
            elif self._judge.strikes:
                logs.event(
                    log,
                    logging.WARNING,
                    "daemon is not well",
                    program=program,
                    looks=self._judge.strikes,
                    restarts=len(self._judge.restarts),
                )
        except (Fault, OSError, DroprdError) as error:
            logs.event(log, logging.ERROR, "look failed", program=program, why=str(error))

    def _restart(self, program: str, why: str) -> None:
        logs.event(log, logging.WARNING, "daemon restarted", program=program, why=why)
        try:
            self._supervisor.stopProcess(program)
        except Fault as fault:
            if fault.faultCode != Faults.NOT_RUNNING:
                raise
        self._supervisor.startProcess(program)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="droprd-supervisor-listener",
        description="supervisord's event listener that restarts a daemon which does no work",
    )
    parser.add_argument("--program", default="droprd", help="name of the program in supervisord")
    parser.add_argument("--config", metavar="FILE", help="configuration of the node")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds to wait for an answer")
    parser.add_argument("--strikes", type=int, default=3, help="bad looks before a restart")
    parser.add_argument("--per-hour", type=int, default=3, help="restarts an hour at most")
    parser.add_argument(
        "--young", type=float, default=60.0, help="seconds after its start it is left alone"
    )
    given = parser.parse_args(arguments)
    logs.set_up("supervisor-listener")
    if "SUPERVISOR_SERVER_URL" not in os.environ:
        print(
            "droprd-supervisor-listener is started by supervisord as an [eventlistener:…]",
            file=sys.stderr,
        )
        return 2
    Listener(given, os.environ, sys.stdin, sys.stdout).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
