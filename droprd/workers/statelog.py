"""One log line when a peer is no longer reached, and one when it is again; none for each try.

Looked at now and then: what fails and recovers between two looks is not worth a line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from droprd import logs

log = logging.getLogger("droprd.sender")

_TROUBLED = frozenset({"throttled", "probing"})


class PeerStates:
    """Knows which peers are in trouble, and says when that changes."""

    def __init__(self) -> None:
        self._troubled: set[str] = set()

    def look(self, states: Mapping[str, tuple[str, str]]) -> None:
        """`states`: per peer its state, and its last error."""
        self._troubled &= set(states)
        for peer, (state, why) in states.items():
            if state in _TROUBLED and peer not in self._troubled:
                self._troubled.add(peer)
                logs.event(log, logging.WARNING, "peer not reached", peer=peer, why=why or None)
            elif state == "open" and peer in self._troubled:
                self._troubled.discard(peer)
                logs.event(log, logging.INFO, "peer reached again", peer=peer)
