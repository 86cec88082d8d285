"""Is this node well? One judgement for droprctl, Nagios, Prometheus, systemd and supervisor.

`judge` reads a status document (core/status.py) and gives a verdict with its reasons. It looks at
progress — the age of the oldest message that waits, the time since a peer last took a byte — and
at what an operator has to know: workers that do not run or do nothing, dead letters, a disk that
fills up. That processes run proves nothing and is never a reason for `ok`.

What an operator asked for (pause, drain) is no fault; the messages behind it are not counted. Only
of paused receiving there is a warning, because it holds up other nodes, whose operators may not
know.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from droprd.core.status import duration
from droprd.core.thresholds import Thresholds
from droprd.model import MIB

Map = Mapping[str, Any]


class Level(enum.StrEnum):
    """How bad something is; ordered by `rank`."""

    OK = "ok"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        return ("ok", "warning", "critical").index(self.value)


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that is not well: stable code, what it concerns, a sentence, what to type."""

    level: Level
    code: str
    subject: str
    text: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """The worst level of all reasons, and the reasons, worst first."""

    verdict: Level
    reasons: tuple[Reason, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON and the control socket; schema 1."""
        return {
            "schema": 1,
            "verdict": self.verdict.value,
            "reasons": [
                {
                    "level": r.level.value,
                    "code": r.code,
                    "subject": r.subject,
                    "text": r.text,
                    "command": r.command,
                }
                for r in self.reasons
            ],
        }

    def summary(self) -> str:
        """One line for people: the verdict, and the worst reason."""
        if not self.reasons:
            return "ok"
        more = f" (and {len(self.reasons) - 1} more)" if len(self.reasons) > 1 else ""
        return f"{self.verdict.value}: {self.reasons[0].text}{more}"


DEFAULTS: Final = Thresholds()
# What a fresh process can mend. For all else, no restart helps.
RESTART_HELPS: Final = frozenset({"not_merging"})


def judge(status: Map, thresholds: Thresholds = DEFAULTS) -> Health:
    """The health of the node that `status` describes."""
    reasons = [
        *_daemon(status),
        *_workers(status, thresholds),
        *_peers(status, thresholds),
        *_channels(status, thresholds),
        *_merging(status, thresholds),
        *_room(status, thresholds),
        *_losses(status, thresholds),
    ]
    reasons.sort(key=lambda r: -r.level.rank)
    return Health(reasons[0].level if reasons else Level.OK, tuple(reasons))


def _daemon(status: Map) -> list[Reason]:
    state = status.get("state")
    if state == "running":
        return []
    level = Level.CRITICAL if state == "stopped" else Level.WARNING
    command = "systemctl start droprd" if state == "stopped" else ""
    return [Reason(level, f"daemon_{state}", "daemon", f"the daemon is {state}", command)]


def _workers(status: Map, limits: Thresholds) -> list[Reason]:
    result = []
    if status.get("state") in ("stopping", "stopped"):
        return []
    for name, about in status.get("workers", {}).items():
        found = _worker(name, about, status.get("state") == "running", limits)
        if found is not None:
            result.append(found)
    return result


def _worker(name: str, about: Map, shall_run: bool, limits: Thresholds) -> Reason | None:
    state = about.get("state")
    failures = about.get("failures", 0)
    often = bool(limits.failures_critical) and failures >= limits.failures_critical
    level = Level.CRITICAL if often else Level.WARNING
    see = "droprctl status"
    times = "once" if failures == 1 else f"{failures} times in a row"
    if about.get("stuck"):
        text = f"the {name} is stuck in the kernel (pid {about.get('pid')})"
        return Reason(Level.CRITICAL, "worker_stuck", name, text, see)
    if about.get("silent_s"):
        # It is killed and replaced at hang_timeout_s; at two thirds of that it is no hiccup.
        silent_s, killed_in_s = about["silent_s"], about.get("killed_in_s", 0)
        level = Level.CRITICAL if silent_s >= 2 * killed_in_s else Level.WARNING
        text = f"the {name} hangs: no progress for {duration(silent_s)}"
        return Reason(level, "worker_hung", name, text, see)
    if state == "fatal":
        text = f"the {name} cannot use the configuration"
        return Reason(Level.CRITICAL, "worker_fatal", name, text, "droprctl config check")
    if state == "backoff":
        text = f"the {name} failed {times} and waits for its next start"
        return Reason(level, "worker_backoff", name, text, see)
    if state in ("stopped", "stopping") and shall_run:
        return Reason(Level.WARNING, "worker_away", name, f"the {name} is {state}", see)
    if failures:
        text = f"the {name} failed {times} and has not yet run for a minute since"
        return Reason(level, "worker_restarting", name, text, see)
    return None


def _graded(value: Any, warning: float, critical: float, *, less: bool = False) -> Level:
    """The level of a value that is worse the more (or the `less`) it is; a limit of 0 is none."""
    if not isinstance(value, (int, float)):
        return Level.OK
    for limit, level in ((critical, Level.CRITICAL), (warning, Level.WARNING)):
        if limit and (value <= limit if less else value >= limit):
            return level
    return Level.OK


def _peers(status: Map, limits: Thresholds) -> list[Reason]:
    result = []
    for name, about in status.get("peers", {}).items():
        if about.get("state") in ("paused", "draining"):
            continue
        why = f"droprctl why {name}"
        if not about.get("queued"):
            # Nothing is late yet; but the next message will be.
            since_s = about.get("since_s")
            level = _graded(since_s, limits.silence_warning_s, 0)
            if about.get("state") in ("throttled", "probing") and level is not Level.OK:
                text = f"{name} has not been reached for {duration(since_s or 0)}"
                result.append(Reason(level, "peer_unreached", name, text, why))
            continue
        age = about.get("oldest_age_s")
        level = _graded(age, limits.oldest_age_warning_s, limits.oldest_age_critical_s)
        if level is not Level.OK:
            text = f"the oldest message for {name} waits for {duration(age)}"
            result.append(Reason(level, "oldest_age", name, text, why))
        silence = about.get("accepted_age_s")
        level = _graded(silence, limits.silence_warning_s, limits.silence_critical_s)
        if level is not Level.OK:
            text = f"{name} has taken no byte for {duration(silence)}"
            result.append(Reason(level, "peer_silent", name, text, why))
        if about.get("held"):
            text = f"a lane to {name} is held: {about['held']}"
            result.append(Reason(Level.CRITICAL, "lane_held", name, text, why))
        if about.get("state") == "unconfigured":
            text = f"{about['queued']} messages wait for {name}, which is not configured"
            result.append(Reason(Level.WARNING, "peer_unconfigured", name, text, why))
    return result


def _channels(status: Map, limits: Thresholds) -> list[Reason]:
    result = []
    for name, about in status.get("channels", {}).items():
        age_s = about.get("oldest_age_s")
        level = _graded(age_s, limits.inbox_age_warning_s, limits.inbox_age_critical_s)
        if level is not Level.OK:
            text = f"the oldest message of channel {name} waits for {duration(age_s)} to be taken"
            result.append(Reason(level, "inbox_age", name, text, "droprctl status"))
    paused = [one for one in status.get("paused", {}).values() if one.get("receiving")]
    if paused:
        reason = f" ({paused[0]['reason']})" if paused[0].get("reason") else ""
        text = f"receiving was paused by {paused[0].get('who') or 'somebody'}{reason}"
        result.append(Reason(Level.WARNING, "receiver_paused", "receiver", text, "droprctl resume"))
    return result


def _merging(status: Map, limits: Thresholds) -> list[Reason]:
    if not status.get("unmerged_bytes"):
        return []
    age = status.get("last_merge_age_s")
    level = _graded(age, limits.merge_age_warning_s, limits.merge_age_critical_s)
    if level is Level.OK or age is None:
        return []
    text = f"messages wait in journals, and the sender has merged nothing for {duration(age)}"
    return [Reason(level, "not_merging", "sender", text, "droprctl status")]


def _room(status: Map, limits: Thresholds) -> list[Reason]:
    result = []
    if status.get("outbox_full"):
        text = "the outbox is full: send() is refused"
        result.append(Reason(Level.CRITICAL, "outbox_full", "outbox", text, "droprctl status"))
    if status.get("receiver", {}).get("full"):
        text = "the inbox is full: peers are told to wait"
        result.append(Reason(Level.CRITICAL, "inbox_full", "inbox", text, "droprctl status"))
    spool = status.get("spool", {})
    # 0 is also what is shown before the janitor has looked.
    free = spool.get("free_bytes") or None
    level = _graded(free, limits.free_bytes_warning, limits.free_bytes_critical, less=True)
    if free and level is not Level.OK:
        text = f"{free // MIB} MiB are free on the disk of the spool"
        result.append(Reason(level, "disk_space", "spool", text, "df -h"))
    full_in_s = spool.get("full_in_s")
    level = _graded(full_in_s, limits.full_in_warning_s, limits.full_in_critical_s, less=True)
    if level is not Level.OK:
        text = f"at the present rate the disk of the spool is full in {duration(full_in_s)}"
        result.append(Reason(level, "disk_fills", "spool", text, "df -h"))
    return result


def _losses(status: Map, limits: Thresholds) -> list[Reason]:
    result = []
    if status.get("corrupt"):
        text = f"{status['corrupt']} promised bytes could not be read and lie below corrupt/"
        result.append(Reason(Level.CRITICAL, "corrupt", "spool", text, "droprctl fsck"))
    if status.get("lost"):
        text = f"{status['lost']} messages of the inbox were lost with damaged bytes"
        result.append(Reason(Level.CRITICAL, "lost", "inbox", text, "droprctl fsck"))
    dead = status.get("dead_letters", 0)
    level = _graded(dead, limits.dead_letters_warning, limits.dead_letters_critical)
    if level is not Level.OK:
        text = f"{dead} dead letters" if dead != 1 else "a dead letter"
        result.append(Reason(level, "dead_letters", "node", text, "droprctl list --dead"))
    result.extend(
        Reason(Level.WARNING, "problem", "node", text, "droprctl status")
        for text in status.get("problems", ())
    )
    return result
