"""Which log a tree has: its key, its first record, and a new identity after a disaster (design 5).

A log without its key, and a key without its log, are refused: both are what an attack looks like.
Where they are truly lost, two people begin a new log. What is left of the old one is put aside and
nothing of it is removed; the new log's first record names it, and cites what the two people signed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from airgap.audit.anchors import Anchor, read_anchors
from airgap.audit.capacity import Capacity
from airgap.audit.checkpoint import create_log_key, load_ring, site_name, vkey_path
from airgap.audit.clock import Clock
from airgap.audit.disk import Disk, open_plain, require_owner
from airgap.audit.epochs import KeyFiles
from airgap.audit.findings import Findings
from airgap.audit.layout import Layout, last_checkpoint, read_lines
from airgap.audit.lock import Lock
from airgap.audit.log import AuditLog, Beginning
from airgap.audit.payloads import PayloadKey
from airgap.audit.people import parse_act, require_two
from airgap.audit.previous import UNKNOWN_ORIGIN, Previous
from airgap.audit.record import parse_line, printable
from airgap.config import LOG_ACCOUNT
from bundle.envelope import Envelope, parse_envelope
from bundle.root import RootDocument
from policy.errors import FaultError, RefusedError

ACT: Final = "new-log"
_MAX_ACT: Final = 65_536


def open_log(
    root: Path,
    *,
    site: str,
    host: str = "",
    mode: str = "embedded",
    capacity: Capacity | None = None,
    payload_key: PayloadKey | None = None,
) -> AuditLog:
    """Open the log of a tree (`audit/`, key in `keys/`), making both when they are missing.

    `site` is the institution's name; it becomes part of a new log's origin.

    Raises:
        RefusedError: `audit.history`; this key has signed a log, and the log is gone, or a new log
            was begun and not finished. `audit.owner`; root, and the log is another account's.
        FaultError: `audit.key`; there is a log and no key.

    """
    require_owner(root / "audit", _key(root))
    key = _key(root)
    if _moving(root).exists():
        raise RefusedError(
            "audit.history",
            "two people began a new log here, and it was not finished",
            hint="run `airgap audit new-log ACT` once more, with the same act",
        )
    if not key.exists() and not KeyFiles(key).following.exists():
        if (root / "audit" / "log").is_dir():
            raise FaultError(
                "audit.key",
                f"there is a log in {root / 'audit'} but no key at {key}",
                hint="bring the key back from its backup; if it is lost, two people begin a new "
                "log: airgap audit act new-log",
            )
        create_log_key(key, site=site_name(site))
    elif _begun(root).exists() and not (root / "audit" / "log").is_dir():
        raise RefusedError(
            "audit.history",
            f"the key {key} has signed a log, and there is none in {root / 'audit'}",
            hint="bring the log back from its backup; if it is lost, two people begin a new log: "
            "airgap audit act new-log",
        )
    log = AuditLog.open(
        root / "audit", key=key, host=host, mode=mode, capacity=capacity, payload_key=payload_key
    )
    try:
        _note_begun(root)
    except BaseException:
        log.close()
        raise
    return log


# -- a new identity ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewLog:
    """What came of a new identity."""

    origin: str
    vkey: str
    previous: str
    people: tuple[str, str]
    aside: tuple[str, ...]  # where what was left of the old log lies


def last_known(root: Path, heads: Sequence[Path] = ()) -> Previous:
    """Return what is known of the log of a tree: from its files, its vkey, and heads kept outside.

    Nothing of it is proven where the log is damaged: two people vouch for it.

    Raises:
        RefusedError: `audit.note`; a head of `heads` is none, or of another log.

    """
    findings = Findings()
    anchors = read_anchors(heads, findings)
    if findings.all:
        raise RefusedError("audit.note", f"not a head: {findings.all[0]}")
    found = last_checkpoint(Layout(root / "audit").journal)
    known = [Previous.of(found[0])] if found is not None else []
    vkey = vkey_path(_key(root))
    if vkey.is_file():
        ring = load_ring(vkey)
        known.append(Previous(ring.name))
        for anchor in anchors:
            anchor.verify(ring, None)
    known += [_of(anchor) for anchor in anchors]
    if len({each.origin for each in known}) > 1:
        raise RefusedError(
            "audit.note",
            f"heads of several logs: {', '.join(sorted({e.origin for e in known})):.200}",
            hint="give heads of the log that this tree had",
        )
    return max(known, key=lambda each: each.size, default=Previous(UNKNOWN_ORIGIN))


def begin_again(
    root: Path,
    envelope: Envelope,
    *,
    site: str,
    trust: RootDocument,
    now: datetime,
    capacity: Capacity | None = None,
    clock: Clock | None = None,
    disk: Disk | None = None,
    account: str = LOG_ACCOUNT,
) -> NewLog:
    """Put what is left of a log aside and begin another, in the name of two people.

    A crash on the way leaves a tree that opens no log until this was called again, with the same
    act; it goes on where it was.

    Raises:
        RefusedError: `audit.people`; `audit.locked`, a process holds the old log; `audit.history`,
            the old log has more records than they signed for, or the act was carried out before;
            `audit.owner`.

    """
    disk, clock, envelope_bytes = disk or Disk(), clock or Clock(), envelope.to_bytes()
    origin = parse_act(envelope.payload).origin
    act, first, second = require_two(envelope, ACT, origin, trust, now)
    evidence = f"sha256:{hashlib.sha256(envelope_bytes).hexdigest()}"
    require_owner(root / "audit", _key(root), account)
    moving, aside = _moving(root), hashlib.sha256(envelope.payload).hexdigest()[:12]
    if moving.exists() and _read(moving) != envelope_bytes:
        raise RefusedError("audit.history", "another act has begun a new log here; finish that one")
    previous = Previous.parse(act.previous or origin)
    ours = _cites(root, evidence)
    if ours and not moving.exists():
        raise RefusedError("audit.history", "this act was carried out: the log here cites it")
    if not ours:
        lock = Lock(Layout(root / "audit").lock, disk, clock)
        try:
            ended = lock.take() if (root / "audit").is_dir() else ""
            if not moving.exists():  # under the lock: nobody adds what they did not sign for
                try:
                    _require_covered(previous, last_known(root))
                except RefusedError:
                    if ended:
                        lock.mark(ended)
                    raise
            disk.put(moving, envelope_bytes, mode=0o400)
            _put_aside(root, aside, disk)
        finally:
            lock.release()
    owner = (root / "keys").lstat()
    if owner.st_uid and not os.geteuid() and not (root / "audit").exists():
        disk.mkdir(root / "audit")  # in root's folder, for the account whose key it is
        os.chown(root / "audit", owner.st_uid, owner.st_gid, follow_symlinks=False)
    key = _key(root)
    if not key.exists():
        vkey_path(key).unlink(missing_ok=True)  # of a key that a crash left unmade
        create_log_key(key, site=site_name(site))
    data: dict[str, Any] = {
        "previous": str(previous), "evidence": evidence, "reason": printable(act.reason),
        "person_1": first, "person_2": second,
    }  # fmt: skip
    with AuditLog.open(
        root / "audit", key=key, clock=clock, disk=disk, capacity=capacity,
        beginning=Beginning(data, envelope_bytes), account=account,
    ) as log:  # fmt: skip
        vkey, new_origin = log.vkey, log.origin
    _note_begun(root)
    for path in (moving, _aside(root)):
        disk.unlink(path)
        disk.sync_folder(path.parent)
    found = sorted([*root.glob(f"audit.lost-{aside}"), *(root / "keys").glob(f"*.lost-{aside}")])
    return NewLog(new_origin, vkey, str(previous), (first, second), tuple(map(str, found)))


def _require_covered(signed: Previous, known: Previous) -> None:
    same = known.origin in {signed.origin, UNKNOWN_ORIGIN}
    fork = known.size and known.size == signed.size and known.root != signed.root
    if not same or known.size > signed.size or fork:
        raise RefusedError(
            "audit.history",
            f"they signed for the end {str(signed)!r:.120}; here is {str(known)!r:.120}",
            hint="write the act down again with what is here now: airgap audit act new-log",
        )


def _put_aside(root: Path, name: str, disk: Disk) -> None:
    """Rename the old log and its keys, once: what is there after the note is the new log's."""
    if _aside(root).exists():
        return
    own = {_moving(root), _aside(root)}
    for path in [*sorted((root / "keys").glob("audit.*")), root / "audit"]:
        if path not in own and ".lost-" not in path.name and path.exists():
            disk.rename(path, path.with_name(f"{path.name}.lost-{name}"))
            disk.sync_folder(path.parent)
    disk.put(_aside(root), b"")


def _cites(root: Path, evidence: str) -> bool:
    """Whether the log that is there began with this act."""
    try:
        line = next(read_lines(Layout(root / "audit").segment(0)), b"")
        return bool(parse_line(line.removesuffix(b"\n"))["data"].get("evidence") == evidence)
    except (OSError, RefusedError, KeyError):
        return False


def _of(anchor: Anchor) -> Previous:
    return Previous.of(anchor.checkpoint)


def _key(root: Path) -> Path:
    return root / "keys" / "audit.pem"


def _begun(root: Path) -> Path:
    # Beside the key and not beside the log: whoever empties `audit/` does not take it along.
    return root / "keys" / "audit.begun"


def _moving(root: Path) -> Path:
    return root / "keys" / "audit.moving"


def _aside(root: Path) -> Path:
    return root / "keys" / "audit.aside"


def _note_begun(root: Path) -> None:
    if not _begun(root).exists():
        Disk().put(_begun(root), b"")


def _read(path: Path) -> bytes:
    with open_plain(path) as file:
        content = file.read(_MAX_ACT)
    parse_envelope(content, code="audit.people")
    return content
