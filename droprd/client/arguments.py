"""What a caller of `Outbox` may hand over, checked before anything is written.

Pure. Raises UsageError for what cannot mean anything, MessageTooLarge for headers over 8 KiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from droprd.core.frame import HEADERS_BYTES_MAX, pack_map
from droprd.errors import MessageTooLarge, UsageError

SECONDS_MAX = 10 * 365 * 86_400


def checked_body(body: Any, what: str = "the body") -> bytes:
    """The body as bytes that nobody can change any more. Raises: UsageError."""
    if type(body) is bytes:
        return body
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    hint = "encode it first: text.encode()" if isinstance(body, str) else "hand over bytes"
    raise UsageError(f"{what} is no bytes", why=f"it is {type(body).__name__}", hint=hint)


def checked_bodies(bodies: Any) -> list[bytes]:
    """The bodies of a `send_many`. Raises: UsageError that names the first bad one."""
    if isinstance(bodies, str | bytes | bytearray | memoryview) or not isinstance(bodies, Iterable):
        raise UsageError(
            "send_many() wants many bodies",
            why=f"it was given one {type(bodies).__name__}",
            hint="use send() for a single message",
        )
    found = list(bodies)
    if found and set(map(type, found)) != {bytes}:
        found = [checked_body(body, f"body {index}") for index, body in enumerate(found)]
    return found


def milliseconds(seconds: float | None, name: str, *, zero: bool) -> int:
    """A span as the frame holds it; 0 for None. Raises: UsageError."""
    if seconds is None:
        return 0
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise UsageError(f"{name} is no number of seconds", why=f"it is {seconds!r}")
    if not math.isfinite(seconds) or not 0 <= seconds <= SECONDS_MAX or not (seconds or zero):
        least = "0" if zero else "more than 0"
        raise UsageError(
            f"{name}={seconds!r} is not possible",
            why=f"it goes from {least} to {SECONDS_MAX} seconds (ten years)",
        )
    return math.ceil(seconds * 1000)


def shared_values(
    content_type: str | None, headers: Mapping[str, str] | None
) -> Mapping[str, Any] | None:
    """What the messages of one call share, as the frame holds it.

    Raises: UsageError, MessageTooLarge.
    """
    if content_type is None and not headers:
        return None
    values: dict[str, Any] = {}
    if content_type is not None:
        _check_text(content_type, "content_type")
        values["t"] = content_type
    if headers:
        if not isinstance(headers, Mapping):
            raise UsageError("headers are no mapping", why=f"they are {type(headers).__name__}")
        for key, value in headers.items():
            _check_text(key, "the name of a header")
            _check_text(value, f"header {key!r}")
        values["h"] = dict(headers)
    size = len(pack_map(values))
    if size > HEADERS_BYTES_MAX:
        raise MessageTooLarge(
            f"the headers of a message take {size} bytes",
            why=f"at most {HEADERS_BYTES_MAX} are carried beside a body",
            hint="put large values into the body",
        )
    return values


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{what} is no text", why=f"it is {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} cannot be written as UTF-8", why=error.reason) from None
