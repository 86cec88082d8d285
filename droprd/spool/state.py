"""The small files below state/: what clients must know, what operators asked for, and hints.

    state/public    what clients must know: peers, limits, pauses, drains, full flags
    state/pauses    what operators asked for, kept across restarts
    state/NAME      the last gauges of a worker: hints for a stopped daemon, never more

All are msgpack maps, replaced as a whole, each by one writer: public and pauses by whoever holds
the daemon's lock, gauges by their worker. A crash leaves the old file or the new one; a gauges
file, which nobody waits for, is not synced and may be lost or unreadable after a power cut: then
it is ignored.

Raises SpoolNotReady (code state_unreadable) where public or pauses are there and no such map.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from droprd.errors import BadData, SpoolNotReady
from droprd.model import MIB, Clock
from droprd.spool.fsops import Fs, replace_file
from droprd.spool.layout import PUBLIC_MODE, Layout

SCHEMA: Final = 1
STATE_BYTES_MAX: Final = 16 * MIB


def pack(values: Mapping[str, Any]) -> bytes:
    """A map as these files hold it."""
    packed: bytes = msgpack.packb(dict(values))
    return packed


def _unpack(data: bytes) -> dict[str, Any]:
    try:
        values = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadData("a state file is no msgpack", why=str(error)) from error
    if not isinstance(values, dict):
        raise BadData("a state file is no map")
    return values


def _read(fs: Fs, path: str) -> dict[str, Any] | None:
    try:
        fd = fs.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _unpack(fs.read_at(fd, STATE_BYTES_MAX, 0))
    finally:
        fs.close(fd)


def _read_sure(fs: Fs, path: str) -> dict[str, Any] | None:
    try:
        return _read(fs, path)
    except BadData as error:
        raise SpoolNotReady(
            f"{path} cannot be read",
            why=f"{error.what}: {error.why}" if error.why else error.what,
            hint=f"start the daemon after removing it: rm {path}",
            code="state_unreadable",
        ) from error


# -- what clients must know ----------------------------------------------------------------------


def read_public(fs: Fs, layout: Layout) -> dict[str, Any] | None:
    """What state/public says, or None if no daemon ever wrote it. Raises: SpoolNotReady."""
    return _read_sure(fs, layout.public)


def write_public(fs: Fs, layout: Layout, values: Mapping[str, Any]) -> None:
    """Replace state/public. Only for the holder of the daemon's lock. Raises: OSError."""
    replace_file(fs, layout.public, pack(values), "state.public", PUBLIC_MODE)


# -- gauges --------------------------------------------------------------------------------------


def read_gauges(fs: Fs, layout: Layout, worker: str) -> dict[str, Any]:
    """The last gauges of `worker`; empty if there are none or they cannot be read."""
    try:
        return _read(fs, layout.gauges(worker)) or {}
    except (BadData, OSError):
        return {}


def write_hint(fs: Fs, path: str, data: bytes) -> None:
    """Replace the file at `path` without syncing: after a power cut it may be gone or empty."""
    temporary = f"{path}.new"
    fd = fs.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
    try:
        fs.write_at(fd, [data], 0)
    finally:
        fs.close(fd)
    fs.rename(temporary, path)


# -- pauses and drains ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pause:
    """A target that an operator stopped: who, why, since and until when (boot ns are of `boot`)."""

    who: str
    reason: str
    receiving: bool
    since_wall_ns: int
    until_wall_ns: int | None = None
    until_boot_ns: int | None = None
    boot: bytes = b""

    def over(self, clock: Clock) -> bool:
        """Whether it has ended: by boot time within its boot, by the wall clock after a reboot."""
        if self.until_boot_ns is not None and self.boot == clock.boot_id():
            return clock.boot_ns() >= self.until_boot_ns
        return self.until_wall_ns is not None and clock.wall_ns() >= self.until_wall_ns

    def as_map(self) -> dict[str, Any]:
        """As clients and workers see it."""
        return {
            "who": self.who,
            "reason": self.reason,
            "receiving": self.receiving,
            "since_wall_ns": self.since_wall_ns,
            "until_wall_ns": self.until_wall_ns,
        }


@dataclass(frozen=True, slots=True)
class Wishes:
    """What operators asked for and nobody lifted yet, by target ("" is the whole node)."""

    pauses: Mapping[str, Pause] = field(default_factory=dict)
    drains: Mapping[str, str] = field(default_factory=dict)  # target → who

    def current(self, clock: Clock) -> Wishes:
        """Without the pauses that are over."""
        return Wishes({t: p for t, p in self.pauses.items() if not p.over(clock)}, self.drains)

    def paused(self) -> dict[str, dict[str, Any]]:
        """The pauses as clients and workers see them."""
        return {target: pause.as_map() for target, pause in self.pauses.items()}

    def with_pause(self, target: str, pause: Pause) -> Wishes:
        return Wishes({**self.pauses, target: pause}, self.drains)

    def with_drain(self, target: str, who: str) -> Wishes:
        return Wishes(self.pauses, {**self.drains, target: who})

    def resumed(self, target: str) -> Wishes:
        """Without the pause and the drain of `target` and of all below it."""

        def stays(name: str) -> bool:
            return bool(target) and name != target and not name.startswith(f"{target}/")

        return Wishes(
            {t: p for t, p in self.pauses.items() if stays(t)},
            {t: w for t, w in self.drains.items() if stays(t)},
        )

    def without_drain(self, target: str) -> Wishes:
        return Wishes(self.pauses, {t: w for t, w in self.drains.items() if t != target})


def read_wishes(fs: Fs, layout: Layout) -> Wishes:
    """What state/pauses says; nothing if it is not there. Raises: SpoolNotReady."""
    values = _read_sure(fs, layout.pauses) or {}
    try:
        return Wishes(
            {target: Pause(**one) for target, one in values.get("pauses", {}).items()},
            dict(values.get("drains", {})),
        )
    except (TypeError, AttributeError) as error:
        raise SpoolNotReady(
            f"{layout.pauses} cannot be read",
            why=str(error),
            hint=f"start the daemon after removing it: rm {layout.pauses}",
            code="state_unreadable",
        ) from error


def write_wishes(fs: Fs, layout: Layout, wishes: Wishes) -> None:
    """Replace state/pauses. Only for the holder of the daemon's lock. Raises: OSError."""
    values = {
        "schema": SCHEMA,
        "pauses": {
            target: {**pause.as_map(), "until_boot_ns": pause.until_boot_ns, "boot": pause.boot}
            for target, pause in wishes.pauses.items()
        },
        "drains": dict(wishes.drains),
    }
    replace_file(fs, layout.pauses, pack(values), "state.pauses", PUBLIC_MODE)
