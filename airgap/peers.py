"""Who listens at a Unix socket: the kernel says it, and a socket in its place is not believed."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Final

_CREDENTIALS: Final = struct.Struct("3i")


def find_stranger(connection: socket.socket, path: Path) -> int | None:
    """Return the uid at the other end of `path` if nobody gave it that place, else None.

    Root may listen there, whoever runs this, and the owner of the folder: another account can put
    a socket of its own where everybody may write, or where a service does not run.
    """
    _, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    trusted = {0, os.geteuid()}
    with contextlib.suppress(OSError):
        trusted.add(path.absolute().parent.stat().st_uid)
    return None if uid in trusted else int(uid)
