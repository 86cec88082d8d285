"""Checks a whole spool against the state table in docs/spool.md, and changes nothing.

Reads every log file to its end, and holds what one file says against what another does: the sums of
each lane, the ranges of merges against the lanes, the chain of what arrived, seqs, blobs. Memory
follows the number of files and lanes, not the messages.

With a daemon running, files grow under the check: only what lies before a published end counts
then, and a file that vanishes meanwhile is passed over.

Raises: SpoolNotReady if there is no spool here; OSError if it cannot be read at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from droprd.core import chain, entry, frame
from droprd.core.entry import FILE_HEADER_BYTES, FileHeader, Kind
from droprd.core.outstate import LaneState, OutboxState, Pos
from droprd.errors import BadData
from droprd.model import Head, LaneKey
from droprd.spool import log
from droprd.spool.fsops import Fs
from droprd.spool.layout import (
    Layout,
    read_version,
    segment_number,
    split_inbox_blob_name,
    split_journal_name,
    split_outbox_blob_name,
)

Level = Literal["note", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as the table says it should be.

    Attributes:
        level: "note" is legal and may be of interest, "warning" mends itself or needs a look,
            "error" means that promised bytes or sums are wrong.
        state: the row of the table in docs/spool.md, where there is one.
        path: relative to the spool.
        hint: what to do, empty if nothing.
    """

    level: Level
    state: str
    path: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        row = f" [{self.state}]" if self.state else ""
        return f"{self.level}{row} {self.path}: {self.text}" + (
            f"; {self.hint}" if self.hint else ""
        )


class _Reader:
    """A log file open for checking."""

    def __init__(
        self, fs: Fs, fd: int, header: FileHeader, promised: int | None, stop: int | None
    ) -> None:
        self.fs = fs
        self.fd = fd
        self.header = header
        self.promised = promised
        self.stop = stop

    def __iter__(self) -> Iterator[log.Entry | log.Damage]:
        published = log.read_published(self.fs, self.fd)
        yield from log.Walk(
            self.fs,
            self.fd,
            self.header.log_id,
            promised=published if self.promised is None else self.promised,
            stop=self.stop or published,
        )


class Checker:
    """One run of the check."""

    def __init__(self, fs: Fs, root: str) -> None:
        self._fs = fs
        self._root = root
        self._layout = Layout(root)
        self._spool_id = read_version(fs, root).spool_id
        self.files = 0
        self.entries = 0
        self.messages = 0
        self.findings: list[Finding] = []

    @property
    def ok(self) -> bool:
        """Whether no promised bytes and no sums are wrong."""
        return not any(finding.level == "error" for finding in self.findings)

    def summary(self) -> str:
        """One line of what was checked and found."""
        counts = {
            level: sum(finding.level == level for finding in self.findings)
            for level in ("error", "warning", "note")
        }
        found = ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n)
        return (
            f"{self.files} files, {self.entries} entries, {self.messages} messages: "
            f"{found or 'all as it should be'}"
        )

    def to_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "schema": 1,
            "ok": self.ok,
            "files": self.files,
            "entries": self.entries,
            "messages": self.messages,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def run(self) -> None:
        """Check everything; the findings are kept, errors first."""
        state = self._sender_log()
        if state is not None:
            self._journals(state)
            for lane in state.lanes.values():
                self._lane(lane)
            self._outbox_blobs(state)
        for path in (
            self._layout.outbox_dead,
            self._layout.inbox_dead,
            self._layout.inbox_lanes_log,
        ):
            self._read_all(path)
        self._streams()
        self._corrupt()
        self.findings.sort(key=lambda f: ("error", "warning", "note").index(f.level))

    def _say(self, level: Level, state: str, path: str, text: str, hint: str = "") -> None:
        self.findings.append(Finding(level, state, os.path.relpath(path, self._root), text, hint))

    # -- one file ------------------------------------------------------------------------------

    def _entries(
        self,
        path: str,
        kind: Kind | None = None,
        *,
        promised: int | None = None,
        stop: int | None = None,
        is_void: Callable[[log.Entry, int], bool] = lambda item, index: False,
    ) -> Iterator[tuple[FileHeader, log.Entry]]:
        """The entries of one log; damage and wrong headers become findings.

        `promised` and `stop` default to the published end. Bodies of messages that are void by
        what another file says are not checked: they may be gone.
        """
        try:
            fd = self._fs.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return
        self.files += 1
        try:
            try:
                header = log.read_header(self._fs, fd)
            except BadData as error:
                if kind is Kind.JOURNAL:
                    self._say("note", "S8", path, f"passed over: {error}")
                else:
                    self._say("error", "A1", path, str(error), "restore this file from a copy")
                return
            if kind is not None and header.kind is not kind:
                self._say("error", "A1", path, f"is a log of kind {header.kind.name.lower()}")
                return
            if header.spool_id != self._spool_id:
                self._say("warning", "A4", path, "belongs to another spool")
            for item in _Reader(self._fs, fd, header, promised, stop):
                if isinstance(item, log.Damage):
                    self._say(
                        "error",
                        "A1",
                        path,
                        f"{item.end - item.start} promised bytes at {item.start} cannot be read",
                        "look for the cause on the disk; the messages around them are kept",
                    )
                    continue
                self.entries += 1
                if item.frame:
                    self._frame(path, item, is_void)
                yield header, item
        finally:
            self._fs.close(fd)

    def _frame(self, path: str, item: log.Entry, is_void: Callable[[log.Entry, int], bool]) -> None:
        try:
            beside = entry.unpack_note(item.note) if item.note else {}
            parsed = frame.parse(item.frame, [v[0] for v in beside.get("v", ())])
        except (BadData, LookupError, TypeError, AttributeError) as error:
            self._say("error", "A1", path, f"the frame at {item.head.offset}: {error}")
            return
        self.messages += parsed.count
        bad = [index for index in parsed.bad_bodies() if not is_void(item, index)]
        if bad:
            ids = parsed.ids()
            names = ", ".join(ids[i] for i in bad[:3])
            self._say(
                "error", "A1", path, f"{len(bad)} bodies do not match their checksums: {names}"
            )

    def _read_all(self, path: str) -> None:
        for _ in self._entries(path):
            pass

    # -- the outbox ----------------------------------------------------------------------------

    def _sender_log(self) -> OutboxState | None:
        layout = self._layout
        if self._fs.stat(layout.sender_log) is None:
            if self._fs.listdir(layout.lanes):
                self._say(
                    "error",
                    "A2",
                    layout.sender_log,
                    "is missing, though there are lanes",
                    "restore it from a copy of this spool",
                )
            return OutboxState()
        state = OutboxState()
        for _, item in self._entries(layout.sender_log, Kind.SENDER):
            try:
                state.apply(entry.unpack_note(item.note))
            except BadData as error:
                self._say("error", "A1", layout.sender_log, str(error))
                return None
        if self._fs.stat(f"{layout.sender_log}.new") is not None:
            self._say("note", "L10", f"{layout.sender_log}.new", "a checkpoint was not finished")
        return state

    def _journals(self, state: OutboxState) -> None:
        layout = self._layout
        for name in self._fs.listdir(layout.journals):
            path = layout.journal(name)
            if split_journal_name(name) is None:
                self._say("warning", "", path, "is no journal", "remove it if nobody needs it")
                continue
            merged = state.merged.get(name, FILE_HEADER_BYTES)
            end = FILE_HEADER_BYTES
            for _, item in self._entries(path, Kind.JOURNAL):
                end = item.head.end
            if merged > end and self._fs.stat(path) is not None:
                self._say(
                    "error",
                    "A1",
                    path,
                    f"was merged up to {merged}, and ends at {end}",
                    "what is missing lies in the lanes, if they are whole",
                )

    def _lane(self, state: LaneState) -> None:
        lane = state.lane
        layout = self._layout
        directory = layout.lane(lane.peer, lane.channel, lane.priority)
        if state.accepted != state.queued + state.ended.total or state.queued < 0:
            self._say(
                "error",
                "",
                directory,
                f"accepted {state.accepted}, but queued {state.queued} "
                f"and ended {state.ended.total}",
            )
        head, waiting = state.acked, 0
        for segment in range(state.first_segment, state.tail.segment + 1):
            if segment == state.tail.segment and state.tail.offset == FILE_HEADER_BYTES:
                break
            path = layout.lane_segment(lane.peer, lane.channel, lane.priority, segment)
            found = self._fs.stat(path)
            if found is None:
                if segment >= state.cursor.segment:
                    self._say("error", "A1", path, "is missing, and messages wait in it")
                continue
            stop = state.tail.offset if segment == state.tail.segment else found.size
            end = FILE_HEADER_BYTES
            # What is not synced yet can still be mended from the journals.
            synced = state.synced.offset if segment == state.synced.segment else FILE_HEADER_BYTES
            promised = stop if segment < state.synced.segment else synced

            def is_void(item: log.Entry, index: int, segment: int = segment) -> bool:
                return state.is_purged(Pos(segment, item.head.offset))

            for _, item in self._entries(
                path, Kind.LANE, promised=promised, stop=stop, is_void=is_void
            ):
                end = item.head.end
                at = Pos(segment, item.head.offset)
                if at < state.cursor or not item.frame or state.skip_at(at):
                    continue
                try:
                    info = frame.peek(item.frame)
                except BadData:
                    continue
                head = chain.extend(head, info.frame_id, info.messages)
                waiting += info.messages
                if info.is_blob and not state.is_purged(at):
                    self._outbox_blob_is_there(path, info)
            if end < stop:
                self._say(
                    "warning",
                    "S5",
                    path,
                    f"ends at {end}, merges say {stop}",
                    "the sender mends it from the journals when it starts",
                )
        if waiting != state.queued and not any(f.level != "note" for f in self.findings):
            self._say(
                "error", "", directory, f"{waiting} messages wait in it, {state.queued} should"
            )
        if state.hold is not None:
            self._say(
                "warning",
                "L7",
                directory,
                f"waits for an operator: {state.hold}",
                f"see: droprctl why {lane.peer}",
            )

    def _outbox_blob_is_there(self, path: str, info: frame.FrameInfo) -> None:
        found = self._fs.stat(self._layout.outbox_blob(info.frame_id))
        if found is None:
            names = self._fs.listdir(self._layout.outbox_blobs)
            if any(n.endswith(info.frame_id.hex()) for n in names):
                return
            self._say("error", "A1", path, f"the blob of frame {info.frame_id.hex()} is missing")
        elif found.size != info.bodies_bytes:
            self._say(
                "error",
                "A1",
                path,
                f"the blob of frame {info.frame_id.hex()} has {found.size} bytes "
                f"instead of {info.bodies_bytes}",
            )

    def _outbox_blobs(self, state: OutboxState) -> None:
        journals = set(self._fs.listdir(self._layout.journals)) | set(state.merged)
        for name in self._fs.listdir(self._layout.outbox_blobs):
            parts = split_outbox_blob_name(name)
            path = f"{self._layout.outbox_blobs}/{name}"
            if parts is None:
                self._say("warning", "", path, "is no blob", "remove it if nobody needs it")
            elif parts[0] is not None and parts[0] not in journals:
                self._say("note", "S10", path, "its send never returned; the sender deletes it")

    # -- the inbox -----------------------------------------------------------------------------

    def _streams(self) -> None:
        layout = self._layout
        heads: dict[LaneKey, Head] = {}
        for channel in self._fs.listdir(layout.channels):
            for name in self._fs.listdir(layout.channel(channel)):
                if not (len(name) == 1 and name.isdigit()):
                    self._say("warning", "", f"{layout.channel(channel)}/{name}", "is no priority")
                    continue
                self._stream(channel, int(name), heads)
        for name in self._fs.listdir(layout.inbox_blobs):
            parts = split_inbox_blob_name(name)
            if parts is None:
                self._say("warning", "", f"{layout.inbox_blobs}/{name}", "is no blob")
            elif not parts[2]:
                self._say("note", "I7", f"{layout.inbox_blobs}/{name}", "is on its way")

    def _stream(self, channel: str, priority: int, heads: dict[LaneKey, Head]) -> None:
        layout = self._layout
        directory = layout.stream(channel, priority)
        numbers = sorted(
            n for n in map(segment_number, self._fs.listdir(directory)) if n is not None
        )
        seq: int | None = None
        for number in numbers:
            path = layout.inbox_segment(channel, priority, number)
            for header, item in self._entries(path, Kind.CHANNEL):
                note = entry.unpack_note(item.note)
                if seq is None:
                    seq = header.base
                if note["q"] < seq:
                    self._say("error", "", path, f"seq {note['q']} comes after {seq - 1}")
                try:
                    info = frame.peek(item.frame)
                except BadData:
                    continue
                seq = note["q"] + info.messages
                self._chain(
                    path, LaneKey(note["p"], note["s"], channel, priority), note, info, heads
                )
                if info.is_blob and not note.get("v"):
                    self._inbox_blob_is_there(path, note["p"], info)
        self._read_all(layout.claims(channel, priority))

    def _chain(
        self,
        path: str,
        key: LaneKey,
        note: dict[str, object],
        info: frame.FrameInfo,
        heads: dict[LaneKey, Head],
    ) -> None:
        before, after = note["n"], note["h"]
        known = heads.get(key)
        if not isinstance(before, int) or not isinstance(after, bytes):
            self._say("error", "", path, f"a note of {key} is malformed")
            return
        if known is not None:
            if before < known.number:
                self._say("error", "", path, f"{key}: message {before + 1} was stored twice")
            elif before == known.number and chain.extend(known, info.frame_id, info.messages) != (
                before + info.messages,
                after,
            ):
                self._say("error", "", path, f"{key}: the chain breaks after message {before}")
        heads[key] = Head(before + info.messages, after)

    def _inbox_blob_is_there(self, path: str, peer: str, info: frame.FrameInfo) -> None:
        found = self._fs.stat(self._layout.inbox_blob(peer, info.frame_id))
        if found is None or found.size != info.bodies_bytes:
            name = f"{peer}~{info.frame_id.hex()}"
            self._say("error", "A1", path, f"the blob {name} is not whole")

    def _corrupt(self) -> None:
        try:
            names = self._fs.listdir(self._layout.corrupt)
        except PermissionError:
            return
        if names:
            self._say(
                "warning",
                "A1",
                self._layout.corrupt,
                f"holds {len(names)} pieces that could not be read",
                "look at them, then move them away",
            )


def check_spool(fs: Fs, root: str) -> Checker:
    """Check the spool at `root`; the findings are in the result."""
    checker = Checker(fs, root)
    checker.run()
    return checker
