"""`Outbox`: how an application hands over messages. Works with the daemon stopped or running.

Guarantees: when `send`, `send_many` or `send_file` returns, the messages are on stable storage,
bytes and name, and survive the death of any process, of the kernel and of the power supply. What
one returned before another began to the same peer, channel and priority, in whichever process,
arrives first.

Safe with threads, which share one sync where they wait at the same time, and after `fork()`: the
child closes what it inherited and has a journal of its own. Another user than the spool's owner
can send if it is in the group droprd-send.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType

from droprd.client.admission import Room, check_size, lane_for
from droprd.client.arguments import checked_bodies, checked_body, milliseconds, shared_values
from droprd.client.commits import Commits
from droprd.core.frame import BODIES_BYTES_MAX
from droprd.errors import UsageError
from droprd.model import CHANNEL_DEFAULT, PRIORITY_DEFAULT, Lane
from droprd.settings.published import Public, Published, find_node
from droprd.spool.blobs import Blob
from droprd.spool.clock import SystemClock
from droprd.spool.fsops import OsFs
from droprd.spool.journal import refusal
from droprd.spool.layout import Layout, read_version
from droprd.spool.puts import Put

_open_outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()
_forking: list[Outbox] = []
_fork_lock = threading.Lock()


class Outbox:
    """Hands messages to this node, which delivers them.

    Args:
        spool: directory of the spool; without it, the configuration says where it is.
        config: path of droprd.toml; without it $DROPRD_CONFIG, then /etc/droprd/droprd.toml.

    Use it in a `with` statement, or call `close()`. One for the life of a program is best:
    the first send of each opens a file.

    Raises: ConfigError if there is no usable configuration; SpoolNotReady if there is no spool, or
        it is of another version, or this user may not use it.
    """

    def __init__(
        self,
        spool: str | os.PathLike[str] | None = None,
        *,
        config: str | os.PathLike[str] | None = None,
    ) -> None:
        node = find_node(
            None if config is None else os.fspath(config),
            spool=None if spool is None else os.fspath(spool),
        )
        self._fs = OsFs()
        layout = Layout(node.spool)
        facts = read_version(self._fs, node.spool)
        clock = SystemClock()
        self._published = Published(layout.public)
        self._room = Room(self._fs, clock, layout)
        self._commits = Commits(
            self._fs,
            clock,
            os.urandom,
            layout,
            facts.spool_id,
            self._published,
            self._room,
            uid=os.geteuid(),
        )
        self._layout = layout
        # An Outbox that is forgotten lets go of its journal all the same.
        self._finish = weakref.finalize(self, self._commits.close)
        self._finish.atexit = False
        _open_outboxes.add(self)

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def send(
        self,
        body: bytes,
        *,
        to: str,
        channel: str = CHANNEL_DEFAULT,
        priority: int = PRIORITY_DEFAULT,
        ttl_s: float | None = None,
        delay_s: float | None = None,
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Hand over one message; it is on stable storage when this returns.

        Args:
            body: any bytes, up to the node's max_message_bytes.
            to: name of the peer, or of this node itself.
            channel: what the receiver calls `receive()` with; needs no declaration.
            priority: 0 (most urgent) to 9.
            ttl_s: seconds after which the message need not be delivered any more; None for ever.
            delay_s: seconds for which no consumer gets the message; it travels at once.
            content_type: carried along for the consumer, as are
            headers: names and values, text; at most 8 KiB a message with the content type.

        Returns: the message id (a UUIDv7).

        Raises:
            UnknownPeer, InvalidName, MessageTooLarge, Draining, UsageError: nothing was accepted.
            SpoolFull: no room on the disk or in the quota; nothing was accepted.
            SpoolNotReady: the spool cannot be written; nothing was accepted.
            SendInDoubt: the disk failed in mid-write; the message may or may not arrive.
        """
        body = checked_body(body)
        ids = self._send([body], to, channel, priority, ttl_s, delay_s, content_type, headers)
        return ids[0]

    def send_many(
        self,
        bodies: Iterable[bytes],
        *,
        to: str,
        channel: str = CHANNEL_DEFAULT,
        priority: int = PRIORITY_DEFAULT,
        ttl_s: float | None = None,
        delay_s: float | None = None,
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Hand over many messages to one channel of one peer, in order, with one sync.

        While this process lives it is all or nothing: after an error none was accepted (but see
        SendInDoubt). If the process dies before this returns, the first ones may arrive.

        Args: as for `send`; all that is not a body is the same for all of them. The bodies are held
            in memory together.

        Returns: the message ids in order; an empty list for no bodies.

        Raises: as `send`; SendInDoubt names all ids.
        """
        found = checked_bodies(bodies)
        return self._send(found, to, channel, priority, ttl_s, delay_s, content_type, headers)

    def send_file(
        self,
        path: str | os.PathLike[str],
        *,
        to: str,
        channel: str = CHANNEL_DEFAULT,
        priority: int = PRIORITY_DEFAULT,
        ttl_s: float | None = None,
        delay_s: float | None = None,
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Hand over a file's content as one message; it is copied, and never sits in memory.

        Args: as for `send`. `path` leads to a regular file, which should not change meanwhile; it
            may be changed or removed as soon as this returns.

        Returns: the message id.

        Raises: OSError if the file cannot be opened or read; else as `send`.
        """
        public, lane = self._admit(to, channel, priority)
        values = shared_values(content_type, headers)
        ttl_ms = milliseconds(ttl_s, "ttl_s", zero=False)
        delay_ms = milliseconds(delay_s, "delay_s", zero=True)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(
                    f"{os.fspath(path)} is no regular file", hint="read it, and use send()"
                )
            size = found.st_size
            check_size(public, to, size)
            if size <= BODIES_BYTES_MAX:
                body = self._fs.read_at(fd, BODIES_BYTES_MAX + 1, 0)
                if len(body) <= BODIES_BYTES_MAX:
                    put = Put(lane, [body], values, ttl_ms=ttl_ms, delay_ms=delay_ms)
                    self._take_room(public, put.size)
                    return self._commits.put(put)[0]
                size = os.fstat(fd).st_size  # it has grown since
                check_size(public, to, size)
            self._take_room(public, size)
            with self._commits.blobs() as blobs:
                blob = blobs.from_file(fd, size)
                put = Put(lane, [blob], values, ttl_ms=ttl_ms, delay_ms=delay_ms)
                return self._commits.put(put)[0]
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of the journal. All that was accepted stays; closing twice does nothing."""
        self._finish()
        _open_outboxes.discard(self)

    # -- inside --------------------------------------------------------------------------------

    def _send(
        self,
        bodies: list[bytes],
        to: str,
        channel: str,
        priority: int,
        ttl_s: float | None,
        delay_s: float | None,
        content_type: str | None,
        headers: Mapping[str, str] | None,
    ) -> list[str]:
        public, lane = self._admit(to, channel, priority)
        values = shared_values(content_type, headers)
        ttl_ms = milliseconds(ttl_s, "ttl_s", zero=False)
        delay_ms = milliseconds(delay_s, "delay_s", zero=True)
        if not bodies:
            return []
        largest = max(map(len, bodies))
        check_size(public, to, largest)
        if largest <= BODIES_BYTES_MAX:
            put = Put(lane, bodies, values, ttl_ms=ttl_ms, delay_ms=delay_ms)
            self._take_room(public, put.size)
            return self._commits.put(put)
        self._take_room(public, sum(map(len, bodies)) + 512 * len(bodies))
        with self._commits.blobs() as blobs:
            mixed: list[bytes | Blob] = [
                body if len(body) <= BODIES_BYTES_MAX else blobs.from_bytes(body) for body in bodies
            ]
            return self._commits.put(Put(lane, mixed, values, ttl_ms=ttl_ms, delay_ms=delay_ms))

    def _admit(self, to: str, channel: str, priority: int) -> tuple[Public, Lane]:
        public = self._published.get()
        return public, lane_for(public, to, channel, priority)

    def _take_room(self, public: Public, size: int) -> None:
        try:
            self._room.take(public, size)
        except OSError as error:
            raise refusal(error, self._layout.journals) from error


# -- fork --------------------------------------------------------------------------------------


def _before_fork() -> None:
    _fork_lock.acquire()  # two threads may fork at once
    _forking[:] = sorted(_open_outboxes, key=id)
    for outbox in _forking:
        outbox._commits.before_fork()


def _after_fork_in_parent() -> None:
    for outbox in _forking:
        outbox._commits.after_fork_in_parent()
    _forking.clear()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock
    _fork_lock = threading.Lock()
    for outbox in _forking:
        outbox._commits.after_fork_in_child()
    _forking.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
