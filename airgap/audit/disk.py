"""The few operating-system calls that the log's durability rests on, gathered in one class.

`AuditLog` takes a `Disk`, so that tests can fail the N-th call of any kind and record the order of
all of them (docs/design/audit.md, 14). A short write counts as a full disk.

What root makes in a folder of another account belongs to that account, which could not write its
own log any more else. No link is followed there, and no file of a third account is touched.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pwd
import stat
from pathlib import Path
from typing import Final

from airgap.config import LOG_ACCOUNT
from policy.errors import RefusedError


class Disk:
    """Real calls. Every failure is an OSError; none is retried, an fsync least of all."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """Open `path` and return the descriptor, closed on exec."""
        if flags & os.O_CREAT and not os.geteuid() and path.parent.lstat().st_uid:
            return _open_for_owner(path, flags | os.O_CLOEXEC, mode)
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
        if not os.geteuid() and path.parent.lstat().st_uid:
            _mkdir_for_owner(path)
        else:
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

    def make_folder(self, path: Path, *, durable: bool = True) -> None:
        """Make a directory and its missing parents, each name durable in the one above."""
        if path.is_dir():
            return
        self.make_folder(path.parent, durable=durable)
        self.mkdir(path)
        if durable:
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


_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _open_for_owner(path: Path, flags: int, mode: int) -> int:
    folder = os.open(path.parent, _FOLDER)
    try:
        owner = os.fstat(folder)
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(path.name, flags | os.O_EXCL, mode, dir_fd=folder)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
        else:
            os.fchown(fd, owner.st_uid, owner.st_gid)
            return fd
        fd = os.open(path.name, flags & ~(os.O_CREAT | os.O_TRUNC), dir_fd=folder)
        try:
            _require_same(os.fstat(fd), owner.st_uid, path)
            if flags & os.O_TRUNC:
                os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(folder)


def _mkdir_for_owner(path: Path) -> None:
    folder = os.open(path.parent, _FOLDER)
    try:
        owner = os.fstat(folder)
        os.mkdir(path.name, 0o700, dir_fd=folder)
        made = os.open(path.name, _FOLDER, dir_fd=folder)
        try:
            _require_same(os.fstat(made), os.geteuid(), path)
            os.fchown(made, owner.st_uid, owner.st_gid)
        finally:
            os.close(made)
    finally:
        os.close(folder)


def _require_same(found: os.stat_result, owner: int, path: Path) -> None:
    if found.st_uid != owner or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EPERM, "not what was to be there, or of another owner", str(path))


def require_owner(folder: Path, key: Path, account: str = LOG_ACCOUNT) -> None:
    """Return if root may write the log in `folder`: it is root's, or wholly that account's.

    So are the files of its `key`, which a change of keys overwrites.

    Raises:
        RefusedError: `audit.owner`.

    """
    if os.geteuid() or not os.path.lexists(folder):
        return
    owner = folder.lstat().st_uid
    if not owner:
        return
    try:
        known = pwd.getpwnam(account).pw_uid
    except KeyError:
        known = None
    if owner != known:
        raise RefusedError(
            "audit.owner",
            f"{folder} belongs to uid {owner}, which is not the account {account} of a log's "
            "service",
            hint="run the command as the account that the folder belongs to (sudo -u)",
        )
    for path in key.parent.glob(f"{key.stem}.*"):
        _require_plain(path.lstat(), owner, path, folder)
    for place, folders, files, descriptor in os.fwalk(folder, follow_symlinks=False):
        for name in (*folders, *files):
            found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            _require_plain(found, owner, Path(place, name), folder)


def _require_plain(found: os.stat_result, owner: int, path: Path, folder: Path) -> None:
    try:
        _require_same(found, owner, path)
    except OSError:
        raise RefusedError(
            "audit.owner",
            f"{str(path)!r:.200} belongs to uid {found.st_uid}, or is a link or a pipe; "
            f"expected a plain file of uid {owner}",
            hint=f"look at it; is it the log's, chown -h --reference={folder} FILE gives it back; "
            "else move it away",
        ) from None


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
