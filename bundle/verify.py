"""Verification on the secured side: steps 0 to 8, each before the next believes anything.

`open_bundle` decides from the head alone whether a release may be looked at (steps 1 to 5).
`SealedBundle.verify_body` streams the body once, hashes every chunk and compares every header (6).
`verify_contents` holds the documents inside against the files (7) and runs the strict parsers (8).
Nothing here writes; FORMAT.md section 11.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from bundle import archive, merkle
from bundle.archive import Head, Layout, Progress
from bundle.envelope import parse_envelope
from bundle.fields import format_time
from bundle.manifest import SUMS, FileEntry, Manifest, parse_manifest
from bundle.scan import ScanReport, scan_payload
from bundle.scan.bom import PATH as BOM
from bundle.statement import VerifiedSeal, require_matches, verify_seal
from bundle.trust import Trust, follow_chain
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

MAX_WORKERS = 8
SMALL_FILE = 64 * 1024 * 1024


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

    def find(self, index: int, buffer: memoryview) -> bool:
        """Fill `buffer` with a chunk that an earlier run left; it is hashed again. Any thread."""

    def put(self, index: int, chunk: memoryview) -> None:
        """Take a chunk that has been verified; in order, from one thread."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found; every field is proved by the seal or counted here."""

    path: Path
    digest: Digest
    manifest: Manifest
    seal: VerifiedSeal
    trust: Trust
    scan: ScanReport

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
            "keyids": list(self.seal.keyids),
            "trust": {
                "version": self.trust.version,
                "fingerprint": str(self.trust.fingerprint),
                "needed": self.trust.document.thresholds.seal.people,
            },
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
            "scan": {
                "files": len(self.scan.files),
                "findings": [{"path": f.path, "text": f.text} for f in self.scan.findings],
            },
        }


class SealedBundle:
    """A bundle whose seal, manifest, times and tree hold; its body is still to be read.

    Holds the open file: a file that is renamed over the path meanwhile is not looked at.
    """

    def __init__(
        self, path: Path, stream: FileIO, head: Head, seal: VerifiedSeal, trust: Trust
    ) -> None:
        self.path = path
        self.head = head
        self.seal = seal
        self.trust = trust
        self.manifest = parse_manifest(head.manifest)
        require_matches(seal.statement, self.manifest, head.manifest)
        self.digest: Digest = Digest.of(head.manifest)
        self.leaves = archive.parse_leaves(head, self.manifest.body)
        self.layout: Layout = archive.plan(self.manifest)
        archive.require_length(head, self.manifest.body)
        self._stream = stream

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
        """Close the file; views taken from it stay readable until they are dropped."""
        self._stream.close()

    def read(self, path: str) -> bytes:
        """Return a listed small file, hashed again.

        Raises:
            RefusedError: `chunk.leaf`, the bytes changed on the medium; `archive.limit`, too large.
            KeyError: `path` is not listed.

        """
        entry = self._entry(path)
        if entry.size > SMALL_FILE:
            raise RefusedError("archive.limit", f"{path!r:.80} has {entry.size:,} bytes")
        raw = os.pread(self._stream.fileno(), entry.size, self.head.body_start + entry.offset)
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise RefusedError("chunk.leaf", f"{path!r:.80} is not the file of the manifest")
        return raw

    def view(self, path: str) -> memoryview:
        """Return a listed file of any size, mapped from the bundle; KeyError if not listed."""
        entry = self._entry(path)
        start = self.head.body_start + entry.offset
        return self._mapped[start : start + entry.size]

    def verify_body(
        self,
        sink: Sink | None = None,
        progress: Progress | None = None,
        *,
        workers: int | None = None,
    ) -> None:
        """Read every chunk once, compare it with its leaf, and compare all headers and padding.

        Memory is bounded by a few chunks. A bad chunk never reaches the sink.

        Raises:
            RefusedError: `chunk.leaf`, `archive.*`.
            FaultError: `host.io`.

        """
        body = self.manifest.body
        count = workers or min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        buffers = deque(bytearray(min(body.chunk_size, body.size)) for _ in range(count + 2))
        pending: deque[Future[tuple[int, bytearray, memoryview, bool]]] = deque()
        pool = ThreadPoolExecutor(count, thread_name_prefix="verify")
        try:
            for index in range(len(self.leaves)):
                if not buffers:
                    buffers.append(self._settle(pending.popleft(), sink, progress))
                pending.append(pool.submit(self._chunk, index, buffers.popleft(), sink))
            while pending:
                self._settle(pending.popleft(), sink, progress)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    @cached_property
    def _mapped(self) -> memoryview:
        return memoryview(mmap.mmap(self._stream.fileno(), 0, prot=mmap.PROT_READ))

    def _entry(self, path: str) -> FileEntry:
        entry = self.manifest.find(path)
        if entry is None:
            raise KeyError(path)
        return entry

    def _chunk(
        self, index: int, buffer: bytearray, sink: Sink | None
    ) -> tuple[int, bytearray, memoryview, bool]:
        """Fetch and hash one chunk; the flag tells whether the sink holds it already."""
        body = self.manifest.body
        start = index * body.chunk_size
        chunk = memoryview(buffer)[: min(body.chunk_size, body.size - start)]
        h = archive.hash_function(body)
        if (
            sink is not None
            and sink.find(index, chunk)
            and merkle.leaf_hash(chunk, h) == self.leaves[index]
        ):
            return index, buffer, chunk, True
        self._fill(chunk, self.head.body_start + start)
        if merkle.leaf_hash(chunk, h) != self.leaves[index]:
            raise self._bad_chunk(index, start, start + len(chunk))
        return index, buffer, chunk, False

    def _settle(
        self,
        future: Future[tuple[int, bytearray, memoryview, bool]],
        sink: Sink | None,
        progress: Progress | None,
    ) -> bytearray:
        index, buffer, chunk, held = future.result()
        start = index * self.manifest.body.chunk_size
        archive.require_gaps(self.layout, chunk, start)
        if sink is not None and not held:
            sink.put(index, chunk)
        if progress is not None:
            progress(start + len(chunk), self.manifest.body.size)
        return buffer

    def _fill(self, chunk: memoryview, offset: int) -> None:
        filled = 0
        while filled < len(chunk):
            try:
                count = os.preadv(self._stream.fileno(), [chunk[filled:]], offset + filled)
            except OSError as error:
                raise FaultError(
                    "host.io",
                    f"{self.path} cannot be read at byte {offset + filled:,}: {error.strerror}",
                    hint="clean or replace the medium",
                ) from error
            if not count:
                raise RefusedError(
                    "archive.truncated", f"the file ends at byte {offset + filled:,} now"
                )
            filled += count

    def _bad_chunk(self, index: int, start: int, end: int) -> RefusedError:
        files = [self.layout.files[item[0]][0] for item in self.layout.spans(start, end)]
        inside = f", in {', '.join(files[:3])}" if files else ""
        return RefusedError(
            "chunk.leaf",
            f"chunk {index} (bytes {self.head.body_start + start:,} to "
            f"{self.head.body_start + end - 1:,} of the file{inside:.300}) is not the sealed one",
            hint="copy the bundle again; if it stays, the medium or the source is damaged",
        )


def open_bundle(
    path: Path, trust: Trust, *, now: datetime, floors: Floors | None = None
) -> SealedBundle:
    """Open a bundle and verify its head: steps 0 to 5. The body is not read.

    Args:
        path: Of the `.agb` file.
        trust: Of this host; nothing in the bundle can replace it.
        now: UTC, from the caller's clock.
        floors: What this host remembers.

    Raises:
        RefusedError: `trust.*`, `archive.*`, `seal.*`, `manifest.*`, `chunk.root`, `delta.base`.
        FaultError: `host.io`.

    """
    floors = floors or Floors()
    _require_clock(now, trust, floors)
    stream = archive.open_file(path)
    try:
        head = archive.read_head(stream)
        newest = follow_chain(trust, head.trust)
        _require_root_in_force(newest, now)
        seal = verify_seal(parse_envelope(head.envelope), newest.document)
        _require_subject(seal, head.manifest)
        sealed = SealedBundle(path, stream, head, seal, newest)
        _require_fresh(sealed, now, floors)
    except BaseException:
        stream.close()
        raise
    return sealed


def verify_bundle(
    path: Path,
    trust: Trust,
    *,
    now: datetime,
    floors: Floors | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Run steps 0 to 8 and write nothing; refusals as the steps say."""
    with open_bundle(path, trust, now=now, floors=floors) as sealed:
        sealed.verify_body(progress=progress)
        scan = verify_contents(sealed.manifest, sealed.view)
        return VerifyReport(path, sealed.digest, sealed.manifest, sealed.seal, sealed.trust, scan)


def verify_contents(manifest: Manifest, view: Callable[[str], memoryview]) -> ScanReport:
    """Hold the documents of a release against its files, and run every strict parser.

    Args:
        manifest: Verified.
        view: Gives the bytes of a listed file: from the bundle, or from a quarantine.

    Raises:
        RefusedError: `manifest.layout`, `bom.mismatch`, `scan.*`.

    """
    wanted = archive.sums_text([(e.path, e.sha256) for e in manifest.files if e.path != SUMS])
    if bytes(view(SUMS)) != wanted:
        raise RefusedError("manifest.layout", f"{SUMS} and the manifest list different files")
    if manifest.find(BOM) is None:
        raise RefusedError("bom.mismatch", f"the release lists no {BOM}")
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


def _require_subject(seal: VerifiedSeal, manifest: bytes) -> None:
    expected, found = seal.statement.subject[0].digest.sha256, Digest.of(manifest).hex
    if expected != found:
        raise RefusedError(
            "seal.subject", f"the seal is that of manifest {expected}, the bundle carries {found}"
        )


def _require_fresh(sealed: SealedBundle, now: datetime, floors: Floors) -> None:
    manifest = sealed.manifest
    if manifest.base is not None:
        raise RefusedError(
            "delta.base", "this is a delta; the release that it builds on is missing"
        )
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
    if manifest.epoch < epoch or (manifest.epoch == epoch and digest != sealed.digest):
        raise RefusedError(
            "trust.epoch",
            f"{manifest.bundle_id}: this host has seen epoch {epoch} ({digest}); "
            f"the bundle has epoch {manifest.epoch} ({sealed.digest})",
            hint="a release of a higher epoch is accepted",
        )
