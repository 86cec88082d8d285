"""Which `InboxStore` a node's consumers use: files, or one that another package brings.

`[inbox] store` names it; `files` is the default. Any other name is looked up among the entry
points of group `droprd.inboxes`: a callable `(fs, clock, urandom, spool) -> InboxStore`.
"""

from __future__ import annotations

import os
import tomllib
from importlib.metadata import entry_points

from droprd.errors import ConfigError
from droprd.model import Clock
from droprd.settings.published import Node
from droprd.spool.fsops import OsFs
from droprd.spool.inbox import FilesInbox, InboxStore

FILES = "files"
GROUP = "droprd.inboxes"


def store_name(node: Node) -> str:
    """What `[inbox] store` says."""
    name = os.environ.get("DROPRD_INBOX__STORE")
    if name is None and node.config_file:
        with open(node.config_file, "rb") as file:
            inbox = tomllib.load(file).get("inbox", {})
        name = inbox.get("store") if isinstance(inbox, dict) else None
    return name or FILES


def open_inbox_store(node: Node, clock: Clock) -> InboxStore:
    """A new consumer of the node's inbox.

    Raises: ConfigError if the store is not installed; SpoolNotReady; OSError.
    """
    name = store_name(node)
    if name == FILES:
        return FilesInbox(OsFs(), clock, os.urandom, node.spool)
    for found in entry_points(group=GROUP, name=name):
        store: InboxStore = found.load()(OsFs(), clock, os.urandom, node.spool)
        return store
    raise ConfigError(
        f"the inbox store {name!r} is not installed",
        why=f"no package brings an entry point of that name in the group {GROUP}",
        hint="install it, or set [inbox] store to files",
        code="store_missing",
    )
