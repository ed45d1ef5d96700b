"""What a host has of NVIDIA: cards, driver, and the libraries of the wheels against each other.

`airgap doctor --gpu` prints it. Every fact is an argument, so that a host without a GPU can be
described in a test; `take` reads those of this host. Written from the vendors' documents and from
the metadata of the wheels: not run on a GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from airgap.enclave import gpu

QUERY = (
    "index",
    "name",
    "uuid",
    "driver_version",
    "memory.total",
    "compute_cap",
    "mig.mode.current",
)
SMI_SECONDS = 20
SMI_LIMIT = 1 << 20
VERSION_FILE = Path("/proc/driver/nvidia/version")
_MODULE = re.compile(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)")
# onnxruntime-gpu by minor version: CUDA, and the least driver of it (CUDA release notes, table 3).
CUDA_OF: dict[tuple[int, ...], int] = {(1, 25): 12, (1, 26): 12, (1, 27): 13, (1, 28): 13}
LEAST_DRIVER = {12: (525, 60, 13), 13: (580, 65, 6)}
LEAST_COMPUTE = {12: (5, 0), 13: (7, 5)}
# What the CUDA provider loads: distribution, its library below site-packages/nvidia, its own major.
LIBRARIES = {
    12: (
        ("nvidia-cuda-runtime-cu12", "libcudart.so.12", 12),
        ("nvidia-cublas-cu12", "libcublasLt.so.12", 12),
        ("nvidia-cufft-cu12", "libcufft.so.11", 11),
        ("nvidia-curand-cu12", "libcurand.so.10", 10),
        ("nvidia-cuda-nvrtc-cu12", "libnvrtc.so.12", 12),
        ("nvidia-cudnn-cu12", "libcudnn.so.9", 9),
    ),
    13: (
        ("nvidia-cuda-runtime", "libcudart.so.13", 13),
        ("nvidia-cublas", "libcublasLt.so.13", 13),
        ("nvidia-cufft", "libcufft.so.12", 12),
        ("nvidia-curand", "libcurand.so.10", 10),
        ("nvidia-cuda-nvrtc", "libnvrtc.so.13", 13),
        ("nvidia-cudnn-cu13", "libcudnn.so.9", 9),
    ),
}
TENSORRT_BELOW = 11  # the provider links libnvinfer.so.10


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, as nvidia-smi names it; `memory_mb` of all of it."""

    index: int
    name: str
    uuid: str
    driver: str
    memory_mb: int
    compute: str
    mig: str


@dataclass(frozen=True, slots=True)
class Host:
    """The facts: empty where a source is missing, never guessed."""

    smi: str  # what nvidia-smi answered to QUERY
    module: str  # the text of VERSION_FILE
    nodes: tuple[str, ...]
    nodes_missing: str  # why there are none
    versions: Mapping[str, str]  # distributions by normal name
    libraries: frozenset[str]  # names of library files that the wheels brought


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, whether it fits, what was found, and what to do."""

    name: str
    good: bool
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What `airgap doctor --gpu` prints; `cuda` and `tensorrt` say what may be demanded here."""

    cards: tuple[Gpu, ...]
    checks: tuple[Check, ...]
    tensorrt_checks: tuple[Check, ...]

    @property
    def cuda(self) -> bool:
        """Whether a session on CUDA should come up."""
        return bool(self.checks) and all(check.good for check in self.checks)

    @property
    def tensorrt(self) -> bool:
        """Whether one on TensorRT should."""
        return self.cuda and all(check.good for check in self.tensorrt_checks)

    def as_document(self) -> dict[str, Any]:
        """Return everything, JSON-ready."""
        return {
            "cuda": self.cuda,
            "tensorrt": self.tensorrt,
            "cards": [asdict(card) for card in self.cards],
            "checks": [asdict(check) for check in self.checks],
            "tensorrt_checks": [asdict(check) for check in self.tensorrt_checks],
        }


def examine(host: Host) -> Inventory:
    """Hold the facts against each other."""
    cards = tuple(parse_smi(host.smi))
    runtime = host.versions.get("onnxruntime-gpu", "")
    cuda = CUDA_OF.get(numbers(runtime)[:2], 0)
    checks = [
        *_driver(host, cards),
        *_cards(cards, cuda),
        _wheel(host, runtime, cuda),
        *(_library(host, row) for row in LIBRARIES.get(cuda, ())),
    ]
    return Inventory(cards, tuple(checks), (_tensorrt(host, cuda),))


def parse_smi(text: str) -> list[Gpu]:
    """Read the answer of nvidia-smi; a line that is not one is left out."""
    found = []
    for line in text.splitlines()[:256]:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(QUERY) or not cells[0].isdecimal() or not cells[4].isdecimal():
            continue
        index, name, uuid, driver, memory, compute, mig = cells
        found.append(Gpu(int(index), name, uuid, driver, int(memory), compute, mig))
    return found


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, empty where it has none."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _driver(host: Host, cards: Sequence[Gpu]) -> list[Check]:
    module = _MODULE.search(host.module)
    loaded = module[1] if module else ""
    found = [
        Check(
            "driver",
            bool(loaded),
            f"kernel module {loaded}" if loaded else f"no {VERSION_FILE}",
            "" if loaded else "install the vendor's driver, then: modprobe nvidia",
        ),
        Check(
            "nodes",
            bool(host.nodes),
            f"{len(host.nodes)} device nodes" if host.nodes else host.nodes_missing,
            "" if host.nodes else "nvidia-modprobe -u -c 0",
        ),
    ]
    if cards and loaded and any(card.driver != loaded for card in cards):
        found.append(
            Check(
                "driver library",
                good=False,
                found=f"module {loaded}, library {cards[0].driver}",
                fix="one of them was updated without the other: restart the host",
            )
        )
    return found


def _cards(cards: Sequence[Gpu], cuda: int) -> list[Check]:
    if not cards:
        fix = "nvidia-smi must list a card; see the kernel's log: dmesg | grep -i nvrm"
        return [Check("cards", good=False, found="nvidia-smi names none", fix=fix)]
    found = []
    for card in cards:
        words = f"{card.name}, compute {card.compute}, {card.memory_mb} MiB, driver {card.driver}"
        fix = ""
        if cuda and numbers(card.driver) < LEAST_DRIVER[cuda]:
            least = ".".join(str(n) for n in LEAST_DRIVER[cuda])
            fix = f"CUDA {cuda} needs driver {least} or newer; or install onnxruntime-gpu 1.26.0"
        elif cuda and numbers(card.compute) < LEAST_COMPUTE[cuda]:
            least = ".".join(str(n) for n in LEAST_COMPUTE[cuda])
            fix = f"CUDA {cuda} has no code for compute below {least}: demand `cpu`"
        elif card.mig == "Enabled":
            words += ", MIG"
        found.append(Check(f"card {card.index}", not fix, words, fix))
    return found


def _wheel(host: Host, runtime: str, cuda: int) -> Check:
    plain = host.versions.get("onnxruntime", "")
    if runtime and plain:
        return Check(
            "onnxruntime",
            good=False,
            found=f"onnxruntime {plain} and onnxruntime-gpu {runtime} in one environment",
            fix="they overwrite each other: make the environment again with the extra gpu alone",
        )
    if not runtime:
        found = f"onnxruntime {plain}, for the CPU" if plain else "none"
        fix = "install the extra gpu: pip install --no-index --find-links WHEELHOUSE 'airgap[gpu]'"
        return Check("onnxruntime", good=False, found=found, fix=fix)
    if not cuda:
        fix = "this version is not known here: install the pinned one, 1.28.0"
        return Check("onnxruntime", good=False, found=f"onnxruntime-gpu {runtime}", fix=fix)
    return Check("onnxruntime", good=True, found=f"onnxruntime-gpu {runtime}, CUDA {cuda}")


def _library(host: Host, row: tuple[str, str, int]) -> Check:
    name, library, major = row
    version = host.versions.get(name, "")
    pip = f"pip install --no-index --find-links WHEELHOUSE '{name}'"
    if not version:
        return Check(name, good=False, found="not installed", fix=pip)
    if name.startswith("nvidia-cudnn") and numbers(version)[:1] != (major,):
        return Check(name, good=False, found=version, fix=f"the provider wants {major}: {pip}")
    if library not in host.libraries:
        fix = f"the wheel is of another CUDA or damaged: {pip} --force-reinstall"
        return Check(name, good=False, found=f"{version} without {library}", fix=fix)
    return Check(name, good=True, found=f"{version}, {library}")


def _tensorrt(host: Host, cuda: int) -> Check:
    wanted = f"tensorrt-cu{cuda or 13}"
    others = [name for name in host.versions if name.startswith("tensorrt-cu") and name != wanted]
    version = host.versions.get(wanted, "")
    pip = f"pip install --no-index --find-links WHEELHOUSE '{wanted}<{TENSORRT_BELOW}'"
    if not version:
        found = f"{others[0]}, for another CUDA" if others else "not installed; `cuda` needs none"
        return Check("TensorRT", good=False, found=found, fix=pip)
    if numbers(version)[:1] >= (TENSORRT_BELOW,):
        return Check("TensorRT", good=False, found=version, fix=f"too new for the provider: {pip}")
    return Check("TensorRT", good=True, found=f"{wanted} {version}")


# -- this host ------------------------------------------------------------------------------------


def take(
    run: Callable[[Sequence[str]], str] | None = None,
    version_file: Path = VERSION_FILE,
    devices: str = gpu.DEVICES,
) -> Host:
    """Read the facts of this host; what cannot be read is empty."""
    asked = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        nodes, missing = tuple(gpu.find_nodes(devices)), ""
    except gpu.GpuError as error:
        nodes, missing = (), str(error)
    return Host(
        smi=(run or _answer)(asked),
        module=_text(version_file),
        nodes=nodes,
        nodes_missing=missing,
        versions=installed(),
        libraries=frozenset(_libraries()),
    )


def installed() -> dict[str, str]:
    """Return the distributions of this interpreter, by normal name."""
    return {
        re.sub(r"[-_.]+", "-", one.name).lower(): one.version
        for one in metadata.distributions()
        if one.name
    }


def _libraries() -> list[str]:
    return [
        file.name
        for one in metadata.distributions()
        if one.name and re.match(r"(nvidia|tensorrt)[-_.]", one.name.lower())
        for file in one.files or ()
        if ".so" in file.name
    ]


def _answer(argv: Sequence[str]) -> str:
    try:
        ran = subprocess.run(
            list(argv), capture_output=True, timeout=SMI_SECONDS, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return ran.stdout[:SMI_LIMIT] if ran.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:SMI_LIMIT]
    except OSError:
        return ""
