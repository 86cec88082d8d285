"""What every part of the spool works with: files, clock, randomness, and where things lie.

Also sets unreadable bytes aside: `corrupt/<what>-<offset>-<random>` keeps them whole, so that
nothing that was accepted vanishes silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from droprd.model import Clock
from droprd.spool.fsops import Fs
from droprd.spool.layout import Layout


@dataclass(frozen=True, slots=True)
class Spool:
    """One spool as one process uses it. Passed, never global.

    Attributes:
        urandom: random bytes from the operating system, never from a generator that a fork or a
            snapshot copies.
    """

    fs: Fs
    clock: Clock
    urandom: Callable[[int], bytes]
    layout: Layout
    spool_id: bytes

    def set_aside(self, path: str, offset: int, data: bytes) -> str:
        """Keep bytes that cannot be read under `corrupt/`; returns the name of the new file."""
        what = os.path.relpath(path, self.layout.root).replace("/", "_")
        name = f"{self.layout.corrupt}/{what}-{offset}-{self.urandom(4).hex()}"
        fd = self.fs.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            self.fs.write_at(fd, [data], 0)
            self.fs.sync(fd, "corrupt.keep")
        finally:
            self.fs.close(fd)
        # If we stop here: the bytes are in both places, and may be set aside once more.
        self.fs.sync_dir(self.layout.corrupt, "corrupt.keep_dir")
        return name
