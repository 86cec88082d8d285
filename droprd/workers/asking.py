"""Asking: one request to one peer and what to make of the answer, or of there being none.

Owns the peer's addresses, its token and its connections. One `Asking` stands for
one version of the peer's settings; when retired it lasts until its requests have ended.

Raises nothing: every failure is a value, `Failure`, with a text for `why PEER`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from droprd.core.judgement import Judgement, judge
from droprd.core.peerflow import PeerFlow, Ticket
from droprd.core.problem import decode_problem
from droprd.core.push import VERSION
from droprd.errors import ConfigError
from droprd.net.credentials import TOKEN_PATTERN
from droprd.net.registry import Transports
from droprd.net.transport import (
    Piece,
    Reply,
    Request,
    TransportError,
    TransportOptions,
)
from droprd.settings.values import PeerSettings

TOKEN_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that brought no answer to work with. `broke`: there was no HTTP answer at all."""

    judgement: Judgement
    text: str
    retry_after_s: int | None = None
    broke: bool = False

    def blames(self, frames: int) -> bool:
        """Whether the fault may lie in what was sent, `frames` frames."""
        if self.judgement is Judgement.SMALLER and not self.broke:
            return frames <= 1
        return self.judgement is Judgement.BLAMED

    def tell(self, flow: PeerFlow, ticket: Ticket, now_s: float) -> None:
        """Let the flow draw its conclusion."""
        if self.judgement is Judgement.WAIT:
            flow.refused(ticket, now_s, self.text, self.retry_after_s)
        else:
            broken = self.judgement is Judgement.SMALLER
            flow.failed(ticket, now_s, self.text, broken=broken)


class Asking:
    """Asks one peer, as one version of its settings says."""

    def __init__(self, peer: str, settings: PeerSettings, addresses: tuple[str, ...]) -> None:
        self.peer = peer
        self.addresses = addresses
        self._settings = settings
        self._token: str | None = None
        self._under_way = 0
        self._retired = False
        # One more than requests: the greeting.
        connections = settings.requests_in_flight_max + 1
        self._transports = Transports(TransportOptions(connections_max=connections))

    async def retire(self) -> None:
        """Close all connections once what is under way has ended; ask nothing new."""
        self._retired = True
        if not self._under_way:
            await self._transports.aclose()

    def forget_token(self) -> None:
        """Read the token's file again before the next request."""
        self._token = None

    async def ask(
        self,
        address: int,
        method: str,
        path: str,
        pieces: Sequence[Piece],
        *,
        careful: bool = False,
        lanes: int = 0,
    ) -> Reply | Failure:
        """The peer's answer, or what to make of there being none.

        `address` is an index; `careful` asks for consent before the body; `lanes` is how many
        lanes the request carries.
        """
        self._under_way += 1
        try:
            return await self._exchange(address, method, path, pieces, careful, lanes)
        finally:
            self._under_way -= 1
            if self._retired and not self._under_way:
                await self._transports.aclose()

    async def _exchange(
        self,
        address: int,
        method: str,
        path: str,
        pieces: Sequence[Piece],
        careful: bool,
        lanes: int,
    ) -> Reply | Failure:
        try:
            reply = await self._transports.exchange(
                Request(
                    "PUT" if method == "PUT" else "POST",
                    self.addresses[address],
                    path,
                    pieces,
                    token=self._read_token(),
                    headers={"Droprd-Version": str(VERSION)},
                    expect_continue=careful,
                    connect_timeout_s=self._settings.connect_timeout_s,
                )
            )
        except TransportError as error:
            broken = error.kind == "reset" or (error.kind == "timeout" and error.bytes_sent > 0)
            judgement = Judgement.SMALLER if broken else Judgement.UNREACHABLE
            if error.kind == "local" and lanes:
                judgement = Judgement.BLAMED
            return Failure(judgement, str(error), broke=True)
        except ConfigError as error:
            return Failure(Judgement.UNREACHABLE, str(error))
        judgement = judge(reply.status)
        if judgement is Judgement.ANSWERED:
            return reply
        problem = decode_problem(reply.status, reply.body)
        text = str(problem or f"HTTP status {reply.status}, from something that is no droprd")
        return Failure(judgement, text, reply.retry_after_s)

    def _read_token(self) -> str | None:
        """The peer's token, read once. Raises: ConfigError."""
        path = self._settings.token_file
        if self._token is not None or not path:
            return self._token
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                token = os.read(fd, TOKEN_BYTES_MAX).decode("ascii", "replace").strip()
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError(
                f"the token of {self.peer} cannot be read",
                why=f"{path}: {error.strerror}",
                hint=f"droprctl peer rotate {self.peer}",
            ) from error
        if not TOKEN_PATTERN.match(token):
            raise ConfigError(
                f"the token of {self.peer} cannot be used",
                why=f"{path} does not hold one token on one line",
                hint=f"droprctl peer rotate {self.peer}",
            )
        self._token = token
        return token
