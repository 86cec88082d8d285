"""Which file system a spool lies on, and whether a sync there means anything.

On some file systems `fsync` succeeds and nothing is on stable storage: memory (tmpfs), the network
(nfs, smb, 9p: the server's promise, not ours), an overlay mounted `volatile`, a disk mounted
without barriers. Promise P1 cannot be kept there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

_UNSAFE = {
    "tmpfs": "it lies in memory",
    "ramfs": "it lies in memory",
    "rootfs": "it lies in memory",
    "nfs": "locks and syncs depend on the server",
    "nfs4": "locks and syncs depend on the server",
    "cifs": "locks and syncs depend on the server",
    "smb3": "locks and syncs depend on the server",
    "9p": "locks and syncs depend on the host",
}
_UNSAFE_OPTIONS = {
    "volatile": "it is mounted volatile: syncs do nothing",
    "nobarrier": "it is mounted without barriers",
    "barrier=0": "it is mounted without barriers",
}
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a file system is mounted, its type, and its options."""

    point: str
    kind: str
    options: frozenset[str]

    @property
    def unsafe(self) -> str:
        """Why nothing is durable here, or ""."""
        for option in sorted(self.options):
            if option in _UNSAFE_OPTIONS:
                return _UNSAFE_OPTIONS[option]
        return _UNSAFE.get(self.kind, "")


def mount_of(path: str, mountinfo: str | None = None) -> Mount | None:
    """The mount that holds `path`; None where it cannot be told. `mountinfo`: see proc(5)."""
    if mountinfo is None:
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
                mountinfo = file.read()
        except OSError:
            return None
    path = os.path.realpath(path)
    found = None
    for line in mountinfo.splitlines():
        front, _, back = line.partition(" - ")
        left, right = front.split(), back.split()
        if len(left) < 6 or len(right) < 3:
            continue
        point = _OCTAL.sub(lambda m: chr(int(m[1], 8)), left[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Later lines are mounted over earlier ones.
        if inside and (found is None or len(point) >= len(found.point)):
            options = frozenset(left[5].split(",")) | frozenset(right[2].split(","))
            found = Mount(point, right[0], options)
    return found
