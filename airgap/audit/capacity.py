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
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Final

from airgap.audit.disk import Disk
from airgap.audit.layout import Layout, read_lines, segment_range
from airgap.audit.record import parse_line
from policy.errors import RefusedError

RESERVE: Final = 64 << 20
DAY_S: Final = 86_400
_MAX_NOTE: Final = 4_096
_MARGIN: Final = 1 << 20  # beside the reserve, before a log that had none admits again
_AGAIN_S: Final = 5


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
        return _free_bytes(self._layout)

    def _count_rest(self) -> None:
        self.add(sum(_count(self._layout.log / name) for name in ("objects", "sealed")))


class Health:
    """How a log that is open stands: space, reserve, anchors, exports. Times in seconds."""

    def __init__(self, layout: Layout, capacity: Capacity, disk: Disk) -> None:
        self.capacity = capacity
        self.anchored, self.exported = 0, LastExport()
        self._layout, self._disk = layout, disk
        self._anchored_at = 0
        self._reserved, self._tried = True, 0  # when that was last tried
        self._usage: Usage | None = None

    def begin(self, now: int) -> bool:
        """Hold the reserve back and begin to count; False when there is no room for it."""
        self._reserved = keep_reserve(self._layout, self._disk, self.capacity.reserve_bytes)
        self._tried = now
        self._usage = Usage(self._layout, self.capacity)
        self.exported = last_export(self._layout)
        if not self.exported.wall_s:
            self.exported = LastExport(wall_s=_begun(self._layout) or now)
        return self._reserved

    def add(self, size: int) -> None:
        """Count bytes that were written."""
        if self._usage is not None:
            self._usage.add(size)

    def recount(self) -> None:
        """Count again what the log takes, after files went."""
        if self._usage is not None:
            self._usage = Usage(self._layout, self.capacity)

    def note_anchor(self, size: int, at: int) -> None:
        """Take note of an outside head of this size that agrees."""
        if size >= self.anchored:
            self.anchored, self._anchored_at = size, at

    def note_export(self, size: int, now: int) -> None:
        """Take note of a complete export, for this process and the next."""
        self.exported = LastExport(self.exported.number + 1, size, now)
        note_export(self._layout, self.exported, self._disk)

    def state(self, now: int) -> State:
        """Return the state that reserve, space and export age ask for."""
        if not self._reserved and not self._reserve_again(now):
            return State.DRAIN
        part = self._usage.part if self._usage is not None else 0.0
        return self.capacity.state(part, self._export_age(now))

    def _reserve_again(self, now: int) -> bool:
        """Hold the reserve back once there is room for it again."""
        if abs(now - self._tried) < _AGAIN_S:
            return False
        self._tried = now
        if _free_bytes(self._layout) > self.capacity.reserve_bytes + _MARGIN:
            size = self.capacity.reserve_bytes
            self._reserved = keep_reserve(self._layout, self._disk, size)
        return self._reserved

    def low(self) -> bool:
        """Whether so little is free that the reserve must serve the next records."""
        return _free_bytes(self._layout) < min(self.capacity.reserve_bytes, 1 << 20)

    def beat(self, now: int, state: State) -> dict[str, int | str]:
        """Return what a heartbeat tells."""
        data: dict[str, int | str] = {
            "anchored": self.anchored,
            "free": _free_bytes(self._layout),
            "export_age_s": self._export_age(now),
            "state": state.value,
        }
        if self.anchored:
            data["anchor_age_s"] = max(0, now - self._anchored_at)
        if self._usage is not None:
            data["used_percent"] = int(self._usage.part * 100)
        return data

    def _export_age(self, now: int) -> int:
        return max(0, now - self.exported.wall_s)


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


def last_verified(layout: Layout) -> int:
    """Return when this host last verified the whole log, seconds since 1970; 0 for never."""
    try:
        return int(json.loads(layout.verified.read_bytes()[:_MAX_NOTE])["wall_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def note_verified(layout: Layout, wall_s: int, disk: Disk) -> None:
    """Keep the note of a verification of the whole log."""
    disk.put(layout.verified, json.dumps({"wall_s": wall_s}).encode() + b"\n")


def _count(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 - a hot loop
            except OSError:
                continue
    return total


def _free_bytes(layout: Layout) -> int:
    found = os.statvfs(layout.folder)
    return found.f_bavail * found.f_frsize


def _begun(layout: Layout) -> int:
    """Return when this log began, seconds since 1970: the time on its first line; 0 if unknown."""
    try:
        first = layout.segment(segment_range(layout).start)
        line = next(read_lines(first), b"")
        return int(datetime.fromisoformat(parse_line(line[:-1])["ts"]).timestamp())
    except (OSError, RefusedError):
        return 0
