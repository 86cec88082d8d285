"""The receiver: joins the listener with the inbox. The only writer of the inbox's segments.

Handlers judge their pushes in the event loop and append in memory; one commit at a time
(`droprd.workers.commits`) writes and syncs all that waits, and only then are the answers made.
Pieces of blobs are written, and whole ones compared, in threads of their own.

A crash leaves what the files say; the store of the next start recovers. Any error of the disk other
than a full one ends this process: a failed write or sync is never repeated.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from droprd import logs
from droprd.core import ask, rpc
from droprd.core import push as pushes
from droprd.core.filters import Selection
from droprd.core.fixed import Fixed
from droprd.errors import DroprdError
from droprd.model import MIB
from droprd.net.credentials import TOKEN_PATTERN, Tokens
from droprd.net.intake import Limits as NetLimits
from droprd.net.listen import Listener
from droprd.net.service import Answer, BlobPiece, Reader, Refused, RequestKind
from droprd.settings.values import Settings
from droprd.spool.again import again
from droprd.spool.arrivals import PieceRefused
from droprd.spool.handle import Spool
from droprd.spool.hearsay import Hearsay
from droprd.spool.judging import Limits, PeerLimits
from droprd.spool.layout import Layout
from droprd.spool.plugins import FILES, inbox_plugin
from droprd.spool.receiver import ReceiverStore
from droprd.spool.store import BlobArrival, InboxWriter
from droprd.workers import worker
from droprd.workers.commits import Commits
from droprd.workers.jobs import Jobs
from droprd.workers.worker import Context

ROOM_RETRY_S = 5
PAUSED_RETRY_S = 30
RECOUNT_S = 20.0
FULL_RECOUNT_S = 2.0
TICK_S = 0.5
TOKEN_BYTES_MAX = 1024

log = logging.getLogger("droprd.receiver")


def limits_of(settings: Settings) -> Limits:
    """What the settings say about the inbox."""
    return Limits(
        segment_bytes_max=settings.inbox.segment_bytes_max,
        match_frames=settings.inbox.match_frames,
        quota_bytes=settings.inbox.quota_bytes,
        peers={
            name: PeerLimits(
                channels=frozenset(peer.channels),
                max_message_bytes=settings.max_message_bytes(name),
                quota_bytes=peer.quota_bytes,
                lanes_max=peer.lanes_max,
            )
            for name, peer in settings.peers.items()
        },
    )


def open_writer(name: str, spool: Spool, limits: Limits) -> InboxWriter:
    """The receiver's side of the inbox that `[inbox] store` names.

    Raises: ConfigError if that store is not installed; OSError, DroprdError if it cannot be opened.
    """
    if name == FILES:
        return ReceiverStore(spool, limits)
    return inbox_plugin(name).open_writer(spool, limits)


def read_tokens(settings: Settings) -> dict[str, str]:
    """The tokens of all peers that have one. A file that cannot be read shuts out its peer only."""
    tokens = {}
    for name, peer in settings.peers.items():
        if not peer.token_file:
            continue
        try:
            fd = os.open(peer.token_file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                token = os.read(fd, TOKEN_BYTES_MAX).decode("ascii", "replace").strip()
            finally:
                os.close(fd)
        except OSError as error:
            logs.event(log, logging.ERROR, "token not read", peer=name, why=error.strerror)
            continue
        if TOKEN_PATTERN.match(token):
            tokens[name] = token
        else:
            logs.event(log, logging.ERROR, "no token in its file", peer=name)
    return tokens


class Receiver:
    """`droprd.net.service.Service` over the inbox."""

    def __init__(self, context: Context) -> None:
        """Open the inbox, mending what a crash left. Raises: OSError, DroprdError."""
        self._context = context
        self._loop = asyncio.get_running_loop()
        layout = Layout(context.settings.node.spool)
        self._node = context.settings.node.name
        self._spool_id = bytes(context.facts["spool_id"])
        spool = Spool(context.fs, context.clock, context.urandom, layout, self._spool_id)
        self._spool = spool
        name = context.settings.inbox.store
        self.store = open_writer(name, spool, limits_of(context.settings))
        self._hearsay = Hearsay(layout, self._loop.time)
        self.commits = Commits(self.store)
        self.tokens = Tokens(read_tokens(context.settings))
        self.listener: Listener | None = None
        self._fixed = _fixed(context.settings)
        self._full = ""
        self._full_for = ("", 0)
        self._blob_threads = ThreadPoolExecutor(2, "droprd-blob")
        self._comparing = asyncio.Lock()
        self._recounted_at = self._loop.time()
        self._tell_damage()

    def _tell_damage(self) -> None:
        for path, start, end in self.store.report.damage:
            logs.event(
                log,
                logging.CRITICAL,
                "damaged bytes in the inbox were set aside in corrupt/",
                path=path,
                start=start,
                end=end,
            )
        if self.store.report.lost_messages:
            lost = self.store.report.lost_messages
            logs.event(log, logging.CRITICAL, "messages were lost with damaged bytes", count=lost)

    # -- the service -----------------------------------------------------------------------------

    def admit(self, peer: str, kind: RequestKind, length: int) -> None:
        """See `Service.admit`: 503 while paused, 507 if there is no room for the body."""
        self._hearsay.hear(peer)
        if kind in ("push", "blob"):
            self._check_paused(peer)
            why = self.store.no_room(peer, length)
            if why:
                if not self._full:
                    logs.event(log, logging.WARNING, "requests are refused", peer=peer, why=why)
                self._full, self._full_for = why, (peer, length)
                raise Refused(507, "no_room", "there is no room for this", why, ROOM_RETRY_S)

    def _check_paused(self, peer: str) -> None:
        """Raise Refused while an operator's pause says that nothing is received (from `peer`)."""
        paused = self._context.facts.get("paused", {})
        for target in ("", peer):
            if target in paused and paused[target].get("receiving"):
                why = "an operator paused receiving"
                raise Refused(503, "paused", "nothing is taken at present", why, PAUSED_RETRY_S)

    async def hello(self, peer: str, body: bytes) -> Answer:
        """See `Service.hello`."""
        ask.decode_hello(body)
        wall_ns = self._context.clock.wall_ns()
        mine = ask.Hello(self._node, pushes.VERSION, wall_ns, self._spool_id)
        return Answer(body=ask.encode_hello(mine))

    async def push(self, peer: str, body: bytes) -> Answer:
        """See `Service.push`."""
        request, parts = pushes.decode_push(body)
        for frame in self.store.wanted_blobs(peer, request, parts):
            # Comparing reads all of it; `push` then finds it done.
            async with self._comparing:
                await self._in_thread(self.store.blobs.missing, peer, frame)
        pending = self.store.push(peer, request, parts)
        if pending.waits:
            alone = self.listener is not None and self.listener.intake.in_flight <= 1
            await self.commits.committed(alone=alone)
        self._context.beat()
        return Answer(body=pushes.encode_push_answer(self.store.answer(pending)))

    async def match(self, peer: str, body: bytes) -> Answer:
        """See `Service.match`."""
        request = ask.decode_match(body)
        answer = await self.commits.between(lambda: self.store.match(peer, request))
        return Answer(body=ask.encode_match_answer(answer))

    async def blob(self, peer: str, piece: BlobPiece, reader: Reader) -> Answer:
        """See `Service.blob`: what has arrived stays, even of a request that breaks off."""
        limit = self._context.settings.max_message_bytes(peer)
        if piece.size > limit:
            raise Refused(413, "too_large", "the blob is larger than this peer may send")
        try:
            arrival = self.store.blobs.arrive(peer, piece.frame_id, piece.offset, piece.size)
            if arrival is None:
                return Answer(body=ask.encode_blob_answer(piece.size))
            try:
                await self._take(arrival, reader)
            finally:
                have = await self._in_thread(arrival.close)
        except PieceRefused as refusal:
            return Answer(409, ask.encode_blob_answer(refusal.have))
        except ConnectionResetError:
            raise  # an OSError too, but not of the disk: the sender went away
        except OSError as error:
            logs.event(log, logging.ERROR, "a blob could not be written", peer=peer, why=str(error))
            raise Refused(
                507, "no_room", "the blob cannot be written", error.strerror or "", ROOM_RETRY_S
            ) from error
        self._context.beat()
        return Answer(body=ask.encode_blob_answer(have))

    async def _take(self, arrival: BlobArrival, reader: Reader) -> None:
        held: list[bytes] = []
        size = 0
        try:
            while data := await reader.read():
                held.append(data)
                size += len(data)
                if size >= MIB:
                    piece, held, size = b"".join(held), [], 0
                    await self._in_thread(arrival.write, piece)
                    self._context.beat()
        finally:
            if held:
                await self._in_thread(arrival.write, b"".join(held))

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await self._loop.run_in_executor(self._blob_threads, function, *args)

    # -- the worker ------------------------------------------------------------------------------

    async def reload(self, params: rpc.Params) -> dict[str, Any]:
        """New limits and tokens at once. Raises DroprdError for what only a fresh start can change:
        the angel then replaces us."""
        settings = self._context.settings
        if _fixed(settings) != self._fixed:
            raise DroprdError("these settings need a fresh receiver", code="needs_restart")
        self.tokens.replace(read_tokens(settings))
        limits = limits_of(settings)
        await self.commits.between(lambda: self.store.configure(limits))
        return {}

    def again(self, verb: str, selection: Selection, dry: bool) -> Iterator[Fixed]:
        """Begin to append dead letters again that were copied out. Raises: DroprdError."""
        if verb != "requeue" or not isinstance(self.store, ReceiverStore):
            raise DroprdError("this inbox cannot append dead letters again", code="unknown_method")
        return again(self._spool, self.store, selection, dry=dry)

    async def after_slice(self) -> None:
        """Bring what was appended again to stable storage."""
        if self.store.has_staged:
            await self.commits.committed(alone=False)

    async def tend(self) -> None:
        """Beat while commits go on, count, and tell."""
        while True:
            begun = self.commits.begun_at
            hang_s = self._context.settings.daemon.hang_timeout_s
            # A commit that hangs in the kernel is no progress: the angel must see it.
            if begun is None or self._loop.time() - begun < hang_s / 3:
                self._context.beat()
            recount_s = FULL_RECOUNT_S if self._full else RECOUNT_S
            if self._loop.time() - self._recounted_at >= recount_s:
                await self.commits.between(self._recount)
                self._recounted_at = self._loop.time()
            if self._full:
                self._full = self.store.no_room(*self._full_for)
            self._context.gauges(self.gauges())
            await asyncio.sleep(TICK_S)

    def _recount(self) -> None:
        # What is full wants everything deleted that can be.
        self.store.make_room(1 if self._full else self._context.settings.inbox.segment_bytes_max)
        self.store.recount()

    def gauges(self) -> dict[str, Any]:
        """What the receiver counts."""
        return {
            "lanes": self.store.lanes,
            "received": self.store.received,
            "refused": {} if self.listener is None else self.listener.refused,
            "full": self._full or None,
            "damaged": len(self.store.report.damage),
            "lost": self.store.report.lost_messages,
            "connections": 0 if self.listener is None else self.listener.connections,
        }

    async def close(self) -> None:
        """Bring everything to stable storage and close it."""
        await self.commits.close()
        self._blob_threads.shutdown()
        if not self.commits.failed.done():
            self.store.close()
        self._hearsay.close()


def _fixed(settings: Settings) -> tuple[object, ...]:
    """What cannot change while the receiver runs."""
    return settings.node.name, settings.node.spool, settings.inbox.store, settings.receiver


def _raise_descriptor_limit() -> None:
    """Each channel and priority keeps a file open: take what the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(context: Context) -> None:
    """The receiver's life."""
    _raise_descriptor_limit()
    settings = context.settings
    receiver = Receiver(context)
    context.on("reload", receiver.reload)
    context.on("fix", Jobs(receiver.again, context.beat, receiver.after_slice).fix)
    limits = NetLimits(
        header_timeout_s=settings.receiver.header_timeout_s,
        body_rate_min=settings.receiver.body_rate_min,
        connections_per_address=settings.receiver.connections_per_address,
        connections_max=settings.receiver.connections_max,
    )
    listener = receiver.listener = Listener(
        receiver,
        receiver.tokens,
        limits,
        own_name=settings.node.name,
        allow_plain_http=settings.receiver.allow_plain_http,
    )
    sockets = [socket.socket(fileno=fd) for fd in context.listen_fds]
    await listener.start(sockets)
    context.ready()
    tending = asyncio.create_task(receiver.tend())
    stopping = asyncio.create_task(context.stopping.wait())
    try:
        await asyncio.wait(
            (tending, stopping, receiver.commits.failed), return_when=asyncio.FIRST_COMPLETED
        )
        await listener.stop(settings.daemon.stop_timeout_s / 2)
        for done in (tending, receiver.commits.failed):
            if done.done():
                done.result()
    finally:
        tending.cancel()
        stopping.cancel()
        await receiver.close()


if __name__ == "__main__":
    worker.run("receiver", serve)
