"""Health by HTTP: /metrics for Prometheus, /healthz and /readyz for orchestrators. In the janitor.

Imported only when `[monitor] listen` is set: aiohttp and prometheus-client cost memory. It listens
on loopback or a Unix socket only, knows no credentials, and changes nothing. Each answer comes from
the daemon's control socket, asked at most once a second however many ask here, so it says what
droprctl says.

    /metrics   the metrics of core/metrics.py
    /healthz   200 while the daemon answers and does its work; 503 where a restart would help
    /readyz    200 while it runs, and nothing is critical; 503 with the reasons otherwise

A port that cannot be used is a problem in the status, tried again, and never ends the janitor.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from droprd import logs
from droprd.core.health import RESTART_HELPS
from droprd.core.metrics import metrics
from droprd.errors import DroprdError
from droprd.net.control import Control
from droprd.settings.addresses import split_address

FRESH_S = 1.0
ANSWER_WITHIN_S = 4.0
TRY_AGAIN_S = 10.0
MONITOR_GROUP = "droprd-monitor"

log = logging.getLogger("droprd.janitor")


class Exporter:
    """Serves one address until closed."""

    def __init__(self, control: str, listen: str) -> None:
        self.listen = listen
        self.problem = ""
        self._control = control
        self._asking = asyncio.Lock()
        self._told: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._told_at = float("-inf")
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        """Listen no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _serve(self) -> None:
        while True:
            try:
                with _listening(self.listen) as sock:
                    await self._serve_on(sock)
            except OSError as error:
                problem = f"health cannot be served on {self.listen}: {error.strerror}"
                if problem != self.problem:
                    self.problem = problem
                    logs.event(log, logging.ERROR, problem)
            await asyncio.sleep(TRY_AGAIN_S)

    async def _serve_on(self, sock: socket.socket) -> None:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.SockSite(runner, sock).start()
            self.problem = ""
            logs.event(log, logging.INFO, "health is served", listen=self.listen)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    # -- answers ---------------------------------------------------------------------------------

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            status, health = await self._ask()
        except DroprdError as error:
            return web.Response(status=503, text=f"{error}\n")
        registry = CollectorRegistry()
        registry.register(Collector(status, health))
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def _healthz(self, request: web.Request) -> web.Response:
        try:
            _, health = await self._ask()
        except DroprdError as error:
            return web.Response(status=503, text=f"{error}\n")
        bad = [
            r for r in health["reasons"] if r["level"] == "critical" and r["code"] in RESTART_HELPS
        ]
        return web.json_response(health, status=503 if bad else 200)

    async def _readyz(self, request: web.Request) -> web.Response:
        try:
            status, health = await self._ask()
        except DroprdError as error:
            return web.Response(status=503, text=f"{error}\n")
        ready = status["state"] == "running" and health["verdict"] != "critical"
        return web.json_response(health, status=200 if ready else 503)

    async def _ask(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(status, health). Raises: DroprdError."""
        async with self._asking:
            if self._told is None or time.monotonic() - self._told_at >= FRESH_S:
                self._told = None
                self._told = await asyncio.to_thread(self._call)
                self._told_at = time.monotonic()
            return self._told

    def _call(self) -> tuple[dict[str, Any], dict[str, Any]]:
        with Control(self._control, ANSWER_WITHIN_S, "droprd-janitor") as control:
            return control.call("status"), control.call("health")


class Collector:
    """What prometheus-client writes out."""

    def __init__(self, status: dict[str, Any], health: dict[str, Any]) -> None:
        self._status = status
        self._health = health

    def collect(self) -> Iterable[Metric]:
        """The families of core/metrics.py in its words."""
        for one in metrics(self._status, self._health):
            kind = CounterMetricFamily if one.is_counter else GaugeMetricFamily
            family = kind(one.name, one.text, labels=one.labels)
            for labels, value in one.samples:
                family.add_metric(labels, value)
            yield family


@contextlib.contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    """A listening socket; one of ours that a killed janitor left is replaced. Raises: OSError."""
    if not address.startswith("unix:"):
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as sock:
            yield sock
        return
    path = address.removeprefix("unix:")
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(path)
        try:
            # Who may ask the control socket for health may ask here.
            os.chmod(path, 0o660)
            with contextlib.suppress(KeyError, PermissionError):
                os.chown(path, -1, grp.getgrnam(MONITOR_GROUP).gr_gid)
            sock.listen()
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
