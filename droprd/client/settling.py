"""Small pieces of `droprd.client.inbox`: grouping messages by lease, and the errors it raises."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from droprd.client.message import LEASED, LOST, Held, Message
from droprd.errors import DroprdError, LeaseLost, SpoolFull, SpoolNotReady, UsageError
from droprd.spool.inbox import Stream

MAX_SECONDS = 10 * 365 * 86_400


def by_lease(
    messages: Iterable[Message],
) -> tuple[dict[tuple[Stream, int], list[Message]], list[Message]]:
    """(messages by stream and lease; those that are not leased any more)."""
    found: dict[tuple[Stream, int], list[Message]] = {}
    settled: list[Message] = []
    held: Held | None = None
    group: list[Message] = []
    for message in messages:
        if message._state is not LEASED:
            settled.append(message)
            continue
        if message._held is not held:
            held = message._held
            group = found.setdefault((held.stream, held.lease), []) if held.lease else settled
        group.append(message)
    return found, settled


def lost_leases(messages: Sequence[Message]) -> LeaseLost:
    """The error for messages that cannot be settled any more; marks them."""
    first = messages[0]
    more = f" and {len(messages) - 1} more" if len(messages) > 1 else ""
    if not first._held.lease:
        why = "it was only peeked at"
    elif first._state in (LEASED, LOST):
        why = "its lease has ended, and another consumer may have it"
    else:
        why = f"it was {first._state} before"
    for message in messages:
        if message._state == LEASED:
            message._state = LOST
    return LeaseLost(
        f"message {first.id}{more} cannot be settled",
        why=why,
        hint="expect it again; take a longer lease_s, or extend it in time",
    )


def seconds_ns(seconds: float, name: str, least: float = 0) -> int:
    """An argument in seconds as nanoseconds. Raises: UsageError."""
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not least <= seconds <= MAX_SECONDS
    ):
        raise UsageError(
            f"{name}={seconds!r} is not possible", why=f"it is {least:g} to {MAX_SECONDS} seconds"
        )
    return int(seconds * 1e9)


@contextmanager
def disk(what: str) -> Iterator[None]:
    """Failures of the disk as errors of ours."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DroprdError):
            raise
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpoolFull(what, why=why, hint="free some space") from error
        raise SpoolNotReady(
            what, why=why, hint="look at the disk, and run `droprctl fsck`", code="spool_io"
        ) from error
