"""What an operator's requeue or purge has done so far. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FOUND_MAX = 1000


@dataclass(slots=True)
class Fixed:
    """Counts, added up by whoever does it, slice by slice.

    Attributes:
        messages, size: what was done, in messages and bytes (or would be).
        skipped: why messages that are meant were left as they are, and how many.
        found: raw ids that were met, where ids were asked for.
        taken: inbox only: letters sent again, which their log must say are gone.
    """

    messages: int = 0
    size: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    found: set[bytes] = field(default_factory=set)
    taken: list[Any] = field(default_factory=list)

    def did(self, messages: int, size: int) -> None:
        """So many more are done."""
        self.messages += messages
        self.size += size

    def met(self, ids: Iterable[bytes]) -> None:
        """These ids are there; more than a call may ask for are not kept."""
        for one in ids:
            if len(self.found) < FOUND_MAX:
                self.found.add(one)

    def add(self, other: Mapping[str, Any]) -> None:
        """Take in what `as_map` made elsewhere."""
        self.did(other["messages"], other["bytes"])
        self.skipped.update(other["skipped"])
        self.found.update(other.get("found", ()))

    def as_map(self) -> dict[str, Any]:
        """As a value for msgpack."""
        return {
            "messages": self.messages,
            "bytes": self.size,
            "skipped": dict(self.skipped),
            "found": list(self.found),
        }
