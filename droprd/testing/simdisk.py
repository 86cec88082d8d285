"""A simulated disk: what was written, what is synced, and what a power cut leaves of it.

Per file it keeps the bytes as processes see them, the bytes known to be on the platter, and the
writes and cuts in between; per directory the same of its names. `power_cut` lets a random part of
what was not synced reach the platter, as real file systems may:

- *ordered*: everything up to some moment, the last write torn at a sector of 512 bytes;
- *subset*: any sectors of any writes, in any version they had since; sizes and cuts on their own
  (so a file may be extended with zeros, and old bytes come back under a cut); any of the creates,
  renames and unlinks. A rename is all or nothing.

A sync of a file makes its bytes and size durable but not its name; `sync_dir` makes the names in
one directory durable. After a failed sync the cache goes on showing what the platter may not hold,
and a later sync does not write it again: what a real kernel does.

Nothing here looks at real files or clocks; the same seed gives the same disk.
"""

from __future__ import annotations

from random import Random

SECTOR_BYTES = 512
PAGE_BYTES = 4096


class SimFile:
    """A regular file or FIFO. `changes` holds (serial, offset, data), or (serial, length, None)."""

    __slots__ = ("changes", "content", "durable", "fifo", "locks", "mode", "mtime_ns", "number")

    def __init__(self, number: int, mode: int, *, fifo: bool = False) -> None:
        self.number = number
        self.mode = mode
        self.fifo = fifo
        self.mtime_ns = 0
        self.content = bytearray()
        self.durable = bytearray()
        self.changes: list[tuple[int, int, bytes | None]] = []
        self.locks: dict[object, bool] = {}

    def commit(self) -> None:
        """All changes reach the platter."""
        durable = self.durable
        for _, offset, data in self.changes:
            _apply(durable, offset, data)
        self.changes.clear()


class SimDir:
    """A directory: its names as seen, and those that are durable."""

    __slots__ = ("durable", "mode", "names", "number")

    def __init__(self, number: int, mode: int) -> None:
        self.number = number
        self.mode = mode
        self.names: dict[str, SimFile | SimDir] = {}
        self.durable: dict[str, SimFile | SimDir] = {}


class NameChange:
    """One create, unlink or rename: `node` leaves (old_dir, old) and appears as (new_dir, new)."""

    __slots__ = ("new", "new_dir", "node", "old", "old_dir", "serial")

    def __init__(
        self,
        serial: int,
        node: SimFile | SimDir,
        old_dir: SimDir | None,
        old: str,
        new_dir: SimDir | None,
        new: str,
    ) -> None:
        self.serial = serial
        self.node = node
        self.old_dir = old_dir
        self.old = old
        self.new_dir = new_dir
        self.new = new

    def commit(self) -> None:
        if self.old_dir is not None and self.old_dir.durable.get(self.old) is self.node:
            del self.old_dir.durable[self.old]
        if self.new_dir is not None:
            self.new_dir.durable[self.new] = self.node


class SimDisk:
    """The disk of one simulated machine. Processes reach it through `droprd.testing.simfs.SimFs`.

    Attributes:
        full: while true, writes that make a file longer fail with ENOSPC.
        syncs: how often each sync site was used; shared with clones.
        subsets_only: power cuts always keep an arbitrary subset, the harshest way.
        disable_sites: syncs of these sites do nothing (to prove that the simulation notices).
    """

    def __init__(self, *, disable_sites: frozenset[str] = frozenset()) -> None:
        self.root = SimDir(1, 0o755)
        self.serial = 0
        self._numbers = 1
        self.dirty: dict[SimFile, None] = {}
        self.name_changes: list[NameChange] = []
        self.full = False
        self.subsets_only = False
        self.free_bytes = 1 << 40
        self.syncs: dict[str, int] = {}
        self.disable_sites = disable_sites

    def new_file(self, mode: int, *, fifo: bool = False) -> SimFile:
        self._numbers += 1
        return SimFile(self._numbers, mode, fifo=fifo)

    def new_dir(self, mode: int) -> SimDir:
        self._numbers += 1
        return SimDir(self._numbers, mode)

    def change(self, file: SimFile, offset: int, data: bytes | None) -> None:
        """Write `data` at `offset`, or cut or extend the file to `offset` if data is None."""
        _apply(file.content, offset, data)
        if not file.changes:
            self.dirty[file] = None
        self.serial += 1
        file.changes.append((self.serial, offset, data))

    def change_name(
        self,
        node: SimFile | SimDir,
        old_dir: SimDir | None,
        old: str,
        new_dir: SimDir | None,
        new: str,
    ) -> None:
        """Take `node` out of one directory, put it into another, or both (a rename)."""
        if old_dir is not None:
            del old_dir.names[old]
        if new_dir is not None:
            new_dir.names[new] = node
        self.serial += 1
        self.name_changes.append(NameChange(self.serial, node, old_dir, old, new_dir, new))

    def sync(self, file: SimFile) -> None:
        """The file's bytes and size are durable. Its name is not."""
        if file.changes:
            file.commit()
            del self.dirty[file]

    def fail_sync(self, file: SimFile, rng: Random) -> None:
        """Some changes reach the platter, the cache goes on showing all, none are retried."""
        if file.changes:
            file.durable = surviving_subset(file, rng)
            file.changes.clear()
            del self.dirty[file]

    def sync_dir(self, directory: SimDir) -> None:
        """The names in `directory` are durable, and whole renames into and out of it."""
        wanted = {directory}
        chosen: list[NameChange] = []
        kept: list[NameChange] = []
        for change in reversed(self.name_changes):
            if change.old_dir in wanted or change.new_dir in wanted:
                chosen.append(change)
                # What happened before at the other end of a rename cannot come after it.
                wanted.update(d for d in (change.old_dir, change.new_dir) if d is not None)
            else:
                kept.append(change)
        for change in reversed(chosen):
            change.commit()
        kept.reverse()
        self.name_changes = kept

    def sync_all(self) -> None:
        """Everything is durable (a clean shutdown, or a copy that was finished)."""
        for file in self.dirty:
            file.commit()
        self.dirty.clear()
        for change in self.name_changes:
            change.commit()
        self.name_changes.clear()

    def power_cut(self, rng: Random) -> None:
        """The machine goes dark: a random part of what was not synced survives."""
        style = rng.random() if not self.subsets_only else 1.0
        if style < 0.2:
            pass
        elif style < 0.3:
            self.sync_all()
        elif style < 0.6:
            self._cut_ordered(rng)
        else:
            self._cut_subset(rng)
        for file in self.dirty:
            file.changes.clear()
        self.dirty.clear()
        self.name_changes.clear()
        # Files whose sync failed differ without being dirty, so all are looked at.
        _forget_cache(self.root)

    def _cut_ordered(self, rng: Random) -> None:
        serials = [c[0] for file in self.dirty for c in file.changes]
        serials += [c.serial for c in self.name_changes]
        if not serials:
            return
        serials.sort()
        last = rng.choice(serials)
        for file in self.dirty:
            for serial, offset, data in file.changes:
                if serial < last or (serial == last and data is None):
                    _apply(file.durable, offset, data)
                elif serial == last and data is not None:
                    _apply(file.durable, offset, torn(offset, data, rng))
        for change in self.name_changes:
            if change.serial <= last:
                change.commit()

    def _cut_subset(self, rng: Random) -> None:
        for file in self.dirty:
            file.durable = surviving_subset(file, rng)
        share = rng.choice((0.1, 0.5, 0.9))
        for change in self.name_changes:
            if rng.random() < share:
                change.commit()

    def clone(self) -> SimDisk:
        """A copy of what is seen now, all of it durable; other inodes, no locks."""
        copy = SimDisk(disable_sites=self.disable_sites)
        copy.syncs = self.syncs
        copy.root = copy._copy_dir(self.root)
        return copy

    def put_back(self, copy: SimDisk) -> None:
        """Hold from now on what `copy` holds, all of it durable (a restore from a backup)."""
        self.dirty.clear()
        self.name_changes.clear()
        self.root = self._copy_dir(copy.root)

    def _copy_dir(self, directory: SimDir) -> SimDir:
        copy = self.new_dir(directory.mode)
        for name, node in directory.names.items():
            if isinstance(node, SimDir):
                copy.names[name] = self._copy_dir(node)
            else:
                file = self.new_file(node.mode, fifo=node.fifo)
                file.mtime_ns = node.mtime_ns
                file.content = bytearray(node.content)
                file.durable = bytearray(node.content)
                copy.names[name] = file
        copy.durable = dict(copy.names)
        return copy


def torn(offset: int, data: bytes, rng: Random, unit: int = SECTOR_BYTES) -> bytes:
    """The part of a write that got as far as some boundary of `unit` bytes in the file."""
    units = (offset + len(data) - 1) // unit - offset // unit + 1
    done = rng.randrange(units + 1)
    if done == 0:
        return b""
    return data[: (offset // unit + done) * unit - offset]


def surviving_subset(file: SimFile, rng: Random) -> bytearray:
    """What the platter may hold of a file: durable bytes and any versions of changed sectors."""
    changes = file.changes
    seen = bytearray(file.durable)
    out = bytearray(file.durable)
    size = len(out)
    # The size is metadata of its own: that of some moment, whatever became of the data.
    size_moment = rng.randrange(-1, len(changes))
    share = rng.choice((0.2, 0.5, 0.8))
    for moment, (_, offset, data) in enumerate(changes):
        _apply(seen, offset, data)
        if moment == size_moment:
            size = len(seen)
        if data is None:
            if moment <= size_moment and offset < len(out):
                del out[offset:]
            continue
        if not data:
            continue
        first = offset // SECTOR_BYTES
        count = (offset + len(data) - 1) // SECTOR_BYTES - first + 1
        draw = rng.random()
        if draw < 0.3:
            continue
        kept = (1 << count) - 1 if draw < 0.6 or share > 0.7 else rng.getrandbits(count)
        while kept:
            low = kept & -kept
            start = (first + low.bit_length() - 1) * SECTOR_BYTES
            _apply(out, start, bytes(seen[start : start + SECTOR_BYTES]))
            kept ^= low
    if len(out) > size:
        del out[size:]
    elif len(out) < size:
        out.extend(bytes(size - len(out)))
    return out


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    size = len(content)
    if data is None:
        if offset < size:
            del content[offset:]
        else:
            content.extend(bytes(offset - size))
    elif offset == size:
        content += data
    else:
        if offset > size:
            content.extend(bytes(offset - size))
        content[offset : offset + len(data)] = data


def _forget_cache(directory: SimDir) -> None:
    directory.names = dict(directory.durable)
    for node in directory.names.values():
        if isinstance(node, SimDir):
            _forget_cache(node)
        else:
            if node.content != node.durable:
                node.content = bytearray(node.durable)
            node.locks.clear()
