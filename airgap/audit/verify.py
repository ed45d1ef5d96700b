"""Verification of a log with public keys alone (docs/design/audit.md, 9).

`verify_log` reads the folder once, believes nothing in it, and returns a verdict: *good* only if an
outside anchor was compared, *tampered* if anything contradicts, *cannot tell* otherwise. Keys,
policy and anchors come from whoever verifies, never from the folder under test.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from airgap.audit.anchors import Anchor, read_anchors
from airgap.audit.checkpoint import (
    MAX_NOTE,
    Checkpoint,
    Keys,
    Ring,
    is_torn,
    parse_checkpoint,
    ring_of,
    verify_checkpoint,
)
from airgap.audit.disk import open_plain
from airgap.audit.epochs import Epochs, Rotation, align
from airgap.audit.export.manifest import BUNDLES, CONSISTENCY, check_export
from airgap.audit.export.sign import FILE as SIGNATURES
from airgap.audit.export.sign import SCHEMES, ExportPublic
from airgap.audit.findings import GOOD, NOTE, TAMPERED, UNKNOWN, Finding, Findings, Verdict
from airgap.audit.layout import Layout, last_checkpoint, parse_journal_line
from airgap.audit.opening import open_payloads
from airgap.audit.payloads import HolderKey
from airgap.audit.previous import judge_earlier
from airgap.audit.quorum import Policy
from airgap.audit.stream import SIGNER_PREFIX, Collected, Progress, Question, Stream
from policy.errors import RefusedError

__all__ = ["NOTE", "TAMPERED", "UNKNOWN", "Finding", "Verdict", "verify_log"]

_JOURNAL: Final = "log/checkpoints.jsonl"
_CURRENT: Final = "log/checkpoint"


def verify_log(
    folder: Path,
    *,
    vkey: Keys | None,
    anchors: Sequence[Path] = (),
    policy: Policy | None = None,
    export_keys: ExportPublic | None = None,
    required: Sequence[str] = SCHEMES,
    holder: HolderKey | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check everything in `folder` that public keys and outside anchors can show.

    Args:
        folder: Holds `log/`; with a `manifest.json` it is an export, where nothing may be unsigned.
        vkey: The log's verifier keys; without any the best verdict is *cannot tell*.
        anchors: Receipts (`.tlog-proof`) and checkpoints kept elsewhere, or folders of them.
        policy: Which witnesses must stand behind a checkpoint that is used as an anchor; its log
            keys serve where `vkey` is not given.
        export_keys: Keys of the host that made an export; without them its signatures are not
            judged.
        required: Signatures that an export must bear when `export_keys` are given.
        holder: The private key of whoever may read payloads: each is opened and held against its
            record's commitment. What is sealed to another key changes no verdict.
        progress: Called with bytes read and bytes in all.

    """
    layout, findings = Layout(folder), Findings()
    live = not layout.manifest.exists()
    kept = read_anchors(anchors, findings)
    ring = _trusted(vkey, policy)
    if ring is None:
        findings.add(UNKNOWN, "signature", _CURRENT, found="no verifier key was given")
    writer = _is_held(layout, live=live)
    try:
        mark = _export_mark(layout) if live else ""
        if mark:
            findings.add(
                TAMPERED, "manifest", "manifest.json",
                expected=f"the manifest of an export, of which {mark} is here",
                found="nothing: an export without its manifest is not judged as a live log",
            )  # fmt: skip
            return _verdict(findings, None, Collected(), [], len(kept))
        special = next(_special_files(layout), None)
        if special is not None:
            findings.add(TAMPERED, "files", special, found="a pipe or device")
            return _verdict(findings, None, Collected(), [], 0)
        heads = _find_heads(layout, findings, live=live)
        question = _question(heads, kept, live=live, writer=writer)
        found = Stream(layout, question, findings).run(progress)
        judge = _Judge(layout, ring, policy, found, findings, live=live, writer=writer)
        head = judge.heads(heads)
        matched = judge.anchors(kept)
        judge.beginning()
        judge.previous()
        judge.payloads()
        opened = None
        if holder is not None:
            opened = open_payloads(layout, question.origin, holder, findings)
        if not live:
            for finding in check_export(folder, export_keys, required):
                findings.keep(finding)
    except OSError as error:
        name = str(error.filename or folder)
        gone = isinstance(error, FileNotFoundError) and not live  # an export is whole, or none
        level = TAMPERED if gone else UNKNOWN
        findings.add(level, "read", name, found=error.strerror or str(error))
        return _verdict(findings, None, Collected(), [], len(kept))
    verdict = _verdict(findings, head, found, matched, len(kept))
    return verdict if opened is None else replace(verdict, opened=opened)


def _export_mark(layout: Layout) -> str:
    """Return what only an export has; a live log never holds it."""
    for name in (SIGNATURES, CONSISTENCY, f"log/tile/{BUNDLES}"):
        if os.path.lexists(layout.folder / name):
            return name
    return next((path.name for path in sorted(layout.folder.glob("records.*"))), "")


def _trusted(vkey: Keys | None, policy: Policy | None) -> Ring | None:
    if vkey is not None:
        return ring_of(vkey)
    return Ring(policy.logs) if policy is not None and policy.logs else None


def _is_held(layout: Layout, *, live: bool) -> bool:
    """Whether a writer holds the log at this moment."""
    if not live:
        return False
    try:
        fd = os.open(layout.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _verdict(
    findings: Findings, head: Checkpoint | None, found: Collected, matched: list[int], kept: int
) -> Verdict:
    if findings.has(TAMPERED):
        word = TAMPERED
    elif findings.has(UNKNOWN) or not matched:
        word = UNKNOWN
        if not kept or not findings.has(UNKNOWN):
            findings.add(
                UNKNOWN, "anchor", "--anchors", found="no outside head to compare this log with"
            )
    else:
        word = GOOD
    return Verdict(
        verdict=word,
        origin=head.origin if head else "",
        size=head.size if head else 0,
        records=found.size,
        first=found.first,
        anchored_size=max(matched, default=0),
        anchors=len(matched),
        root=base64.b64encode(head.root).decode() if head else "",
        findings=findings.in_order(),
        previous=str(found.previous) if found.previous else "",
    )


# -- heads -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Heads:
    """The newest heads in the folder by place, not verified, and where the journal ends."""

    found: dict[str, Checkpoint]
    journal_end: int

    @property
    def newest(self) -> Checkpoint | None:
        return max(self.found.values(), key=lambda c: c.size, default=None)


def _find_heads(layout: Layout, findings: Findings, *, live: bool) -> _Heads:
    """Return the newest heads; findings say what is wrong with the files that hold them."""
    found: dict[str, Checkpoint] = {}
    end = 0
    journal = last_checkpoint(layout.journal)
    current = _read_current(layout, findings, live=live)
    crash = UNKNOWN if live else TAMPERED  # a crash explains it in a live folder alone
    if journal is not None:
        found[_JOURNAL], end = journal
        if end != layout.journal.stat().st_size:
            findings.add(crash, "head journal", _JOURNAL, found="a torn last line")
    if current is not None:
        found[_CURRENT] = current
        if journal is None or journal[0].size < current.size:
            findings.add(crash, "head journal", _JOURNAL, found="behind the checkpoint")
    if len({checkpoint.origin for checkpoint in found.values()}) > 1:
        findings.add(TAMPERED, "fork", _CURRENT, found="checkpoint and journal of two logs")
    return _Heads(found, end)


def _read_current(layout: Layout, findings: Findings, *, live: bool) -> Checkpoint | None:
    try:
        with open_plain(layout.checkpoint) as file:
            content = file.read(MAX_NOTE + 1)
    except FileNotFoundError:
        if not live:
            findings.add(TAMPERED, "checkpoint", _CURRENT, found="nothing")
        return None
    if live and is_torn(content):
        findings.add(NOTE, "checkpoint", _CURRENT, found="empty or torn, as a crash may leave it")
        return None
    try:
        return parse_checkpoint(content)
    except RefusedError as error:
        findings.add(TAMPERED, "checkpoint", _CURRENT, found=error.message)
        return None


def _question(heads: _Heads, kept: list[Anchor], *, live: bool, writer: bool) -> Question:
    newest = heads.newest
    sizes = {head.size for head in heads.found.values()} | {anchor.size for anchor in kept}
    return Question(
        origin=newest.origin if newest else "",
        signed=newest.size if newest else 0,
        journal_end=heads.journal_end,
        sizes=frozenset(sizes),
        leaves=frozenset(anchor.receipt.seq for anchor in kept if anchor.receipt),
        live=live,
        writer=writer,
    )


# -- what the pass collected, against keys and anchors -------------------------------------------


class _Judge:
    """Holds what the pass learned against the keys, the policy and the anchors."""

    def __init__(
        self,
        layout: Layout,
        ring: Ring | None,
        policy: Policy | None,
        found: Collected,
        findings: Findings,
        *,
        live: bool,
        writer: bool,
    ) -> None:
        self._layout, self._policy, self._found, self._findings = layout, policy, found, findings
        self._live, self._writer = live, writer
        self._epochs = Epochs(None)
        self._ring = ring

    def heads(self, heads: _Heads) -> Checkpoint | None:
        """Judge the heads in the folder and return the newest that is signed as it must be."""
        findings, newest = self._findings, heads.newest
        signed = newest.size if newest else 0
        rotations = [each for each in self._found.rotations if each.size <= signed]
        if self._ring is not None:
            self._epochs, problem = align(self._ring, rotations)
            if problem and newest is not None:
                findings.add(TAMPERED, "key epoch", "log/seg", expected=problem)
            for rotation in rotations:
                self._closing(rotation)
            self._signers()
        good = {place: head for place, head in heads.found.items() if self._signed(place, head)}
        for place, head in good.items():
            self._compare_root(place, head)
        best = max(good.values(), key=lambda c: c.size, default=None)
        self._size(best)
        return best

    def _signed(self, place: str, checkpoint: Checkpoint) -> bool:
        keys = self._epochs.ring
        if self._ring is None or keys is None:
            return True
        try:
            self._epochs.require(verify_checkpoint(checkpoint, keys))
        except RefusedError as error:
            check = "key epoch" if error.code == "audit.epoch" else "signature"
            self._findings.add(TAMPERED, check, place, found=error.message)
            return False
        return True

    def _closing(self, rotation: Rotation) -> None:
        """The last head of an epoch bears the signatures of the old key and of the next."""
        line = self._found.closing.get(rotation.size)
        expected = f"the head of size {rotation.size}, signed by the old key and the next"
        keys = self._epochs.ring
        if line is None or keys is None:
            self._findings.add(TAMPERED, "key epoch", _JOURNAL, expected=expected, found="nothing")
            return
        try:
            head = verify_checkpoint(parse_journal_line(line), keys)
            self._epochs.require(head)
        except RefusedError as error:
            self._findings.add(
                TAMPERED, "key epoch", _JOURNAL, expected=expected, found=error.message
            )
            return
        if rotation.vkey.key_id not in head.signers:
            self._findings.add(
                TAMPERED, "key epoch", _JOURNAL, expected=expected, found="the old key alone"
            )

    def _signers(self) -> None:
        """Whoever a head of the journal names as its signer must be the key of that epoch."""
        keys = [self._epochs.holder(1), *(each.vkey for each in self._epochs.rotations)]
        for (epoch, prefix), size in sorted(self._found.signers.items()):
            holder = keys[epoch] if epoch < len(keys) else None
            if holder is not None and prefix != _signer_prefix(holder.key_id):
                self._findings.add(
                    TAMPERED, "key epoch", _JOURNAL,
                    expected=f"key {holder.key_id.hex()} to sign size {size}",
                    found="a signature in the name of another key",
                )  # fmt: skip

    def _compare_root(self, place: str, head: Checkpoint) -> None:
        root = self._found.roots.get(head.size)
        if root is not None and root != head.root:
            self._findings.add(
                TAMPERED, "root", place, expected=f"root {head.root.hex()} at size {head.size}",
                found=root.hex(),
            )  # fmt: skip

    def _size(self, head: Checkpoint | None) -> None:
        size, findings = self._found.size, self._findings
        if head is None and size:
            findings.add(TAMPERED, "head", "log", found=f"{size} records without a signed head")
        elif head is None:
            findings.add(UNKNOWN, "log", "log", found="no log here")
        elif size < head.size:
            findings.add(
                TAMPERED, "size", "log/seg", expected=f"{head.size} signed records", found=f"{size}"
            )
        elif size > head.size:
            self._past_head(size, head.size)

    def _past_head(self, size: int, signed: int) -> None:
        if not self._live:
            self._findings.add(
                TAMPERED, "size", "log/seg", expected=f"{signed} signed records", found=f"{size}"
            )
        elif self._writer:
            # A writer is at work: what came since is under a newer head by now.
            self._findings.add(NOTE, "tail", "log/seg", found="records of a writer that is running")
        else:
            self._findings.add(
                UNKNOWN, "unrecovered tail", "log/seg", signed,
                found=f"{size - signed} records after the newest head; the next open signs them",
            )  # fmt: skip

    # -- anchors and what is missing -----------------------------------------------------------

    def anchors(self, kept: list[Anchor]) -> list[int]:
        """Compare each outside head with this log and return the sizes of those that agree."""
        keys = self._epochs.ring
        return [
            anchor.size
            for anchor in kept
            if self._ring is not None and keys is not None and self._agrees(anchor, keys)
        ]

    def _agrees(self, anchor: Anchor, keys: Ring) -> bool:
        place, size = f"anchor {anchor.name}", self._found.size
        before = self._found.previous
        if before is not None and anchor.checkpoint.origin == before.origin != keys.name:
            self._findings.keep(judge_earlier(before, anchor))
            return False
        try:
            head = anchor.verify(keys, self._policy)
            if not anchor.written:
                self._epochs.require(head)
        except RefusedError as error:
            level = TAMPERED if error.code == "audit.epoch" else UNKNOWN
            check = "key epoch" if error.code == "audit.epoch" else "anchor"
            self._findings.add(level, check, place, found=error.message)
            return False
        if anchor.size > size:
            self._findings.add(
                TAMPERED, "rollback", place, expected=f"at least {anchor.size} records",
                found=f"{size}",
            )  # fmt: skip
            return False
        root = self._found.roots.get(anchor.size)
        if root != anchor.checkpoint.root:
            self._findings.add(
                TAMPERED, "root", place,
                expected=f"root {anchor.checkpoint.root.hex()} at size {anchor.size}",
                found=root.hex() if root else "nothing",
            )  # fmt: skip
        if anchor.receipt is not None:
            leaf = self._found.leaves.get(anchor.receipt.seq)
            if leaf != anchor.receipt.leaf:
                self._findings.add(
                    TAMPERED, "receipt", place, anchor.receipt.seq,
                    expected=f"leaf hash {anchor.receipt.leaf.hex()}",
                    found=leaf.hex() if leaf else "nothing",
                )  # fmt: skip
        return root == anchor.checkpoint.root and anchor.size > 0

    def beginning(self) -> None:
        """A log that begins later was pruned on record; an export says that it is partial."""
        first = self._found.first
        if not first or not self._live:
            return
        if any(int(each["data"]["last"]) + 1 >= first for each in self._found.prunings):
            self._findings.add(
                NOTE, "pruned", "log/seg", found=f"records before {first} are there by hash alone"
            )
        else:
            self._findings.add(
                TAMPERED, "segment", "log/seg", expected="record 0, or a pruning on record",
                found=f"a log that begins with record {first}",
            )  # fmt: skip

    def previous(self) -> None:
        """A log that was begun in place of another says so, and who began it."""
        if self._found.previous is not None:
            data = self._found.beginning["data"]
            self._findings.add(
                NOTE, "log before", "log/seg", 0,
                found=f"begun by {data.get('person_1', '?')} and {data.get('person_2', '?')} in "
                f"place of {self._found.previous}",
            )  # fmt: skip

    def payloads(self) -> None:
        """Each encrypted payload that a record names is there, or was purged on record."""
        left_out = not self._live and not self._layout.sealed.is_dir()
        for digest, seq in self._found.sealed.items():
            name = digest[7:].decode()
            place = f"log/sealed/{name[:2]}/{name}"
            try:
                with open_plain(self._layout.payload(name)) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                if digest not in self._found.purged and not left_out:
                    self._findings.add(
                        TAMPERED, "payload", place, seq, found="nothing",
                        expected="the encrypted payload, or a purge on record",
                    )  # fmt: skip
                continue
            if found != name:
                self._findings.add(
                    TAMPERED, "payload", place, seq, expected=digest.decode(),
                    found=f"sha256:{found}",
                )  # fmt: skip
        if left_out and self._found.sealed:
            self._findings.add(NOTE, "payload", "log/sealed", found="left out of this export")


def _signer_prefix(key_id: bytes) -> bytes:
    return base64.b64encode(key_id)[:SIGNER_PREFIX]


def _special_files(layout: Layout) -> Iterator[str]:
    """Yield what in the log is neither file nor folder, which no writer makes."""
    for place, folders, names in os.walk(layout.log):
        for name in [*folders, *names]:
            path = Path(place) / name
            if path.exists() and not (path.is_file() or path.is_dir()):
                yield path.relative_to(layout.folder).as_posix()
