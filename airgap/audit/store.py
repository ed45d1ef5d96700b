"""Files that are named by their digest: cited objects and encrypted payloads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from airgap.audit.disk import Disk
from airgap.audit.layout import Layout
from airgap.audit.record import citations, sealed_payloads
from policy.errors import RefusedError
from policy.terms import Digest

MAX_OBJECT: Final = 1 << 22


class Store:
    """Writes each file once, durable before it returns; threads may share it."""

    def __init__(self, layout: Layout, disk: Disk, written: Callable[[int], None]) -> None:
        """`written` is told how many bytes each new file took."""
        self._layout, self._disk, self._written = layout, disk, written
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def put_object(self, content: bytes) -> Digest:
        """Store an object; RefusedError `audit.object` when it is too large."""
        if len(content) > MAX_OBJECT:
            raise RefusedError("audit.object", f"{len(content)} bytes; the limit is {MAX_OBJECT}")
        digest = Digest.of(content)
        self._put(str(digest), self._layout.object(digest.hex), content)
        return digest

    def put_payload(self, blob: bytes) -> Digest:
        """Store an encrypted payload."""
        digest = Digest.of(blob)
        self._put(f"sealed:{digest}", self._layout.payload(digest.hex), blob)
        return digest

    def require(self, kind: str, fields: dict[str, Any]) -> None:
        """Return if all that a record names is stored; RefusedError `audit.object` if not."""
        for cited in citations(fields):
            if cited not in self._known and not self._layout.object(cited[7:]).is_file():
                raise RefusedError(
                    "audit.object",
                    f"{kind} cites {cited}, which is not stored",
                    hint="call put_object before the record that cites it",
                )
        for named in sealed_payloads(fields):
            if not self._layout.payload(named[7:]).is_file():
                raise RefusedError(
                    "audit.object",
                    f"{kind} names the payload {named}, which is not stored",
                    hint="call put_payload before the record that names it",
                )

    def _put(self, name: str, path: Path, content: bytes) -> None:
        with self._lock:
            if name in self._known:
                return
            if not path.is_file() or path.read_bytes() != content:
                self._disk.make_folder(path.parent)
                self._disk.put(path, content)
                self._written(len(content))
            self._known.add(name)
