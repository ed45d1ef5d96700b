"""Restore of a backup as a new tree, whose log goes on and can show it (`backup_format`).

Whoever restores trusts neither the medium nor the file, only the verifier key of the log that she
holds. What is written is written beside, checked, and renamed when all of it holds.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from airgap.audit import (
    Actor,
    AuditLog,
    Event,
    Receipt,
    Verdict,
    new_ulid,
    parse_receipt,
    verify_log,
    verify_receipt,
)
from airgap.audit.checkpoint import Head as LogHead
from airgap.audit.checkpoint import Ring, load_log_key
from airgap.audit.record import parse_line
from airgap.install.backup_format import (
    CODE,
    HEAD,
    HEAD_LIMIT,
    INVENTORY,
    KIND,
    Head,
    Inventory,
    names_log_file,
    parse_head,
    parse_inventory,
)
from airgap.install.store import delete_tree
from bundle.archive import Progress
from bundle.durable import sync_folder
from bundle.source import Source, read_exactly
from bundle.tar import ALIGN, BLOCK, header_blocks, parse_size, read_document, round_up
from bundle.write import require_space
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

_PART: Final = 4 << 20
_LARGE: Final = re.compile(rb" size=([1-9][0-9]{10,15})\n")  # where the field of ustar is too short
_FOLDER: Final = "audit/"

OpenLog = Callable[[Path], AuditLog]


@dataclass(frozen=True, slots=True)
class Restored:
    """A tree that was restored. `records` were in the backup; `receipt` is of the next."""

    origin: str
    records: int
    files: int
    verdict: Verdict
    created: datetime
    receipt: Receipt


def restore(
    source: Source,
    root: Path,
    *,
    ring: Ring,
    anchors: Sequence[Path] = (),
    open_log: OpenLog,
    actor: Actor | None,
    progress: Progress | None = None,
) -> Restored:
    """Bring a backup back as the tree `root`, and go on with its log.

    Args:
        source: The opened backup; `bundle.transit.TransitFile`.
        root: May not exist, or must be empty.
        ring: Verifier keys of the log, kept elsewhere.
        anchors: Receipts and heads kept elsewhere: a log that has gone on since is told by them.
        open_log: Opens the log of a tree in this process.
        actor: Who does it.
        progress: Told bytes.

    Raises:
        RefusedError: `backup.target`, there is something at `root`; `backup.format`;
            `backup.digest`, a file is not the one of the inventory, or the inventory not the one
            that the log names; `backup.log`, the log does not verify, or has gone on elsewhere.
        FaultError: `host.io`, `host.space`.

    """
    root = root.absolute()
    if root.is_symlink() or (root.exists() and (not root.is_dir() or any(root.iterdir()))):
        raise RefusedError(
            "backup.target",
            f"{root} exists and is not an empty folder",
            hint="name a new folder with --root; nothing is ever restored over a tree",
        )
    proven = _prove(source, ring)
    partial = root.with_name(f".{root.name}.restoring")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(partial):
            require_space(root.parent, source.size)
            _write_files(source, proven, partial, progress)
            verdict = _require_log(partial / "audit", proven, ring, anchors)
            _require_key(partial, ring)
            request = new_ulid()
            raw = proven.inventory.to_bytes()
            facts = {"object": str(Digest.of(raw)), "old": f"record {proven.head.size}"}
            with open_log(partial) as log:
                evidence = str(log.put_object(raw))
                facts["evidence"] = evidence
                log.append(Event("admin.restore", req=request, actor=actor, data=facts))
            _protect_releases(partial)
            if root.exists():
                root.rmdir()
            partial.rename(root)
            sync_folder(root.parent)
    except OSError as error:
        raise FaultError(
            "host.io",
            f"{root} cannot be restored: {error.strerror or error}",
            hint="check the disk and who may write there; the folder "
            f"{partial.name} beside it may be deleted",
        ) from error
    with open_log(root) as log:
        facts["result"] = "complete"
        receipt = log.append(Event("admin.restore", req=request, actor=actor, data=facts))
    return Restored(
        origin=proven.head.origin,
        records=proven.head.size,
        files=len(proven.inventory.files),
        verdict=verdict,
        created=proven.inventory.created,
        receipt=receipt,
    )


# -- what a key vouches for, before anything is written ----------------------------------------


@dataclass(frozen=True, slots=True)
class _Proven:
    """The inventory that a signed head of the log vouches for; files begin at byte `start`."""

    head: LogHead
    inventory: Inventory
    start: int


def _prove(source: Source, ring: Ring) -> _Proven:
    """Return the inventory of a backup, if a record of the log whose keys are given names it."""
    try:
        raw = read_document(source, 0, HEAD, HEAD_LIMIT)
    except RefusedError as error:
        raise RefusedError(
            CODE,
            f"{source.path.name!r:.100} holds no backup: {error.message}",
            hint="airgap backup makes one; a bundle is taken by airgap install",
        ) from error
    document = parse_head(raw)
    head, named = _require_record(document, ring)
    size = document.inventory_size
    start = _require_header(source, ALIGN + len(raw), INVENTORY, size)
    content = read_exactly(source, start, size)
    if str(Digest.of(content)) != named:
        raise RefusedError(
            "backup.digest",
            "the inventory is not the one that the log names",
            hint="the file was put together from parts; take another copy of the backup",
        )
    return _Proven(head, parse_inventory(content), start + size)


def _require_record(document: Head, ring: Ring) -> tuple[LogHead, str]:
    """Return the head of the log and the inventory that its record of this backup names."""
    try:
        receipt = parse_receipt(document.proof.encode())
        head = verify_receipt(receipt, ring)
        record = parse_line(document.record.encode())
    except RefusedError as error:
        raise RefusedError(
            "backup.log",
            f"no key that was given vouches for this backup: {error.message}",
            hint="give the verifier keys of this very log: --vkey FILE",
        ) from error
    leaf = hashlib.sha256(b"\0" + document.record.encode()).digest()
    data = record.get("data", {})
    if leaf != receipt.leaf or record["kind"] != KIND or "result" in data:
        raise RefusedError(
            "backup.log",
            f"record {receipt.seq} of the log is not that of a backup which begins",
            hint="the file was put together from parts; take another copy of the backup",
        )
    return head, str(data.get("object", ""))


def _require_header(source: Source, end: int, name: str, size: int) -> int:
    """Return where a file begins whose header must follow the byte `end`, and nothing else may."""
    at = round_up(end, BLOCK)
    expected = bytes(at - end) + header_blocks(name, size, at, ends_at=0)
    if read_exactly(source, end, len(expected)) != expected:
        raise RefusedError(CODE, f"where {name!r:.100} must begin, the backup holds something else")
    return end + len(expected)


# -- files -------------------------------------------------------------------------------------


def _write_files(source: Source, proven: _Proven, partial: Path, progress: Progress | None) -> None:
    end = proven.start
    for item in proven.inventory.files:
        start = _require_header(source, end, f"files/{item.path}", item.size)
        end = start + item.size
        found = _write_one(source, start, item.size, partial / item.path, item.mode)
        if found != item.sha256:
            raise RefusedError(
                "backup.digest",
                f"{item.path!r:.160} is not the file that was backed up",
                hint="take another copy of the backup",
            )
        if progress is not None:
            progress(end, source.size)
    for name, start, size in _log_files(source, end):
        # Nothing vouches for modes of the log's files: its owner reads and writes them.
        _write_one(source, start, size, partial / name, 0o600)
        if progress is not None:
            progress(start + size, source.size)
    for name, target in proven.inventory.links.items():
        (partial / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (partial / name).symlink_to(target)


def _log_files(source: Source, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, place and size of what follows byte `end`: files of the log, up to the end."""
    seen: set[str] = set()
    while True:
        at = round_up(end, BLOCK)
        if any(read_exactly(source, end, at - end)):
            raise RefusedError(CODE, f"bytes at {end:,} of the backup are not zero")
        if not any(read_exactly(source, at, BLOCK)):
            break
        name, start, size = _read_header(source, at)
        if not name.startswith(_FOLDER) or not names_log_file(name.removeprefix(_FOLDER)):
            raise RefusedError(CODE, f"the backup: {name!r:.100} is no file of a log")
        if name in seen:
            raise RefusedError(CODE, f"the backup: {name!r:.100} stands twice")
        seen.add(name)
        end = start + size
        if end > source.size:
            raise RefusedError(CODE, f"the backup ends before {name!r:.100} does")
        yield name, start, size
    rest = source.size - at
    if rest != round_up(at + 2 * BLOCK, ALIGN) - at or any(read_exactly(source, at, rest)):
        raise RefusedError(CODE, f"the backup has {source.size:,} bytes, and does not end there")


def _read_header(source: Source, at: int) -> tuple[str, int, int]:
    """Return name, place of the content, and size of a file whose headers begin at `at`.

    Contents begin at multiples of 4096, and the last block before one holds name and size; the
    writer's headers are made again from these, and compared.
    """
    first = round_up(at + BLOCK, ALIGN)
    for start in (first, first + ALIGN):
        if start > source.size:
            break
        found = read_exactly(source, at, start - at)
        last, size = found[-BLOCK:], parse_size(found[-BLOCK:])
        large = _LARGE.search(found[:-BLOCK])
        if large is not None:
            size = int(large[1])
        name = last[:100].rstrip(b"\0").decode("latin-1")
        if size is not None and header_blocks(name, size, at, ends_at=0) == found:
            return name, start, size
    raise RefusedError(CODE, f"at byte {at:,} of the backup no file begins")


def _write_one(source: Source, offset: int, size: int, path: Path, mode: int) -> str:
    hasher, done = hashlib.sha256(), 0
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise RefusedError(
            CODE, f"the backup: {path.name!r:.100} is a file and a folder"
        ) from error
    with os.fdopen(descriptor, "wb", buffering=0) as stream:
        while done < size:
            buffer = memoryview(bytearray(min(_PART, size - done)))
            source.read_into(offset + done, buffer)
            hasher.update(buffer)
            stream.write(buffer)
            done += len(buffer)
        os.fchmod(stream.fileno(), mode)
        os.fsync(stream.fileno())
    return hasher.hexdigest()


@contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """Make the folder of one restore, and delete it unless it was renamed.

    One that a killed restore left goes first. One that another restore writes, or another account
    made, is left alone: two backups in one folder would be a tree that nobody ever backed up.
    """
    if os.path.lexists(partial):
        with _locked(partial):
            delete_tree(partial)
    partial.mkdir(mode=0o700)
    with _locked(partial):
        try:
            yield
        finally:
            if partial.exists():
                delete_tree(partial)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise RefusedError(
                "backup.target",
                f"{partial} belongs to another account",
                hint="remove it, or name a folder where nobody else may write",
            )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                "backup.target",
                f"another restore writes {partial}",
                hint="wait for it, or name another folder with --root",
            ) from None
        yield
    finally:
        os.close(descriptor)


# -- the log -----------------------------------------------------------------------------------


def _require_log(folder: Path, proven: _Proven, ring: Ring, anchors: Sequence[Path]) -> Verdict:
    """Verify the log, and that it ends with the very head by which the inventory was proven."""
    verdict = verify_log(folder, vkey=ring, anchors=anchors)
    if verdict.code == "audit.tampered":
        worst = verdict.findings[0]
        raise RefusedError(
            "backup.log",
            f"the log of the backup does not hold: {worst}",
            hint="compare the key and the anchors; a log that has gone on since cannot be set back",
        )
    found = (verdict.origin, verdict.size, verdict.records, verdict.root)
    head = proven.head
    wanted = (head.origin, head.size, head.size, base64.b64encode(head.root).decode())
    if found != wanted:
        raise RefusedError(
            "backup.log",
            f"the log of the backup has {verdict.records:,} records under a head of "
            f"{verdict.size:,}; the backup was made at {head.size:,}, root {wanted[3]}",
            hint="the file was put together from parts; take another copy of the backup",
        )
    return verdict


def _require_key(partial: Path, ring: Ring) -> None:
    path = partial / "keys" / "audit.pem"
    if path.is_file() and load_log_key(path).vkey.key_id not in {k.key_id for k in ring.keys}:
        raise RefusedError(
            "backup.log",
            "the private key of the log in the backup is not one of the keys that were given",
            hint="give the newest verifier keys of the log: --vkey FILE",
        )


def _protect_releases(partial: Path) -> None:
    """Make folders of releases read-only again; their files came with their modes."""
    installed = partial / "store" / "installed"
    for place, _, _ in os.walk(installed, topdown=False):
        if Path(place) != installed:
            Path(place).chmod(0o555)
