"""Inbox stores that other packages bring, found by their entry points.

`[inbox] store` names the store of a node. `files` is droprd's own; any other name is looked up
among the entry points of the group `droprd.inboxes`. What an entry point leads to gives both sides
of one inbox: the consumer's, which applications open, each in its own process, and the receiver's,
which the daemon opens. A module with two functions will do, or any object with two such methods.

Raises ConfigError for a name that nothing brings.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from droprd.errors import ConfigError
from droprd.model import Clock
from droprd.spool.fsops import Fs

if TYPE_CHECKING:  # a consumer does not load the receiver's modules
    from droprd.spool.handle import Spool
    from droprd.spool.inbox import InboxStore
    from droprd.spool.judging import Limits
    from droprd.spool.store import InboxWriter

FILES = "files"
GROUP = "droprd.inboxes"
_SIDES = ("open_consumer", "open_writer")


class InboxPlugin(Protocol):
    """Both sides of a kind of inbox."""

    def open_consumer(
        self, fs: Fs, clock: Clock, urandom: Callable[[int], bytes], spool: str, /
    ) -> InboxStore:
        """A new consumer of the inbox that belongs to the spool in the directory `spool`.

        Raises: SpoolNotReady, OSError.
        """
        ...

    def open_writer(self, spool: Spool, limits: Limits, /) -> InboxWriter:
        """The one writer of that inbox; whatever a crash left is mended.

        Raises: OSError, DroprdError.
        """
        ...


def inbox_plugin(name: str) -> InboxPlugin:
    """The installed store of that name.

    Raises: ConfigError if there is none, it cannot be loaded, or it lacks a side.
    """
    for found in entry_points(group=GROUP, name=name):
        try:
            plugin: InboxPlugin = found.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the inbox store {name!r} cannot be loaded",
                why=f"{found.value}: {error}",
                hint="repair the package that brings it, or set [inbox] store to files",
                code="store_missing",
            ) from error
        for side in _SIDES:
            if not callable(getattr(plugin, side, None)):
                raise ConfigError(
                    f"the inbox store {name!r} cannot be used",
                    why=f"{found.value} has no {side}",
                    hint="it must give both sides, as docs/modules.md says",
                    code="store_missing",
                )
        return plugin
    raise ConfigError(
        f"the inbox store {name!r} is not installed",
        why=f"no package brings an entry point of that name in the group {GROUP}",
        hint="install it, or set [inbox] store to files",
        code="store_missing",
    )
