"""Blobs of the inbox: bodies too large for a frame, as they arrive.

    inbox/blobs/<peer>~<frame id hex>.part    arriving; may be resumed at its size
    inbox/blobs/<peer>~<frame id hex>         whole: it matched the CRC-32 and SHA-256 of its frame

Guarantees: a file has its whole name only after its bytes were synced and compared with the frame
that names it, and the name is synced before that frame is appended. Pieces are written at their
offset, and only at the end of what is there; a later request for the same blob takes over from an
earlier one that still hangs.

What a crash leaves: a `.part` of any length and, after a power cut, any content: it is compared
before it counts. Names are synced at the start, since a name may be younger than the crash.

Raises OSError; PieceRefused.
"""

from __future__ import annotations

import hashlib
import os
from typing import Protocol
from zlib import crc32

from droprd.core.frame import Frame
from droprd.core.intake import blob_sha256
from droprd.errors import BadData, DroprdError
from droprd.model import MIB
from droprd.spool.fsops import Buffer, Fs
from droprd.spool.layout import Layout, split_inbox_blob_name

CHUNK_BYTES = 1 * MIB
HASHES_MAX = 256
"""Blobs whose checksums are kept as they arrive; others are read again when they are whole."""

BlobKey = tuple[str, bytes]


class PieceRefused(DroprdError):
    """The piece does not begin where the blob ends. `have` bytes of it are there."""

    code = "blob_offset"

    def __init__(self, have: int) -> None:
        super().__init__(f"{have} bytes of this blob are here", why="the piece begins elsewhere")
        self.have = have


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> None: ...
    def digest(self) -> bytes: ...


class _Sums:
    """The checksums of the first `size` bytes of a blob."""

    __slots__ = ("crc", "sha", "size", "synced")

    def __init__(self) -> None:
        self.size = 0
        self.crc = 0
        self.sha: _Hash = hashlib.sha256()
        self.synced = False

    def add(self, data: Buffer) -> None:
        self.size += len(data)
        self.crc = crc32(data, self.crc)
        self.sha.update(data)


class Arrival:
    """One request's pieces of one blob. Not safe with threads; one call at a time."""

    def __init__(self, blobs: Arrivals, key: BlobKey, fd: int, at: int, size: int) -> None:
        self._blobs = blobs
        self._key = key
        self._fd = fd
        self.have = at
        self._size = size

    def write(self, data: Buffer) -> None:
        """Append `data`. Raises PieceRefused if another request took over."""
        if not self._blobs.is_current(self._key, self):
            raise PieceRefused(self._blobs.have(*self._key))
        if self.have + len(data) > self._size:
            raise BadData("a blob is longer than it was said to be")
        self._blobs.fs.write_at(self._fd, [data], self.have)
        self._blobs.summed(self._key, self.have, data)
        self.have += len(data)

    def close(self) -> int:
        """End this request; a blob that is complete is synced. Returns how much is there."""
        try:
            if self.have == self._size and self._blobs.is_current(self._key, self):
                self._blobs.sync(self._key, self._fd)
        finally:
            self._blobs.fs.close(self._fd)
            self._blobs.ended(self._key, self)
        return self.have


class Arrivals:
    """All blobs of the inbox that no frame names yet."""

    def __init__(self, fs: Fs, layout: Layout) -> None:
        """Raises: OSError."""
        self.fs = fs
        self._layout = layout
        self._sums: dict[BlobKey, _Sums] = {}
        self._current: dict[BlobKey, Arrival] = {}
        fs.sync_dir(layout.inbox_blobs, "arrivals.recover_dir")

    # -- pieces ----------------------------------------------------------------------------------

    def have(self, peer: str, frame_id: bytes) -> int:
        """How many bytes of a blob are there."""
        for path in (
            self._layout.inbox_blob(peer, frame_id),
            self._layout.inbox_blob_part(peer, frame_id),
        ):
            found = self.fs.stat(path)
            if found is not None:
                return found.size
        return 0

    def is_whole(self, peer: str, frame_id: bytes) -> bool:
        """Whether the blob has arrived, was compared with its frame, and has its name."""
        return self.fs.stat(self._layout.inbox_blob(peer, frame_id)) is not None

    def bytes_by_peer(self) -> dict[str, int]:
        """What all blobs take, those that are named by frames too. A look at each file."""
        total: dict[str, int] = {}
        for name in self.fs.listdir(self._layout.inbox_blobs):
            found = split_inbox_blob_name(name)
            there = self.fs.stat(f"{self._layout.inbox_blobs}/{name}")
            if found is not None and there is not None:
                total[found[0]] = total.get(found[0], 0) + there.size
        return total

    def arrive(self, peer: str, frame_id: bytes, offset: int, size: int) -> Arrival | None:
        """Begin to take pieces at `offset`; None if the blob is whole already.

        Raises: PieceRefused if the blob does not end at `offset`.
        """
        if self.is_whole(peer, frame_id):
            return None
        path = self._layout.inbox_blob_part(peer, frame_id)
        # Exclusively, so that it gets its rights whatever the umask is.
        is_new = self.fs.stat(path) is None
        fd = self.fs.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if is_new else 0))
        have = self.fs.size(fd)
        if have != offset:
            self.fs.close(fd)
            raise PieceRefused(have)
        key = (peer, frame_id)
        if offset == 0:
            self._sums.pop(key, None)
            while len(self._sums) >= HASHES_MAX:
                del self._sums[next(iter(self._sums))]
            self._sums[key] = _Sums()
        arrival = self._current[key] = Arrival(self, key, fd, offset, size)
        return arrival

    def is_current(self, key: BlobKey, arrival: Arrival) -> bool:
        """Whether no later request took over."""
        return self._current.get(key) is arrival

    def ended(self, key: BlobKey, arrival: Arrival) -> None:
        """A request's pieces have ended."""
        if self.is_current(key, arrival):
            del self._current[key]

    def summed(self, key: BlobKey, at: int, data: Buffer) -> None:
        """Go on with a blob's checksums."""
        sums = self._sums.get(key)
        if sums is None:
            return
        if sums.size != at:
            del self._sums[key]
        else:
            sums.add(data)

    def sync(self, key: BlobKey, fd: int) -> None:
        """Bring a whole blob to stable storage. If that fails it is deleted, to be sent afresh into
        another file: a second sync of this one might succeed and hide what was lost."""
        try:
            self.fs.sync(fd, "arrivals.put")
        except OSError:
            self._sums.pop(key, None)
            self.fs.unlink(self._layout.inbox_blob_part(*key))
            raise
        if key in self._sums:
            self._sums[key].synced = True

    # -- frames ----------------------------------------------------------------------------------

    def missing(self, peer: str, frame: Frame) -> int | None:
        """None if the body of a blob frame is there, whole and right; else how much of it is there.

        May read all of it. A whole one gets its name; one that does not match is deleted.
        Raises: OSError; BadData if a blob of that name belongs to another frame.
        """
        try:
            return self._missing(peer, frame)
        except FileNotFoundError:  # another request was just here
            return self._missing(peer, frame)

    def _missing(self, peer: str, frame: Frame) -> int | None:
        info = frame.info
        found = self.fs.stat(self._layout.inbox_blob(peer, info.frame_id))
        if found is not None:
            if found.size != info.bodies_bytes:
                raise BadData("another blob of this frame id is here", why="its size differs")
            return None
        path = self._layout.inbox_blob_part(peer, info.frame_id)
        found = self.fs.stat(path)
        if found is None or found.size < info.bodies_bytes:
            return 0 if found is None else found.size
        key = (peer, info.frame_id)
        if key in self._current:
            return found.size  # its last request has not ended
        sums = self._sums.pop(key, None)
        if sums is None or not sums.synced or sums.size != found.size:
            sums = self._read(key, path)
        if (
            sums.size != info.bodies_bytes
            or sums.crc != frame.crcs[0]
            or sums.sha.digest() != blob_sha256(frame)
        ):
            self.fs.unlink(path)
            return 0
        self.fs.rename(path, self._layout.inbox_blob(peer, info.frame_id))
        # If we stop here: the next push finds it by either name.
        self.fs.sync_dir(self._layout.inbox_blobs, "arrivals.whole")
        return None

    def _read(self, key: BlobKey, path: str) -> _Sums:
        """The checksums of what is on stable storage under this name."""
        sums = _Sums()
        fd = self.fs.open(path, os.O_RDWR)
        try:
            self.sync(key, fd)
            while data := self.fs.read_at(fd, CHUNK_BYTES, sums.size):
                sums.add(data)
        finally:
            self.fs.close(fd)
        return sums
