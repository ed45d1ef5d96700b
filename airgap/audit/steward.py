"""The owner's own acts on a log: in this process, or through the service that holds it (design 2).

Exporting, pruning, purging and taking cosignatures read and change files of the log, so whoever
does that is the owner's account. The records of it are written by whoever holds the lock: this
process, or the service, which knows its own account by the kernel's word and takes these records
from nobody else. One such act at a time. Root acts as that account (`as_owner`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from airgap.audit.capacity import LastExport
from airgap.audit.checkpoint import Ring, Vkey, parse_ring
from airgap.audit.receipt import Receipt
from airgap.audit.record import Actor, Event
from airgap.audit.service import DEADLINE_S, RemoteLog
from policy.errors import FaultError, RefusedError


class OwnLog(Protocol):
    """What acts of the owner need of a log."""

    @property
    def origin(self) -> str:
        """The log's name."""
        ...

    @property
    def folder(self) -> Path:
        """The folder that holds `log/`."""
        ...

    @property
    def ring(self) -> Ring:
        """The verifier keys of all epochs so far."""
        ...

    @property
    def size(self) -> int:
        """Records under the newest signed head."""
        ...

    @property
    def anchored(self) -> int:
        """The largest size that an outside head in `log/anchors` covers."""
        ...

    @property
    def last_export(self) -> LastExport:
        """What the last complete export covered."""
        ...

    def append(self, event: Event) -> Receipt:
        """Return once the event is durable and signed; see `AuditLog.append`."""
        ...

    def note_export(self, size: int) -> None:
        """Take note of a complete export up to `size`."""
        ...

    def note_anchor(self, size: int) -> None:
        """Take note that an outside head of this size came back and agrees."""
        ...

    def note_freed(self) -> None:
        """Take note that files went: the space is counted again."""
        ...

    def rotate_key(self, actor: Actor) -> Vkey:
        """End the epoch of the log's key; see `AuditLog.rotate_key`."""
        ...

    def __enter__(self) -> Self:
        """Use it for a while."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give it back."""
        ...


class OwnersLog(RemoteLog):
    """The log of a running service, for its own account (`OwnLog`)."""

    def require_files(self) -> None:
        """Return if this account may change the log's files; RefusedError `audit.service`."""
        owner = int(self._standing()["uid"])
        if owner != os.geteuid():
            raise RefusedError(
                "audit.service",
                f"the log is held by a service of uid {owner}, this is uid {os.geteuid()}",
                hint="run the command as the service's account (sudo -u), or stop the service",
            )

    @property
    def ring(self) -> Ring:
        """The verifier keys of all epochs so far."""
        return parse_ring(str(self._standing()["ring"]).encode())

    @property
    def size(self) -> int:
        """Records under the newest signed head."""
        return int(self._standing()["size"])

    @property
    def anchored(self) -> int:
        """The largest size that an outside head covers."""
        return int(self._standing()["anchored"])

    @property
    def last_export(self) -> LastExport:
        """What the last complete export covered."""
        found = self._standing()
        return LastExport(int(found["exports"]), int(found["exported"]), int(found["exported_at"]))

    def note_export(self, size: int) -> None:
        """Let the service take note of a complete export."""
        self._ask({"op": "note", "what": "export", "size": size})

    def note_anchor(self, size: int) -> None:
        """Let the service take note of an outside head."""
        self._ask({"op": "note", "what": "anchor", "size": size})

    def note_freed(self) -> None:
        """Let the service count the space again."""
        self._ask({"op": "note", "what": "freed", "size": 0})

    def rotate_key(self, actor: Actor) -> Vkey:
        """Let the service end the epoch of its key."""
        self._ask({"op": "rotate", "name": actor.name, "role": actor.role})
        return self.ring.newest

    def _standing(self) -> dict[str, Any]:
        return self._ask({"op": "standing"})


@contextmanager
def as_owner(folder: Path) -> Iterator[None]:
    """Let root act with the account of `folder` alone while the block runs; anybody else as she is.

    What that account may not touch, root then does not touch for it either: a link that it put in
    the way of a file to be overwritten leads nowhere else.
    """
    owner = folder.lstat()
    if os.geteuid() or not owner.st_uid:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def held_by_service(
    path: Path | None, folder: Path, *, deadline_s: float = DEADLINE_S
) -> OwnersLog | None:
    """Return the log in `folder` behind the socket of its service; None where none is running."""
    if path is None or not path.is_socket():
        return None
    try:
        found = OwnersLog(path, deadline_s=deadline_s)
    except FaultError:
        return None  # A dead socket; the lock of the log says whether anybody holds it.
    if found.folder.resolve() == folder.resolve():
        return found
    found.close()
    return None
