"""Spools for tests: a node without its daemon, what lies in its journals, and a faulty disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from droprd.core import frame as frames
from droprd.settings.published import public_map
from droprd.settings.values import Settings
from droprd.spool import journalfile, log
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import Buffer, OsFs
from droprd.spool.journal import Journal
from droprd.spool.layout import Layout, make_spool, read_version
from droprd.spool.state import read_public, write_public

FS = OsFs()


def new_spool(path: Path, *peers: str, node: str = "hamburg", **changes: Any) -> Layout:
    """A spool at `path` whose node knows these peers; `changes` go into state/public."""
    facts = make_spool(FS, str(path), os.urandom)
    layout = Layout(str(path))
    settings = Settings.from_dict(
        {
            "node": {"name": node, "spool": str(path)},
            "peers": {peer: {"url": f"https://{peer}.example:7707"} for peer in peers},
        }
    )
    public = public_map(settings, facts.spool_id, disk_bytes=1 << 40)
    public["limits"]["reserve_bytes"] = 1 << 20
    write_public(FS, layout, public)
    publish(layout, **changes)
    return layout


def publish(layout: Layout, **changes: Any) -> None:
    """Change state/public; maps are merged one level deep."""
    public = read_public(FS, layout)
    assert public is not None
    for key, value in changes.items():
        public[key] = {**public[key], **value} if isinstance(value, dict) else value
    write_public(FS, layout, public)


def frames_of(layout: Layout, name: str, *, published: bool = True) -> list[frames.Frame]:
    """The frames of one journal: those before its published end, or all that are whole."""
    file = journalfile.open_journal(FS, layout, name)
    assert file is not None
    try:
        end = file.published()
        stop = end if published else file.size()
        walk = log.Walk(FS, file.fd, file.header.log_id, promised=end, stop=stop)
        found = []
        for item in walk:
            assert isinstance(item, log.Entry), item
            if len(item.frame):
                frame = frames.parse(bytes(item.frame))
                assert not frame.bad_bodies()
                found.append(frame)
        return found
    finally:
        file.close()


def journal_names(layout: Layout) -> list[str]:
    return journalfile.list_journals(FS, layout)


def all_frames(layout: Layout, *, published: bool = True) -> list[frames.Frame]:
    """The frames of all journals in the order of their stamps, as a merge would take them."""
    found = [f for n in journal_names(layout) for f in frames_of(layout, n, published=published)]
    return sorted(found, key=lambda frame: frame.stamp.boot_ns)


def bodies_by_id(layout: Layout, *, published: bool = True) -> dict[str, bytes]:
    """What was put, by message id, in order; of blobs what their files hold."""
    found: dict[str, bytes] = {}
    for frame in all_frames(layout, published=published):
        for index, message_id in enumerate(frame.ids()):
            assert message_id not in found
            if frame.info.is_blob:
                (path,) = Path(layout.outbox_blobs).glob(f"*{frame.frame_id.hex()}")
                found[message_id] = path.read_bytes()
            else:
                found[message_id] = bytes(frame.body(index))
    return found


class FaultyFs(OsFs):
    """Fails where it is told to: `fail(operation, site or bytes)` returns an errno or None."""

    def __init__(self) -> None:
        self.fail: Callable[[str, str, int], int | None] = lambda operation, site, size: None
        self.syncs: list[str] = []

    def _try(self, operation: str, site: str = "", size: int = 0) -> None:
        code = self.fail(operation, site, size)
        if code is not None:
            raise OSError(code, os.strerror(code))

    def write_at(self, fd: int, pieces: Sequence[Buffer], offset: int) -> None:
        size = sum(map(len, pieces))
        try:
            self._try("write", "", size)
        except OSError:
            super().write_at(fd, [b"".join(pieces)[: size // 2]], offset)
            raise
        super().write_at(fd, pieces, offset)

    def truncate(self, fd: int, length: int) -> None:
        self._try("truncate")
        super().truncate(fd, length)

    def sync(self, fd: int, site: str) -> None:
        self.syncs.append(site)
        self._try("sync", site)
        super().sync(fd, site)

    def sync_dir(self, path: str, site: str) -> None:
        self.syncs.append(site)
        self._try("sync", site)
        super().sync_dir(path, site)


class Producer:
    """Journals on one spool, and the faulty disk under them."""

    def __init__(self, path: Path) -> None:
        self.layout = new_spool(path, "berlin")
        self.fs = FaultyFs()
        self.spool_id = read_version(self.fs, self.layout.root).spool_id

    def journal(self, **more: int) -> Journal:
        more.setdefault("uid", os.geteuid())
        return Journal(self.fs, SystemClock(), os.urandom, self.layout, self.spool_id, **more)
