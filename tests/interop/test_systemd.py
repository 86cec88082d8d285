"""systemd finds nothing wrong with our unit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "droprd.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_understands_every_line_of_the_unit(tmp_path: Path) -> None:
    # Only the program's path is another one: what is installed here is this tree.
    text = UNIT.read_text().replace("/usr/bin/droprd", sys.executable)
    (tmp_path / "droprd.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "droprd.service")],
        capture_output=True,
        text=True,
    )
    ours = [line for line in done.stderr.splitlines() if "droprd.service" in line]
    assert ours == []
