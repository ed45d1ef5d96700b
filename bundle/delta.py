"""Deltas: a sealed bundle without the bytes that the receiver has in an older release.

A delta is another form of the same sealed bundle: its head, and so its seal and its digest, are
those of the full bundle. `META/delta.json` says which runs of each file come from the base and
which travel along. It is unsigned and believed by nobody: the body is put together again, and each
chunk is held against its sealed leaf. FORMAT.md section 15.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, ValidationError

from bundle import archive, merkle
from bundle.archive import Progress
from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Count, DigestText, Document
from bundle.manifest import (
    CHUNK_SIZE,
    MANIFEST_LIMIT,
    MAX_FILES,
    Manifest,
    first_problem,
    parse_manifest,
)
from bundle.medium import Medium
from bundle.source import PlainFile, Source, read_exactly
from bundle.tar import Layout, read_document, require_layout
from bundle.write import fresh_file
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

DELTA = "META/delta.json"
NEW = "DELTA/new.bin"
FORMAT: Literal["airgap-delta/1"] = "airgap-delta/1"
DELTA_LIMIT = 16 * 1024 * 1024


class Run(Document):
    """Consecutive bytes of a file: from `base` at `offset`, or the next ones that travel along."""

    base: str | None = None
    offset: Count | None = None
    size: Count


class FileRuns(Document):
    """How one file is put together."""

    path: str
    runs: tuple[Run, ...] = ()


class DeltaFacts(Document):
    """`META/delta.json`: `base` and `result` are bundle digests, `new` the bytes that travel."""

    format: Literal["airgap-delta/1"] = FORMAT
    base: DigestText
    result: DigestText
    new: Count
    files: tuple[FileRuns, ...] = Field(max_length=MAX_FILES)

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))


class Base(Protocol):
    """The files of an older release, wherever they are."""

    @property
    def manifest(self) -> Manifest:
        """What it consists of; its digest is the one that was asked for."""

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from a listed file; errors as `Source.read_into`."""


FindBase = Callable[[Digest], Base | None]


class InstalledBase:
    """A release in the store, or any folder with the files of one.

    Raises:
        RefusedError: `manifest.*`; FaultError `host.io`.

    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        source = PlainFile(folder / "META" / "manifest.json")
        try:
            raw = read_exactly(source, 0, min(source.size, MANIFEST_LIMIT + 1))
        finally:
            source.close()
        self.manifest = parse_manifest(raw)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `Base`."""
        source = PlainFile(self._folder / path)
        try:
            source.read_into(offset, buffer)
        finally:
            source.close()


class BundleBase:
    """A release as it lies in a bundle; its chunks are not verified."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.manifest = parse_manifest(medium.head.manifest)
        medium.require_whole(self.manifest, self.manifest.digest)

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `Base`."""
        entry = self.manifest.find(path)
        if entry is None:
            raise RefusedError("delta.malformed", f"the base lists no {path!r:.80}")
        self.medium.read_into(entry.offset + offset, buffer)


class DeltaMedium(Medium):
    """A delta and its base: together, the body of the full bundle.

    Raises:
        RefusedError: `archive.*`, `delta.malformed`.

    """

    form = "delta"

    def __init__(self, source: Source, find_base: FindBase) -> None:
        super().__init__(source)
        raw = read_document(source, self.head.body_start, DELTA, DELTA_LIMIT)
        self.facts_of_delta = parse_delta(raw)
        layout = Layout([(DELTA, len(raw)), (NEW, self.facts_of_delta.new)])
        require_layout(source, self.head.body_start, layout)
        self._new = self.head.body_start + layout.offsets[1]
        self._search = find_base
        self._base: Base | None = None
        self._layout: Layout | None = None
        self._runs: list[tuple[tuple[Run, ...], list[int], list[int]]] = []

    def require_whole(self, manifest: Manifest, digest: Digest) -> None:
        """Find the base and check that the runs give the listed files; see `Medium`."""
        facts = self.facts_of_delta
        named = None if manifest.base is None else manifest.base.manifest_digest
        if facts.result != str(digest) or facts.base != named:
            raise RefusedError(
                "delta.base",
                f"the delta builds {facts.result} on {facts.base}; sealed is {digest} on {named}",
                hint="ask the staging host for a delta of this release, or a full bundle",
            )
        try:
            base = self._search(Digest.parse(facts.base))
        except AirgapError as error:
            raise RefusedError(
                "delta.base",
                f"the base {facts.base} is damaged: {error.message}",
                hint="install the base again from its medium, or bring a full bundle",
            ) from error
        if base is None or str(base.manifest.digest) != facts.base:
            raise RefusedError(
                "delta.base",
                f"this is a delta on {facts.base}, which is not here",
                hint="install that release first, or ask the staging host for a full bundle",
            )
        self._layout = archive.plan(manifest)
        self._runs = _index(facts, manifest, base.manifest)
        self._base = base

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Put the body together: headers from the layout, runs from base and delta."""
        layout = self._layout
        if layout is None:
            raise FaultError("host.internal", "the base of a delta is read before it was found")
        end = offset + len(buffer)
        for at, gap, _ in layout.gaps(offset, end):
            low, high = max(at, offset), min(at + len(gap), end)
            buffer[low - offset : high - offset] = gap[low - at : high - at]
        for number, within, low, high in layout.spans(offset, end):
            self._read_file(number, within, buffer[low - offset : high - offset])

    def map(self) -> memoryview | None:
        """Return nothing: the body lies in two places."""
        return None

    def where(self, start: int, end: int) -> str:
        """Name the bytes of the full bundle."""
        base = self.head.body_start
        return f"bytes {base + start:,} to {base + end - 1:,} of the full bundle"

    def find_cause(self, start: int, end: int) -> RefusedError | None:
        """Tell whether a file of the base is not what the base's manifest lists."""
        if self._layout is None or self._base is None:
            return None
        for number, within, low, high in self._layout.spans(start, end):
            for run, _, _, _ in self._pieces(number, within, high - low):
                entry = self._base.manifest.find(run.base) if run.base is not None else None
                if entry is not None and not _is_intact(self._base, entry.path, entry.size):
                    return RefusedError(
                        "delta.base",
                        f"{entry.path!r:.160} of the base {self.facts_of_delta.base} is damaged",
                        hint="install the base again from its medium, or bring a full bundle",
                    )
        return None

    def find_base(self) -> Manifest | None:
        """Return the manifest of the base."""
        return None if self._base is None else self._base.manifest

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the form."""
        facts = self.facts_of_delta
        return {**super().facts(), "base": facts.base, "new_bytes": facts.new}

    def _read_file(self, number: int, within: int, buffer: memoryview) -> None:
        for run, inside, low, high in self._pieces(number, within, len(buffer)):
            part = buffer[low:high]
            if run.base is None or run.offset is None or self._base is None:
                self.source.read_into(self._new + inside, part)
            else:
                try:
                    self._base.read_into(run.base, run.offset + inside, part)
                except AirgapError as error:
                    raise RefusedError(
                        "delta.base",
                        f"{run.base!r:.160} of the base cannot be read: {error.message}",
                        hint="install the base again from its medium, or bring a full bundle",
                    ) from error

    def _pieces(self, number: int, within: int, length: int) -> Iterator[tuple[Run, int, int, int]]:
        """Yield run, place inside it (of new bytes: inside them all), start and end in `length`."""
        runs, starts, news = self._runs[number]
        index, done = bisect_right(starts, within) - 1, 0
        while done < length:
            run = runs[index]
            skip = within + done - starts[index]
            size = min(run.size - skip, length - done)
            yield run, (skip if run.base is not None else news[index] + skip), done, done + size
            done, index = done + size, index + 1


def write_delta(new: Medium, base: Base, out: Path, progress: Progress | None = None) -> DeltaFacts:
    """Write the delta from `base` to the sealed bundle `new`, which names it as its base.

    Args:
        new: The full bundle; its seal is not judged here.
        base: The older release.
        out: Replaced if it exists.
        progress: Told bytes of files compared and then of chunks checked, out of one total.

    Raises:
        RefusedError: `delta.base`, the bundle was not built to succeed this release; `chunk.leaf`.
        FaultError: `host.*`.

    """
    manifest = parse_manifest(new.head.manifest)
    new.require_whole(manifest, manifest.digest)
    found = base.manifest.digest
    if manifest.base is None or manifest.base.manifest_digest != str(found):
        named = "none" if manifest.base is None else manifest.base.manifest_digest
        raise RefusedError(
            "delta.base",
            f"the bundle names {named} as its base, not {found}",
            hint="build it with --base and the older bundle",
        )
    half = sum(entry.size for entry in manifest.files)
    total = half + manifest.body.size
    files, parts = _compare(new, manifest, base, _scaled(progress, 0, total))
    facts = DeltaFacts(
        base=str(found),
        result=str(manifest.digest),
        new=sum(size for _, size in parts),
        files=tuple(files),
    )
    raw = facts.to_bytes()
    if len(raw) > DELTA_LIMIT:
        raise RefusedError("archive.limit", f"{DELTA} would have {len(raw):,} bytes")
    layout = Layout([(DELTA, len(raw)), (NEW, facts.new)])
    head = read_exactly(new.source, 0, new.head.body_start)
    with fresh_file(out, len(head) + layout.size) as stream:
        stream.write(head + layout.gap(0) + raw + layout.gap(1))
        buffer = memoryview(bytearray(CHUNK_SIZE))
        for offset, size in parts:
            for at in range(0, size, CHUNK_SIZE):
                piece = buffer[: min(CHUNK_SIZE, size - at)]
                new.read_into(offset + at, piece)
                stream.write(piece)
        stream.write(layout.gap(2))
        stream.flush()
        made = DeltaMedium(PlainFile(Path(stream.name)), lambda _: base)
        try:
            made.require_whole(manifest, manifest.digest)
            require_chunks(made, manifest, _scaled(progress, half, total))
        finally:
            made.close()
    return facts


def require_chunks(medium: Medium, manifest: Manifest, progress: Progress | None = None) -> None:
    """Hold every chunk of an unsealed or sealed body against the list in its own head.

    Raises:
        RefusedError: `chunk.root`, `chunk.leaf`.

    """
    body = manifest.body
    h = archive.hash_function(body)
    buffer = memoryview(bytearray(CHUNK_SIZE))
    for index, leaf in enumerate(archive.parse_leaves(medium.head, body)):
        start = index * CHUNK_SIZE
        chunk = buffer[: min(CHUNK_SIZE, body.size - start)]
        medium.read_into(start, chunk)
        if merkle.leaf_hash(chunk, h) != leaf:
            place = medium.where(start, start + len(chunk))
            raise RefusedError("chunk.leaf", f"chunk {index} ({place}) is not the one of the tree")
        if progress is not None:
            progress(start + len(chunk), body.size)


def _compare(
    new: Medium, manifest: Manifest, base: Base, progress: Progress | None
) -> tuple[list[FileRuns], list[tuple[int, int]]]:
    """Return the runs of each file, and the spans of the body that must travel."""
    whole = {entry.checked: entry.path for entry in base.manifest.files if entry.size}
    blocks: dict[bytes, tuple[str, int]] | None = None
    files: list[FileRuns] = []
    parts: list[tuple[int, int]] = []
    buffer, done = memoryview(bytearray(CHUNK_SIZE)), 0
    for entry in manifest.files:
        runs: list[Run] = []
        if entry.size and entry.checked in whole:
            runs = [Run(base=whole[entry.checked], offset=0, size=entry.size)]
        else:
            blocks = _blocks_of(base) if blocks is None else blocks
            for at in range(0, entry.size, CHUNK_SIZE):
                piece = buffer[: min(CHUNK_SIZE, entry.size - at)]
                new.read_into(entry.offset + at, piece)
                known = blocks.get(hashlib.sha256(piece).digest())
                if known is None:
                    _append(runs, Run(size=len(piece)))
                    parts.append((entry.offset + at, len(piece)))
                else:
                    _append(runs, Run(base=known[0], offset=known[1], size=len(piece)))
        files.append(FileRuns(path=entry.path, runs=tuple(runs)))
        done += entry.size
        if progress is not None:
            progress(done, done)
    return files, parts


def _append(runs: list[Run], run: Run) -> None:
    """Add a run, or make the last one longer if it goes on where that ends."""
    last = runs[-1] if runs else None
    if last is not None and last.base == run.base:
        follows = run.offset is None or run.offset == (last.offset or 0) + last.size
        if follows:
            runs[-1] = last.model_copy(update={"size": last.size + run.size})
            return
    runs.append(run)


def _blocks_of(base: Base) -> dict[bytes, tuple[str, int]]:
    """Return where each block of the base's files lies, by its hash."""
    found: dict[bytes, tuple[str, int]] = {}
    buffer = memoryview(bytearray(CHUNK_SIZE))
    for entry in base.manifest.files:
        for at in range(0, entry.size, CHUNK_SIZE):
            piece = buffer[: min(CHUNK_SIZE, entry.size - at)]
            base.read_into(entry.path, at, piece)
            found.setdefault(hashlib.sha256(piece).digest(), (entry.path, at))
    return found


def _index(
    facts: DeltaFacts, manifest: Manifest, base: Manifest
) -> list[tuple[tuple[Run, ...], list[int], list[int]]]:
    """Check the runs against both manifests; return them with where each begins."""
    if [item.path for item in facts.files] != [entry.path for entry in manifest.files]:
        raise RefusedError("delta.malformed", f"{DELTA} lists other files than the manifest")
    new, found = 0, []
    for item, entry in zip(facts.files, manifest.files, strict=True):
        news = []
        for run in item.runs:
            source = None if run.base is None else base.find(run.base)
            known = run.base is None or (
                source is not None and (run.offset or 0) + run.size <= source.size
            )
            if not run.size or (run.base is None) != (run.offset is None) or not known:
                raise RefusedError(
                    "delta.malformed", f"{DELTA}: a run of {item.path!r:.80} lies in no base file"
                )
            news.append(new)
            new += run.size if run.base is None else 0
        starts = [0, *accumulate(run.size for run in item.runs)]
        if starts[-1] != entry.size:
            raise RefusedError(
                "delta.malformed", f"{DELTA}: the runs of {item.path!r:.80} give another size"
            )
        found.append((item.runs, starts[:-1], news))
    if new != facts.new:
        raise RefusedError(
            "delta.malformed", f"{DELTA} needs {new:,} bytes, there are {facts.new:,}"
        )
    return found


def _is_intact(base: Base, path: str, size: int) -> bool:
    """Hash a file of the base and compare it with the base's manifest."""
    entry = base.manifest.find(path)
    if entry is None:
        return False
    hasher = hashlib.new(entry.checked.algorithm)
    buffer = memoryview(bytearray(CHUNK_SIZE))
    try:
        for at in range(0, size, CHUNK_SIZE):
            piece = buffer[: min(CHUNK_SIZE, size - at)]
            base.read_into(path, at, piece)
            hasher.update(piece)
    except AirgapError:
        return False
    return hasher.hexdigest() == entry.checked.hex


def parse_delta(raw: bytes) -> DeltaFacts:
    """Turn the untrusted bytes of `META/delta.json` into facts: RefusedError `delta.malformed`."""
    parse_canonical(raw, code="delta.malformed", what=DELTA, limit=DELTA_LIMIT)
    try:
        facts = DeltaFacts.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError("delta.malformed", f"{DELTA}: {first_problem(error)}") from error
    if facts.to_bytes() != raw:
        raise RefusedError("delta.malformed", f"{DELTA} writes a field in another form")
    return facts


def _scaled(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)
