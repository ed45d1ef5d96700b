"""The quarantine: verified chunks, as files, with a map that lets a killed install resume.

    quarantine/<digest>/files/…   the files as far as they are there
    quarantine/<digest>/chunks    one byte a chunk, 1 when it was written
    quarantine/<digest>/refused   the code of a later refusal

The map is a hint and no proof: a chunk that it names is read back and hashed against the sealed
leaf like one from the medium, so no order of writes needs to be durable.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from bundle.verify import SealedBundle
from policy.errors import FaultError

MARGIN = 16 * 1024 * 1024  # bytes kept free beside the files: state, log, folders
_NO_SPACE = {28, 122}  # ENOSPC, EDQUOT


class Quarantine:
    """Takes the chunks of one bundle; a `bundle.verify.Sink`."""

    def __init__(self, folder: Path, sealed: SealedBundle) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.resumed = 0  # chunks that an earlier run left and that still hold
        self._sealed = sealed
        self._layout = sealed.layout
        self._size = sealed.manifest.body.chunk_size
        self._map = -1
        self._held = b""
        self._open: tuple[int, int] = (-1, -1)  # file index, descriptor

    def __enter__(self) -> Self:
        make_writable(self.folder)  # a run that was killed late left read-only folders
        (self.folder / "refused").unlink(missing_ok=True)
        for entry in self._sealed.manifest.files:
            (self.files / entry.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._map = os.open(self.folder / "chunks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        count = self._sealed.manifest.body.leaves
        self._held = os.pread(self._map, count, 0).ljust(count, b"\0")
        return self

    def __exit__(self, *_: object) -> None:
        self._switch(-1)
        os.close(self._map)

    def holds(self, index: int) -> bool:
        """Tell whether the map names a chunk."""
        return self._held[index] == 1

    def find(self, index: int, buffer: memoryview) -> bool:
        """Read back a chunk that the map names; the caller hashes it."""
        if not self.holds(index):
            return False
        low = index * self._size
        high = low + len(buffer)
        for at, gap, _ in self._layout.gaps(low, high):
            start, end = max(at, low), min(at + len(gap), high)
            buffer[start - low : end - low] = gap[start - at : end - at]
        for number, offset, start, end in self._layout.spans(low, high):
            if not _read_back(self._path(number), offset, buffer[start - low : end - low]):
                return False
        self.resumed += 1
        return True

    def put(self, index: int, chunk: memoryview) -> None:
        """Write the file bytes of a verified chunk, then mark it.

        Raises:
            FaultError: `install.io`; the disk is full or broken. What is there can be resumed.

        """
        low = index * self._size
        try:
            for number, offset, start, end in self._layout.spans(low, low + len(chunk)):
                self._switch(number)
                _write_all(self._open[1], chunk[start - low : end - low], offset)
            os.pwrite(self._map, b"\x01", index)
        except OSError as error:
            raise broken_disk(error, self.folder) from error

    def finish(self) -> None:
        """Create the files that have no bytes, and cut what an altered quarantine may hold more."""
        for number, (_, size) in enumerate(self._layout.files):
            self._switch(number)
            os.ftruncate(self._open[1], size)
        self._switch(-1)

    def needed(self) -> int:
        """Return how many bytes the install still needs, before it starts."""
        present = sum(
            path.stat().st_blocks * 512 for path in self.files.rglob("*") if path.is_file()
        )
        return max(0, sum(size for _, size in self._layout.files) - present) + MARGIN

    def _path(self, number: int) -> Path:
        return self.files / self._layout.files[number][0]

    def _switch(self, number: int) -> None:
        """Have the file `number` open for writing, and no other."""
        if self._open[0] == number:
            return
        if self._open[1] >= 0:
            os.close(self._open[1])
        self._open = (-1, -1)
        if number >= 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._open = (number, os.open(self._path(number), flags, 0o600))


def make_writable(folder: Path) -> None:
    """Give back to the owner the right to change a folder and all in it; links are not followed."""
    for place, _, names in os.walk(folder):
        Path(place).chmod(0o700)
        for name in names:
            path = Path(place) / name
            if not path.is_symlink():
                path.chmod(0o600)


def broken_disk(error: OSError, folder: Path) -> FaultError:
    """Turn a failed write into the fault that says what to do."""
    full = error.errno in _NO_SPACE
    return FaultError(
        "install.io",
        f"writing to {folder} failed: {error.strerror or error}; nothing was activated",
        hint="free space, then run the same install again: it resumes"
        if full
        else "mend the disk, then run the same install again: it resumes",
    )


def _read_back(path: Path, offset: int, buffer: memoryview) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        filled = 0
        while filled < len(buffer):
            count = os.preadv(descriptor, [buffer[filled:]], offset + filled)
            if not count:
                return False
            filled += count
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)
