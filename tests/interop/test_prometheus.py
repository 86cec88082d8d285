"""promtool accepts our rules, their unit tests and our metrics; the dashboard asks for no other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from droprd.core.metrics import metrics
from droprd.testing.node import Node, free_port, wait_until
from droprd.workers.exporter import Collector

ETC = Path(__file__).parents[2] / "etc" / "prometheus"
PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="Debian's prometheus is not installed")

STATUS: dict[str, Any] = {
    "node": "hamburg",
    "version": "1",
    "state": "running",
    "uptime_s": 12.5,
    "peers": {"berlin": {"state": "open", "queued": 3, "delivered": 4, "accepted_age_s": 2}},
    "channels": {"sites": {"ready": 1, "oldest_age_s": 2}},
    "workers": {"sender": {"state": "running", "restarts": 1}},
    "receiver": {"received": 7, "refused": {"status_503": 1}},
    "spool": {"bytes": 1, "free_bytes": 2, "full_in_s": 3},
    "dead_letters": 1,
}
HEALTH = {
    "verdict": "warning",
    "reasons": [{"level": "warning", "code": "dead_letters", "subject": "node"}],
}


def names() -> set[str]:
    return {f"{m.name}_total" if m.is_counter else m.name for m in metrics(STATUS, HEALTH)}


def run(*arguments: str, data: bytes | None = None) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], cwd=ETC, input=data, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


@needs_promtool
def test_the_alert_rules_are_sound() -> None:
    run("check", "rules", "--lint-fatal", "droprd.rules.yml")


@needs_promtool
def test_the_alerts_come_when_they_should_and_not_else() -> None:
    run("test", "rules", "droprd.tests.yml")


@needs_promtool
def test_the_metrics_are_as_prometheus_wants_them() -> None:
    registry = CollectorRegistry()
    registry.register(Collector(STATUS, HEALTH))
    run("check", "metrics", data=generate_latest(registry))


def test_rules_and_dashboard_ask_only_for_what_there_is() -> None:
    for file in ("droprd.rules.yml", "grafana.json"):
        asked = set(re.findall(r"\bdroprd_\w+", (ETC / file).read_text()))
        assert asked, file
        assert asked <= names(), file


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads((ETC / "grafana.json").read_text())
    assert board["id"] is None, "Grafana gives it one"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["title"]
        for target in targets(panel):
            assert "$instance" in target["expr"], panel["title"]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)


@pytest.mark.skipif(PROMETHEUS is None, reason="Debian's prometheus is not installed")
def test_a_real_prometheus_scrapes_a_real_node_and_raises_the_alarm(tmp_path: Path) -> None:
    port, web = free_port(), free_port()
    settings = f'[monitor]\nlisten = "127.0.0.1:{port}"\n[health]\noldest_age_critical_s = 1'
    settings += "\noldest_age_warning_s = 1"
    node = Node(tmp_path / "hamburg", "hamburg", settings=settings).start()
    rules = (ETC / "droprd.rules.yml").read_text().replace("for: 1m", "for: 1s")
    (tmp_path / "droprd.rules.yml").write_text(rules)
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        "rule_files: [droprd.rules.yml]\n"
        "scrape_configs:\n"
        f"  - {{job_name: droprd, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}\n"
    )
    assert PROMETHEUS is not None
    process = subprocess.Popen(
        [
            PROMETHEUS,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/tsdb",
            f"--web.listen-address=127.0.0.1:{web}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(query: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{web}/api/v1/query?query={quote(query)}"
        try:
            with urlopen(url, timeout=10) as answer:
                found: list[dict[str, Any]] = json.loads(answer.read())["data"]["result"]
                return found
        except OSError:
            return []

    try:
        wait_until(lambda: ask('up{job="droprd"} == 1'), "it is scraped", 60)
        assert ask("droprd_health == 0")
        node.ctl("peer", "add", "berlin", "http://127.0.0.1:9")
        node.ctl("send", "berlin", "hello")
        alert = 'ALERTS{alertname="DroprdCritical", alertstate="firing", subject="berlin"}'
        wait_until(lambda: ask(alert), "the alarm is raised", 60)
        node.stop()
        wait_until(lambda: ask('up{job="droprd"} == 0'), "a stopped node is seen", 60)
    finally:
        process.terminate()
        process.wait(30)
        node.close()


def targets(panel: dict[str, Any]) -> Iterator[dict[str, Any]]:
    assert panel["targets"]
    yield from panel["targets"]
