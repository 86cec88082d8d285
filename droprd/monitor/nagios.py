"""`check_droprd`: a plugin for Nagios, Icinga, and whatever else runs Nagios plugins.

    check_droprd MODE [--config FILE | --socket PATH] [--peer P] [--channel C] [-w R] [-c R] [-t S]

    alive    the daemon answers, its workers run           perfdata: response, uptime
    queue    what waits for peers                          queued messages and bytes
    oldest   age of the oldest message for each peer       seconds
    peer     each peer takes what waits for it             seconds without, failed tries
    dead     dead letters                                  how many
    spool    disk, damage                                  bytes used, free, unmerged, corrupt
    inbox    applications take what has arrived            age of the oldest message per channel

The verdict is the daemon's own (core/health.py, thresholds in [health]), as far as it concerns the
mode; `-w` and `-c` put ranges on the mode's first value in the place of that threshold. Exit
status: 0 ok, 1 warning, 2 critical, which includes a daemon that cannot be asked; 3 unknown: bad
arguments, no such peer, no configuration, no right to ask.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import nagiosplugin

from droprd.core.status import duration
from droprd.errors import DroprdError, NotAnswering
from droprd.net.control import Control
from droprd.settings.published import find_node

UNKNOWN = 3
Map = Mapping[str, Any]
Value = tuple[str, Any, str, bool]  # name, value, unit, whether -w and -c apply


@dataclass(frozen=True, slots=True)
class Mode:
    """Which reasons of core/health.py concern a mode; `own` give way to ranges on its value."""

    codes: frozenset[str]
    own: frozenset[str] = frozenset()


MODES: Mapping[str, Mode] = {
    "alive": Mode(
        frozenset(
            {
                *("daemon_starting", "daemon_stopping", "daemon_stopped"),
                *("worker_stuck", "worker_hung", "worker_fatal", "worker_backoff"),
                *("worker_away", "worker_restarting", "problem"),
            }
        )
    ),
    "queue": Mode(frozenset({"outbox_full", "not_merging"})),
    "oldest": Mode(frozenset({"oldest_age"}), frozenset({"oldest_age"})),
    "peer": Mode(
        frozenset({"peer_silent", "peer_unreached", "lane_held", "peer_unconfigured"}),
        frozenset({"peer_silent", "peer_unreached"}),
    ),
    "dead": Mode(frozenset({"dead_letters"}), frozenset({"dead_letters"})),
    "spool": Mode(
        frozenset({"disk_space", "disk_fills", "corrupt", "lost", "outbox_full"}),
        frozenset({"disk_space"}),
    ),
    "inbox": Mode(
        frozenset({"inbox_full", "inbox_age", "receiver_paused"}), frozenset({"inbox_age"})
    ),
}
_OF_PEERS = frozenset({"oldest", "peer", "queue"})
_STATES = {
    "ok": nagiosplugin.Ok,
    "warning": nagiosplugin.Warn,
    "critical": nagiosplugin.Critical,
}


@dataclass(frozen=True, slots=True)
class Told:
    """What the daemon told, and how long it took."""

    status: Map
    health: Map
    response_s: float


class Node(nagiosplugin.Resource):  # type: ignore[misc]  # nagiosplugin has no types
    """What of a node a mode looks at."""

    def __init__(self, arguments: argparse.Namespace, told: Told | NotAnswering) -> None:
        self._mode: str = arguments.mode
        self._peer: str | None = arguments.peer
        self._channel: str | None = arguments.channel
        self._ranged = arguments.warning is not None or arguments.critical is not None
        self._told = told

    def probe(self) -> Iterator[nagiosplugin.Metric]:
        """Its values, and the daemon's reasons."""
        if isinstance(self._told, NotAnswering):
            text = f"{self._told.what}: {self._told.why}"
            yield nagiosplugin.Metric("daemon", ("critical", text), context="verdict")
            return
        values = self._values(self._told)
        for name, value, unit, is_ranged in values:
            if value is not None:
                context = "value" if is_ranged else "other"
                yield nagiosplugin.Metric(name, value, unit, context=context)
        yield from self._reasons(self._told)

    def _reasons(self, told: Told) -> Iterator[nagiosplugin.Metric]:
        mode = MODES[self._mode]
        wanted = self._peer if self._mode in _OF_PEERS else self._channel
        for reason in told.health["reasons"]:
            code, subject = reason["code"], reason["subject"]
            if code not in mode.codes or (self._ranged and code in mode.own):
                continue
            of_one = subject in told.status["peers"] or subject in told.status["channels"]
            if wanted and of_one and subject != wanted:
                continue
            yield nagiosplugin.Metric(code, (reason["level"], reason["text"]), context="verdict")

    def _values(self, told: Told) -> Iterable[Value]:
        look: Mapping[str, Callable[[Told], Iterable[Value]]] = {
            "alive": self._alive,
            "queue": self._queue,
            "oldest": self._oldest,
            "peer": self._silent,
            "dead": self._dead,
            "spool": self._spool,
            "inbox": self._inbox,
        }
        return look[self._mode](told)

    def _alive(self, told: Told) -> Iterable[Value]:
        yield "response", round(told.response_s, 3), "s", True
        yield "uptime", round(told.status["uptime_s"]), "s", False

    def _queue(self, told: Told) -> Iterable[Value]:
        peers = self._peers(told)
        yield "queued", sum(one["queued"] for one in peers.values()), "", True
        yield "queued_bytes", sum(one["bytes"] for one in peers.values()), "B", False
        yield "unmerged_bytes", told.status["unmerged_bytes"], "B", False

    def _oldest(self, told: Told) -> Iterable[Value]:
        yield "peers", len(self._peers(told)), "", False
        for name, one in self._peers(told).items():
            yield f"{name}_oldest", one.get("oldest_age_s") or 0, "s", True

    def _silent(self, told: Told) -> Iterable[Value]:
        yield "peers", len(self._peers(told)), "", False
        for name, one in self._peers(told).items():
            yield f"{name}_silence", one.get("accepted_age_s") or 0, "s", True
            yield f"{name}_failures", one.get("attempt") or 0, "", False

    def _dead(self, told: Told) -> Iterable[Value]:
        yield "dead_letters", told.status["dead_letters"], "", True

    def _spool(self, told: Told) -> Iterable[Value]:
        spool = told.status["spool"]
        yield "free", spool["free_bytes"], "B", True
        yield "used", spool["bytes"], "B", False
        yield "full_in", spool.get("full_in_s"), "s", False
        yield "corrupt", told.status["corrupt"], "B", False

    def _inbox(self, told: Told) -> Iterable[Value]:
        channels = told.status["channels"]
        yield "channels", len(channels), "", False
        for name in [self._channel] if self._channel else channels:
            one = channels.get(name, {})
            yield f"{name}_oldest", one.get("oldest_age_s") or 0, "s", True
            yield f"{name}_ready", one.get("ready", 0), "", False

    def _peers(self, told: Told) -> Map:
        peers: Map = told.status["peers"]
        return {self._peer: peers[self._peer]} if self._peer else peers


class Verdict(nagiosplugin.Context):  # type: ignore[misc]  # nagiosplugin has no types
    """The daemon's own judgement: (level, text)."""

    def evaluate(self, metric: Any, resource: Any) -> nagiosplugin.Result:
        """As the daemon says."""
        level, text = metric.value
        return self.result_cls(_STATES[level], text, metric)


class Summary(nagiosplugin.Summary):  # type: ignore[misc]  # nagiosplugin has no types
    """The first line: the worst, and how much more there is; the rest stands below it."""

    def ok(self, results: Any) -> str:
        """The worst value, short."""
        found = [r.metric for r in results if r.metric is not None and r.metric.context == "value"]
        if not found:
            return "nothing waits"
        worst = max(found, key=lambda metric: metric.value)
        shown = duration(worst.value) if worst.uom == "s" else f"{worst.value}{worst.uom or ''}"
        return f"{worst.name} {shown}"

    def problem(self, results: Any) -> str:
        """What is worst."""
        bad = [r for r in results if r.state != nagiosplugin.Ok]
        worst = [r for r in bad if r.state == results.most_significant_state]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return f"{_one_line(str(worst[0]))}{more}"

    def verbose(self, results: Any) -> list[str]:
        """All that is not well."""
        return [_one_line(str(r)) for r in results if r.state != nagiosplugin.Ok][1:]


def _one_line(text: str) -> str:
    # Texts of other nodes stand in it; a bar would begin perfdata.
    return " ".join("".join(c if c.isprintable() else " " for c in text).replace("|", "/").split())


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _unknown(f"{message}; see check_droprd --help")


def _unknown(text: str) -> NoReturn:
    print(f"DROPRD UNKNOWN - {_one_line(text)}")
    sys.exit(UNKNOWN)


def _range(text: str) -> nagiosplugin.Range:
    try:
        return nagiosplugin.Range(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range like 10, 10:, 5:20, @5:20"
        ) from None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 3600:
        raise argparse.ArgumentTypeError("a time-out is more than 0 and less than 3600 seconds")
    return seconds


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Arguments(prog="check_droprd", description="Nagios plugin: is a droprd node well?")
    parser.add_argument("mode", choices=list(MODES), help="what to look at")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", metavar="FILE", help="configuration of the node")
    where.add_argument("--socket", metavar="PATH", help="control socket of the node")
    parser.add_argument("--peer", help="queue, oldest, peer: only this one")
    parser.add_argument("--channel", help="inbox: only this one")
    parser.add_argument("-w", "--warning", type=_range, metavar="RANGE")
    parser.add_argument("-c", "--critical", type=_range, metavar="RANGE")
    parser.add_argument("-t", "--timeout", type=_seconds, default=10.0, metavar="SECONDS")
    parser.add_argument("-v", "--verbose", action="count", default=1, help="more lines")
    return parser.parse_args(arguments)


def _ask(given: argparse.Namespace) -> Told:
    """Raises: DroprdError."""
    path = given.socket or find_node(given.config).socket
    began = time.monotonic()
    with Control(path, given.timeout, "check_droprd") as control:
        status = control.call("status", timeout_s=_left(began, given.timeout))
        health = control.call("health", timeout_s=_left(began, given.timeout))
    return Told(status, health, time.monotonic() - began)


def _left(began: float, timeout_s: float) -> float:
    return max(0.1, timeout_s - (time.monotonic() - began))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point; exits with 0, 1, 2 or 3."""
    given = _parse(arguments)
    told: Told | NotAnswering
    try:
        told = _ask(given)
    except NotAnswering as error:
        told = error
    except DroprdError as error:
        _unknown(str(error))
    if isinstance(told, Told) and given.peer and given.peer not in told.status["peers"]:
        _unknown(f"no peer {given.peer!r} is configured and nothing waits for it")
    check = nagiosplugin.Check(
        Node(given, told),
        nagiosplugin.ScalarContext("value", given.warning, given.critical),
        nagiosplugin.ScalarContext("other"),
        Verdict("verdict"),
        Summary(),
        name=f"droprd {given.mode}",
    )
    check.main(verbose=given.verbose, timeout=0)
    raise AssertionError("nagiosplugin exits")


if __name__ == "__main__":
    main()
