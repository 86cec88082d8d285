"""Whatever stands in a configuration, it is settings or faults, never a traceback."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from droprd.errors import ConfigError, InvalidName
from droprd.model import check_name
from droprd.settings import schema
from droprd.settings.loading import load

_KEYS = sorted({key for model in schema.SECTIONS.values() for key in model.model_fields})
_SECTIONS = [*schema.SECTIONS, *schema.TABLES]
_TEXTS = st.one_of(
    st.text("abc/.:[]@?#%1 -~", max_size=20),
    st.sampled_from(
        [
            "http://[",
            "https://a:b",
            "unix:",
            "127.0.0.1:x",
            "1e999h",
            "[::1]:1",
            "²s",
            "\x7f",
            "[1]",
        ]
    ),
)
_VALUES: Any = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.booleans(), _TEXTS, st.lists(_TEXTS, max_size=3)
)
_TABLES = st.dictionaries(st.sampled_from([*_KEYS, "strange"]), _VALUES, max_size=6)
_FILES = st.dictionaries(
    st.sampled_from([*_SECTIONS, "strange"]),
    st.one_of(_TABLES, st.dictionaries(_TEXTS, _TABLES, max_size=2), _VALUES),
    max_size=6,
)
_NAMES = st.sampled_from([f"DROPRD_{s.upper()}" for s in _SECTIONS])
_PARTS = st.sampled_from(["", "__", "__A", "__A__URL", "__A__CHANNELS__X", "_X", "__NAME"])
_ENVIRONMENTS = st.dictionaries(st.builds(lambda a, b: a + b, _NAMES, _PARTS), _TEXTS, max_size=4)


def _toml(value: Any) -> str:
    """Inline TOML: for these values it differs from JSON in maps and in DEL only."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value).replace("\x7f", "\\u007f")


def _name_or_faults(path: Path, environment: dict[str, str]) -> str | tuple[str, ...]:
    try:
        return load(str(path), environment).node.name
    except ConfigError as error:
        return error.faults


@settings(max_examples=300, deadline=None)
@given(_FILES, _ENVIRONMENTS)
def test_a_configuration_is_settings_or_faults(
    file: dict[str, Any], environment: dict[str, str]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "droprd.toml"
        path.write_text("".join(f"{_toml(k)} = {_toml(v)}\n" for k, v in file.items()))
        assert _name_or_faults(path, environment)


@given(st.text(max_size=70))
def test_a_name_is_a_name_or_refused(text: str) -> None:
    try:
        assert check_name(text, "peer") == text
    except InvalidName:
        return
    assert text.isascii()
    assert "/" not in text
    assert text not in (".", "..")


@given(st.binary(max_size=200))
def test_bytes_are_settings_or_faults(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "droprd.toml"
        path.write_bytes(data)
        assert _name_or_faults(path, {})
