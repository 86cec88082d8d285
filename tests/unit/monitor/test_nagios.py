"""check_droprd against a daemon's answers: states, ranges, perfdata, filters."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import nagiosplugin
import pytest

import droprd
from droprd.core.health import judge
from droprd.core.status import status_document
from droprd.errors import NotAnswering
from droprd.monitor import nagios

PACKAGE = Path(droprd.__file__).parent


def told(**changes: Any) -> nagios.Told:
    status = {
        **status_document(
            node="hamburg",
            version="1",
            state="running",
            uptime_s=100,
            as_of_ns=0,
            workers={},
            gauges={},
            peers=["berlin", "kiel"],
            channels=["sites"],
        ),
        **changes,
    }
    return nagios.Told(status, judge(status).to_dict(), 0.01)


def check(mode: str, answer: Any, **options: Any) -> tuple[int, list[str]]:
    given = {"mode": mode, "peer": None, "channel": None, "warning": None, "critical": None}
    given |= options
    made = nagiosplugin.Check(
        nagios.Node(Namespace(**given), answer),
        nagiosplugin.ScalarContext("value", given["warning"], given["critical"]),
        nagiosplugin.ScalarContext("other"),
        nagios.Verdict("verdict"),
        nagios.Summary(),
    )
    made()
    return made.exitcode, [made.summary_str, *made.perfdata]


def peers(**changes: Any) -> dict[str, Any]:
    found = told().status["peers"]
    found["berlin"] = {**found["berlin"], "queued": 7, **changes}
    return dict(found)


@pytest.mark.parametrize("mode", nagios.MODES)
def test_a_node_that_is_well_is_ok_in_every_mode(mode: str) -> None:
    code, lines = check(mode, told())
    assert code == 0
    assert len(lines) > 1, "there is perfdata"


@pytest.mark.parametrize("mode", nagios.MODES)
def test_a_daemon_that_cannot_be_asked_is_critical_in_every_mode(mode: str) -> None:
    error = NotAnswering("no daemon runs here", why="nobody listens on c.sock")
    code, lines = check(mode, error)
    assert (code, lines[0]) == (2, "no daemon runs here: nobody listens on c.sock")


def test_the_daemons_own_judgement_decides() -> None:
    code, lines = check("oldest", told(peers=peers(oldest_age_s=5 * 3600)))
    assert code == 2
    assert lines[0] == "the oldest message for berlin waits for 5 h"
    assert lines[1:] == ["berlin_oldest=18000s", "kiel_oldest=0s", "peers=2"]


def test_ranges_take_the_place_of_the_nodes_threshold() -> None:
    late = told(peers=peers(oldest_age_s=5 * 3600))
    code, _ = check("oldest", late, warning="100000", critical="200000")
    assert code == 0
    code, lines = check("oldest", late, warning="60", critical="100000")
    assert code == 1
    assert "berlin_oldest=18000s;60;100000" in lines


def test_ranges_leave_what_is_no_number_alone() -> None:
    document = told(corrupt=17, spool={"bytes": 1, "free_bytes": 1 << 40})
    code, lines = check("spool", document, critical="1:")
    assert (code, lines[0]) == (
        2,
        "17 promised bytes could not be read and lie below corrupt/",
    )


def test_one_peer_can_be_looked_at() -> None:
    late = told(peers=peers(oldest_age_s=5 * 3600, accepted_age_s=5 * 3600))
    assert check("oldest", late, peer="kiel")[0] == 0
    assert check("peer", late, peer="berlin")[0] == 2
    assert check("queue", late, peer="berlin", warning="5")[0] == 1
    assert check("queue", late, peer="kiel", warning="5")[0] == 0


def test_a_node_without_peers_and_channels_is_well() -> None:
    for mode in nagios.MODES:
        assert check(mode, told(peers={}, channels={}))[0] == 0


def test_one_channel_can_be_looked_at() -> None:
    unread = told(channels={"sites": {"ready": 1, "oldest_age_s": 7200}, "other": {}})
    assert check("inbox", unread, channel="sites")[0] == 1
    assert check("inbox", unread, channel="other")[0] == 0


def test_text_of_others_breaks_neither_line_nor_perfdata() -> None:
    code, lines = check("alive", told(problems=["a|b=1\nCRITICAL\x1b[0m"]))
    assert (code, lines[0]) == (1, "a/b=1 CRITICAL [0m")


def test_every_reason_of_health_has_its_mode() -> None:
    text = (PACKAGE / "core" / "health.py").read_text()
    codes = set(re.findall(r'Reason\(\s*[\w.]+, f?"(\w+)"', text))
    assert len(codes) > 15
    covered = set().union(*(mode.codes for mode in nagios.MODES.values()))
    assert codes <= covered
    assert all(mode.own <= mode.codes for mode in nagios.MODES.values())


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["dead", "-w", "x"], ["alive", "-t", "0"], ["alive", "--nope"]]
)
def test_a_bad_argument_is_unknown(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        nagios.main(arguments)
    assert ended.value.code == 3
    assert capsys.readouterr().out.startswith("DROPRD UNKNOWN - ")
