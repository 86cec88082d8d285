"""Two network namespaces with a line between them, which can be slow, cut and silent.

Needs root and the programs `ip`, `tc` and `ss` of iproute2; `needs_namespaces` skips a test where
they are missing. Everything made here goes when the context ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from droprd.testing.node import Node

NEAR, FAR = "10.99.8.1", "10.99.8.2"
PROGRAMS = ("ip", "tc", "ss")


def _lack() -> str:
    if os.geteuid() != 0:
        return "network namespaces want root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(missing)} of iproute2 missing" if missing else ""


needs_namespaces = pytest.mark.skipif(bool(_lack()), reason=_lack() or "all is there")


def run(line: str) -> None:
    """Run a command. Raises: AssertionError with what it said, if it fails."""
    done = subprocess.run(line.split(), check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}: {done.stderr}"


class Line:
    """The line between the namespaces `near` and `far`."""

    def __init__(self, near: str, far: str) -> None:
        self.near = near
        self.far = far
        self.cuts = 0

    def slow_down(self, rate: str) -> None:
        """Let no more than `rate` through, each way; what does not fit waits, or is dropped."""
        for namespace, device in ((self.near, "near"), (self.far, "far")):
            run(
                f"ip netns exec {namespace} tc qdisc replace dev {device} root "
                f"tbf rate {rate} burst 4kb latency 3s"
            )

    def cut(self) -> None:
        """Reset every connection over the line; new ones may come at once."""
        run(f"ip netns exec {self.near} ss -K dst {FAR}")
        self.cuts += 1

    @contextmanager
    def cut_every(self, seconds: float) -> Iterator[None]:
        """Cut it again and again."""
        over = threading.Event()

        def cutting() -> None:
            while not over.wait(seconds):
                self.cut()

        thread = threading.Thread(target=cutting)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing passes and nobody is told: packets vanish, as behind a router that died."""
        # A token bucket too small for any packet: the device stays up, and no route is lost.
        for namespace, device in ((self.near, "near"), (self.far, "far")):
            run(
                f"ip netns exec {namespace} tc qdisc replace dev {device} root "
                "tbf rate 8bit burst 1 limit 1"
            )
        try:
            yield
        finally:
            for namespace, device in ((self.near, "near"), (self.far, "far")):
                run(f"ip netns exec {namespace} tc qdisc del dev {device} root")


@contextmanager
def two_namespaces() -> Iterator[Line]:
    """A line between two new namespaces, at `NEAR` and `FAR`."""
    near, far = f"droprd-n{os.getpid()}", f"droprd-f{os.getpid()}"
    try:
        for namespace in (near, far):
            run(f"ip netns add {namespace}")
            run(f"ip -n {namespace} link set lo up")
        run(f"ip -n {near} link add near type veth peer name far netns {far}")
        run(f"ip -n {near} addr add {NEAR}/24 dev near")
        run(f"ip -n {far} addr add {FAR}/24 dev far")
        run(f"ip -n {near} link set near up")
        run(f"ip -n {far} link set far up")
        yield Line(near, far)
    finally:
        for namespace in (near, far):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


class LineNode(Node):
    """A node inside a namespace, which listens on that namespace's address."""

    def __init__(self, directory: Path, name: str, namespace: str, address: str) -> None:
        self._address = address
        super().__init__(
            directory,
            name,
            prefix=("ip", "netns", "exec", namespace),
            env={"DROPRD_RECEIVER__ALLOW_PLAIN_HTTP": "true"},
        )

    @property
    def listen(self) -> str:
        return f"{self._address}:{self.port}"

    def ctl(
        self,
        *args: str,
        stdin: bytes | None = None,
        check: bool = True,
        at: bool = True,
        within_s: float = 120,
    ) -> subprocess.CompletedProcess[bytes]:
        """See `Node.ctl`; a node that is made is allowed to listen beyond loopback."""
        if args[0] == "init":
            args = (*args, "--allow-plain-http")
        return super().ctl(*args, stdin=stdin, check=check, at=at, within_s=within_s)
