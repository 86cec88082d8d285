"""Reading msgpack that others wrote: one place for limits and checks of untrusted values.

Guarantees: extension types, trailing bytes, wrong types, numbers out of range, unknown keys and
texts with control characters are refused with `BadData`, which names the field. What an input
claims about its own size is bounded before anything is allocated for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgpack

from droprd.errors import BadData, InvalidName
from droprd.model import Head, check_name

ARRAY_MAX = 4096
"""An array or map may claim this many items: msgpack allocates them before it reads them."""
NUMBER_MAX = 2**63 - 1
MESSAGES_PER_FRAME_MAX = 1024


def bad(where: str, why: str) -> BadData:
    """A `BadData` that names the field; to be raised by the caller."""
    return BadData(f"the field {where} cannot be read", why=why)


def show(value: object) -> str:
    """A value from outside, short enough for an error text."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def pack(data: object, limit: int, what: str) -> bytes:
    """`data` as msgpack of at most `limit` bytes. Raises: BadData."""
    try:
        packed = cast(bytes, msgpack.packb(data, use_bin_type=True))
    except (ValueError, TypeError, OverflowError) as error:
        raise bad(what, f"cannot be packed: {error}") from error
    if len(packed) > limit:
        raise bad(what, f"would have {len(packed)} bytes, {limit} are allowed")
    return packed


def _no_extension(code: int, data: bytes) -> object:
    raise bad("extension type", f"type {code} is not part of the protocol")


def unpack(body: bytes | bytearray | memoryview, limit: int, what: str) -> object:
    """The one value in `body`, whose inside is still to be checked. Raises: BadData."""
    if len(body) > limit:
        raise bad(what, f"{len(body)} bytes, {limit} are allowed")
    try:
        return msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_extension,
            max_array_len=ARRAY_MAX,
            max_map_len=ARRAY_MAX,
            max_ext_len=0,
        )
    except BadData:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        # msgpack tells of truncated, trailing, nested and oversized input by these.
        raise bad(what, f"no msgpack: {type(error).__name__} {show(str(error))}") from error


def check_map(
    data: object,
    what: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    strict: bool = True,
) -> dict[str, Any]:
    """Raises BadData unless `data` is a map with all `required` keys and, if `strict`, no key that
    is neither required nor optional.
    """
    if not isinstance(data, dict):
        raise bad(what, "no map")
    for key in required:
        if key not in data:
            raise bad(what, f"has no {key!r}")
    if strict and len(data) > len(required):
        for key in data:
            if key not in required and key not in optional:
                raise bad(what, f"has an unknown key {show(key)}")
    return data


def check_list(data: object, what: str, limit: int) -> list[Any]:
    """Raises BadData unless `data` is a list of at most `limit` items."""
    if not isinstance(data, list):
        raise bad(what, "no list")
    if len(data) > limit:
        raise bad(what, f"{len(data)} items, {limit} are allowed")
    return data


def check_tuple(data: object, what: str, size: int) -> list[Any]:
    """Raises BadData unless `data` is a list of exactly `size` items."""
    if not isinstance(data, list) or len(data) != size:
        raise bad(what, f"no list of {size}")
    return data


def check_int(value: object, what: str, low: int, high: int) -> int:
    """Raises BadData unless `value` is an integer (no bool) from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise bad(what, f"{show(value)} is no whole number from {low} to {high}")
    return value


def check_index(value: object, what: str) -> int | None:
    """Raises BadData unless `value` is None or may be the index of a message in a frame."""
    return None if value is None else check_int(value, what, 0, MESSAGES_PER_FRAME_MAX - 1)


def check_id(value: object, what: str) -> bytes:
    """Raises BadData unless `value` is 16 bytes."""
    if type(value) is not bytes or len(value) != 16:
        raise bad(what, "not 16 bytes")
    return value


def check_text(value: object, what: str, limit: int) -> str:
    """Raises BadData unless `value` is printable and of at most `limit` characters."""
    # Texts end in logs and on terminals: no control characters, whoever sent them.
    if type(value) is not str or len(value) > limit or not value.isprintable():
        raise bad(what, f"no printable text of at most {limit} characters")
    return value


def check_wire_name(value: object, what: str) -> str:
    """Raises BadData unless `value` may name a `what` (node, peer, channel)."""
    try:
        return check_name(cast(str, value), what)
    except InvalidName as error:
        raise bad(what, error.why) from error


def check_head(data: object, what: str) -> Head:
    """Raises BadData unless `data` is [number, chain]."""
    number, chain = check_tuple(data, what, 2)
    return Head(check_int(number, what, 0, NUMBER_MAX), check_id(chain, what))
