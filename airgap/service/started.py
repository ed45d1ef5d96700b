"""What a daemon reads once, at its start: a later change is told, with the step, and not obeyed.

Everything else of site.toml counts from the next decision on (`airgap.serve.tree`). These few are
of things that are open for the daemon's whole life: its log and its socket, and the release that it
was told to serve.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import structlog

from airgap.audit.restart import restart_for
from airgap.config import AuditSettings, Site
from policy.terms import Digest

operator = structlog.get_logger("airgap.service")


@dataclass(slots=True)
class Started:
    """What the daemon was started with; `audit` is that of the log which is open now."""

    site: Site
    audit: AuditSettings
    model: str  # of --model, empty where it follows the tree
    default: Digest | None  # release of the tree at that time
    waits: tuple[str, ...] = field(default=())  # what counts from the next start on

    def look(self, site: Site, default: Digest | None) -> bool:
        """Compare with what the tree says now, and tell whether another thing waits than before."""
        found = restart_for(self.audit, site.audit)
        if site.service.socket != self.site.service.socket:
            found += ("[service] socket",)
        if self.model and default != self.default:
            found += (f"--model {self.model}: the tree has another default now",)
        if found == self.waits:
            return False
        self.waits = found
        if found:
            operator.warning("service.restart", settings=list(found), next=self.step)
        else:
            operator.info("service.restart", settings=[])
        return True

    @property
    def step(self) -> str:
        """Say what brings it about."""
        units = ["airgap"]
        if any("[service] socket" in each for each in self.waits):
            units.insert(0, "airgap.socket")  # whose unit names the same path
        if any("[audit]" in each for each in self.waits) and self.site.audit.socket is not None:
            units.insert(0, "airgap-audit")
        return f"systemctl restart {' '.join(units)}, or end the process and start it again"
