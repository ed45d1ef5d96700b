"""Vocabulary that all three packages share."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Self

from policy.errors import RefusedError

# Predicate types and own media types hang under this base. `.invalid` is reserved (RFC 2606): the
# address can never resolve, nobody can register it, and no reader is tempted to fetch it.
URI_BASE = "https://airgap.invalid/"

_SIZES = {"sha256": 32, "sha384": 48}
_TEXT = re.compile(r"(sha256|sha384):([0-9a-f]+)")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A content address: `algorithm` is `sha256` or `sha384`, `raw` its 32 or 48 bytes.

    The text form is `sha256:<lower-case hex>`.
    """

    algorithm: str
    raw: bytes

    def __post_init__(self) -> None:
        if _SIZES.get(self.algorithm) != len(self.raw):
            raise ValueError(f"no {self.algorithm!r:.20} digest has {len(self.raw)} bytes")

    @classmethod
    def of(cls, content: bytes, algorithm: str = "sha256") -> Self:
        """Hash `content`."""
        return cls(algorithm, hashlib.new(algorithm, content).digest())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form; RefusedError `digest.malformed` for anything else."""
        found = _TEXT.fullmatch(text)
        if found is None or len(found[2]) != 2 * _SIZES[found[1]]:
            raise RefusedError(
                "digest.malformed", f"expected sha256:<64 lower-case hex>, found {text!r:.80}"
            )
        return cls(found[1], bytes.fromhex(found[2]))

    @property
    def hex(self) -> str:
        """The bare lower-case hex, for fields that are named after their algorithm."""
        return self.raw.hex()

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.raw.hex()}"
