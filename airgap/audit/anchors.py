"""Heads from outside: receipts and cosigned or plain checkpoints that somebody else kept.

They are the only thing that a verifier can hold against root (docs/design/audit.md, 6). Nothing is
believed here; `verify` asks for signature, epoch and quorum when it knows the log's keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from airgap.audit.checkpoint import (
    Checkpoint,
    Head,
    Keys,
    parse_checkpoint,
    ring_of,
    unsigned_checkpoint,
    verify_checkpoint,
)
from airgap.audit.disk import open_plain
from airgap.audit.findings import UNKNOWN, Findings
from airgap.audit.quorum import Policy
from airgap.audit.receipt import HEADER, MAX_RECEIPT, Receipt, parse_receipt, verify_receipt
from policy.errors import FaultError, RefusedError

_SHORT: Final = re.compile(rb"([!-*,-~]{1,200}) (0|[1-9][0-9]{0,15}) ([A-Za-z0-9+/]{43}=)\s*")


@dataclass(frozen=True, slots=True)
class Anchor:
    """A head from outside that was read and not yet verified; `receipt` proves one record too.

    A head that somebody wrote down (`origin size root`, no signature) is as good as his word.
    """

    name: str
    checkpoint: Checkpoint
    receipt: Receipt | None
    written: bool = False

    @property
    def size(self) -> int:
        """How many records it covers."""
        return self.checkpoint.size

    def verify(self, keys: Keys, policy: Policy | None) -> Head:
        """Return the head if a key of the log signed it and the policy's quorum stands behind it.

        A receipt is kept by its reader, who is a witness himself; no quorum is asked of it.

        Raises:
            RefusedError: `audit.note`, `audit.proof` or `audit.quorum`.

        """
        if self.receipt is not None:
            return verify_receipt(self.receipt, keys)
        if self.written:
            return _of_origin(self.checkpoint, keys)
        head = verify_checkpoint(self.checkpoint, keys)
        if policy is not None:
            policy.require(self.checkpoint)
        return head


def parse_anchor(content: bytes, name: str) -> Anchor:
    """Return the anchor in a receipt, a signed note or a short head; RefusedError when none."""
    if content.startswith(HEADER.encode()):
        receipt = parse_receipt(content)
        return Anchor(name, parse_checkpoint(receipt.note.encode()), receipt)
    if short := _SHORT.fullmatch(content):
        origin, size, root = (part.decode() for part in short.groups())
        return Anchor(name, unsigned_checkpoint(origin, size, root), None, written=True)
    return Anchor(name, parse_checkpoint(content), None)


def read_anchors(paths: Sequence[Path], findings: Findings) -> list[Anchor]:
    """Return what can be read; an anchor that cannot be is a reason for *cannot tell*.

    Raises:
        FaultError: `host.io`; a path is not there.

    """
    found = []
    for path in _files(paths):
        try:
            with open_plain(path) as file:
                found.append(parse_anchor(file.read(MAX_RECEIPT + 1), path.name))
        except (RefusedError, OSError) as error:
            findings.add(UNKNOWN, "anchor", path.name, found=str(error))
    return found


def _of_origin(checkpoint: Checkpoint, keys: Keys) -> Head:
    origin = ring_of(keys).name
    if checkpoint.origin != origin:
        raise RefusedError(
            "audit.note", f"a head of {checkpoint.origin!r:.80}, expected {origin!r:.80}"
        )
    return Head(origin, checkpoint.size, checkpoint.root, checkpoint.note)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.iterdir() if p.is_file())
        elif path.exists():
            yield path
        else:
            raise FaultError("host.io", f"no anchor at {path}", hint="check the path")
