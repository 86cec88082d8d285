"""Which `InboxStore` a node's consumers use: files, or one that another package brings.

`[inbox] store` names it; `files` is the default, others are found by `droprd.spool.plugins`.
"""

from __future__ import annotations

import os
import tomllib

from droprd.model import Clock
from droprd.settings.published import Node
from droprd.spool.fsops import OsFs
from droprd.spool.inbox import FilesInbox, InboxStore
from droprd.spool.plugins import FILES, inbox_plugin


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
    return inbox_plugin(name).open_consumer(OsFs(), clock, os.urandom, node.spool)
