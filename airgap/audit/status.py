"""How a log stands, from its folder alone (docs/design/audit.md, 6). No proof: see `verify`."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from airgap.audit.anchors import parse_anchor
from airgap.audit.capacity import DAY_S, last_export, last_verified
from airgap.audit.checkpoint import Ring
from airgap.audit.disk import open_plain
from airgap.audit.layout import Layout, last_checkpoint, segment_range
from airgap.audit.quorum import load_policy
from airgap.audit.receipt import MAX_RECEIPT
from airgap.audit.tiles import SEGMENT
from policy.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Status:
    """What `audit status` shows. Ages are in seconds; None where there is nothing to be old."""

    origin: str
    size: int
    first: int  # the first record whose line is here
    anchored: int
    anchor_age_s: int | None
    exported: int
    export_age_s: int | None
    verified_age_s: int | None  # since this host last verified the whole log
    free_bytes: int
    writer: str  # what the lock file says: `running`, `closed`, `open` after a crash, `halted:…`
    epochs: int | None  # keys that the log has had, as far as the ring knows

    def as_document(self) -> dict[str, object]:
        """Return the status for JSON output."""
        return {
            "origin": self.origin,
            "size": self.size,
            "minimum_index": self.first,
            "anchored": self.anchored,
            "anchor_age_s": self.anchor_age_s,
            "unanchored": self.size - self.anchored,
            "exported": self.exported,
            "export_age_s": self.export_age_s,
            "verified_age_s": self.verified_age_s,
            "free_bytes": self.free_bytes,
            "writer": self.writer,
            "epochs": self.epochs,
        }

    def text(self) -> str:
        """Return the status in words; the first line is the one that counts."""
        size, anchored = self.size, self.anchored
        if anchored:
            known = f"anchored to {anchored}, age {_age(self.anchor_age_s)}"
        else:
            known = "anchored to nothing"
        mercy = (
            f"records {anchored} to {size - 1} at root's mercy"
            if anchored < size
            else "every record anchored"
        )
        exported = (
            f"last export up to {self.exported}, {_age(self.export_age_s)} ago"
            if self.exported
            else "never exported from here"
        )
        verified = "never verified by this host"
        if self.verified_age_s is not None:
            verified = f"last verified by this host {_age(self.verified_age_s)} ago"
        lines = [
            f"size {size}, {known}, {mercy}",
            f"{self.origin}; {self.epochs or 1} key epoch(s); writer {self.writer}",
            f"{exported}; {verified}; {self.free_bytes / 1e9:.1f} GB free",
        ]
        if self.first:
            lines.append(f"pruned: lines from record {self.first} on, hashes of all")
        return "\n".join(lines)


def read_status(folder: Path, ring: Ring | None, *, now: float | None = None) -> Status:
    """Return how the log in `folder` stands.

    Args:
        folder: Holds `log/`.
        ring: The log's keys; without them no anchor is counted.
        now: Seconds since 1970; None for the clock.

    Raises:
        RefusedError: `audit.absent`; no log or no signed head there.

    """
    layout = Layout(folder)
    found = last_checkpoint(layout.journal)
    if found is None:
        raise RefusedError(
            "audit.absent",
            f"no audit log in {folder}",
            hint="name the folder that holds `log/`, or use --root",
        )
    moment = time.time() if now is None else now
    size, came = _anchored(layout, ring)
    export = last_export(layout)
    space, verified = os.statvfs(folder), last_verified(layout)
    return Status(
        origin=found[0].origin,
        size=found[0].size,
        first=segment_range(layout).start * SEGMENT,
        anchored=size,
        anchor_age_s=max(0, int(moment - came)) if size else None,
        exported=export.size,
        export_age_s=max(0, int(moment - export.wall_s)) if export.wall_s else None,
        verified_age_s=max(0, int(moment - verified)) if verified else None,
        free_bytes=space.f_bavail * space.f_frsize,
        writer=_writer(layout),
        epochs=len(ring.keys) if ring is not None else None,
    )


def _anchored(layout: Layout, ring: Ring | None) -> tuple[int, float]:
    """Return size and arrival of the largest outside head that the site's policy counts."""
    best = (0, 0.0)
    if ring is None or not layout.anchors.is_dir():
        return best
    policy = load_policy(layout.policy) if layout.policy.is_file() else None
    for path in layout.anchors.iterdir():
        with open_plain(path) as file:
            content, came = file.read(MAX_RECEIPT + 1), os.fstat(file.fileno()).st_mtime
        try:
            head = parse_anchor(content, path.name).verify(ring, policy)
        except RefusedError:
            continue
        best = max(best, (head.size, came))
    return best


def _writer(layout: Layout) -> str:
    try:
        fd = os.open(layout.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return "none"
    try:
        note = os.pread(fd, 256, 0).decode("ascii", "replace").split()
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"running, process {note[0]}" if note else "running"
    finally:
        os.close(fd)
    return note[2] if len(note) > 2 else "none"  # noqa: PLR2004 - pid, time, how it ended


def _age(seconds: int | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < DAY_S:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // DAY_S} days"
