"""The container: one deterministic pax tar, and the reader that accepts nothing else.

The head of an archive is read here, and its manifest is held against the layout; FORMAT.md sections
2 and 3. `bundle.write` makes archives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bundle import merkle
from bundle.envelope import ENVELOPE_SIZE
from bundle.manifest import MANIFEST_LIMIT, Body, Manifest
from bundle.source import Source, read_exactly
from bundle.tar import ALIGN, BLOCK, Layout, explain, header_blocks, parse_size, round_up
from policy.errors import RefusedError

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


@dataclass(frozen=True, slots=True)
class Head:
    """The raw head of an archive as it stands in the file. Nothing in it is trusted."""

    envelope: bytes
    trust: bytes
    manifest: bytes
    chunks: bytes
    body_start: int


# -- reading ----------------------------------------------------------------------------------


def read_head(source: Source) -> Head:
    """Read the four members of the head and nothing else.

    Raises:
        RefusedError: `archive.truncated`, `.header`, `.type`, `.name`, `.order`, `.limit`,
            `.padding`.

    """
    parts: list[bytes] = []
    position = 0
    for index, (path, limit) in enumerate(HEAD):
        header, length = _read_header(source, position, index)
        if length > limit or position + len(header) + length > HEAD_LIMIT:
            raise RefusedError("archive.limit", f"{path} has {length:,} bytes, more than {limit:,}")
        if path == ENVELOPE and length != ENVELOPE_SIZE:
            raise RefusedError(
                "archive.header", f"{path} has {length:,} bytes, not {ENVELOPE_SIZE:,}"
            )
        start = position + len(header)
        parts.append(_read_head_part(source, start, length))
        end = round_up(start + length, BLOCK)
        if _read_head_part(source, start + length, end - start - length).strip(b"\0"):
            raise RefusedError("archive.padding", f"bytes after {path} are not zero")
        position = end
    envelope, trust, manifest, chunks = parts
    return Head(envelope, trust, manifest, chunks, body_start=position)


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


def head_bytes(envelope: bytes, trust: bytes, manifest: bytes, chunks: bytes) -> bytes:
    """Return the head of an archive; it ends at a multiple of 4096.

    Raises:
        RefusedError: `archive.limit`.

    """
    parts: list[bytes] = []
    position = 0
    for (path, limit), content in zip(
        HEAD, (envelope.ljust(ENVELOPE_SIZE), trust, manifest, chunks), strict=True
    ):
        if len(content) > limit:
            raise RefusedError("archive.limit", f"{path} would have {len(content):,} bytes")
        ends_at = -round_up(len(content), BLOCK) % ALIGN if path == CHUNKS else None
        header = header_blocks(path, len(content), position, ends_at=ends_at)
        padding = bytes(-len(content) % BLOCK)
        parts += [header, content, padding]
        position += len(header) + len(content) + len(padding)
    if position > HEAD_LIMIT:
        raise RefusedError("archive.limit", f"the head would have {position:,} bytes")
    return b"".join(parts)


def hash_function(body: Body) -> merkle.HashFunction:
    """Return the hash of the body's tree."""
    return hashlib.sha384 if body.hash == "sha384" else hashlib.sha256


def sums_text(digests: Sequence[tuple[str, str]]) -> bytes:
    """Return `META/SHA256SUMS` from path and digest of every other file, for `sha256sum -c`."""
    return "".join(f"{digest}  {path}\n" for path, digest in digests).encode()


def _read_header(source: Source, position: int, index: int) -> tuple[bytes, int]:
    """Return the header blocks of the head's member `index`, checked, and its size in bytes."""
    path = HEAD[index][0]
    order = {name for name, _ in HEAD}
    raw = _read_head_part(source, position, BLOCK, opening=index == 0)
    if raw[156:157] == b"x" and path == CHUNKS:
        length = parse_size(raw)
        if length is None or not 0 < length <= 2 * ALIGN or length % BLOCK:
            raise RefusedError("archive.header", f"the extended header of {path} is malformed")
        raw += _read_head_part(source, position + BLOCK, length + BLOCK)
    last = raw[-BLOCK:]
    size = parse_size(last)
    aligned = path == CHUNKS
    expected = b""
    if size is not None:
        ends_at = -round_up(size, BLOCK) % ALIGN if aligned else None
        expected = header_blocks(path, size, position, ends_at=ends_at)
    if raw != expected:
        # Only the chunk list may have an extended header.
        raise explain(last if aligned else raw, path, order=order - {CHUNKS} if aligned else order)
    return raw, size or 0


# -- bytes ------------------------------------------------------------------------------------


def _read_head_part(source: Source, offset: int, length: int, *, opening: bool = False) -> bytes:
    found = max(0, min(length, source.size - offset))
    raw = read_exactly(source, offset, found)
    if found < length:
        start = header_blocks(ENVELOPE, ENVELOPE_SIZE, 0, ends_at=None)
        if opening and not start.startswith(raw):
            raise explain(raw, ENVELOPE)
        raise RefusedError(
            "archive.truncated",
            f"the file ends at byte {offset + found:,}, inside its head",
            hint="copy it again from the medium",
        )
    return raw
