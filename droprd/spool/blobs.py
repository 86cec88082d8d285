"""Blobs of the outbox: bodies that are too large for a frame, one file each.

    outbox/blobs/<journal name>~<frame id hex>    its frame goes to that journal, not merged yet
    outbox/blobs/<frame id hex>                   merged (renamed by the sender)

Guarantees: when `write_blob` or `copy_blob` returns, bytes and name are on stable storage, with the
CRC-32 and SHA-256 of exactly the bytes that are in the file; only then may a frame name it.

A crash leaves a file that no frame names. It is an orphan once the journal in its name is gone; so
the journal must be held from before the blob is made until its frame is synced.

Raises: OSError; the unfinished file is removed then. BadData if a source changed while it was read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol
from zlib import crc32

from droprd.errors import BadData
from droprd.model import MIB
from droprd.spool.fsops import Buffer, Fs
from droprd.spool.layout import Layout

BLOB_MODE = 0o640
CHUNK_BYTES = 1 * MIB


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> None: ...
    def digest(self) -> bytes: ...


class Blob:
    """A blob on stable storage that its frame does not name yet."""

    __slots__ = ("crc", "frame_id", "journal", "sha256", "size")

    def __init__(self, journal: str, frame_id: bytes, size: int, crc: int, sha256: bytes) -> None:
        self.journal = journal
        self.frame_id = frame_id
        self.size = size
        self.crc = crc
        self.sha256 = sha256


def write_blob(fs: Fs, layout: Layout, journal: str, frame_id: bytes, body: bytes) -> Blob:
    """Make a blob of bytes in memory."""
    path = layout.journal_blob(journal, frame_id)
    fd = _create(fs, path)
    try:
        for at in range(0, len(body), CHUNK_BYTES):
            fs.write_at(fd, [memoryview(body)[at : at + CHUNK_BYTES]], at)
        fs.sync(fd, "blob.put")
    except OSError:
        _undo(fs, fd, path)
        raise
    fs.close(fd)
    _sync_name(fs, layout, path)
    return Blob(journal, frame_id, len(body), crc32(body), hashlib.sha256(body).digest())


def copy_blob(
    fs: Fs, layout: Layout, journal: str, frame_id: bytes, source_fd: int, size: int
) -> Blob:
    """Make a blob of the first `size` bytes of an open file, copied within the kernel if possible.

    The checksums are those of the copy: the source may change while we read it.

    Raises: OSError, EIO if the source ends early.
    """
    path = layout.journal_blob(journal, frame_id)
    fd = _create(fs, path)
    try:
        crc = 0
        digest: _Hash = hashlib.sha256()
        at = 0
        while at < size:
            step = min(16 * CHUNK_BYTES, size - at)
            fs.copy(source_fd, at, fd, at, step)
            for chunk in read_chunks(fs, fd, at, at + step):
                crc = crc32(chunk, crc)
                digest.update(chunk)
            at += step
        fs.sync(fd, "blob.put")
    except (OSError, BadData):
        _undo(fs, fd, path)
        raise
    fs.close(fd)
    _sync_name(fs, layout, path)
    return Blob(journal, frame_id, size, crc, digest.digest())


def read_chunks(fs: Fs, fd: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes of an open file from `start` to `end`. Raises BadData if it ends early."""
    while start < end:
        chunk = fs.read_at(fd, min(CHUNK_BYTES, end - start), start)
        if not chunk:
            raise BadData("a file ends early", why=f"{end - start} bytes are missing")
        yield chunk
        start += len(chunk)


def move_blob(fs: Fs, layout: Layout, blob: Blob, journal: str) -> None:
    """Let the blob belong to another journal: its own turned over before its frame was put.

    The old journal is still held by us, so the file is an orphan in nobody's eyes.
    """
    fs.rename(
        layout.journal_blob(blob.journal, blob.frame_id),
        layout.journal_blob(journal, blob.frame_id),
    )
    blob.journal = journal
    fs.sync_dir(layout.outbox_blobs, "blob.move_dir")


def remove_blob(fs: Fs, layout: Layout, blob: Blob) -> None:
    """Remove a blob that no frame names. A failure is no matter: it is an orphan some day."""
    _unlink(fs, layout.journal_blob(blob.journal, blob.frame_id))


def merged_blob(fs: Fs, layout: Layout, frame_id: bytes) -> str | None:
    """Where the blob of a frame in a lane lies; a power cut may have taken back its new name."""
    path = layout.outbox_blob(frame_id)
    if fs.stat(path) is not None:
        return path
    for name in fs.listdir(layout.outbox_blobs):
        if name.endswith(f"~{frame_id.hex()}"):
            return f"{layout.outbox_blobs}/{name}"
    return None


def _create(fs: Fs, path: str) -> int:
    return fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, BLOB_MODE)


def _sync_name(fs: Fs, layout: Layout, path: str) -> None:
    try:
        # If we stop here: an orphan, which no frame names.
        fs.sync_dir(layout.outbox_blobs, "blob.put_dir")
    except OSError:
        _unlink(fs, path)
        raise


def _undo(fs: Fs, fd: int, path: str) -> None:
    fs.close(fd)
    _unlink(fs, path)


def _unlink(fs: Fs, path: str) -> None:
    with suppress(OSError):
        fs.unlink(path)
