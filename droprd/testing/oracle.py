"""What a simulation may conclude from what `send()` returned and from what came out, nothing else.

    accepted   send() returned: the message arrives once, or ends in a way that the oracle is told
    refused    send() raised SpoolFull or the like: the message must never be seen
    unknown    the process died, or SendInDoubt was raised: at most once

Order (P2): if one send returned before another on the same lane began, it comes first. Excused are
sends of different boots between which no sender ran, and sends of different copies of a spool.

Raises: Violation.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from droprd.model import Lane
from droprd.testing.simulation import Violation

NOT_YET = 1 << 62


class Fate(enum.Enum):
    """What the sending application knows."""

    UNKNOWN = "unknown"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass(slots=True)
class Sent:
    """One message as the application saw it go. Times count events of the simulation."""

    serial: int
    lane: Lane
    copy: Copy
    boot_id: bytes
    began: int
    ended: int = NOT_YET
    fate: Fate = Fate.UNKNOWN
    may_expire: bool = False


@dataclass(eq=False, slots=True)
class Copy:
    """One life line of a spool. A restored or doubled spool begins a new one.

    Attributes:
        parent, forked: the line it was copied from, and when.
        boots: (boot id, when it began) of its machine, in order.
        sender_ran: when a sender had completed a first round.
        lost: its disk is gone, and with it what had not been delivered or copied.
    """

    parent: Copy | None = None
    forked: int = 0
    boots: list[tuple[bytes, int]] = field(default_factory=list)
    sender_ran: list[int] = field(default_factory=list)
    lost: bool = False

    def knows(self, sent: Sent) -> bool:
        """Whether this line, or one it came from before the fork, made that send."""
        line: Copy | None = self
        until = NOT_YET
        while line is not None:
            if line is sent.copy:
                return sent.began < until and (sent.ended < until or until == NOT_YET)
            until = min(until, line.forked)
            line = line.parent
        return False


class Oracle:
    """Every message by its serial number, which is what its body begins with."""

    def __init__(self) -> None:
        self.now = 0
        self.sent: list[Sent] = []
        self.ids: dict[str, int] = {}
        self.copies: list[Copy] = []

    def tick(self) -> int:
        """The next moment."""
        self.now += 1
        return self.now

    def copy(self, parent: Copy | None = None, forked: int = 0) -> Copy:
        """A new spool, or one that is copied from another."""
        copy = Copy(parent, forked)
        self.copies.append(copy)
        return copy

    def begin(self, lane: Lane, copy: Copy, boot_id: bytes) -> Sent:
        """A send begins."""
        sent = Sent(len(self.sent), lane, copy, boot_id, self.tick())
        self.sent.append(sent)
        return sent

    def end(self, sent: Sent, fate: Fate, message_id: str = "") -> None:
        """It returned or raised."""
        sent.fate = fate
        sent.ended = self.tick() if fate is Fate.ACCEPTED else NOT_YET
        if message_id:
            if message_id in self.ids:
                raise Violation(f"two messages have the id {message_id}")
            self.ids[message_id] = sent.serial

    # -- checks --------------------------------------------------------------------------------

    def check_once(self, serials: Sequence[int], where: str) -> None:
        """Nothing twice, nothing that was refused."""
        if len(set(serials)) != len(serials):
            twice = sorted(s for s in set(serials) if serials.count(s) > 1)
            raise Violation(f"{where}: messages {twice} are there twice")
        for serial in serials:
            if self.sent[serial].fate is Fate.REFUSED:
                raise Violation(f"{where}: message {serial} was refused and is there")

    def check_order(self, serials: Sequence[int], where: str) -> None:
        """P2 for the messages of one lane, in the order in which they were found."""
        sent = self.sent
        latest = -1
        for index, serial in enumerate(serials):
            this = sent[serial]
            if this.ended < latest:
                for before in serials[:index]:
                    other = sent[before]
                    if this.ended < other.began and not self._excused(this, other):
                        raise Violation(
                            f"{where}: message {serial} comes after {before}, "
                            "whose send began after its own had returned"
                        )
            latest = max(latest, this.began)

    def _excused(self, first: Sent, second: Sent) -> bool:
        if not (first.copy.knows(second) or second.copy.knows(first)):
            return True
        if first.boot_id == second.boot_id:
            return False
        began = next(
            (at for line, _ in _lineage(first.copy) for b, at in line.boots if b == first.boot_id),
            0,
        )
        return not any(
            began < ran < min(second.began, until)
            for line, until in _lineage(second.copy)
            for ran in line.sender_ran
        )

    def check_all_there(self, found: set[int], settled: set[int], where: str) -> None:
        """Every accepted message that some spool still held was found, or ended otherwise."""
        for sent in self.sent:
            if (
                sent.fate is Fate.ACCEPTED
                and not sent.may_expire
                and sent.serial not in found
                and sent.serial not in settled
                and any(not line.lost and line.knows(sent) for line in self.copies)
            ):
                raise Violation(f"{where}: message {sent.serial} was accepted and is lost")


def _lineage(copy: Copy) -> list[tuple[Copy, int]]:
    """The line and those it came from, each with the moment until which it counts."""
    lines = [(copy, NOT_YET)]
    while (parent := lines[-1][0].parent) is not None:
        lines.append((parent, min(lines[-1][1], lines[-1][0].forked)))
    return lines
