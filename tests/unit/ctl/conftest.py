"""What the tests of droprctl share: a call of it, and a node that was made by `init`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from droprd.ctl.main import run


@dataclass
class Result:
    """How one call ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)


Call = Callable[..., Result]


@pytest.fixture
def droprctl(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call droprctl in this process, with no node but the one that is named."""
    monkeypatch.delenv("DROPRD_CONFIG", raising=False)

    def call(*words: str | Path) -> Result:
        code = run([str(word) for word in words])
        said = capfd.readouterr()
        return Result(code, said.out, said.err)

    return call


@pytest.fixture
def node(tmp_path: Path, droprctl: Call) -> Path:
    """The directory of a node named hamburg."""
    directory = tmp_path / "n"
    made = droprctl("init", "--dir", directory, "--name", "hamburg", "--listen", "127.0.0.1:7707")
    assert made.code == 0, made.err
    return directory
