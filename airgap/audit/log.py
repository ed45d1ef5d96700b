"""The log of one host: who may append, when, and what a fault means (docs/design/audit.md, 4).

`AuditLog.append` returns a receipt once the record is on disk, read back, and covered by a signed
head. One thread owns the `writer`. Any fault on the way halts the log for the life of the process:
it never retries a flush and never acknowledges again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import cryptography
import structlog

from airgap.audit.capacity import RESERVE, Capacity, Health, LastExport, State
from airgap.audit.checkpoint import LogKey, Ring, Vkey
from airgap.audit.clock import Clock, Peer
from airgap.audit.disk import Disk, require_owner
from airgap.audit.epochs import KeyFiles
from airgap.audit.joining import Joiner
from airgap.audit.layout import Layout
from airgap.audit.lock import Lock
from airgap.audit.order import Order
from airgap.audit.payloads import PayloadKey
from airgap.audit.query import Denials
from airgap.audit.receipt import Receipt
from airgap.audit.record import (
    MAX_LINE,
    Actor,
    Commit,
    Event,
    Record,
    Value,
    commitment,
    encode,
)
from airgap.audit.recovery import Recovered, recover
from airgap.audit.store import MAX_OBJECT, Store
from airgap.audit.tiles import inclusion_path
from airgap.audit.token_key import TokenKey
from airgap.audit.writer import MAX_BATCH, Pending, Writer
from airgap.config import LOG_ACCOUNT
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

__all__ = ["MAX_BATCH", "MAX_OBJECT", "AuditLog", "Beginning", "Capacity", "Clock", "Peer", "State"]

PATIENCE_S: Final = 10.0
HEARTBEAT_RECORDS: Final = 1_000
HEARTBEAT_S: Final = 60.0
DRAIN_S: Final = 5.0  # how often a log that admits nothing looks whether it may again
PUBLISH_S: Final = 1.0
CLOCK_STEP_MS: Final = 1_000
_OWNED_BYTES: Final = 640  # at most what the owner adds to a caller's fields
# What a log with only its reserve left still takes, beside outcomes of what was begun before.
_DRAIN: Final = frozenset({
    "boot", "recovery", "shutdown", "halt", "clock.step", "heartbeat", "export", "prune",
    "verify.result", "import.cosign", "spill.purge", "key.rotate", "enclave.exit",
})  # fmt: skip

operator = structlog.get_logger("airgap.audit")


@dataclass(frozen=True, slots=True)
class Beginning:
    """What the first record of a log says beside the usual, and the object that it cites."""

    data: Mapping[str, Value]
    evidence: bytes


class AuditLog:
    """The log of one host, held by one process. Use `open`, or `open_log` for the usual places."""

    def __init__(
        self,
        layout: Layout,
        keys: KeyFiles,
        lock: Lock,
        *,
        host: str,
        mode: str,
        clock: Clock,
        disk: Disk,
        capacity: Capacity,
        payload_key: PayloadKey | None,
        patience_s: float,
    ) -> None:
        self.state = State.OPENING
        self.halted_by = ""
        self._layout, self._keys, self._mode = layout, keys, mode
        self._clock, self._disk = clock, disk
        self._patience_s, self._payload_key = patience_s, payload_key
        self._lock = lock
        key, self._following = keys.load(disk)
        self._writer = Writer(layout, key, lock=lock, disk=disk, clock=clock, host=host)
        self._uid = os.getuid()
        self._order = Order()
        self._health = Health(layout, capacity, disk)
        self._store = Store(layout, disk, self._health.add)
        self._denials = Denials(layout)
        self._joiner = Joiner()
        self._since_heartbeat = 0
        self._drift_ns = clock.wall_ns() - clock.mono_ns()
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
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
        capacity: Capacity | None = None,
        payload_key: PayloadKey | None = None,
        patience_s: float = PATIENCE_S,
        beginning: Beginning | None = None,
        account: str = LOG_ACCOUNT,
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
            capacity: Quota and export limits of the site; `reserve_bytes` is read from it then.
            payload_key: To whom payloads are sealed; without it none is kept.
            patience_s: How long `append` waits before it reports `audit.timeout`.
            beginning: What a new log's first record says of the one before; see `identity`.
            account: Whose log root may write as well as its own.

        Raises:
            RefusedError: `audit.owner`, `audit.locked`, `audit.history`, `audit.note`,
                `audit.epoch`, `audit.key` or `audit.absent`.
            FaultError: `audit.key` when the key cannot be read.
            OSError: The disk failed or is full.

        """
        layout, clock, disk = Layout(folder.absolute()), clock or Clock(), disk or Disk()
        if not create and not layout.log.is_dir():
            raise RefusedError("audit.absent", f"no audit log in {folder}")
        require_owner(layout.folder, key, account)
        disk.make_folder(layout.folder)
        lock = Lock(layout.lock, disk, clock)
        try:
            before = lock.take()
            log = cls(
                layout,
                KeyFiles(key),
                lock,
                host=_host_name(host or os.uname().nodename),
                mode=mode,
                clock=clock,
                disk=disk,
                capacity=capacity or Capacity(reserve_bytes=reserve_bytes),
                payload_key=payload_key,
                patience_s=patience_s,
            )
        except BaseException:
            lock.release()
            raise
        try:
            log._require_origin(origin)
            log._take_into_service(before, beginning)
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
        return self._wait(self._submit(event, peer, _locked()))

    def put_object(self, content: bytes) -> Digest:
        """Store a decision record or other evidence, durable before it returns, and name it.

        Raises:
            FaultError: `audit.halted` or `audit.closed`.
            OSError: The disk failed or is full; the log itself goes on.

        """
        self._require_writing()
        return self._store.put_object(content)

    def put_payload(self, blob: bytes) -> Digest:
        """Store an encrypted payload, as `payloads.seal` made it; as `put_object`."""
        self._require_writing()
        return self._store.put_payload(blob)

    def commit(self, payload: bytes, nonce: bytes, *, req: str, side: str) -> Commit:
        """Commit to a payload under 32 random bytes; where the site keeps payloads, seal it first.

        Args:
            payload: A prompt or an output; it goes into no record.
            nonce: See `record.commitment`.
            req: The request that it belongs to.
            side: `in` or `out`.

        """
        commit = commitment(payload, nonce)
        if self._payload_key is None:
            return commit
        blob = self._payload_key.seal(payload, nonce, origin=self.origin, req=req, side=side)
        return Commit(commit.commit, commit.bytes, str(self.put_payload(blob)))

    def denials(self, uid: int, since: str) -> Iterator[Record]:
        """Yield the denials of an account since a time, UTC text; see `query.Denials`."""
        yield from self._denials.of(uid, since)

    def rotate_key(self, actor: Actor, into: TokenKey | None = None) -> Vkey:
        """End the epoch of the log's key and return the key that signs from now on.

        The `key.rotate` record is the last of its epoch; its head bears both signatures. The old
        private key is gone when this returns. The next one is made where the present one is, or is
        `into`, a fresh one in a token.

        Raises:
            FaultError: As `append`; the next open finishes or forgets what was begun.

        """
        following = self._keys.prepare(self._writer.key, into)
        event = Event(
            "key.rotate",
            actor=actor,
            data={
                "use": "log",
                "next": str(following.vkey),
                "epoch": len(following.ring.keys) - 1,
            },
        )
        pending = self._submit(event, None, _locked(), following)
        self._wait(pending)
        self._keys.finish(following, self._disk)
        return following.vkey

    def note_anchor(self, size: int) -> None:
        """Take note that an outside head of this size came back and agrees."""
        self._health.note_anchor(size, self._now())

    def note_export(self, size: int) -> None:
        """Take note of a complete export up to `size`."""
        self._health.note_export(size, self._now())

    def note_freed(self) -> None:
        """Take note that files went: the space is counted again."""
        self._health.recount()

    @property
    def origin(self) -> str:
        """The log's name."""
        return self._writer.key.vkey.name

    @property
    def ring(self) -> Ring:
        """The verifier keys of all epochs so far."""
        return self._writer.key.ring

    @property
    def vkey(self) -> str:
        """The verifier key of the present epoch."""
        return str(self._writer.key.vkey)

    @property
    def size(self) -> int:
        """Records under the newest signed head."""
        return 0 if self._writer.head is None else self._writer.head.size

    @property
    def head(self) -> str:
        """The newest signed note."""
        return "" if self._writer.head is None else self._writer.head.note

    @property
    def folder(self) -> Path:
        """The folder that holds `log/`."""
        return self._layout.folder

    @property
    def anchored(self) -> int:
        """The largest size that an outside head in `log/anchors` covers."""
        return self._health.anchored

    @property
    def last_export(self) -> LastExport:
        """What the last complete export covered."""
        return self._health.exported

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

    def _require_origin(self, origin: str) -> None:
        if origin and origin != self.origin:
            raise RefusedError(
                "audit.key", f"the key belongs to {self.origin!r:.90}, not {origin!r:.90}"
            )

    def _take_into_service(self, before: str, beginning: Beginning | None) -> None:
        layout = self._layout
        if layout.log.is_dir():
            self._reopen(before, unclean=before not in {"", "closed"})
        else:
            self._keys.abandon()
            data = self._boot_data() | dict(beginning.data if beginning else {})
            objects = (beginning.evidence,) if beginning else ()
            self._writer.begin(self._own("boot", data=data), objects)
        reserved = self._health.begin(self._now())
        self._lock.mark("open")
        self.state = self._level()
        if self.state is not State.RUNNING and reserved:
            self._writer.commit_all(self._beat())
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    def _reopen(self, before: str, *, unclean: bool) -> None:
        if unclean or self._health.low():
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(self._layout.reserve)
        recovered = recover(
            self._layout,
            self._writer.key.ring,
            self._disk,
            following=self._following.vkey if self._following else None,
            put_tile=self._writer.put_tile_if_other,
            suspect=before.startswith("halted"),
        )
        self._health.note_anchor(recovered.anchored, recovered.anchored_at)
        self._writer.adopt(recovered)
        self._settle_keys(recovered)
        owned = [
            self._own(kind, "outcome", req=req, project=project, data={"result": "unknown"})
            for req, (kind, project) in self._writer.intents.items()
        ]
        signed, found = recovered.head.size, recovered.found
        if unclean or recovered.torn or found != signed:
            owned += [self._own("recovery", data=data) for data in recovered.report(before)]
        owned.append(self._own("boot", data=self._boot_data()))
        self._writer.commit_all(owned)
        self._writer.publish()

    def _settle_keys(self, recovered: Recovered) -> None:
        """Finish or forget a change of the key that a crash cut short."""
        key, following = self._writer.key, self._following
        newest = recovered.rotations[-1] if recovered.rotations else None
        if following is None:
            if newest is not None and newest.vkey.key_id != key.vkey.key_id:
                raise RefusedError(
                    "audit.epoch",
                    f"the log was handed over to key {newest.vkey.key_id.hex()}, "
                    f"this is {key.vkey.key_id.hex()}",
                    hint="bring the newest log key back from its backup",
                )
        elif newest is None or newest.vkey.key_id != following.vkey.key_id:
            self._keys.abandon()
        else:
            if recovered.head.size < newest.size:
                self._writer.sign_closing(newest.size, recovered.closing_root, following)
            self._writer.key = following
            self._keys.finish(following, self._disk)

    def _boot_data(self) -> dict[str, Any]:
        from cryptography.hazmat.backends.openssl import backend  # noqa: PLC0415 - only here

        data = {
            "crypto": f"cryptography {cryptography.__version__}, {backend.openssl_version_text()}",
            "mode": self._mode,
            "vkey": self.vkey,
        }
        return {key: value[:256] for key, value in data.items()}

    # -- the writer's thread ---------------------------------------------------------------------

    def _submit(
        self,
        event: Event,
        peer: Peer | None,
        waiting: threading.Lock | None,
        following: LogKey | None = None,
    ) -> Pending:
        if not self.state.writes:
            raise self._fault()
        late = event.phase in {"chunk", "outcome"}
        if self.state is State.DRAIN and event.kind not in _DRAIN and not late:
            raise FaultError(
                "audit.full",
                "the audit log admits nothing new: it is full, or its export is overdue",
                hint="export the log, then prune it or give it space",
            )
        if peer is None:
            fields = event.fields(uid=self._uid, auth="self")
        else:
            fields = event.fields(uid=peer.uid, auth="peercred", src=f"unix:pid={peer.pid}")
        self._store.require(event.kind, fields)
        if len(encode(fields)) > MAX_LINE - _OWNED_BYTES:
            raise RefusedError("audit.record", f"{event.kind}: the record would be too long")
        pending = Pending(fields, waiting, following)
        self._queue.put(pending)
        return pending

    def _wait(self, pending: Pending) -> Receipt:
        if pending.done is None or not pending.done.acquire(timeout=self._patience_s):
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

    def _run(self) -> None:
        """Take batches until told to stop; a fault rejects this one and all that follow."""
        last_commit = time.monotonic()
        running = True
        while running:
            soon = self._writer.unpublished or self._joiner.holds
            idle = DRAIN_S if self.state is State.DRAIN else HEARTBEAT_S
            batch, running = self._gather(PUBLISH_S if soon else idle)
            batch = self._joiner.take(batch, self._clock.mono_ns(), last=not running)
            try:
                if self.state is not State.HALTED:
                    quiet = time.monotonic() - last_commit
                    self._serve(batch, stop=not running, quiet_s=quiet)
                    if batch or quiet >= HEARTBEAT_S:
                        last_commit = time.monotonic()
            except BaseException as error:  # noqa: BLE001 - whatever it was, nothing is admitted
                self._halt(error)
            lost = [*batch, *self._joiner.release()] if self.state is State.HALTED else []
            for pending in lost:
                pending.answer(error=self._fault())

    def _gather(self, wait_s: float) -> tuple[list[Pending], bool]:
        """Return what waits, at most `MAX_BATCH`, and whether to go on; no lingering."""
        batch: list[Pending] = []
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

    def _serve(self, batch: list[Pending], *, stop: bool, quiet_s: float) -> None:
        work = [pending for pending in batch if self._in_order(pending)]
        beat = (
            self._since_heartbeat + len(work) >= HEARTBEAT_RECORDS
            or quiet_s >= HEARTBEAT_S
            or self._level() is not self.state
        )
        owned = self._clock_step()
        if beat and not stop:
            owned += self._beat()
        work = owned + work
        if stop:
            work.append(self._own("shutdown", data={"reason": "closed", "state": "running"}))
        self._since_heartbeat = 0 if beat else self._since_heartbeat + len(work)
        before = self._writer.written
        self._writer.commit_all(work)
        self._health.add(self._writer.written - before)
        if stop or (not batch and self._writer.unpublished):
            self._writer.publish()
        if stop:
            self._writer.sync_journal()
            self._lock.mark("closed")

    def _in_order(self, pending: Pending) -> bool:
        """Whether intent, chunk and outcome come in that order; answers the caller if not."""
        wrong = self._order.take(pending.fields)
        if not wrong:
            return True
        pending.answer(error=RefusedError("audit.order", wrong))
        return False

    def _own(self, kind: str, phase: str = "event", **given: Any) -> Pending:
        """Return a record of the owner's own."""
        event = Event(kind=kind, phase=phase, **given)
        return Pending(event.fields(uid=self._uid, auth="local"))

    def _clock_step(self) -> list[Pending]:
        drift = self._clock.wall_ns() - self._clock.mono_ns()
        step_ms = (drift - self._drift_ns) // 1_000_000
        if abs(step_ms) < CLOCK_STEP_MS:
            return []
        self._drift_ns = drift
        return [self._own("clock.step", data={"drift_ms": step_ms})]

    # -- how it stands -----------------------------------------------------------------------------

    def _beat(self) -> list[Pending]:
        """Return a heartbeat with what an auditor wants to see of the log's health."""
        level = self._level()
        if level is not self.state and self.state.writes:
            operator.warning("audit.capacity", state=level.value, before=self.state.value)
            self.state = level
        return [self._own("heartbeat", data=self._health.beat(self._now(), self.state))]

    def _level(self) -> State:
        """Return the state that space and export age ask for; a log that ended stays so."""
        if not self.state.writes and self.state is not State.OPENING:
            return self.state
        return self._health.state(self._now())

    def _now(self) -> int:
        return self._clock.wall_ns() // 10**9

    # -- faults ------------------------------------------------------------------------------------

    def _require_writing(self) -> None:
        if not self.state.writes:
            raise self._fault()

    def _halt(self, error: BaseException) -> None:
        self.state = State.HALTED
        name = errno.errorcode.get(getattr(error, "errno", 0) or 0, type(error).__name__)
        self.halted_by = f"{name}: {error}"[:200]
        operator.error("audit.halted", by=self.halted_by)
        with contextlib.suppress(OSError):
            self._lock.mark(f"halted:{name}")

    def _fault(self) -> FaultError:
        if self.state is State.CLOSED:
            return FaultError("audit.closed", "the audit log is closed")
        return FaultError(
            "audit.halted",
            f"the audit log admits nothing: {self.halted_by or self.state.value}",
            hint="mend the disk, then restart; nothing is admitted without a record",
        )

    def _release(self) -> None:
        self._writer.release()
        self._lock.release()


def _locked() -> threading.Lock:
    """Return a lock that the writer releases when it has decided."""
    waiting = threading.Lock()
    waiting.acquire()
    return waiting


def _host_name(text: str) -> str:
    name = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in text.lower())
    return name[:64] or "host"
