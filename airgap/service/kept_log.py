"""The daemon's log: opened again after a fault of the disk, as a restart of the daemon would.

An `AuditLog` that failed halts for good and acknowledges nothing more (docs/design/audit.md, 4). A
daemon of many people need not end with it: the halted log is closed and opened anew, with the same
recovery and the same record of it, as soon as the disk lets it. Until then nothing is admitted.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import structlog

from airgap.audit import Event, Receipt
from airgap.audit.checkpoint import Ring
from airgap.audit.clock import Peer
from airgap.audit.daily import Daily
from airgap.audit.log import AuditLog, State
from airgap.audit.record import Commit, Record
from airgap.audit.service import RemoteLog, Service
from policy.errors import AirgapError, FaultError
from policy.terms import Digest

AGAIN_S: Final = 5.0
MAX_PATH: Final = 107  # bytes of the name of a Unix socket
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

operator = structlog.get_logger("airgap.service")


def disk_fault(error: OSError, what: str) -> FaultError:
    """Return a failure of the disk as a code."""
    return FaultError(
        "host.space" if error.errno in _FULL else "host.io",
        f"{what}: {error.strerror or error}",
        hint="the administrator makes room; nothing is answered without a record",
    )


class KeptLog:
    """The log that the daemon writes to: its own, or that of the log's service."""

    def __init__(
        self, reopen: Callable[[], AuditLog | RemoteLog], owner_socket: Path | None = None
    ) -> None:
        """Open the log, and let the administrator's commands write to it at `owner_socket`.

        Raises:
            RefusedError: As `open_site_log`.
            FaultError: As there.

        """
        self._reopen, self._again = reopen, 0.0
        self._log = reopen()
        self._service: Service | None = None
        self._thread: threading.Thread | None = None
        self._daily: Daily | None = None
        if owner_socket is not None and isinstance(self._log, AuditLog):
            self._serve(self._log, owner_socket)
            self._daily = Daily(self)
            self._daily.start()

    @property
    def remote(self) -> bool:
        """Whether the log's own service holds it."""
        return isinstance(self._log, RemoteLog)

    @property
    def origin(self) -> str:
        """The log's name."""
        return self._log.origin

    @property
    def folder(self) -> Path:
        """The folder that holds `log/`."""
        return self._log.folder

    @property
    def ring(self) -> Ring:
        """The verifier keys of a log of its own."""
        if isinstance(self._log, RemoteLog):
            raise FaultError("audit.service", "the log's own service knows its keys")
        return self._log.ring

    def append(self, event: Event, *, peer: Peer | None = None) -> Receipt:
        """Append; see `AuditLog.append`."""
        return self._log.append(event, peer=peer)

    def put_object(self, content: bytes) -> Digest:
        """Store evidence; a disk that fails is `host.space` or `host.io`."""
        try:
            return self._log.put_object(content)
        except OSError as error:
            raise disk_fault(error, "evidence could not be stored") from error

    def commit(self, payload: bytes, nonce: bytes, *, req: str, side: str) -> Commit:
        """Commit to a payload; a disk that fails is `host.space` or `host.io`."""
        try:
            return self._log.commit(payload, nonce, req=req, side=side)
        except OSError as error:
            raise disk_fault(error, "a payload could not be stored") from error

    def denials(self, uid: int, since: str, *, peer: Peer | None = None) -> Iterator[Record]:
        """Yield the denials of an account, asked for it by name where the log is remote."""
        if isinstance(self._log, RemoteLog):
            return self._log.denials(uid, since, peer=peer)
        return self._log.denials(uid, since)

    def look(self) -> None:
        """Open a log that has halted again, as soon as that is possible."""
        if not isinstance(self._log, AuditLog) or self._log.state is not State.HALTED:
            return
        if time.monotonic() < self._again:
            return
        self._again = time.monotonic() + AGAIN_S
        self._log.close()
        try:
            log = self._reopen()
        except (AirgapError, OSError) as error:
            operator.error("service.log", error=str(error)[:300])
            return
        self._log = log
        if self._service is not None and isinstance(log, AuditLog):
            self._service.log = log
        operator.warning("service.log", reopened=True)

    def close(self) -> None:
        """Write the last record and give the log back."""
        if self._daily is not None:
            self._daily.stop()
        if self._service is not None and self._thread is not None:
            self._service.stop()
            self._thread.join()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, log: AuditLog, path: Path) -> None:
        """Serve root and the own account: the mode of the socket lets nobody else in."""
        if len(str(path.absolute()).encode()) > MAX_PATH:
            operator.warning("service.log", error=f"{path}: too long for a socket")
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._service = Service(log, path)
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._service, ready), name="service-log", daemon=True
        )
        self._thread.start()
        ready.wait(AGAIN_S)

    def _run(self, service: Service, ready: threading.Event) -> None:
        try:
            service.run(ready.set)
        except (AirgapError, OSError) as error:
            operator.error("service.log", error=str(error)[:300])
        finally:
            ready.set()


@dataclass(frozen=True, slots=True)
class PersonLog:
    """The daemon's log as one client sees it: every record bears that client's uid."""

    log: KeptLog
    peer: Peer
    on_denial: Callable[[], None] = lambda: None  # before each denial

    @property
    def origin(self) -> str:
        """The log's name."""
        return self.log.origin

    @property
    def folder(self) -> Path:
        """The folder that holds `log/`."""
        return self.log.folder

    def append(self, event: Event) -> Receipt:
        """Append for this client."""
        if event.kind == "denial":
            self.on_denial()
        return self.log.append(event, peer=self.peer)

    def put_object(self, content: bytes) -> Digest:
        """Store evidence."""
        return self.log.put_object(content)

    def commit(self, payload: bytes, nonce: bytes, *, req: str, side: str) -> Commit:
        """Commit to a payload."""
        return self.log.commit(payload, nonce, req=req, side=side)

    def denials(self, uid: int, since: str) -> Iterator[Record]:
        """Yield the denials of this client's account."""
        return self.log.denials(uid, since, peer=self.peer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the daemon's log open."""


@contextlib.contextmanager
def faults_of_disk(what: str) -> Iterator[None]:
    """Turn an error of the disk into a code: it is none of the client's socket."""
    try:
        yield
    except OSError as error:
        raise disk_fault(error, what) from error
