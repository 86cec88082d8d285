"""Who is asking: bearer tokens, and the owner of the other end of a Unix socket.

Only keyed digests of tokens are kept for looking up, so that neither the time of a comparison nor
the table tells anything about a token.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import socket
import struct
from collections.abc import Mapping

from droprd.errors import ConfigError

TOKEN_PATTERN = re.compile(r"[A-Za-z0-9._~+/=-]{1,512}\Z")
_PEER_CREDENTIALS = struct.Struct("3i")


class Tokens:
    """Which peer owns which token."""

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        """`tokens` maps peer names to tokens; peers without a token are left out."""
        self._key = os.urandom(32)
        self._peers: dict[bytes, str] = {}
        self.replace(tokens or {})

    def replace(self, tokens: Mapping[str, str]) -> None:
        """Know exactly these from now on.

        Raises: ConfigError if two peers share a token or a token cannot travel in a header; then
        nothing has changed.
        """
        peers: dict[bytes, str] = {}
        for peer, token in tokens.items():
            if not TOKEN_PATTERN.match(token):
                raise ConfigError(
                    f"the token of {peer} cannot be used",
                    why="a token is 1 to 512 characters of A-Z a-z 0-9 . _ ~ + / = -",
                    hint=f"make a new one: droprctl peer rotate {peer}",
                )
            other = peers.setdefault(self._digest(token), peer)
            if other != peer:
                raise ConfigError(
                    f"the peers {other} and {peer} have the same token",
                    why="the token says who is asking",
                    hint=f"make a new one: droprctl peer rotate {peer}",
                )
        self._peers = peers

    def peer_of(self, authorization: str | None) -> str | None:
        """The peer whose token is in this Authorization header, None if nobody's is."""
        if authorization is None:
            return None
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not TOKEN_PATTERN.match(token):
            return None
        return self._peers.get(self._digest(token))

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._key, token.encode(), hashlib.sha256)


def unix_user(connection: socket.socket) -> int | None:
    """The user id of the process that connected to this Unix socket, None if it is none."""
    if connection.family != socket.AF_UNIX:
        return None
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _pid, uid, _gid = _PEER_CREDENTIALS.unpack(raw)
    return int(uid)
