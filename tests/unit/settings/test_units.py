"""Durations and sizes mean the same in the configuration and on the command line."""

from __future__ import annotations

import pytest

from droprd.errors import UsageError
from droprd.settings.units import format_bytes, format_duration, parse_bytes, parse_duration_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        (90, 90),
        (0.5, 0.5),
        ("10m", 600),
        ("2h", 7200),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        ("7d", 604_800),
        ("2w", 1_209_600),
        ("0", 0),
    ],
)
def test_durations_are_understood(text: object, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "-1", "1_0", "+10", "1e3", "10 y", "1h30m", True, None, float("nan"), -1, [1]]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(UsageError):
        parse_duration_s(text)


def test_sizes_are_understood() -> None:
    assert parse_bytes("4096") == 4096
    assert parse_bytes("64KiB") == 65_536
    assert parse_bytes("10 MB") == 10_000_000
    assert parse_bytes("1.5G") == 1_500_000_000
    assert parse_bytes(7) == 7


@pytest.mark.parametrize("text", ["", "x", "-1", -1, True, 1.5, "1_0", "0.1", "99999999T", None])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text)


def test_durations_and_sizes_are_shown_in_few_units() -> None:
    assert [format_duration(s) for s in (0, 0.25, 45, 200, 3600, 187_200, 7_300)] == [
        "0s",
        "250ms",
        "45s",
        "3m 20s",
        "1h",
        "2d 4h",
        "2h 1m",
    ]
    assert [format_bytes(n) for n in (0, 1023, 1536, 1 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 MiB",
        "5.0 TiB",
    ]
