"""etc/droprd.toml shows every key there is, with its true default."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

from droprd.settings import schema
from droprd.settings.loading import load
from droprd.settings.values import NodeSettings, Settings

EXAMPLE = Path(__file__).parents[3] / "etc" / "droprd.toml"


def _uncommented() -> str:
    return re.sub(r"^#(?=[a-z\[])", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_the_example_can_be_used_as_it_is() -> None:
    assert load(str(EXAMPLE), {}) == Settings(
        node=NodeSettings(name="hamburg"), config_file=str(EXAMPLE)
    )


def test_what_the_example_shows_commented_out_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "berlin.token").write_text("a-token-for-berlin-0123")
    (tmp_path / "droprd.toml").write_text(_uncommented())
    shown = load(str(tmp_path / "droprd.toml"), {})
    default = Settings(node=NodeSettings(name="hamburg"))
    for field in fields(Settings):
        if field.name not in ("peers", "channels", "receiver", "config_file"):
            assert getattr(shown, field.name) == getattr(default, field.name)
    assert shown.channel("sites") == default.channel("sites")
    assert shown.receiver.connections_max == default.receiver.connections_max


def test_every_key_there_is_stands_in_the_example() -> None:
    tables = tomllib.loads(_uncommented())
    for section, model in schema.SECTIONS.items():
        known = set(model.model_fields)
        if section == "peer_defaults":
            known -= {"url", "urls", "token_file"}
        assert set(tables[section]) == known, section
    assert set(tables["channels"]["sites"]) == set(schema.Channel.model_fields)
    assert {"url", "urls", "token_file"} == set(tables["peers"]["berlin"])
