"""Writing an export and checking one (docs/design/audit.md, 7).

An export is a folder: the evidence as it stands (`log/`), one derived file, and `manifest.json`
with length and digests of every file. `audit verify` reads it like a log, with nothing forgiven.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from airgap.audit.checkpoint import MAX_NOTE, Checkpoint, parse_checkpoint
from airgap.audit.disk import open_plain
from airgap.audit.export.rows import FORMATS, Format
from airgap.audit.layout import Layout, parse_journal_line, read_lines, segment_count
from airgap.audit.record import citations, parse_line
from airgap.audit.tiles import SEGMENT, Edge, Node, Tiles
from airgap.audit.verify import NOTE, TAMPERED, Finding
from policy.errors import RefusedError

FORMAT: Final = "airgap-audit-export/1"
MAX_MANIFEST: Final = 1 << 26
_UNSIGNED: Final = "no signature of its own; the verdict rests on the signed head"
_CHUNK: Final = 1_024
_BLOCK: Final = 1 << 20

_Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_Sha384 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{96}$")]
Progress = Callable[[int, int], None]


class FileEntry(BaseModel):
    """One file of the export; `path` is relative, with `/`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    path: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_./-]{1,200}$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: _Sha256
    sha384: _Sha384


class Manifest(BaseModel):
    """What an export holds. `root` is base64, as in the checkpoint."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal["airgap-audit-export/1"]
    origin: Annotated[str, StringConstraints(max_length=200)]
    size: Annotated[int, Field(ge=1)]
    root: Annotated[str, StringConstraints(max_length=44)]
    rows: Literal["jsonl", "csv"]
    rows_file: Literal["records.jsonl", "records.csv"]
    files: list[FileEntry]


def export_log(
    source: Layout,
    out: Path,
    *,
    head: Checkpoint,
    rows: str,
    progress: Progress | None = None,
) -> Manifest:
    """Write the records under `head` to a new folder `out`, which appears whole or not at all.

    Args:
        source: The log to export.
        out: Must not exist.
        head: A verified head of this log; the export ends with it.
        rows: A key of `FORMATS`, the derived file to add.
        progress: Called with records done and records in all.

    Raises:
        RefusedError: `audit.tampered`, the records do not have the root of `head`; or
            `usage.argument`, `out` exists.

    """
    if out.exists():
        raise RefusedError(
            "usage.argument", f"{out} exists", hint="choose a folder that does not exist yet"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    beside.mkdir(mode=0o700)
    try:
        manifest = _write(source, Layout(beside), head, FORMATS[rows], progress)
        content = manifest.model_dump_json(indent=1).encode() + b"\n"
        (beside / "manifest.json").write_bytes(content)
        _sync(beside)
        beside.rename(out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return manifest


def parse_manifest(content: bytes) -> Manifest:
    """Return the manifest of an export that nobody trusts; RefusedError `audit.record`."""
    if len(content) > MAX_MANIFEST:
        raise RefusedError("audit.record", f"a manifest of {len(content)} bytes")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise RefusedError("audit.record", f"manifest: {error.errors()[0]['msg']:.120}") from None
    paths = [entry.path for entry in manifest.files]
    if len(set(paths)) != len(paths) or any(not _inside(path) for path in paths):
        raise RefusedError("audit.record", "manifest: a path twice, absolute or with `..`")
    return manifest


def check_export(folder: Path) -> Iterator[Finding]:
    """Yield what does not fit between an export's manifest, its files and its derived rows."""
    try:
        with open_plain(folder / "manifest.json") as file:
            manifest = parse_manifest(file.read(MAX_MANIFEST + 1))
    except RefusedError as error:
        yield Finding(TAMPERED, "manifest", "manifest.json", found=error.message)
        return
    yield from _check_head(folder, manifest)
    listed = {entry.path: entry for entry in manifest.files}
    there = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield Finding(TAMPERED, "manifest", name, found="a link or special file")
        elif path.is_file() and name != "manifest.json":
            there.add(name)
    for name in sorted(there - set(listed)):
        yield Finding(TAMPERED, "manifest", name, found="a file that is not listed")
    for name, entry in listed.items():
        if name not in there:
            yield Finding(TAMPERED, "manifest", name, expected="a file", found="nothing")
        elif _entry(folder, name) != entry:
            yield Finding(TAMPERED, "manifest", name, expected=entry.sha256, found="other content")
    yield from _check_rows(Layout(folder), manifest)


def _check_head(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """The manifest says of itself what the signed head says."""
    try:
        with open_plain(Layout(folder).checkpoint) as file:
            head = parse_checkpoint(file.read(MAX_NOTE + 1))
    except (RefusedError, FileNotFoundError):
        return  # Reported by the main pass.
    said = (manifest.origin, manifest.size, manifest.root)
    signed = (head.origin, head.size, base64.b64encode(head.root).decode())
    if said != signed:
        yield Finding(TAMPERED, "manifest", "manifest.json", expected=f"{signed}", found=f"{said}")


def _check_rows(layout: Layout, manifest: Manifest) -> Iterator[Finding]:
    """Write every derived row again and compare it with the file."""
    chosen, name = FORMATS[manifest.rows], manifest.rows_file
    if name != chosen.file or not (layout.folder / name).is_file():
        yield Finding(TAMPERED, "rows", name, found="not the derived file of this format")
        return
    found = read_lines(layout.folder / name)
    if chosen.header and next(found, b"") != chosen.header:
        yield Finding(TAMPERED, "rows", name, found="another header")
        return
    for seq, line in enumerate(_lines(layout)):
        leaf = hashlib.sha256(b"\0" + line).digest()
        try:
            expected = chosen.row(manifest.origin, parse_line(line), line, leaf)
        except RefusedError:
            return  # The record itself is reported by the main pass.
        row = next(found, b"")
        if row != expected:
            yield Finding(
                TAMPERED, "rows", name, seq, expected=f"{expected[:70]!r}", found=f"{row[:70]!r}"
            )
            return
    if next(found, None) is not None:
        yield Finding(TAMPERED, "rows", name, found="more rows than records")
    yield Finding(NOTE, "manifest", "manifest.json", found=_UNSIGNED)


def _write(
    source: Layout, target: Layout, head: Checkpoint, chosen: Format, progress: Progress | None
) -> Manifest:
    for name in ("seg", "tile", "objects"):
        (target.log / name).mkdir(parents=True)
    _copy_records(source, target, head, chosen, progress)
    target.checkpoint.write_bytes(head.note.encode())
    with target.journal.open("wb") as journal:
        for line in read_lines(source.journal):
            try:
                size = parse_journal_line(line).size
            except RefusedError:
                continue  # Debris of a crash that the next open cuts off.
            if size <= head.size:
                journal.write(line)
    names = sorted(
        p.relative_to(target.folder).as_posix() for p in target.folder.rglob("*") if p.is_file()
    )
    return Manifest(
        format=FORMAT,
        origin=head.origin,
        size=head.size,
        root=base64.b64encode(head.root).decode(),
        rows="csv" if chosen.name == "csv" else "jsonl",
        rows_file="records.csv" if chosen.name == "csv" else "records.jsonl",
        files=[_entry(target.folder, name) for name in names],
    )


def _copy_records(
    source: Layout, target: Layout, head: Checkpoint, chosen: Format, progress: Progress | None
) -> None:
    """Copy the lines under `head`, with their tiles, cited objects and derived rows."""
    edge, made = Edge(), dict[Node, bytes]()
    cited: set[str] = set()

    def put_tile(name: str, content: bytes) -> None:
        path = target.tiles / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    tiles = Tiles(put_tile)
    with contextlib.ExitStack() as stack:
        rows = stack.enter_context((target.folder / chosen.file).open("wb"))
        rows.write(chosen.header)
        segment = None
        for line in itertools.islice(_lines(source), head.size):
            if edge.size % SEGMENT == 0:
                path = target.segment(edge.size // SEGMENT)
                segment = stack.enter_context(path.open("wb"))
            leaf = hashlib.sha256(b"\0" + line).digest()
            record = parse_line(line)
            cited.update(citations(record))
            if segment is not None:
                segment.write(line + b"\n")
            rows.write(chosen.row(head.origin, record, line, leaf))
            edge.append(leaf, made)
            if edge.size % _CHUNK == 0:
                tiles.add(made)
                made.clear()
                if progress is not None:
                    progress(edge.size, head.size)
    tiles.add(made)
    for name, content in tiles.partial():
        put_tile(name, content)
    if edge.size != head.size or edge.root() != head.root:
        raise RefusedError(
            "audit.tampered",
            f"{edge.size} records do not have the root signed for size {head.size}",
            hint="run `airgap audit verify` and keep the folder as evidence",
        )
    for digest in sorted(cited):
        path = target.object(digest[7:])
        path.parent.mkdir(exist_ok=True)
        with open_plain(source.object(digest[7:])) as cited_file, path.open("wb") as copy:
            shutil.copyfileobj(cited_file, copy)


def _lines(layout: Layout) -> Iterator[bytes]:
    """Yield every whole line of a log, without its newline."""
    for index in range(segment_count(layout)):
        for line in read_lines(layout.segment(index)):
            if line.endswith(b"\n"):
                yield line[:-1]


def _entry(folder: Path, name: str) -> FileEntry:
    sha256, sha384, size = hashlib.sha256(), hashlib.sha384(), 0
    with open_plain(folder / name) as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            sha384.update(block)
            size += len(block)
    return FileEntry(path=name, bytes=size, sha256=sha256.hexdigest(), sha384=sha384.hexdigest())


def _inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return not path.startswith("/") and ".." not in parts and "/".join(parts) == path


def _sync(folder: Path) -> None:
    """Flush every file: the outcome record will say that this export is complete."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
