"""The log as site.toml sets it up: in this process, or behind the socket of a service."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

from airgap.audit.capacity import Capacity
from airgap.audit.identity import open_log
from airgap.audit.log import AuditLog
from airgap.audit.payloads import PayloadKey, load_payload_key
from airgap.audit.retention import PROFILES, Profile, site_profile
from airgap.audit.service import Log, RemoteLog
from airgap.config import AuditSettings, Site
from policy.errors import RefusedError

PAYLOAD_KEY: Final = Path("keys") / "payloads.pub"
# Where a daemon that holds the log takes records of the administrator's commands.
OWNER_SOCKET: Final = Path("enclave") / "log.sock"


def find_log_socket(root: Path, settings: AuditSettings | None) -> Path | None:
    """Return where the log is served: as site.toml says, else by the daemon of this tree, if any.

    A daemon that was killed leaves a socket at which nobody answers: then the log is free.
    """
    if settings is not None and settings.socket is not None:
        return Path(settings.socket)
    path = root / OWNER_SOCKET
    with socket.socket(socket.AF_UNIX) as trial:
        trial.settimeout(1.0)
        try:
            trial.connect(str(path))
        except OSError:
            return None
    return path


def open_site_log(root: Path, site: Site) -> Log:
    """Return the log that a broker of this tree writes to.

    Raises:
        RefusedError: `audit.payload`, payloads shall be kept and there is no key to seal them to;
            else as `open_log`.
        FaultError: `audit.service`, the service is not there; else as `open_log`.

    """
    path = find_log_socket(root, site.audit)
    if path is not None:
        return RemoteLog(path, payload_key=payload_key(root, site.audit))
    return open_own_log(root, site)


def open_own_log(root: Path, site: Site, *, mode: str = "embedded") -> AuditLog:
    """Return the log of a tree, in this process; raises as `open_site_log`."""
    return open_log(
        root,
        site=site.institution.name,
        mode=mode,
        capacity=capacity(site.audit),
        payload_key=payload_key(root, site.audit),
    )


def capacity(settings: AuditSettings) -> Capacity:
    """Return quota and export limits."""
    return Capacity(
        quota_bytes=settings.quota_mb << 20, refuse_overdue=settings.refuse_overdue_export
    )


def payload_key(root: Path, settings: AuditSettings) -> PayloadKey | None:
    """Return the key that payloads are sealed to, None where none is kept."""
    if settings.payloads == "none":
        return None
    path = root / PAYLOAD_KEY
    if not path.is_file():
        raise RefusedError(
            "audit.payload",
            f"site.toml keeps payloads, and there is no key at {path}",
            hint="airgap audit payload-key FILE on the holder's machine; bring FILE.pub here",
        )
    return load_payload_key(path)


def retention(settings: AuditSettings) -> Profile:
    """Return the retention profile of the site; RefusedError `audit.retention` without a term."""
    if settings.retention != "site":
        return PROFILES[settings.retention]
    if settings.retention_months is None:
        raise RefusedError(
            "audit.retention",
            'site.toml: retention = "site" names no term',
            hint="set retention_months in [audit]",
        )
    return site_profile(settings.retention_months)
