"""The container: one deterministic pax tar, and the reader that accepts nothing else.

The writer's layout follows from paths and sizes alone, so the reader re-creates every header and
every gap and compares bytes. It never interprets a header that the writer would not have written;
FORMAT.md sections 2 and 3.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from bundle import merkle
from bundle.envelope import ENVELOPE_SIZE, Envelope
from bundle.manifest import (
    CHUNK_SIZE,
    MANIFEST_LIMIT,
    SUMS,
    Body,
    FileEntry,
    Manifest,
    Origin,
    Release,
    Role,
    body_key,
    canonical,
    parse_manifest,
    require_paths,
)
from policy.errors import FaultError, RefusedError

BLOCK = 512
ALIGN = 4096
HEAD_LIMIT = 16 * 1024 * 1024
TRUST_LIMIT = 2 * 1024 * 1024

ENVELOPE = "META/envelope.dsse.json"
TRUST = "META/trust.json"
MANIFEST = "META/manifest.json"
CHUNKS = "META/chunks.bin"
HEAD: tuple[tuple[str, int], ...] = (
    (ENVELOPE, ENVELOPE_SIZE),
    (TRUST, TRUST_LIMIT),
    (MANIFEST, MANIFEST_LIMIT),
    (CHUNKS, HEAD_LIMIT),
)

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_NAME = slice(0, 100)
_SIZE = slice(124, 136)
_TYPE = 156
_OCTAL_MAX = 0o77777777777
_PAX_NAME = b"././@PaxHeader"
_END = 2 * BLOCK
_READ = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Member:
    """One file to be written: where it goes, where its bytes are, and what is said about it.

    `sha256` is bare hex; when it is given the source is read once and must match.
    """

    path: str
    source: Path | bytes
    role: Role
    media_type: str = "application/octet-stream"
    origin: Origin | None = None
    derived_from: tuple[str, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The raw head of an archive as it stands in the file. Nothing in it is trusted."""

    envelope: bytes
    trust: bytes
    manifest: bytes
    chunks: bytes
    body_start: int
    file_size: int


class Layout:
    """Where each file of a body lies, and what the bytes between them must be.

    Follows from the paths and sizes alone; offsets count from the first byte of the body.
    """

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self.files = files  # path and size in bytes, in the order of the body
        self.offsets: list[int] = []
        self._starts: list[int] = []
        position = 0
        for path, size in files:
            self._starts.append(position)
            start = _round_up(position, BLOCK)
            offset = start + len(_header(path, size, start, ends_at=0))
            self.offsets.append(offset)
            position = offset + size
        self._starts.append(position)
        self.size = _round_up(_round_up(position, BLOCK) + _END, ALIGN)

    def gaps(self, low: int, high: int) -> Iterator[tuple[int, bytes, int]]:
        """Yield (start, bytes, index) of each gap that overlaps `low` up to `high`.

        A gap holds the padding after one file and the headers of the next; the last one has the
        index of no file and holds the end of the archive.
        """
        index = max(0, bisect_right(self._starts, low) - 1)
        while index < len(self._starts) and self._starts[index] < high:
            expected = self.gap(index)
            if self._starts[index] + len(expected) > low:
                yield self._starts[index], expected, index
            index += 1

    def spans(self, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (file index, offset in the file, start, end) of file bytes in `low` to `high`."""
        index = max(0, bisect_right(self.offsets, low) - 1)
        while index < len(self.offsets) and self.offsets[index] < high:
            start = max(low, self.offsets[index])
            end = min(high, self.offsets[index] + self.files[index][1])
            if start < end:
                yield index, start - self.offsets[index], start, end
            index += 1

    def gap(self, index: int) -> bytes:
        """Return the padding before file `index` and its headers, or the end after the last."""
        if index == len(self.files):
            return bytes(self.size - self._starts[index])
        return bytes(self.padding(index)) + self.header(index)

    def padding(self, index: int) -> int:
        """Return how many zero bytes stand before the headers of file `index`."""
        return -self._starts[index] % BLOCK

    def header(self, index: int) -> bytes:
        """Return the header blocks of file `index`."""
        path, size = self.files[index]
        return _header(path, size, self._starts[index] + self.padding(index), ends_at=0)


# -- reading ----------------------------------------------------------------------------------


def open_file(path: Path) -> FileIO:
    """Open a plain file for reading.

    Raises:
        FaultError: `host.io`; it cannot be opened.
        RefusedError: `archive.type`; it is no plain file.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FaultError(
            "host.io", f"the bundle {str(path)!r:.200} cannot be read: {reason}"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError("archive.type", f"{str(path)!r:.200} is not a plain file")
    return FileIO(descriptor, "rb")


def read_head(stream: FileIO) -> Head:
    """Read the four members of the head and nothing else.

    Raises:
        RefusedError: `archive.truncated`, `.header`, `.type`, `.name`, `.order`, `.limit`,
            `.padding`.

    """
    size = os.fstat(stream.fileno()).st_size
    parts: list[bytes] = []
    position = 0
    for index, (path, limit) in enumerate(HEAD):
        header, length = _read_header(stream, position, index)
        if length > limit or position + len(header) + length > HEAD_LIMIT:
            raise RefusedError("archive.limit", f"{path} has {length:,} bytes, more than {limit:,}")
        if path == ENVELOPE and length != ENVELOPE_SIZE:
            raise RefusedError(
                "archive.header", f"{path} has {length:,} bytes, not {ENVELOPE_SIZE:,}"
            )
        start = position + len(header)
        parts.append(_read_exactly(stream, start, length))
        end = _round_up(start + length, BLOCK)
        if _read_exactly(stream, start + length, end - start - length).strip(b"\0"):
            raise RefusedError("archive.padding", f"bytes after {path} are not zero")
        position = end
    envelope, trust, manifest, chunks = parts
    return Head(envelope, trust, manifest, chunks, body_start=position, file_size=size)


def parse_leaves(head: Head, body: Body) -> list[bytes]:
    """Return the leaf hashes if they lead to the root that the manifest states.

    Raises:
        RefusedError: `chunk.root`.

    """
    h = hash_function(body)
    width = len(merkle.empty_root(h))
    count = -(-body.size // body.chunk_size)
    if body.leaves != count or len(head.chunks) != count * width:
        raise RefusedError(
            "chunk.root",
            f"{CHUNKS} has {len(head.chunks):,} bytes for {count:,} chunks of {width} bytes",
        )
    leaves = [head.chunks[i : i + width] for i in range(0, len(head.chunks), width)]
    found = merkle.root(leaves, h).hex()
    if found != body.root:
        raise RefusedError("chunk.root", f"expected tree root {body.root}, {CHUNKS} gives {found}")
    return leaves


def plan(manifest: Manifest) -> Layout:
    """Return the layout of a manifest's body, which must be the one that the manifest states.

    Raises:
        RefusedError: `manifest.layout`.

    """
    layout = Layout([(entry.path, entry.size) for entry in manifest.files])
    for entry, offset in zip(manifest.files, layout.offsets, strict=True):
        if entry.offset != offset:
            raise RefusedError(
                "manifest.layout",
                f"{entry.path!r:.80} is listed at {entry.offset}, but must lie at {offset}",
            )
    if layout.size != manifest.body.size:
        raise RefusedError(
            "manifest.layout",
            f"the listed files need {layout.size:,} bytes, the body has {manifest.body.size:,}",
        )
    return layout


def require_length(head: Head, body: Body) -> None:
    """Check that the file ends where the body ends: `archive.truncated` or `archive.trailing`."""
    expected = head.body_start + body.size
    if head.file_size < expected:
        raise RefusedError(
            "archive.truncated",
            f"the file has {head.file_size:,} of {expected:,} bytes",
            hint="copy it again from the medium",
        )
    if head.file_size > expected:
        raise RefusedError(
            "archive.trailing", f"{head.file_size - expected:,} bytes follow the end of the archive"
        )


def require_gaps(layout: Layout, chunk: memoryview, start: int) -> None:
    """Compare all headers and padding inside one chunk of the body with their only allowed form.

    Raises:
        RefusedError: `archive.padding`, `.type`, `.name`, `.header`.

    """
    end = start + len(chunk)
    for at, expected, index in layout.gaps(start, end):
        low, high = max(at, start), min(at + len(expected), end)
        if chunk[low - start : high - start] != expected[low - at : high - at]:
            found = bytes(chunk[low - start : high - start])
            raise _explain_gap(layout, found, expected[low - at : high - at], low - at, index)


def hash_function(body: Body) -> merkle.HashFunction:
    """Return the hash of the body's tree."""
    return hashlib.sha384 if body.hash == "sha384" else hashlib.sha256


def sums_text(digests: Sequence[tuple[str, str]]) -> bytes:
    """Return `META/SHA256SUMS` from path and digest of every other file, for `sha256sum -c`."""
    return "".join(f"{digest}  {path}\n" for path, digest in digests).encode()


# -- writing ----------------------------------------------------------------------------------


def write_archive(
    out: Path,
    release: Release,
    members: Sequence[Member],
    *,
    trust_chain: bytes,
    seal: Callable[[Manifest], Envelope],
    progress: Progress | None = None,
) -> Manifest:
    """Write a bundle and return its manifest; the same input gives the same body and manifest.

    The file appears under its name when it is complete and sealed, and never before.

    Args:
        out: Replaced if it exists.
        release: All facts beside the list of files.
        members: Every file but `META/SHA256SUMS`, in any order.
        trust_chain: `META/trust.json`, from `trust.chain_document`.
        seal: Signs the finished manifest; called once.
        progress: Told the bytes of the body.

    Raises:
        RefusedError: `manifest.paths`, or another code of the manifest.
        FaultError: `host.io`; a source changed or cannot be read.

    """
    ordered = sorted(members, key=lambda member: body_key(member.path))
    require_paths([SUMS, *(member.path for member in ordered)])
    digests = [member.sha256 or _digest_of(member.source) for member in ordered]
    sums = sums_text([(m.path, digest) for m, digest in zip(ordered, digests, strict=True)])
    ordered.insert(0, Member(SUMS, sums, "sums", "text/plain"))
    digests.insert(0, _digest_of(sums))
    sizes = [_size_of(member.source) for member in ordered]
    layout = Layout([(m.path, size) for m, size in zip(ordered, sizes, strict=True)])
    files = tuple(
        FileEntry(
            path=member.path,
            role=member.role,
            media_type=member.media_type,
            size=size,
            offset=offset,
            sha256=digest,
            origin=member.origin,
            derived_from=member.derived_from,
        )
        for member, size, offset, digest in zip(
            ordered, sizes, layout.offsets, digests, strict=True
        )
    )
    count = -(-layout.size // CHUNK_SIZE)
    body = Body(size=layout.size, chunk_size=CHUNK_SIZE, hash="sha256", root="0" * 64, leaves=count)
    # A root of the right length gives the right head length: the body can be written first.
    draft = parse_manifest(canonical(_complete(release, files, body)))
    body_start = len(_head(b"", trust_chain, canonical(draft), bytes(32 * count)))
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("w+b") as stream:
            stream.seek(body_start)
            leaves = _write_body(stream, layout, ordered, digests, progress)
            manifest = _complete(
                release, files, body.model_copy(update={"root": merkle.root(leaves).hex()})
            )
            envelope = seal(manifest).to_padded()
            stream.seek(0)
            stream.write(_head(envelope, trust_chain, canonical(manifest), b"".join(leaves)))
            stream.flush()
            os.fsync(stream.fileno())
        partial.chmod(0o644)
        partial.replace(out)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return manifest


def rewrite_envelope(path: Path, envelope: Envelope) -> None:
    """Replace the envelope of a bundle in place: 131,072 bytes change, nothing moves."""
    padded = envelope.to_padded()
    with open_file(path) as check:
        read_head(check)
    try:
        with path.open("r+b") as stream:
            stream.seek(BLOCK)
            stream.write(padded)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise FaultError(
            "host.io", f"{path} cannot be written: {error.strerror}", hint="copy it to a disk first"
        ) from error


# -- headers ----------------------------------------------------------------------------------


def _header(path: str, size: int, start: int, *, ends_at: int | None) -> bytes:
    """Return all header blocks of a member that begins at `start`.

    The headers end at a position that is `ends_at` modulo 4096, or where they happen to end.
    """
    records = b""
    plain = path.isascii() and len(path) <= 100  # noqa: PLR2004 - the ustar name field
    if not plain:
        records += _record(b"path", path.encode())
    if size > _OCTAL_MAX:
        records += _record(b"size", str(size).encode())
    extension = _extension(records, start, ends_at)
    name = path.encode() if plain else path.encode("ascii", "replace").replace(b"?", b"_")[_NAME]
    return extension + _ustar(name, size if size <= _OCTAL_MAX else 0, b"0")


def _extension(records: bytes, start: int, ends_at: int | None) -> bytes:
    """Return the pax header block and its records, padded by a comment to reach the alignment."""
    if not records and (ends_at is None or (start + BLOCK - ends_at) % ALIGN == 0):
        return b""
    blocks = max(1, -(-len(records) // BLOCK))
    while True:
        end = start + (blocks + 2) * BLOCK
        rest = blocks * BLOCK - len(records)
        if (ends_at is None or (end - ends_at) % ALIGN == 0) and (rest == 0 or rest > 12):  # noqa: PLR2004 - `12 comment=\n` would be an empty value
            break
        blocks += 1
    if rest:
        records += _comment(rest)
    return _ustar(_PAX_NAME, len(records), b"x") + records


def _record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    if len(str(total)) > len(str(length)):
        total += 1
    return b"%d %s=%s\n" % (total, key, value)


def _comment(total: int) -> bytes:
    """Return a comment record of exactly `total` bytes."""
    prefix = b"%d comment=" % total
    return prefix + b"p" * (total - len(prefix) - 1) + b"\n"


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    """Return one 512-byte header with the only metadata that a bundle carries."""
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = b"0000444\0"
    block[108:116] = b"0000000\0"
    block[116:124] = b"0000000\0"
    block[_SIZE] = b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[148:156] = b"        "
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _read_header(stream: FileIO, position: int, index: int) -> tuple[bytes, int]:
    """Return the header blocks of the head's member `index`, checked, and its size in bytes."""
    path = HEAD[index][0]
    raw = _read_exactly(stream, position, BLOCK, opening=index == 0)
    if raw[_TYPE : _TYPE + 1] == b"x" and path == CHUNKS:
        length = _octal(raw[_SIZE])
        if length is None or not 0 < length <= 2 * ALIGN or length % BLOCK:
            raise RefusedError("archive.header", f"the extended header of {path} is malformed")
        raw += _read_exactly(stream, position + BLOCK, length + BLOCK)
    last = raw[-BLOCK:]
    size = _octal(last[_SIZE])
    aligned = path == CHUNKS
    expected = b""
    if size is not None:
        ends_at = -_round_up(size, BLOCK) % ALIGN if aligned else None
        expected = _header(path, size, position, ends_at=ends_at)
    if raw != expected:
        raise _explain(last if aligned else raw, path, what=path)
    return raw, size or 0


def _explain(found: bytes, path: str, *, what: str) -> RefusedError:
    """Name the reason why a header block is not the expected one."""
    if found[257:262] != b"ustar":
        return RefusedError(
            "archive.header",
            f"where the header of {what!r:.80} must stand, there is no tar header",
            hint="this is no bundle, or a damaged one: copy it again from the medium",
        )
    kind = found[_TYPE : _TYPE + 1]
    if kind == b"x" and path in dict(HEAD) and path != CHUNKS:
        return RefusedError("archive.order", f"an extended header where {path} must stand")
    if kind not in {b"0", b"x"}:
        return RefusedError(
            "archive.type", f"a member of type {kind!r} where {what!r:.80} must stand"
        )
    name = found[_NAME].split(b"\0", maxsplit=1)[0]
    if kind == b"0" and name != path.encode()[_NAME]:
        others = {member.encode() for member, _ in HEAD}
        code = "archive.order" if name in others and path in dict(HEAD) else "archive.name"
        return RefusedError(code, f"member {name!r:.80} where {what!r:.80} must stand")
    return RefusedError(
        "archive.header", f"the header of {what!r:.80} is not the one that staging writes"
    )


def _explain_gap(
    layout: Layout, found: bytes, expected: bytes, skipped: int, index: int
) -> RefusedError:
    """Name the reason why a gap, seen from its byte `skipped` on, is not as expected."""
    if index == len(layout.files):
        return RefusedError("archive.padding", "the end of the archive is not zero bytes")
    path, padding = layout.files[index][0], layout.padding(index)
    first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    if skipped + first < padding:
        return RefusedError("archive.padding", f"bytes before {path!r:.80} are not zero")
    block = (skipped + first - padding) // BLOCK * BLOCK + padding - skipped
    # A block that the chunk cuts is not shown whole: then it is a header that differs, no more.
    return _explain(found[block : block + BLOCK] if block >= 0 else b"", path, what=path)


def _octal(field: bytes) -> int | None:
    digits = field[:11]
    if field[11:] != b"\0" or any(digit not in b"01234567" for digit in digits):
        return None
    return int(digits, 8)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# -- bytes ------------------------------------------------------------------------------------


def _read_exactly(stream: FileIO, offset: int, length: int, *, opening: bool = False) -> bytes:
    raw = b""
    while len(raw) < length:
        try:
            more = os.pread(stream.fileno(), length - len(raw), offset + len(raw))
        except OSError as error:
            raise FaultError(
                "host.io", f"the bundle cannot be read at byte {offset}: {error.strerror}"
            ) from error
        if not more:
            break
        raw += more
    if len(raw) < length:
        start = _header(ENVELOPE, ENVELOPE_SIZE, 0, ends_at=None)
        if opening and not start.startswith(raw):
            raise _explain(raw, ENVELOPE, what=ENVELOPE)
        raise RefusedError(
            "archive.truncated",
            f"the file ends at byte {offset + len(raw):,}, inside its head",
            hint="copy it again from the medium",
        )
    return raw


def _head(envelope: bytes, trust: bytes, manifest: bytes, chunks: bytes) -> bytes:
    """Return the head; it ends at a multiple of 4096."""
    parts: list[bytes] = []
    position = 0
    for (path, limit), content in zip(
        HEAD, (envelope.ljust(ENVELOPE_SIZE), trust, manifest, chunks), strict=True
    ):
        if len(content) > limit:
            raise RefusedError("archive.limit", f"{path} would have {len(content):,} bytes")
        ends_at = -_round_up(len(content), BLOCK) % ALIGN if path == CHUNKS else None
        header = _header(path, len(content), position, ends_at=ends_at)
        padding = bytes(-len(content) % BLOCK)
        parts += [header, content, padding]
        position += len(header) + len(content) + len(padding)
    if position > HEAD_LIMIT:
        raise RefusedError("archive.limit", f"the head would have {position:,} bytes")
    return b"".join(parts)


def _complete(release: Release, files: tuple[FileEntry, ...], body: Body) -> Manifest:
    facts = {name: getattr(release, name) for name in type(release).model_fields}
    return Manifest(**facts, files=files, body=body)


def _size_of(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _digest_of(source: Path | bytes) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_body(
    stream: BinaryIO,
    layout: Layout,
    members: Sequence[Member],
    digests: Sequence[str],
    progress: Progress | None,
) -> list[bytes]:
    """Write headers, files and end; return the leaf hashes of the chunks."""
    leaves: list[bytes] = []
    chunk = bytearray()
    done = 0

    def put(data: bytes) -> None:
        nonlocal done
        stream.write(data)
        done += len(data)
        chunk.extend(data)
        while len(chunk) >= CHUNK_SIZE:
            leaves.append(merkle.leaf_hash(memoryview(chunk)[:CHUNK_SIZE]))
            del chunk[:CHUNK_SIZE]
        if progress is not None:
            progress(done, layout.size)

    for index, (member, digest) in enumerate(zip(members, digests, strict=True)):
        put(layout.gap(index))
        expected = layout.files[index][1]
        written, hasher = 0, hashlib.sha256()
        for part in _parts(member.source):
            hasher.update(part)
            written += len(part)
            if written > expected:
                break
            put(part)
        if written != expected or hasher.hexdigest() != digest:
            raise FaultError(
                "host.io",
                f"{member.path}: the source is not the one that was measured ({digest})",
                hint="nothing else may write to the source while a bundle is built",
            )
    put(layout.gap(len(members)))
    if chunk:
        leaves.append(merkle.leaf_hash(chunk))
    return leaves


def _parts(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as stream:
        while part := stream.read(_READ):
            yield part
