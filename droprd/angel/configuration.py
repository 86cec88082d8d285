"""The configuration child: a short-lived process reads and checks the configuration for us.

So neither pydantic nor a fault of a parser is ever in the angel, whose memory stays small, and a
reload does not hold up the control socket. The child writes one msgpack map on its standard
output: {"ok": settings} or {"faults": [text …]}, with code, what and hint where these are others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgpack

from droprd.angel.loop import Loop
from droprd.errors import BadData, ConfigError
from droprd.settings.values import Settings

TIMEOUT_S = 30.0
_BYTES_MAX = 16 * 1024 * 1024

Done = Callable[[Settings | ConfigError], None]


def read_settings(loop: Loop, config: str, done: Done) -> None:
    """Have `config` read and checked; `done` gets the settings, or the error with all faults."""
    try:
        with deaf_to_interrupts():
            child = subprocess.Popen(
                [*python_command("droprd.settings.loading"), "--config", config, "--emit"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env=child_environment(),
            )
    except OSError as error:
        why = f"the process that checks it cannot be started: {error}"
        done(ConfigError(f"the configuration {config} cannot be used", why=why))
        return
    assert child.stdout is not None
    out = child.stdout.fileno()
    os.set_blocking(out, False)
    parts: list[bytes] = []

    def readable() -> None:
        data = os.read(out, 65536)
        parts.append(data)
        if not data or sum(map(len, parts)) > _BYTES_MAX:
            loop.forget(out)

    def ended(code: int) -> None:
        child.returncode = code
        timer.cancel()
        loop.forget(out)
        assert child.stdout is not None
        try:
            while data := os.read(out, 65536):
                parts.append(data)
        except BlockingIOError:
            pass
        child.stdout.close()
        done(_answer(b"".join(parts), config, code))

    timer = loop.later(TIMEOUT_S, child.kill)
    loop.watch(out, readable)
    loop.on_end(child.pid, ended)


def _answer(data: bytes, config: str, code: int) -> Settings | ConfigError:
    what = f"the configuration {config} cannot be used"
    hint = "mend it, then see `droprctl config check`"
    try:
        answer = msgpack.unpackb(data, raw=False, strict_map_key=True, max_ext_len=0)
        if "faults" in answer:
            return ConfigError(
                str(answer.get("what", what)),
                faults=[str(fault) for fault in answer["faults"]],
                hint=str(answer.get("hint", hint)),
                code=str(answer.get("code", ConfigError.code)),
            )
        return Settings.from_dict(answer["ok"])
    except (ValueError, TypeError, KeyError, msgpack.UnpackException, BadData) as error:
        why = f"the process that checks it ended with {code} ({error})"
        return ConfigError(what, why=why, hint="see its message above")


def python_command(module: str) -> Sequence[str]:
    """How a child of ours is started: this interpreter, not looking in the current directory."""
    return [sys.executable, "-P", "-m", module]


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """What is started in here never gets SIGINT: a Ctrl-C on the terminal is for the angel alone.

    The mask is inherited; a process group of their own would do too, but the kernel wakes stopped
    processes of a group whose parent has died.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def child_environment() -> dict[str, str]:
    """The environment of our children: droprd is found where we were found."""
    environment = dict(os.environ)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if os.path.basename(root) not in ("site-packages", "dist-packages"):
        known = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(part for part in (root, known) if part)
    return environment
