"""`droprd`: the way in. Reads the configuration, becomes the daemon of its spool, runs the angel.

    droprd [--config FILE | -C DIR] [--version]

Stays in the foreground and logs to standard error. SIGTERM and SIGINT stop it, SIGHUP reloads the
configuration. Exit status: 0 stopped as asked, 78 (EX_CONFIG) the configuration cannot be used,
1 anything else: no spool, spool in use, port in use, unsafe file system.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from droprd import logs
from droprd.angel import sockets
from droprd.angel.angel import MODULES, Angel, watch_signals
from droprd.angel.commands import methods
from droprd.angel.configuration import read_settings
from droprd.angel.loop import Loop
from droprd.angel.notify import Notifier
from droprd.angel.succession import take_lock
from droprd.errors import ConfigError, DroprdError, SpoolBusy, SpoolNotReady
from droprd.settings.published import find_config
from droprd.settings.values import Settings
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, read_version
from droprd.spool.mounts import mount_of

EXIT_FAILED = 1
EXIT_CONFIG = 78
DESCRIPTORS_MAX = 65536

log = logging.getLogger("droprd.angel")


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point `droprd`; returns its exit status."""
    return run(arguments, MODULES)


def run(arguments: Sequence[str] | None, modules: Mapping[str, str]) -> int:
    """Be the daemon with these worker modules until it is stopped; returns the exit status."""
    config = _arguments(arguments)
    logs.set_up("angel")
    notifier = Notifier(os.environ)
    # Connections and segments need more descriptors than the usual 1024; the workers inherit this.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    loop = Loop()
    try:
        return _serve(loop, config, notifier, sockets.inherited(os.environ), modules)
    except DroprdError as error:
        pid = error.pid if isinstance(error, SpoolBusy) else None
        logs.event(log, logging.CRITICAL, str(error), code=error.code, pid=pid)
        notifier.send(STATUS=f"failed: {error.what}", ERRNO=1)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
    except OSError as error:
        logs.event(log, logging.CRITICAL, "the daemon cannot go on", why=str(error))
        notifier.send(STATUS=f"failed: {error}", ERRNO=error.errno or 1)
        return EXIT_FAILED


def _arguments(arguments: Sequence[str] | None) -> str:
    """The configuration file that is meant."""
    parser = argparse.ArgumentParser(
        prog="droprd", description="The daemon of a droprd node. Stays in the foreground."
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", metavar="FILE", help="configuration file")
    where.add_argument(
        "-C", metavar="DIR", dest="directory", help="same as --config DIR/droprd.toml"
    )
    parser.add_argument("--version", action="version", version=f"droprd {_version()}")
    given = parser.parse_args(arguments)
    if given.directory is not None:
        return os.path.join(os.path.abspath(given.directory), "droprd.toml")
    return find_config(given.config)


def _version() -> str:
    try:
        return metadata.version("droprd")
    except metadata.PackageNotFoundError:
        return "unknown"


def _serve(
    loop: Loop,
    config: str,
    notifier: Notifier,
    inherited: list[sockets.Listening],
    modules: Mapping[str, str],
) -> int:
    stopped: list[int] = []
    loop.on_signal(signal.SIGTERM, lambda: stopped.append(signal.SIGTERM))
    loop.on_signal(signal.SIGINT, lambda: stopped.append(signal.SIGINT))
    loop.on_signal(signal.SIGHUP, lambda: None)
    settings = _settings(loop, config)
    logs.set_up("angel", level=settings.log.level, form=settings.log.format)
    fs = OsFs()
    facts = read_version(fs, settings.node.spool)
    problems = _unsafe(settings)
    lock = take_lock(loop, fs, Layout(settings.node.spool), lambda: bool(stopped))
    if lock is None or stopped:
        return 0
    angel = Angel(
        loop=loop,
        fs=fs,
        clock=SystemClock(),
        settings=settings,
        version=_version(),
        spool_id=facts.spool_id,
        lock=lock,
        notifier=notifier,
        inherited=inherited,
        modules=modules,
        problems=problems,
    )
    watch_signals(angel)
    try:
        angel.start(methods(angel))
        loop.run(lambda: angel.done)
    finally:
        code = angel.close()
    return code


def _settings(loop: Loop, config: str) -> Settings:
    answers: list[Settings | ConfigError] = []
    read_settings(loop, config, answers.append)
    loop.run(lambda: bool(answers))
    if isinstance(answers[0], ConfigError):
        raise answers[0]
    return answers[0]


def _unsafe(settings: Settings) -> list[str]:
    """What is to be told of the spool's file system. Raises SpoolNotReady (unsafe_filesystem)."""
    mount = mount_of(settings.node.spool)
    if mount is None or not mount.unsafe:
        return []
    if not settings.node.allow_unsafe_filesystem:
        raise SpoolNotReady(
            f"the spool at {settings.node.spool} lies on {mount.kind}, where nothing is durable",
            why=mount.unsafe,
            hint="move it to a local disk, or set allow_unsafe_filesystem = true in [node]",
            code="unsafe_filesystem",
        )
    return [f"the spool lies on {mount.kind}, where messages do not survive: {mount.unsafe}"]


if __name__ == "__main__":
    sys.exit(main())
