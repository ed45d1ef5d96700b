"""The environments of the program on this host: `install.sh` makes one for each set of wheels.

    PREFIX/bin                  link to the `bin` of the one that answers
    PREFIX/runtimes/<id>/       an environment; the id is the beginning of its list's digest
    PREFIX/runtimes/.<id>.removed   what a removal that was stopped has left

A newer bundle of wheels makes a new one and leaves the old one there. This module says how large
each is and what needs it, and takes away those that nothing needs: one rename each, after which the
environment is none, and then the deletion. docs/design/bundle.md, 7.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from airgap.install.store import Store, delete_tree
from bundle.durable import sync_folder
from bundle.manifest import Manifest
from bundle.scan.wheelhouse import list_path
from policy.errors import FaultError, RefusedError

DONE: Final = "airgap-runtime.json"  # install.sh writes it last
ID_LENGTH: Final = 16
_RUNTIMES, _LEFT = "runtimes", ".removed"
_NAME = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}|\.[0-9a-f]{{{ID_LENGTH}}}\{_LEFT}")


@dataclass(frozen=True, slots=True)
class Runtime:
    """One environment; `needs` is empty where nothing needs it."""

    path: Path
    size: int  # bytes of disk
    whole: bool
    needs: tuple[str, ...]

    @property
    def id(self) -> str:
        """Return the name that commands take."""
        return self.path.name

    def as_document(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "id": self.id,
            "path": str(self.path),
            "bytes": self.size,
            "whole": self.whole,
            "needs": list(self.needs),
        }


@dataclass(frozen=True, slots=True)
class Dropped:
    """An environment that is gone, with the receipt of the record."""

    runtime: Runtime
    receipt: Any


def find_prefix(environment: Path | None = None) -> Path | None:
    """Return the folder that `install.sh` installed the running program to, or None.

    Args:
        environment: Of the interpreter; that of this process where it is not given.

    """
    here = Path(sys.prefix if environment is None else environment).resolve()
    installed = here.parent.name == _RUNTIMES and (here / DONE).is_file()
    return here.parent.parent if installed else None


def find_runtimes(
    prefix: Path, store: Store, *, processes: Path = Path("/proc")
) -> tuple[Runtime, ...]:
    """Return every environment below a prefix, and what a killed installer or removal left.

    What bears another name than an id is somebody else's, and is not looked at.

    Args:
        prefix: Where the program lies.
        store: Of the tree; a release that is installed there keeps the wheels that it brought.
        processes: Where the running ones are seen.

    Raises:
        RefusedError: `start.digest`, `store.*`; what is installed cannot be told.
        FaultError: `host.io`.

    """
    folder = prefix / _RUNTIMES
    try:
        places = [
            path
            for path in sorted(folder.iterdir())
            if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        ]
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise FaultError("host.io", f"{folder} cannot be read: {error.strerror}") from error
    brought = _brought(store)
    running = _running(processes)
    active = _active(prefix)
    found = []
    for path in places:
        whole = (path / DONE).is_file() and not path.name.startswith(".")
        needs = [f"{prefix}/bin points to it"] if path.resolve() == active else []
        if path.resolve() == Path(sys.prefix).resolve():
            needs.append("this command runs from it")
        pids = [pid for pid, program in running if program.is_relative_to(path.resolve())]
        needs += [f"process {pid} runs from it" for pid in pids if pid != os.getpid()]
        needs += [f"{name} brought it" for name in brought.get(path.name, ()) if whole]
        found.append(Runtime(path, _size(path), whole, tuple(needs)))
    return tuple(found)


def remove_runtimes(
    prefix: Path,
    names: Sequence[str],
    *,
    store: Store,
    audit: Callable[[str, str, str], Any],
    processes: Path = Path("/proc"),
) -> tuple[Dropped, ...]:
    """Delete environments that nothing needs; all of them where no name is given.

    Each is on record before it goes and when it is gone. What answers is never touched, so a kill
    leaves a program that runs; what was left half-way goes with the next removal.

    Args:
        prefix: Where the program lies.
        names: Ids; each must be there, and needed by nothing.
        store: Of the tree.
        audit: Records (id, phase, result), and returns the receipt.
        processes: As for `find_runtimes`.

    Raises:
        RefusedError: `store.missing`, there is none of that name; `install.needed`. Checked for all
            before any is touched.
        FaultError: `host.state`, an installer is at work; `host.io`; the log's own.

    """
    _require_own(prefix)
    _require_own(prefix / _RUNTIMES)
    with _held(prefix):
        known = {each.id: each for each in find_runtimes(prefix, store, processes=processes)}
        wanted = [_get(known, name) for name in dict.fromkeys(names)]
        if not names:
            wanted = [each for each in known.values() if not each.needs]
        return tuple(Dropped(each, _drop(each, audit)) for each in wanted)


def runtime_of(manifest: Manifest) -> tuple[str, ...]:
    """Return the ids of the environments that the wheels of a release make, one a target."""
    lists = [manifest.find(list_path(runtime)) for runtime in manifest.runtimes]
    return tuple(entry.sha256[:ID_LENGTH] for entry in lists if entry is not None)


def is_there(prefix: Path, name: str) -> bool:
    """Tell whether a whole environment of that id lies below a prefix."""
    return (prefix / _RUNTIMES / name / DONE).is_file()


def _get(known: dict[str, Runtime], name: str) -> Runtime:
    found = known.get(name)
    if found is None:
        raise RefusedError(
            "store.missing",
            f"there is no environment {name!r:.80}",
            hint="airgap runtimes lists them",
        )
    if found.needs:
        raise RefusedError(
            "install.needed",
            f"the environment {name} is needed: {'; '.join(found.needs):.300}",
            hint="end what runs from it, or airgap remove the release that brought it",
        )
    return found


def _drop(runtime: Runtime, audit: Callable[[str, str, str], Any]) -> Any:
    """Take one away: a rename, and then the deletion."""
    audit(runtime.id, "intent", "")
    path = runtime.path
    try:
        if not path.name.startswith("."):
            left = path.with_name(f".{path.name}{_LEFT}")
            if left.exists():
                delete_tree(left)
            path.rename(left)
            sync_folder(left.parent)
            path = left
        delete_tree(path)
    except OSError as error:
        audit(runtime.id, "outcome", "failed")
        raise FaultError(
            "host.io",
            f"{error.filename} cannot be deleted: {error.strerror}",
            hint="run it as the account that installed the program; it goes on where it stopped",
        ) from error
    return audit(runtime.id, "outcome", "complete")


def _require_own(folder: Path) -> None:
    """Refuse to delete in a folder that is a link, or that another account may write to."""
    try:
        found = folder.lstat()
    except OSError as error:
        raise FaultError("host.io", f"{folder} cannot be opened: {error.strerror}") from error
    owned = found.st_uid in {0, os.geteuid()} and not found.st_mode & 0o002
    if not stat.S_ISDIR(found.st_mode) or not owned:
        raise FaultError(
            "host.io",
            f"{folder} is no folder, or another account owns it or may write to it",
            hint="name the true folder of the program with --prefix",
        )


@contextmanager
def _held(prefix: Path) -> Iterator[None]:
    """Hold the prefix as `install.sh` does."""
    try:
        descriptor = os.open(prefix, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise FaultError("host.io", f"{prefix} cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FaultError(
                "host.state",
                f"an installer works in {prefix}",
                hint="wait for it, then run it again",
            ) from error
        yield
    finally:
        os.close(descriptor)


def _active(prefix: Path) -> Path | None:
    """Return the environment that `PREFIX/bin` points to."""
    with suppress(OSError):
        return (prefix / "bin").resolve(strict=True).parent
    return None


def _brought(store: Store) -> dict[str, list[str]]:
    """Return the installed releases by the environments that their wheels make."""
    found: dict[str, list[str]] = {}
    for each in store.list():
        for name in runtime_of(each.manifest):
            words = f"{each.manifest.name} {each.manifest.version}"
            found.setdefault(name, []).append(words)
    return found


def _running(processes: Path) -> list[tuple[int, Path]]:
    """Return the program of every process that may be seen."""
    found = []
    for entry in processes.iterdir() if processes.is_dir() else ():
        if entry.name.isdigit():
            with suppress(OSError):
                found.append((int(entry.name), (entry / "exe").readlink()))
    return sorted(found)


def _size(folder: Path) -> int:
    """Return how much of the disk a folder takes."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).lstat().st_blocks * 512
    return total
