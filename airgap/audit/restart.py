"""Settings of the log that are read once, when it is opened: a later change is told, not obeyed.

A log that changed its quota or began to keep payloads in the middle of its life would say so
nowhere; it says so in the `boot` of its next writer. So whoever holds the log goes on as it began,
and tells the operator what waits for a restart.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from airgap.config import AuditSettings, load_site
from policy.errors import AirgapError

READ_ONCE: Final = ("socket", "payloads", "quota_mb", "refuse_overdue_export")
LOOK_S: Final = 5.0

operator = structlog.get_logger("airgap.audit")


def restart_for(begun: AuditSettings, now: AuditSettings) -> tuple[str, ...]:
    """Return the settings, as site.toml calls them, that count from the next start on."""
    return tuple(
        f"[audit] {name}" for name in READ_ONCE if getattr(begun, name) != getattr(now, name)
    )


class SettingsWatch:
    """Looks at site.toml beside a service of the log, from its start to `stop`."""

    def __init__(
        self,
        root: Path,
        begun: AuditSettings,
        tell: Callable[[str], None],
        *,
        look_s: float = LOOK_S,
    ) -> None:
        """`tell` is told a line for the service manager, each time that something changes."""
        self._root, self._begun, self._tell, self._look_s = root, begun, tell, look_s
        self._told: tuple[str, ...] = ()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit-settings", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stopped.set()

    def look(self) -> tuple[str, ...]:
        """Return what waits for a restart; said once, and once more when it does no longer."""
        try:
            found = restart_for(self._begun, load_site(self._root).audit)
        except AirgapError:
            return self._told  # each command says why the file cannot be read
        if found != self._told:
            self._told = found
            names = ", ".join(found)
            if found:
                operator.warning(
                    "audit.restart",
                    settings=list(found),
                    next="systemctl restart airgap-audit airgap, or end and start the process",
                )
            else:
                operator.info("audit.restart", settings=[])
            self._tell(f"serving; restart it for {names}" if found else "serving")
        return found

    def _run(self) -> None:
        while not self._stopped.wait(self._look_s):
            self.look()
