"""`init` makes a whole node or nothing, and never touches what is there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from droprd.settings.loading import load
from droprd.settings.published import Published
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, read_version

from .conftest import Call


def _tree(root: Path) -> dict[str, tuple[float, bytes]]:
    return {
        str(path): (
            path.lstat().st_mtime,
            path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else b"",
        )
        for path in root.rglob("*")
    }


def test_a_new_node_has_a_configuration_that_can_be_used(node: Path) -> None:
    settings = load(str(node / "droprd.toml"), {})
    assert settings.node.name == "hamburg"
    assert settings.node.spool == str(node / "spool")
    assert settings.control.socket == str(node / "run" / "control.sock")
    assert settings.receiver.listen == ("127.0.0.1:7707",)
    assert read_version(OsFs(), settings.node.spool).spool_id
    assert (node / "keys").stat().st_mode & 0o777 == 0o700


def test_applications_can_use_a_new_node_before_its_first_start(node: Path) -> None:
    public = Published(Layout(str(node / "spool")).public).get()
    assert public.node == "hamburg"
    assert public.spool_id == read_version(OsFs(), str(node / "spool")).spool_id


def test_a_second_init_changes_nothing(node: Path, droprctl: Call) -> None:
    before = _tree(node)
    again = droprctl("init", "--dir", node, "--name", "kiel", "--json")
    assert again.code == 1
    assert again.error["code"] == "node_exists"
    assert _tree(node) == before


def test_a_spool_that_is_there_is_not_touched(node: Path, tmp_path: Path, droprctl: Call) -> None:
    other = tmp_path / "other"
    refused = droprctl(
        "init", "--dir", other, "--name", "kiel", "--spool", node / "spool", "--json"
    )
    assert refused.code == 1
    assert refused.error["code"] == "spool_exists"
    assert not other.exists()


def test_the_spool_may_lie_on_a_disk_of_its_own(tmp_path: Path, droprctl: Call) -> None:
    disk = tmp_path / "disk"
    (disk / "lost+found").mkdir(parents=True)
    made = droprctl("init", "--dir", tmp_path / "n", "--name", "kiel", "--spool", disk)
    assert made.code == 0
    assert load(str(tmp_path / "n" / "droprd.toml"), {}).node.spool == str(disk)
    assert (disk / "lost+found").is_dir()


@pytest.mark.parametrize(
    ("words", "code", "exit_code"),
    [
        (["--name", "Kiel"], "invalid_name", 2),
        (["--name", "kiel", "--listen", "0.0.0.0:7707"], "config_invalid", 1),
        (["--name", "kiel", "--listen", "7707"], "config_invalid", 1),
        (["--listen", "127.0.0.1:7707"], "usage", 2),
    ],
)
def test_what_cannot_be_made_leaves_nothing(
    tmp_path: Path, droprctl: Call, words: list[str], code: str, exit_code: int
) -> None:
    refused = droprctl("init", "--dir", tmp_path / "x" / "n", *words, "--json")
    assert (refused.code, refused.error["code"]) == (exit_code, code)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_is_taken_back(tmp_path: Path, droprctl: Call) -> None:
    directory = tmp_path / "n"
    directory.mkdir()
    # The last step cannot write its temporary file, for there is a directory of that name.
    (directory / "droprd.toml.new").mkdir()
    refused = droprctl("init", "--dir", directory, "--name", "kiel")
    assert refused.code == 1
    assert os.listdir(directory) == ["droprd.toml.new"]


def test_plain_http_beyond_loopback_can_be_asked_for(tmp_path: Path, droprctl: Call) -> None:
    words = ("--name", "kiel", "--listen", "0.0.0.0:7707", "--allow-plain-http")
    assert droprctl("init", "--dir", tmp_path / "n", *words).code == 0
    assert load(str(tmp_path / "n" / "droprd.toml"), {}).receiver.allow_plain_http


def test_c_names_the_directory_as_well(tmp_path: Path, droprctl: Call) -> None:
    made = droprctl("-C", tmp_path / "n", "init", "--name", "kiel", "--json")
    assert made.code == 0
    assert made.json["dir"] == str(tmp_path / "n")
