"""The lock file: one writer, and a note of who it is and how the last one ended."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from airgap.audit.clock import Clock
from airgap.audit.disk import Disk
from airgap.audit.record import timestamp
from policy.errors import RefusedError

_BYTES: Final = 256


class Lock:
    """`flock` on `.lock`; the kernel gives it back when the process dies."""

    def __init__(self, path: Path, disk: Disk, clock: Clock) -> None:
        self._path, self._disk, self._clock = path, disk, clock
        self._fd = -1

    def take(self) -> str:
        """Take the lock and return how the last holder ended: `closed`, `open`, `halted:…`.

        Raises:
            RefusedError: `audit.locked`, with the pid of the holder.

        """
        self._fd = self._disk.open(self._path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, since, *_ = [*self._note(), "?", "?"]
            raise RefusedError(
                "audit.locked",
                f"process {pid} holds the audit log in {self._path.parent} since {since}",
                hint="if it is a daemon, stop it (systemctl stop airgap airgap-audit, or end that "
                "process); else wait for it to end",
            ) from None
        note = self._note()
        ended = note[2] if len(note) > 2 else ""  # noqa: PLR2004 - pid, time, how it ended
        self.mark(ended if ended.startswith("halted") else "open")
        return ended

    def mark(self, how: str) -> None:
        """Note who holds it and how it stands; in place, so that a full disk cannot stop it."""
        text = f"{os.getpid()} {timestamp(self._clock.wall_ns())} {how}"[: _BYTES - 1]
        self._disk.pwrite(self._fd, text.ljust(_BYTES - 1).encode() + b"\n", 0)

    def check(self) -> None:
        """Return if the file is still the one that others would lock; OSError if not."""
        mine, there = os.fstat(self._fd), self._path.stat()
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(errno.ESTALE, "the lock file was removed or replaced")

    def release(self) -> None:
        """Give the lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _note(self) -> list[str]:
        return os.pread(self._fd, _BYTES, 0).decode("ascii", "replace").split()
