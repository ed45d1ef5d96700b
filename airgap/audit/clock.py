"""Clocks and peers: what the kernel says of time and of the other end of a socket."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path


class Clock:
    """Wall clock, monotonic clock and boot of this machine."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970, UTC; may jump, orders nothing."""
        return time.time_ns()

    def mono_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds."""
        return time.monotonic_ns()

    def boot_id(self) -> str:
        """The kernel's id of this boot."""
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a socket, as the kernel names it (SO_PEERCRED)."""

    uid: int
    pid: int
