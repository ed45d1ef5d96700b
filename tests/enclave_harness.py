"""Runs code as root or as an ordinary user where the interpreter is reachable for any user.

A checkout or an interpreter below a closed folder (root's home) is shown again in a private mount
namespace, so that an unprivileged uid can run it; the host is not changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from airgap.enclave import linux, plan

USER = 40404
HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "sealed_programs.py"
ROOT = os.geteuid() == 0


def can_make_namespaces():
    """Say whether this process may unshare a user or a mount namespace."""
    child = os.fork()
    if not child:
        try:
            flags = linux.CLONE_NEWNS | (0 if ROOT else linux.CLONE_NEWUSER)
            linux.call("unshare", flags)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


NAMESPACES = can_make_namespaces()
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason="this host allows no namespaces")
needs_root = pytest.mark.skipif(not ROOT, reason="needs root, to be another user")


def starters():
    """Return the kinds of user that tests can be here."""
    if not ROOT:
        return ["user"]
    return ["root", "user"] if NAMESPACES else ["root"]


def run_as(starter, code, *arguments, timeout=60):
    """Run `code` in a fresh interpreter as `starter`; it prints one JSON value, which is returned.

    `code` finds `ARGUMENTS` (a list) and the folder of tests on its path.
    """
    script = f"import json, sys\nsys.path.insert(0, {str(HERE)!r})\n"
    script += f"ARGUMENTS = json.loads({json.dumps(json.dumps(arguments))})\n{code}"
    command = [sys.executable, "-c", script]
    if ROOT and NAMESPACES:
        command = [sys.executable, str(HERE / "enclave_harness.py"), starter, script]
    with tempfile.TemporaryDirectory(prefix="airgap-test-", ignore_cleanup_errors=True) as home:
        Path(home).chmod(0o777)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "HOME": home, "TMPDIR": home},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def show_closed_folders():
    """In a mount namespace of our own, make every folder that we run from reachable for others."""
    linux.call("unshare", linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    wanted = plan.prune([*plan.runtime_folders(), str(HERE.parent)])
    closed = {}
    for path in wanted:
        for parent in reversed(Path(path).parents):
            if not parent.stat().st_mode & 1:
                closed.setdefault(str(parent), []).append(path)
                break
    for folder, paths in closed.items():
        ends = [os.open(path, os.O_PATH) for path in paths]
        linux.mount("tmpfs", folder, "tmpfs", 0, "mode=0755,size=1m")
        for path, end in zip(paths, ends, strict=True):
            Path(path).mkdir(parents=True, exist_ok=True)
            linux.mount(f"/proc/self/fd/{end}", path, None, linux.MS_BIND | linux.MS_REC)
            os.close(end)


def become(starter):
    """Give up root for good."""
    if starter == "user":
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)


if __name__ == "__main__":
    os.umask(0o022)
    show_closed_folders()
    become(sys.argv[1])
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])  # noqa: S606
