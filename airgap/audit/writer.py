"""One batch durable, read back, signed: the files and the tree of a log that is being written.

It obeys docs/design/audit.md, 4, in that order and with no step left out. There is no thread, no
queue and no state here: `log` decides what is written and when, and what a fault means.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from airgap.audit.checkpoint import Head, LogKey, sign_checkpoint
from airgap.audit.clock import Clock
from airgap.audit.disk import Disk
from airgap.audit.layout import Layout, journal_line
from airgap.audit.lock import Lock
from airgap.audit.record import FIRST_PREV, encode, new_ulid, timestamp
from airgap.audit.recovery import OpenIntents, Recovered, frontier_content, note_intent
from airgap.audit.tiles import SEGMENT, Edge, Node, Tiles, remove_partial
from policy.errors import AirgapError

MAX_BATCH: Final = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """What receipts of one commit share."""

    head: Head
    nodes: dict[Node, bytes]


@dataclass(slots=True)
class Pending:
    """One record on its way. `done` is locked until the writer has decided."""

    fields: dict[str, Any]
    done: threading.Lock | None = None  # none for the owner's own records: nobody waits
    following: LogKey | None = None  # of a `key.rotate`: the key that signs from here on
    followers: list[Pending] = field(default_factory=list)  # refusals that this record tells, too
    seq: int = -1
    leaf: bytes = b""
    batch: Batch | None = None
    error: AirgapError | None = None

    def answer(self, *, batch: Batch | None = None, error: AirgapError | None = None) -> None:
        """Tell the waiting caller, once."""
        if self.batch is None and self.error is None:
            self.batch, self.error = batch, error
            if self.done is not None:
                self.done.release()
        for follower in self.followers:
            follower.seq, follower.leaf = self.seq, self.leaf
            follower.answer(batch=batch, error=error)


class Writer:
    """The open files, the growing tree and the key of one log; used by one thread at a time."""

    def __init__(
        self, layout: Layout, key: LogKey, *, lock: Lock, disk: Disk, clock: Clock, host: str
    ) -> None:
        self.key, self.layout = key, layout
        self.head: Head | None = None
        self.intents: OpenIntents = {}  # open in the records under the newest head
        self.unpublished = False
        self.written = 0  # bytes of lines and heads so far
        self.inst = new_ulid(clock.wall_ns())
        self._lock, self._disk, self._clock, self._host = lock, disk, clock, host
        self._boot = clock.boot_id()
        self._fd = self._journal_fd = -1
        self._segment = -1
        self._segment_bytes = 0
        self._edge, self._prev = Edge(), FIRST_PREV
        self._segments: list[bytes] = []
        self._rotations: list[tuple[int, str]] = []
        self._tiles = Tiles(self._put_tile)
        self._published: list[str] = []
        self._unsynced: set[str] = set()  # full tiles of the live segment

    # -- beginning and end ---------------------------------------------------------------------

    def begin(self, first: Pending, objects: Sequence[bytes] = ()) -> None:
        """Start a log beside and rename it into place once its first head is durable.

        So a folder `log` without any signed head is never the debris of a crash. `objects` are what
        the first record cites.
        """
        target, disk = self.layout, self._disk
        new = Layout(target.folder, "log.new")
        if new.log.is_dir():
            _remove_tree(new.log)
        self.layout = new
        for name in ("seg", "tile", "frontier", "objects", "anchors"):
            disk.make_folder(new.log / name)
        for content in objects:
            path = new.object(hashlib.sha256(content).hexdigest())
            disk.make_folder(path.parent)
            disk.put(path, content)
        self.open_journal()
        self.commit_all([first])
        self.publish()
        self.sync_journal()
        disk.sync_folder(new.log)
        disk.rename(new.log, target.log)
        disk.sync_folder(target.folder)
        self.layout = target

    def adopt(self, recovered: Recovered) -> None:
        """Go on where a recovered log ends."""
        self._edge, self._prev = recovered.edge, recovered.prev
        self.head, self._tiles = recovered.head, recovered.tiles
        self._segments, self.intents = recovered.segments, recovered.intents
        self._rotations = [(each.size, str(each.vkey)) for each in recovered.rotations]
        self._tiles.put = self._put_tile
        remove_partial(self.layout.tiles)
        self.open_journal()

    def open_journal(self) -> None:
        """Open the journal of heads for appending."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._journal_fd = self._disk.open(self.layout.journal, flags)

    def sync_journal(self) -> None:
        """Make every head so far durable."""
        self._disk.fsync(self._journal_fd)

    def release(self) -> None:
        """Close the files."""
        for name in ("_fd", "_journal_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    @property
    def size(self) -> int:
        """Records in the tree."""
        return self._edge.size

    # -- commit --------------------------------------------------------------------------------

    def commit_all(self, work: Sequence[Pending]) -> None:
        """Commit in batches. None crosses a segment's end, and a change of the key ends one."""
        while work:
            room = min(MAX_BATCH, SEGMENT - self._edge.size % SEGMENT)
            rotates = [at for at, each in enumerate(work[:room], 1) if each.following is not None]
            room = rotates[0] if rotates else room
            self._commit(work[:room])
            work = work[room:]

    def _commit(self, batch: Sequence[Pending]) -> None:
        """Make one batch durable, then sign it; the order counts, and each step matters."""
        if self._edge.size // SEGMENT != self._segment:
            self._roll()
        lines = self._chain(batch)
        content = b"\n".join(lines) + b"\n"
        self._disk.write(self._fd, content)
        self._disk.fdatasync(self._fd)  # The durability point. Never retried: a second may lie.
        self._segment_bytes += len(content)
        self._check_files()
        again = os.pread(self._fd, len(content), self._segment_bytes - len(content))
        nodes = self._advance(again, batch)
        following = batch[-1].following
        head = sign_checkpoint(self.key, self._edge.size, self._edge.root(), also=following)
        journal = journal_line(head.note)
        self._disk.write(self._journal_fd, journal)
        self.written += len(content) + len(journal)
        if following is not None:
            self._hand_over(following)
        self.head = head
        shared = Batch(head, nodes)
        for pending in batch:
            note_intent(self.intents, pending.fields)
            pending.answer(batch=shared)
        self.unpublished = True

    def sign_closing(self, size: int, root: bytes, following: LogKey) -> None:
        """Sign the last head of an epoch after a crash that came before it was signed."""
        self.head = sign_checkpoint(self.key, size, root, also=following)
        self._disk.write(self._journal_fd, journal_line(self.head.note))
        self.sync_journal()

    def _hand_over(self, following: LogKey) -> None:
        """Let the next key sign from here on; the closing head is durable before the old goes."""
        self.sync_journal()
        self._rotations.append((self._edge.size, str(following.vkey)))
        self.key = following

    def _chain(self, batch: Sequence[Pending]) -> list[bytes]:
        """Number, stamp and link the records of a batch; return their lines."""
        seq, prev = self._edge.size, self._prev
        owned: dict[str, Any] = {
            "v": 1,
            "boot": self._boot,
            "host": self._host,
            "inst": self.inst,
            "ts": timestamp(self._clock.wall_ns()),
            "mono_ns": str(self._clock.mono_ns()),
        }
        lines = []
        for pending in batch:
            line = encode(pending.fields | owned | {"seq": seq, "prev": prev})
            pending.seq, pending.leaf = seq, hashlib.sha256(b"\0" + line).digest()
            seq, prev = seq + 1, pending.leaf.hex()
            lines.append(line)
        self._prev = prev
        return lines

    def _advance(self, again: bytes, batch: Sequence[Pending]) -> dict[Node, bytes]:
        """Hash what was read back into the tree; a bit that flipped on the way halts the log."""
        nodes: dict[Node, bytes] = self._edge.nodes()
        made: dict[Node, bytes] = {}
        found = again.split(b"\n")
        if len(found) != len(batch) + 1:
            raise OSError(errno.EIO, "the file gives back another number of records")
        for line, pending in zip(found, batch, strict=False):
            leaf = hashlib.sha256(b"\0" + line).digest()
            if leaf != pending.leaf:
                raise OSError(errno.EIO, f"record {pending.seq} reads back differently")
            self._edge.append(leaf, made)
        self._tiles.add(made)
        height = SEGMENT.bit_length() - 1
        self._segments += [value for (level, _), value in made.items() if level == height]
        return nodes | made

    def _check_files(self) -> None:
        """Halt when the file we write is no longer the one that readers will find."""
        mine = os.fstat(self._fd)
        there = self.layout.segment(self._segment).stat()
        same = (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
        if not same or not mine.st_nlink or mine.st_size != self._segment_bytes:
            raise OSError(errno.ESTALE, "the live segment was removed, replaced or changed")
        self._lock.check()

    # -- segments and derived files --------------------------------------------------------------

    def _roll(self) -> None:
        """Open the segment that the next record belongs to; its name is durable before use."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        index = self._edge.size // SEGMENT
        if index and self._edge.size % SEGMENT == 0:
            self._seal_segment(index - 1)
        path = self.layout.segment(index)
        self._fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._segment, self._segment_bytes = index, os.fstat(self._fd).st_size
        self._disk.fsync(self._fd)
        self._disk.sync_folder(path.parent)

    def _seal_segment(self, index: int) -> None:
        """Keep the tree at a segment's end, so that opening need not hash it again.

        Its head and its tiles are durable before the next segment exists: what a crash can leave
        undone lies in the last segment only.
        """
        head = self.head
        if head is None or head.size != (index + 1) * SEGMENT:
            raise OSError(errno.EIO, "no signed head at the segment's end")
        for name in sorted(self._unsynced):
            fd = self._disk.open(self.layout.tiles / name, os.O_RDONLY)
            try:
                self._disk.fsync(fd)
            finally:
                os.close(fd)
        self._unsynced.clear()
        content = frontier_content(self._segments, self._prev, self.intents, self._rotations, head)
        self._disk.put(self.layout.frontier(index), content)

    def publish(self) -> None:
        """Write the partial tiles and the checkpoint; derived, so without a flush."""
        if self.head is None:
            return
        partial = self._tiles.partial()
        for name, content in partial:
            self._write_tile(name, content)
        self._disk.put(self.layout.checkpoint, self.head.note.encode(), durable=False)
        names = [name for name, _ in partial]
        for name in set(self._published) - set(names):
            with contextlib.suppress(OSError):
                (self.layout.tiles / name).unlink()
                (self.layout.tiles / name).parent.rmdir()
        self._published, self.unpublished = names, False

    def put_tile_if_other(self, name: str, content: bytes) -> None:
        """Write a full tile unless it is there with this content."""
        path = self.layout.tiles / name
        if not path.is_file() or path.read_bytes() != content:
            self._put_tile(name, content)

    def _put_tile(self, name: str, content: bytes) -> None:
        self._write_tile(name, content)
        self._unsynced.add(name)

    def _write_tile(self, name: str, content: bytes) -> None:
        path = self.layout.tiles / name
        self._disk.make_folder(path.parent, durable=False)
        self._disk.put(path, content, durable=False)


def _remove_tree(path: Path) -> None:
    for below in sorted(path.rglob("*"), reverse=True):
        below.rmdir() if below.is_dir() and not below.is_symlink() else below.unlink()
    path.rmdir()
