"""Reads the filters that a live process really runs and names the published ones among them.

Obeys docs/design/enclave.md, 12. `/proc/PID/status` says that filters exist; only a dump by ptrace
says which. It stops the process for an instant and needs CAP_SYS_ADMIN.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from airgap.enclave import filters, host, linux
from policy.errors import RefusedError


def dump(pid: int) -> list[dict[str, Any]]:
    """Return each filter of `pid`, first installed first, with the published one that it equals.

    Raises:
        RefusedError: `enclave.evidence`, there is no such process or this user may not look.

    """
    try:
        status = host.parse_status(Path(f"/proc/{pid}/status").read_text())
        inside = int(status["NSpid"].split()[-1])
        if status["Seccomp"] == "0":
            raise RefusedError(
                "enclave.evidence",
                f"process {pid} runs under no seccomp filter: it is no sealed process",
                hint="`airgap enclave show` lists the pids of those of a tree",
            )
        found = linux.dump_filters(pid)
    except (OSError, KeyError, ValueError) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise RefusedError(
            "enclave.evidence",
            f"the filters of process {pid} cannot be dumped: {words}",
            hint="run it as root of the host; `airgap enclave show` lists the pids",
        ) from error
    names = _known(inside)
    return [
        {
            "index": index,
            "instructions": filters.count(program),
            "sha256": filters.digest(program),
            "matches": names.get(program),
        }
        for index, program in enumerate(found)
    ]


def _known(inside: int) -> dict[bytes, str]:
    """Return the filters that a process with this pid in its namespace may run, by their bytes."""
    arch = os.uname().machine
    return {
        filters.stage1(arch): "stage1",
        filters.no_exec(arch): "no_exec",
        **{filters.last(name, inside, arch): name for name in ("stage2", "stage2_gpu")},
    }
