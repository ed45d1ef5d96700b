"""A signed head on paper (docs/design/audit.md, 6): lines to type, words to compare, a QR code."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Final

from airgap.audit import qr
from airgap.audit.checkpoint import Checkpoint

_CONSONANTS: Final = "bdfghjklmnprstvz"
_VOWELS: Final = "aiou"
_WORDS: Final = 4


@dataclass(frozen=True, slots=True)
class Paper:
    """One head, in the forms that leave a room on paper."""

    head: Checkpoint

    @property
    def short(self) -> str:
        """The line that `audit verify --anchors FILE` takes when it was typed into a file."""
        return f"{self.head.origin} {self.head.size} {base64.b64encode(self.head.root).decode()}"

    @property
    def words(self) -> str:
        """Four words that change with every character of the short line: to compare by voice."""
        digest = hashlib.sha256(self.short.encode()).digest()
        return " ".join(
            _proquint(int.from_bytes(digest[2 * at : 2 * at + 2])) for at in range(_WORDS)
        )

    def as_document(self) -> dict[str, object]:
        """Return the head for JSON output."""
        return {
            "origin": self.head.origin,
            "size": self.head.size,
            "root": base64.b64encode(self.head.root).decode(),
            "short": self.short,
            "words": self.words,
            "note": self.head.note,
        }

    def text(self) -> str:
        """Return what to print and keep."""
        root = self.head.root.hex()
        rows = [
            " ".join(root[at : at + 4] for at in range(start, start + 32, 4)) for start in (0, 32)
        ]
        return "\n".join([
            f"log    {self.head.origin}",
            f"size   {self.head.size}",
            f"root   {rows[0]}",
            f"       {rows[1]}",
            f"words  {self.words}",
            "",
            "as one line, for a file that `airgap audit verify --anchors` reads:",
            self.short,
        ])  # fmt: skip

    def svg(self) -> str:
        """Return the whole signed note as a QR code."""
        title = f"{self.head.origin} size {self.head.size}"
        return qr.encode(self.head.note.encode()).svg(title)

    def terminal(self) -> str:
        """Return the QR code in half blocks."""
        return qr.encode(self.head.note.encode()).terminal()


def _proquint(number: int) -> str:
    """Return 16 bits as a pronounceable word: consonants of four bits, vowels of two."""
    return (
        _CONSONANTS[number >> 12 & 15]
        + _VOWELS[number >> 10 & 3]
        + _CONSONANTS[number >> 6 & 15]
        + _VOWELS[number >> 4 & 3]
        + _CONSONANTS[number & 15]
    )
