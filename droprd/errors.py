"""Every error a caller of droprd can meet.

    DroprdError                code, what, why, hint
     ├─ ConfigError            the configuration cannot be used (all faults at once)
     ├─ SpoolNotReady          no spool here, another version, wrong rights, unsafe file system
     ├─ SpoolFull              no room within the quota or on the disk; nothing was accepted
     ├─ SpoolCorrupt           bytes that were promised cannot be read
     ├─ SpoolBusy              somebody else holds the lock that is needed
     ├─ SendInDoubt            bytes were written and could not be taken back: they may arrive
     ├─ UnknownPeer            no peer of that name is configured
     ├─ InvalidName            a node, peer or channel name outside the pattern
     ├─ MessageTooLarge        the body is over max_message_bytes
     ├─ Draining               the node or target refuses new messages until `resume`
     ├─ LeaseLost              the message went back to the channel before it was settled
     ├─ NotAnswering           the daemon is not running, or does not answer in time
     ├─ UsageError             a command or call that cannot mean anything
     ├─ NotPermitted           this user may not do that
     └─ BadData                bytes from outside that break their format

The text of an error says what happened, why, and what to do next. `code` is stable: programs may
compare it, and `--json` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence


class DroprdError(Exception):
    """Base of all errors raised by droprd on purpose.

    Attributes:
        code: stable identifier of this kind of error, for programs.
        what: what could not be done.
        why: the cause.
        hint: the next thing to do, often a command to type.
    """

    code = "error"

    def __init__(
        self, what: str, *, why: str = "", hint: str = "", code: str | None = None
    ) -> None:
        super().__init__(what, why, hint)
        if code is not None:
            self.code = code
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.hint:
            text += f"; {self.hint}"
        return text


class ConfigError(DroprdError):
    """The configuration cannot be used; `faults` lists every one of them, each with its path."""

    code = "config_invalid"

    def __init__(
        self,
        what: str,
        *,
        faults: Sequence[str] = (),
        why: str = "",
        hint: str = "",
        code: str | None = None,
    ) -> None:
        super().__init__(what, why=why, hint=hint, code=code)
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *self.faults])


class SpoolNotReady(DroprdError):
    """There is no usable spool here. Run `droprctl init`, or mount the disk that holds it."""

    code = "spool_not_ready"


class SpoolFull(DroprdError):
    """The message was not accepted because there is no room. Free space, or wait for deliveries."""

    code = "spool_full"


class SpoolCorrupt(DroprdError):
    """Bytes that were promised cannot be read. Run `droprctl fsck`."""

    code = "spool_corrupt"


class SpoolBusy(DroprdError):
    """Another process holds a lock; `pid` names it where that is known."""

    code = "spool_busy"

    def __init__(
        self,
        what: str,
        *,
        pid: int | None = None,
        why: str = "",
        hint: str = "",
        code: str | None = None,
    ) -> None:
        super().__init__(what, why=why, hint=hint, code=code)
        self.pid = pid


class SendInDoubt(DroprdError):
    """A write or sync failed after bytes that could not be taken back.

    The messages named in `ids` may or may not arrive. Sending them again may deliver them twice.
    """

    code = "send_in_doubt"

    def __init__(
        self,
        what: str,
        *,
        ids: Sequence[str] = (),
        why: str = "",
        hint: str = "",
        code: str | None = None,
    ) -> None:
        super().__init__(what, why=why, hint=hint, code=code)
        self.ids = tuple(ids)


class UnknownPeer(DroprdError):
    """No peer of this name is configured. `droprctl peer list` shows those that are."""

    code = "unknown_peer"


class InvalidName(DroprdError):
    """Names match [a-z0-9][a-z0-9._-]{0,63} and are no UUID."""

    code = "invalid_name"


class MessageTooLarge(DroprdError):
    """The body or its headers are larger than this node accepts."""

    code = "message_too_large"


class Draining(DroprdError):
    """New messages are refused until `droprctl resume`."""

    code = "draining"


class LeaseLost(DroprdError):
    """The lease ended before the message was settled: another consumer may have it now."""

    code = "lease_lost"


class NotAnswering(DroprdError):
    """No daemon runs on this spool, or it does not answer in time."""

    code = "no_daemon"


class UsageError(DroprdError, ValueError):
    """The call or command line cannot be understood."""

    code = "usage"


class NotPermitted(DroprdError):
    """The operating system or the daemon refuses this to the calling user."""

    code = "not_permitted"


class BadData(DroprdError):
    """Bytes from a file or the network that break their format."""

    code = "bad_data"
