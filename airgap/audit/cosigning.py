"""Taking cosigned heads back: they become anchors of the log that they are about (design 6)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

from airgap.audit.checkpoint import MAX_NOTE, parse_checkpoint, verify_checkpoint
from airgap.audit.disk import Disk, open_plain
from airgap.audit.layout import Layout
from airgap.audit.quorum import Cosignature, load_policy, parse_policy
from airgap.audit.record import Event
from airgap.audit.steward import OwnLog
from airgap.audit.tree import StoredTree
from airgap.audit.witness import merge_notes
from policy.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of a cosigned head: who stands behind it, and whether that is a quorum."""

    size: int
    witnesses: tuple[str, ...]
    quorum: bool


def import_cosigned(log: OwnLog, content: bytes, policy_text: bytes | None) -> Imported:
    """Keep a cosigned head of this log as an anchor and put each cosignature on record.

    Args:
        log: Open, of this host.
        content: The note that a witness wrote.
        policy_text: The site's trust policy, kept in `log/policy.tlog`; None for the kept one.

    Raises:
        RefusedError: `audit.note`, the head is none of this log; `audit.witness`, no witness of the
            policy stands behind it; `audit.history`, this log has another root at that size.

    """
    layout, disk = Layout(log.folder), Disk()
    policy = load_policy(layout.policy) if policy_text is None else parse_policy(policy_text)
    checkpoint = parse_checkpoint(content)
    head = verify_checkpoint(checkpoint, log.ring)
    cosigners = policy.cosigners(checkpoint)
    if not cosigners:
        raise RefusedError(
            "audit.witness",
            "no witness of the trust policy has cosigned this head",
            hint="add the witness's line to policy.tlog, or bring back what it wrote",
        )
    if head.size > log.size or StoredTree(layout).root(head.size) != head.root:
        raise RefusedError(
            "audit.history",
            f"this log has another root at size {head.size} than the cosigned head",
            hint="keep both as evidence, run `airgap audit verify`, tell the security officer",
        )
    if policy_text is not None:
        disk.put(layout.policy, policy_text)
    path = layout.anchors / f"{head.size:012d}.note"
    note = checkpoint.note
    if path.is_file():
        with open_plain(path) as file:
            note = merge_notes(file.read(MAX_NOTE).decode(), note)
    disk.make_folder(layout.anchors)
    disk.put(path, note.encode())
    for cosignature in cosigners.values():
        log.append(_event(head.size, cosignature))
    try:
        names = policy.require(parse_checkpoint(note.encode()))
    except RefusedError:
        return Imported(head.size, tuple(sorted(cosigners)), quorum=False)
    log.note_anchor(head.size)
    return Imported(head.size, tuple(sorted(names)), quorum=True)


def _event(size: int, cosignature: Cosignature) -> Event:
    moment = datetime.fromtimestamp(cosignature.time, UTC)
    return Event(
        "import.cosign",
        data={
            "witness": cosignature.witness.name[:256],
            "size": size,
            "time": f"{moment:%Y-%m-%dT%H:%M:%SZ}",
            "cosignature": hashlib.sha256(cosignature.signature).hexdigest(),
        },
    )
