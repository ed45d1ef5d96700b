"""Verification by the holder of the payload key: every sealed text opened and compared.

With public keys alone a verifier sees that a payload is the blob which its record names. The holder
sees more: that the blob opens, and that the record commits to what is in it (design 9, step 7).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from airgap.audit.disk import open_plain
from airgap.audit.findings import NOTE, TAMPERED, Findings, Opened
from airgap.audit.layout import Layout, read_lines, segment_range
from airgap.audit.payloads import MAX_BLOB, SIDES, HolderKey
from airgap.audit.record import Record, parse_line
from policy.errors import RefusedError

_NAMES_ONE = b'"sealed":"'


def open_payloads(layout: Layout, origin: str, holder: HolderKey, findings: Findings) -> Opened:
    """Open each payload that a record of the log names, one at a time.

    That it has the digest which its record names, or is gone for a reason, is the affair of the
    pass over all records.
    """
    opener = _Opener(layout, origin, holder, findings)
    try:
        there = segment_range(layout)
    except RefusedError:
        there = range(0)  # The pass over all records reports it.
    for index in there:
        for raw in read_lines(layout.segment(index)):
            if _NAMES_ONE in raw and raw.endswith(b"\n"):
                opener.line(raw[:-1])
    findings.add(NOTE, "payloads", "log/sealed", found=str(opener.found))
    return opener.found


@dataclass(slots=True)
class _Opener:
    """Opens what single records name."""

    layout: Layout
    origin: str
    holder: HolderKey
    findings: Findings
    found: Opened = field(default_factory=Opened)

    def line(self, line: bytes) -> None:
        try:
            record = parse_line(line)
        except RefusedError:
            return  # The pass over all records reports it.
        for side in SIDES:
            if "sealed" in record.get(side, ()):
                self._open(record, side)

    def _open(self, record: Record, side: str) -> None:
        name, seq = record[side]["sealed"][7:], record["seq"]
        try:
            with open_plain(self.layout.payload(name)) as file:
                blob = file.read(MAX_BLOB + 1)
        except FileNotFoundError:
            self.found.gone += 1
            return
        whole = hashlib.sha256(blob).hexdigest() == name
        if whole and not self.holder.is_meant(blob):
            self.found.other_key += 1
            return
        try:
            self.holder.open(blob, record, origin=self.origin, side=side)
        except RefusedError as error:
            self.findings.add(
                TAMPERED, "commitment", f"log/sealed/{name[:2]}/{name}", seq,
                expected=f"what record {seq} commits to as {side!r}", found=error.message,
            )  # fmt: skip
        else:
            self.found.opened += 1
