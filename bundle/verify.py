"""Verification on the secured side: steps 0 to 8, each before the next believes anything.

`open_bundle` decides from the head alone whether a release may be looked at (steps 1 to 5).
`SealedBundle.verify_body` streams the body once, hashes every chunk and compares every header (6).
`verify_contents` holds the documents inside against the files (7) and runs the strict parsers (8).
Nothing here writes; FORMAT.md section 11.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from bundle import archive, merkle
from bundle.archive import Progress
from bundle.envelope import Envelope, parse_seal
from bundle.evidence.summary import require_summary
from bundle.fields import format_time
from bundle.manifest import SUMS, FileEntry, Manifest, Parity, parse_manifest
from bundle.media import Help, open_medium
from bundle.medium import Medium
from bundle.revocation import require_unrevoked
from bundle.rollback import VerifiedRollback, verify_rollback
from bundle.scan import ScanReport, scan_payload
from bundle.scan.bom import PATH as BOM
from bundle.statement import VerifiedSeal, require_matches, require_subject, verify_seal
from bundle.tar import Layout, require_gaps
from bundle.trust import Trust, follow_chain, require_dated
from bundle.vectors import Vectors, read_vectors
from policy.errors import AirgapError, RefusedError
from policy.terms import Digest

MAX_WORKERS = 8
SMALL_FILE = 64 * 1024 * 1024
HEADER_LIMIT = 100 * 1024 * 1024  # of a safetensors file, the only weights that have a header


@dataclass(frozen=True, slots=True)
class Floors:
    """What this host remembers: no release and no clock may fall behind it.

    `clock` is the latest thing that has happened (last audit record, last installed `created`).
    `epochs` maps a line of releases to the highest epoch installed and its bundle digest.
    """

    clock: datetime | None = None
    epochs: Mapping[str, tuple[int, Digest]] = field(default_factory=dict)


class Sink(Protocol):
    """Where verified chunks go: the quarantine of an install."""

    def holds(self, index: int) -> bool:
        """Tell whether an earlier run seems to have left this chunk."""

    def find(self, index: int, buffer: memoryview) -> bool:
        """Fill `buffer` with a chunk that an earlier run left; it is hashed again. Any thread."""

    def put(self, index: int, chunk: memoryview) -> None:
        """Take a chunk that has been verified; in order, from one thread."""


class Ledger(Protocol):
    """What an interrupted verification of the very same files has seen."""

    def has(self, index: int) -> bool:
        """Tell whether this chunk held, its headers included."""

    def mark(self, index: int) -> None:
        """Remember that it does; from one thread."""


Remember = Callable[["SealedBundle"], AbstractContextManager[Ledger | None]]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found; every field is proved by the seal or counted here."""

    path: Path
    digest: Digest
    manifest: Manifest
    seal: VerifiedSeal
    trust: Trust
    scan: ScanReport
    medium: Mapping[str, Any] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    parity: tuple[tuple[Parity, Vectors], ...] = ()

    def as_document(self) -> dict[str, Any]:
        """Return the JSON form, `airgap/verify-report/1`."""
        manifest = self.manifest
        return {
            "format": "airgap/verify-report/1",
            "verdict": "sealed",
            "path": str(self.path),
            "bundle": str(self.digest),
            "bundle_id": manifest.bundle_id,
            "name": manifest.name,
            "version": manifest.version,
            "epoch": manifest.epoch,
            "created": format_time(manifest.created),
            "expires": format_time(manifest.expires),
            "profile": manifest.profile,
            "builder": self.seal.builder,
            "approvers": list(self.seal.approvers),
            "approvals": [
                each.model_dump(mode="json", exclude_none=True) for each in self.seal.approvals
            ],
            "keyids": list(self.seal.keyids),
            "trust": {
                "version": self.trust.version,
                "fingerprint": str(self.trust.fingerprint),
                "needed": self.trust.document.thresholds.seal.people,
                "revocations": None
                if self.trust.revocations is None
                else self.trust.revocations.version,
            },
            "alarms": list(self.alarms),
            "medium": dict(self.medium),
            "body": {"bytes": manifest.body.size, "chunks": manifest.body.leaves},
            "files": len(manifest.files),
            "models": [
                {
                    "id": model.id,
                    "source": model.source,
                    "revision": model.revision,
                    "provenance_level": model.provenance_level,
                    "licence": model.licence.spdx,
                    "supplier": model.supplier.legal_name,
                    "reference_model": model.reference_model,
                    "scientific_use": model.scientific_use,
                }
                for model in manifest.models
            ],
            "parity": [
                {
                    "model": claim.model,
                    "precision": claim.precision,
                    "provider": claim.provider,
                    "tolerance": claim.tolerance,
                    "vectors": len(vectors.vectors),
                    "measured": vectors.measured and vectors.measured.model_dump(mode="json"),
                }
                for claim, vectors in self.parity
            ],
            "scan": {
                "files": len(self.scan.files),
                "findings": [{"path": f.path, "text": f.text} for f in self.scan.findings],
            },
        }


class SealedBundle:
    """A bundle whose seal, manifest, times and tree hold; its body is still to be read.

    Holds the open file: a file that is renamed over the path meanwhile is not looked at.
    """

    def __init__(self, medium: Medium, seal: VerifiedSeal, trust: Trust) -> None:
        head = medium.head
        self.path = medium.path
        self.medium = medium
        self.head = head
        self.seal = seal
        self.trust = trust
        self.alarms: tuple[str, ...] = ()
        self.rollback: VerifiedRollback | None = None  # what let an older release through step 5
        self.manifest = parse_manifest(head.manifest)
        require_matches(seal.statement, self.manifest, head.manifest)
        self.digest: Digest = Digest.of(head.manifest)
        self.leaves = archive.parse_leaves(head, self.manifest.body)
        self.layout: Layout = archive.plan(self.manifest)
        medium.require_whole(self.manifest, self.digest)
        self._h = archive.hash_function(self.manifest.body)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def people(self) -> tuple[str, ...]:
        """The approvers whose signatures counted."""
        return self.seal.approvers

    def close(self) -> None:
        """Close all files; views taken from them stay readable until they are dropped."""
        self.medium.close()

    def read(self, path: str) -> bytes:
        """Return a listed small file, hashed again.

        Raises:
            RefusedError: `chunk.leaf`, the bytes changed on the medium; `archive.limit`, too large.
            KeyError: `path` is not listed.

        """
        entry = self._entry(path)
        if entry.size > SMALL_FILE:
            raise RefusedError("archive.limit", f"{path!r:.80} has {entry.size:,} bytes")
        buffer = bytearray(entry.size)
        self._read_span(entry, memoryview(buffer))
        return bytes(buffer)

    def view(self, path: str) -> memoryview:
        """Return a listed file of any size; KeyError if not listed.

        It is mapped where it lies. Where the body lies in no single file, small files are read and
        hashed again. Of larger weights only the header, where they have one, is filled in: the scan
        looks at no other byte of them.
        """
        entry = self._entry(path)
        body = self._mapped
        if body is not None:
            return body[entry.offset : entry.offset + entry.size]
        if entry.size <= SMALL_FILE:
            return memoryview(self.read(path))
        whole = memoryview(mmap.mmap(-1, entry.size))
        wanted = entry.size
        if entry.role == "external-data":
            self._read_span(entry, whole[:8])
            header = min(HEADER_LIMIT, int.from_bytes(whole[:8], "little"))
            wanted = 8 + header if path.endswith(".safetensors") else 8
        self._read_span(entry, whole[: min(wanted, entry.size)])
        return whole.toreadonly()

    def verify_body(
        self,
        sink: Sink | None = None,
        progress: Progress | None = None,
        *,
        ledger: Ledger | None = None,
        workers: int | None = None,
    ) -> None:
        """Read every chunk once, compare it with its leaf, and compare all headers and padding.

        Memory is bounded by a few chunks. A bad chunk never reaches the sink. What the ledger has
        is not read again.

        Raises:
            RefusedError: `chunk.leaf`, `archive.*`.
            FaultError: `host.io`.

        """
        body = self.manifest.body
        count = workers or min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        buffers = deque(bytearray(min(body.chunk_size, body.size)) for _ in range(count + 2))
        run = _Run(self, sink, progress, ledger)
        pool = ThreadPoolExecutor(count, thread_name_prefix="verify")
        try:
            for index in run.indices():
                if self._must_ask(index, sink):
                    buffers.extend(run.drain())  # a volume may be taken out of its drive now
                    self.medium.ask(index)
                if not buffers:
                    buffers.append(run.settle())
                run.pending.append(pool.submit(self._chunk, index, buffers.popleft(), sink))
            run.drain()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if run.absent:
            raise self.medium.absence(run.absent)

    @cached_property
    def _mapped(self) -> memoryview | None:
        return self.medium.map()

    def _entry(self, path: str) -> FileEntry:
        entry = self.manifest.find(path)
        if entry is None:
            raise KeyError(path)
        return entry

    def _read_span(self, entry: FileEntry, buffer: memoryview) -> None:
        """Fill `buffer` from the start of a file: at once if that gives the listed digest."""
        if len(buffer) == entry.size:
            with contextlib.suppress(AirgapError):  # it may be repaired, chunk by chunk
                self.medium.read_into(entry.offset, buffer)
                wanted = entry.checked
                if hashlib.new(wanted.algorithm, buffer).digest() == wanted.raw:
                    return
        size, filled = self.manifest.body.chunk_size, 0
        chunk = bytearray(min(size, self.manifest.body.size))
        while filled < len(buffer):
            index, within = divmod(entry.offset + filled, size)
            good = self._fetch(index, chunk)
            part = good[within : within + len(buffer) - filled]
            buffer[filled : filled + len(part)] = part
            filled += len(part)

    def _must_ask(self, index: int, sink: Sink | None) -> bool:
        """Tell whether a chunk lies on a volume that is not there, and nowhere else."""
        return self.medium.is_absent(index) and not (sink is not None and sink.holds(index))

    def _holds(self, index: int, chunk: memoryview) -> bool:
        return merkle.leaf_hash(chunk, self._h) == self.leaves[index]

    def _fetch(self, index: int, buffer: bytearray) -> memoryview:
        """Return one chunk of the body, verified, from the medium or what can repair it."""
        body = self.manifest.body
        start = index * body.chunk_size
        chunk = memoryview(buffer)[: min(body.chunk_size, body.size - start)]
        problem: AirgapError | None = None
        try:
            self.medium.read_into(start, chunk)
        except AirgapError as error:
            problem = error
        if problem is None and self._holds(index, chunk):
            return chunk
        if self.medium.repair(index, chunk, self._holds):
            if self._holds(index, chunk):
                return chunk
            problem = None  # the parity that should make up for it lies: that is the news
        raise problem or self._bad_chunk(index, start, start + len(chunk))

    def _chunk(self, index: int, buffer: bytearray, sink: Sink | None) -> _Chunk:
        """Fetch and hash one chunk, first from the sink if an earlier run left it there."""
        body = self.manifest.body
        chunk = memoryview(buffer)[: min(body.chunk_size, body.size - index * body.chunk_size)]
        if sink is not None and sink.find(index, chunk) and self._holds(index, chunk):
            return _Chunk(index, buffer, chunk, held=True)
        try:
            return _Chunk(index, buffer, self._fetch(index, buffer), held=False)
        except AirgapError as error:
            if error.code == "chunk.leaf" or not self.medium.is_absent(index):
                raise
            return _Chunk(index, buffer, None, held=False)

    def _bad_chunk(self, index: int, start: int, end: int) -> RefusedError:
        cause = self.medium.find_cause(start, end)
        if cause is not None:
            return cause
        files = [self.layout.files[item[0]][0] for item in self.layout.spans(start, end)]
        inside = f", in {', '.join(files[:3])}" if files else ""
        return RefusedError(
            "chunk.leaf",
            f"chunk {index} ({self.medium.where(start, end)}{inside:.300}) is not the sealed one",
            hint="copy the bundle again; if it stays, the medium or the source is damaged",
        )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk on its way; `bytes` is None when its volume is not there."""

    index: int
    buffer: bytearray
    bytes: memoryview | None
    held: bool  # the sink has it already


@dataclass(slots=True)
class _Run:
    """One reading of a body: the chunks that are under way, in their order."""

    sealed: SealedBundle
    sink: Sink | None
    progress: Progress | None
    ledger: Ledger | None
    pending: deque[Future[_Chunk]] = field(default_factory=deque)
    absent: list[int] = field(default_factory=list)

    def indices(self) -> Iterator[int]:
        """Yield the chunks to be read."""
        for index in range(len(self.sealed.leaves)):
            if self.ledger is None or not self.ledger.has(index):
                yield index

    def drain(self) -> list[bytearray]:
        """Wait for all that is under way; return the buffers."""
        return [self.settle() for _ in range(len(self.pending))]

    def settle(self) -> bytearray:
        """Wait for the oldest chunk, check its headers and hand it on; return its buffer."""
        done = self.pending.popleft().result()
        if done.bytes is None:
            self.absent.append(done.index)
            return done.buffer
        body = self.sealed.manifest.body
        start = done.index * body.chunk_size
        require_gaps(self.sealed.layout, done.bytes, start)
        if self.sink is not None and not done.held:
            self.sink.put(done.index, done.bytes)
        if self.ledger is not None:
            self.ledger.mark(done.index)
        if self.progress is not None:
            self.progress(start + len(done.bytes), body.size)
        return done.buffer


def open_bundle(
    path: Path,
    trust: Trust,
    *,
    now: datetime,
    floors: Floors | None = None,
    more: Help | None = None,
    rollback: Envelope | None = None,
) -> SealedBundle:
    """Open a bundle and verify its head: steps 0 to 5. The body is not read.

    Args:
        path: Of the `.agb` file, of a volume, or of the folder of a set.
        trust: Of this host; nothing in the bundle can replace it.
        now: UTC, from the caller's clock.
        floors: What this host remembers.
        more: What it takes to open volumes, deltas and encrypted files.
        rollback: The signed approval of a release below the high-water mark; used only for one.

    Raises:
        RefusedError: `trust.*`, `archive.*`, `seal.*`, `manifest.*`, `chunk.root`, `delta.base`.
        FaultError: `host.io`.

    """
    floors = floors or Floors()
    _require_clock(now, trust, floors)
    medium = open_medium(path, more)
    try:
        head = medium.head
        newest = follow_chain(trust, head.trust)
        require_dated(newest, now)
        _require_root_in_force(newest, now)
        alarms = newest.alarms(now)
        seal = verify_seal(parse_seal(head.envelope), newest.document, newest.revocations)
        require_subject(seal.statement, head.manifest)
        sealed = SealedBundle(medium, seal, newest)
        sealed.alarms = alarms
        require_unrevoked(newest.revocations, sealed.manifest, sealed.digest)
        base = medium.find_base()
        if base is not None:  # its bytes would be those of the result
            require_unrevoked(newest.revocations, base, base.digest)
        _require_fresh(sealed, now, floors, rollback)
    except BaseException:
        medium.close()
        raise
    return sealed


def verify_bundle(
    path: Path,
    trust: Trust,
    *,
    now: datetime,
    floors: Floors | None = None,
    more: Help | None = None,
    progress: Progress | None = None,
    remember: Remember | None = None,
    rollback: Envelope | None = None,
) -> VerifyReport:
    """Run steps 0 to 8 and write nothing; refusals as the steps say.

    `remember` gives what an interrupted run has seen; by default nothing is kept. `rollback` is as
    for `open_bundle`.
    """
    with open_bundle(path, trust, now=now, floors=floors, more=more, rollback=rollback) as sealed:
        with nullcontext() if remember is None else remember(sealed) as ledger:
            sealed.verify_body(progress=progress, ledger=ledger)
        scan = verify_contents(sealed.manifest, sealed.view)
        sealed.medium.check_spares()
        return VerifyReport(
            path,
            sealed.digest,
            sealed.manifest,
            sealed.seal,
            sealed.trust,
            scan,
            sealed.medium.facts(),
            sealed.alarms,
            read_vectors(sealed.manifest, sealed.view),
        )


def verify_contents(manifest: Manifest, view: Callable[[str], memoryview]) -> ScanReport:
    """Hold the documents of a release against its files, and run every strict parser.

    Args:
        manifest: Verified.
        view: Gives the bytes of a listed file: from the bundle, or from a quarantine.

    Raises:
        RefusedError: `manifest.layout`, `bom.mismatch`, `evidence.*`, `manifest.vectors`,
            `scan.*`.

    """
    wanted = archive.sums_text([(e.path, e.sha256) for e in manifest.files if e.path != SUMS])
    if bytes(view(SUMS)) != wanted:
        raise RefusedError("manifest.layout", f"{SUMS} and the manifest list different files")
    if manifest.find(BOM) is None:
        raise RefusedError("bom.mismatch", f"the release lists no {BOM}")
    require_summary(view, manifest)
    read_vectors(manifest, view)
    return scan_payload(view, manifest)


def _require_clock(now: datetime, trust: Trust, floors: Floors) -> None:
    floor = max(filter(None, [floors.clock, trust.document.issued]))
    if now < floor:
        raise RefusedError(
            "trust.clock",
            f"the clock of this host says {format_time(now)}, but {format_time(floor)} has been",
            hint="set the clock of this host, then run it again",
        )


def _require_root_in_force(trust: Trust, now: datetime) -> None:
    if now >= trust.document.expires:
        raise RefusedError(
            "trust.root",
            f"the trust root expired at {format_time(trust.document.expires)}",
            hint="carry a renewed root here, signed by the holders of the root keys",
        )


def _require_fresh(
    sealed: SealedBundle, now: datetime, floors: Floors, rollback: Envelope | None
) -> None:
    manifest = sealed.manifest
    if now < manifest.not_before:
        raise RefusedError(
            "trust.time", f"the release holds from {format_time(manifest.not_before)} on"
        )
    if now >= manifest.expires:
        raise RefusedError(
            "trust.expired",
            f"the release expired at {format_time(manifest.expires)}",
            hint="carry a newer release of the same line here",
        )
    epoch, digest = floors.epochs.get(manifest.bundle_id, (-1, sealed.digest))
    if manifest.epoch < epoch and rollback is not None:
        sealed.rollback = verify_rollback(
            rollback,
            sealed.trust,
            manifest,
            builder=sealed.seal.builder,
            mark=(epoch, digest),
            now=now,
        )
    elif manifest.epoch < epoch or (manifest.epoch == epoch and digest != sealed.digest):
        raise RefusedError(
            "trust.epoch",
            f"{manifest.bundle_id}: this host has seen epoch {epoch} ({digest}); "
            f"the bundle has epoch {manifest.epoch} ({sealed.digest})",
            hint="a release of a higher epoch is accepted; an older one only with a signed "
            "approval: airgap trust rollback-sign",
        )
