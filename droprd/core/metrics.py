"""What Prometheus is told of a node: a status document and its judgement as metrics. Pure values.

Labels are bounded: peers and channels beyond `LABELS_MAX` (a peer may open as many channels as it
likes) are summed up as `_other`, which is no valid name of either. Counters count over all
processes of a worker, so that they fall only when the daemon itself starts afresh, or never, where
they are kept on disk. docs/monitoring.md lists every metric; a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

LABELS_MAX: Final = 500
REASONS_MAX: Final = 200
OTHER: Final = "_other"
LEVELS: Final = ("ok", "warning", "critical")

Map = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """One family: `samples` are (label values, value); a counter's name is without `_total`."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    is_counter: bool = False
    samples: list[tuple[tuple[str, ...], float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A metric of one value of a peer or channel; `sum` or `max` joins those of `_other`."""

    name: str
    key: str
    text: str
    join: Callable[[float, float], float]
    is_counter: bool = False


def _add(a: float, b: float) -> float:
    return a + b


_PEER: Final = (
    _Shown("queued_messages", "queued", "Messages accepted and not yet delivered.", _add),
    _Shown("queued_bytes", "bytes", "Bytes of bodies that wait for the peer.", _add),
    _Shown("oldest_age_seconds", "oldest_age_s", "Age of the oldest message that waits.", max),
    _Shown(
        "silence_seconds",
        "accepted_age_s",
        "Since the peer last took anything, while something waits for it.",
        max,
    ),
    _Shown("failures", "attempt", "Failed tries in a row.", max),
    _Shown("delivered_messages", "delivered", "Messages synced in the peer's inbox.", _add, True),
)
_CHANNEL: Final = (
    _Shown("ready_messages", "ready", "Messages that can be taken, delayed ones included.", _add),
    _Shown("leased_messages", "leased", "Messages that a consumer holds.", _add),
    _Shown("dead_messages", "dead", "Dead letters of the inbox.", _add),
    _Shown("oldest_age_seconds", "oldest_age_s", "Age of the oldest message not settled yet.", max),
)
_REACHED: Final = frozenset({"open", "paused", "draining"})


def metrics(status: Map, health: Map) -> list[Metric]:
    """All metrics of the node that `status` describes and `health` judges."""
    peers, channels = _map(status.get("peers")), _map(status.get("channels"))
    return [
        *_node(status, health),
        *_workers(_map(status.get("workers"))),
        *_shown("peer", peers, _PEER),
        _reached(peers),
        *_shown("channel", channels, _CHANNEL),
        _refused(_map(_map(status.get("receiver")).get("refused"))),
    ]


def _node(status: Map, health: Map) -> Iterable[Metric]:
    receiver, spool = _map(status.get("receiver")), _map(status.get("spool"))
    paused = _map(status.get("paused"))
    verdict = health.get("verdict")
    yield Metric(
        "droprd_info",
        "The node and its version.",
        ("node", "version"),
        samples=[((str(status.get("node")), str(status.get("version"))), 1)],
    )
    reasons = [r for r in health.get("reasons", ()) if isinstance(r, Mapping)]
    found = {
        (str(r.get("code")), str(r.get("subject")), str(r.get("level"))): 1.0
        for r in reasons[:REASONS_MAX]  # the worst come first
    }
    yield Metric(
        "droprd_health_reason",
        "Each thing that is not well, as in droprctl health.",
        ("code", "subject", "level"),
        samples=list(found.items()),
    )
    for name, text, value in (
        (
            "health",
            "0 ok, 1 warning, 2 critical, as in droprctl health.",
            LEVELS.index(verdict) if verdict in LEVELS else 2,
        ),
        ("running", "Whether the daemon is neither starting nor stopping.", _is_running(status)),
        ("uptime_seconds", "Since the daemon started.", status.get("uptime_s")),
        ("dead_letters", "Dead letters of outbox and inbox.", status.get("dead_letters")),
        ("corrupt_bytes", "Promised bytes that could not be read.", status.get("corrupt")),
        ("lost_messages", "Messages lost with damaged bytes.", status.get("lost")),
        ("unmerged_bytes", "Bytes in journals, not in lanes yet.", status.get("unmerged_bytes")),
        (
            "merge_age_seconds",
            "Since the sender looked at journals.",
            status.get("last_merge_age_s"),
        ),
        ("spool_bytes", "What the spool takes on its disk.", spool.get("bytes")),
        ("spool_free_bytes", "What is free on that disk.", spool.get("free_bytes")),
        (
            "spool_full_in_seconds",
            "Until that disk is full at the present rate; absent while it does not fill up.",
            spool.get("full_in_s"),
        ),
        ("outbox_full", "Whether send() is refused.", bool(status.get("outbox_full"))),
        ("inbox_full", "Whether peers are told to wait.", bool(receiver.get("full"))),
        (
            "receiving_paused",
            "Whether an operator paused receiving, of all peers or of some.",
            any(_map(one).get("receiving") for one in paused.values()),
        ),
        ("paused_targets", "Pauses in force.", len(paused)),
        ("draining_targets", "Drains in force.", len(status.get("draining", ()))),
    ):
        metric = Metric(f"droprd_{name}", text)
        if isinstance(value, (int, float)):
            metric.samples.append(((), float(value)))
        yield metric
    received = Metric("droprd_received_messages", "Messages taken from peers.", is_counter=True)
    if isinstance(receiver.get("received"), int):
        received.samples.append(((), float(receiver["received"])))
    yield received


def _is_running(status: Map) -> bool:
    return status.get("state") == "running"


def _workers(workers: Map) -> Iterable[Metric]:
    up = Metric("droprd_worker_up", "Whether the worker is ready for work.", ("worker",))
    failures = Metric("droprd_worker_failures", "Its failures in a row.", ("worker",))
    silence = Metric(
        "droprd_worker_silence_seconds",
        "Since it made progress, once that is longer than half of hang_timeout_s; else 0.",
        ("worker",),
    )
    restarts = Metric(
        "droprd_worker_restarts", "Its starts but the first.", ("worker",), is_counter=True
    )
    for name, about in workers.items():
        of = _map(about)
        up.samples.append(((name,), float(of.get("state") == "running")))
        failures.samples.append(((name,), _number(of.get("failures")) or 0.0))
        silence.samples.append(((name,), _number(of.get("silent_s")) or 0.0))
        restarts.samples.append(((name,), _number(of.get("restarts")) or 0.0))
    return [up, failures, silence, restarts]


def _shown(kind: str, told: Map, shown: Iterable[_Shown]) -> Iterable[Metric]:
    for one in shown:
        values: dict[str, float] = {}
        for index, name in enumerate(sorted(told)):
            value = _number(_map(told[name]).get(one.key))
            if value is None:
                continue
            label = name if index < LABELS_MAX else OTHER
            values[label] = one.join(values[label], value) if label in values else value
        samples: list[tuple[tuple[str, ...], float]] = [((k,), v) for k, v in values.items()]
        yield Metric(f"droprd_{kind}_{one.name}", one.text, (kind,), one.is_counter, samples)


def _reached(peers: Map) -> Metric:
    metric = Metric(
        "droprd_peer_reached",
        "0 while tries to reach the peer fail, or it is not configured any more.",
        ("peer",),
    )
    for name in sorted(peers)[:LABELS_MAX]:
        metric.samples.append(((name,), float(_map(peers[name]).get("state") in _REACHED)))
    return metric


def _refused(told: Map) -> Metric:
    metric = Metric(
        "droprd_refused_requests",
        "Requests and connections refused, by reason.",
        ("reason",),
        is_counter=True,
    )
    for reason in sorted(told)[:LABELS_MAX]:
        value = _number(told[reason])
        if value is not None:
            metric.samples.append(((str(reason),), value))
    return metric


def _map(value: Any) -> Map:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None
