"""Peerflow, pace and schedule together, on a simulated line of 8 kB/s that is cut every 10 s."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from droprd.core.peerflow import PeerFlow, Ticket
from droprd.core.schedule import Schedule
from droprd.model import KIB, Lane

STEP_S = 0.02


@dataclass
class Request:
    ticket: Ticket
    frames: dict[Lane, int]
    left: float
    answer_at_s: float | None = None


@dataclass
class SlowLine:
    """A line shared evenly by all requests; all of them break each `cut_every_s` seconds."""

    rate: float
    delay_s: float
    cut_every_s: float
    seed: int
    now_s: float = 0.0
    queues: dict[Lane, deque[tuple[int, float]]] = field(default_factory=dict)
    arrivals: list[tuple[Lane, float, float]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        self.flow = PeerFlow(random.Random(self.seed).random, 0.0)
        self.schedule = Schedule()
        greeting = self.flow.start(0.0)
        self.now_s = self.delay_s
        self.flow.accepted(greeting, self.now_s)

    def put(self, lane: Lane, size: int) -> None:
        self.queues.setdefault(lane, deque()).append((size, self.now_s))
        self.schedule.wake(lane)

    def run(self, until_s: float) -> None:
        while self.now_s < until_s:
            before = self.now_s
            self.now_s += STEP_S
            if self.now_s // self.cut_every_s != before // self.cut_every_s:
                self.cut()
            self.move()
            self.pump()

    def pump(self) -> None:
        while (urgency := self.schedule.urgency()) is not None:
            budget = self.flow.budget(self.now_s, urgency, self.schedule.ready)
            batch = budget and self.schedule.open(budget.bytes, urgent=budget.urgent)
            if not batch:
                return
            frames: dict[Lane, int] = {}
            total = 0
            while (offer := batch.next()) is not None:
                size = count = 0
                for frame, _ in self.queues[offer.lane]:
                    if count and size + frame > offer.bytes_max:
                        break
                    size, count = size + frame, count + 1
                batch.took(size)
                frames[offer.lane] = count
                total += size
            ticket = self.flow.start(self.now_s, batch.priority, total)
            self.requests.append(Request(ticket, frames, total + 300))
            in_flight = sum(r.ticket.flight.bytes for r in self.requests)
            self.most_in_flight = max(self.most_in_flight, in_flight)

    def move(self) -> None:
        sending = [r for r in self.requests if r.left > 0]
        for request in sending:
            request.left -= self.rate * STEP_S / len(sending)
            if request.left <= 0:
                request.answer_at_s = self.now_s + self.delay_s
        for request in list(self.requests):
            if request.answer_at_s is not None and request.answer_at_s <= self.now_s:
                self.requests.remove(request)
                self.flow.accepted(request.ticket, self.now_s)
                for lane, count in request.frames.items():
                    for _ in range(count):
                        _, put_s = self.queues[lane].popleft()
                        self.arrivals.append((lane, put_s, self.now_s))
                    self.schedule.accepted(lane)
                    self.schedule.landed(lane, more=bool(self.queues[lane]))

    def cut(self) -> None:
        for request in self.requests:
            self.flow.failed(request.ticket, self.now_s, "reset", broken=True)
            for lane in request.frames:
                self.schedule.landed(lane, more=True)
        self.requests.clear()


BACKLOG = [Lane("berlin", channel, 5) for channel in ("a", "b", "c")]
URGENT = Lane("berlin", "alarm", 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_backlog_drains_over_64_kbit_that_is_cut_every_ten_seconds(seed: int) -> None:
    line = SlowLine(rate=8_000, delay_s=0.1, cut_every_s=10, seed=seed)
    for i in range(30):
        line.put(BACKLOG[i % 3], 33 * KIB)
    line.run(600)
    assert len(line.arrivals) == 30
    # What the cuts cost stays bounded: the transfer alone would take 127 s.
    assert line.arrivals[-1][2] < 300


@pytest.mark.parametrize("seed", range(20))
def test_an_urgent_message_arrives_within_ten_seconds_over_that_line(seed: int) -> None:
    line = SlowLine(rate=8_000, delay_s=0.1, cut_every_s=10, seed=seed)
    for i in range(100):
        line.put(BACKLOG[i % 3], 33 * KIB)
    rng = random.Random(seed)
    for i in range(1, 20):
        line.run(10 * i + 10 * rng.random())
        line.put(URGENT, 500)
    line.run(230)
    took = [arrived - put for lane, put, arrived in line.arrivals if lane is URGENT]
    assert len(took) == 19
    assert max(took) < 10


@pytest.mark.parametrize("rate", [8_000, 50_000, 1_000_000])
def test_what_is_under_way_is_about_two_seconds_and_a_few_frames(rate: int) -> None:
    line = SlowLine(rate=rate, delay_s=0.05, cut_every_s=1e9, seed=1)
    for i in range(3 * rate // 1000):
        line.put(BACKLOG[i % 3], 33 * KIB)
    line.run(60)
    assert line.most_in_flight <= 2.5 * rate + 2 * 33 * KIB


@pytest.mark.parametrize("delay_s", [0.001, 0.05, 0.6])
def test_a_line_of_one_megabyte_a_second_is_filled(delay_s: float) -> None:
    line = SlowLine(rate=1_000_000, delay_s=delay_s, cut_every_s=1e9, seed=1)
    for i in range(3000):
        line.put(BACKLOG[i % 3], 33 * KIB)
    line.run(30)
    sent = len(line.arrivals) * 33 * KIB
    line.run(60)
    assert len(line.arrivals) * 33 * KIB - sent > 0.85 * 30 * 1_000_000
