"""Writing: one pass over the sources, all cores, nothing under the name before it is complete.

The layout follows from names and sizes alone, so the body is written first and the head last. The
list of digests, `META/SHA256SUMS`, stands at the front of the body and is filled in at the end: its
size is known before its content. A run that is killed may leave its chunks to the next one, which
hashes each of them again before it takes it over. FORMAT.md sections 2 and 3.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
    kept: Kept | None = None,
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
        kept: Where an interrupted run left its chunks, and where this one will.

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
    partial = None if kept is None else kept.begin(_key(ordered, layout, body, body_start))
    with (
        fresh_file(out, body_start + layout.size, partial=partial) as stream,
        _Hashing(body, kept) as hashing,
    ):
        writing = _Body(stream, body_start, layout, ordered, hashing, progress)
        digests = writing.write(kept)
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


class Kept:
    """What an interrupted run leaves in a folder of its own: the unfinished file and its leaves.

    `folder/leaves` is a key, over all that decides the bytes, and then the leaf hash of each chunk
    that was written. It is a hint and no proof: a chunk is read back and hashed before it counts,
    so no order of writes needs to be durable. `resumed` counts the chunks that were taken over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = -1
        self._held = b""
        self.resumed = 0

    def begin(self, key: bytes) -> Path:
        """Return the path of the unfinished file; what another release left is removed."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        archive, leaves = self._folder / "archive", self._folder / "leaves"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._journal = os.open(leaves, flags, 0o600)
        self._held = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        if not key or self._held[: len(key)] != key:
            _remove(archive)
            os.ftruncate(self._journal, 0)
            os.pwrite(self._journal, key, 0)
            self._held = key
        self._key = len(key)
        return archive

    def leaf(self, index: int, width: int) -> bytes:
        """Return the leaf hash that was noted for a chunk, or nothing."""
        found = self._held[self._key + index * width :][:width]
        return found if len(found) == width and any(found) else b""

    def note(self, index: int, leaf: bytes) -> None:
        """Remember that a chunk is written."""
        os.pwrite(self._journal, leaf, self._key + index * len(leaf))

    def forget(self) -> None:
        """Have the next run begin anew."""
        os.ftruncate(self._journal, 0)

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


@contextlib.contextmanager
def fresh_file(
    out: Path, size: int, *, partial: Path | None = None, resume: bool = False
) -> Iterator[BinaryIO]:
    """Yield a file beside `out` that takes its name when the block ends well, and else goes away.

    Args:
        out: Replaced if it exists.
        size: In bytes, of the finished file: there must be room for it.
        partial: The unfinished file, which stays when the block does not end well: it is the
            caller's. By default it lies beside `out`, and only a killed run leaves it.
        resume: Begin with what a killed run left; the caller checks every byte of it.

    Raises:
        FaultError: `host.space`, `host.io`; `host.state`, another run writes it.

    """
    place = partial or partial_of(out)
    resume = resume or partial is not None
    try:
        with open(place, "r+b", opener=_open_own) as stream:
            _hold(stream.fileno(), out)
            try:
                if not resume:
                    stream.truncate(0)
                held = os.fstat(stream.fileno()).st_blocks * 512
                require_space(out.absolute().parent, max(0, size - held))
                yield stream
                stream.flush()
                stream.truncate(size)
                os.fsync(stream.fileno())
                place.chmod(0o644)
                place.replace(out)
            except BaseException:
                if partial is None:
                    _remove(place)
                raise
    except OSError as error:
        raise full_disk(error, out) from error


def partial_of(out: Path) -> Path:
    """Return where the unfinished file of `out` lies."""
    return out.with_name(f".{out.name}.partial")


def _open_own(path: str, _: int) -> int:
    """Open an unfinished file, which need not exist; a link is not followed."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _hold(descriptor: int, out: Path) -> None:
    """Hold an unfinished file, so that no two runs write to it; a killed one has let go."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FaultError(
            "host.state",
            f"another command is writing {str(out)!r:.160}",
            hint="wait for it, or name another output",
        ) from error


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
    kept: Kept | None = None
    _leaves: list[Future[bytes]] = field(default_factory=list)
    _updates: deque[Future[Any]] = field(default_factory=deque)
    _noted: int = 0

    def __enter__(self) -> Self:
        self.limit = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        self.h = hash_function(self.body)
        self._pool = ThreadPoolExecutor(self.limit, thread_name_prefix="leaf")
        self._line = ThreadPoolExecutor(1, thread_name_prefix="digest")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._line.shutdown(wait=True, cancel_futures=True)
        if self.kept is not None:
            self.kept.close()

    def submit(self, chunk: bytes) -> Future[bytes]:
        """Begin to hash a chunk."""
        return self._pool.submit(merkle.leaf_hash, chunk, self.h)

    def add(self, leaf: Future[bytes]) -> None:
        """Take the leaf of the next chunk, which is written; bounds the chunks held in memory."""
        self._leaves.append(leaf)
        while len(self._leaves) - self._noted > self.limit + 2:
            self._note()

    def leaves(self) -> list[bytes]:
        """Return the leaf hashes of all that was added."""
        while self._noted < len(self._leaves):
            self._note()
        return [future.result() for future in self._leaves]

    def _note(self) -> None:
        leaf = self._leaves[self._noted].result()
        if self.kept is not None:
            self.kept.note(self._noted, leaf)
        self._noted += 1

    def hashers(self) -> tuple[Any, ...]:
        """Return the hashers of one file: SHA-256, and SHA-384 where the profile asks for it."""
        both = self.body.hash == "sha384"
        return (hashlib.sha256(), hashlib.sha384()) if both else (hashlib.sha256(),)

    def feed(self, hashers: Sequence[Any], data: bytes | memoryview) -> None:
        """Hash the next bytes of a file, in order, while the caller goes on."""
        for hasher in hashers:
            self._updates.append(self._line.submit(hasher.update, data))
        while len(self._updates) > 2 * self.limit + 8:
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


@dataclass
class _Body:
    """The body while it is written, chunk by chunk."""

    stream: BinaryIO
    start: int
    layout: Layout
    members: Sequence[Member]
    hashing: _Hashing
    progress: Progress | None
    _open: tuple[int, BinaryIO] | None = None
    _hashers: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    _digests: dict[int, tuple[str, str | None]] = field(default_factory=dict)

    def write(self, kept: Kept | None) -> list[tuple[str, str | None]]:
        """Write what is not there yet; return the digests of the files."""
        try:
            self._pass_empty()
            for index, found in enumerate(self._ahead(kept)):
                low = index * CHUNK_SIZE
                if found is None:
                    chunk = self._produce(low, min(low + CHUNK_SIZE, self.layout.size))
                    self.stream.seek(self.start + low)
                    self.stream.write(chunk)
                    self.stream.flush()  # what is noted below must be in the file
                    leaf = self.hashing.submit(chunk)
                else:
                    chunk, leaf = found
                self.hashing.add(leaf)
                self._digest(low, chunk, kept)
                if self.progress is not None:
                    self.progress(low + len(chunk), self.layout.size)
        finally:
            self._switch(None)
        return [self._digests[number] for number in range(len(self.members))]

    def _pass_empty(self) -> None:
        """Look at the files that have no byte, and so no place in a chunk."""
        for number, (_, size) in enumerate(self.layout.files):
            if not size:
                self._read(number, 0, memoryview(b""))
                self._digests[number] = self.hashing.digest(b"")

    def _ahead(self, kept: Kept | None) -> Iterator[tuple[bytes, Future[bytes]] | None]:
        """Yield, for each chunk, what an earlier run left of it if that holds, else nothing."""
        count, width = -(-self.layout.size // CHUNK_SIZE), len(merkle.empty_root(self.hashing.h))
        waiting: deque[tuple[bytes, Future[bytes], bytes] | None] = deque()
        for index in range(count + self.hashing.limit):
            if index < count:
                wanted = b"" if kept is None else kept.leaf(index, width)
                waiting.append(self._reread(index, wanted) if wanted else None)
            if index >= min(self.hashing.limit, count) and waiting:
                found = waiting.popleft()
                if found is None or kept is None or found[1].result() != found[2]:
                    yield None
                else:
                    kept.resumed += 1
                    yield found[0], found[1]

    def _reread(self, index: int, wanted: bytes) -> tuple[bytes, Future[bytes], bytes]:
        """Begin to hash what the unfinished file holds in the place of a chunk."""
        low = index * CHUNK_SIZE
        size = min(CHUNK_SIZE, self.layout.size - low)
        chunk = os.pread(self.stream.fileno(), size, self.start + low)
        return chunk, self.hashing.submit(chunk), wanted

    def _produce(self, low: int, high: int) -> bytes:
        """Return bytes of the body, made of headers and of what the sources hold."""
        chunk = bytearray(high - low)
        for at, gap, _ in self.layout.gaps(low, high):
            start, end = max(at, low), min(at + len(gap), high)
            chunk[start - low : end - low] = gap[start - at : end - at]
        view = memoryview(chunk)
        for number, within, start, end in self.layout.spans(low, high):
            self._read(number, within, view[start - low : end - low])
        view.release()
        return bytes(chunk)

    def _read(self, number: int, within: int, part: memoryview) -> None:
        """Fill `part` from a source; FaultError `host.io` when it is not the one of before."""
        member, filled = self.members[number], 0
        if isinstance(member.source, bytes):
            part[:] = member.source[within : within + len(part)]
            return
        try:
            stream = self._switch(number)
            if stream.tell() != within:
                stream.seek(within)
            while filled < len(part) and (data := stream.read(min(_READ, len(part) - filled))):
                part[filled : filled + len(data)] = data
                filled += len(data)
            whole = within + filled == self.layout.files[number][1]
            more = stream.read(1) if whole else b""
        except OSError as error:
            raise FaultError(
                "host.io", f"{member.path}: the source cannot be read: {error.strerror}"
            ) from error
        if filled < len(part) or more:
            raise _changed(member)

    def _switch(self, number: int | None) -> BinaryIO:
        """Have the source `number` open, and no other."""
        if self._open is not None and self._open[0] == number:
            return self._open[1]
        if self._open is not None:
            self._open[1].close()
            self._open = None
        source = None if number is None else self.members[number].source
        if number is None or not isinstance(source, Path):
            return self.stream
        self._open = (number, source.open("rb"))
        return self._open[1]

    def _digest(self, low: int, chunk: bytes, kept: Kept | None) -> None:
        """Hash the bytes of files in a chunk; a file that ends in it must be the one named."""
        view = memoryview(chunk)
        for number, within, start, end in self.layout.spans(low, low + len(chunk)):
            hashers = self._hashers.setdefault(number, self.hashing.hashers())
            self.hashing.feed(hashers, view[start - low : end - low])
            if within + end - start == self.layout.files[number][1]:
                self._digests[number] = self.hashing.finish(self._hashers.pop(number))
                if self.members[number].sha256 not in {None, self._digests[number][0]}:
                    if kept is not None:
                        kept.forget()  # a chunk of it was taken from other bytes
                    raise _changed(self.members[number])


def _changed(member: Member) -> FaultError:
    return FaultError(
        "host.io",
        f"{member.path}: the source is not the one that was measured",
        hint="nothing else may write to the source while a bundle is built",
    )


def _key(members: Sequence[Member], layout: Layout, body: Body, body_start: int) -> bytes:
    """Return a digest over all that decides the bytes of the body; nothing if a digest lacks."""
    hasher = hashlib.sha256(f"{body.hash} {body_start}\n".encode())
    for member, (path, size) in zip(members, layout.files, strict=True):
        source = member.source
        known = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else member.sha256
        if known is None:
            return b""
        hasher.update(f"{known} {size} {path}\n".encode())
    return hasher.digest()


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
