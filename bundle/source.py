"""The bytes of one file on a medium, at any offset: as they lie there, or opened from their cipher.

Nothing that is read here is trusted. FORMAT.md sections 3 and 16.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import Protocol

from policy.errors import FaultError, RefusedError


class Source(Protocol):
    """Random access to the bytes of a file; `size` in bytes. Reading is safe from any thread."""

    @property
    def path(self) -> Path:
        """Where the file lies."""

    @property
    def size(self) -> int:
        """How many bytes can be read."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on.

        Raises:
            RefusedError: `archive.truncated`, the file is shorter now; a code of its cipher.
            FaultError: `host.io`.

        """

    def map(self) -> memoryview | None:
        """Return the whole file as mapped memory, None where that is not possible."""

    def close(self) -> None:
        """Let go of the file."""


class PlainFile:
    """A plain file as it lies on the medium.

    Raises:
        FaultError: `host.io`; it cannot be opened.
        RefusedError: `archive.type`; it is no plain file.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_descriptor(path)
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; see `Source`."""
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[filled:]], offset + filled)
            except OSError as error:
                raise FaultError(
                    "host.io",
                    f"{self.path} cannot be read at byte {offset + filled:,}: {error.strerror}",
                    hint="clean or replace the medium",
                ) from error
            if not count:
                raise RefusedError(
                    "archive.truncated",
                    f"{self.path} ends at byte {offset + filled:,} now",
                    hint="copy it again from the medium",
                )
            filled += count

    def map(self) -> memoryview | None:
        """Map the file."""
        return memoryview(mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ))

    def close(self) -> None:
        """Close the file; views taken from it stay readable until they are dropped."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def open_descriptor(path: Path) -> int:
    """Open a plain file for reading; errors as `PlainFile`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FaultError(
            "host.io", f"the bundle {str(path)!r:.200} cannot be read: {reason}"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError("archive.type", f"{str(path)!r:.200} is not a plain file")
    return descriptor


def read_exactly(source: Source, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset` on; errors as `Source.read_into`."""
    if offset + length > source.size:
        raise RefusedError(
            "archive.truncated",
            f"{source.path} ends at byte {source.size:,}, where {offset + length:,} are needed",
            hint="copy it again from the medium",
        )
    buffer = bytearray(length)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)
