"""The frame: the unit of journal, lane, wire and inbox. Built once; its bytes never change.

    fixed header, 96 bytes, little-endian
      0  magic "DRF1"      4  version      5  flags        6  priority
      7  peer bytes        8  channel bytes 9  (zero)     10  count u16
     12  shared bytes u32 16  maps bytes u32              20  bodies bytes u64
     28  frame id 16      44  boot id 16
     60  boot-time ns u64 68  wall-clock ns i64           76  time to live ms u64 (0: none)
     84  delay ms u64     92  CRC-32 of bytes 0..91 and of all from 96 to the bodies
    then: peer, channel, lengths (u32 a message), CRC-32s (u32 a message),
          one msgpack map of what all messages share, msgpack pairs [index, map] of single ones,
          the bodies.

The shared map and the single maps use short keys: "t" content type, "h" headers, "i" the message's
own id where it is not the frame id plus index (requeued), "d" the SHA-256 of a blob.

A frame with flag BLOB holds one message whose body is a file of its own: `bodies bytes` is the size
of that file, the length table holds 0, the CRC table the CRC-32 of the file, and no body follows.

A *voided* body is left out of the bytes that follow; which ones are voided stands in the entry
beside the frame. The frame's own bytes up to the bodies stay as they were built.

Pure. Raises BadData for anything that does not hold together.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

from droprd.errors import BadData, MessageTooLarge
from droprd.model import KIB, NAME_PATTERN, PRIORITY_MAX, Lane, message_ids

MAGIC = b"DRF1"
VERSION = 1
FLAG_BLOB = 1

BODIES_BYTES_MAX = 32 * KIB  # a 64 kbit/s line carries them in four seconds
MESSAGES_MAX = 1024
FRAME_BYTES_MAX = 64 * KIB  # with its tables and maps
HEADERS_BYTES_MAX = 8 * KIB  # a message

_FIXED = struct.Struct("<4s6BHIIQ16s16sQqQQ")
_CRC = struct.Struct("<I")
FIXED_BYTES = _FIXED.size + _CRC.size
FRAME_ID_OFFSET = 28
assert FIXED_BYTES == 96

Buffer = bytes | bytearray | memoryview


class Stamp(NamedTuple):
    """When a frame was built: boot time orders, wall time is for people."""

    boot_id: bytes
    boot_ns: int
    wall_ns: int


class FrameInfo(NamedTuple):
    """The fixed header of a frame, as far as a walk over many frames needs it. Not yet checked."""

    flags: int
    priority: int
    peer_bytes: int
    channel_bytes: int
    messages: int
    shared_bytes: int
    maps_bytes: int
    bodies_bytes: int
    frame_id: bytes
    boot_id: bytes
    boot_ns: int
    wall_ns: int
    ttl_ms: int
    delay_ms: int
    crc: int

    @property
    def head_bytes(self) -> int:
        """All before the bodies."""
        return (
            FIXED_BYTES
            + self.peer_bytes
            + self.channel_bytes
            + 8 * self.messages
            + self.shared_bytes
            + self.maps_bytes
        )

    @property
    def is_blob(self) -> bool:
        return bool(self.flags & FLAG_BLOB)


def new_frame_id(wall_ns: int, random10: bytes) -> bytes:
    """A UUIDv7 (RFC 9562, 5.7) with its low 16 bits zero, which the message's index fills.

    `random10` must come from the operating system: a generator's state may be copied by a fork
    or a snapshot of the machine.
    """
    ms = (wall_ns // 1_000_000) & (1 << 48) - 1
    rand = int.from_bytes(random10, "big")
    value = ms << 80 | 0x7 << 76 | (rand >> 62 & 0xFFF) << 64 | 0b10 << 62
    value |= (rand & (1 << 46) - 1) << 16
    return value.to_bytes(16, "big")


def pack_map(values: Mapping[str, Any]) -> bytes:
    """msgpack of a shared or single map; empty maps take no bytes."""
    return msgpack.packb(values, use_bin_type=True) if values else b""


def build(
    *,
    frame_id: bytes,
    lane: Lane,
    stamp: Stamp,
    bodies: Sequence[Buffer],
    shared: bytes = b"",
    singles: Sequence[tuple[int, Mapping[str, Any]]] = (),
    ttl_ms: int = 0,
    delay_ms: int = 0,
) -> list[Buffer]:
    """The bytes of a frame, as pieces to be written one after another.

    `shared` comes from `pack_map`. The caller keeps the limits (see `split`).
    """
    count = len(bodies)
    lengths = list(map(len, bodies))
    crcs = list(map(crc32, bodies))
    maps = msgpack.packb([list(pair) for pair in singles], use_bin_type=True) if singles else b""
    head = _head(
        frame_id, lane, stamp, 0, lengths, crcs, sum(lengths), shared, maps, ttl_ms, delay_ms
    )
    if count == 1:
        return [head, bodies[0]]
    return [head, *bodies]


def build_blob(
    *,
    frame_id: bytes,
    lane: Lane,
    stamp: Stamp,
    blob_bytes: int,
    blob_crc: int,
    shared: bytes,
    ttl_ms: int = 0,
    delay_ms: int = 0,
) -> list[Buffer]:
    """The bytes of a frame whose one body is a file; `shared` must hold its SHA-256 as "d"."""
    return [
        _head(
            frame_id,
            lane,
            stamp,
            FLAG_BLOB,
            [0],
            [blob_crc],
            blob_bytes,
            shared,
            b"",
            ttl_ms,
            delay_ms,
        )
    ]


def _head(
    frame_id: bytes,
    lane: Lane,
    stamp: Stamp,
    flags: int,
    lengths: Sequence[int],
    crcs: Sequence[int],
    bodies_bytes: int,
    shared: bytes,
    maps: bytes,
    ttl_ms: int,
    delay_ms: int,
) -> bytes:
    peer = lane.peer.encode("ascii")
    channel = lane.channel.encode("ascii")
    count = len(lengths)
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        flags,
        lane.priority,
        len(peer),
        len(channel),
        0,
        count,
        len(shared),
        len(maps),
        bodies_bytes,
        frame_id,
        stamp.boot_id,
        stamp.boot_ns,
        stamp.wall_ns,
        ttl_ms,
        delay_ms,
    )
    rest = b"".join((peer, channel, struct.pack(f"<{2 * count}I", *lengths, *crcs), shared, maps))
    return b"".join((fixed, _CRC.pack(crc32(rest, crc32(fixed))), rest))


def split(sizes: Sequence[int], map_bytes: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Cut a run of bodies into frames: (start, end) of each, within the limits of a frame.

    Bodies over BODIES_BYTES_MAX do not belong here (they are blobs).

    Raises: MessageTooLarge if one message's maps exceed HEADERS_BYTES_MAX.
    """
    cuts: list[tuple[int, int]] = []
    start = 0
    bodies = 0
    maps = 0
    for index, size in enumerate(sizes):
        extra = map_bytes[index] if map_bytes is not None else 0
        if extra > HEADERS_BYTES_MAX:
            raise MessageTooLarge(
                f"the headers of a message take {extra} bytes",
                why=f"at most {HEADERS_BYTES_MAX} are carried beside a body",
                hint="put large values into the body",
            )
        if index > start and (
            bodies + size > BODIES_BYTES_MAX
            or index - start >= MESSAGES_MAX
            or bodies + size + maps + extra + 8 * (index - start) > FRAME_BYTES_MAX - 10 * KIB
        ):
            cuts.append((start, index))
            start, bodies, maps = index, 0, 0
        bodies += size
        maps += extra
    if len(sizes) > start:
        cuts.append((start, len(sizes)))
    return cuts


def peek(data: Buffer, offset: int = 0) -> FrameInfo:
    """The fixed header at `offset`, with magic, version and counts checked, no checksum.

    Raises: BadData.
    """
    if len(data) - offset < FIXED_BYTES:
        raise BadData("a frame is cut short", why="its fixed header is not whole")
    (magic, version, flags, priority, peer, channel, zero, *rest) = _FIXED.unpack_from(data, offset)
    (crc,) = _CRC.unpack_from(data, offset + _FIXED.size)
    if magic != MAGIC or version != VERSION:
        raise BadData("not a frame", why=f"it begins with {magic!r}, version {version}")
    info = FrameInfo._make((flags, priority, peer, channel, *rest, crc))
    if (
        zero
        or flags & ~FLAG_BLOB
        or priority > PRIORITY_MAX
        or not 1 <= info.messages <= MESSAGES_MAX
        or not 1 <= peer <= 64
        or not 1 <= channel <= 64
        or info.head_bytes > FRAME_BYTES_MAX
    ):
        raise BadData("a frame header is out of bounds")
    if flags & FLAG_BLOB:
        if info.messages != 1:
            raise BadData("a blob frame holds one message")
    elif info.bodies_bytes > BODIES_BYTES_MAX:
        raise BadData("a frame's bodies are too large")
    if info.frame_id[14:] != b"\0\0":
        raise BadData("a frame id's low 16 bits are not zero")
    return info


class Frame:
    """A parsed frame over the bytes it was read from. Bodies are cut out only when asked for."""

    __slots__ = (
        "_bodies_at",
        "_data",
        "_shared",
        "_singles",
        "crcs",
        "info",
        "lane",
        "lengths",
        "voids",
    )

    def __init__(self, data: memoryview, info: FrameInfo, voids: Collection[int] = ()) -> None:
        self._data = data
        self.info = info
        self.voids = voids
        names_at = FIXED_BYTES
        channel_at = names_at + info.peer_bytes
        tables_at = channel_at + info.channel_bytes
        table = struct.unpack_from(f"<{2 * info.messages}I", data, tables_at)
        self.lengths: Sequence[int] = table[: info.messages]
        self.crcs: Sequence[int] = table[info.messages :]
        try:
            peer = str(data[names_at:channel_at], "ascii")
            channel = str(data[channel_at:tables_at], "ascii")
        except UnicodeDecodeError:
            raise BadData("a name in a frame is not ASCII") from None
        if not NAME_PATTERN.match(peer) or not NAME_PATTERN.match(channel):
            raise BadData("a name in a frame does not match the name pattern")
        self.lane = Lane(peer, channel, info.priority)
        self._bodies_at: list[int] | None = None
        self._shared: dict[str, Any] | None = None
        self._singles: dict[int, dict[str, Any]] | None = None

    @property
    def frame_id(self) -> bytes:
        return self.info.frame_id

    @property
    def count(self) -> int:
        return self.info.messages

    @property
    def data(self) -> memoryview:
        """All bytes of the frame as stored (voided bodies left out)."""
        return self._data

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.info.boot_id, self.info.boot_ns, self.info.wall_ns)

    def ids(self) -> list[str]:
        """The ids of all messages, in order; a requeued message keeps its own."""
        ids = message_ids(self.frame_id, self.count)
        if self.info.maps_bytes:
            for index, single in self.singles.items():
                ids[index] = single.get("i", ids[index])
        elif self.info.messages == 1 and self.info.shared_bytes:
            ids[0] = self.shared.get("i", ids[0])
        return ids

    def _tables(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        info = self.info
        at = FIXED_BYTES + info.peer_bytes + info.channel_bytes + 8 * info.messages
        shared = self._unpack(at, info.shared_bytes) if info.shared_bytes else {}
        singles: dict[int, dict[str, Any]] = {}
        if info.maps_bytes:
            pairs = self._unpack(at + info.shared_bytes, info.maps_bytes)
            if not isinstance(pairs, list):
                raise BadData("a frame's single maps are no list")
            for pair in pairs:
                if (
                    not isinstance(pair, list)
                    or len(pair) != 2
                    or not isinstance(pair[0], int)
                    or not 0 <= pair[0] < info.messages
                    or not isinstance(pair[1], dict)
                ):
                    raise BadData("a frame's single map is malformed")
                singles[pair[0]] = pair[1]
        if not isinstance(shared, dict):
            raise BadData("a frame's shared map is no map")
        self._shared, self._singles = shared, singles
        return shared, singles

    def _unpack(self, at: int, length: int) -> Any:
        try:
            return msgpack.unpackb(
                self._data[at : at + length],
                raw=False,
                strict_map_key=True,
                ext_hook=refuse_ext,
            )
        except BadData:
            raise
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise BadData("a map in a frame cannot be read", why=str(error)) from error

    @property
    def shared(self) -> dict[str, Any]:
        """What all messages share. Raises: BadData."""
        return self._shared if self._shared is not None else self._tables()[0]

    @property
    def singles(self) -> dict[int, dict[str, Any]]:
        """Maps of single messages by index. Raises: BadData."""
        return self._singles if self._singles is not None else self._tables()[1]

    def _offsets(self) -> list[int]:
        if self._bodies_at is None:
            at = self.info.head_bytes
            offsets = []
            for index, length in enumerate(self.lengths):
                offsets.append(at)
                if index not in self.voids:
                    at += length
            self._bodies_at = offsets
        return self._bodies_at

    def body(self, index: int) -> memoryview:
        """The bytes of one body (empty for a blob's or a voided one)."""
        if index in self.voids:
            return self._data[:0]
        at = self._offsets()[index]
        return self._data[at : at + self.lengths[index]]

    def bad_bodies(self) -> list[int]:
        """The indexes of messages whose bodies do not match their checksums."""
        if self.info.is_blob:
            return []
        data = self._data
        at = self.info.head_bytes
        bad = []
        voids = self.voids
        for index, (length, crc) in enumerate(zip(self.lengths, self.crcs, strict=True)):
            if index in voids:
                continue
            end = at + length
            if crc32(data[at:end]) != crc:
                bad.append(index)
            at = end
        return bad

    def without(self, voids: Collection[int]) -> list[Buffer]:
        """The frame's bytes as pieces, with these bodies left out (besides those already so)."""
        pieces: list[Buffer] = [self._data[: self.info.head_bytes]]
        pieces += [self.body(i) for i in range(self.count) if i not in voids]
        return pieces


def refuse_ext(code: int, data: bytes) -> Any:
    raise BadData("a msgpack extension type is not accepted", why=f"type {code}")


def parse(data: Buffer, voids: Collection[int] = ()) -> Frame:
    """Check a frame's head (checksum, sizes) and return it; bodies are checked by `bad_bodies`.

    `data` must be exactly the frame; `voids` are the indexes of bodies left out.

    Raises: BadData.
    """
    view = memoryview(data).cast("B")
    info = peek(view)
    head_bytes = info.head_bytes
    if len(view) < head_bytes:
        raise BadData("a frame is cut short", why="its head is not whole")
    if crc32(view[FIXED_BYTES:head_bytes], crc32(view[: _FIXED.size])) != info.crc:
        raise BadData("a frame's head does not match its checksum")
    frame = Frame(view, info, voids)
    if info.is_blob:
        expected = head_bytes
        whole = frame.lengths[0] == 0
    else:
        lengths = frame.lengths
        whole = sum(lengths) == info.bodies_bytes
        expected = head_bytes + info.bodies_bytes - sum(lengths[i] for i in voids)
    if not whole or len(view) != expected:
        raise BadData("a frame's lengths do not add up")
    return frame
