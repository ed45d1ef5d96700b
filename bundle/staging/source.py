"""The closed walk of a snapshot: every file is listed or refused, and nothing outside is followed.

Decides which files a snapshot has. A link is taken only in the hub's own cache layout
(`models--ORG--NAME/snapshots/COMMIT/FILE -> ../../blobs/DIGEST`); every other link, device, pipe or
socket refuses. The bytes are hashed from the descriptor that was checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bundle.manifest import require_paths
from policy.errors import FaultError, RefusedError

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the units done and the units in all; bytes where it hashes."""

MAX_FILES = 4096
MAX_BYTES = 2 * 1024**4
MAX_DEPTH = 8
BLOCK = 4 * 1024 * 1024
HEAD = 64  # bytes read for the detection of a role

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOB = re.compile(r"(?:\.\./)+blobs/([0-9a-f]{40}|[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the snapshot.

    `path` is relative with `/`; `place` is where the bytes lie, after a link of the hub's cache;
    `blob` is the name that the cache gave them (a digest), None outside a cache. `identity` tells a
    file that was replaced or written to between two looks.
    """

    path: str
    place: Path
    size: int
    identity: tuple[int, int, int, int]
    blob: str | None = None


@dataclass(frozen=True, slots=True)
class Digests:
    """The two digests of a file: ours, and the one that git and the hub use for small files."""

    sha256: str
    git_blob: str


def walk(folder: Path) -> tuple[SourceFile, ...]:
    """List every file of the snapshot in bytewise order of its path.

    Raises:
        RefusedError: `source.*`.
        FaultError: `host.io`.

    """
    _require_folder(folder)
    blobs = _blob_folder(folder)
    files = []
    total = 0
    for path, entry in _entries(folder, "", 0):
        found = _file(path, entry, blobs)
        total += found.size
        files.append(found)
        if len(files) > MAX_FILES or total > MAX_BYTES:
            raise RefusedError(
                "source.huge",
                f"{str(folder)!r:.120} holds over {MAX_FILES:,} files "
                f"or {MAX_BYTES // 1024**4} TiB",
                hint="point at the folder of one snapshot, the one that holds config.json",
            )
    if not files:
        raise RefusedError(
            "source.empty",
            f"{str(folder)!r:.120} is empty",
            hint="download the snapshot first, then point at the folder that holds config.json",
        )
    _require_names([file.path for file in files])
    return tuple(sorted(files, key=lambda file: file.path.encode()))


def open_file(file: SourceFile) -> int:
    """Open the file for reading and return the descriptor of what the walk saw.

    Raises:
        RefusedError: `source.changed`.
        FaultError: `host.io`.

    """
    try:
        number = os.open(file.place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _unreadable(file.path, error) from error
    if _identity(os.fstat(number)) != file.identity:
        os.close(number)
        raise RefusedError(
            "source.changed",
            f"{file.path!r:.160} changed while it was being read",
            hint="let the download finish, then inspect again",
        )
    return number


def read_head(file: SourceFile) -> bytes:
    """Return the first bytes of the file."""
    with open(open_file(file), "rb") as opened:
        return opened.read(HEAD)


def hash_file(file: SourceFile, tick: Callable[[int], None]) -> Digests:
    """Hash the whole file; `tick` gets the number of bytes of each block.

    Raises:
        RefusedError: `source.changed`; also when it is written to during the hashing.
        FaultError: `host.io`.

    """
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with open(open_file(file), "rb", buffering=0) as opened:
        buffer = bytearray(BLOCK)
        view = memoryview(buffer)
        while count := opened.readinto(buffer):
            sha256.update(view[:count])
            git.update(view[:count])
            tick(count)
        if _identity(os.fstat(opened.fileno())) != file.identity:
            raise RefusedError("source.changed", f"{file.path!r:.160} changed during the hashing")
    return Digests(sha256.hexdigest(), git.hexdigest())


def commit_of(folder: Path) -> str | None:
    """Return the commit that the hub's cache names this snapshot by, if it lies in one."""
    folder = folder.absolute()
    in_cache = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if in_cache else None


def _require_names(paths: list[str]) -> None:
    try:
        for path in paths:
            path.encode()  # a name that is not UTF-8 came in as lone surrogates
        require_paths(paths)
    except (RefusedError, UnicodeEncodeError) as error:
        reason = error.message if isinstance(error, RefusedError) else f"{path!r:.80} is not UTF-8"
        raise RefusedError(
            "source.name", reason, hint="rename the file or take it out, then inspect again"
        ) from error


def _require_folder(folder: Path) -> None:
    try:
        found = folder.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise RefusedError(
                "source.missing",
                f"there is no {str(folder)!r:.160}",
                hint="give the folder of a downloaded snapshot, the one that holds config.json",
            ) from error
        raise _unreadable(str(folder), error) from error
    if not stat.S_ISDIR(found.st_mode):
        kind = _kind(found.st_mode)
        raise RefusedError(
            "source.type",
            f"{str(folder)!r:.160} is {kind}, not a folder",
            hint="give the folder of a downloaded snapshot, the one that holds config.json",
        )


def _blob_folder(folder: Path) -> Path | None:
    return folder.absolute().parent.parent / "blobs" if commit_of(folder) else None


def _entries(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, os.DirEntry[str]]]:
    if depth > MAX_DEPTH:
        raise RefusedError("source.huge", f"folders nest deeper than {MAX_DEPTH}: {prefix!r:.120}")
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise _unreadable(prefix or str(folder), error) from error
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if entry.name == ".git":
            raise RefusedError(
                "source.type",
                f"{path!r:.160} is a git repository, whose history would travel unseen",
                hint="export the files with `git archive`, or download the snapshot instead",
            )
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(Path(entry.path), f"{path}/", depth + 1)
        else:
            yield path, entry


def _file(path: str, entry: os.DirEntry[str], blobs: Path | None) -> SourceFile:
    try:
        found = entry.stat(follow_symlinks=False)
        place, blob = Path(entry.path), None
        if stat.S_ISLNK(found.st_mode):
            blob = _blob(path, Path(entry.path), blobs)
            place = (blobs or Path()) / blob
            found = place.lstat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise RefusedError(
            "source.type",
            f"{path!r:.160} is {_kind(found.st_mode)}, not a regular file",
            hint="take it out of the snapshot, then inspect again",
        )
    return SourceFile(path, place, found.st_size, _identity(found), blob)


def _blob(path: str, link: Path, blobs: Path | None) -> str:
    """Return the name of the blob that a link of the hub's cache points to."""
    target = str(link.readlink())
    found = _BLOB.fullmatch(target)
    depth = path.count("/") + 2
    if blobs is None or found is None or target.count("../") != depth:
        raise RefusedError(
            "source.link",
            f"{path!r:.120} is a link to {target!r:.120}",
            hint="only the links of the hub's own cache are followed; copy the files to a folder "
            "with `cp -rL`, pin them and inspect that folder",
        )
    return found[1]


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a link"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return name
    return "a device"


def _unreadable(path: str, error: OSError) -> FaultError:
    return FaultError(
        "host.io",
        f"cannot read {path!r:.160}: {error.strerror}",
        hint="mend the permissions or the medium, then run it again",
    )
