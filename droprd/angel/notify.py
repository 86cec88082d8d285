"""Tell systemd how we are: sd_notify(3), without its library.

Silent where no NOTIFY_SOCKET was given, and when systemd does not listen: a status line is never
worth a failure.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping


class Notifier:
    """Sends states to the service manager. Takes its variables out of `environment`."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        usec = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", str(os.getpid()))
        self.watchdog_s = 0.0
        if usec.isdecimal() and pid == str(os.getpid()):
            self.watchdog_s = int(usec) / 1e6
        self._status = ""

    def send(self, **states: str | int) -> None:
        """Send e.g. READY=1, STOPPING=1, WATCHDOG=1, STATUS=text, EXTEND_TIMEOUT_USEC=n."""
        if not self._address:
            return
        path = self._address
        if path.startswith("@"):
            path = "\0" + path[1:]
        text = "\n".join(f"{key}={value}" for key, value in states.items())
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.sendto(text.encode(), path)

    def status(self, text: str) -> None:
        """Set the status line, if it is another one."""
        if text != self._status:
            self._status = text
            self.send(STATUS=text.replace("\n", " "))
