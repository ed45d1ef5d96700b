"""Files that a crash leaves whole: the old content or the new one, a new file or none."""

from __future__ import annotations

import os
from pathlib import Path

_MADE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def write_beside(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file beside, sync it, rename it over `path`, and sync the folder."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, _MADE | os.O_TRUNC, mode)
    try:
        _write(descriptor, content)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_new(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file that is not there yet, with this very mode; FileExistsError otherwise."""
    descriptor = os.open(path, _MADE | os.O_EXCL, mode)
    try:
        os.fchmod(descriptor, mode)
        _write(descriptor, content)
    except BaseException:
        path.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes) -> None:
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
