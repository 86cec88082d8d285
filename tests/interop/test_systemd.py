"""systemd understands our units, finds them tight, makes our users, and hands over a socket."""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from droprd.testing.node import Node, wait_until

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNITS = ("droprd.service", "droprd@.service", "droprd.socket")
EXPOSURE_MAX = 1.5

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed"
)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Copies of the units in which only the program's path is another one."""
    for name in UNITS:
        text = (SYSTEMD / name).read_text()
        program = shutil.which("droprd", path=str(Path(sys.executable).parent)) or sys.executable
        (tmp_path / name).write_text(text.replace("/usr/bin/droprd", program))
    (tmp_path / "droprd@hamburg.service").symlink_to("droprd@.service")
    return tmp_path


@needs_systemd
@pytest.mark.parametrize("unit", ["droprd.service", "droprd@hamburg.service", "droprd.socket"])
def test_systemd_understands_every_line_of_the_units(units: Path, unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(units / unit)],
        capture_output=True,
        text=True,
    )
    assert [line for line in done.stderr.splitlines() if "droprd" in line] == []


@needs_systemd
@pytest.mark.parametrize("unit", ["droprd.service", "droprd@hamburg.service"])
def test_the_units_are_tight(units: Path, unit: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(units / unit)],
        capture_output=True,
        text=True,
        env={"SYSTEMD_COLORS": "0", "PATH": "/usr/bin:/bin"},
    )
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= EXPOSURE_MAX, done.stdout


def test_the_units_leave_out_what_breaks_the_daemon() -> None:
    for name in ("droprd.service", "droprd@.service"):
        text = (SYSTEMD / name).read_text()
        assert "\nPrivateUsers=" not in text, "peer credentials"
        assert "\nProcSubset=" not in text, "psutil"
        assert "landlock_restrict_self" in text
        assert "SupplementaryGroups=droprd-send droprd-receive" in text


def test_the_two_services_differ_in_paths_only() -> None:
    one, several = (
        (SYSTEMD / name).read_text().splitlines() for name in ("droprd.service", "droprd@.service")
    )
    without = [
        line.replace("/%i", "").replace("-%i", "").replace(" node %i", "") for line in several
    ]
    assert [x for x in one if x[:1] not in ("#", "")] == [
        x for x in without if x[:1] not in ("#", "")
    ]


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd is not installed")
def test_the_users_are_made_with_their_groups(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    done = subprocess.run(
        [
            "systemd-sysusers",
            f"--root={tmp_path}",
            str(SYSTEMD / "sysusers.d" / "droprd.conf"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    groups = {
        line.split(":")[0]: line.split(":")[3]
        for line in (tmp_path / "etc" / "group").read_text().splitlines()
    }
    for name in ("droprd-send", "droprd-receive", "droprd-monitor"):
        assert groups[name] == "droprd"
    assert (tmp_path / "etc" / "passwd").read_text().startswith("droprd:")


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="systemd is not installed")
def test_the_directories_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    # In a root of its own there is no user droprd: numbers stand in for the names.
    text = (SYSTEMD / "tmpfiles.d" / "droprd.conf").read_text()
    conf = tmp_path / "droprd.conf"
    conf.write_text(re.sub(r" (droprd droprd|root root) ", " - - ", text))
    done = subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", str(conf)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "droprd").stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="systemd is not installed"
)
def test_systemd_hands_over_its_socket(tmp_path: Path) -> None:
    node = Node(tmp_path / "hamburg", "hamburg")
    node.prefix = ["systemd-socket-activate", f"--listen={node.listen}", "-E", "PYTHONPATH"]
    node.env["PYTHONPATH"] = ":".join(path for path in sys.path if path)

    def status() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=20)
        try:
            connection.request("POST", "/v1/hello", b"")
            return connection.getresponse().status
        except ConnectionRefusedError:
            return 0
        finally:
            connection.close()

    try:
        node.start(wait=False)
        # The first connection starts the daemon and waits in the socket until it is there.
        wait_until(lambda: status() == 401, "the receiver answers on systemd's socket")
        node.prefix = []
        node.wait_running()
        assert node.listen in node.status()["listen"]
        node.kill_worker("receiver")
        assert status() == 401, "and its restart refuses nobody"
    finally:
        node.close()
