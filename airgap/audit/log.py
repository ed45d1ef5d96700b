"""The writer of the log: one thread, one durability point, acknowledge last.

It obeys docs/design/audit.md, 4. `AuditLog.append` returns a receipt once the record is on disk,
read back, and covered by a signed head. Any fault on the way halts the log for the life of the
process: it never retries a flush and never acknowledges again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import cryptography

from airgap.audit.checkpoint import (
    Head,
    LogKey,
    create_log_key,
    load_log_key,
    sign_checkpoint,
    site_name,
)
from airgap.audit.disk import Disk
from airgap.audit.layout import Layout, journal_line
from airgap.audit.receipt import Receipt
from airgap.audit.record import (
    FIRST_PREV,
    MAX_LINE,
    Event,
    citations,
    encode,
    new_ulid,
    timestamp,
)
from airgap.audit.recovery import (
    OpenIntents,
    Recovered,
    frontier_content,
    note_intent,
    recover,
)
from airgap.audit.tiles import SEGMENT, Edge, Node, Tiles, inclusion_path, remove_partial
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

MAX_BATCH: Final = 512
MAX_OBJECT: Final = 1 << 22
RESERVE: Final = 64 << 20
PATIENCE_S: Final = 10.0
HEARTBEAT_RECORDS: Final = 1_000
HEARTBEAT_S: Final = 60.0
PUBLISH_S: Final = 1.0
CLOCK_STEP_MS: Final = 1_000
_LOCK_BYTES: Final = 256
_OWNED_BYTES: Final = 640  # at most what the owner adds to a caller's fields
# What a log with only its reserve left still takes.
_DRAIN: Final = frozenset(
    {"boot", "recovery", "shutdown", "halt", "clock.step", "export", "prune", "verify.result"}
)


class State(Enum):
    """What the log admits; HALTED lasts as long as the process."""

    OPENING = "opening"
    RUNNING = "running"
    DRAIN = "drain"
    HALTED = "halted"
    CLOSED = "closed"


class Clock:
    """Wall clock, monotonic clock and boot of this machine."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970, UTC; may jump, orders nothing."""
        return time.time_ns()

    def mono_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds."""
        return time.monotonic_ns()

    def boot_id(self) -> str:
        """The kernel's id of this boot."""
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a socket, as the kernel names it (SO_PEERCRED)."""

    uid: int
    pid: int


@dataclass(slots=True)
class _Pending:
    """One record on its way. `done` is locked until the writer has decided."""

    fields: dict[str, Any]
    done: threading.Lock | None = None  # none for the owner's own records: nobody waits
    seq: int = -1
    leaf: bytes = b""
    batch: _Batch | None = None
    error: AirgapError | None = None

    def answer(self, *, batch: _Batch | None = None, error: AirgapError | None = None) -> None:
        """Tell the waiting caller, once."""
        if self.batch is None and self.error is None:
            self.batch, self.error = batch, error
            if self.done is not None:
                self.done.release()


@dataclass(frozen=True, slots=True)
class _Batch:
    """What receipts of one commit share."""

    head: Head
    nodes: dict[Node, bytes]


class AuditLog:
    """The log of one host, held by one process. Use `open`, or `open_log` for the usual places."""

    def __init__(
        self,
        layout: Layout,
        key: LogKey,
        *,
        host: str,
        mode: str,
        clock: Clock,
        disk: Disk,
        reserve_bytes: int,
        patience_s: float,
    ) -> None:
        self.state = State.OPENING
        self.origin = key.vkey.name
        self.vkey = str(key.vkey)
        self.halted_by = ""
        self._layout, self._key, self._host, self._mode = layout, key, host, mode
        self._clock, self._disk = clock, disk
        self._reserve_bytes, self._patience_s = reserve_bytes, patience_s
        self._boot, self._inst = clock.boot_id(), new_ulid(clock.wall_ns())
        self._uid = os.getuid()
        self._lock_fd = self._fd = self._journal_fd = -1
        self._segment = -1
        self._segment_bytes = 0
        self._edge, self._prev = Edge(), FIRST_PREV
        self._head: Head | None = None
        self._segments: list[bytes] = []
        self._tiles = Tiles(self._put_tile)
        self._intents: OpenIntents = {}  # open for callers, what waits in a batch included
        self._on_disk: OpenIntents = {}  # open in the records under the newest head
        self._anchored = 0
        self._since_heartbeat = 0
        self._drift_ns = clock.wall_ns() - clock.mono_ns()
        self._published: list[str] = []
        self._unpublished = False
        self._unsynced: set[str] = set()  # full tiles of the live segment
        self._objects: set[str] = set()
        self._object_lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # -- for callers ---------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        key: Path,
        origin: str = "",
        host: str = "",
        mode: str = "embedded",
        clock: Clock | None = None,
        disk: Disk | None = None,
        create: bool = True,
        reserve_bytes: int = RESERVE,
        patience_s: float = PATIENCE_S,
    ) -> Self:
        """Lock the log in `folder`, check it against its signed heads, and take it into service.

        Args:
            folder: Holds `log/`; made when missing and `create` is set.
            key: The private log key of `create_log_key`.
            origin: What the log must be called; empty for the name in the key's vkey.
            host: Name of this machine for the records; empty for the kernel's.
            mode: `embedded` or `service`, as the boot record states it.
            clock: For tests.
            disk: For tests.
            create: Whether a missing log is started.
            reserve_bytes: Blocks to hold back for the records of a full disk.
            patience_s: How long `append` waits before it reports `audit.timeout`.

        Raises:
            RefusedError: `audit.locked`, `audit.history`, `audit.note`, `audit.key` or
                `audit.absent`.
            FaultError: `audit.key` when the key cannot be read.
            OSError: The disk failed or is full.

        """
        log_key = load_log_key(key)
        if origin and origin != log_key.vkey.name:
            raise RefusedError(
                "audit.key", f"the key belongs to {log_key.vkey.name!r:.90}, not {origin!r:.90}"
            )
        log = cls(
            Layout(folder.absolute()),
            log_key,
            host=_host_name(host or os.uname().nodename),
            mode=mode,
            clock=clock or Clock(),
            disk=disk or Disk(),
            reserve_bytes=reserve_bytes,
            patience_s=patience_s,
        )
        if not create and not log._layout.log.is_dir():
            raise RefusedError("audit.absent", f"no audit log in {folder}")
        try:
            log._take_into_service()
        except BaseException as error:
            if isinstance(error, OSError):
                log._halt(error)
            log._release()
            raise
        return log

    def append(self, event: Event, *, peer: Peer | None = None) -> Receipt:
        """Return the receipt once `event` is durable, read back and under a signed head.

        Args:
            event: What happened.
            peer: Who asked over the socket; without it the record says `auth: self`.

        Raises:
            RefusedError: `audit.order`, `audit.object`, `audit.record`; the log goes on.
            FaultError: `audit.halted`, `audit.full`, `audit.timeout`, `audit.closed`: deny the
                request. After a timeout the record may still appear.

        """
        waiting = threading.Lock()
        waiting.acquire()  # the writer releases it
        pending = self._submit(event, peer, waiting)
        if not waiting.acquire(timeout=self._patience_s):
            raise FaultError(
                "audit.timeout",
                f"no durable record within {self._patience_s:g} s",
                hint="the disk is stalled; nothing is admitted without a record",
            )
        if pending.error is not None:
            raise pending.error
        batch = pending.batch
        if batch is None:
            raise self._fault()
        path = inclusion_path(pending.seq, batch.head.size, batch.nodes.__getitem__)
        return Receipt(pending.seq, batch.head.size, pending.leaf, path, batch.head.note)

    def put_object(self, content: bytes) -> Digest:
        """Store a decision record or other evidence, durable before it returns, and name it.

        Raises:
            FaultError: `audit.halted` or `audit.closed`.
            OSError: The disk failed or is full; the log itself goes on.

        """
        if len(content) > MAX_OBJECT:
            raise RefusedError("audit.object", f"{len(content)} bytes; the limit is {MAX_OBJECT}")
        if self.state not in {State.RUNNING, State.DRAIN}:
            raise self._fault()
        digest = Digest.of(content)
        path = self._layout.object(digest.hex)
        with self._object_lock:
            if str(digest) not in self._objects:
                if not path.is_file() or path.read_bytes() != content:
                    self._disk.make_folder(path.parent)
                    self._disk.put(path, content)
                self._objects.add(str(digest))
        return digest

    @property
    def size(self) -> int:
        """Records under the newest signed head."""
        return 0 if self._head is None else self._head.size

    @property
    def head(self) -> str:
        """The newest signed note."""
        return "" if self._head is None else self._head.note

    @property
    def folder(self) -> Path:
        """The folder that holds `log/`."""
        return self._layout.folder

    @property
    def anchored(self) -> int:
        """The size that an outside head in `log/anchors` covered when the log was opened."""
        return self._anchored

    def close(self) -> None:
        """Write the shutdown record, publish checkpoint and tiles, and give the lock back."""
        if self._thread is not None:
            if self.state is not State.HALTED:
                self.state = State.CLOSED
            self._queue.put(None)
            self._thread.join()
            self._thread = None
            while not self._queue.empty():  # Came in after the door was closed.
                late = self._queue.get()
                if late is not None:
                    late.answer(error=self._fault())
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- opening -------------------------------------------------------------------------------

    def _take_into_service(self) -> None:
        layout, disk = self._layout, self._disk
        disk.make_folder(layout.folder)
        before = self._lock()
        unclean = before not in {"", "closed"}
        if layout.log.is_dir():
            self._reopen(before, unclean=unclean)
        else:
            self._create()
        self._keep_reserve()
        self._mark("open")
        if self.state is State.OPENING:
            self.state = State.RUNNING
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    def _create(self) -> None:
        """Start a log beside and rename it into place once its first head is durable.

        So a folder `log` without any signed head is never the debris of a crash.
        """
        layout, disk = self._layout, self._disk
        new = Layout(layout.folder, "log.new")
        if new.log.is_dir():
            _remove_tree(new.log)
        self._layout = new
        for name in ("seg", "tile", "frontier", "objects", "anchors"):
            disk.make_folder(new.log / name)
        self._open_journal()
        self._commit([self._own("boot", data=self._boot_data())])
        self._publish()
        disk.fsync(self._journal_fd)
        disk.sync_folder(new.log)
        disk.rename(new.log, layout.log)
        disk.sync_folder(layout.folder)
        self._layout = layout

    def _reopen(self, before: str, *, unclean: bool) -> None:
        if unclean or self._free_bytes() < min(self._reserve_bytes, 1 << 20):
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(self._layout.reserve)
        recovered = recover(
            self._layout,
            self._key.vkey,
            self._disk,
            put_tile=self._put_tile_if_other,
            suspect=before.startswith("halted"),
        )
        self._adopt(recovered)
        self._open_journal()
        owned = [
            self._own(kind, "outcome", req=req, project=project, data={"result": "unknown"})
            for req, (kind, project) in self._on_disk.items()
        ]
        signed, found = recovered.head.size, recovered.found
        if unclean or recovered.torn or found != signed:
            owned += [
                self._own("recovery", data=data) for data in _recovery_data(recovered, before)
            ]
        owned.append(self._own("boot", data=self._boot_data()))
        self._commit_all(owned)
        self._publish()

    def _adopt(self, recovered: Recovered) -> None:
        self._edge, self._prev = recovered.edge, recovered.prev
        self._head, self._tiles = recovered.head, recovered.tiles
        self._segments, self._on_disk = recovered.segments, recovered.intents
        self._anchored = recovered.anchored
        self._tiles.put = self._put_tile
        remove_partial(self._layout.tiles)

    def _lock(self) -> str:
        """Take the lock and return how the last holder ended; refuse when somebody holds it."""
        path = self._layout.lock
        self._lock_fd = self._disk.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, since, *_ = [*self._lock_note(), "?", "?"]
            raise RefusedError(
                "audit.locked",
                f"process {pid} holds the audit log in {path.parent} since {since}",
                hint="wait for it to end, or use the service that it runs",
            ) from None
        note = self._lock_note()
        ended = note[2] if len(note) > 2 else ""  # noqa: PLR2004 - pid, time, how it ended
        self._mark(ended if ended.startswith("halted") else "open")
        return ended

    def _lock_note(self) -> list[str]:
        return os.pread(self._lock_fd, _LOCK_BYTES, 0).decode("ascii", "replace").split()

    def _mark(self, how: str) -> None:
        """Note in the lock file who holds it; in place, so that a full disk cannot stop it."""
        text = f"{os.getpid()} {timestamp(self._clock.wall_ns())} {how}"[: _LOCK_BYTES - 1]
        self._disk.pwrite(self._lock_fd, text.ljust(_LOCK_BYTES - 1).encode() + b"\n", 0)

    def _keep_reserve(self) -> None:
        """Hold blocks back; a log that cannot is drained, not used."""
        path = self._layout.reserve
        if not self._reserve_bytes or path.exists():
            return
        fd = self._disk.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            self._disk.allocate(fd, self._reserve_bytes)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            self._disk.unlink(path)
            self.state = State.DRAIN
        finally:
            os.close(fd)

    def _boot_data(self) -> dict[str, Any]:
        from cryptography.hazmat.backends.openssl import backend  # noqa: PLC0415 - only here

        data = {
            "crypto": f"cryptography {cryptography.__version__}, {backend.openssl_version_text()}",
            "mode": self._mode,
            "vkey": self.vkey,
        }
        return {key: value[:256] for key, value in data.items()}

    def _open_journal(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._journal_fd = self._disk.open(self._layout.journal, flags)

    # -- the writer ----------------------------------------------------------------------------

    def _submit(self, event: Event, peer: Peer | None, waiting: threading.Lock | None) -> _Pending:
        if self.state not in {State.RUNNING, State.DRAIN}:
            raise self._fault()
        if self.state is State.DRAIN and event.kind not in _DRAIN:
            raise FaultError(
                "audit.full",
                "only the reserve of the audit log is left",
                hint="export the log, then prune it or give it space",
            )
        if peer is None:
            fields = event.fields(uid=self._uid, auth="self")
        else:
            fields = event.fields(uid=peer.uid, auth="peercred", src=f"unix:pid={peer.pid}")
        for cited in citations(fields):
            if cited not in self._objects and not self._layout.object(cited[7:]).is_file():
                raise RefusedError(
                    "audit.object",
                    f"{event.kind} cites {cited}, which is not stored",
                    hint="call put_object before the record that cites it",
                )
        if len(encode(fields)) > MAX_LINE - _OWNED_BYTES:
            raise RefusedError("audit.record", f"{event.kind}: the record would be too long")
        pending = _Pending(fields, waiting)
        self._queue.put(pending)
        return pending

    def _run(self) -> None:
        """Take batches until told to stop; a fault rejects this one and all that follow."""
        last_commit = time.monotonic()
        running = True
        while running:
            batch, running = self._gather(PUBLISH_S if self._unpublished else HEARTBEAT_S)
            try:
                if self.state is not State.HALTED:
                    quiet = time.monotonic() - last_commit
                    self._serve(batch, stop=not running, quiet_s=quiet)
                    if batch or quiet >= HEARTBEAT_S:
                        last_commit = time.monotonic()
            except BaseException as error:  # noqa: BLE001 - whatever it was, nothing is admitted
                self._halt(error)
            for pending in batch:
                pending.answer(error=self._fault())

    def _gather(self, wait_s: float) -> tuple[list[_Pending], bool]:
        """Return what waits, at most `MAX_BATCH`, and whether to go on; no lingering."""
        batch: list[_Pending] = []
        try:
            item = self._queue.get(timeout=wait_s)
            while True:
                if item is None:
                    return batch, False
                batch.append(item)
                if len(batch) == MAX_BATCH:
                    break
                item = self._queue.get_nowait()
        except queue.Empty:
            pass
        return batch, True

    def _serve(self, batch: list[_Pending], *, stop: bool, quiet_s: float) -> None:
        work = [pending for pending in batch if self._in_order(pending)]
        beat = self._since_heartbeat + len(work) >= HEARTBEAT_RECORDS or quiet_s >= HEARTBEAT_S
        owned = self._clock_step()
        if beat and not stop:
            owned.append(self._own("heartbeat", data=self._heartbeat_data()))
        work = owned + work
        if stop:
            work.append(self._own("shutdown", data={"reason": "closed", "state": "running"}))
        self._commit_all(work)
        if stop or (not batch and self._unpublished):
            self._publish()
        if stop:
            self._disk.fsync(self._journal_fd)
            self._mark("closed")

    def _in_order(self, pending: _Pending) -> bool:
        """Whether intent, chunk and outcome come in that order; answers the caller if not."""
        fields = pending.fields
        phase, req = fields["phase"], fields.get("req", "")
        known = self._intents.get(req)
        if phase == "intent" and known is not None:
            wrong = f"{req} has an open intent"
        elif phase in {"chunk", "outcome"} and (known is None or known[0] != fields["kind"]):
            wrong = f"{req} has no open {fields['kind']} intent"
        else:
            note_intent(self._intents, fields)
            return True
        pending.answer(error=RefusedError("audit.order", wrong))
        return False

    def _own(self, kind: str, phase: str = "event", **given: Any) -> _Pending:
        """Return a record of the owner's own."""
        event = Event(kind=kind, phase=phase, **given)
        return _Pending(event.fields(uid=self._uid, auth="local"))

    def _clock_step(self) -> list[_Pending]:
        drift = self._clock.wall_ns() - self._clock.mono_ns()
        step_ms = (drift - self._drift_ns) // 1_000_000
        if abs(step_ms) < CLOCK_STEP_MS:
            return []
        self._drift_ns = drift
        return [self._own("clock.step", data={"drift_ms": step_ms})]

    def _heartbeat_data(self) -> dict[str, Any]:
        return {"anchored": self._anchored, "free": self._free_bytes()}

    def _commit_all(self, work: list[_Pending]) -> None:
        """Commit in batches, none of which crosses a segment's end."""
        while work:
            room = min(MAX_BATCH, SEGMENT - self._edge.size % SEGMENT)
            self._commit(work[:room])
            work = work[room:]

    def _commit(self, batch: list[_Pending]) -> None:
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
        head = sign_checkpoint(self._key, self._edge.size, self._edge.root())
        self._disk.write(self._journal_fd, journal_line(head.note))
        self._head = head
        shared = _Batch(head, nodes)
        for pending in batch:
            note_intent(self._on_disk, pending.fields)
            pending.answer(batch=shared)
        self._unpublished = True
        self._since_heartbeat += len(batch)
        if any(pending.fields["kind"] in {"heartbeat", "boot"} for pending in batch):
            self._since_heartbeat = 0

    def _chain(self, batch: list[_Pending]) -> list[bytes]:
        """Number, stamp and link the records of a batch; return their lines."""
        seq, prev = self._edge.size, self._prev
        owned: dict[str, Any] = {
            "v": 1,
            "boot": self._boot,
            "host": self._host,
            "inst": self._inst,
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

    def _advance(self, again: bytes, batch: list[_Pending]) -> dict[Node, bytes]:
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
        there = self._layout.segment(self._segment).stat()
        lock, lock_there = os.fstat(self._lock_fd), self._layout.lock.stat()
        same = (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
        if not same or not mine.st_nlink or mine.st_size != self._segment_bytes:
            raise OSError(errno.ESTALE, "the live segment was removed, replaced or changed")
        if (lock.st_dev, lock.st_ino) != (lock_there.st_dev, lock_there.st_ino):
            raise OSError(errno.ESTALE, "the lock file was removed or replaced")

    def _roll(self) -> None:
        """Open the segment that the next record belongs to; its name is durable before use."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        index = self._edge.size // SEGMENT
        if index and self._edge.size % SEGMENT == 0:
            self._seal_segment(index - 1)
        path = self._layout.segment(index)
        self._fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._segment, self._segment_bytes = index, os.fstat(self._fd).st_size
        self._disk.fsync(self._fd)
        self._disk.sync_folder(path.parent)

    def _seal_segment(self, index: int) -> None:
        """Keep the tree at a segment's end, so that opening need not hash it again.

        Its head and its tiles are durable before the next segment exists: what a crash can leave
        undone lies in the last segment only.
        """
        head = self._head
        if head is None or head.size != (index + 1) * SEGMENT:
            raise OSError(errno.EIO, "no signed head at the segment's end")
        for name in sorted(self._unsynced):
            fd = self._disk.open(self._layout.tiles / name, os.O_RDONLY)
            try:
                self._disk.fsync(fd)
            finally:
                os.close(fd)
        self._unsynced.clear()
        content = frontier_content(self._segments, self._prev, self._on_disk, head)
        self._disk.put(self._layout.frontier(index), content)

    def _publish(self) -> None:
        """Write the partial tiles and the checkpoint; derived, so without a flush."""
        if self._head is None:
            return
        partial = self._tiles.partial()
        for name, content in partial:
            self._write_tile(name, content)
        self._disk.put(self._layout.checkpoint, self._head.note.encode(), durable=False)
        names = [name for name, _ in partial]
        for name in set(self._published) - set(names):
            with contextlib.suppress(OSError):
                (self._layout.tiles / name).unlink()
                (self._layout.tiles / name).parent.rmdir()
        self._published, self._unpublished = names, False

    def _put_tile(self, name: str, content: bytes) -> None:
        self._write_tile(name, content)
        self._unsynced.add(name)

    def _write_tile(self, name: str, content: bytes) -> None:
        path = self._layout.tiles / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._disk.put(path, content, durable=False)

    def _put_tile_if_other(self, name: str, content: bytes) -> None:
        path = self._layout.tiles / name
        if not path.is_file() or path.read_bytes() != content:
            self._put_tile(name, content)

    def _halt(self, error: BaseException) -> None:
        self.state = State.HALTED
        name = errno.errorcode.get(getattr(error, "errno", 0) or 0, type(error).__name__)
        self.halted_by = f"{name}: {error}"[:200]
        with contextlib.suppress(OSError):
            self._mark(f"halted:{name}")

    def _fault(self) -> FaultError:
        if self.state is State.CLOSED:
            return FaultError("audit.closed", "the audit log is closed")
        return FaultError(
            "audit.halted",
            f"the audit log admits nothing: {self.halted_by or self.state.value}",
            hint="mend the disk, then restart; nothing is admitted without a record",
        )

    def _free_bytes(self) -> int:
        found = os.statvfs(self._layout.folder)
        return found.f_bavail * found.f_frsize

    def _release(self) -> None:
        for name in ("_fd", "_journal_fd", "_lock_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


def open_log(root: Path, *, site: str, host: str = "", mode: str = "embedded") -> AuditLog:
    """Open the log of a tree (`audit/`, key in `keys/`), making both when they are missing.

    `site` is the institution's name; it becomes part of a new log's origin.

    Raises:
        RefusedError: `audit.history`; this key has signed a log, and the log is gone.
        FaultError: `audit.key`; there is a log and no key.

    """
    key = root / "keys" / "audit.pem"
    # Beside the key and not beside the log: whoever empties `audit/` does not take it along.
    begun = key.with_suffix(".begun")
    if not key.exists():
        if (root / "audit" / "log").is_dir():
            raise FaultError(
                "audit.key",
                f"there is a log in {root / 'audit'} but no key at {key}",
                hint="bring the key back from its backup; a new key is a new log",
            )
        create_log_key(key, site=site_name(site))
    elif begun.exists() and not (root / "audit" / "log").is_dir():
        raise RefusedError(
            "audit.history",
            f"the key {key} has signed a log, and there is none in {root / 'audit'}",
            hint="bring the log back from its backup; for a new log move both keys/audit.* aside",
        )
    log = AuditLog.open(root / "audit", key=key, host=host, mode=mode)
    try:
        if not begun.exists():
            Disk().put(begun, b"")
    except BaseException:
        log.close()
        raise
    return log


def _host_name(text: str) -> str:
    name = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in text.lower())
    return name[:64] or "host"


def _recovery_data(recovered: Recovered, before: str) -> list[Mapping[str, Any]]:
    """Return the `data` of one recovery record for each quarantined piece, or of one alone."""
    common = {
        "signed": recovered.head.size,
        "found": recovered.found,
        "reason": f"the last writer ended: {before or 'unknown'}"[:256],
    }
    return [
        common | {"file": file, "bytes": size, "sha256": digest}
        for file, size, digest in recovered.torn
    ] or [common]


def _remove_tree(path: Path) -> None:
    for below in sorted(path.rglob("*"), reverse=True):
        below.rmdir() if below.is_dir() and not below.is_symlink() else below.unlink()
    path.rmdir()
