"""Writing an export (docs/design/audit.md, 7): a folder that appears whole or not at all.

It holds the evidence as it stands, from a chosen record on, with the leaf hashes of what lies
before; lines also as C2SP entry bundles; one derived file; a consistency proof from the export or
the cosignature before; and the manifest with its two signatures.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from airgap.audit.checkpoint import Checkpoint, Head
from airgap.audit.disk import open_plain
from airgap.audit.export.fields import Format
from airgap.audit.export.manifest import (
    BUNDLES,
    CONSISTENCY,
    FORMAT,
    Manifest,
    Progress,
    Since,
    bundle_entry,
    file_entry,
)
from airgap.audit.export.rows import find_format
from airgap.audit.export.sign import FILE as SIGNATURES
from airgap.audit.export.sign import ExportKey
from airgap.audit.layout import (
    Layout,
    last_checkpoint,
    parse_journal_line,
    pruned_leaves,
    read_kept,
    read_lines,
    segment_range,
)
from airgap.audit.previous import NAMES_ONE
from airgap.audit.record import citations, parse_line, sealed_payloads
from airgap.audit.tiles import SEGMENT, WIDTH, Edge, Node, Tiles, tile_name
from airgap.audit.tree import StoredTree
from airgap.audit.witness import Request
from policy.errors import RefusedError

_CHUNK: Final = 1_024
_STEERING: Final = (b'"kind":"key.rotate"', b'"kind":"prune"')


@dataclass(frozen=True, slots=True)
class Plan:
    """What an export shall hold.

    `since` is the size from which its reader wants to go on: the export begins with the segment
    of that record and proves that the earlier tree is its beginning.
    """

    head: Checkpoint | Head
    rows: str
    since: int = 0
    number: int = 1
    payloads: bool = True
    key: ExportKey | None = None


def export_log(
    source: Layout, out: Path, plan: Plan, *, progress: Progress | None = None
) -> Manifest:
    """Write the records under the head of `plan` to a new folder `out`.

    Raises:
        RefusedError: `audit.tampered`, the records do not have the root of the head;
            `audit.absent`, `since` is larger than the log; `usage.argument`, `out` exists.

    """
    if out.exists():
        raise RefusedError(
            "usage.argument", f"{out} exists", hint="choose a folder that does not exist yet"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    beside.mkdir(mode=0o700)
    try:
        manifest = _Export(source, Layout(beside), plan, progress).write()
        content = manifest.model_dump_json(indent=1).encode() + b"\n"
        (beside / "manifest.json").write_bytes(content)
        if plan.key is not None:
            (beside / SIGNATURES).write_bytes(plan.key.sign(content))
        _sync(beside)
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return manifest


def write_rows(source: Layout, out: BinaryIO, chosen: Format, since: int = 0) -> int:
    """Write the rows of the records under the newest head, from `since` on; return how many.

    Raises:
        RefusedError: `audit.absent`, there is no signed head; `audit.record`, a line is no record.

    """
    found = last_checkpoint(source.journal)
    if found is None:
        raise RefusedError("audit.absent", f"no signed head in {source.folder}")
    head, count = found[0], 0
    out.write(chosen.header)
    there = segment_range(source)
    for index in there[max(0, since // SEGMENT - there.start) :]:
        for seq, line in enumerate(read_lines(source.segment(index)), index * SEGMENT):
            if since <= seq < head.size and line.endswith(b"\n"):
                leaf = hashlib.sha256(b"\0" + line[:-1]).digest()
                out.write(chosen.row(head.origin, parse_line(line[:-1]), line[:-1], leaf))
                count += 1
    return count


@dataclass(slots=True)
class _Export:
    """One export on its way."""

    source: Layout
    target: Layout
    plan: Plan
    progress: Progress | None
    edge: Edge = field(default_factory=Edge)
    made: dict[Node, bytes] = field(default_factory=dict)
    cited: set[str] = field(default_factory=set)
    sealed: set[str] = field(default_factory=set)
    kept: dict[int, bytes] = field(default_factory=dict)

    def write(self) -> Manifest:
        head, chosen = self.plan.head, find_format(self.plan.rows)
        if chosen is None:
            raise RefusedError("usage.argument", f"no derived format {self.plan.rows!r:.40}")
        for name in ("seg", "tile", "objects"):
            (self.target.log / name).mkdir(parents=True)
        first = self._first()
        since = self._since()
        self._copy(first, chosen)
        self._objects()
        self.target.checkpoint.write_bytes(head.note.encode())
        self._journal(first)
        names = sorted(
            p.relative_to(self.target.folder).as_posix()
            for p in self.target.folder.rglob("*")
            if p.is_file()
        )
        return Manifest(
            format=FORMAT,
            origin=head.origin,
            number=self.plan.number,
            first=first,
            size=head.size,
            root=base64.b64encode(head.root).decode(),
            since=since,
            rows=chosen.name,
            rows_file=chosen.file,
            payloads=self.plan.payloads,
            files=[file_entry(self.target.folder, name) for name in names],
        )

    def _first(self) -> int:
        """Return the first record of the export: that of a segment, and one that is there."""
        there = segment_range(self.source).start * SEGMENT
        if not 0 <= self.plan.since <= self.plan.head.size:
            raise RefusedError(
                "audit.absent",
                f"--since {self.plan.since}: the log has {self.plan.head.size} records",
            )
        return max(there, min(self.plan.since, self.plan.head.size - 1) // SEGMENT * SEGMENT)

    def _since(self) -> Since | None:
        """Write the proof that the tree which the reader knows is the beginning of this one."""
        if not self.plan.since:
            return None
        tree = StoredTree(self.source)
        proof = tree.consistency(self.plan.since, self.plan.head)
        head = self.plan.head
        checkpoint = Checkpoint(head.origin, head.size, head.root, b"", (), head.note)
        request = Request(self.plan.since, proof, checkpoint)
        (self.target.folder / CONSISTENCY).write_text(request.as_text())
        root = base64.b64encode(tree.root(self.plan.since)).decode()
        return Since(size=self.plan.since, root=root)

    def _copy(self, first: int, chosen: Format) -> None:
        """Copy lines with their tiles, bundles and rows, and check the whole against the head."""
        tiles = Tiles(self._put_tile)
        self._copy_leaves(first, tiles)
        head = self.plan.head
        with contextlib.ExitStack() as stack:
            rows = stack.enter_context((self.target.folder / chosen.file).open("wb"))
            rows.write(chosen.header)
            segment, bundle = None, list[bytes]()
            for line in itertools.islice(self._lines(first), head.size - first):
                if self.edge.size % SEGMENT == 0:
                    path = self.target.segment(self.edge.size // SEGMENT)
                    segment = stack.enter_context(path.open("wb"))
                leaf = hashlib.sha256(b"\0" + line).digest()
                record = parse_line(line)
                self.cited.update(citations(record))
                self.sealed.update(sealed_payloads(record))
                if segment is not None:
                    segment.write(line + b"\n")
                rows.write(chosen.row(head.origin, record, line, leaf))
                bundle.append(bundle_entry(line))
                self.edge.append(leaf, self.made)
                if self.edge.size % WIDTH == 0:
                    self._put_bundle(bundle)
                if self.edge.size % _CHUNK == 0:
                    self._take(tiles)
                    if self.progress is not None:
                        self.progress(self.edge.size, head.size)
            self._put_bundle(bundle)
        self._take(tiles)
        for name, content in tiles.partial():
            self._put_tile(name, content)
        if self.edge.size != head.size or self.edge.root() != head.root:
            raise RefusedError(
                "audit.tampered",
                f"{self.edge.size} records do not have the root signed for size {head.size}",
                hint="run `airgap audit verify` and keep the folder as evidence",
            )

    def _copy_leaves(self, first: int, tiles: Tiles) -> None:
        """Take what lies before by its hashes, with the few lines that verification needs."""
        kept = read_kept(self.source)
        there = segment_range(self.source)
        for index in range(first // SEGMENT):
            for leaf in pruned_leaves(self.source, index):
                self.edge.append(leaf, self.made)
            self._take(tiles)
            if index in there:
                lines = read_lines(self.source.segment(index))
                for number, line in enumerate(lines):
                    begins = not index and not number and NAMES_ONE in line
                    if begins or any(word in line for word in _STEERING):
                        kept[index * SEGMENT + number] = line[:-1]
        wanted = {seq: line for seq, line in kept.items() if seq < first}
        if wanted:
            for line in wanted.values():
                self.cited.update(citations(parse_line(line)))
            content = b"".join(wanted[seq] + b"\n" for seq in sorted(wanted))
            self.target.kept.write_bytes(content)

    def _take(self, tiles: Tiles) -> None:
        tiles.add(self.made)
        self.made.clear()

    def _lines(self, first: int) -> Iterator[bytes]:
        for index in range(first // SEGMENT, segment_range(self.source).stop):
            for line in read_lines(self.source.segment(index)):
                if line.endswith(b"\n"):
                    yield line[:-1]

    def _put_tile(self, name: str, content: bytes) -> None:
        path = self.target.tiles / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def _put_bundle(self, bundle: list[bytes]) -> None:
        """Write the bundle that the last record belongs to."""
        if bundle:
            index = (self.edge.size - 1) // WIDTH
            name = tile_name(0, index, len(bundle)).removeprefix("0/")
            self._put_tile(f"{BUNDLES}/{name}", b"".join(bundle))
            bundle.clear()

    def _objects(self) -> None:
        for digest in sorted(self.cited):
            _copy_file(self.source.object(digest[7:]), self.target.object(digest[7:]))
        if not self.plan.payloads:
            return
        self.target.sealed.mkdir()
        for digest in sorted(self.sealed):
            with contextlib.suppress(FileNotFoundError):  # Purged; the record of that is here.
                _copy_file(self.source.payload(digest[7:]), self.target.payload(digest[7:]))

    def _journal(self, first: int) -> None:
        """Copy the heads; of those before the export, the ones at segments' and epochs' ends."""
        with self.target.journal.open("wb") as journal:
            for line in read_lines(self.source.journal):
                try:
                    head = parse_journal_line(line)
                except RefusedError:
                    continue  # Debris of a crash that the next open cuts off.
                closing = len(head.signatures) > 1
                wanted = head.size >= first or closing or head.size % SEGMENT == 0
                if wanted and head.size <= self.plan.head.size:
                    journal.write(line)


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_plain(source) as original, target.open("wb") as copy:
        shutil.copyfileobj(original, copy)


def _sync(folder: Path) -> None:
    """Flush every file: the outcome record will say that this export is complete."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
