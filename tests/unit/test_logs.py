"""Log lines: one an event, whatever is in them."""

from __future__ import annotations

import json
import logging
import re

import pytest

from droprd import logs


@pytest.fixture(autouse=True)
def _root_logger_as_before() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_an_event_is_one_line_of_key_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("angel", form="text")
    log = logging.getLogger("droprd.test")
    logs.event(log, logging.WARNING, "worker ended", pid=7, age_s=1.5, none=None)
    line = capsys.readouterr().err
    assert line.endswith(' level=warning process=angel event="worker ended" pid=7 age_s=1.5\n')


def test_text_from_outside_starts_no_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("angel", form="text")
    logs.event(logging.getLogger("x"), logging.ERROR, "a\nlevel=info", peer="b\r\n\x1b[31m c")
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "\x1b" not in text
    assert r'event="a\nlevel=info" peer="b\r\n\u001b[31m c"' in text


def test_json_is_one_document_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("sender", form="json")
    logs.event(logging.getLogger("x"), logging.INFO, "merged", frames=3)
    found = json.loads(capsys.readouterr().err)
    assert (found["process"], found["event"], found["frames"]) == ("sender", "merged", 3)


def test_under_systemd_the_level_is_a_prefix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    logs.set_up("angel")
    logs.event(logging.getLogger("x"), logging.ERROR, "no")
    assert capsys.readouterr().err == "<3>process=angel event=no\n"


def test_the_level_holds(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("angel", level="error")
    logs.event(logging.getLogger("x"), logging.WARNING, "no")
    assert capsys.readouterr().err == ""


def test_what_repeats_itself_is_left_out_and_counted() -> None:
    now_s = [0.0]
    repeats = logs.Repeats(lambda: now_s[0])
    fields: list[dict[str, object]] = []

    def line(what: str = "push failed", **about: object) -> bool:
        record = logging.LogRecord("x", logging.WARNING, "", 0, what, None, None)
        vars(record)["fields"] = about
        passed = repeats.filter(record)
        if passed:
            fields.append(vars(record)["fields"])
        return passed

    passed = [line(peer="berlin", next_try_s=n) for n in range(1000)]
    assert sum(passed) == logs.LINES_MAX
    assert line(peer="kiel"), "another peer is another thing"
    assert line("worker ended", peer="berlin"), "and so is another event"
    now_s[0] = logs.WINDOW_S
    assert line(peer="berlin")
    assert fields[-1] == {"peer": "berlin", "left_out": 1000 - logs.LINES_MAX}
    assert all(line("command", user="ann") for _ in range(100)), "an audit has no gaps"


def test_texts_that_are_all_different_cost_no_memory() -> None:
    repeats = logs.Repeats(lambda: 0.0)
    for n in range(5000):
        record = logging.LogRecord("x", logging.WARNING, "", 0, f"text {n}", None, None)
        assert repeats.filter(record)
    assert len(repeats._windows) <= 1000


def test_keys_are_the_same_in_every_form(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    seen = []
    for form in ("text", "json"):
        logs.set_up("sender", form=form)
        logs.event(
            logging.getLogger("x"), logging.WARNING, "peer throttled", peer="berlin", why="x"
        )
        seen.append(capsys.readouterr().err)
    assert list(json.loads(seen[1])) == ["time", "level", "process", "event", "peer", "why"]
    assert re.findall(r"(\w+)=", seen[0]) == list(json.loads(seen[1]))
