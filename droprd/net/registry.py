"""Which transport carries a URL: droprd's own, or one that another package offers.

Owns the choice by scheme. droprd brings `https`, `http` and `unix`; any other scheme is looked up
among the entry points of the group `droprd.transports`, each a callable that takes
`TransportOptions` and returns a `Transport`.

Raises ConfigError for a scheme that nothing carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

from droprd.errors import ConfigError
from droprd.net.push import CurlTransport
from droprd.net.transport import (
    Reply,
    Request,
    Transport,
    TransportFactory,
    TransportOptions,
    scheme_of,
)

ENTRY_POINT_GROUP = "droprd.transports"

BUILT_IN: Mapping[str, TransportFactory] = {
    "https": CurlTransport,
    "http": CurlTransport,
    "unix": CurlTransport,
}


def transport_factory(scheme: str) -> TransportFactory:
    """The maker of transports for `scheme`: droprd's own, else an installed package's.

    Raises: ConfigError if there is none, or if the package that offers it cannot be loaded.
    """
    if scheme in BUILT_IN:
        return BUILT_IN[scheme]
    found = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == scheme]
    if not found:
        raise ConfigError(
            f"no transport for {scheme}: addresses",
            why=f"known are {', '.join(known_schemes())}",
            hint=f"use one of these, or install the package that brings {scheme}",
        )
    try:
        factory = found[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the transport for {scheme}: addresses cannot be loaded",
            why=f"{found[0].value}: {error}",
            hint="repair or remove the package that offers it",
        ) from error
    if not callable(factory):
        raise ConfigError(
            f"the transport for {scheme}: addresses cannot be used",
            why=f"{found[0].value} is no callable",
            hint="it must take TransportOptions and return a Transport",
        )
    made: TransportFactory = factory
    return made


def known_schemes() -> list[str]:
    """All schemes for which a transport is installed, sorted."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


class Transports:
    """The transports of one peer, made when their scheme is first used."""

    def __init__(self, options: TransportOptions | None = None) -> None:
        self._options = options or TransportOptions()
        self._made: dict[TransportFactory, Transport] = {}

    async def exchange(self, request: Request) -> Reply:
        """Like `Transport.exchange`, by the scheme of `request.url`.

        Raises: TransportError, ConfigError (no transport for this scheme).
        """
        factory = transport_factory(scheme_of(request.url))
        transport = self._made.get(factory)
        if transport is None:
            transport = self._made[factory] = factory(self._options)
        return await transport.exchange(request)

    async def aclose(self) -> None:
        """Close them all."""
        made, self._made = self._made, {}
        for transport in made.values():
            await transport.aclose()
