"""Merging: what producers put into their journals goes into lanes, in the order of its stamps.

Owns: reading journals, the rounds (with `rounds`), and deleting journals that are
merged to their end. The order itself is decided in `droprd.core.merge`.

Guarantees: a frame enters its lane once. The journals' ranges and the lanes' new ends are committed
by one synced note; before that nothing of a round is sent. A journal is deleted under its lock, and
only when every lane it went into is synced, data and names; until then lanes can be mended from it.
Of a journal that somebody holds only what lies before its published end is read; of one that nobody
holds, all that is whole, after it was synced.

What a crash leaves: a round that is committed, or one that never happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from droprd.core import frame
from droprd.core.entry import FILE_HEADER_BYTES
from droprd.core.merge import BootOrder, in_order
from droprd.core.outstate import merge_note
from droprd.errors import BadData
from droprd.model import Lane
from droprd.spool import log
from droprd.spool.handle import Spool
from droprd.spool.journalfile import left_behind, open_journal
from droprd.spool.lanes import WRITERS_MAX, LaneFiles
from droprd.spool.layout import split_journal_name, split_outbox_blob_name
from droprd.spool.rounds import CORRUPT, Journal, Part, Source
from droprd.spool.senderlog import SenderLog

ROUND_BYTES = 4 << 20


@dataclass(slots=True)
class MergeResult:
    """What a round did.

    Attributes:
        lanes: those that got something.
        more: whether it stopped because it had taken enough.
        unmerged_bytes: what is readable in journals and not yet in lanes.
    """

    lanes: list[Lane] = field(default_factory=list)
    messages: int = 0
    more: bool = False
    unmerged_bytes: int = 0


class Merger:
    """Takes journals into lanes. All of it happens in the sender."""

    def __init__(
        self, spool: Spool, sender_log: SenderLog, lanes: LaneFiles, *, idle_s: float = 5
    ) -> None:
        """`idle_s`: how long a journal must be quiet before it is looked at whether anybody
        still holds it."""
        self._spool = spool
        self._log = sender_log
        self._lanes = lanes
        self._idle_ns = int(idle_s * 1e9)
        self._journals: dict[str, Journal] = {}
        self._ends: dict[str, int] = {}  # where broken journals validly end, by their successors
        self._is_first = True
        self._knows_no_boots = True
        self._boots = BootOrder(sender_log.state.boots, spool.clock.boot_id())
        self.corrupt_bytes = 0

    # -- rounds ------------------------------------------------------------------------------

    def round(self, bytes_max: int = ROUND_BYTES) -> MergeResult:
        """Merge what is there, up to about `bytes_max`. Committed when it returns.

        Raises: OSError, after which this process must end.
        """
        now_ns = self._spool.clock.boot_ns()  # before the journals are looked at: see core.merge
        self._look(now_ns)
        merged = self._log.state.merged
        sources = [
            j for j in self._journals.values() if j.limit > merged.get(j.name, FILE_HEADER_BYTES)
        ]
        result = MergeResult()
        if not sources:
            self._settle_boots()
            return result
        if self._knows_no_boots:
            self._boots.learn(self._boots_of(j) for j in sources)
            self._knows_no_boots = False
        reads = [
            Source(self._spool.fs, j, merged.get(j.name, FILE_HEADER_BYTES), self._damaged)
            for j in sources
        ]
        runs: list[tuple[int, int, int]] = []
        bad: list[tuple[str, int, Sequence[int]]] = []
        parts: dict[Lane, Part] = {}
        taken = 0
        is_crowded = False
        for index, item in in_order([iter(r) for r in reads], self._boots, now_ns, bytes_max):
            lane = item.frame.lane
            part = parts.get(lane)
            if part is None and len(parts) == WRITERS_MAX:
                is_crowded = True  # one more lane would close the file of one of these
                break
            taken += item.size
            start, end = reads[index].took(item)
            if runs and runs[-1][0] == index:
                runs[-1] = (index, runs[-1][1], end)
            else:
                runs.append((index, start, end))
            if item.bad:
                bad.append((sources[index].name, item.offset, item.bad))
            if part is None:
                part = parts[lane] = Part(*self._lanes.writer(self._log.state.lane(lane)))
            part.append(item)
            if item.frame.info.is_blob:
                self._adopt_blob(sources[index].name, item.frame.frame_id)
        for index, read in enumerate(reads):
            end = read.walk.end
            if read.is_done and end > read.position:  # notes and damage behind the last frame
                runs.append((index, read.position, end))
        self._lanes.flush(list(parts))
        self._settle_boots()
        if runs:
            self._log.add(
                merge_note(
                    [(sources[i].name, start, end) for i, start, end in runs],
                    [p.merged(lane) for lane, p in parts.items()],
                    bad,
                )
            )
            for lane, part in parts.items():
                for frame_id, indexes in part.voids:
                    self._log.add(["void", list(lane), frame_id, [[i, CORRUPT] for i in indexes]])
            # If we stop here: the lanes hold frames that no merge commits; they are cut at the
            # next start, and merged again from the journals.
            self._log.commit()
        result.lanes = list(parts)
        result.messages = sum(p.messages for p in parts.values())
        result.more = is_crowded or taken >= bytes_max
        result.unmerged_bytes = self.unmerged_bytes()
        return result

    def unmerged_bytes(self) -> int:
        """Bytes that are readable in the journals known and not yet in lanes."""
        merged = self._log.state.merged
        return sum(
            max(0, j.limit - merged.get(j.name, FILE_HEADER_BYTES)) for j in self._journals.values()
        )

    def _boots_of(self, journal: Journal) -> list[bytes]:
        """The boots in which frames were put into what is not merged of a journal, in order."""
        fs, limit = self._spool.fs, journal.limit
        start = self._log.state.merged.get(journal.name, FILE_HEADER_BYTES)
        boots: list[bytes] = []
        for item in log.Walk(fs, journal.fd, journal.log_id, start, promised=limit, stop=limit):
            if isinstance(item, log.Damage) or not item.frame:
                continue
            try:
                boot_id = frame.peek(item.frame).boot_id
            except BadData:
                continue
            if not boots or boots[-1] != boot_id:
                boots.append(boot_id)
            if boot_id == self._boots.own:
                break  # nothing later can follow
        return boots

    def _settle_boots(self) -> None:
        if self._boots.changed:
            self._log.add(["boots", self._boots.all()])
            self._log.commit()
            self._boots.changed = False

    def _look(self, now_ns: int) -> None:
        """Find new journals, and how far each may be read."""
        fs, layout = self._spool.fs, self._spool.layout
        names = fs.listdir(layout.journals)
        fresh = [n for n in names if n not in self._journals and split_journal_name(n)]
        if fresh:
            # Where broken journals validly end, by what their makers' next ones say.
            self._ends = left_behind(fs, layout)
        for name in fresh:
            self._open(name, now_ns)
        for journal in list(self._journals.values()):
            if journal.is_ours:
                continue
            published = self._capped(journal.name, log.read_published(fs, journal.fd))
            is_new = published > journal.limit
            if is_new:
                journal.limit = published
            # At a start what is published may lag behind what was promised (a power cut takes it
            # back), and nothing later may be merged before that.
            if self._is_first or (not is_new and now_ns - journal.seen_ns > self._idle_ns):
                self._try_finish(journal)
                is_new = True
            if is_new:
                journal.seen_ns = now_ns
        self._is_first = False

    def _capped(self, name: str, end: int) -> int:
        return min(end, self._ends.get(name, end))

    def _open(self, name: str, now_ns: int) -> None:
        try:
            file = open_journal(self._spool.fs, self._spool.layout, name)
        except BadData:
            # Made and not yet filled, or left so by a power cut; nothing in it was promised.
            # Its maker may still write the header, so it is looked at again next time.
            return
        if file is None:
            return
        log_id = file.header.log_id
        self._journals[name] = Journal(name, file.fd, log_id, FILE_HEADER_BYTES, seen_ns=now_ns)

    def _try_finish(self, journal: Journal) -> None:
        """If nobody holds it, it is ours to finish: sync it, and take what is whole."""
        fs = self._spool.fs
        if not fs.try_lock(journal.fd):
            return
        found = fs.stat(self._spool.layout.journal(journal.name))
        if found is None or found.file != fs.file_of(journal.fd):
            self._forget(journal)
            return
        # Nobody acts on what is not on disk.
        fs.sync(journal.fd, "journal.finish")
        published = log.read_published(fs, journal.fd)
        start = self._log.state.merged.get(journal.name, FILE_HEADER_BYTES)
        if fs.read_at(journal.fd, fs.size(journal.fd), published).strip(b"\0"):
            # Whoever left it behind let go of it only once the note that says so was on disk, so
            # now is the time to ask.
            self._ends = left_behind(fs, self._spool.layout)
        cap = self._ends.get(journal.name)
        walk = log.Walk(
            fs, journal.fd, journal.log_id, start, promised=max(start, published), stop=cap
        )
        for _ in walk:
            pass
        if cap is None:
            tail = fs.read_at(journal.fd, fs.size(journal.fd) - walk.end, walk.end).rstrip(b"\0")
            if tail:
                # Never promised: counted, kept, and passed over.
                self._spool.set_aside(self._spool.layout.journal(journal.name), walk.end, tail)
        journal.limit = max(walk.end, start)
        journal.is_ours = True

    def _forget(self, journal: Journal) -> None:
        self._spool.fs.close(journal.fd)
        del self._journals[journal.name]

    def _adopt_blob(self, journal: str, frame_id: bytes) -> None:
        fs, layout = self._spool.fs, self._spool.layout
        old = layout.journal_blob(journal, frame_id)
        if fs.stat(old) is not None:
            # If we stop here: the blob is found under either name; its journal stays until this
            # name is durable.
            fs.rename(old, layout.outbox_blob(frame_id))

    def _adopt_late_blobs(self, journals: dict[str, Journal]) -> None:
        """Of merged journals: a power cut may have taken back the names their blobs had got."""
        fs, layout = self._spool.fs, self._spool.layout
        named = map(split_outbox_blob_name, fs.listdir(layout.outbox_blobs))
        for name in dict.fromkeys(parts[0] for parts in named if parts is not None):
            journal = journals.get(name or "")
            if journal is None:
                continue
            limit = journal.limit
            for item in log.Walk(fs, journal.fd, journal.log_id, promised=limit, stop=limit):
                if isinstance(item, log.Entry) and item.frame:
                    try:
                        info = frame.peek(item.frame)
                    except BadData:
                        continue
                    if info.is_blob:
                        self._adopt_blob(journal.name, info.frame_id)

    # -- journals that are merged to their end -----------------------------------------------

    def retire(self) -> int:
        """Delete the journals of which nothing is left to do; returns how many."""
        fs, layout, state = self._spool.fs, self._spool.layout, self._log.state
        done = [
            j
            for j in self._journals.values()
            if j.is_ours and state.merged.get(j.name, FILE_HEADER_BYTES) >= j.limit
        ]
        if not done:
            return 0
        self._adopt_late_blobs({j.name: j for j in done})
        self.sync_lanes()
        for journal in done:
            # If we stop here: the name may come back after a power cut. What was merged of it is
            # still known, for names are forgotten only once they are durably gone.
            fs.unlink(layout.journal(journal.name))
            self._forget(journal)
        fs.sync_dir(layout.journals, "journals.gone")
        self._log.add(["gone", [j.name for j in done]])
        self._log.commit()
        return len(done)

    def sync_lanes(self) -> None:
        """Make lanes and blobs independent of the journals behind them."""
        state = self._log.state
        self._lanes.sync_all()
        self._spool.fs.sync_dir(self._spool.layout.outbox_blobs, "blobs.dir")
        touched = {p.lane for m in state.unsynced for p in m.lanes}
        self._log.add(["synced", [[list(n), list(state.lane(n).tail)] for n in touched]])
        # If we stop here: lanes are mended from journals that are still there.
        self._log.commit()
        if self._log.wants_checkpoint:
            self._log.checkpoint()

    def remove_orphans(self) -> int:
        """Delete blobs whose journal is gone without naming them: their send never returned."""
        fs, layout = self._spool.fs, self._spool.layout
        blobs = fs.listdir(layout.outbox_blobs)
        # Looked at afterwards: a blob's journal is there before the blob.
        journals = set(fs.listdir(layout.journals)) | set(self._log.state.merged)
        removed = 0
        for name in blobs:
            parts = split_outbox_blob_name(name)
            if parts is not None and parts[0] is not None and parts[0] not in journals:
                fs.unlink(f"{layout.outbox_blobs}/{name}")
                removed += 1
        return removed

    def close(self) -> None:
        """Let go of all journals."""
        for journal in list(self._journals.values()):
            self._forget(journal)

    def _damaged(self, journal: Journal, start: int, end: int) -> None:
        """Keep promised bytes that cannot be read; they are counted and health turns critical."""
        data = self._spool.fs.read_at(journal.fd, end - start, start)
        self._spool.set_aside(self._spool.layout.journal(journal.name), start, data)
        self.corrupt_bytes += end - start
