"""Watches the inbox of a simulated node: what was there stays, once and in order, until settled.

It remembers all that it saw by stream and seq: what is deleted meanwhile is not forgotten.
"""

from __future__ import annotations

from random import Random

from droprd.model import Lane
from droprd.testing.oracle import Oracle
from droprd.testing.simdisk import SimDisk
from droprd.testing.simfs import SimFs
from droprd.testing.simreceiver import Seen, read_inbox
from droprd.testing.simsender import Sender, dead_letters
from droprd.testing.simulation import Violation


class InboxWatch:
    """What is known of an inbox from outside.

    Attributes:
        tried: messages that some consumer began to ack; nobody else may end one.
        acked: messages whose acks were synced; they must not come again.
        order_holds: false once an operator had messages sent again (P2's exception).
    """

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.known: Seen = {}
        self.tried: set[int] = set()
        self.acked: set[int] = set()
        self.order_holds = True

    @property
    def serials(self) -> set[int]:
        """All messages that ever were in it."""
        return {serial for here in self.known.values() for _, serial in here.values()}

    def put_back(self) -> None:
        """The inbox is that of an older copy now."""
        self.known.clear()
        self.acked.clear()
        self.order_holds = False

    def check(self, disk: SimDisk, *, recovered: bool = False) -> None:
        """What was there is there, or was settled and deleted; the rest is checked as a whole.

        Until the receiver has recovered, a power cut may have taken back what was published.
        """
        found, begins = read_inbox(SimFs(disk, Random(0), "checker"))
        everything: list[int] = []
        for key in sorted(self.known.keys() | found.keys()):
            before, here = self.known.get(key, {}), found.get(key, {})
            for seq, what in before.items():
                if here.get(seq, what) != what:
                    raise Violation(f"{key}: seq {seq} was {what}, now it is {here[seq]}")
                is_gone = seq not in here and (recovered or seq < begins.get(key, 0))
                may_expire = self._oracle.sent[what[1]].may_expire
                if is_gone and what[1] not in self.tried and not may_expire:
                    raise Violation(f"{key}: message {what[1]} is gone, and nobody had acked it")
            self.known[key] = before | here
            in_order = [what for _, what in sorted(self.known[key].items())]
            everything += [serial for _, serial in in_order]
            if self.order_holds:
                for peer in sorted({sender for sender, _ in in_order}):
                    serials = [serial for sender, serial in in_order if sender == peer]
                    self._oracle.check_order(serials, f"{peer} in {key}")
        self._oracle.check_once(everything, "inbox")

    def expect_acked_ones_not(self, serial: int) -> None:
        """A consumer got this message."""
        if serial in self.acked:
            raise Violation(f"message {serial} was acked for good, and came again")


def check_counts(sender: Sender) -> None:
    """P3: accepted = queued + delivered + dead + expired + purged."""
    for state in sender.store.state.lanes.values():
        waiting = state.accepted - state.ended.total
        if waiting < 0 or (state.is_idle and waiting):
            raise Violation(f"{state.lane}: {state.accepted} accepted, ended {state.ended}")


def dead_serials(disk: SimDisk, oracle: Oracle) -> set[int]:
    """The messages in a node's outbox/dead.log, as far as their ids are known."""
    letters = dead_letters(SimFs(disk, Random(0), "checker"))
    return {oracle.ids[letter] for letter in letters if letter in oracle.ids}


def of_lane(serials: set[int], lane: Lane, oracle: Oracle) -> set[int]:
    """Those that were sent on one lane."""
    return {serial for serial in serials if oracle.sent[serial].lane == lane}
