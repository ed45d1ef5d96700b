"""The few operating-system calls that the log's durability rests on, gathered in one class.

`AuditLog` takes a `Disk`, so that tests can fail the N-th call of any kind and record the order of
all of them (docs/design/audit.md, 14). A short write counts as a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from pathlib import Path


class Disk:
    """Real calls. Every failure is an OSError; none is retried, an fsync least of all."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Open `path` and return the descriptor, closed on exec."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def write(self, fd: int, content: bytes) -> None:
        """Write all of `content` in one call; fewer bytes written is ENOSPC."""
        if os.write(fd, content) != len(content):
            raise OSError(errno.ENOSPC, "short write")

    def pwrite(self, fd: int, content: bytes, offset: int) -> None:
        """Overwrite bytes in place; fewer bytes written is ENOSPC."""
        if os.pwrite(fd, content, offset) != len(content):
            raise OSError(errno.ENOSPC, "short write")

    def fdatasync(self, fd: int) -> None:
        """Make the content, and the size, of a file durable."""
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        """Make a file or a directory durable."""
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Cut a file."""
        os.ftruncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve blocks for `size` bytes."""
        os.posix_fallocate(fd, 0, size)

    def mkdir(self, path: Path) -> None:
        """Make one directory for the owner alone."""
        path.mkdir(mode=0o700)

    def rename(self, old: Path, new: Path) -> None:
        """Move within one file system, over what is there."""
        old.rename(new)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    # -- built from the above ----------------------------------------------------------------

    def sync_folder(self, path: Path) -> None:
        """Make the names in a directory durable."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync(fd)
        finally:
            os.close(fd)

    def make_folder(self, path: Path) -> None:
        """Make a directory and its missing parents, each name durable in the one above."""
        if path.is_dir():
            return
        self.make_folder(path.parent)
        self.mkdir(path)
        self.sync_folder(path.parent)

    def put(self, path: Path, content: bytes, *, durable: bool = True, mode: int = 0o600) -> None:
        """Write beside `path` and rename: the old content or the new, never a mixture."""
        beside = path.with_name(path.name + ".tmp")
        try:
            fd = self.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            try:
                if content:
                    self.write(fd, content)
                if durable:
                    self.fsync(fd)
            finally:
                os.close(fd)
            self.rename(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        if durable:
            self.sync_folder(path.parent)


def open_plain(path: Path, *, buffering: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """Open a file for reading that may be hostile: a pipe would block, a device would never end.

    Raises:
        OSError: It is not a plain file, is missing or cannot be read.

    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return io.BufferedReader(io.FileIO(fd), buffering)
