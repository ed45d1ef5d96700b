"""The daemon's listening socket: handed over by the service manager, or bound here."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from policy.errors import RefusedError

BACKLOG = 1_024  # connections that wait for their turn


def listening(path: Path | None, group: int = -1) -> socket.socket:
    """Return the socket that systemd handed over (LISTEN_FDS), else one bound at `path`.

    Raises:
        RefusedError: `service.absent`; neither is there, or something else lies at `path`.

    """
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        if os.environ.get("LISTEN_FDS") != "1":
            raise RefusedError("service.absent", "systemd handed over other than one socket")
        server = socket.socket(fileno=3)
        os.set_inheritable(3, False)
        if server.family != socket.AF_UNIX or server.type != socket.SOCK_STREAM:
            raise RefusedError("service.absent", "what systemd handed over is no Unix socket")
        return server
    if path is None:
        raise RefusedError(
            "service.absent",
            "no socket is named",
            hint="--socket PATH, or [service] socket in site.toml",
        )
    return _bind(path, group)


def _bind(path: Path, group: int) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise RefusedError("service.absent", f"{path} is no socket; it is left alone")
        if _answers(path):  # the lock of our tree is ours; this is the daemon of another one
            raise RefusedError(
                "service.locked",
                f"somebody serves at {path}",
                hint="stop that daemon, or name another --socket: each tree needs its own",
            )
        path.unlink()  # whoever bound it is gone
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    if group >= 0:
        os.chown(path, -1, group)
        path.chmod(0o660)
    server.listen(BACKLOG)
    return server


def _answers(path: Path) -> bool:
    """Whether somebody listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) in {0, errno.EAGAIN, errno.EINPROGRESS}
