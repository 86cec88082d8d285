"""Log lines: one an event, whatever is in them."""

from __future__ import annotations

import json
import logging

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
