"""Names to addresses, without ever holding the event loop or the end of the process.

libcurl looks names up in threads that it joins when it is closed: with name servers out of reach,
which is an ordinary day here, a sender could not stop for as long as they time out. So names are
looked up in daemon threads, one per name at a time, and libcurl is given the addresses.

Raises `TransportError` of kind `resolve`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from droprd.net.transport import TransportError

KEPT_S = 60.0
_PORTS = {"http": 80, "https": 443}
_HINT = "check the name in the peer's url, and this node's name servers"

Lookup = Callable[[str, int], list[str]]


def look_up(host: str, port: int) -> list[str]:
    """The numeric addresses of a name in the system's order of preference. Raises: OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _Kept(NamedTuple):
    addresses: list[str]
    until: float


class Resolver:
    """Looks names up and keeps what it found for a minute."""

    def __init__(self, lookup: Lookup = look_up) -> None:
        self._lookup = lookup
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._running: dict[tuple[str, int], asyncio.Future[list[str]]] = {}

    async def entry(self, url: str, timeout_s: float) -> str | None:
        """What CURLOPT_RESOLVE wants for the host of `url`, None if that is an address already.

        Raises: TransportError if there is no address, or none after `timeout_s`.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or _PORTS[parts.scheme]
        except (ValueError, KeyError) as error:
            raise TransportError("local", f"no answer from {url}", why=str(error)) from error
        if not host or _is_address(host):
            return None
        key = (host, port)
        loop = asyncio.get_running_loop()
        kept = self._kept.get(key)
        if kept is None or kept.until < loop.time():
            kept = _Kept(await self._found(url, key, timeout_s), loop.time() + KEPT_S)
            self._kept[key] = kept
        addresses = (f"[{found}]" if ":" in found else found for found in kept.addresses)
        return f"+{host}:{port}:{','.join(addresses)}"

    def forget(self) -> None:
        """Look names up anew from now on: an address of the last minute did not answer."""
        self._kept.clear()

    async def _found(self, url: str, key: tuple[str, int], timeout_s: float) -> list[str]:
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = asyncio.get_running_loop().create_future()
            threading.Thread(target=self._run, args=(key, running), daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(running)
        except TimeoutError:
            why = f"the name servers did not answer within {timeout_s:g} s"
        except OSError as error:
            why = f"{key[0]}: {error.strerror or error}"
        raise TransportError("resolve", f"no answer from {url}", why=why, hint=_HINT)

    def _run(self, key: tuple[str, int], running: asyncio.Future[list[str]]) -> None:
        addresses: list[str] = []
        failed: OSError | None = None
        try:
            addresses = self._lookup(*key)
        except UnicodeError:
            failed = OSError(None, "this cannot be a name")
        except OSError as error:
            failed = error

        def tell() -> None:
            self._running.pop(key, None)
            if failed is None:
                running.set_result(addresses)
            else:
                running.set_exception(failed)
                running.exception()  # nobody may wait any more; that is no fault

        try:
            running.get_loop().call_soon_threadsafe(tell)
        except RuntimeError:
            return  # the event loop is closed: nobody asks any more


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
