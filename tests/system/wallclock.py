"""A wall clock that can be turned, for all processes that run with it; the boot clock stays.

A small library, put before the C library by LD_PRELOAD, adds the seconds that stand in a file to
every reading of the wall clock. What Python and the C libraries ask for goes through it.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SHIM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long long *offset;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("TURNED_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *found = fd < 0 ? MAP_FAILED : mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0);
    if (fd >= 0) close(fd);
    if (found != MAP_FAILED) offset = found;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *offset;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
"""


class WallClock:
    """The clock of all processes started with `env`; `turn` moves it for all of them at once."""

    def __init__(self, path: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler here")
        source, library = path / "turned.c", path / "turned.so"
        source.write_text(SHIM)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True
        )
        self._file = path / "offset"
        self._seconds = 0
        self._file.write_bytes(bytes(8))
        self.env = {"LD_PRELOAD": str(library), "TURNED_CLOCK": str(self._file)}

    def turn(self, seconds: int) -> None:
        """Set the clock forward, or back where negative."""
        self._seconds += seconds
        fd = os.open(self._file, os.O_WRONLY)
        os.pwrite(fd, struct.pack("q", self._seconds), 0)
        os.close(fd)
