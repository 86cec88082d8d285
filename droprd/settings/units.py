"""Durations and sizes as people write them: `90`, `10m`, `2h`; `64KiB`, `2 GiB`.

One parser for the configuration and for `droprctl`, so that both mean the same everywhere.
Raises UsageError (a ValueError) whose text says what is accepted.
"""

from __future__ import annotations

import math
import re

from droprd.errors import UsageError

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s|m|h|d|w)?\Z")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]i?)?B?\Z")
_BYTES = {
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def parse_duration_s(value: object) -> float:
    """Seconds meant by a number, `90`, `1.5s`, `10m`, `2h`, `7d` or `2w`. Raises: UsageError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (found := _DURATION.match(value.strip())):
        seconds = float(found[1]) * _SECONDS[found[2] or "s"]
    else:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0:
        raise UsageError(
            f"{value!r} is no duration", hint="write seconds, or a number with ms, s, m, h, d or w"
        )
    return seconds


def parse_bytes(value: object) -> int:
    """Bytes meant by a whole number, `4096`, `64KiB`, `10 MB` or `1GiB`. Raises: UsageError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (found := _SIZE.match(value.strip())):
        size = float(found[1]) * _BYTES.get(found[2] or "", 1)
        if size.is_integer() and size < 2**63:
            return int(size)
    raise UsageError(f"{value!r} is no size", hint="write bytes, or a number with KiB, MiB or GiB")


def format_duration(seconds: float) -> str:
    """A duration for people, in its two largest units: `45s`, `3m 20s`, `2d 4h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms" if seconds > 0 else "0s"
    rest = int(seconds)
    parts: list[str] = []
    for unit in ("w", "d", "h", "m", "s"):
        count, rest = divmod(rest, int(_SECONDS[unit]))
        if count or parts:
            parts.append(f"{count}{unit}" if count else "")
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if part)


def format_bytes(size: float) -> str:
    """A size for people: `512 B`, `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
