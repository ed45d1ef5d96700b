"""Puts a daemon together: the tree's lock, its log, the keeper of the sealed pair, the socket."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from airgap.audit.log import AuditLog
from airgap.audit.service import RemoteLog
from airgap.audit.site import OWNER_SOCKET, open_own_log, payload_key
from airgap.config import Site, load_site
from airgap.install import Store
from airgap.serve.session import Clock, House, utc_now
from airgap.service.daemon import Daemon, Limits, on_signals
from airgap.service.keeper import Keeper, Patience
from airgap.service.kept_log import KeptLog
from airgap.service.presence import Presence
from airgap.service.roles import find_roles
from airgap.service.sockets import listening
from airgap.service.started import Started
from airgap.systemd import tell_systemd
from policy.errors import AirgapError
from policy.terms import Digest

DESCRIPTORS = 256  # for the log, the sealed pair and the files that requests read


@dataclass(frozen=True, slots=True)
class Plan:
    """What a daemon is told; `socket_path` None takes that of site.toml or of systemd."""

    root: Path
    socket_path: Path | None = None
    group: int = -1
    roles_file: Path | None = None
    model: str = ""
    clock: Clock = utc_now
    patience: Patience = field(default_factory=Patience)
    limits: Limits = field(default_factory=Limits)


def serve(plan: Plan, ready: Callable[[House], None] = lambda _: None) -> None:
    """Serve until SIGTERM.

    Raises:
        RefusedError: `service.locked`, another daemon serves this tree; else as `open_broker`.
        FaultError: As there.

    """
    raise_descriptors(plan.limits.clients + DESCRIPTORS)
    site = load_site(plan.root)

    def load() -> House:
        return House.of(plan.root, model=plan.model, clock=plan.clock)

    started = Started(site, site.audit, plan.model, default_release(plan.root))

    def open_log() -> RemoteLog | AuditLog:
        site = load_site(plan.root)
        log: RemoteLog | AuditLog
        if site.audit.socket:
            log = RemoteLog(Path(site.audit.socket), payload_key=payload_key(plan.root, site.audit))
        else:
            log = open_own_log(plan.root, site, mode="service")
        started.audit = site.audit
        return log

    with contextlib.closing(Presence(plan.root)) as presence:
        house = load()  # nothing is opened for a release that may not run
        with KeptLog(open_log, plan.root / OWNER_SOCKET) as log:

            def tell() -> None:
                standing = keeper.standing
                now = standing.house
                serves = "" if now is None else f"{now.model.name} {now.model.version}"
                presence.tell(
                    {
                        "serves": serves,
                        "bundle": "" if now is None else str(now.installed.digest),
                        "state": standing.state,
                        "why": "" if standing.why is None else standing.why.code,
                        "chosen": plan.model,
                        "waits": list(started.waits),
                        "next": started.step if started.waits else "",
                    }
                )
                why = f" ({standing.why.code})" if standing.why is not None else ""
                waits = f"; restart it for {', '.join(started.waits)}" if started.waits else ""
                tell_systemd(f"STATUS={standing.state}{why}: {serves}{waits}")

            def look(site: Site) -> None:
                if started.look(site, default_release(plan.root)):
                    tell()

            keeper = Keeper(load, plan.model, log, plan.patience, tell, on_look=look)
            daemon = Daemon(keeper, log, plan.roles_file or find_roles(plan.root), plan.limits)
            path = plan.socket_path or (Path(site.service.socket) if site.service.socket else None)
            server: socket.socket = listening(path, plan.group)
            on_signals(daemon)
            daemon.run(server, house, ready)


def default_release(root: Path) -> Digest | None:
    """Return which release answers by default in a tree, None where it names none."""
    with contextlib.suppress(AirgapError):
        return Store(root / "store").find_current()
    return None


def raise_descriptors(wanted: int) -> None:
    """Let this process open so many files, as far as it may: clients must not use them all up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
