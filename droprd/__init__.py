"""droprd: durable messages between machines that cannot rely on the network between them.

    with droprd.Outbox() as outbox:
        message_id = outbox.send(b"site 4711 changed", to="berlin", channel="sites")  # on disk

    with droprd.Inbox() as inbox:
        for message in inbox.receive("sites", wait_s=20):
            print(message.sender, message.body)
            message.ack()

`import droprd` costs next to nothing: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from droprd.client.inbox import Inbox
    from droprd.client.message import Message
    from droprd.client.outbox import Outbox
    from droprd.errors import (
        Draining,
        DroprdError,
        InvalidName,
        LeaseLost,
        MessageTooLarge,
        SendInDoubt,
        SpoolCorrupt,
        SpoolFull,
        SpoolNotReady,
        UnknownPeer,
    )

    __version__: str

__all__ = [
    "Draining",
    "DroprdError",
    "Inbox",
    "InvalidName",
    "LeaseLost",
    "Message",
    "MessageTooLarge",
    "Outbox",
    "SendInDoubt",
    "SpoolCorrupt",
    "SpoolFull",
    "SpoolNotReady",
    "UnknownPeer",
]

_MODULES = {
    "Inbox": "droprd.client.inbox",
    "Message": "droprd.client.message",
    "Outbox": "droprd.client.outbox",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("droprd")
    elif name in __all__:
        value = getattr(import_module(_MODULES.get(name, "droprd.errors")), name)
    else:
        raise AttributeError(f"module 'droprd' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
