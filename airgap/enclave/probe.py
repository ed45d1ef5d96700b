"""Every way out that we know, tried without a seal and inside one (docs/design/enclave.md, 6).

A channel decides nothing: it reports that a call worked or the errno it got. What a receiver
outside really got is the ground truth, and `judge` puts the two together. The same code runs in
the control and in the sealed twin, where it is an ordinary program of the worker. Standard library
only.
"""

from __future__ import annotations

import errno
import json
import socket
import sys

from airgap.enclave.channels import CHANNELS, CLOSED_BY, SkippedError, prepare_foreign_socket

TYPE_CHECKING = False  # the worker has no use for the `typing` module; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from airgap.enclave.channels import Channel, Targets

__all__ = [
    "ABSENT",
    "BLOCKED",
    "CHANNELS",
    "CLOSED_BY",
    "CORE",
    "OPEN",
    "OPEN_BEFORE_STAGE2",
    "VERSION",
    "Twin",
    "attempt",
    "attempt_all",
    "create",
    "main",
    "prepare_foreign_socket",
]

VERSION = "1"
OPEN, BLOCKED = "OPEN", "BLOCKED"

# A control must leak or succeed on these, else it proves nothing about anything.
CORE = (
    "tcp4",
    "udp4_sendto",
    "unix_path_stream",
    "unix_path_dgram_sendto",
    "socketpair_dgram_readdress",
    "inherited_tcp_fd",
    "scm_rights_recv",
    "write_shared_dir",
    "read_file",
    "fork",
    "exec",
)
# Before stage 2 a worker may exec: the new program inherits every layer.
OPEN_BEFORE_STAGE2 = frozenset({"exec", "memfd_exec"})
# These answers of a control mean that the kernel or its settings lack the channel.
ABSENT = frozenset(
    {
        "EAFNOSUPPORT",
        "EPROTONOSUPPORT",
        "ESOCKTNOSUPPORT",
        "ENOSYS",
        "ENOENT",
        "ENXIO",
        "ENODEV",
        "EPERM",
        "EACCES",
        "EADDRNOTAVAIL",
        "EOPNOTSUPP",
        "skipped",
    }
)


def attempt_all(targets: Targets) -> dict[str, list[str]]:
    """Try every channel; returns name -> [OPEN or BLOCKED, errno or detail]."""
    return {name: attempt(function, targets) for name, function in CHANNELS.items()}


def attempt(function: Channel, targets: Targets) -> list[str]:
    """Try one channel; any failure is an answer."""
    try:
        return [OPEN, str(function(targets) or "")[:70]]
    except SkippedError:
        return [BLOCKED, "skipped"]
    except socket.gaierror as error:
        return [BLOCKED, _gai_name(error)]
    except OSError as error:
        return [BLOCKED, errno.errorcode.get(error.errno or 0, str(error))[:70]]
    except Exception as error:  # noqa: BLE001 - a channel that breaks is closed
        return [BLOCKED, type(error).__name__]


def _gai_name(error: socket.gaierror) -> str:
    names = {socket.EAI_AGAIN: "EAI_AGAIN", socket.EAI_NONAME: "EAI_NONAME"}
    return names.get(error.errno or 0, "EAI_FAIL")


# -- the twin: this file as a sealed program ------------------------------------------------------


class Twin:
    """Tries every channel before stage 2 and again after it."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._targets: Targets = config["targets"]

    def warm_up(self) -> dict[str, Any]:
        """Try all before stage 2."""
        # Resolver plug-ins and codecs load on first use; after stage 2 nothing loads.
        self._foreign = prepare_foreign_socket()
        return {"stage1": attempt_all(self._targets)}

    def handle(self, payload: bytes, emit: Callable[[bytes], None]) -> bytes:
        """Try all after stage 2 under the token of the request; `foreign` must be killed."""
        del emit
        wanted = json.loads(payload)
        if wanted["op"] == "foreign":
            return str(self._foreign()).encode()
        self._targets["token"] = wanted["token"]
        return json.dumps(attempt_all(self._targets)).encode()


def create(config: dict[str, Any]) -> Twin:
    """Make the program of the twin."""
    return Twin(config)


def main(argv: list[str]) -> int:
    """Try every channel as a sealed conversion: `argv` is the targets as JSON and a result file."""
    found = attempt_all(json.loads(argv[0]))
    with open(argv[1], "w", encoding="utf-8") as file:  # noqa: PTH123 - the worker has no pathlib
        json.dump(found, file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
