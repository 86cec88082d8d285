"""Dead letters of the inbox whose segments are gone, appended to their channels once more.

The receiver does it, as the one writer of the inbox, and through its own front door: as a push in a
lane of its own (sender, an id derived from this spool's own, channel, priority), with new frames
that keep the messages' ids. Consumers get them from the sender that sent them, as new ones.

    for fixed in again(…):      commit what is staged; then, where `fixed.taken` names letters, the
                                owner of inbox/dead.log notes that they are gone

What a crash leaves: letters that were appended and are dead letters still; requeued once more they
come twice. They are never in neither place.

Raises: OSError, BadData.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from droprd.core import entry
from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.core.frame import Stamp, new_frame_id
from droprd.core.intake import blob_sha256
from droprd.core.outstate import REQUEUED
from droprd.core.push import LanePush, Push
from droprd.model import Lane, LaneKey
from droprd.spool.blobs import Blob
from droprd.spool.fixing import BODY_GONE, size_of, values_of
from droprd.spool.handle import Spool
from droprd.spool.inboxfixing import letters_of
from droprd.spool.lookup import Hit, dead_hits
from droprd.spool.puts import Put, build_frames
from droprd.spool.receiver import ReceiverStore

SLICE_MESSAGES = 500
SLICE_BYTES = 2 << 20


def own_lane_id(spool_id: bytes) -> bytes:
    """The spool id of the lanes in which requeued letters are appended."""
    return hashlib.sha256(b"droprd requeue" + spool_id).digest()[:16]


def again(
    spool: Spool, store: ReceiverStore, selection: Selection, *, dry: bool = False
) -> Iterator[Fixed]:
    """Append the letters that are meant, in order; with `dry`, only count."""
    fixed = Fixed()
    if not selection.wants("dead", "inbox"):
        yield fixed
        return
    batch: list[Hit] = []
    size = 0
    for hit in dead_hits(spool, selection, "inbox", spool.layout.inbox_dead):
        fixed.met(hit.chosen.values())
        if batch and (
            hit.lane != batch[-1].lane
            or hit.frame.info.ttl_ms != batch[-1].frame.info.ttl_ms
            or size >= SLICE_BYTES
            or sum(len(one.chosen) for one in batch) >= SLICE_MESSAGES
        ):
            yield from _append(spool, store, batch, fixed, dry)
            batch, size = [], 0
        batch.append(hit)
        size += 0 if hit.frame.info.is_blob else hit.frame.info.bodies_bytes
    if batch:
        yield from _append(spool, store, batch, fixed, dry)
    yield fixed


def _append(
    spool: Spool, store: ReceiverStore, batch: list[Hit], fixed: Fixed, dry: bool
) -> Iterator[Fixed]:
    """Append letters of one lane, with one time to live."""
    puts: list[Put] = []
    done: list[tuple[Hit, list[int]]] = []
    for hit in batch:
        frame = hit.frame
        bad = {*frame.bad_bodies(), *frame.voids}
        indexes = [i for i in sorted(hit.chosen) if i not in bad]
        if frame.info.is_blob and indexes and not _has_blob(spool, hit):
            indexes = []
        fixed.skipped[BODY_GONE] += len(hit.chosen) - len(indexes)
        for i in indexes:
            body: bytes | Blob = b""
            if not dry:
                body = _copy_blob(spool, hit) if frame.info.is_blob else bytes(frame.body(i))
            values = values_of(frame, i, hit.chosen[i])
            puts.append(Put(frame.lane, [body], values, ttl_ms=frame.info.ttl_ms))
        if indexes:
            done.append((hit, indexes))
    fixed.skipped += type(fixed.skipped)()  # what is zero goes
    if puts and not dry:
        lane = batch[0].lane
        push, parts = _push(spool, store, lane, puts)
        pending = store.push(lane.peer, push, parts)
        yield fixed
        answer = store.answer(pending)[0]
        expected = push.lanes[0].head.number + len(puts)
        if answer.verdict != "ok" or answer.refusals or answer.head.number != expected:
            why = answer.reason or (answer.refusals[0].reason if answer.refusals else "refused")
            fixed.skipped[f"the receiver refuses it: {why}"] += len(puts)
            yield fixed
            return
        fixed.taken = letters_of(done, REQUEUED)
    for hit, indexes in done:
        fixed.did(len(indexes), sum(size_of(hit.frame, i) for i in indexes))
    yield fixed
    fixed.taken = []


def _push(
    spool: Spool, store: ReceiverStore, lane: Lane, puts: list[Put]
) -> tuple[Push, list[memoryview]]:
    clock = spool.clock

    def stamp() -> Stamp:
        return Stamp(clock.boot_id(), clock.boot_ns(), clock.wall_ns())

    built = build_frames(puts, stamp, spool.urandom)
    data = b"".join(entry.pack_entry(bytes(16), 0, 0, b"", len(one)) + one for one in built)
    spool_id = own_lane_id(spool.spool_id)
    head = store.head(LaneKey(lane.peer, spool_id, lane.channel, lane.priority))
    push = LanePush(lane.channel, lane.priority, head, len(built), len(data))
    return Push(spool_id, (push,)), [memoryview(data)]


def _has_blob(spool: Spool, hit: Hit) -> bool:
    frame = hit.frame
    found = spool.fs.stat(spool.layout.inbox_blob(hit.lane.peer, frame.frame_id))
    return found is not None and found.size == frame.info.bodies_bytes


def _copy_blob(spool: Spool, hit: Hit) -> Blob:
    """Copy a body that is a file under the name that its new frame will have; the receiver compares
    and syncs it when the frame comes, as it does with what peers send."""
    fs, layout, frame = spool.fs, spool.layout, hit.frame
    new_id = new_frame_id(spool.clock.wall_ns(), spool.urandom(10))
    size = frame.info.bodies_bytes
    source = fs.open(layout.inbox_blob(hit.lane.peer, frame.frame_id), os.O_RDONLY)
    try:
        part = layout.inbox_blob_part(hit.lane.peer, new_id)
        target = fs.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            fs.copy(source, 0, target, 0, size)
        finally:
            fs.close(target)
    finally:
        fs.close(source)
    return Blob("", new_id, size, frame.crcs[0], blob_sha256(frame))
