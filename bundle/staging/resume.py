"""The work folder of a build, and what a build that was stopped leaves to the next one.

    .NAME.agb.work/            beside the output; locked while a build runs
    .NAME.agb.work/kept/       sealed runs that ended well, and the archive as far as it is written
    .NAME.agb.work/...         everything else: made anew by each build

A sealed run is taken over when its command, every file that it reads and every file that it left
have the digests that were noted; the parent then looks at its output as if it had just ended. What
is kept is a hint and no proof: each byte of it is hashed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Count, Document, Sha256Hex
from bundle.scan.strict import open_view
from bundle.staging.sealed import RunSealed, SealedJob, SealedResult, place_file
from bundle.write import Kept
from policy.errors import AirgapError, FaultError, RefusedError

RECORD_LIMIT = 4 * 1024 * 1024

Identity = tuple[int, int, int, int]
"""Device, inode, size and time of change, as `SourceFile.identity`."""


class _Left(Document):
    """One file that a sealed run left."""

    sha256: Sha256Hex
    size: Count


class _Record(Document):
    """A sealed run that ended well; `job` is a digest over its command and all that it read."""

    format: Literal["airgap-sealed-run/1"] = "airgap-sealed-run/1"
    job: Sha256Hex
    files: dict[str, _Left]
    evidence: Annotated[str, Field(max_length=RECORD_LIMIT // 2)]  # JSON; it may hold fractions

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))


@dataclass(frozen=True, slots=True)
class _TakenOver:
    """The end of a run that an earlier build saw."""

    evidence: Mapping[str, Any]
    status: int | None = 0
    signal: int | None = None
    stderr: str = ""


@dataclass
class Work:
    """The folder of one build while it runs.

    Attributes:
        folder: Where everything unfinished lies.
        known: Digests of files that this build has hashed, so that none is hashed twice.
        resumed: Names of the sealed runs that were taken over.

    """

    folder: Path
    known: dict[Identity, str] = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)

    @property
    def kept(self) -> Path:
        """What the next build may take over."""
        return self.folder / "kept"

    @property
    def archive(self) -> Kept:
        """The chunks of the archive; one for each call of `write_archive`."""
        return Kept(self.kept / "archive")

    def keeping(self, run_sealed: RunSealed) -> RunSealed:
        """Return a runner that keeps what ends well, and takes over what a stopped build kept.

        A run is named after the folder that it writes to.
        """

        def run(job: SealedJob) -> SealedResult:
            place = self.kept / job.out.name
            name = place.with_suffix(".json")
            key = self._key(job)
            found = self._find(place, name, key)
            if found is not None:
                for file in found.files:
                    place_file(place / file, job.out / file)
                self.resumed.append(job.out.name)
                return _TakenOver(json.loads(found.evidence))
            shutil.rmtree(place, ignore_errors=True)
            name.unlink(missing_ok=True)
            done = run_sealed(job)
            if done.status == 0:
                self._keep(job.out, place, name, key, done.evidence)
            return done

        return run

    def _keep(
        self, out: Path, place: Path, name: Path, key: str, evidence: Mapping[str, Any]
    ) -> None:
        """Note what a run left; the record comes last. What is no plain file is not kept."""
        entries = list(os.scandir(out))
        if not all(entry.is_file(follow_symlinks=False) for entry in entries):
            return
        place.mkdir(parents=True)
        files: dict[str, _Left] = {}
        for entry in entries:
            place_file(Path(entry.path), place / entry.name)
            files[entry.name] = _Left(
                sha256=self._digest(place / entry.name), size=entry.stat().st_size
            )
        try:
            record = _Record(job=key, files=files, evidence=json.dumps(dict(evidence))).to_bytes()
        except (ValidationError, AirgapError, TypeError, ValueError):
            shutil.rmtree(place)  # a name or a fact that no record holds: then nothing is kept
            return
        fresh = name.with_suffix(".fresh")
        fresh.write_bytes(record)
        fresh.replace(name)

    def _find(self, place: Path, name: Path, key: str) -> _Record | None:
        """Return the record of this very run when all that it names is still as it was."""
        try:
            raw = name.read_bytes()
            parse_canonical(raw, code="build.output", what=name.name, limit=RECORD_LIMIT)
            record = _Record.model_validate_json(raw)
            if record.job != key or {entry.name for entry in os.scandir(place)} != set(
                record.files
            ):
                return None
            for file, left in record.files.items():
                path = place / file
                if path.is_symlink() or path.stat().st_size != left.size:
                    return None
                if self._digest(path) != left.sha256:
                    return None
        except (OSError, ValidationError, AirgapError):
            return None
        return record

    def _key(self, job: SealedJob) -> str:
        """Return a digest over the command and over every file that the run may read."""
        hasher = hashlib.sha256()
        place = str(self.folder)
        for word in job.argv:
            hasher.update(f"{word.replace(place, '')}\0".encode("utf-8", "surrogateescape"))
        for root in job.read_only:
            for path in sorted([root] if root.is_file() else root.rglob("*")):
                if path.is_file():
                    name = path.name if root.is_file() else str(path.relative_to(root))
                    hasher.update(f"{name}\0{self._digest(path)}\0".encode())
        for program in _libraries():
            hasher.update(f"{program}\0".encode())
        return hasher.hexdigest()

    def _digest(self, path: Path) -> str:
        """Return the SHA-256 of a file, hashing none twice; a hard link is the same file."""
        found = path.stat()
        identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if identity not in self.known:
            self.known[identity] = hashlib.sha256(open_view(path)).hexdigest()
        return self.known[identity]


@contextlib.contextmanager
def work_folder(out: Path, known: Iterable[tuple[Identity, str]] = ()) -> Iterator[Work]:
    """Make a folder beside `out` for everything unfinished, and remove it when the build has ended.

    It stays, with the finished steps in it, when the build was stopped or the host failed: the same
    build goes on from there. It goes away when the build ended well or was refused.

    Args:
        out: The output.
        known: SHA-256 of files that have been hashed already, by identity.

    Raises:
        RefusedError: `build.output`; another build of the same file is running, or what lies there
            is not a folder that this account alone may write to.

    """
    folder = out.absolute().parent / f".{out.name}.work"  # the sealed programs run elsewhere
    if not os.path.lexists(folder):
        folder.mkdir(mode=0o700)
    _require_own(folder)
    if os.path.lexists(folder / "kept"):
        _require_own(folder / "kept")
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    work = Work(folder, dict(known))
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed build has let go of it
        for entry in folder.iterdir():
            if entry != work.kept:
                _remove(entry)
        work.kept.mkdir(mode=0o700, exist_ok=True)
        yield work
        shutil.rmtree(folder)
    except BlockingIOError as error:
        raise RefusedError(
            "build.output",
            f"another build of {out.name!r:.100} is running",
            hint="wait for it, or name another output",
        ) from error
    except FaultError as error:
        if not _clear(work):
            raise
        raise FaultError(
            error.code, f"{error.message}; the finished steps are kept", hint=_go_on(error, folder)
        ) from error
    except RefusedError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        _clear(work)
        raise
    finally:
        os.close(number)


def _go_on(error: FaultError, folder: Path) -> str:
    hint = f"{error.hint}; " if error.hint else ""
    return f"{hint}the same command goes on from {folder.name}; remove it to begin anew"


def _clear(work: Work) -> bool:
    """Remove what is of no use to the next build; tell whether something is left."""
    done = any(work.kept.glob("*.json"))
    for entry in work.folder.iterdir() if done else [work.folder]:
        if entry != work.kept:
            with contextlib.suppress(OSError):
                _remove(entry)
    return done


def _remove(path: Path) -> None:
    folder = path.is_dir() and not path.is_symlink()
    remove: Callable[[Path], object] = shutil.rmtree if folder else Path.unlink
    remove(path)


def _require_own(folder: Path) -> None:
    """Refuse a folder in which somebody else could change files after they have been hashed."""
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return
    raise RefusedError(
        "build.output",
        f"{folder} is no folder, or another account owns it or may write to it",
        hint=f"look at it, remove {folder.name}, and build anew",
    )


def _libraries() -> list[str]:
    """Return the installed versions: another exporter gives other bytes."""
    from importlib.metadata import distributions

    return sorted({f"{each.name}=={each.version}" for each in distributions()})
