"""The real clock. Boot time orders and measures; wall time is for people and for dates in files."""

from __future__ import annotations

import time


class SystemClock:
    """`droprd.model.Clock` read from the operating system."""

    def __init__(self) -> None:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            self._boot_id = bytes.fromhex(file.read().strip().replace("-", ""))

    def boot_id(self) -> bytes:
        return self._boot_id

    def boot_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall_ns(self) -> int:
        return time.time_ns()
