"""What a service tells the manager that started it (sd_notify(3)); nothing where there is none."""

from __future__ import annotations

import contextlib
import os
import socket


def tell_systemd(state: str) -> None:
    """Send a line to the service manager, where there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in {"/", "@"}:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(state.encode(), address.replace("@", "\0", 1))
