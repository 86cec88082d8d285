"""A node as metrics: bounded labels, and every metric documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from droprd.core.metrics import LABELS_MAX, OTHER, Metric, metrics

DOCS = Path(__file__).parents[3] / "docs" / "monitoring.md"


def of(status: dict[str, Any], **health: Any) -> dict[str, Metric]:
    return {one.name: one for one in metrics(status, {"verdict": "ok", "reasons": [], **health})}


def samples(metric: Metric) -> dict[tuple[str, ...], float]:
    return dict(metric.samples)


def test_peers_and_channels_beyond_the_bound_are_summed_up() -> None:
    channels = {f"c{n:04}": {"ready": 1, "oldest_age_s": n} for n in range(LABELS_MAX + 3)}
    found = of({"channels": channels})
    ready = samples(found["droprd_channel_ready_messages"])
    assert len(ready) == LABELS_MAX + 1
    assert ready[(OTHER,)] == 3
    assert samples(found["droprd_channel_oldest_age_seconds"])[(OTHER,)] == LABELS_MAX + 2


def test_what_is_not_known_is_left_out() -> None:
    found = of({"peers": {"berlin": {"queued": 2, "oldest_age_s": None}}, "spool": {}})
    assert samples(found["droprd_peer_queued_messages"]) == {("berlin",): 2}
    assert found["droprd_peer_oldest_age_seconds"].samples == []
    assert found["droprd_spool_full_in_seconds"].samples == []


def test_the_verdict_and_its_reasons_are_told() -> None:
    reason = {"code": "oldest_age", "subject": "berlin", "level": "critical", "text": "…"}
    found = of({}, verdict="critical", reasons=[reason, reason])
    assert samples(found["droprd_health"]) == {(): 2}
    assert samples(found["droprd_health_reason"]) == {("oldest_age", "berlin", "critical"): 1}


def test_every_metric_is_documented_and_none_else() -> None:
    there = {
        f"{name}_total" if one.is_counter else name
        for name, one in of({"peers": {"a": {}}, "channels": {"a": {}}}).items()
    }
    documented = set(re.findall(r"^\| `(droprd_\w+)", DOCS.read_text(), re.MULTILINE))
    assert documented == there
