"""Tables are plain columns where nobody looks at a terminal, and never steer one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from droprd.ctl.drawing import printable, table

_DRAW = (
    "from droprd.ctl.drawing import table; import sys; "
    "table(['PEER', 'QUEUED', 'ERROR'], [['berlin', '7', 'refused ' * 9], ['[b]x', '10', '']]); "
    "print('rich' in sys.modules)"
)


def _on_a_terminal(**environ: str) -> str:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", _DRAW],
        stdout=theirs,
        check=True,
        env={"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "80", **environ},
    )
    assert done.returncode == 0
    os.close(theirs)
    said = b""
    try:
        while data := os.read(ours, 65536):
            said += data
    except OSError:  # the other end is closed: EIO on Linux
        pass
    os.close(ours)
    return said.decode()


def test_columns_are_aligned_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    table(["PEER", "QUEUED", "ERROR"], [["berlin", "7", ""], ["rome", "1024", "refused"]])
    assert capsys.readouterr().out == (
        "PEER    QUEUED  ERROR\nberlin       7\nrome      1024  refused\n"
    )
    table(["PEER"], [])
    assert capsys.readouterr().out == ""


def test_text_from_outside_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[31m\r\nb\u202e ü") == "a\\x1b[31m\\r\\nb\\u202e ü"


def test_a_terminal_gets_a_drawn_table_unless_it_wants_none() -> None:
    drawn = _on_a_terminal()
    assert "True" in drawn
    assert "[b]x" in drawn
    plain = _on_a_terminal(NO_COLOR="1")
    assert "False" in plain
    assert "\x1b" not in plain


def test_on_a_narrow_terminal_nothing_is_cut() -> None:
    drawn = _on_a_terminal(COLUMNS="24").replace("\r", "")
    assert "PEER: berlin\nQUEUED: 7\n" in drawn
    assert "\u2026" not in drawn
    assert drawn.count("refused") == 9
    assert all(len(line) <= 24 for line in drawn.splitlines() if "\x1b" not in line)
