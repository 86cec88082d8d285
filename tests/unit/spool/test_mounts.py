"""File systems on which a sync means nothing are told apart."""

from __future__ import annotations

import pytest

from droprd.spool.mounts import mount_of

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:20 / /memory rw - tmpfs tmpfs rw,size=1024k
24 22 0:21 / /far rw - nfs4 server:/export rw,vers=4.2
25 22 0:22 / /over rw - overlay overlay rw,lowerdir=/a,upperdir=/b,workdir=/c
26 22 0:23 / /volatile rw - overlay overlay rw,lowerdir=/a,upperdir=/b,volatile
27 22 254:1 / /hasty rw - ext4 /dev/vdb rw,nobarrier
28 22 254:2 / /with\040space rw - tmpfs tmpfs rw
29 23 254:3 / /memory/disk rw - xfs /dev/vdc rw
30 22 0:24 / /twice rw - tmpfs tmpfs rw
31 22 254:4 / /twice rw - ext4 /dev/vdd rw
rubbish
"""


@pytest.mark.parametrize(
    ("path", "kind", "safe"),
    [
        ("/var/spool/droprd", "ext4", True),
        ("/memory", "tmpfs", False),
        ("/memory/spool", "tmpfs", False),
        ("/memoryless", "ext4", True),
        ("/memory/disk/spool", "xfs", True),
        ("/far/spool", "nfs4", False),
        ("/over/spool", "overlay", True),
        ("/volatile/spool", "overlay", False),
        ("/hasty/spool", "ext4", False),
        ("/with space/spool", "tmpfs", False),
        ("/twice/spool", "ext4", True),
    ],
)
def test_the_innermost_mount_counts(path: str, kind: str, safe: bool) -> None:
    mount = mount_of(path, MOUNTS)
    assert mount is not None
    assert mount.kind == kind
    assert (mount.unsafe == "") is safe


def test_this_machine_says_where_its_root_lies() -> None:
    assert mount_of("/") is not None
