"""How full the log is and how long ago it was exported (docs/design/audit.md, 4 and 8).

Two warnings come before the log admits nothing: at 75 and 90 per cent of its quota, and five days
after the last export. What then follows is the site's choice.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from airgap.audit.disk import Disk
from airgap.audit.layout import Layout

RESERVE: Final = 64 << 20
DAY_S: Final = 86_400
_MAX_NOTE: Final = 4_096


class State(Enum):
    """What the log admits; HALTED lasts as long as the process."""

    OPENING = "opening"
    RUNNING = "running"
    WARN = "warn"
    ALARM = "alarm"
    DRAIN = "drain"
    HALTED = "halted"
    CLOSED = "closed"

    @property
    def admits(self) -> bool:
        """Whether new work may begin."""
        return self in {State.RUNNING, State.WARN, State.ALARM}

    @property
    def writes(self) -> bool:
        """Whether any record at all can be written."""
        return self.admits or self is State.DRAIN


@dataclass(frozen=True, slots=True)
class Capacity:
    """The site's limits. Without a quota, 0, the log may grow as long as there is free space."""

    quota_bytes: int = 0
    warn_at: float = 0.75
    alarm_at: float = 0.90
    export_warn_days: int = 5
    export_limit_days: int = 7
    refuse_overdue: bool = False  # DRAIN after the limit, where the site chose that
    reserve_bytes: int = RESERVE

    def state(self, used: float, export_age_s: int) -> State:
        """Return how the log stands: `used` is the part of its room, 0 to 1 and more."""
        overdue = export_age_s > self.export_limit_days * DAY_S
        if (self.quota_bytes and used >= 1) or (overdue and self.refuse_overdue):
            return State.DRAIN
        if used >= self.alarm_at:
            return State.ALARM
        if used >= self.warn_at or export_age_s > self.export_warn_days * DAY_S:
            return State.WARN
        return State.RUNNING


class Usage:
    """What the log takes on its disk: counted at the opening, then followed as it grows."""

    def __init__(self, layout: Layout, capacity: Capacity) -> None:
        """Count what is quickly counted; objects and payloads, many small files, in the back."""
        self._layout, self._capacity = layout, capacity
        self.bytes = sum(_count(layout.log / name) for name in ("seg", "tile"))
        self.bytes += layout.journal.stat().st_size
        if capacity.quota_bytes:
            threading.Thread(target=self._count_rest, name="audit-usage", daemon=True).start()

    def add(self, size: int) -> None:
        """Count bytes that were written."""
        self.bytes += size

    @property
    def part(self) -> float:
        """The part of the quota that is used; without one, of what the log has and could have."""
        room = self._capacity.quota_bytes or self.bytes + self.free_bytes
        return self.bytes / room if room else 1.0

    @property
    def free_bytes(self) -> int:
        """Bytes that the file system has left for this user."""
        found = os.statvfs(self._layout.folder)
        return found.f_bavail * found.f_frsize

    def _count_rest(self) -> None:
        self.add(sum(_count(self._layout.log / name) for name in ("objects", "sealed")))


def keep_reserve(layout: Layout, disk: Disk, size: int) -> bool:
    """Hold blocks back for recovery on a full disk; False when there is no room for them."""
    if not size or layout.reserve.exists():
        return True
    fd = disk.open(layout.reserve, os.O_WRONLY | os.O_CREAT)
    try:
        disk.allocate(fd, size)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        disk.unlink(layout.reserve)
        return False
    finally:
        os.close(fd)
    return True


@dataclass(frozen=True, slots=True)
class LastExport:
    """What the last complete export covered; a note of this host, no evidence."""

    number: int = 0
    size: int = 0
    wall_s: int = 0  # seconds since 1970


def last_export(layout: Layout) -> LastExport:
    """Return the note of the last export; of none when it is missing or unreadable."""
    try:
        entry = json.loads(layout.exported.read_bytes()[:_MAX_NOTE])
        return LastExport(int(entry["number"]), int(entry["size"]), int(entry["wall_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return LastExport()


def note_export(layout: Layout, export: LastExport, disk: Disk) -> None:
    """Keep the note of a complete export."""
    entry = {"number": export.number, "size": export.size, "wall_s": export.wall_s}
    disk.put(layout.exported, json.dumps(entry).encode() + b"\n")


def _count(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 - a hot loop
            except OSError:
                continue
    return total
