"""When a worker is started, stopped, aborted, killed: a table with every cell filled.

    STOPPED   not wanted, or about to be started        no process
    STARTING  a process that has not said `ready` yet   a process
    RUNNING   a process that does its work              a process
    BACKOFF   it died; the next start waits             no process
    STOPPING  asked, aborted or killed; not gone yet    a process
    FATAL     exit 78: waits for another configuration  no process

Policy only: `step` takes a state and an event and gives the next state and what is to be done. The
angel's process.py does it. Never more than one process: SPAWN is an action of states that have
none, and STOPPING is left only by an end that was seen. A process that is stuck in the kernel
therefore stays STOPPING, is reported and never doubled.

A worker that is killed while it runs is replaced at once. One that fails by itself, or does not
get as far as `ready`, waits: `backoff_s` doubles with each failure in a row, up to a cap, without
an end, and is forgiven after a stable minute. One that hung has waited long enough.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

STABLE_S: Final = 60.0
BACKOFF_FIRST_S: Final = 0.5
# Between SIGABRT, on which faulthandler writes the stacks, and SIGKILL.
ABORT_GRACE_S: Final = 5.0


class State(enum.StrEnum):
    """What a worker is at."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    FATAL = "fatal"


class Event(enum.Enum):
    """What can happen to a worker."""

    START = "it is wanted, or wanted now: a start, a command, another configuration"
    STOP = "it is wanted no more"
    RECYCLE = "it shall be replaced: too much memory, new sockets, a command"
    READY = "it said that it does its work"
    EXITED = "its process ended by itself, with any code but 78, or by a fault of its own"
    KILLED = "its process was ended by SIGKILL from outside"
    EXITED_CONFIG = "its process ended with code 78: it cannot use the configuration"
    SPAWN_FAILED = "no process could be made"
    HUNG = "no heartbeat for hang_timeout_s"
    GRACE_OVER = "the time to leave after ASK or ABORT is over"
    DELAY_OVER = "the backoff is over"
    STABLE = "it has been running for a stable minute"


class Action(enum.Enum):
    """What the angel has to do, in order."""

    SPAWN = "start a process"
    ASK = "ask it to stop; GRACE_OVER follows after the stop timeout"
    ABORT = "SIGABRT; GRACE_OVER follows after ABORT_GRACE_S"
    KILL = "SIGKILL"
    DELAY = "count a failure; DELAY_OVER follows after backoff_s(failures)"
    FORGIVE = "forget the failures"
    AGAIN = "START if it is still wanted"


Cell = tuple[State, tuple[Action, ...]]

_S = State
_E = Event
_A = Action

TABLE: Final[Mapping[State, Mapping[Event, Cell]]] = {
    _S.STOPPED: {
        _E.START: (_S.STARTING, (_A.SPAWN,)),
        _E.STOP: (_S.STOPPED, ()),
        _E.RECYCLE: (_S.STOPPED, ()),
        _E.READY: (_S.STOPPED, ()),
        _E.EXITED: (_S.STOPPED, ()),
        _E.KILLED: (_S.STOPPED, ()),
        _E.EXITED_CONFIG: (_S.STOPPED, ()),
        _E.SPAWN_FAILED: (_S.STOPPED, ()),
        _E.HUNG: (_S.STOPPED, ()),
        _E.GRACE_OVER: (_S.STOPPED, ()),
        _E.DELAY_OVER: (_S.STOPPED, ()),
        _E.STABLE: (_S.STOPPED, ()),
    },
    _S.STARTING: {
        _E.START: (_S.STARTING, ()),
        _E.STOP: (_S.STOPPING, (_A.ASK,)),
        _E.RECYCLE: (_S.STOPPING, (_A.ASK,)),
        _E.READY: (_S.RUNNING, ()),
        _E.EXITED: (_S.BACKOFF, (_A.DELAY,)),
        _E.KILLED: (_S.BACKOFF, (_A.DELAY,)),
        _E.EXITED_CONFIG: (_S.FATAL, ()),
        _E.SPAWN_FAILED: (_S.BACKOFF, (_A.DELAY,)),
        _E.HUNG: (_S.STOPPING, (_A.ABORT,)),
        _E.GRACE_OVER: (_S.STARTING, ()),
        _E.DELAY_OVER: (_S.STARTING, ()),
        _E.STABLE: (_S.STARTING, ()),
    },
    _S.RUNNING: {
        _E.START: (_S.RUNNING, ()),
        _E.STOP: (_S.STOPPING, (_A.ASK,)),
        _E.RECYCLE: (_S.STOPPING, (_A.ASK,)),
        _E.READY: (_S.RUNNING, ()),
        _E.EXITED: (_S.BACKOFF, (_A.DELAY,)),
        _E.KILLED: (_S.STARTING, (_A.SPAWN,)),
        _E.EXITED_CONFIG: (_S.FATAL, ()),
        _E.SPAWN_FAILED: (_S.RUNNING, ()),
        _E.HUNG: (_S.STOPPING, (_A.ABORT,)),
        _E.GRACE_OVER: (_S.RUNNING, ()),
        _E.DELAY_OVER: (_S.RUNNING, ()),
        _E.STABLE: (_S.RUNNING, (_A.FORGIVE,)),
    },
    _S.BACKOFF: {
        _E.START: (_S.STARTING, (_A.SPAWN,)),
        _E.STOP: (_S.STOPPED, ()),
        _E.RECYCLE: (_S.STARTING, (_A.SPAWN,)),
        _E.READY: (_S.BACKOFF, ()),
        _E.EXITED: (_S.BACKOFF, ()),
        _E.KILLED: (_S.BACKOFF, ()),
        _E.EXITED_CONFIG: (_S.BACKOFF, ()),
        _E.SPAWN_FAILED: (_S.BACKOFF, ()),
        _E.HUNG: (_S.BACKOFF, ()),
        _E.GRACE_OVER: (_S.BACKOFF, ()),
        _E.DELAY_OVER: (_S.STARTING, (_A.SPAWN,)),
        _E.STABLE: (_S.BACKOFF, ()),
    },
    _S.STOPPING: {
        _E.START: (_S.STOPPING, ()),
        _E.STOP: (_S.STOPPING, ()),
        _E.RECYCLE: (_S.STOPPING, ()),
        _E.READY: (_S.STOPPING, ()),
        _E.EXITED: (_S.STOPPED, (_A.AGAIN,)),
        _E.KILLED: (_S.STOPPED, (_A.AGAIN,)),
        _E.EXITED_CONFIG: (_S.FATAL, ()),
        _E.SPAWN_FAILED: (_S.STOPPING, ()),
        _E.HUNG: (_S.STOPPING, ()),
        _E.GRACE_OVER: (_S.STOPPING, (_A.KILL,)),
        _E.DELAY_OVER: (_S.STOPPING, ()),
        _E.STABLE: (_S.STOPPING, ()),
    },
    _S.FATAL: {
        _E.START: (_S.STARTING, (_A.SPAWN,)),
        _E.STOP: (_S.STOPPED, ()),
        _E.RECYCLE: (_S.STARTING, (_A.SPAWN,)),
        _E.READY: (_S.FATAL, ()),
        _E.EXITED: (_S.FATAL, ()),
        _E.KILLED: (_S.FATAL, ()),
        _E.EXITED_CONFIG: (_S.FATAL, ()),
        _E.SPAWN_FAILED: (_S.FATAL, ()),
        _E.HUNG: (_S.FATAL, ()),
        _E.GRACE_OVER: (_S.FATAL, ()),
        _E.DELAY_OVER: (_S.FATAL, ()),
        _E.STABLE: (_S.FATAL, ()),
    },
}

ALIVE: Final = frozenset({State.STARTING, State.RUNNING, State.STOPPING})


def step(state: State, event: Event) -> Cell:
    """The next state, and what is to be done to get there."""
    return TABLE[state][event]


def backoff_s(failures: int, maximum_s: float) -> float:
    """How long the next start waits after so many failures in a row (1 or more), in seconds."""
    doublings = min(max(failures, 1) - 1, 32)
    return float(min(BACKOFF_FIRST_S * 2**doublings, maximum_s))


def event_of_end(code: int) -> Event:
    """Which event the end of a process is. `code` as in subprocess: -9 is death by SIGKILL."""
    if code == 78:
        return Event.EXITED_CONFIG
    return Event.KILLED if code == -9 else Event.EXITED
