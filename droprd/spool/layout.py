"""Where every file of a spool lies, who may touch it, and how a spool is made and recognised.

Owns: the names and rights of all paths below the spool, and the file VERSION.

    VERSION      "droprd-spool 1\\nid <32 hex digits>\\n"; written last by `make_spool`

Guarantees: only `make_spool` ever makes a spool; `read_version` refuses a directory without
VERSION (an unmounted disk must not become an empty spool) and a format it does not know, and
changes no byte. A name that comes from outside is checked before it becomes part of a path.

A crash in `make_spool` leaves directories without VERSION: no spool yet. The next call goes on
there, as long as nothing but empty parts of a spool are in it.

Raises SpoolNotReady (codes spool_missing, spool_version, spool_exists, spool_rights).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from droprd.errors import SpoolNotReady
from droprd.model import check_name, check_priority
from droprd.spool.fsops import Fs, replace_file

FORMAT_VERSION = 1
SEND_GROUP = "droprd-send"
RECEIVE_GROUP = "droprd-receive"

_VERSION = re.compile(rb"droprd-spool ([0-9]{1,9})\n(?:id ([0-9a-f]{32})\n)?")
_SEGMENT = re.compile(r"([0-9]{8,18})\.log\Z")
_JOURNAL = re.compile(r"([0-9a-f]{32})-([0-9]{1,18})\.log\Z")
_JOURNAL_BLOB = re.compile(r"([0-9a-f]{32}-[0-9]{1,18}\.log)~([0-9a-f]{32})\Z")
_BLOB = re.compile(r"([0-9a-f]{32})\Z")
_INBOX_BLOB = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})~([0-9a-f]{32})(\.part)?\Z")


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one spool. `root` is its directory."""

    root: str

    @property
    def version(self) -> str:
        return f"{self.root}/VERSION"

    @property
    def lock(self) -> str:
        """Held (flock) by the daemon, or by a command that is the daemon for a moment."""
        return f"{self.root}/lock"

    # -- outbox --------------------------------------------------------------------------------

    @property
    def outbox(self) -> str:
        return f"{self.root}/outbox"

    @property
    def journals(self) -> str:
        return f"{self.root}/outbox/journals"

    def journal(self, name: str) -> str:
        """`name` as it stands in the directory: see `journal_name`."""
        return f"{self.root}/outbox/journals/{name}"

    @property
    def bell(self) -> str:
        return f"{self.root}/outbox/bell"

    @property
    def gate(self) -> str:
        return f"{self.root}/outbox/gate"

    @property
    def sender_log(self) -> str:
        return f"{self.root}/outbox/sender.log"

    @property
    def lanes(self) -> str:
        return f"{self.root}/outbox/lanes"

    def lane(self, peer: str, channel: str, priority: int) -> str:
        """The directory of one lane's segments. Raises: InvalidName, UsageError."""
        check_name(peer, "peer")
        check_name(channel, "channel")
        return f"{self.root}/outbox/lanes/{peer}/{channel}/{check_priority(priority)}"

    def lane_segment(self, peer: str, channel: str, priority: int, number: int) -> str:
        return f"{self.lane(peer, channel, priority)}/{segment_name(number)}"

    @property
    def outbox_dead(self) -> str:
        return f"{self.root}/outbox/dead.log"

    @property
    def outbox_blobs(self) -> str:
        return f"{self.root}/outbox/blobs"

    def journal_blob(self, journal: str, frame_id: bytes) -> str:
        """The body of a blob frame that lies in journal `journal` and is not merged yet."""
        return f"{self.root}/outbox/blobs/{journal}~{frame_id.hex()}"

    def outbox_blob(self, frame_id: bytes) -> str:
        """The body of a blob frame that is merged."""
        return f"{self.root}/outbox/blobs/{frame_id.hex()}"

    # -- inbox ---------------------------------------------------------------------------------

    @property
    def inbox(self) -> str:
        return f"{self.root}/inbox"

    @property
    def channels(self) -> str:
        return f"{self.root}/inbox/channels"

    def channel(self, channel: str) -> str:
        """The directory of a channel's priorities. Raises: InvalidName."""
        return f"{self.root}/inbox/channels/{check_name(channel, 'channel')}"

    def stream(self, channel: str, priority: int) -> str:
        """The directory of one channel's and priority's segments and claims."""
        return f"{self.channel(channel)}/{check_priority(priority)}"

    def inbox_segment(self, channel: str, priority: int, number: int) -> str:
        return f"{self.stream(channel, priority)}/{segment_name(number)}"

    def claims(self, channel: str, priority: int) -> str:
        return f"{self.stream(channel, priority)}/claims"

    @property
    def inbox_lanes_log(self) -> str:
        return f"{self.root}/inbox/lanes.log"

    @property
    def inbox_dead(self) -> str:
        return f"{self.root}/inbox/dead.log"

    @property
    def inbox_blobs(self) -> str:
        return f"{self.root}/inbox/blobs"

    def inbox_blob(self, peer: str, frame_id: bytes) -> str:
        """A body that has arrived whole. Raises: InvalidName."""
        return f"{self.root}/inbox/blobs/{check_name(peer, 'peer')}~{frame_id.hex()}"

    def inbox_blob_part(self, peer: str, frame_id: bytes) -> str:
        """A body that is still arriving."""
        return f"{self.inbox_blob(peer, frame_id)}.part"

    @property
    def waiting(self) -> str:
        return f"{self.root}/inbox/waiting"

    # -- state ---------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        return f"{self.root}/state"

    @property
    def public(self) -> str:
        return f"{self.root}/state/public"

    @property
    def pauses(self) -> str:
        return f"{self.root}/state/pauses"

    def gauges(self, worker: str) -> str:
        """The last gauges of `worker` (sender, receiver, janitor)."""
        return f"{self.root}/state/{worker}"

    @property
    def corrupt(self) -> str:
        return f"{self.root}/corrupt"


# -- names -------------------------------------------------------------------------------------


def segment_name(number: int) -> str:
    """The file name of segment `number`, which begin at 1; names sort as numbers do."""
    return f"{number:08d}.log"


def segment_number(name: str) -> int | None:
    """The number of a segment's file name, or None if it is none."""
    found = _SEGMENT.match(name)
    if found is None or segment_name(int(found[1])) != name:
        return None
    return int(found[1])


def journal_name(maker: bytes, number: int) -> str:
    """The file name of a journal: 16 random bytes of its maker, and a counter."""
    return f"{maker.hex()}-{number}.log"


def split_journal_name(name: str) -> tuple[bytes, int] | None:
    """(maker, number) of a journal's file name, or None if it is none."""
    found = _JOURNAL.match(name)
    if found is None:
        return None
    return bytes.fromhex(found[1]), int(found[2])


def split_outbox_blob_name(name: str) -> tuple[str | None, bytes] | None:
    """(journal or None if merged, frame id) of a name in outbox/blobs, or None if it is none."""
    found = _JOURNAL_BLOB.match(name)
    if found is not None:
        return found[1], bytes.fromhex(found[2])
    found = _BLOB.match(name)
    return None if found is None else (None, bytes.fromhex(found[1]))


def split_inbox_blob_name(name: str) -> tuple[str, bytes, bool] | None:
    """(peer, frame id, whole) of a name in inbox/blobs, or None if it is none."""
    found = _INBOX_BLOB.match(name)
    return None if found is None else (found[1], bytes.fromhex(found[2]), found[3] is None)


# -- rights ------------------------------------------------------------------------------------

OWNER = ""  # in RIGHTS: the owner's own group


@dataclass(frozen=True, slots=True)
class Rights:
    """One path that `make_spool` makes: kind ("dir", "file", "fifo"), group, mode.

    The mode holds where the groups of the spool exist; a private spool has 0700 for its
    directories and 0600 for its files, and no group matters.
    """

    path: str
    kind: str
    group: str
    mode: int


# Parents stand before their children. setgid and sticky only where several users make files.
RIGHTS: tuple[Rights, ...] = (
    Rights("", "dir", OWNER, 0o755),
    Rights("lock", "file", OWNER, 0o640),
    Rights("outbox", "dir", SEND_GROUP, 0o750),
    Rights("outbox/journals", "dir", SEND_GROUP, 0o3770),
    Rights("outbox/bell", "fifo", SEND_GROUP, 0o660),
    Rights("outbox/gate", "file", SEND_GROUP, 0o660),
    Rights("outbox/lanes", "dir", OWNER, 0o750),
    Rights("outbox/blobs", "dir", SEND_GROUP, 0o3770),
    Rights("inbox", "dir", RECEIVE_GROUP, 0o750),
    Rights("inbox/channels", "dir", RECEIVE_GROUP, 0o2750),
    Rights("inbox/blobs", "dir", RECEIVE_GROUP, 0o2750),
    Rights("inbox/waiting", "dir", RECEIVE_GROUP, 0o3770),
    Rights("state", "dir", OWNER, 0o755),
    Rights("corrupt", "dir", OWNER, 0o700),
)

CHANNEL_DIR_MODE = 0o750  # setgid is inherited from inbox/channels
CLAIMS_MODE = 0o660
PUBLIC_MODE = 0o644

# What may already lie in a directory that becomes a spool: a file system's own directory.
_HARMLESS = {"lost+found"}


@dataclass(frozen=True, slots=True)
class SharedRights:
    """Whom a spool with groups belongs to."""

    uid: int
    gid: int
    send_gid: int
    receive_gid: int

    def gid_of(self, group: str) -> int:
        return {SEND_GROUP: self.send_gid, RECEIVE_GROUP: self.receive_gid}.get(group, self.gid)


@dataclass(frozen=True, slots=True)
class SpoolFacts:
    """What VERSION says. The spool id is random and travels with every copy of the spool."""

    format_version: int
    spool_id: bytes


def read_version(fs: Fs, root: str) -> SpoolFacts:
    """What spool lies at `root`.

    Raises: SpoolNotReady with code spool_missing (no VERSION there), spool_version (a format this
    program does not know) or spool_rights (this user may not read it).
    """
    try:
        fd = fs.open(Layout(root).version, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        raise SpoolNotReady(
            f"there is no spool at {root}",
            why="the directory or its VERSION is missing",
            hint="mount the disk that holds it, or make one with `droprctl init`",
            code="spool_missing",
        ) from None
    except PermissionError as error:
        raise SpoolNotReady(
            f"the spool at {root} cannot be read",
            why=error.strerror or "not permitted",
            hint=f"join the group {SEND_GROUP} or {RECEIVE_GROUP}, or use the spool's own user",
            code="spool_rights",
        ) from None
    try:
        data = fs.read_at(fd, 200, 0)
    finally:
        fs.close(fd)
    found = _VERSION.match(data)
    if found is None or int(found[1]) != FORMAT_VERSION or found[2] is None:
        says = f"format {int(found[1])}" if found is not None else "something unreadable"
        raise SpoolNotReady(
            f"the spool at {root} cannot be used by this version of droprd",
            why=f"its VERSION says {says}, this program knows format {FORMAT_VERSION}",
            hint="install the droprd that made it; nothing was changed",
            code="spool_version",
        )
    return SpoolFacts(int(found[1]), bytes.fromhex(found[2].decode()))


def check_can_make(fs: Fs, root: str) -> None:
    """Whether `make_spool` would work: nothing there, an empty directory, or a half-made spool.

    Raises: SpoolNotReady (spool_exists).
    """
    found = fs.stat(root)
    if found is None:
        return
    strange = not found.is_dir or fs.stat(Layout(root).version) is not None
    if not strange:
        made = {rights.path: rights.kind for rights in RIGHTS}
        pending = [""]
        while pending and not strange:
            parent = pending.pop()
            for name in fs.listdir(f"{root}/{parent}" if parent else root):
                path = f"{parent}/{name}" if parent else name
                if path in ("VERSION.new", *_HARMLESS):
                    continue
                if path not in made:
                    strange = True
                    break
                if made[path] == "dir":
                    pending.append(path)
    if strange:
        raise SpoolNotReady(
            f"no spool can be made at {root}",
            why="there is a spool already" if fs.stat(Layout(root).version) else "it is not empty",
            hint="choose another directory, or remove this one by hand",
            code="spool_exists",
        )


def make_spool(
    fs: Fs, root: str, urandom: Callable[[int], bytes], shared: SharedRights | None = None
) -> SpoolFacts:
    """Make a spool at `root`, whose parent exists. `root` may be an empty directory.

    Private (0700, the caller's own) unless `shared` names the owner and the groups, which needs
    root. Raises: SpoolNotReady (spool_exists), OSError.
    """
    check_can_make(fs, root)
    was_there = fs.stat(root) is not None
    for rights in RIGHTS:
        path = f"{root}/{rights.path}" if rights.path else root
        mode = rights.mode
        if shared is None:
            mode = 0o700 if rights.kind == "dir" else 0o600
        if fs.stat(path) is None:
            if rights.kind == "dir":
                fs.mkdir(path, mode & 0o777)
            elif rights.kind == "fifo":
                fs.mkfifo(path, mode)
            else:
                fs.close(fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        if shared is not None:
            os.chown(path, shared.uid, shared.gid_of(rights.group), follow_symlinks=False)
            os.chmod(path, mode)  # after chown, which may clear setgid
        elif was_there and not rights.path:
            os.chmod(path, mode)  # it may be open to others
    for rights in RIGHTS:
        if rights.kind == "dir":
            fs.sync_dir(f"{root}/{rights.path}" if rights.path else root, "layout.make")
    fs.sync_dir(os.path.dirname(os.path.abspath(root)), "layout.make")
    spool_id = urandom(16)
    text = f"droprd-spool {FORMAT_VERSION}\nid {spool_id.hex()}\n".encode()
    # If we stop here: parts of a spool, no VERSION; the next `make_spool` goes on.
    mode = 0o644 if shared is not None else 0o600
    replace_file(fs, Layout(root).version, text, "layout.version", mode)
    if shared is not None:
        os.chown(Layout(root).version, shared.uid, shared.gid, follow_symlinks=False)
    return SpoolFacts(FORMAT_VERSION, spool_id)
