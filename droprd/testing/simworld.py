"""The whole way, crashed at every step: producers, senders, network, receiver, consumers.

Two nodes send to a third. A seed decides what happens: kills and power cuts at file operations,
lost, late and repeated requests and answers, clock jumps, disks that fail; and in some worlds one
*calamity*: a sender's spool put back from an older copy, run twice, or the receiver's put back.

After that the faults stop, and everything must drain. The oracle (`droprd.testing.oracle`) checks
P1, P2 and P3 by what `send()` returned and what is in the inbox.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random

from droprd.model import Lane
from droprd.spool.judging import Limits, PeerLimits
from droprd.spool.log import LogBroken
from droprd.testing.oracle import Copy, Oracle
from droprd.testing.simdisk import SimDisk
from droprd.testing.simnet import Network
from droprd.testing.simproducer import check_kept, make_node_spool
from droprd.testing.simreceiver import Consumer, Janitor, Receiver
from droprd.testing.simsender import Sender, SendingNode
from droprd.testing.simulation import (
    Chaos,
    Crash,
    Machine,
    Rates,
    SimFs,
    SimTime,
    Violation,
)
from droprd.testing.simwatch import InboxWatch, check_counts, dead_serials, of_lane

STOCK = Lane("berlin", "stock", 5)
LANES = [Lane("berlin", "sites", 5), Lane("berlin", "sites", 0), STOCK]
CHANNELS = ["sites", "stock"]
FOREVER_S = 1e9
LONG_S = 40
DRAIN_TURNS = 400


class World:
    """One simulated world."""

    def __init__(
        self,
        seed: int,
        disable_sites: frozenset[str] = frozenset(),
        calamities: tuple[str, ...] = ("", "", "sender", "twin", "receiver"),
    ) -> None:
        rng = self.rng = Random(seed)
        self.calamity = rng.choice(calamities)
        self.chaos = Chaos(
            rng,
            Rates(
                per_step=rng.choice((0.01, 0.04, 0.15)),
                others=rng.choice((2, 8)),
                kill=1,
                power=rng.choice((0.3, 2)),
                error=rng.choice((0, 0, 0.2)),
            ),
            run_others=self._run_others,
        )
        self.time = SimTime()
        self.oracle = Oracle()
        self.network = Network(rng)
        self.retain_s = FOREVER_S if self.calamity == "receiver" else rng.choice((0, FOREVER_S))
        subsets = rng.random() < 0.3
        blob_share = rng.choice((0.03, 0.03, 0.5))
        self.nodes: list[SendingNode] = []
        for peer, producers in (("hamburg", rng.choice((1, 3))), ("kiel", 1)):
            disk = SimDisk(disable_sites=disable_sites)
            disk.subsets_only = subsets
            node = self._sending_node(peer, disk, self.oracle.copy(), producers)
            make_node_spool(node.machine)
            for producer in node.producers:
                producer.blob_share = blob_share
            self.nodes.append(node)
        disk = SimDisk(disable_sites=disable_sites)
        disk.subsets_only = subsets
        self.berlin = Machine("berlin", disk, self.time, rng, self.chaos)
        make_node_spool(self.berlin)
        # Now and then a peer may not use a channel: what it sends there becomes dead letters.
        self.banned = rng.random() < 0.2
        peers = {"kiel": PeerLimits(channels=frozenset({"sites"}))} if self.banned else {}
        self.limits = Limits(segment_bytes_max=9_000, peers=peers)
        self.receiver: Receiver | None = None
        self.consumers: list[Consumer] = []
        self.alive: dict[bytes, SimFs] = {}
        self.saved_inbox: SimDisk | None = None
        self.janitor: Janitor | None = None
        self.watch = InboxWatch(self.oracle)
        self.excused: set[int] = set()
        self.running: set[object] = set()

    @property
    def syncs(self) -> dict[str, int]:
        """How often each sync site was used."""
        total: dict[str, int] = {}
        for machine in self._machines():
            for site, count in machine.disk.syncs.items():
                total[site] = total.get(site, 0) + count
        return total

    def _sending_node(self, peer: str, disk: SimDisk, copy: Copy, producers: int) -> SendingNode:
        machine = Machine(peer, disk, self.time, self.rng, self.chaos)
        return SendingNode(machine, self.oracle, self.rng, copy, producers)

    def _machines(self) -> list[Machine]:
        return [*(node.machine for node in self.nodes), self.berlin]

    # -- running -------------------------------------------------------------------------------

    def run(self, crashes: int, actions: int = 500) -> int:
        """Go on until so many crashes or actions, then heal and drain. Returns the crashes."""
        when = self.rng.randrange(20, 120)
        for turn in range(actions):
            if self.chaos.crashes >= crashes and turn > when:
                break
            if turn == when // 2:
                self._save()
            if turn == when:
                self._calamity()
            self.act()
        self._drain()
        return self.chaos.crashes

    def act(self) -> None:
        """One thing that happens somewhere."""
        rng = self.rng
        draw = rng.random()
        node = rng.choice(self.nodes)
        if draw < 0.25:
            self.send(node)
        elif draw < 0.5:
            self.run_sender(node)
        elif draw < 0.8:
            self.run_receiver()
        elif draw < 0.86:
            self.run_consumer()
        elif draw < 0.88:
            self.run_janitor()
        elif draw < 0.91:
            self.time.pass_s(rng.choice((0.1, 6, LONG_S)))
        elif draw < 0.93:
            node.machine.clock.wall_offset_ns += rng.choice((-1, 1)) * 86_400 * 10**9
        elif draw < 0.95 and node.sender is not None:
            node.sender.give_up()
        elif draw < 0.97:
            self._strike(rng.choice([node.machine, self.berlin]))
        elif draw < 0.98:
            rng.choice(node.producers).leave()
        else:
            self._operator(node)

    def _strike(self, machine: Machine) -> None:
        """A crash between two operations of a process."""
        self.chaos.crashes += 1
        if self.rng.random() < 0.5 and machine.processes:
            self.rng.choice(machine.processes).die()
        else:
            machine.power_cut()

    def _run_others(self, fs: SimFs) -> None:
        draw = self.rng.random()
        node = self.rng.choice(self.nodes)
        if draw < 0.4:
            self.send(node)
        elif draw < 0.6:
            self.run_sender(node)
        elif draw < 0.9:
            self.run_receiver()
        else:
            self.run_consumer()

    def _guard(self, who: object, machine: Machine, what: Callable[[], None]) -> None:
        """Let a process do something, unless it is in the middle of something; it may die of it."""
        if who in self.running:
            return
        self.running.add(who)
        try:
            what()
        except Crash:
            pass
        except LogBroken:
            machine.power_cut()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                machine.kill_all()
            else:
                # The disk failed: its cache lies to all, so the machine is started again.
                machine.power_cut()
        finally:
            self.running.discard(who)

    def send(self, node: SendingNode) -> None:
        """Some application on a node sends."""
        node.note_boot(self.oracle.now)
        producer = self.rng.choice(node.producers)
        self._guard(producer, node.machine, lambda: producer.send(LANES, node.copy))

    def run_sender(self, node: SendingNode) -> None:
        """The sender of a node works, and hears an answer."""
        node.note_boot(self.oracle.now)
        self._guard(node, node.machine, lambda: self._work(node))

    def _work(self, node: SendingNode) -> None:
        sender = node.sender
        if sender is None or not sender.fs.alive:
            node.sender = None
            sender = Sender(node.machine, self.network, self.rng, node.peer, retain_s=self.retain_s)
            node.sender = sender
            check_counts(sender)
        began = self.oracle.now
        was_first = not sender.first_round_done
        sender.work(calm=self.chaos.quiet)
        if was_first and sender.first_round_done:
            node.copy.sender_ran.append(began)
        for _ in range(len(self.network.replies) if self.chaos.quiet else 1):
            if self.chaos.quiet or self.rng.random() < 0.7:
                self._hear(sender)

    def _hear(self, sender: Sender) -> None:
        """An answer arrives; one for another sender goes on waiting."""
        reply = self.network.next_reply()
        if reply is None:
            return
        asker = reply.request.asker
        if asker is sender:
            sender.hear(reply)
        elif isinstance(asker, Sender) and asker.fs.alive:
            self.network.replies.append(reply)

    def run_receiver(self) -> None:
        """A request arrives at the receiver, or it commits."""
        receiver = self.receiver
        if self in self.running and receiver is not None and receiver.writing:
            self._guard("taking", self.berlin, lambda: self._take(receiver))
        else:
            self._guard(self, self.berlin, self._receive)

    def _receive(self) -> None:
        receiver = self.receiver
        if receiver is None or not receiver.fs.alive:
            self.receiver = None
            receiver = Receiver(self.berlin, self.network, self.rng, self.limits)
            self.receiver = receiver
            self.watch.check(self.berlin.disk, recovered=True)
        self._take(receiver)
        if self.chaos.quiet or self.rng.random() < 0.7:
            receiver.commit()

    def _take(self, receiver: Receiver) -> None:
        request = self.network.next_request()
        if request is not None:
            receiver.take(request)

    def run_consumer(self) -> None:
        """A consumer receives, and acks some of what it has."""
        self._guard("consumer", self.berlin, self._consume)

    def _consume(self) -> None:
        rng = self.rng
        self.consumers = [c for c in self.consumers if c.fs.alive]
        if len(self.consumers) < 2:
            self.consumers.append(Consumer(self.berlin, rng, self.alive))
        consumer = rng.choice(self.consumers)
        for message in consumer.receive(CHANNELS, rng.choice((1, 5, 100))):
            self.watch.expect_acked_ones_not(consumer.serial(message))
        count = len(consumer.messages)
        if not self.chaos.quiet:
            count = rng.randrange(count + 1)
        self.watch.tried.update(map(consumer.serial, consumer.messages[:count]))
        consumer.settle(consumer.messages[:count])
        if self.chaos.quiet or rng.random() < 0.5:
            self.watch.acked |= consumer.sync(CHANNELS)

    def run_janitor(self) -> None:
        """The janitor looks after the inbox."""
        self._guard("janitor", self.berlin, self._tidy)

    def _tidy(self) -> None:
        if self.janitor is None or not self.janitor.fs.alive:
            self.janitor = None
            self.janitor = Janitor(self.berlin, self.alive, self.rng)
        self.watch.check(self.berlin.disk)
        self.janitor.tick()

    # -- calamities ----------------------------------------------------------------------------

    def _save(self) -> None:
        node = self.nodes[0]
        if self.calamity == "sender":
            node.saved = node.machine.disk.clone(), self.oracle.tick()
        elif self.calamity == "receiver":
            self.saved_inbox = self.berlin.disk.clone()

    def _calamity(self) -> None:
        node = self.nodes[0]
        if self.calamity == "sender" and node.saved is not None:
            disk, at = node.saved
            node.machine.kill_all()
            node.machine.disk.put_back(disk)
            node.machine.kept.clear()
            node.machine.clock.reboot()
            node.copy.lost = True
            node.copy = self.oracle.copy(node.copy, at)
        elif self.calamity == "twin":
            disk = node.machine.disk.clone()
            copy = self.oracle.copy(node.copy, self.oracle.tick())
            twin = self._sending_node(node.peer, disk, copy, 1)
            self.nodes.append(twin)
        elif self.calamity == "receiver" and self.saved_inbox is not None:
            self.berlin.kill_all()
            self.berlin.disk.put_back(self.saved_inbox)
            self.berlin.kept.clear()
            self.berlin.clock.reboot()
            self.watch.put_back()

    def _operator(self, node: SendingNode) -> None:
        """Lanes that are held want a decision."""
        sender = node.sender
        if sender is None or not sender.fs.alive or node in self.running:
            return
        for lane in sender.store.held_by_reset("berlin"):
            if self.calamity != "receiver":
                raise Violation(f"{lane} of {node.peer} is held, and the receiver lost nothing")
            mode = self.rng.choice(("replay", "replay", "continue"))
            if mode == "continue":
                self.excused.update(s.serial for s in self.oracle.sent if s.lane == lane)
            sender.reset("replay" if mode == "replay" else "continue", lane)

    # -- the end, and what must hold -----------------------------------------------------------

    def _drain(self) -> None:
        """The faults stop."""
        self.chaos.quiet = True
        self.network.calm = True
        for machine in self._machines():
            machine.power_cut()
        if self.calamity == "receiver":
            # What a restored receiver lacks of a lane is noticed with that lane's next message.
            for node in self.nodes:
                node.note_boot(self.oracle.now)
                for lane in LANES:
                    node.producers[0].send([lane], node.copy)
        for turn in range(DRAIN_TURNS):
            self.time.pass_s(1)
            for node in self.nodes:
                self.run_sender(node)
                self._operator(node)
                if turn % 8 == 7 and node.sender is not None and not self.network.busy:
                    node.sender.give_up()
            for _ in range(4):
                self.run_receiver()
            if turn % 4 == 0 and self._is_drained():
                break
        else:
            raise Violation("it does not drain")
        self.watch.check(self.berlin.disk, recovered=True)
        for node in self.nodes:
            assert node.sender is not None
            check_counts(node.sender)
        for machine in self._machines():
            check_kept(machine)
        self._check_end()

    def _is_drained(self) -> bool:
        return not self.network.busy and all(
            node.sender is not None
            and node.sender.fs.alive
            and not node.sender.matches
            and not node.sender.store.unmerged_bytes()
            and all(s.is_idle for s in node.sender.store.state.lanes.values())
            for node in self.nodes
        )

    def _check_end(self) -> None:
        found = self.watch.serials
        dead: set[int] = set()
        for node in self.nodes:
            here = dead_serials(node.machine.disk, self.oracle)
            if self.banned and node.peer == "kiel":
                dead |= of_lane(here, STOCK, self.oracle)
                here -= dead
            if here and self.calamity not in ("sender", "twin"):
                raise Violation(f"dead letters without a cause: {sorted(here)}")
            dead |= here
        self.oracle.check_all_there(found, dead | self.excused, "inbox")
        expired = {serial for serial in found if self.oracle.sent[serial].may_expire}
        for _ in range(60):
            self.time.pass_s(LONG_S)
            self.run_janitor()
            self.run_consumer()
            self.run_consumer()
            if found - expired <= self.watch.tried and not any(c.messages for c in self.consumers):
                return
        fault = next((c.fault for c in self.consumers if c.fault), "")
        left = sorted(found - expired - self.watch.tried)[:10]
        raise Violation(f"messages {left} are there and cannot be consumed {fault}")
