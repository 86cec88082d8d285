"""A real Nagios 4 runs our definitions against a real node; its status file tells what it found."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from droprd.testing.node import Node, wait_until

ETC = Path(__file__).parents[2] / "etc" / "nagios"
NAGIOS = shutil.which("nagios4") or shutil.which("nagios")
MODES = ("alive", "queue", "oldest", "peer", "dead", "spool", "inbox")

pytestmark = pytest.mark.skipif(NAGIOS is None, reason="Debian's nagios4-core is not installed")

CONFIG = """
log_file={dir}/nagios.log
cfg_file={dir}/objects.cfg
cfg_file={dir}/droprd.cfg
object_cache_file={dir}/objects.cache
precached_object_file={dir}/objects.precache
status_file={dir}/status.dat
status_update_interval=1
state_retention_file={dir}/retention.dat
lock_file={dir}/nagios.pid
temp_file={dir}/nagios.tmp
temp_path={dir}
check_result_path={dir}/results
query_socket={dir}/nagios.qh
command_file={dir}/nagios.cmd
check_external_commands=0
illegal_macro_output_chars=`~$&|'"<>
interval_length=2
use_syslog=0
enable_notifications=0
service_inter_check_delay_method=n
max_service_check_spread=1
"""
OBJECTS = """
define timeperiod {
    timeperiod_name 24x7
    alias           always
    monday 00:00-24:00
    tuesday 00:00-24:00
    wednesday 00:00-24:00
    thursday 00:00-24:00
    friday 00:00-24:00
    saturday 00:00-24:00
    sunday 00:00-24:00
}
define command {
    command_name nothing
    command_line /bin/true
}
define contact {
    contact_name operator
    service_notification_commands nothing
    host_notification_commands nothing
    service_notification_period 24x7
    host_notification_period 24x7
}
define host {
    host_name localhost
    address 127.0.0.1
    check_command nothing
    max_check_attempts 1
    contacts operator
}
"""


class Nagios:
    """A Nagios of its own below `directory`, and the node it looks at."""

    def __init__(self, directory: Path, user: str | None) -> None:
        self.directory = directory
        self.user = user
        prefix = []
        if user is not None:
            prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        self.node = Node(directory / "hamburg", "hamburg", prefix=prefix)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        text = (ETC / "droprd.cfg").read_text()
        command = f"{sys.executable} -m droprd.monitor.nagios"
        assert "/usr/bin/check_droprd" in text
        text = text.replace("/usr/bin/check_droprd", command)
        text = text.replace("/etc/droprd/droprd.toml", f"{self.node.config} -t 2")
        files = {"droprd.cfg": text, "objects.cfg": OBJECTS}
        files["nagios.cfg"] = CONFIG.format(dir=self.directory)
        if self.user is not None:
            files["nagios.cfg"] += f"nagios_user={self.user}\nnagios_group={self.user}\n"
        for name, content in files.items():
            (self.directory / name).write_text(content)
            os.chmod(self.directory / name, 0o644)
        self._run("-v")
        assert NAGIOS is not None
        self.process = subprocess.Popen(
            [NAGIOS, str(self.directory / "nagios.cfg")],
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user else None,
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _run(self, flag: str) -> None:
        assert NAGIOS is not None
        done = subprocess.run(
            [NAGIOS, flag, str(self.directory / "nagios.cfg")],
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user else None,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        assert "Total Warnings: 0" in done.stdout, done.stdout

    def states(self) -> dict[str, tuple[int, str, str]]:
        """(state, output, perfdata) of each service that was checked, from the status file."""
        try:
            text = (self.directory / "status.dat").read_text()
        except FileNotFoundError:
            return {}
        found = {}
        for block in re.findall(r"servicestatus \{\n(.*?)\n\t\}", text, re.DOTALL):
            values = dict(line.strip().split("=", 1) for line in block.splitlines() if "=" in line)
            if values["has_been_checked"] == "1":
                name = values["service_description"].removeprefix("droprd ")
                about = values["plugin_output"], values["performance_data"]
                found[name] = int(values["current_state"]), *about
        return found

    def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
        self.node.close()


@pytest.fixture
def nagios() -> Iterator[Nagios]:
    # Not pytest's own directory: the nagios user may not enter it.
    directory = Path(tempfile.mkdtemp(prefix="nagios", dir="/tmp"))
    user = None
    if os.geteuid() == 0:
        try:
            known = pwd.getpwnam("nagios")
        except KeyError:
            pytest.skip("there is no user nagios")
        user = "nagios"
        os.chown(directory, known.pw_uid, known.pw_gid)
        _require_readable(user)
    os.chmod(directory, stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
    (directory / "results").mkdir()
    if user is not None:
        os.chown(directory / "results", known.pw_uid, known.pw_gid)
    made = Nagios(directory, user)
    yield made
    made.close()
    shutil.rmtree(directory)


def _require_readable(user: str) -> None:
    tried = subprocess.run(
        [sys.executable, "-c", "import droprd.monitor.nagios"],
        user=user,
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        check=False,
    )
    if tried.returncode != 0:
        pytest.skip(f"user {user} may not read this Python")


def test_nagios_shows_what_is_well_and_what_is_not(nagios: Nagios) -> None:
    node = nagios.node
    node.start()
    nagios.start()
    wait_until(lambda: len(nagios.states()) == len(MODES), "all services were checked", 60)
    wait_until(lambda: all(s[0] == 0 for s in nagios.states().values()), "all is well", 30)
    for mode, (_, output, perfdata) in nagios.states().items():
        assert output.startswith(f"DROPRD {mode.upper()} OK"), output
        assert "=" in perfdata, mode

    # Somebody sent to a peer that is not there: one warning, in the modes that it concerns.
    node.ctl("peer", "add", "berlin", "http://127.0.0.1:9")
    with open(node.config, "a", encoding="utf-8") as file:
        file.write("\n[health]\noldest_age_warning_s = 1\noldest_age_critical_s = 2\n")
    node.ctl("reload")
    node.ctl("send", "berlin", "hello")
    wait_until(lambda: nagios.states()["oldest"][0] == 2, "the age is critical", 60)
    assert "berlin waits for" in nagios.states()["oldest"][1]
    assert "berlin_oldest=" in nagios.states()["oldest"][2]
    assert nagios.states()["alive"][0] == 0

    # A daemon that hangs, then none at all: critical, whatever it was before.
    assert node.process is not None
    os.kill(node.process.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: nagios.states()["alive"][0] == 2, "a hung daemon is critical", 60)
        assert "not answering" in nagios.states()["alive"][1]
    finally:
        os.kill(node.process.pid, signal.SIGCONT)
    wait_until(lambda: nagios.states()["alive"][0] == 0, "it is back", 60)
    node.stop()
    wait_until(lambda: all(s[0] == 2 for s in nagios.states().values()), "all critical", 60)
    assert "no daemon runs here" in nagios.states()["dead"][1]


def test_every_mode_is_in_every_definition() -> None:
    for name in ("droprd.cfg", "nrpe.cfg", "icinga2.conf"):
        text = (ETC / name).read_text()
        for mode in MODES:
            assert re.search(rf"\b{mode}\b", text), (name, mode)
