"""Which daemon serves a tree: one at a time, and what a command tells of it.

The daemon keeps a lock on a file of the tree as long as it lives and writes there what it serves;
the kernel gives the lock back however it ends. The file is a signpost for people and no evidence.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Final

from policy.errors import FaultError, RefusedError

FILE: Final = Path("enclave") / "daemon"
_SIZE: Final = 2_048


class Presence:
    """The daemon's own end of the file."""

    def __init__(self, root: Path) -> None:
        """Take the lock; RefusedError `service.locked`, another daemon serves this tree."""
        path = root / FILE
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o600)
        except OSError as error:
            raise FaultError(
                "host.io",
                f"{path} cannot be opened: {error.strerror}",
                hint="it must be an ordinary file of the daemon's account: remove what is there",
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            found = find_daemon(root) or {}
            os.close(self._file)
            raise _locked(root, found) from error

    def tell(self, facts: dict[str, Any]) -> None:
        """Write what is served; a full disk hides nothing but that."""
        text = json.dumps({"pid": os.getpid(), **facts}).encode()[:_SIZE]
        with contextlib.suppress(OSError):
            os.pwrite(self._file, text.ljust(_SIZE), 0)

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._file)


def find_daemon(root: Path) -> dict[str, Any] | None:
    """Return what the daemon of this tree says of itself; None where none runs, or none is seen."""
    try:
        file = os.open(root / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        try:
            found = json.loads(os.pread(file, _SIZE, 0) or b"{}")
        except (OSError, ValueError):
            found = {}
        return found if isinstance(found, dict) else {}
    finally:
        os.close(file)
    return None


def require_none(root: Path) -> None:
    """Refuse what would take the tree from under a daemon; RefusedError `service.locked`."""
    if (found := find_daemon(root)) is not None:
        raise _locked(root, found)


def _locked(root: Path, found: dict[str, Any]) -> RefusedError:
    return RefusedError(
        "service.locked",
        f"process {found.get('pid', '?')} serves {root}",
        hint="stop it first (systemctl stop airgap, or end that process), or name another tree",
    )


def taken_over(root: Path, digest: str) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:
    """Return what becomes of a release that was just made active, at a daemon of the tree.

    The document for machines, None where no daemon is seen, and rows for people.
    """
    found = find_daemon(root)
    if found is None:
        return None, []
    pid, serves = found.get("pid", "?"), found.get("serves", "a release")
    pinned = found.get("chosen") or ""
    if found.get("bundle") == digest:
        words = f"process {pid} serves it already"
    elif pinned:
        words = f"process {pid} serves {serves}: it was started with --model {pinned}, and stays"
    else:
        words = (
            f"process {pid} serves {serves}, and takes this release over by itself: requests under "
            "way end first, new ones wait (at once: systemctl reload airgap)"
        )
    return {"pid": pid, "serves": serves, "takes_over": not pinned}, [("service", words)]
