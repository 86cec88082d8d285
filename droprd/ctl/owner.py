"""Acting as the user a spool belongs to, so that root leaves nothing there the daemon cannot use.

Raises NotPermitted where another user than root or the owner would change the node.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator

from droprd.errors import NotPermitted


@contextlib.contextmanager
def as_owner(root: str) -> Iterator[None]:
    """Within it, root acts as the user the spool belongs to, with its groups.

    Raises: NotPermitted for other users.
    """
    found = os.stat(root)
    if os.geteuid() == found.st_uid:
        yield
        return
    if os.geteuid() != 0:
        raise NotPermitted(
            "only the owner of the spool may change this node",
            why=f"{root} belongs to uid {found.st_uid}",
            hint="run this as that user or as root",
        )
    groups, gid = os.getgroups(), os.getegid()
    try:
        os.initgroups(pwd.getpwuid(found.st_uid).pw_name, found.st_gid)
    except KeyError:
        os.setgroups([])
    os.setegid(found.st_gid)
    os.seteuid(found.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


@contextlib.contextmanager
def never_as_root(root: str) -> Iterator[None]:
    """Within it, root acts as the spool's owner; every other user stays what it is.

    For what applications do too: a journal of root's could not be read by the daemon.
    """
    if os.geteuid() == 0 and os.path.isdir(root):
        with as_owner(root):
            yield
    else:
        yield
