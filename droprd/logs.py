"""How every process of droprd logs: one line an event on standard error, `key=value` or JSON.

Standard-library logging only; no files and no rotation of ours (systemd, supervisor or the
container does that). Values are escaped, so that no text from outside starts a line of its own.

    log = logging.getLogger("droprd.angel")
    event(log, logging.INFO, "worker ready", worker="sender", pid=4711)
    → time=2026-01-31T12:00:00.123Z level=info process=angel event="worker ready" worker=sender …

What repeats itself is left out: of the same event about the same thing there are at most ten lines
a minute, and the next one after that says how many were `left_out`. So neither a peer that fails
nor a worker that crashes in a loop fills a disk. What operators do is never left out.

Under systemd (`auto`) a line begins with the level as `<6>` instead of time and level: the journal
has both already (sd-daemon(3)).
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_PLAIN = re.compile(r"[A-Za-z0-9_./:@+%,<>*~=-]+\Z")
LINES_MAX = 10
WINDOW_S = 60.0
_KEYS_MAX = 1000
_ABOUT = ("peer", "worker", "channel", "state", "reason", "code")  # what makes events different
_ALWAYS = frozenset({"command"})  # who changed what: an audit has no gaps
_SYSLOG = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}


def event(log: logging.Logger, level: int, what: str, /, **fields: Any) -> None:
    """Log `what` happened, with the facts in `fields` (None is left out)."""
    if log.isEnabledFor(level):
        log.log(level, "%s", what, extra={"fields": fields})


def set_up(process: str, *, level: str = "info", form: str = "auto") -> None:
    """Send all logging of this process to standard error. May be called again after a reload.

    `process` names it in each line (angel, sender, …); `level` and `form` are the settings
    log.level (debug, info, warning, error) and log.format (auto, text, json).
    """
    handler = logging.StreamHandler(sys.stderr)
    journal = form == "auto" and "JOURNAL_STREAM" in os.environ
    handler.setFormatter(_Formatter(process, as_json=form == "json", journal=journal))
    handler.addFilter(Repeats(time.monotonic))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


@dataclass(slots=True)
class _Window:
    began_s: float
    lines: int = 0
    left_out: int = 0


class Repeats(logging.Filter):
    """Lets `LINES_MAX` lines of the same event about the same thing pass in `WINDOW_S` seconds."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        super().__init__()
        self._now_s = now_s
        self._windows: dict[tuple[Any, ...], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is written. Adds `left_out` to the first one after a gap."""
        what = record.getMessage()
        if what in _ALWAYS or record.levelno >= logging.CRITICAL:
            return True
        fields = getattr(record, "fields", {})
        key = (record.levelno, what, *(fields.get(name) for name in _ABOUT))
        now_s = self._now_s()
        window = self._windows.get(key)
        if window is None or now_s - window.began_s >= WINDOW_S:
            if window is not None and window.left_out:
                record.fields = {**fields, "left_out": window.left_out}
            window = self._windows[key] = _Window(now_s)
            if len(self._windows) > _KEYS_MAX:
                # The oldest begin anew: texts that are all different repeat nothing.
                del self._windows[next(iter(self._windows))]
        window.lines += 1
        if window.lines > LINES_MAX:
            window.left_out += 1
            return False
        return True


class _Formatter(logging.Formatter):
    def __init__(self, process: str, *, as_json: bool, journal: bool) -> None:
        super().__init__()
        self._process = process
        self._as_json = as_json
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        fields: dict[str, Any] = {}
        if not self._journal:
            when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
            fields["time"] = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            fields["level"] = level
        fields["process"] = self._process
        fields["event"] = record.getMessage()
        for key, value in getattr(record, "fields", {}).items():
            if value is not None:
                fields[key] = value
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps(fields, default=str)
        line = " ".join(f"{key}={_escaped(value)}" for key, value in fields.items())
        return f"<{_SYSLOG.get(level, 6)}>{line}" if self._journal else line


def _escaped(value: Any) -> str:
    text = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return text if _PLAIN.match(text) else json.dumps(text)
