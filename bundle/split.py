"""Cutting a bundle into volumes, putting any form together again, and mending a set.

Every chunk is held against the list in the head before it is written: a bad source makes no set.
The seal is not judged here, so that a draft can be cut before all have signed. What a killed run
wrote is hashed, and stays where it holds. FORMAT.md section 14.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from bundle import archive, merkle, parity
from bundle.archive import Progress
from bundle.envelope import Envelope, parse_seal
from bundle.manifest import CHUNK_SIZE, Body, Manifest, parse_manifest
from bundle.medium import Medium, overwrite
from bundle.source import read_exactly
from bundle.tar import BLOCK
from bundle.volumes import MAX_COUNT, VolumeFacts, VolumeSet
from bundle.write import fresh_file, partial_of, require_space
from policy.errors import AirgapError, RefusedError, UsageError
from policy.terms import Digest


class Chunks:
    """The body of a medium, chunk by chunk, each held against the tree in its head."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.manifest: Manifest = parse_manifest(medium.head.manifest)
        self.digest = Digest.of(medium.head.manifest)
        self.body: Body = self.manifest.body
        self.leaves = archive.parse_leaves(medium.head, self.body)
        self.head = read_exactly(medium.source, 0, medium.head.body_start)
        medium.require_whole(self.manifest, self.digest)
        self._h = archive.hash_function(self.body)

    def holds(self, index: int, chunk: memoryview | bytes) -> bool:
        """Tell whether these are the bytes of chunk `index`."""
        return merkle.leaf_hash(chunk, self._h) == self.leaves[index]

    def read(self, index: int) -> bytes:
        """Return a chunk, repaired if it must be.

        Raises:
            RefusedError: `chunk.leaf`, or why it cannot be read.

        """
        start = index * CHUNK_SIZE
        buffer = bytearray(min(CHUNK_SIZE, self.body.size - start))
        view = memoryview(buffer)
        problem: AirgapError | None = None
        try:
            self.medium.read_into(start, view)
        except AirgapError as error:
            problem = error
        if problem is None and self.holds(index, view):
            return bytes(buffer)
        if self.medium.repair(index, view, self.holds) and self.holds(index, view):
            return bytes(buffer)
        end = start + len(buffer)
        raise (
            problem
            or self.medium.find_cause(start, end)
            or RefusedError(
                "chunk.leaf",
                f"chunk {index} ({self.medium.where(start, end)}) is not that of the tree",
            )
        )

    def leaf_of(self, chunk: bytes) -> bytes:
        """Return the leaf hash of a parity chunk."""
        return merkle.leaf_hash(chunk, self._h)


@dataclass(frozen=True, slots=True)
class Mended:
    """What a repair did: volumes written anew, and those whose envelope was made equal."""

    written: tuple[Path, ...]
    equalised: tuple[Path, ...]


def split(
    medium: Medium,
    folder: Path,
    *,
    volume_size: int,
    parity_count: int = 0,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write the volumes `NAME.agb.001`, ... into `folder`, the parity volumes last.

    Args:
        medium: The bundle.
        folder: Where they go; volumes of the same name are replaced.
        volume_size: The most bytes that a volume may have.
        parity_count: How many volumes may be lost without harm.
        progress: Told bytes of the body.

    Raises:
        UsageError: `usage.argument`; the size is too small, or there would be too many volumes.
        RefusedError: `chunk.leaf`; FaultError `host.*`.

    """
    chunks = Chunks(medium)
    facts = _plan(chunks, volume_size, parity_count)
    total = facts.count + facts.parity
    names = [folder / f"{medium.path.name}.{number:03}" for number in range(1, total + 1)]
    each = [facts.model_copy(update={"index": number}) for number in range(1, total + 1)]
    finished = {
        one.index
        for one, path in zip(each, names, strict=True)
        if not parity_count and _is_finished(path, one, chunks)
    }
    missing = [one for one in each if one.index not in finished]
    held = sum(_held(partial_of(path)) for path in names)
    needed = sum(len(chunks.head) + one.layout(chunks.body).size for one in missing)
    require_space(folder, max(0, needed - held))
    done = 0

    def read(index: int) -> bytes:
        nonlocal done
        chunk = chunks.read(index)
        done += len(chunk)
        if progress is not None:
            progress(done, chunks.body.size)
        return chunk

    if not parity_count:
        for one, path in zip(each, names, strict=True):
            if one.index in finished:
                done += one.span(chunks.body)[1] - one.span(chunks.body)[0]
                continue
            with _Volume(path, one, chunks) as volume:
                for index in volume.indices():
                    volume.take(index, read)
        return tuple(names)
    # All at once, column by column: so parity needs one pass and the memory of a few chunks.
    with ExitStack() as stack:
        volumes = [
            stack.enter_context(_Volume(path, one, chunks))
            for path, one in zip(names, each, strict=True)
        ]
        _write_columns(chunks, facts, volumes, range(total), read)
    return tuple(names)


def join(medium: Medium, out: Path, progress: Progress | None = None) -> Digest:
    """Write the full bundle that a set, a delta or any other form stands for.

    Raises:
        RefusedError: `chunk.leaf`, `volume.missing`, ...; FaultError `host.*`.

    """
    chunks = Chunks(medium)
    size = chunks.body.size
    with fresh_file(out, len(chunks.head) + size, resume=True) as stream:
        stream.write(chunks.head)
        stream.flush()
        for index in range(len(chunks.leaves)):
            start = index * CHUNK_SIZE
            place = len(chunks.head) + start
            chunk = os.pread(stream.fileno(), min(CHUNK_SIZE, size - start), place)
            if not chunks.holds(index, chunk):
                chunk = chunks.read(index)
                stream.seek(place)
                stream.write(chunk)
            if progress is not None:
                progress(start + len(chunk), size)
    return chunks.digest


def mend(found: VolumeSet, folder: Path, progress: Progress | None = None) -> Mended:
    """Write lost and damaged volumes anew into `folder`, from parity; make all envelopes equal.

    Raises:
        RefusedError: `chunk.leaf`, `volume.missing`; too much is lost. FaultError `host.*`.

    """
    equalised = _equalise(found)
    chunks = Chunks(found)
    facts = found.facts_of_set
    total = facts.count + facts.parity
    bad = sorted(_find_bad(found, chunks))
    stem = next(iter(found.places().values())).name.partition(".agb.")[0]
    each = [facts.model_copy(update={"index": number}) for number in bad]
    names = [folder / f"{stem}.agb.{number:03}" for number in bad]
    if not bad:
        return Mended((), equalised)
    require_space(folder, sum(len(chunks.head) + e.layout(chunks.body).size for e in each))
    done = 0

    def read(index: int) -> bytes:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done * CHUNK_SIZE, len(chunks.leaves) * CHUNK_SIZE)
        return chunks.read(index)

    with ExitStack() as stack:
        volumes: list[_Volume | None] = [None] * total
        for path, one in zip(names, each, strict=True):
            volumes[one.index - 1] = stack.enter_context(_Volume(path, one, chunks))
        _write_columns(chunks, facts, volumes, [number - 1 for number in bad], read)
    return Mended(tuple(names), equalised)


class _Volume:
    """One volume while it is written."""

    def __init__(self, path: Path, facts: VolumeFacts, chunks: Chunks) -> None:
        self.facts = facts
        self._chunks = chunks
        self._layout = facts.layout(chunks.body)
        self._leaves: list[bytes] = []
        self._stack = ExitStack()
        self._file = fresh_file(path, len(chunks.head) + self._layout.size, resume=True)

    def __enter__(self) -> Self:
        self.stream: BinaryIO = self._stack.enter_context(self._file)
        start, layout = len(self._chunks.head), self._layout
        self.stream.write(self._chunks.head + layout.gap(0) + self.facts.to_bytes() + layout.gap(1))
        self.stream.flush()
        self._next = start + layout.offsets[-1]
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            start, layout = len(self._chunks.head), self._layout
            last = len(layout.files)
            self.stream.seek(self._next)
            self.stream.write(layout.gap(last))
            if self._leaves:
                self.stream.seek(start + layout.offsets[1])
                self.stream.write(b"".join(self._leaves) + layout.gap(2))
        self._stack.__exit__(type(error) if error else None, error, None)

    def indices(self) -> range:
        """Return the chunks of a data volume."""
        first = (self.facts.index - 1) * self.facts.chunks
        return range(first, min(first + self.facts.chunks, len(self._chunks.leaves)))

    def take(self, index: int, read: Callable[[int], bytes]) -> bytes:
        """Return the next chunk, which is number `index`, and write it unless it is there."""
        size = min(CHUNK_SIZE, self._chunks.body.size - index * CHUNK_SIZE)
        chunk = os.pread(self.stream.fileno(), size, self._next)
        if self._chunks.holds(index, chunk):
            self._next += size
        else:
            chunk = read(index)
            self._write(chunk)
        return chunk

    def add_parity(self, chunk: bytes) -> None:
        """Write the next parity chunk and keep its hash."""
        self._write(chunk)
        self._leaves.append(self._chunks.leaf_of(chunk))

    def _write(self, chunk: bytes) -> None:
        self.stream.seek(self._next)
        self.stream.write(chunk)
        self._next += len(chunk)


def _held(path: Path) -> int:
    """Return how many bytes of the disk a file takes, none when it is not there."""
    return path.lstat().st_blocks * 512 if path.exists() else 0


def _is_finished(path: Path, facts: VolumeFacts, chunks: Chunks) -> bool:
    """Tell whether a data volume is there already, byte for byte: a killed run wrote it."""
    layout, start = facts.layout(chunks.body), len(chunks.head)
    first, end = facts.span(chunks.body)
    try:
        with path.open("rb") as stream:
            frame = chunks.head + layout.gap(0) + facts.to_bytes() + layout.gap(1)
            whole = stream.read(len(frame)) == frame and len(frame) == start + layout.offsets[-1]
            for low in range(first, end, CHUNK_SIZE):
                chunk = stream.read(min(CHUNK_SIZE, end - low)) if whole else b""
                whole = whole and chunks.holds(low // CHUNK_SIZE, chunk)
            return whole and stream.read() == layout.gap(len(layout.files))
    except OSError:
        return False


def _write_columns(
    chunks: Chunks,
    facts: VolumeFacts,
    volumes: Sequence[_Volume | None],
    wanted: Sequence[int],
    read: Callable[[int], bytes],
) -> None:
    """Write those of the volumes that are `wanted`, by place, column by column."""
    rows = [place - facts.count for place in wanted if place >= facts.count]
    code = parity.matrix(facts.count, facts.parity) if rows else ()
    for column in range(facts.chunks):
        sums = parity.Sums([code[row] for row in rows])
        for place in range(facts.count):
            index = place * facts.chunks + column
            if index >= len(chunks.leaves) or not (rows or place in wanted):
                continue
            volume = volumes[place]
            chunk = read(index) if volume is None else volume.take(index, read)
            sums.add(place, chunk)
        for number, row in enumerate(rows):
            parity_volume = volumes[facts.count + row]
            if parity_volume is not None:
                parity_volume.add_parity(sums.chunk(number, CHUNK_SIZE))


def _plan(chunks: Chunks, volume_size: int, parity_count: int) -> VolumeFacts:
    """Return the facts of the first volume: how many chunks fit, and so how many volumes."""
    body = chunks.body
    digest = str(chunks.digest)
    # The largest frame is that of a parity volume, which also holds a hash for each chunk.
    width = len(merkle.empty_root(archive.hash_function(body)))
    frame = len(chunks.head) + 8 * 4096 + 4096
    fit = (volume_size - frame) // (CHUNK_SIZE + width)
    if fit < 1:
        raise UsageError(
            "usage.argument",
            f"a volume of {volume_size:,} bytes has no room for one chunk beside the head "
            f"({frame + CHUNK_SIZE + width:,} bytes)",
            hint="give a larger --volume-size, such as 700MB, 4.7GB or 25GB",
        )
    fit = min(fit, body.leaves)
    count = -(-body.leaves // fit)
    most = parity.MAX_VOLUMES - parity_count if parity_count else MAX_COUNT
    if count > most:
        raise UsageError(
            "usage.argument",
            f"{count} volumes and {parity_count} of parity would be needed, at most {most} can be",
            hint="give a larger --volume-size, or less parity",
        )
    return VolumeFacts(set=digest, index=1, count=count, parity=parity_count, chunks=fit)


def _find_bad(found: VolumeSet, chunks: Chunks) -> set[int]:
    """Read everything once; return the numbers of the volumes that are lost or damaged."""
    facts = found.facts_of_set
    total = facts.count + facts.parity
    bad = {number for number in range(1, total + 1) if number not in found.places()}
    for index in range(len(chunks.leaves)):
        number = index // facts.chunks + 1
        if number in bad:
            continue
        buffer = bytearray(min(CHUNK_SIZE, chunks.body.size - index * CHUNK_SIZE))
        try:
            found.read_into(index * CHUNK_SIZE, memoryview(buffer))
            good = chunks.holds(index, memoryview(buffer))
        except AirgapError:
            good = False
        if not good:
            bad.add(number)
    return bad | set(found.bad_parity())


def _equalise(found: VolumeSet) -> tuple[Path, ...]:
    """Give every volume all signatures that any of them bears; a signing may have been killed."""
    heads = found.differing_heads()
    if not heads:
        return ()
    ours = parse_seal(found.head.envelope)
    signatures = {item.keyid: item for item in ours.signatures}
    statements = set(ours.statements)
    mended: list[Path] = []
    for path, head in heads:
        theirs = parse_seal(head.envelope)
        same = (head.manifest, head.trust, head.chunks) == (
            found.head.manifest,
            found.head.trust,
            found.head.chunks,
        )
        if same and (theirs.payload, theirs.payload_type) == (ours.payload, ours.payload_type):
            signatures = {**{s.keyid: s for s in theirs.signatures}, **signatures}
            statements |= set(theirs.statements)
            mended.append(path)
    union = Envelope(
        ours.payload, ours.payload_type, tuple(signatures[keyid] for keyid in sorted(signatures))
    )
    padded = union.with_statements(statements).to_padded()
    for place in [*found.places().values(), *mended]:
        overwrite(place, BLOCK, padded)
    found.reopen()
    return tuple(mended)
