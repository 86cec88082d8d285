"""The entry: what a log is made of. A frame with a small header, or a note.

    log file header, 4096 bytes of which the first 80 are used, little-endian
      0  magic "DROPRDLG"   8  version u16   10  kind u16   12  log id 16   28  spool id 16
     44  base u64           52  wall-clock ns at creation   60  CRC-32 of bytes 0..59
     64  published synced end u64            72  the same, all bits inverted

    entry header, 52 bytes
      0  magic "DRE1"       4  note bytes u32                8  frame bytes u32
     12  log id 16         28  own offset u64               36  synced end when written u64
     44  (zero) u32        48  CRC-32 of bytes 0..47 and of the note
    then: the note (msgpack), the frame.

Every entry names its log and its place in it, so that stale bytes of a recycled or cut file never
count, and a search after damage cannot mistake a body for an entry. `synced end when written` is
the newest point then known to be on stable storage: damage before the largest such point was
promised; damage after it is the tail of a crash.

Pure. Raises BadData.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

from droprd.core.frame import Buffer, refuse_ext
from droprd.errors import BadData

FILE_MAGIC = b"DROPRDLG"
FILE_VERSION = 1
FILE_HEADER_BYTES = 4096
PUBLISHED_AT = 64

ENTRY_MAGIC = b"DRE1"
NOTE_BYTES_MAX = 64 << 20
FRAME_BYTES_MAX = 128 << 10

_FILE = struct.Struct("<8sHH16s16sQq")
_CRC = struct.Struct("<I")
_PUBLISHED = struct.Struct("<QQ")
_ENTRY = struct.Struct("<4sII16sQQI")
ENTRY_BYTES = _ENTRY.size + _CRC.size
_MASK = (1 << 64) - 1
assert ENTRY_BYTES == 52
assert _FILE.size == 60


class Kind(IntEnum):
    """What a log file is for."""

    JOURNAL = 1
    LANE = 2
    SENDER = 3
    OUTBOX_DEAD = 4
    CHANNEL = 5
    LANES = 6
    CLAIMS = 7
    INBOX_DEAD = 8


class FileHeader(NamedTuple):
    """The fixed part of a log file's header."""

    kind: Kind
    log_id: bytes
    spool_id: bytes
    base: int
    wall_ns: int


class EntryHead(NamedTuple):
    """An entry's header; `offset` is its place in the file."""

    offset: int
    note_bytes: int
    frame_bytes: int
    synced: int

    @property
    def end(self) -> int:
        """The offset of what follows."""
        return self.offset + ENTRY_BYTES + self.note_bytes + self.frame_bytes


def pack_file_header(header: FileHeader) -> bytes:
    """The first 4096 bytes of a new log file; nothing in it is published yet."""
    fixed = _FILE.pack(
        FILE_MAGIC,
        FILE_VERSION,
        header.kind,
        header.log_id,
        header.spool_id,
        header.base,
        header.wall_ns,
    )
    data = fixed + _CRC.pack(crc32(fixed)) + pack_published(FILE_HEADER_BYTES)
    return data.ljust(FILE_HEADER_BYTES, b"\0")


def parse_file_header(data: Buffer) -> FileHeader:
    """Raises: BadData (too short, other magic, unknown version or kind, checksum)."""
    if len(data) < FILE_HEADER_BYTES:
        raise BadData("a log file is cut short", why="its header is not whole")
    magic, version, kind, log_id, spool_id, base, wall_ns = _FILE.unpack_from(data)
    if magic != FILE_MAGIC:
        raise BadData("not a log file", why=f"it begins with {bytes(magic)!r}")
    if version != FILE_VERSION:
        raise BadData(f"a log file has format version {version}", why=f"this is for {FILE_VERSION}")
    if _CRC.unpack_from(data, 60)[0] != crc32(memoryview(data)[:60]):
        raise BadData("a log file's header does not match its checksum")
    try:
        return FileHeader(Kind(kind), log_id, spool_id, base, wall_ns)
    except ValueError:
        raise BadData(f"a log file is of unknown kind {kind}") from None


def pack_published(end: int) -> bytes:
    """The 16 bytes that publish a synced end."""
    return _PUBLISHED.pack(end, end ^ _MASK)


def parse_published(data: Buffer, at: int = 0) -> int | None:
    """The published synced end, or None if it is not whole (caught in the middle of a write)."""
    end, inverted = _PUBLISHED.unpack_from(data, at)
    return end if end == inverted ^ _MASK and end >= FILE_HEADER_BYTES else None


def pack_entry(log_id: bytes, offset: int, synced: int, note: bytes, frame_bytes: int) -> bytes:
    """Header and note of an entry; the frame's bytes follow."""
    fixed = _ENTRY.pack(ENTRY_MAGIC, len(note), frame_bytes, log_id, offset, synced, 0)
    return b"".join((fixed, _CRC.pack(crc32(note, crc32(fixed))), note))


def parse_entry(
    data: Buffer, at: int, log_id: bytes | None, offset: int | None
) -> EntryHead | None:
    """The header of the entry at `data[at:]`, or None if no valid entry begins there.

    With `log_id` and `offset` given, an entry of another log or place does not count; they are
    None for entries that came over the network. The note must lie in `data` too: None if it is
    cut short.
    """
    if len(data) - at < ENTRY_BYTES:
        return None
    magic, note_bytes, frame_bytes, its_log, its_offset, synced, zero = _ENTRY.unpack_from(data, at)
    if (
        magic != ENTRY_MAGIC
        or zero
        or note_bytes > NOTE_BYTES_MAX
        or frame_bytes > FRAME_BYTES_MAX
        or (log_id is not None and its_log != log_id)
        or (offset is not None and its_offset != offset)
        or synced > its_offset
    ):
        return None
    note_at = at + ENTRY_BYTES
    if len(data) < note_at + note_bytes:
        return None
    view = memoryview(data)
    fixed_crc = crc32(view[at : at + _ENTRY.size])
    if crc32(view[note_at : note_at + note_bytes], fixed_crc) != _CRC.unpack_from(data, at + 48)[0]:
        return None
    return EntryHead(its_offset, note_bytes, frame_bytes, synced)


def entry_bytes(data: Buffer, at: int) -> int | None:
    """How long the entry that seems to begin at `at` says it is (unchecked), or None."""
    if len(data) - at < ENTRY_BYTES:
        return None
    magic, note_bytes, frame_bytes, *_ = _ENTRY.unpack_from(data, at)
    if magic != ENTRY_MAGIC or note_bytes > NOTE_BYTES_MAX or frame_bytes > FRAME_BYTES_MAX:
        return None
    return ENTRY_BYTES + int(note_bytes) + int(frame_bytes)


def pack_note(value: Any) -> bytes:
    """msgpack of a note."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack_note(data: Buffer) -> Any:
    """The value of a note. Raises: BadData."""
    try:
        return msgpack.unpackb(
            data, raw=False, strict_map_key=False, use_list=True, ext_hook=refuse_ext
        )
    except BadData:
        raise
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadData("a note cannot be read", why=str(error)) from error
