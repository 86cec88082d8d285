"""Spools for tests: a node without its daemon, and what lies in its journals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from droprd.core import frame as frames
from droprd.settings.published import public_map
from droprd.settings.values import Settings
from droprd.spool import journalfile, log
from droprd.spool.fsops import OsFs
from droprd.spool.layout import Layout, make_spool
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
