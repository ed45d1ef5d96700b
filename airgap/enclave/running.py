"""Where an auditor finds the sealed processes that run now (docs/design/enclave.md, 12).

A broker leaves the evidence of each live process in a file of its own and takes it away at the end.
The file is a signpost and no proof: whoever reads it compares pid and start time with /proc. One
that a killed broker left is removed by the next reader.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from airgap.enclave import reading

FOLDER = "running"
_SIZE_LIMIT = 1 << 20
_COUNT_LIMIT = 1000


@contextlib.contextmanager
def noted(state: Path, document: dict[str, Any]) -> Iterator[None]:
    """Keep the evidence of a live process in `state` as long as the block runs."""
    path = _path(state, document)
    with contextlib.suppress(OSError):  # a tree that cannot be written hides nothing but the pid
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(beside, flags, 0o600), "w") as file:
            json.dump(document, file)
        beside.rename(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def find_running(state: Path) -> list[dict[str, Any]]:
    """Return the evidence of every sealed process of this tree that lives, oldest first."""
    found = []
    for path in sorted((state / FOLDER).glob("*.json"))[:_COUNT_LIMIT]:
        document = _read(path)
        if document is None:
            continue
        if _lives(document):
            found.append(document)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return sorted(found, key=lambda document: int(document["mono_ns"]))


def _path(state: Path, document: dict[str, Any]) -> Path:
    proc = document["proc"]
    return state / FOLDER / f"{int(proc['pid'])}-{int(proc['starttime'])}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """Read one file; None for anything that is not what a broker of this user wrote."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            document = json.loads(file.read(_SIZE_LIMIT))
        proc = document["proc"]
        numbers = (proc["pid"], proc["starttime"], document["mono_ns"])
        words = (document["profile"], document["rung"], document["ts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = all(type(number) is int and number >= 0 for number in numbers)
    return document if whole and all(isinstance(word, str) for word in words) else None


def _lives(document: dict[str, Any]) -> bool:
    """Compare the start time: a pid may be another process by now."""
    try:
        found = reading.read(int(document["proc"]["pid"]))
    except (OSError, KeyError, ValueError):
        return False
    return bool(found.start_time == document["proc"]["starttime"])
