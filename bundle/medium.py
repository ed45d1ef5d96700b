"""The body of a sealed bundle, wherever its bytes lie: in one file, in volumes, or beside a base.

A medium gives bytes and believes none of them: the caller hashes each chunk and compares it with
the sealed leaf. `bundle.media` opens one; FORMAT.md sections 14 to 16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bundle.archive import Head, read_head
from bundle.envelope import Envelope
from bundle.manifest import Manifest
from bundle.source import PlainFile, Source
from bundle.tar import BLOCK, require_end
from policy.errors import AirgapError, FaultError, RefusedError
from policy.terms import Digest

Holds = Callable[[int, memoryview], bool]
"""Tells whether the bytes are those of the sealed chunk with that index."""


class Medium:
    """One file `NAME.agb`, and what every other form has to offer as well."""

    form = "file"

    def __init__(self, source: Source) -> None:
        self.path = source.path
        self.source = source
        self.head: Head = read_head(source)

    def require_whole(self, manifest: Manifest, digest: Digest) -> None:
        """Check all that can be known without reading the body; the seal holds by now.

        Raises:
            RefusedError: `archive.truncated`, `.trailing`; a code of the form.

        """
        del digest
        require_end(self.source, self.head.body_start + manifest.body.size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the body on.

        Raises:
            RefusedError: `archive.truncated`, `volume.missing`, `transit.tag`.
            FaultError: `host.io`.

        """
        self.source.read_into(self.head.body_start + offset, buffer)

    def map(self) -> memoryview | None:
        """Return the whole body as mapped memory, None where that is not possible."""
        whole = self.source.map()
        return None if whole is None else whole[self.head.body_start :]

    def where(self, start: int, end: int) -> str:
        """Say where bytes `start` up to `end` of the body lie."""
        base = self.head.body_start
        return f"bytes {base + start:,} to {base + end - 1:,} of the file"

    def is_absent(self, index: int) -> bool:
        """Tell whether chunk `index` lies on a volume that is not there."""
        del index
        return False

    def ask(self, index: int) -> None:
        """Let somebody bring the volume of chunk `index`, if there is somebody to ask."""

    def repair(self, index: int, buffer: memoryview, holds: Holds) -> bool:
        """Fill `buffer` with chunk `index` from what is left elsewhere, if that is enough."""
        del index, buffer, holds
        return False

    def find_cause(self, start: int, end: int) -> RefusedError | None:
        """Return a better reason why these bytes of the body are wrong, if this form knows one."""
        del start, end
        return None

    def absence(self, indices: Sequence[int]) -> AirgapError:
        """Return the error for chunks that were not there and could not be made up for."""
        return RefusedError("volume.missing", f"{len(indices)} chunks are not here")

    def find_base(self) -> Manifest | None:
        """Return what the release that a delta builds on consists of; None for other forms."""
        return None

    def check_spares(self) -> None:
        """Read what a verification of the body does not need, such as parity volumes."""

    def facts(self) -> dict[str, Any]:
        """Return what a report says of the form."""
        return {"form": self.form, "files": [str(self.path)]}

    def rewrite_envelope(self, envelope: Envelope) -> None:
        """Replace the envelope in place: 131,072 bytes change, nothing moves.

        Raises:
            RefusedError: `transit.key`, the file is encrypted; FaultError `host.io`.

        """
        if not isinstance(self.source, PlainFile):
            raise RefusedError(
                "transit.key",
                f"{self.path.name!r:.100} is encrypted; a signature is added to the plain file",
                hint="airgap decrypt it first",
            )
        overwrite(self.path, BLOCK, envelope.to_padded())

    def close(self) -> None:
        """Let go of all files."""
        self.source.close()


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Write over bytes of a file; FaultError `host.io` when it cannot be written."""
    try:
        with path.open("r+b") as stream:
            stream.seek(offset)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise FaultError(
            "host.io", f"{path} cannot be written: {error.strerror}", hint="copy it to a disk first"
        ) from error
