"""MessagePack-RPC without sockets: bytes in, calls out; calls in, bytes out.

Spoken on the control socket (droprctl, monitors, supervisor's listener → angel) and on the
socketpair between the angel and each worker.

    request       [0, id, method, [params]]      id: 0 … 2³²-1, chosen by the asker
    response      [1, id, error, result]         one of the two is nil
    notification  [2, method, [params]]          no answer

(https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md.) `params` is one map with text
keys, or left out. `error` is a map {code, what, why, hint}: the same four words as DroprdError.

Guarantees of `Decoder`: a peer can make it hold at most `bytes_max` bytes and build only what such
a message can hold; extension types, map keys that are no text, bytes that are no UTF-8 where text
is meant, and anything not of the forms above raise BadData. After BadData the stream is lost:
close it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from droprd.errors import (
    BadData,
    Draining,
    DroprdError,
    InvalidName,
    NotAnswering,
    NotPermitted,
    SpoolBusy,
    SpoolFull,
    SpoolNotReady,
    UnknownPeer,
    UsageError,
)
from droprd.model import KIB, MIB

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2

# What a caller of the control socket may send; no call has more to say.
CALL_BYTES_MAX: Final = 64 * KIB
# What the angel answers, and what it and its own workers tell each other: a status of thousands
# of peers and channels.
ANSWER_BYTES_MAX: Final = 16 * MIB
# msgpack reserves 8 bytes an element before it reads the first one.
ITEMS_MAX: Final = 4096
ID_MAX: Final = 2**32 - 1
METHOD_CHARS_MAX: Final = 64

Params = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RpcError:
    """Why a call failed: the fields of a DroprdError."""

    code: str
    what: str
    why: str = ""
    hint: str = ""

    @classmethod
    def of(cls, error: DroprdError) -> RpcError:
        """The same error as a value that can be sent; faults of a ConfigError go into `why`."""
        faults = getattr(error, "faults", ())
        why = "\n".join(part for part in (error.why, *faults) if part)
        return cls(error.code, error.what, why, error.hint)

    def to_exception(self) -> DroprdError:
        """The error that the other side meant, of its own class where its code has one."""
        kind = _BY_CODE.get(self.code, DroprdError)
        return kind(self.what, why=self.why, hint=self.hint, code=self.code)


@dataclass(frozen=True, slots=True)
class Request:
    """Somebody wants an answer under `id`."""

    id: int
    method: str
    params: Params = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to the request `id`: `error`, or else `result`."""

    id: int
    error: RpcError | None = None
    result: Any = None

    def value(self) -> Any:
        """The result. Raises the DroprdError that the other side answered."""
        if self.error is not None:
            raise self.error.to_exception()
        return self.result


@dataclass(frozen=True, slots=True)
class Notification:
    """Somebody says something and waits for nothing."""

    method: str
    params: Params = field(default_factory=dict)


Message = Request | Response | Notification

_BY_CODE: Final[dict[str, type[DroprdError]]] = {
    kind.code: kind
    for kind in (
        Draining,
        InvalidName,
        NotAnswering,
        NotPermitted,
        SpoolBusy,
        SpoolFull,
        SpoolNotReady,
        UnknownPeer,
        UsageError,
    )
}


def encode(message: Message) -> bytes:
    """The bytes of one message. Raises TypeError for values msgpack has no form for."""
    form: list[Any]
    if isinstance(message, Request):
        form = [REQUEST, message.id, message.method, [dict(message.params)]]
    elif isinstance(message, Notification):
        form = [NOTIFICATION, message.method, [dict(message.params)]]
    else:
        error = message.error
        told = error and {
            "code": error.code,
            "what": error.what,
            "why": error.why,
            "hint": error.hint,
        }
        form = [RESPONSE, message.id, told, message.result]
    packed: bytes = msgpack.packb(form)
    return packed


class Decoder:
    """Cuts a stream of bytes into messages. One a connection."""

    def __init__(self, bytes_max: int = CALL_BYTES_MAX, items_max: int = ITEMS_MAX) -> None:
        """`bytes_max` bounds one message; `items_max` any list or map in it."""
        self._unpacker = msgpack.Unpacker(
            raw=False,
            strict_map_key=True,
            max_buffer_size=bytes_max,
            max_ext_len=0,
            max_array_len=items_max,
            max_map_len=items_max,
            ext_hook=_refuse_extension,
        )
        self._bytes_max = bytes_max

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take `data` and yield each message that is now whole.

        Raises: BadData; the stream cannot be read any further then.
        """
        # In slices: a read may bring the end of one message and a lot of the next ones.
        for start in range(0, len(data), self._bytes_max // 2):
            try:
                self._unpacker.feed(data[start : start + self._bytes_max // 2])
            except msgpack.BufferFull as error:
                raise BadData(
                    "a message is too large", why=f"over {self._bytes_max} bytes"
                ) from error
            yield from self._whole()

    def _whole(self) -> Iterator[Message]:
        while True:
            try:
                form = self._unpacker.unpack()
            except msgpack.OutOfData:
                return
            except (ValueError, msgpack.UnpackException) as error:
                raise BadData("these bytes are no MessagePack-RPC", why=str(error)) from error
            yield _message(form)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _message(form: Any) -> Message:
    match form:
        case [0, int() as id_, str() as method, [*params]] if _fits(form[0], id_, method):
            return Request(id_, method, _params(params))
        case [1, int() as id_, error, result] if _fits(form[0], id_, "response"):
            return Response(id_, _error(error), result)
        case [2, str() as method, [*params]] if _fits(form[0], 0, method):
            return Notification(method, _params(params))
    raise BadData("a message has none of the three forms of MessagePack-RPC")


def _fits(kind: Any, id_: int, method: str) -> bool:
    # True == 1 and 1.0 == 1 for Python, not for the format.
    return (
        type(kind) is int
        and type(id_) is int
        and 0 <= id_ <= ID_MAX
        and 0 < len(method) <= METHOD_CHARS_MAX
    )


def _params(params: list[Any]) -> Params:
    match params:
        case []:
            return {}
        case [dict() as named] if all(isinstance(key, str) for key in named):
            return named
    raise BadData("the parameters of a call are not one map with text keys")


def _error(error: Any) -> RpcError | None:
    match error:
        case None:
            return None
        case {"code": str() as code, "what": str() as what}:
            return RpcError(code, what, str(error.get("why", "")), str(error.get("hint", "")))
        case str():
            return RpcError("error", error)
    raise BadData("the error of a response is not of the form {code, what, why, hint}")
