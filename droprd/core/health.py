"""Is this node well? One judgement for droprctl, Nagios, Prometheus, systemd and supervisor.

`judge` reads a status document (core/status.py) and gives a verdict with its reasons. It looks at
progress — the age of the oldest message that waits, the time since a peer last took a byte — and
at what an operator has to know: workers that are not running, dead letters, a full disk. That
processes run proves nothing and is never a reason for `ok`.

What an operator asked for (pause, drain) is no fault; the messages behind it are not counted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from droprd.core.status import duration
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
class Thresholds:
    """From which value on something is worth a warning, or critical. Seconds, bytes, counts."""

    oldest_age_warning_s: float = 15 * 60
    oldest_age_critical_s: float = 4 * 3600
    silence_warning_s: float = 15 * 60
    silence_critical_s: float = 4 * 3600
    merge_age_warning_s: float = 30
    merge_age_critical_s: float = 300
    free_bytes_warning: int = 512 * MIB
    free_bytes_critical: int = 64 * MIB
    dead_letters_warning: int = 1


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


def judge(status: Map, thresholds: Thresholds = DEFAULTS) -> Health:
    """The health of the node that `status` describes."""
    reasons = [
        *_daemon(status),
        *_workers(status),
        *_peers(status, thresholds),
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


def _workers(status: Map) -> list[Reason]:
    result = []
    if status.get("state") in ("stopping", "stopped"):
        return []
    for name, about in status.get("workers", {}).items():
        state = about.get("state")
        if about.get("stuck"):
            level, text = Level.CRITICAL, f"the {name} is stuck in the kernel (pid {about['pid']})"
            code = "worker_stuck"
        elif state == "fatal":
            level, text = Level.CRITICAL, f"the {name} cannot use the configuration"
            code = "worker_fatal"
        elif state == "backoff":
            level = Level.CRITICAL if about.get("failures", 0) >= 5 else Level.WARNING
            text = f"the {name} died {about.get('failures', 0)} times and waits for its next start"
            code = "worker_backoff"
        elif state in ("stopped", "stopping") and status.get("state") == "running":
            level, text, code = Level.WARNING, f"the {name} is {state}", "worker_away"
        else:
            continue
        command = "droprctl config check" if state == "fatal" else "droprctl status"
        result.append(Reason(level, code, name, text, command))
    return result


def _graded(value: Any, warning: float, critical: float) -> Level:
    if not isinstance(value, (int, float)) or value < warning:
        return Level.OK
    return Level.CRITICAL if value >= critical else Level.WARNING


def _peers(status: Map, limits: Thresholds) -> list[Reason]:
    result = []
    for name, about in status.get("peers", {}).items():
        if about.get("state") in ("paused", "draining") or not about.get("queued"):
            continue
        why = f"droprctl why {name}"
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
    free = status.get("spool", {}).get("free_bytes")
    # 0 is also what is shown before the janitor has looked.
    if free and free < limits.free_bytes_warning:
        level = Level.CRITICAL if free < limits.free_bytes_critical else Level.WARNING
        text = f"{free // MIB} MiB are free on the disk of the spool"
        result.append(Reason(level, "disk_space", "spool", text, "df -h"))
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
    if dead >= limits.dead_letters_warning:
        text = f"{dead} dead letters"
        result.append(Reason(Level.WARNING, "dead_letters", "node", text, "droprctl list --dead"))
    result.extend(
        Reason(Level.WARNING, "problem", "node", text, "droprctl status")
        for text in status.get("problems", ())
    )
    return result
