"""The daily look at the whole log, on record (docs/design/audit.md, 9).

Opening a log believes frontiers for the segments that are closed, so once a day everything is read
again, by the same code that an auditor runs, and the verdict becomes a `verify.result` record. A
process of its own reads: it must not take time from a writer that somebody waits for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol, Self

import structlog

from airgap.audit.capacity import DAY_S, last_verified, note_verified
from airgap.audit.checkpoint import Ring, parse_ring
from airgap.audit.disk import Disk
from airgap.audit.findings import TAMPERED, Verdict
from airgap.audit.layout import Layout
from airgap.audit.quorum import load_policy
from airgap.audit.receipt import Receipt
from airgap.audit.record import Event
from airgap.audit.verify import verify_log
from policy.errors import AirgapError, FaultError

LOOK_S: Final = 60.0  # how often it asks whether a day has passed
_NICE: Final = 10

operator = structlog.get_logger("airgap.audit")


class Judged(Protocol):
    """A log that this process holds, or writes to at the service that does."""

    @property
    def folder(self) -> Path:
        """The folder that holds `log/`."""
        ...

    @property
    def ring(self) -> Ring:
        """The verifier keys of all epochs so far."""
        ...

    def append(self, event: Event) -> Receipt:
        """Return once the event is durable and signed."""
        ...


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look came to, as its record says it."""

    verdict: str
    size: int
    anchored: int
    worst: str  # the first finding, empty where there is none

    @classmethod
    def of(cls, verdict: Verdict) -> Self:
        """Return what counts of a verdict."""
        worst = str(verdict.findings[0]) if verdict.findings else ""
        return cls(verdict.verdict, verdict.size, verdict.anchored_size, worst[:200])


def record_look(log: Judged, looked: Looked) -> None:
    """Put a verdict on the log that it is about; what contradicts is an alarm as well."""
    if looked.verdict == TAMPERED:
        operator.error("audit.tampered", finding=looked.worst)
    log.append(
        Event(
            "verify.result",
            data={"verdict": looked.verdict, "size": looked.size, "anchored": looked.anchored},
        )
    )
    note_verified(Layout(log.folder), int(time.time()), Disk())


def look_at(folder: Path, ring: Ring) -> Looked:
    """Verify a log by the keys and the anchors that its own host has.

    It finds what went wrong with the files. It is no defence against the host: see `verify_log`.
    """
    layout = Layout(folder)
    policy = load_policy(layout.policy) if layout.policy.is_file() else None
    anchors = [layout.anchors] if layout.anchors.is_dir() else []
    return Looked.of(verify_log(folder, vkey=ring, anchors=anchors, policy=policy))


def look_apart(folder: Path, ring: Ring) -> Looked:
    """As `look_at`, in another process of low priority; FaultError `audit.unknown`."""
    done = subprocess.run(
        [sys.executable, "-I", "-m", "airgap.audit.daily", str(folder)],
        input=str(ring), capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        return Looked(**json.loads(done.stdout))
    except (ValueError, TypeError):
        raise FaultError(
            "audit.unknown", f"the daily look ended with {done.returncode}: {done.stderr[-200:]!r}"
        ) from None


class Daily:
    """Verifies a log that a service holds once a day, from its start to `stop`."""

    def __init__(
        self,
        log: Judged,
        *,
        now: Callable[[], float] = time.time,
        judge: Callable[[Path, Ring], Looked] = look_apart,
        look_s: float = LOOK_S,
    ) -> None:
        """`now` gives seconds since 1970."""
        self._log, self._now, self._judge, self._look_s = log, now, judge, look_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit-daily", daemon=True)

    def start(self) -> None:
        """Begin; the first look comes when the last one is a day old."""
        self._thread.start()

    def stop(self) -> None:
        """End; a look that is under way ends with its process."""
        self._stopped.set()

    def look(self) -> bool:
        """Verify if a day has passed, and say whether it did."""
        layout = Layout(self._log.folder)
        if 0 <= self._now() - last_verified(layout) < DAY_S:
            return False
        record_look(self._log, self._judge(self._log.folder, self._log.ring))
        return True

    def _run(self) -> None:
        while not self._stopped.wait(self._look_s):
            try:
                self.look()
            except (AirgapError, OSError) as error:
                operator.error("audit.daily", error=str(error)[:200])
                self._stopped.wait(self._look_s * 10)


def _main() -> None:
    """Look at the log in the folder of the first argument; its keys come on standard input."""
    os.nice(_NICE)
    ring = parse_ring(sys.stdin.buffer.read())
    sys.stdout.write(json.dumps(asdict(look_at(Path(sys.argv[1]), ring))))


if __name__ == "__main__":
    _main()
