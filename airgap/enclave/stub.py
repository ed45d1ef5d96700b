"""First act of a sealed conversion: close exec, then run it (docs/design/enclave.md, 1).

Runs before any third-party import, so that no library has had a say. Stage 1 already refuses new
processes, sockets and namespaces; files stay open to the program, as it must read and write them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys

from airgap.enclave import channel, filters, linux
from airgap.enclave.tables import CHANNEL_IN, CHANNEL_OUT, STDERR

LIMIT = 1 << 20  # bytes of a control frame


def main() -> None:
    """Close exec, let the broker look twice, then become the program."""
    filters.install(filters.no_exec(linux.MACHINE))
    channel.send(CHANNEL_OUT, channel.LOADED, b"{}")
    if channel.receive(CHANNEL_IN, LIMIT).kind != channel.SEAL:
        raise ValueError("the broker did not seal")
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    channel.send(CHANNEL_OUT, channel.READY, b"{}")
    wanted = json.loads(channel.receive(CHANNEL_IN, LIMIT).payload)
    os.close(CHANNEL_IN)
    os.close(CHANNEL_OUT)
    os.dup2(STDERR, 1)
    run(wanted["kind"], wanted["name"], wanted["arguments"])


def run(kind: str, name: str, arguments: list[str]) -> None:
    """Run a script or a module as the main program."""
    sys.argv = [name, *arguments]
    if kind == "module":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
