"""Sets of volumes: a bundle cut at chunk borders, for media that are smaller than it.

Each volume is a tar of its own: the complete head, `META/volume.json`, and a run of chunks. What
`volume.json` says is unsigned and believed by nobody: the set is the digest of the manifest, every
chunk is held against its sealed leaf, and all else is computed. Parity volumes replace lost or bad
chunks, which are then hashed like any other. FORMAT.md section 14.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from bundle import merkle, parity
from bundle.archive import Head, hash_function, read_head
from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope
from bundle.fields import DigestText, Document
from bundle.manifest import CHUNK_SIZE, Body, Manifest, first_problem
from bundle.medium import Holds, Medium, overwrite
from bundle.source import Source, read_exactly
from bundle.tar import BLOCK, Layout, read_document, require_layout
from policy.errors import AirgapError, RefusedError
from policy.terms import Digest

VOLUME = "META/volume.json"
LEAVES = "META/parity.bin"
FORMAT: Literal["airgap-volume/1"] = "airgap-volume/1"
MAX_COUNT = 999
FACTS_LIMIT = 4096
NUMBERED = re.compile(r"(?P<stem>.+\.agb)\.(?P<number>[0-9]{3})(\.enc)?")

Opener = Callable[[Path], Source]
Asker = Callable[[int, int], Sequence[Path]]
"""Is told the number of a volume and of how many, and returns where to look."""


class VolumeFacts(Document):
    """`META/volume.json`. `index` counts from 1, first the `count` data volumes, then parity."""

    format: Literal["airgap-volume/1"] = FORMAT
    set: DigestText
    index: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    parity: Annotated[int, Field(ge=0, lt=parity.MAX_VOLUMES)]
    chunks: Annotated[int, Field(ge=1, le=2**32)]

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def common(self) -> tuple[str, int, int, int]:
        """What all volumes of a set share."""
        return self.set, self.count, self.parity, self.chunks

    def layout(self, body: Body) -> Layout:
        """Return what follows the head of this volume."""
        facts = (VOLUME, len(self.to_bytes()))
        if self.index > self.count:
            width = len(merkle.empty_root(hash_function(body)))
            content = (f"VOLUME/parity.{self.index:03}", self.chunks * CHUNK_SIZE)
            return Layout([facts, (LEAVES, self.chunks * width), content])
        start, end = self.span(body)
        return Layout([facts, (f"VOLUME/body.{self.index:03}", end - start)])

    def span(self, body: Body) -> tuple[int, int]:
        """Return first and last byte of the body that a data volume holds, the last excluded."""
        start = (self.index - 1) * self.chunks * CHUNK_SIZE
        return start, min(body.size, start + self.chunks * CHUNK_SIZE)


@dataclass(slots=True)
class _Volume:
    """One file of the set: opened and read as far as its facts."""

    source: Source
    head: Head
    head_digest: bytes
    facts: VolumeFacts
    data: int = 0  # where the chunks begin in the file
    leaves: bytes = b""  # of a parity volume: the hashes of its chunks

    @property
    def name(self) -> str:
        kind = "parity volume" if self.facts.index > self.facts.count else "volume"
        return f"{kind} {self.facts.index} of {self.facts.count} ({self.source.path.name:.80})"


class VolumeSet(Medium):
    """The volumes of one bundle, as far as they are there.

    Args:
        paths: Files that may be volumes of the set; the first one is what the user named.
        opener: Opens one of them.
        asker: Brings a volume that is missing, when somebody sits there.

    Raises:
        RefusedError: `volume.*`, `archive.*`; no head can be read, or two volumes are one.

    """

    form = "volumes"

    def __init__(self, paths: Sequence[Path], opener: Opener, asker: Asker | None = None) -> None:
        self.path = paths[0]
        self.repaired: dict[int, list[int]] = {}  # volume number -> chunks
        self._opener, self._asker = opener, asker
        self._lock = threading.Lock()
        self._problems: list[tuple[int, AirgapError]] = []  # number by name, 0 if unknown
        self._bad_parity: list[int] = []
        self._others: list[_Volume] = []  # of this set, but with another head
        self._volumes: dict[int, _Volume] = {}
        self._body: Body | None = None
        self._paths = set(paths)
        try:
            self._begin([found for path in paths if (found := self._read(path)) is not None])
        except BaseException:
            self.close()
            raise

    # -- what is there ------------------------------------------------------------------------

    def _begin(self, found: list[_Volume]) -> None:
        """Take the facts that most volumes share as those of the set; the seal judges them."""
        if not found:
            raise self._problems[0][1] if self._problems else _missing([1], 1)
        votes = Counter((each.head_digest, each.facts.common) for each in found)
        most = max(votes.values())
        first = next(each for each in found if votes[each.head_digest, each.facts.common] == most)
        self.head, self.facts_of_set = first.head, first.facts
        self._vote = (first.head_digest, first.facts.common)
        self.source = first.source
        for each in found:
            self._place(each)

    def _read(self, path: Path) -> _Volume | None:
        """Open one file and read its facts; one that is no volume is a problem of its own."""
        number = number_of(path)
        source: Source | None = None
        try:
            source = self._opener(path)
            head = read_head(source)
            raw = read_document(source, head.body_start, VOLUME, FACTS_LIMIT)
            facts = parse_volume(raw, path)
            start = hashlib.sha256(read_exactly(source, 0, head.body_start)).digest()
        except AirgapError as error:  # a bad sector makes a bad volume, and no more
            if source is not None:
                source.close()
            prefix = f"volume {number} ({path.name}): " if number else ""
            renamed = type(error)(error.code, f"{prefix}{error.message}", hint=error.hint)
            self._problems.append((number, renamed))
            return None
        return _Volume(source, head, start, facts)

    def _place(self, each: _Volume) -> None:
        """Put a volume in its place, or note why it has none."""
        number = each.facts.index
        other = self._volumes.get(number)
        problem: RefusedError | None = None
        if (each.head_digest, each.facts.common) != self._vote:
            what = "head" if each.head_digest != self._vote[0] else "description of the set"
            code = "volume.set" if each.head_digest != self._vote[0] else "volume.order"
            problem = RefusedError(
                code,
                f"{each.name} bears another {what} than the others: it belongs to another set, "
                "or is damaged",
                hint="take the volume away, or bring the right one; `airgap repair` makes equal "
                "what only a signature tells apart",
            )
        elif number > each.facts.count + each.facts.parity:
            problem = RefusedError("volume.order", f"{each.name}: the set has no such volume")
        elif other is not None:
            raise RefusedError(
                "volume.order",
                f"volume {number} is there twice: {other.source.path} and {each.source.path}",
                hint="take one of them away",
            )
        if problem is not None:
            if each.facts.common == self._vote[1]:
                self._others.append(each)
            each.source.close()
            self._problems.append((number, problem))
            return
        self._volumes[number] = each
        if self._body is not None:
            self._check(each, self._body)

    def require_whole(self, manifest: Manifest, digest: Digest) -> None:
        """Check set, count and the frame of each volume; see `Medium`."""
        body, facts = manifest.body, self.facts_of_set
        self._body = body
        if facts.set != str(digest):
            raise RefusedError(
                "volume.set", f"the volumes say set {facts.set}, the seal is that of {digest}"
            )
        if (
            facts.chunks > body.leaves
            or facts.count != -(-body.leaves // facts.chunks)
            or (facts.parity and facts.count + facts.parity > parity.MAX_VOLUMES)
        ):
            raise RefusedError(
                "volume.order",
                f"{facts.count} volumes of {facts.chunks} chunks do not hold {body.leaves} chunks",
            )
        for each in list(self._volumes.values()):
            self._check(each, body)
        named = {number for number, _ in self._problems if number}
        spare = sum(number > facts.count for number in self._volumes)
        lost = sum(number not in self._volumes for number in range(1, facts.count + 1))
        beside = next((error for number, error in self._problems if number not in named), None)
        if beside is not None:
            raise beside
        if self._problems and lost > spare:
            raise self._problems[0][1]

    def _check(self, each: _Volume, body: Body) -> None:
        """Check headers and length of one volume, and find where its chunks begin."""
        layout, start = each.facts.layout(body), each.head.body_start
        try:
            require_layout(each.source, start, layout)
            each.data = start + layout.offsets[-1]
            if len(layout.offsets) > 2:  # noqa: PLR2004 - a parity volume has one more
                each.leaves = read_exactly(
                    each.source, start + layout.offsets[1], layout.files[1][1]
                )
        except AirgapError as error:
            del self._volumes[each.facts.index]
            each.source.close()
            renamed = type(error)(error.code, f"{each.name}: {error.message}", hint=error.hint)
            self._problems.append((each.facts.index, renamed))

    # -- bytes --------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the volumes that hold it; see `Medium`."""
        size = self.facts_of_set.chunks * CHUNK_SIZE
        filled = 0
        while filled < len(buffer):
            place, within = divmod(offset + filled, size)
            volume = self._volumes.get(place + 1)
            if volume is None:
                raise self._absent([place + 1])
            part = buffer[filled : filled + size - within]
            volume.source.read_into(volume.data + within, part)
            filled += len(part)

    def map(self) -> memoryview | None:
        """Return nothing: a file may lie on two volumes."""
        return None

    def where(self, start: int, end: int) -> str:
        """Name the volume and the bytes in it."""
        place, within = divmod(start, self.facts_of_set.chunks * CHUNK_SIZE)
        volume = self._volumes.get(place + 1)
        if volume is None:
            return f"volume {place + 1} of {self.facts_of_set.count}"
        low = volume.data + within
        return f"{volume.name}, bytes {low:,} to {low + end - start - 1:,} of it"

    def is_absent(self, index: int) -> bool:
        """Tell whether the volume of chunk `index` is not there."""
        return index // self.facts_of_set.chunks + 1 not in self._volumes

    def ask(self, index: int) -> None:
        """Ask for the volume of a chunk, letting go of those that are there: the drive is one."""
        number = index // self.facts_of_set.chunks + 1
        if self._asker is None or self._can_repair():
            return
        while number not in self._volumes:
            for volume in self._volumes.values():
                volume.source.close()
            self._volumes.clear()
            paths = self._asker(number, self.facts_of_set.count)
            if not paths:
                self._asker = None  # who has no disc is not asked for the next one
                return
            for path in paths:
                found = self._read(path)
                if found is not None:
                    self._place(found)

    def absence(self, indices: Sequence[int]) -> AirgapError:
        """Name the volumes of chunks that were not there; see `Medium`."""
        return self._absent(sorted({index // self.facts_of_set.chunks + 1 for index in indices}))

    def _absent(self, lost: Sequence[int]) -> AirgapError:
        named = dict(self._problems)
        first = next((named[number] for number in lost if number in named), None)
        return first or _missing(lost, self.facts_of_set.count)

    # -- parity -------------------------------------------------------------------------------

    def _can_repair(self) -> bool:
        spare = sum(number > self.facts_of_set.count for number in self._volumes)
        lost = sum(n not in self._volumes for n in range(1, self.facts_of_set.count + 1))
        return 0 < lost <= spare

    def repair(self, index: int, buffer: memoryview, holds: Holds) -> bool:
        """Compute chunk `index` from its column; see `Medium`."""
        place, column = divmod(index, self.facts_of_set.chunks)
        with self._lock:  # one column at a time bounds the memory
            found = self.repair_column(column, holds)
            if place not in found:
                return False
            buffer[:] = found[place][: len(buffer)]
            self.repaired.setdefault(place + 1, []).append(index)
        return True

    def repair_column(self, column: int, holds: Holds) -> dict[int, bytes]:
        """Return the lost or bad chunks of a column by place, or nothing when too many are."""
        facts, body = self.facts_of_set, self._body
        if body is None or not facts.parity:
            return {}
        code = parity.matrix(facts.count, facts.parity)
        spare = {
            row: chunk
            for row in range(facts.parity)
            if (chunk := self._parity_chunk(row, column, body)) is not None
        }
        rows = [code[row] for row in spare]
        sums = parity.Sums(rows)
        lost: list[int] = []
        for place in range(facts.count):
            index = place * facts.chunks + column
            if index >= body.leaves:
                continue
            chunk = self._data_chunk(place, index, body)
            if chunk is not None and holds(index, memoryview(chunk)):
                sums.add(place, chunk)
            else:
                lost.append(place)
            if len(lost) > len(rows):
                return {}
        if not lost:
            return {}
        return dict(zip(lost, parity.recover(rows, lost, sums, list(spare.values())), strict=True))

    def _data_chunk(self, place: int, index: int, body: Body) -> bytes | None:
        volume = self._volumes.get(place + 1)
        if volume is None:
            return None
        length = min(CHUNK_SIZE, body.size - index * CHUNK_SIZE)
        within = index % self.facts_of_set.chunks * CHUNK_SIZE
        try:
            return read_exactly(volume.source, volume.data + within, length)
        except AirgapError:  # a bad sector is a lost chunk
            return None

    def _parity_chunk(self, row: int, column: int, body: Body) -> bytes | None:
        """Return a chunk of a parity volume if it is the one that was written."""
        volume = self._volumes.get(self.facts_of_set.count + 1 + row)
        if volume is None:
            return None
        h = hash_function(body)
        width = len(merkle.empty_root(h))
        try:
            chunk = read_exactly(volume.source, volume.data + column * CHUNK_SIZE, CHUNK_SIZE)
        except AirgapError:
            return None
        wanted = volume.leaves[column * width : (column + 1) * width]
        return chunk if merkle.leaf_hash(chunk, h) == wanted else None

    def bad_parity(self) -> list[int]:
        """Read the parity volumes; return the numbers of those that are lost or damaged."""
        body, facts = self._body, self.facts_of_set
        if body is None:
            return []
        with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
            return [
                facts.count + 1 + row
                for row in range(facts.parity)
                if not all(
                    pool.map(
                        lambda column, row=row: self._parity_chunk(row, column, body) is not None,
                        range(facts.chunks),
                    )
                )
            ]

    # -- for those who mend a set ---------------------------------------------------------------

    def places(self) -> dict[int, Path]:
        """Return the volumes that are there and framed as they must be."""
        return {number: each.source.path for number, each in sorted(self._volumes.items())}

    def differing_heads(self) -> list[tuple[Path, Head]]:
        """Return the volumes of this set, by their facts, whose head is not that of the others."""
        return [(each.source.path, each.head) for each in self._others]

    def reopen(self) -> None:
        """Look at all files again: some were written to."""
        self.close()
        again = VolumeSet(sorted(self._paths), self._opener, self._asker)
        self.head, self.source, self._vote = again.head, again.source, again._vote
        self._volumes, self._problems, self._others = again._volumes, again._problems, again._others

    # -- the rest -----------------------------------------------------------------------------

    def check_spares(self) -> None:
        """Read the parity volumes and remember which are bad; see `Medium`."""
        self._bad_parity = self.bad_parity()

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the set."""
        return {
            "form": self.form,
            "files": [str(each.source.path) for _, each in sorted(self._volumes.items())],
            "set": self.facts_of_set.set,
            "count": self.facts_of_set.count,
            "parity": self.facts_of_set.parity,
            "repaired": [
                {"volume": number, "chunks": len(set(chunks))}
                for number, chunks in sorted(self.repaired.items())
            ],
            "bad_parity": list(self._bad_parity),
            "problems": [error.message for _, error in self._problems],
        }

    def rewrite_envelope(self, envelope: Envelope) -> None:
        """Replace the envelope in every volume; all of them must be there.

        Raises:
            RefusedError: `volume.missing`, or why a volume cannot be taken.

        """
        total = self.facts_of_set.count + self.facts_of_set.parity
        lost = [number for number in range(1, total + 1) if number not in self._volumes]
        if lost:
            raise self._absent(lost)
        padded = envelope.to_padded()
        for number in sorted(self._volumes):
            overwrite(self._volumes[number].source.path, BLOCK, padded)

    def close(self) -> None:
        """Close every volume."""
        for volume in self._volumes.values():
            volume.source.close()


def number_of(path: Path) -> int:
    """Return the number that a file name gives its volume, 0 when it gives none."""
    found = NUMBERED.fullmatch(path.name)
    return int(found["number"]) if found else 0


def find_siblings(path: Path) -> list[Path]:
    """Return the volumes of the set that `path` belongs to by name, itself first.

    Raises:
        RefusedError: `archive.type`, a folder holds none; `volume.set`, it holds several sets.

    """
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if NUMBERED.fullmatch(each.name))
        stems = {str(each.name).partition(".agb.")[0] for each in found}
        if not found:
            raise RefusedError(
                "archive.type",
                f"{str(path)!r:.160} is a folder without a volume (NAME.agb.001, ...), and holds"
                " no bundle or several",
                hint="give a bundle, one volume of a set, or the folder that holds one of them",
            )
        if len(stems) > 1:
            raise RefusedError(
                "volume.set",
                f"the folder {str(path)!r:.160} holds {len(stems)} sets of volumes",
                hint="name one volume of the set that is meant",
            )
        return found
    match = NUMBERED.fullmatch(path.name)
    if match is None or not path.parent.is_dir():
        return [path]
    others = sorted(
        each
        for each in path.parent.iterdir()
        if each != path
        and (found_name := NUMBERED.fullmatch(each.name)) is not None
        and found_name["stem"] == match["stem"]
    )
    return [path, *others] if path.exists() else others or [path]


def _missing(lost: Sequence[int], count: int) -> RefusedError:
    names = ", ".join(str(number) for number in lost[:40])
    return RefusedError(
        "volume.missing",
        f"volume {names} of {count} is not here"
        if len(lost) == 1
        else f"volumes {names} of {count} are not here",
        hint="bring them, or a parity volume for each; an install goes on where it stopped",
    )


def parse_volume(raw: bytes, path: Path) -> VolumeFacts:
    """Turn the untrusted bytes of `META/volume.json` into facts: RefusedError `volume.order`."""
    what = f"{VOLUME} of {path.name!r:.80}"
    parse_canonical(raw, code="volume.order", what=what, limit=FACTS_LIMIT)
    try:
        facts = VolumeFacts.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError("volume.order", f"{what}: {first_problem(error)}") from error
    if facts.to_bytes() != raw:
        raise RefusedError("volume.order", f"{what} writes a field in another form")
    if number_of(path) not in {0, facts.index}:
        raise RefusedError(
            "volume.order",
            f"{path.name!r:.100} says that it is volume {facts.index} of {facts.count}",
            hint="give each volume the name that it had",
        )
    return facts
