"""[health] and [monitor]: thresholds that make sense, and nothing told to the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from droprd.core.thresholds import Thresholds
from droprd.errors import ConfigError
from droprd.settings.loading import load
from droprd.settings.values import Settings


def read(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "droprd.toml"
    file.write_text(f'[node]\nname = "hamburg"\nspool = "spool"\n{text}\n')
    return load(str(file), {})


def test_thresholds_are_durations_sizes_and_counts(tmp_path: Path) -> None:
    health = '[health]\noldest_age_warning_s = "2m"\nfree_bytes_warning = "2GiB"'
    found = read(tmp_path, f"{health}\ndead_letters_critical = 100").health
    assert found == Thresholds(
        oldest_age_warning_s=120, free_bytes_warning=2 << 30, dead_letters_critical=100
    )


def test_thresholds_survive_the_way_to_the_workers(tmp_path: Path) -> None:
    settings = read(tmp_path, '[health]\nsilence_critical_s = "9h"')
    assert Settings.from_dict(settings.to_dict()) == settings


@pytest.mark.parametrize(
    "text",
    [
        "oldest_age_warning_s = 100\noldest_age_critical_s = 50",
        'free_bytes_warning = "1MiB"\nfree_bytes_critical = "2MiB"',
        "full_in_warning_s = 10\nfull_in_critical_s = 20",
        "dead_letters_warning = -1",
        'oldest_age_warning_s = "soon"',
    ],
)
def test_thresholds_that_make_no_sense_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"[health]\n{text}")
    assert "health." in str(caught.value.faults)


def test_zero_switches_one_side_off(tmp_path: Path) -> None:
    found = read(tmp_path, "[health]\noldest_age_warning_s = 100\noldest_age_critical_s = 0").health
    assert (found.oldest_age_warning_s, found.oldest_age_critical_s) == (100, 0)


@pytest.mark.parametrize("listen", ["127.0.0.1:7708", "[::1]:7708", "localhost:7708", ""])
def test_health_may_be_served_on_loopback(tmp_path: Path, listen: str) -> None:
    assert read(tmp_path, f'[monitor]\nlisten = "{listen}"').monitor.listen == listen


def test_the_socket_is_relative_to_the_file(tmp_path: Path) -> None:
    found = read(tmp_path, '[monitor]\nlisten = "unix:health.sock"').monitor.listen
    assert found == f"unix:{tmp_path}/health.sock"


@pytest.mark.parametrize("listen", ["0.0.0.0:7708", "hamburg:7708", "7708", f"unix:/{'x' * 120}"])
def test_health_is_served_nowhere_else(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f'[monitor]\nlisten = "{listen}"')
    assert "monitor.listen" in str(caught.value.faults)
