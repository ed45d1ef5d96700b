"""Writing: one pass over the sources, all cores, nothing under the name before it is complete.

The layout follows from names and sizes alone, so the body is written first and the head last. The
list of digests, `META/SHA256SUMS`, stands at the front of the body and is filled in at the end: its
size is known before its content. FORMAT.md sections 2 and 3.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from bundle import merkle
from bundle.archive import Progress, hash_function, head_bytes, sums_text
from bundle.envelope import Envelope
from bundle.manifest import (
    CHUNK_SIZE,
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
from bundle.tar import Layout
from policy.errors import FaultError

MARGIN = 1024 * 1024  # bytes that stay free beside a new file
MAX_WORKERS = 8
_READ = 1024 * 1024
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_EMPTY = {"sha256": "0" * 64, "sha384": "0" * 96}


@dataclass(frozen=True, slots=True)
class Member:
    """One file to be written: where it goes, where its bytes are, and what is said about it.

    `sha256` is bare hex; when it is given the source must match.
    """

    path: str
    source: Path | bytes
    role: Role
    media_type: str = "application/octet-stream"
    origin: Origin | None = None
    derived_from: tuple[str, ...] = ()
    sha256: str | None = None


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

    The file appears under its name when it is complete and sealed, and never before. Each source
    is read once.

    Args:
        out: Replaced if it exists.
        release: All facts beside the list of files; its profile chooses the hash.
        members: Every file but `META/SHA256SUMS`, in any order.
        trust_chain: `META/trust.json`, from `trust.chain_document`.
        seal: Signs the finished manifest; called once.
        progress: Told the bytes of the body.

    Raises:
        RefusedError: `manifest.paths`, or another code of the manifest.
        FaultError: `host.space`; `host.io`, a source changed or cannot be read.

    """
    ordered = sorted(members, key=lambda member: body_key(member.path))
    require_paths([SUMS, *(member.path for member in ordered)])
    blank = sums_text([(member.path, _EMPTY["sha256"]) for member in ordered])
    ordered.insert(0, Member(SUMS, blank, "sums", "text/plain"))
    layout = Layout([(member.path, _size_of(member.source)) for member in ordered])
    cnsa2 = release.profile == "cnsa2"
    body = Body(
        size=layout.size,
        chunk_size=CHUNK_SIZE,
        hash="sha384" if cnsa2 else "sha256",
        root=_EMPTY["sha384" if cnsa2 else "sha256"],
        leaves=-(-layout.size // CHUNK_SIZE),
    )
    # Digests and a root of the right length give the right head length: the body is written first.
    blanks = [(_expected(m), _EMPTY["sha384"] if cnsa2 else None) for m in ordered]
    files = _entries(ordered, layout, blanks)
    draft = canonical(parse_manifest(canonical(_complete(release, files, body))))
    width = len(merkle.empty_root(hash_function(body)))
    body_start = len(head_bytes(b"", trust_chain, draft, bytes(width * body.leaves)))
    with fresh_file(out, body_start + layout.size) as stream, _Hashing(body) as hashing:
        stream.seek(body_start)
        digests = _write_body(stream, layout, ordered, hashing, progress)
        sums = sums_text([(m.path, d[0]) for m, d in zip(ordered[1:], digests[1:], strict=True)])
        digests[0] = hashing.digest(sums)
        stream.seek(body_start + layout.offsets[0])
        stream.write(sums)
        stream.flush()
        leaves = hashing.leaves()
        for index in range(1 + (layout.offsets[0] + len(sums) - 1) // CHUNK_SIZE):
            chunk = os.pread(stream.fileno(), CHUNK_SIZE, body_start + index * CHUNK_SIZE)
            leaves[index] = merkle.leaf_hash(
                chunk[: layout.size - index * CHUNK_SIZE], hash_function(body)
            )
        root = merkle.root(leaves, hash_function(body)).hex()
        manifest = _complete(
            release, _entries(ordered, layout, digests), body.model_copy(update={"root": root})
        )
        envelope = seal(manifest).to_padded()
        stream.seek(0)
        stream.write(head_bytes(envelope, trust_chain, canonical(manifest), b"".join(leaves)))
    return manifest


@contextlib.contextmanager
def fresh_file(out: Path, size: int) -> Iterator[BinaryIO]:
    """Yield a file beside `out` that takes its name when the block ends well, and else goes away.

    Args:
        out: Replaced if it exists.
        size: In bytes, of the finished file: there must be room for it.

    Raises:
        FaultError: `host.space`, `host.io`.

    """
    partial = out.with_name(f".{out.name}.partial")
    try:
        require_space(out.absolute().parent, size)
        with partial.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.chmod(0o644)
        partial.replace(out)
    except OSError as error:
        _remove(partial)
        raise full_disk(error, out) from error
    except BaseException:
        _remove(partial)
        raise


def require_space(folder: Path, size: int) -> None:
    """Check that `folder` has room for `size` more bytes: FaultError `host.space` otherwise."""
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < size + MARGIN:
        raise FaultError(
            "host.space",
            f"{folder} has {free:,} bytes free, {size + MARGIN:,} are needed",
            hint="free space there, or name an output on a larger disk",
        )


def full_disk(error: OSError, out: Path) -> FaultError:
    """Turn a failed write into the fault that says what to do."""
    if error.errno in _NO_SPACE:
        return FaultError(
            "host.space",
            f"the disk is full: {str(out)!r:.160} was not written",
            hint="free space there, or name an output on a larger disk",
        )
    return FaultError("host.io", f"{str(out)!r:.160} cannot be written: {error.strerror or error}")


@dataclass
class _Hashing:
    """Hashes chunks on all cores, and files one after another on one more, behind the writer."""

    body: Body
    _leaves: list[Future[bytes]] = field(default_factory=list)
    _updates: deque[Future[Any]] = field(default_factory=deque)
    _chunk: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> Self:
        self._limit = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._limit, thread_name_prefix="leaf")
        self._line = ThreadPoolExecutor(1, thread_name_prefix="digest")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._line.shutdown(wait=True, cancel_futures=True)

    def add(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        self._chunk += data
        while len(self._chunk) >= CHUNK_SIZE:
            self._submit(bytes(memoryview(self._chunk)[:CHUNK_SIZE]))
            del self._chunk[:CHUNK_SIZE]

    def leaves(self) -> list[bytes]:
        """Return the leaf hashes of all that was added; the last chunk may be short."""
        if self._chunk:
            self._submit(bytes(self._chunk))
            self._chunk.clear()
        return [future.result() for future in self._leaves]

    def hashers(self) -> tuple[Any, ...]:
        """Return the hashers of one file: SHA-256, and SHA-384 where the profile asks for it."""
        both = self.body.hash == "sha384"
        return (hashlib.sha256(), hashlib.sha384()) if both else (hashlib.sha256(),)

    def feed(self, hashers: Sequence[Any], data: bytes) -> None:
        """Hash the next bytes of a file, in order, while the caller goes on."""
        for hasher in hashers:
            self._updates.append(self._line.submit(hasher.update, data))
        while len(self._updates) > 2 * self._limit + 8:
            self._updates.popleft().result()

    def finish(self, hashers: Sequence[Any]) -> tuple[str, str | None]:
        """Return SHA-256 and SHA-384 in hex once every byte has been taken."""
        while self._updates:
            self._updates.popleft().result()
        found = [hasher.hexdigest() for hasher in hashers]
        return found[0], found[1] if len(found) > 1 else None

    def digest(self, data: bytes) -> tuple[str, str | None]:
        """Return the digests of a small file."""
        hashers = self.hashers()
        self.feed(hashers, data)
        return self.finish(hashers)

    def _submit(self, chunk: bytes) -> None:
        waiting = len(self._leaves) - self._limit - 2
        if waiting >= 0:
            self._leaves[waiting].result()  # bounds the chunks that are held in memory
        h = hash_function(self.body)
        self._leaves.append(self._pool.submit(merkle.leaf_hash, chunk, h))


def _write_body(
    stream: BinaryIO,
    layout: Layout,
    members: Sequence[Member],
    hashing: _Hashing,
    progress: Progress | None,
) -> list[tuple[str, str | None]]:
    """Write headers, files and end; return the digests of the files."""
    digests: list[tuple[str, str | None]] = []
    done = 0

    def put(data: bytes) -> None:
        nonlocal done
        stream.write(data)
        hashing.add(data)
        done += len(data)
        if progress is not None:
            progress(done, layout.size)

    for index, member in enumerate(members):
        put(layout.gap(index))
        expected, written, hashers = layout.files[index][1], 0, hashing.hashers()
        for part in _parts(member):
            written += len(part)
            if written > expected:
                break
            hashing.feed(hashers, part)
            put(part)
        digests.append(hashing.finish(hashers))
        if written != expected or member.sha256 not in {None, digests[-1][0]}:
            raise FaultError(
                "host.io",
                f"{member.path}: the source is not the one that was measured",
                hint="nothing else may write to the source while a bundle is built",
            )
    put(layout.gap(len(members)))
    return digests


def _entries(
    members: Sequence[Member], layout: Layout, digests: Sequence[tuple[str, str | None]]
) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(
            path=member.path,
            role=member.role,
            media_type=member.media_type,
            size=size,
            offset=offset,
            sha256=sha256,
            sha384=sha384,
            origin=member.origin,
            derived_from=member.derived_from,
        )
        for member, (_, size), offset, (sha256, sha384) in zip(
            members, layout.files, layout.offsets, digests, strict=True
        )
    )


def _complete(release: Release, files: tuple[FileEntry, ...], body: Body) -> Manifest:
    facts = {name: getattr(release, name) for name in type(release).model_fields}
    return Manifest(**facts, files=files, body=body)


def _expected(member: Member) -> str:
    """Return the digest that a member will have; zeros where only reading it all would tell."""
    if member.sha256 is not None:
        return member.sha256
    if member.role != "evidence":  # the manifest says of evidence what its digest is
        return _EMPTY["sha256"]
    return hashlib.sha256(b"".join(_parts(member))).hexdigest()


def _size_of(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _parts(member: Member) -> Iterator[bytes]:
    if isinstance(member.source, bytes):
        yield member.source
        return
    try:
        with member.source.open("rb") as stream:
            while part := stream.read(_READ):
                yield part
    except OSError as error:
        raise FaultError(
            "host.io", f"{member.path}: the source cannot be read: {error.strerror}"
        ) from error


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
