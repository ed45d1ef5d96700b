"""A log that continues another: what its first record says of the one before (design 5, identity).

A log whose files or key are lost cannot go on under its name. A new one begins, by two people, and
its first record binds the last head that is known of the old one. Nothing proves that this was the
old log's last head: whoever holds a later one shows what is lacking.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from airgap.audit.anchors import Anchor, parse_anchor
from airgap.audit.checkpoint import Checkpoint
from airgap.audit.findings import NOTE, TAMPERED, UNKNOWN, Finding
from policy.errors import RefusedError

NAMES_ONE: Final = b'"previous":"'
UNKNOWN_ORIGIN: Final = "-"


@dataclass(frozen=True, slots=True)
class Previous:
    """The log before: its origin (`-` when not even that is known), and its last known head."""

    origin: str
    size: int = 0
    root: bytes = b""

    @classmethod
    def of(cls, checkpoint: Checkpoint | None, origin: str = UNKNOWN_ORIGIN) -> Previous:
        """Return what a head says; without one the origin alone."""
        if checkpoint is None:
            return cls(origin)
        return cls(checkpoint.origin, checkpoint.size, checkpoint.root)

    @classmethod
    def parse(cls, text: str) -> Previous:
        """Read the text form; RefusedError `audit.note`."""
        if " " not in text and text:
            return cls(text)
        anchor = parse_anchor(text.encode("ascii", "replace"), "previous")
        if not anchor.written:
            raise RefusedError("audit.note", "expected `origin size root` of the log before")
        return cls.of(anchor.checkpoint)

    def __str__(self) -> str:
        if not self.size:
            return self.origin
        return f"{self.origin} {self.size} {base64.b64encode(self.root).decode()}"


def find_previous(record: Mapping[str, Any]) -> Previous | None:
    """Return what a record says of the log before, None for any but a first one that does."""
    said = record.get("data", {}).get("previous") if record.get("kind") == "boot" else None
    return Previous.parse(said) if said and record.get("seq") == 0 else None


def judge_earlier(previous: Previous, anchor: Anchor) -> Finding:
    """Hold an anchor of the log before against what the new one says of it."""
    place = f"anchor {anchor.name}"
    if anchor.size > previous.size:
        return Finding(
            UNKNOWN, "lost records", place, 0,
            expected=f"the log before to end at {anchor.size} or later",
            found=f"it is said to end at {previous.size}; what follows is lost or was left out",
        )  # fmt: skip
    if anchor.size == previous.size and anchor.checkpoint.root != previous.root:
        return Finding(
            TAMPERED, "root", place, 0,
            expected=f"root {previous.root.hex()} of the log before at size {anchor.size}",
            found=anchor.checkpoint.root.hex(),
        )  # fmt: skip
    return Finding(NOTE, "log before", place, found="it is judged with the log before, not here")
