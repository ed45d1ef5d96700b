"""The manifest of an export, and checking an export against it (docs/design/audit.md, 7).

An export is a folder: the evidence (`log/`), one derived file, and `manifest.json` with length and
digests of every file. `audit verify` reads it like a log, with nothing forgiven.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from airgap.audit.checkpoint import MAX_NOTE, parse_checkpoint, strict_hash
from airgap.audit.disk import open_plain
from airgap.audit.export.rows import find_format
from airgap.audit.export.sign import FILE as SIGNATURES
from airgap.audit.export.sign import MAX_FILE, SCHEMES, ExportPublic, once
from airgap.audit.findings import NOTE, TAMPERED, Finding
from airgap.audit.layout import Layout, read_lines, segment_range
from airgap.audit.record import parse_line
from airgap.audit.tiles import SEGMENT, WIDTH, is_tile_of, tile_name
from airgap.audit.witness import parse_request
from bundle.merkle import verify_consistency
from policy.errors import RefusedError

FORMAT: Final = "airgap-audit-export/1"
MAX_MANIFEST: Final = 1 << 26
BUNDLES: Final = "entries"  # below `log/tile/`
CONSISTENCY: Final = "since.tlog-witness"
_UNSIGNED: Final = "no signature of its own; the verdict rests on the signed head"
_UNCHECKED: Final = "its two signatures were not checked: no export key was given"
_BLOCK: Final = 1 << 20

_Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_Sha384 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{96}$")]
_Root = Annotated[str, StringConstraints(max_length=44)]
Progress = Callable[[int, int], None]

_STRICT: Final = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileEntry(BaseModel):
    """One file of the export; `path` is relative, with `/`."""

    model_config = _STRICT

    path: Annotated[str, StringConstraints(pattern="^[A-Za-z0-9_./-]{1,200}$")]
    bytes: Annotated[int, Field(ge=0)]
    sha256: _Sha256
    sha384: _Sha384


class Since(BaseModel):
    """The earlier tree whose reader this export continues."""

    model_config = _STRICT

    size: Annotated[int, Field(ge=1)]
    root: _Root


class Manifest(BaseModel):
    """What an export holds. Roots are base64, as in the checkpoint."""

    model_config = _STRICT

    format: Literal["airgap-audit-export/1"]
    origin: Annotated[str, StringConstraints(max_length=200)]
    number: Annotated[int, Field(ge=1)]  # of this host's exports; an importer takes no older one
    first: Annotated[int, Field(ge=0)]  # the first record whose line is here
    size: Annotated[int, Field(ge=1)]
    root: _Root
    since: Since | None
    rows: Annotated[str, StringConstraints(pattern="^[a-z0-9-]{1,16}$")]
    rows_file: Annotated[str, StringConstraints(pattern="^records\\.[a-z0-9-]{1,16}$")]
    payloads: bool  # whether encrypted payloads travel along
    files: list[FileEntry]


def parse_manifest(content: bytes) -> Manifest:
    """Return the manifest of an export that nobody trusts; RefusedError `audit.record`."""
    if len(content) > MAX_MANIFEST:
        raise RefusedError("audit.record", f"a manifest of {len(content)} bytes")
    try:
        json.loads(content.decode(), object_pairs_hook=once)  # which of two is read differs
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise RefusedError("audit.record", f"manifest: {error.errors()[0]['msg']:.120}") from None
    except (ValueError, RecursionError) as error:
        raise RefusedError("audit.record", f"manifest: {error!s:.120}") from None
    paths = [entry.path for entry in manifest.files]
    if len(set(paths)) != len(paths) or any(not _inside(path) for path in paths):
        raise RefusedError("audit.record", "manifest: a path twice, absolute or with `..`")
    return manifest


def check_export(
    folder: Path, keys: ExportPublic | None = None, required: Sequence[str] = SCHEMES
) -> Iterator[Finding]:
    """Yield what does not fit between an export's signatures, manifest, files and derived rows.

    Args:
        folder: The export.
        keys: The export keys of its host; without them its signatures are not judged.
        required: Signatures that must be there when `keys` are given.

    """
    try:
        with open_plain(folder / "manifest.json") as file:
            content = file.read(MAX_MANIFEST + 1)
        manifest = parse_manifest(content)
    except RefusedError as error:
        yield Finding(TAMPERED, "manifest", "manifest.json", found=error.message)
        return
    yield from _check_signatures(folder, content, keys, required)
    yield from _check_head(folder, manifest)
    yield from _check_since(folder, manifest)
    listed = {entry.path: entry for entry in manifest.files}
    there = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield Finding(TAMPERED, "manifest", name, found="a link or special file")
        elif path.is_file() and name not in {"manifest.json", SIGNATURES}:
            there.add(name)
    for name in sorted(there - set(listed)):
        yield Finding(TAMPERED, "manifest", name, found="a file that is not listed")
    for name, entry in listed.items():
        if name not in there:
            yield Finding(TAMPERED, "manifest", name, expected="a file", found="nothing")
        elif file_entry(folder, name) != entry:
            yield Finding(TAMPERED, "manifest", name, expected=entry.sha256, found="other content")
    yield from _check_rows(Layout(folder), manifest)
    yield from _check_bundles(Layout(folder), manifest)
    yield from _check_tile_names(Layout(folder), manifest.size)


def file_entry(folder: Path, name: str) -> FileEntry:
    """Return length and digests of a file of the export."""
    sha256, sha384, size = hashlib.sha256(), hashlib.sha384(), 0
    with open_plain(folder / name) as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            sha384.update(block)
            size += len(block)
    return FileEntry(path=name, bytes=size, sha256=sha256.hexdigest(), sha384=sha384.hexdigest())


def bundle_entry(line: bytes) -> bytes:
    """Return a line as an entry bundle of tlog-tiles holds it: after its length in two bytes."""
    return len(line).to_bytes(2, "big") + line


def _check_signatures(
    folder: Path, content: bytes, keys: ExportPublic | None, required: Sequence[str]
) -> Iterator[Finding]:
    try:
        with open_plain(folder / SIGNATURES) as file:
            signatures = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        signatures = b""
    if keys is None:
        said = _UNCHECKED if signatures else _UNSIGNED
        yield Finding(NOTE, "manifest", "manifest.json", found=said)
        return
    try:
        keys.verify(content, signatures, required)
    except RefusedError as error:
        yield Finding(TAMPERED, "manifest signature", SIGNATURES, found=error.message)


def _check_head(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """The manifest says of itself what the signed head and the files say."""
    try:
        there = segment_range(Layout(folder))
        with open_plain(Layout(folder).checkpoint) as file:
            head = parse_checkpoint(file.read(MAX_NOTE + 1))
    except (RefusedError, FileNotFoundError):
        return  # Reported by the main pass.
    said = (manifest.origin, manifest.first, manifest.size, manifest.root)
    root = base64.b64encode(head.root).decode()
    signed = (head.origin, there.start * SEGMENT, head.size, root)
    if said != signed:
        yield Finding(TAMPERED, "manifest", "manifest.json", expected=f"{signed}", found=f"{said}")


def _check_since(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """The earlier tree is a beginning of this one."""
    if manifest.since is None:
        return
    try:
        with open_plain(folder / CONSISTENCY) as file:
            request = parse_request(file.read(MAX_NOTE + 8_192))
        since = (manifest.since.size, strict_hash(manifest.since.root))
        root = strict_hash(manifest.root)
        verify_consistency(request.old, manifest.size, since[1], root, request.proof)
        if (request.old, request.checkpoint.size, request.checkpoint.root) != (
            since[0], manifest.size, root,
        ):  # fmt: skip
            yield Finding(TAMPERED, "consistency", CONSISTENCY, found="a proof for other sizes")
    except (RefusedError, FileNotFoundError, ValueError) as error:
        yield Finding(TAMPERED, "consistency", CONSISTENCY, found=str(error)[:120])


def _check_rows(layout: Layout, manifest: Manifest) -> Iterator[Finding]:
    """Write every derived row again and compare it with the file."""
    chosen, name = find_format(manifest.rows), manifest.rows_file
    if chosen is None or name != chosen.file or not (layout.folder / name).is_file():
        yield Finding(TAMPERED, "rows", name, found="not the derived file of this format")
        return
    found = read_lines(layout.folder / name)
    if chosen.header and next(found, b"") != chosen.header:
        yield Finding(TAMPERED, "rows", name, found="another header")
        return
    for seq, line in enumerate(_lines(layout), manifest.first):
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


def _check_bundles(layout: Layout, manifest: Manifest) -> Iterator[Finding]:
    """Write every entry bundle again and compare it with the file."""
    folder = layout.tiles / BUNDLES
    wanted: dict[str, bytes] = {}
    bundle: list[bytes] = []
    for seq, line in enumerate(_lines(layout), manifest.first):
        bundle.append(bundle_entry(line) if len(line) < 1 << 16 else b"")
        if (seq + 1) % WIDTH == 0 or seq + 1 == manifest.size:
            name = tile_name(0, seq // WIDTH, len(bundle)).removeprefix("0/")
            wanted[name] = hashlib.sha256(b"".join(bundle)).digest()
            bundle.clear()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            with open_plain(path) as file:
                found = hashlib.file_digest(file, "sha256").digest()
            if wanted.pop(name, b"") != found:
                yield Finding(
                    TAMPERED, "entry bundle", f"log/tile/{BUNDLES}/{name}", found="other lines"
                )
    for name in sorted(wanted):
        yield Finding(TAMPERED, "entry bundle", f"log/tile/{BUNDLES}/{name}", found="nothing")


def _check_tile_names(layout: Layout, size: int) -> Iterator[Finding]:
    """Only tiles of this tree are there; what they hold is compared by the main pass."""
    there = {
        path.relative_to(layout.tiles).as_posix()
        for path in layout.tiles.rglob("*")
        if path.is_file()
    }
    for name in sorted(there):
        if not name.startswith(f"{BUNDLES}/") and not is_tile_of(name, size):
            yield Finding(
                TAMPERED, "tile", f"log/tile/{name}", found="of records that are not there"
            )


def _lines(layout: Layout) -> Iterator[bytes]:
    """Yield every whole line of an export, without its newline."""
    try:
        there = segment_range(layout)
    except RefusedError:
        return  # The main pass reports it.
    for index in there:
        for line in read_lines(layout.segment(index)):
            if line.endswith(b"\n"):
                yield line[:-1]


def _inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return not path.startswith("/") and ".." not in parts and "/".join(parts) == path
