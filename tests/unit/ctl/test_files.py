"""What is written as TOML is read back as it was, whatever is in it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from droprd.ctl.files import toml_table, write_new

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(_TEXTS, st.lists(_TEXTS), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_toml_is_read_back_as_it_was(text: str, texts: list[str], number: int, yes: bool) -> None:
    written = toml_table("peers/a.b", {"t": text, "l": texts, "n": number, "y": yes})
    assert tomllib.loads(written) == {
        "peers": {"a.b": {"t": text, "l": texts, "n": number, "y": yes}}
    }


def test_a_new_file_never_replaces_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_new(str(path), "one", 0o600)
    with pytest.raises(FileExistsError):
        write_new(str(path), "two", 0o600)
    assert path.read_text() == "one"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_temporary_file_left_by_a_crash_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "f.new").write_text("half")
    write_new(str(tmp_path / "f"), "one", 0o600)
    assert (tmp_path / "f").read_text() == "one"
