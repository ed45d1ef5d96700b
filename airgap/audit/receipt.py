"""Receipts, C2SP tlog-proof v1: each makes its reader a witness (docs/design/audit.md, 6).

A receipt says: the record with this sequence number and leaf hash lies in the log whose head this
is. The leaf hash travels as `extra` data; nothing is believed about it but what the proof shows.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final

from airgap.audit.checkpoint import (
    MAX_NOTE,
    Checkpoint,
    Head,
    Keys,
    parse_checkpoint,
    strict_hash,
    verify_checkpoint,
)
from bundle.merkle import verify_inclusion
from policy.errors import RefusedError

HEADER: Final = "c2sp.org/tlog-proof@v1"
MAX_RECEIPT: Final = MAX_NOTE + 8_192
MAX_PROOF: Final = 63
_INDEX: Final = re.compile("index (0|[1-9][0-9]{0,15})")


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a record is durable: `seq` in the tree of `size` leaves that `note` signs."""

    seq: int
    size: int
    leaf: bytes  # 32 bytes
    proof: tuple[bytes, ...]
    note: str

    @property
    def origin(self) -> str:
        """The log's name."""
        return self.note.split("\n", 1)[0]

    def as_proof(self) -> str:
        """Return the text of a `.tlog-proof` file."""
        hashes = "".join(f"{base64.b64encode(h).decode()}\n" for h in self.proof)
        extra = base64.b64encode(self.leaf).decode()
        return f"{HEADER}\nextra {extra}\nindex {self.seq}\n{hashes}\n{self.note}"

    def as_document(self) -> dict[str, object]:
        """Return the short form for JSON output."""
        return {
            "origin": self.origin,
            "seq": self.seq,
            "size": self.size,
            "leaf": f"sha256:{self.leaf.hex()}",
            "root": base64.b64encode(parse_checkpoint(self.note.encode()).root).decode(),
        }


def parse_receipt(content: bytes) -> Receipt:
    """Read a `.tlog-proof` file that nobody trusts.

    Raises:
        RefusedError: `audit.proof`, or `audit.note` for the checkpoint inside.

    """
    if len(content) > MAX_RECEIPT:
        raise _bad(f"{len(content)} bytes")
    head, blank, note = content.partition(b"\n\n")
    try:
        lines = head.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise _bad("not ASCII before the checkpoint") from None
    if not blank or lines[0] != HEADER:
        raise _bad(f"expected the first line {HEADER}")
    if len(lines) < 3 or not lines[1].startswith("extra "):  # noqa: PLR2004
        raise _bad("the leaf hash is missing (second line, `extra`)")
    index = _INDEX.fullmatch(lines[2])
    if index is None or len(lines) > 3 + MAX_PROOF:
        raise _bad("expected an index and at most 63 hashes")
    try:
        leaf = strict_hash(lines[1].removeprefix("extra "))
        proof = tuple(strict_hash(line) for line in lines[3:])
    except ValueError as error:
        raise _bad(str(error)) from None
    checkpoint = parse_checkpoint(note)
    return Receipt(int(index[1]), checkpoint.size, leaf, proof, checkpoint.note)


def verify_receipt(receipt: Receipt, keys: Keys) -> Head:
    """Return the head if a known key signed it and it holds the leaf at that index.

    Raises:
        RefusedError: `audit.note`, or `audit.proof` when the inclusion proof does not hold.

    """
    head = verify_checkpoint(parse_checkpoint(receipt.note.encode()), keys)
    verify_path(receipt, head)
    return head


def verify_path(receipt: Receipt, head: Head | Checkpoint) -> None:
    """Return if the receipt's leaf lies in that tree; RefusedError `audit.proof` if not."""
    try:
        verify_inclusion(receipt.leaf, receipt.seq, head.size, receipt.proof, head.root)
    except RefusedError as error:
        raise _bad(error.message) from error


def _bad(message: str) -> RefusedError:
    return RefusedError("audit.proof", f"receipt: {message}")
