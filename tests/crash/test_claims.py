"""Consumers and the janitor on a simulated disk that kills, cuts the power, and fails.

Each seed is one history of leases, acks, syncs and compactions of one claims file by processes that
die and come again. What was acked stays acked whoever dies; what was acked and synced stays so
after a power cut; nothing is ever settled that nobody settled.
"""

from __future__ import annotations

from random import Random

import pytest

from droprd.core.claimops import Now, op_ack, op_end, op_lease
from droprd.core.claims import Claims
from droprd.errors import SpoolBusy, SpoolCorrupt
from droprd.spool.claims import ClaimsFile, create_claims
from droprd.testing.simdisk import SimDisk
from droprd.testing.simfs import NEVER, Crash, Fault, SimFs

PATH = "/claims"
BOOT = b"b" * 16
STRIKES = (None, None, None, None, "kill", "power", Fault.DIE_HALFWAY, Fault.ENOSPC, Fault.EIO)
ATTEMPTS_MAX = 1 << 30


class Lost(AssertionError):
    """The history broke a promise."""


class History:
    """One history, drawn from its seed."""

    def __init__(self, seed: int, disable_sites: frozenset[str] = frozenset()) -> None:
        self.rng = Random(seed)
        self.disk = SimDisk(disable_sites=disable_sites)
        create_claims(
            SimFs(self.disk, self.rng), PATH, log_id=b"i" * 16, spool_id=bytes(16), wall_ns=1
        )
        self.disk.sync_all()
        self.processes: dict[str, tuple[SimFs, ClaimsFile, bytes]] = {}
        self.held: dict[str, list[tuple[int, int]]] = {}
        self.acked_by: dict[str, set[int]] = {}
        self.acked: set[int] = set()
        self.durable: set[int] = set()
        self.undecided: set[int] = set()

    def run(self) -> None:
        for _ in range(self.rng.randrange(10, 60)):
            self.step(self.rng.choice(("anna", "ben", "janitor")))
            if self.rng.random() < 0.2:
                self.check()
        self.check()
        self.power_cut()
        self.check()

    def process(self, name: str) -> tuple[SimFs, ClaimsFile, bytes]:
        if name not in self.processes or not self.processes[name][0].alive:
            fs = SimFs(self.disk, self.rng, name)
            self.processes[name] = fs, ClaimsFile(fs, PATH, BOOT), self.rng.randbytes(16)
            self.held[name] = []
            self.acked_by[name] = set()
        return self.processes[name]

    def alive(self) -> set[bytes]:
        return {consumer for fs, _, consumer in self.processes.values() if fs.alive}

    def step(self, name: str) -> None:
        rng = self.rng
        fs, claims, consumer = self.process(name)
        strike = rng.choice(STRIKES)
        if strike is not None:
            fs.alarm = fs.steps + rng.randrange(1, rng.choice((7, 16)))

        def interrupt(fs: SimFs, operation: str) -> Fault | None:
            if not isinstance(strike, Fault):
                fs.die()
                return None
            return strike

        fs.interrupt = interrupt
        acking: set[int] = set()
        try:
            if name == "janitor":
                self.tend(claims)
            else:
                self.consume(name, claims, consumer, acking)
        except Crash:
            self.undecided |= acking
        except OSError:
            # The note of an ack that failed does not count, but a crash may bring it back.
            self.undecided |= acking
        except (SpoolCorrupt, SpoolBusy):
            pass
        fs.alarm = NEVER
        if strike == "power" and not fs.alive:
            self.power_cut()

    def consume(self, name: str, claims: ClaimsFile, consumer: bytes, acking: set[int]) -> None:
        rng, now = self.rng, Now(BOOT, 0, 0)
        held = self.held[name]
        for _ in range(rng.randrange(1, 4)):
            if held and rng.random() < 0.5:
                number, seq = held.pop(rng.randrange(len(held)))
                with claims.locked() as state:
                    if state.holds(number, seq, seq + 1, now):
                        acking.add(seq)
                        claims.append([op_ack(number, [(seq, seq + 1)])])
                        acking.discard(seq)
                        self.acked.add(seq)
                        self.acked_by[name].add(seq)
            elif rng.random() < 0.7:
                with claims.locked() as state:
                    first, end, _ = next(state.candidates(now))
                    last = min(first + rng.randrange(1, 4), end or NEVER)
                    number = state.lease_next
                    claims.append([op_lease(consumer, BOOT, NEVER, [(first, last)])])
                held += [(number, seq) for seq in range(first, last)]
            else:
                claims.sync()  # speaks for what this process settled
                self.durable |= self.acked_by[name] & self.acked

    def tend(self, claims: ClaimsFile) -> None:
        rng = self.rng
        settled = set(self.acked)
        try:
            with claims.locked() as state:
                if state.sync_failed:
                    raise SpoolCorrupt("a sync failed")
                for number, lease in list(state.leases.items()):
                    if lease.consumer not in self.alive():
                        claims.append([op_end(number, ATTEMPTS_MAX, 1)])
                if rng.random() < 0.3:
                    claims.replace(rng.randbytes(16), 1)
                    self.durable |= settled
        except SpoolCorrupt:
            if claims.salvage(rng.randbytes(16), bytes(16), 1):
                self.durable |= settled
            return
        if rng.random() < 0.5:
            settled = set(self.acked)
            claims.look()
            claims.sync()  # speaks for what everybody settled before that look
            self.durable |= settled

    def power_cut(self) -> None:
        for fs, _, _ in self.processes.values():
            fs.die()
        self.disk.power_cut(self.rng)
        self.undecided |= self.acked - self.durable
        self.acked &= self.durable

    def check(self) -> None:
        fs = SimFs(self.disk, self.rng, "reader")
        reader = ClaimsFile(fs, PATH, BOOT)
        try:
            state = reader.look()
        except SpoolCorrupt as error:
            raise Lost(f"the claims are damaged: {error}") from error
        settled = {seq for seq in range(state.fresh) if not self.is_open(state, seq)}
        if not self.acked <= settled:
            raise Lost(f"acked, and offered again: {sorted(self.acked - settled)}")
        if not settled <= self.acked | self.undecided:
            raise Lost(f"settled by nobody: {sorted(settled - self.acked - self.undecided)}")
        fs.die()

    @staticmethod
    def is_open(state: Claims, seq: int) -> bool:
        leased = any(lease.open.get(seq) is not None for lease in state.leases.values())
        return leased or bool(state.idle(seq, seq + 1))


@pytest.mark.parametrize("seed", range(0, 1200, 200))
def test_acks_survive_what_they_promise_to(seed: int) -> None:
    for each in range(seed, seed + 200):
        try:
            History(each).run()
        except Lost as error:
            pytest.fail(f"seed {each}: {error}")


@pytest.mark.parametrize(
    "site", ["claims.sync", "claims.name", "claims.compact", "claims.compact_dir"]
)
def test_the_simulation_notices_a_sync_that_is_left_out(site: str) -> None:
    for seed in range(3000):
        try:
            History(seed, frozenset([site])).run()
        except Lost:
            return
    pytest.fail(f"nothing was lost without the sync {site}")
