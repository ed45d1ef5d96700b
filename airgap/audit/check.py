"""Checking one receipt: what it proves alone, and what the log says to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from airgap.audit.checkpoint import Keys, parse_checkpoint
from airgap.audit.layout import Layout, read_lines
from airgap.audit.receipt import Receipt, parse_receipt, verify_path, verify_receipt
from airgap.audit.record import Record, parse_line
from airgap.audit.tiles import SEGMENT
from policy.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of a receipt. `record` is the line it proves, where the log is at hand."""

    receipt: Receipt
    signed: bool
    record: Record | None

    @property
    def exit(self) -> int:
        """0 when a known key signed it, 3 when no key was there to tell."""
        return 0 if self.signed else 3

    def as_document(self) -> dict[str, object]:
        """Return the result for JSON output."""
        return self.receipt.as_document() | {
            "verdict": "good" if self.signed else "cannot tell",
            "in_log": self.record is not None,
            "record": dict(self.record) if self.record is not None else None,
        }

    def text(self) -> str:
        """Return the result in words."""
        signed = "signed by the known key" if self.signed else "signature NOT checked: no key given"
        first = f"record {self.receipt.seq} of {self.receipt.size} in {self.receipt.origin}"
        if self.record is None:
            return f"{first}\nproof holds; {signed}; the log is not at hand"
        what = f"{self.record['kind']} {self.record['phase']} at {self.record['ts']}"
        return f"{first}\nproof holds; {signed}; the log holds that record: {what}"


def check(content: bytes, *, vkey: Keys | None, folder: Path) -> Checked:
    """Check a receipt, with the log in `folder` if there is one.

    Raises:
        RefusedError: `audit.proof`, `audit.note`; the receipt is malformed or does not hold.
        RefusedError: `audit.tampered`; the log has another record at that place, or none.

    """
    receipt = parse_receipt(content)
    if vkey is not None:
        verify_receipt(receipt, vkey)
    else:
        verify_path(receipt, parse_checkpoint(receipt.note.encode()))
    return Checked(receipt, vkey is not None, _record(receipt, Layout(folder)))


def _record(receipt: Receipt, layout: Layout) -> Record | None:
    """Return the record that the receipt proves; None where there is no log to ask."""
    if not layout.log.is_dir():
        return None
    path = layout.segment(receipt.seq // SEGMENT)
    skip = receipt.seq % SEGMENT
    for number, line in enumerate(read_lines(path) if path.is_file() else ()):
        if number == skip:
            leaf = hashlib.sha256(b"\0" + line.removesuffix(b"\n")).digest()
            if leaf != receipt.leaf:
                raise RefusedError(
                    "audit.tampered",
                    f"record {receipt.seq}: the receipt proves leaf {receipt.leaf.hex()}, "
                    f"the log has {leaf.hex()}",
                    hint="keep receipt and log as evidence; run `airgap audit verify --anchors`",
                )
            return parse_line(line.removesuffix(b"\n"))
    raise RefusedError(
        "audit.tampered",
        f"the receipt proves record {receipt.seq}, which the log does not hold: rolled back",
        hint="keep receipt and log as evidence; run `airgap audit verify --anchors`",
    )
