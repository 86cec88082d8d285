"""Which inbox store a consumer gets: files, one from another package, or none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from droprd.client.inbox import Inbox
from droprd.client.stores import open_inbox_store
from droprd.errors import ConfigError
from droprd.settings.published import find_node
from droprd.spool.clock import SystemClock
from droprd.spool.inbox import FilesInbox
from droprd.testing.inboxes import MemoryConsumer, MemoryInbox
from tests.spools import new_spool


@pytest.fixture
def config(tmp_path: Path) -> Path:
    new_spool(tmp_path / "spool")
    path = tmp_path / "droprd.toml"
    path.write_text('[node]\nname = "hamburg"\nspool = "spool"\n')
    return path


def test_files_are_the_default(config: Path) -> None:
    store = open_inbox_store(find_node(str(config)), SystemClock())
    assert isinstance(store, FilesInbox)
    store.close()
    with Inbox(config=config) as inbox:
        assert inbox.receive("sites") == []


def test_a_store_of_another_package_is_found_by_its_entry_point(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "otherstore-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: otherstore\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[droprd.inboxes]\nother = otherstore:memory\n")
    (tmp_path / "site" / "otherstore.py").write_text(
        "from droprd.testing.inboxes import MemoryInbox\nmemory = MemoryInbox()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    config.write_text(config.read_text() + '[inbox]\nstore = "other"\n')
    with Inbox(config=config) as inbox:
        memory = sys.modules["otherstore"].memory
        assert isinstance(memory, MemoryInbox)
        memory.deliver([b"from another store"])
        (message,) = inbox.receive("sites")
        assert message.body == b"from another store"
        assert inbox._opened is not None
        assert isinstance(inbox._opened[0], MemoryConsumer)


def test_a_store_that_is_not_installed_is_a_fault_of_the_configuration(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "DROPRD_INBOX__STORE", "tapes")
    with pytest.raises(ConfigError) as caught:
        Inbox(config=config)
    assert caught.value.code == "store_missing"
    assert "tapes" in str(caught.value)
