"""An NVIDIA GPU inside the seal: which nodes it needs, and whether it answers there.

Obeys docs/design/enclave.md, 8. Node selection is pure but for looking; `initialise` runs inside
the seal, before stage 2. Standard library only. Written from the vendor's and others' documents:
no machine with a GPU has run it.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
from dataclasses import dataclass

TYPE_CHECKING = False  # the worker has no use for the `typing` module; type checkers know this name
if TYPE_CHECKING:
    from collections.abc import Callable

DEVICES = "/dev"
_CARD = re.compile(r"nvidia[0-9]{1,3}")
_MIG = re.compile(r"nvidia-cap[0-9]{1,5}")
_REQUIRED = {
    "nvidiactl": "the driver is not loaded: modprobe nvidia, or nvidia-modprobe at boot",
    "nvidia-uvm": "load it and make its node before the start: nvidia-modprobe -u -c 0",
}
# Driver 570 and later open it and answer 304 without it; older ones have none.
_OPTIONAL = ("nvidia-uvm-tools",)
# Answers of cuInit whose cause is known (cuda.h, CUresult).
_MEANING = {
    3: "the driver is not initialised",
    34: "the library is a stub: the driver's own libcuda is not installed",
    100: "no device: its node is missing inside the seal, or belongs to another user",
    304: "a call to the system failed: a node, /sys, or memfd_create is missing inside the seal",
    803: "library and kernel module are of different versions",
    804: "this card does not support the library's version",
    999: "unknown; see the kernel's log",
}


@dataclass(frozen=True, slots=True)
class Driver:
    """Where the driver's nodes lie, and what its library is called inside the seal."""

    devices: str = DEVICES
    library: str = "libcuda.so.1"


class GpuError(Exception):
    """There is no GPU that a sealed process could use; the text names what is missing."""


def is_node(path: str) -> bool:
    """Say whether `path` itself is a character device."""
    try:
        return stat.S_ISCHR(os.lstat(path).st_mode)
    except OSError:
        return False


def find_nodes(devices: str = DEVICES, node: Callable[[str], bool] = is_node) -> list[str]:
    """Return the nodes that a CUDA process opens, and no other.

    Args:
        devices: The folder of device nodes.
        node: Says whether a path is a device; a symbolic link is none.

    Raises:
        GpuError: A node that it cannot do without is missing.

    """
    for name, remedy in _REQUIRED.items():
        if not node(f"{devices}/{name}"):
            raise GpuError(f"there is no {devices}/{name}: {remedy}")
    cards = [name for name in _names(devices) if _CARD.fullmatch(name)]
    found = [name for name in cards if node(f"{devices}/{name}")]
    if not found:
        raise GpuError(f"there is no {devices}/nvidia0: no card is attached to this host")
    found += [name for name in (*_REQUIRED, *_OPTIONAL) if node(f"{devices}/{name}")]
    slices = (f"nvidia-caps/{name}" for name in _names(f"{devices}/nvidia-caps"))
    found += [n for n in slices if _MIG.fullmatch(n.rpartition("/")[2]) and node(f"{devices}/{n}")]
    return [f"{devices}/{name}" for name in found]


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - the worker has no pathlib
    except OSError:
        return []


def initialise(library: str) -> dict[str, int]:
    """Call cuInit inside the seal; returns its version and how many devices it sees.

    Raises:
        GpuError: The library is missing, or it does not answer 0.

    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        raise GpuError(f"{library} does not load inside the seal: {error}") from error
    version, count = ctypes.c_int(), ctypes.c_int()
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDriverGetVersion", (ctypes.byref(version),)),
        ("cuDeviceGetCount", (ctypes.byref(count),)),
    ):
        if not hasattr(cuda, name):
            raise GpuError(f"{library} has no {name}")
        answer = int(getattr(cuda, name)(*arguments))
        if answer:
            raise GpuError(f"{name} answered {answer}: {_MEANING.get(answer, 'see cuda.h')}")
    if count.value < 1:
        raise GpuError("cuInit works inside the seal and sees no device")
    return {"cuInit": 0, "driver": version.value, "devices": count.value}
