"""What a host has of NVIDIA: cards, driver, and the libraries of the wheels against each other.

`airgap doctor --gpu` prints it. `take` reads the facts below a root folder, so that a test can lay
out any host as a tree of files; `examine` holds them against each other. Written from the vendors'
documents and from the metadata of the wheels: not run on a GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
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
CARDS_FOLDER = Path("/proc/driver/nvidia/gpus")
CARDS_LIMIT = 256
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
    shown: tuple[str, ...] = ()  # models of cards, as the driver's module names them


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, whether it fits, what was found, and what to do.

    `fix` says it in words; `command`, where there is one, is exact and needs no network.
    """

    name: str
    good: bool
    found: str
    fix: str = ""
    command: str = ""


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
        *_cards(host, cards, cuda),
        _wheel(host, runtime, cuda),
        *(_library(host, cuda, place) for place in range(len(LIBRARIES.get(cuda, ())))),
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
            "" if loaded else "install the vendor's driver from your own media, then load it",
            "" if loaded else "modprobe nvidia",
        ),
        Check(
            "nodes",
            bool(host.nodes),
            f"{len(host.nodes)} device nodes" if host.nodes else host.nodes_missing,
            "" if host.nodes else "make them before the start: the seal cannot",
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


def _cards(host: Host, cards: Sequence[Gpu], cuda: int) -> list[Check]:
    if not cards:
        named = "nvidia-smi names none"
        named += f"; the driver shows {', '.join(host.shown)}" if host.shown else ""
        fix, command = "nvidia-smi must list a card; the kernel's log says why", "dmesg | grep NVRM"
        return [Check("cards", good=False, found=named, fix=fix, command=command)]
    found = []
    for card in cards:
        words = f"{card.name}, compute {card.compute}, {card.memory_mb} MiB, driver {card.driver}"
        fix = ""
        if cuda and numbers(card.driver) < LEAST_DRIVER[cuda]:
            least = ".".join(str(n) for n in LEAST_DRIVER[cuda])
            fix = f"CUDA {cuda} needs driver {least} or newer: bring it in on your own media; "
            fix += "or have the bundle built with onnxruntime-gpu 1.26.0, which is for CUDA 12"
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
        fix = "make an environment with the extra gpu in the place of cpu"
        command = _pip("'airgap[gpu]'")
        return Check("onnxruntime", good=False, found=found, fix=fix, command=command)
    if not cuda:
        fix = "this version is not known here: install the pinned one"
        return Check(
            "onnxruntime",
            good=False,
            found=f"onnxruntime-gpu {runtime}",
            fix=fix,
            command=_pip("onnxruntime-gpu==1.28.0"),
        )
    return Check("onnxruntime", good=True, found=f"onnxruntime-gpu {runtime}, CUDA {cuda}")


def _pip(what: str) -> str:
    """Return the command that installs from the wheels of the bundle and asks no network."""
    return f"pip install --no-index -f WHEELS {what}"


def _library(host: Host, cuda: int, place: int) -> Check:
    name, library, major = LIBRARIES[cuda][place]
    version = host.versions.get(name, "")
    found, fix, command = f"{version} without {library}", "", _pip(name)
    if not version:
        found, fix = "not installed", "the provider loads it"
        for other, rows in LIBRARIES.items():
            if other != cuda and rows[place][0] in host.versions:
                found = f"{rows[place][0]} is for CUDA {other}"
                fix = f"onnxruntime-gpu here is built for CUDA {cuda}"
    elif numbers(version)[:1] != (major,):
        found, fix = version, f"the provider wants {major}: that one is for another CUDA"
    elif library not in host.libraries:
        fix, command = "the wheel is damaged", _pip(f"--force-reinstall {name}")
    else:
        return Check(name, good=True, found=f"{version}, {library}")
    return Check(name, good=False, found=found, fix=fix, command=command)


def _tensorrt(host: Host, cuda: int) -> Check:
    wanted = f"tensorrt-cu{cuda or 13}"
    others = [name for name in host.versions if name.startswith("tensorrt-cu") and name != wanted]
    version = host.versions.get(wanted, "")
    found, fix = version, f"too new: the provider links version {TENSORRT_BELOW - 1}"
    if not version:
        found = f"{others[0]}, for another CUDA" if others else "not installed; `cuda` needs none"
        fix = f"tensorrt needs the one for CUDA {cuda or 13}"
    elif numbers(version)[:1] < (TENSORRT_BELOW,):
        return Check("TensorRT", good=True, found=f"{wanted} {version}")
    command = _pip(f"'{wanted}<{TENSORRT_BELOW}'")
    return Check("TensorRT", good=False, found=found, fix=fix, command=command)


# -- this host ------------------------------------------------------------------------------------


def take(
    root: Path = Path("/"),
    *,
    run: Callable[[Sequence[str]], str] | None = None,
    packages: Sequence[str] | None = None,
    node: Callable[[str], bool] = gpu.is_node,
) -> Host:
    """Read the facts of a host; what cannot be read is empty.

    Args:
        root: Where its /dev and /proc begin.
        run: Runs a command and returns what it printed; None runs it here.
        packages: Folders of distributions; None takes those of this interpreter.
        node: Says whether a path is a device.

    """
    asked = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        devices = str(root / gpu.DEVICES.lstrip("/"))
        nodes, missing = tuple(gpu.find_nodes(devices, node)), ""
    except gpu.GpuError as error:
        nodes, missing = (), str(error)
    return Host(
        smi=(run or _answer)(asked),
        module=_text(_below(root, VERSION_FILE)),
        nodes=nodes,
        nodes_missing=missing,
        versions=installed(packages),
        libraries=frozenset(_libraries(packages)),
        shown=tuple(_shown(_below(root, CARDS_FOLDER))),
    )


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _shown(folder: Path) -> list[str]:
    """Return the models that the driver's module names, one for each card."""
    texts = [_text(one / "information") for one in sorted(folder.glob("*"))[:CARDS_LIMIT]]
    found = (re.search(r"^Model:\s*([ -~]{1,80})$", text, re.MULTILINE) for text in texts)
    return [match[1] for match in found if match]


def installed(packages: Sequence[str] | None = None) -> dict[str, str]:
    """Return the distributions of this interpreter, or of `packages`, by normal name."""
    return {
        re.sub(r"[-_.]+", "-", one.name).lower(): one.version
        for one in _distributions(packages)
        if one.name
    }


def _libraries(packages: Sequence[str] | None) -> list[str]:
    """Return the names of library files that a wheel of the vendor brought and that are there."""
    return [
        file.name
        for one in _distributions(packages)
        if one.name and re.match(r"(nvidia|tensorrt)[-_.]", one.name.lower())
        for file in one.files or ()
        if ".so" in file.name and Path(str(one.locate_file(file))).is_file()
    ]


def _distributions(packages: Sequence[str] | None) -> Iterable[metadata.Distribution]:
    if packages is None:
        return metadata.distributions()
    return metadata.distributions(path=list(packages))


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
