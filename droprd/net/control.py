"""Calls to the daemon: MessagePack-RPC over its Unix socket, each with a deadline.

`Control` connects, says hello, and then asks. Raises NotAnswering with code no_daemon (nobody
listens there) or not_answering (somebody does, and is silent past the deadline), NotPermitted, and
whatever error the daemon answers.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from droprd.core import rpc
from droprd.errors import BadData, NotAnswering, NotPermitted

_ANSWER_ITEMS_MAX = 1 << 16
_READ_BYTES = 1 << 16


class Control:
    """A connection to a node's daemon."""

    def __init__(self, path: str, timeout_s: float, client: str = "droprctl") -> None:
        """Connect to the control socket at `path` as program `client`.

        `timeout_s` holds for every call.
        """
        self.path = path
        self.timeout_s = timeout_s
        self._decoder = rpc.Decoder(rpc.ANSWER_BYTES_MAX, _ANSWER_ITEMS_MAX)
        self._next_id = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(max(timeout_s, 0.001))
            self._socket.connect(path)
            self.server: Mapping[str, Any] = self.call("hello", {"client": client})
        except (FileNotFoundError, ConnectionRefusedError):
            self.close()
            raise NotAnswering(
                "no daemon runs here",
                why=f"nobody listens on {path}",
                hint="start it: systemctl start droprd, or droprd --config FILE",
                code="no_daemon",
            ) from None
        except PermissionError:
            self.close()
            raise NotPermitted(
                "the daemon may not be asked",
                why=f"this user may not use {path}",
                hint="use root, the spool's user, or a member of group droprd-monitor",
            ) from None
        except (BlockingIOError, TimeoutError):
            self.close()
            raise self._silent() from None
        except BaseException:
            self.close()
            raise

    def call(
        self, method: str, params: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        """Ask the daemon. Raises: NotAnswering, NotPermitted, what the daemon answers."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        self._next_id += 1
        asked = self._next_id
        try:
            self._socket.settimeout(max(limit_s, 0.001))
            self._socket.sendall(rpc.encode(rpc.Request(asked, method, params or {})))
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._silent(limit_s)
                self._socket.settimeout(left)
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    raise ConnectionResetError
                for message in self._decoder.feed(data):
                    if isinstance(message, rpc.Response) and message.id == asked:
                        return message.value()
        except TimeoutError:
            raise self._silent(limit_s) from None
        except (ConnectionResetError, BrokenPipeError):
            raise NotAnswering(
                "the daemon hung up",
                why="it is stopping, or refused the call",
                hint="look again: droprctl status",
                code="not_answering",
            ) from None
        except BadData as error:
            raise NotAnswering(
                "the daemon's answer cannot be understood",
                why=str(error),
                hint="use the droprctl of the daemon's own version",
                code="not_answering",
            ) from None

    def wait_closed(self, timeout_s: float) -> bool:
        """Whether the daemon closes this connection within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(TimeoutError):
            while (left := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left)
                try:
                    if not self._socket.recv(_READ_BYTES):
                        return True
                except ConnectionResetError:
                    return True
        return False

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _silent(self, limit_s: float | None = None) -> NotAnswering:
        limit_s = self.timeout_s if limit_s is None else limit_s
        return NotAnswering(
            "the daemon is not answering",
            why=f"no answer on {self.path} within {limit_s:g} s",
            hint="wait longer with --timeout, or look at its log",
            code="not_answering",
        )
