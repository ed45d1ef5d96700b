"""What an interrupted `airgap verify --resume` has seen: one byte a chunk, bound to the files.

    store/verify/<digest>     identity of the files, then one byte a chunk, 1 when it held

The identity covers device, inode, size and both times of every file: a medium that was written to,
or another one, begins anew. It is a convenience of whoever verifies: an install never reads it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle.verify import SealedBundle
from policy.errors import FaultError

_IDENTITY = 32


class Ledger:
    """Remembers chunks of one bundle; a `bundle.verify.Ledger`."""

    def __init__(self, descriptor: int, held: bytes) -> None:
        self._descriptor = descriptor
        self._held = held
        self.resumed = 0  # chunks that were not read again

    def has(self, index: int) -> bool:
        """Tell whether the chunk held in an earlier run."""
        known = self._held[index] == 1
        self.resumed += known
        return known

    def mark(self, index: int) -> None:
        """Remember that a chunk holds."""
        os.pwrite(self._descriptor, b"\x01", _IDENTITY + index)


@contextmanager
def kept_ledger(folder: Path, sealed: SealedBundle) -> Iterator[Ledger | None]:
    """Yield the ledger of a bundle; it goes away when the block ends well.

    A delta has none: what its base says may change meanwhile.

    Raises:
        FaultError: `host.io`.

    """
    if sealed.medium.form == "delta":
        yield None
        return
    path = folder / sealed.digest.hex
    count = sealed.manifest.body.leaves
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise FaultError("host.io", f"{path} cannot be kept: {error.strerror}") from error
    try:
        wanted = identity_of(Path(name) for name in sealed.medium.facts()["files"])
        found = os.pread(descriptor, _IDENTITY + count, 0)
        if found[:_IDENTITY] != wanted:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, wanted, 0)
            found = wanted
        yield Ledger(descriptor, found[_IDENTITY:].ljust(count, b"\0"))
        path.unlink()
    finally:
        os.close(descriptor)


def identity_of(files: Iterable[Path]) -> bytes:
    """Return a digest over what tells these files, in this state, from any others."""
    hasher = hashlib.sha256()
    for path in files:
        found = path.stat()
        facts = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        hasher.update(f"{path.absolute()}\0{facts}\0".encode("utf-8", "surrogateescape"))
    return hasher.digest()
