"""The five profiles of the one launcher: what each may read, write and ask of the kernel.

Obeys docs/design/enclave.md, 1. The plan is built from this table, and nothing else widens it:
`airgap enclave profiles` prints it for an auditor together with the digests of the filters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from airgap.enclave import filters, tables


@dataclass(frozen=True, slots=True)
class Profile:
    """One row of the table.

    Attributes:
        name: What a caller and the evidence call it.
        purpose: What runs in it.
        rungs: Rungs on which it may run.
        kernel: What it may read of /proc and /sys, beside its own entries where `proc` says so.
        nodes: Device nodes in words; the plan finds them by name (`gpu.find_nodes`) or by path.
        proc: True for a /proc of its own: the GPU driver names its threads there.
        writes: What it may write to, in words.
        filters: Names of its filters, in the order in which they are taken.
        environment: Variables beside those of every profile.

    """

    name: str
    purpose: str
    rungs: tuple[str, ...]
    kernel: tuple[str, ...]
    nodes: tuple[str, ...]
    writes: str
    filters: tuple[str, str]
    proc: bool = False
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def last_filter(self) -> str:
        """Name of the filter that closes the last doors."""
        return self.filters[1]

    @property
    def gpu(self) -> bool:
        """True when it gets a GPU."""
        return set(GPU_NODES) <= set(self.nodes)


# What every profile may read: nothing of this is data of the site but the inputs.
READS = (
    ("interpreter", "its prefix, its dynamic loader, /usr and the links to it in /"),
    ("packages", "site folders of this interpreter; the sources of airgap, bundle and policy"),
    ("linker", "/etc/ld.so.cache"),
    ("inputs", "the paths that the caller names: a model folder, or the inputs of a conversion"),
)
# Weights that are widened and packed when a model is loaded are gigabytes of fresh memory: asked
# for in large pages, where the host grants them, a load takes a third less. glibc reads here if
# it may ask and how large they are; one before 2.35 does not know the word and ignores it. Beside
# these two lie counters of all processes of the host, which are nobody's business inside.
HUGE_PAGES = tuple(
    f"/sys/kernel/mm/transparent_hugepage/{name}" for name in ("enabled", "hpage_pmd_size")
)
MEMORY = (("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),)
# onnxruntime and torch size their thread pools by these; the rest of /proc and /sys is absent.
KERNEL = ("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu")
# Beside those: what the driver reads of itself and of the cards.
GPU_KERNEL = ("/proc/cpuinfo", "/proc/meminfo", "/proc/driver/nvidia", "/sys")
GPU_ENVIRONMENT = (("CUDA_MODULE_LOADING", "EAGER"), ("CUDA_CACHE_DISABLE", "1"))
NODES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
GPU_NODES = (
    "/dev/nvidiactl",
    "/dev/nvidiaN",
    "/dev/nvidia-uvm",
    "/dev/nvidia-uvm-tools",
    "/dev/nvidia-caps/nvidia-capN",
)
# Memory of other machines, fabric and display: a way out, or kernel code that inference never uses.
NEVER_NODES = ("/dev/nvidia-caps-imex-channels", "/dev/infiniband", "/dev/nvidia-modeset")

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="worker",
            purpose="inference on the CPU: the model and the user's request",
            rungs=("A", "U", "B", "C"),
            kernel=(*KERNEL, *HUGE_PAGES),
            nodes=NODES,
            writes="the channel and the error pipe",
            filters=("stage1", "stage2"),
            environment=MEMORY,
        ),
        Profile(
            name="worker-gpu",
            purpose="inference on an NVIDIA GPU; a larger kernel surface than `worker`",
            rungs=("A", "B"),
            kernel=GPU_KERNEL,
            nodes=(*NODES, *GPU_NODES),
            writes="the channel, the error pipe, the GPU's nodes, names of its own threads",
            filters=("stage1", "stage2_gpu"),
            proc=True,
            environment=GPU_ENVIRONMENT,
        ),
        Profile(
            name="screen",
            purpose="RDKit and gemmi on molecules, sequences and structures",
            rungs=("A", "U", "B", "C"),
            kernel=KERNEL,
            nodes=NODES,
            writes="the channel and the error pipe",
            filters=("stage1", "stage2"),
        ),
        Profile(
            name="convert",
            purpose="conversion and parity on the staging side: files must open",
            rungs=("A", "U", "B"),
            kernel=(*KERNEL, *HUGE_PAGES),
            nodes=NODES,
            writes="one fresh folder for results and one for scratch, limited in size",
            filters=("stage1", "no_exec"),
            environment=MEMORY,
        ),
        Profile(
            name="engine",
            purpose="building TensorRT engines on this lab's GPU at install: files must open",
            rungs=("A", "B"),
            kernel=GPU_KERNEL,
            nodes=(*NODES, *GPU_NODES),
            writes="one fresh folder for engines and one for scratch, limited in size; the GPU's "
            "nodes, names of its own threads",
            filters=("stage1", "no_exec"),
            proc=True,
            environment=GPU_ENVIRONMENT,
        ),
    )
}


def document(arch: str = "x86_64") -> dict[str, Any]:
    """Return the table with the digests of its filters, JSON-ready."""
    return {
        "arch": arch,
        "never": {"nodes": list(NEVER_NODES)},
        "profiles": [_row(profile, arch) for profile in PROFILES.values()],
    }


def _row(profile: Profile, arch: str) -> dict[str, Any]:
    return {
        "name": profile.name,
        "purpose": profile.purpose,
        "rungs": list(profile.rungs),
        "reads": [{"kind": kind, "what": what} for kind, what in READS]
        + [{"kind": "kernel", "what": path} for path in profile.kernel],
        "own_proc": profile.proc,
        "nodes": list(profile.nodes),
        "writes": profile.writes,
        "environment": dict(profile.environment),
        "filters": [_filter(name, arch) for name in profile.filters],
    }


def _filter(name: str, arch: str) -> dict[str, Any]:
    """Return what a filter denies or allows, by name of call."""
    program = filters.programs()[f"{name}.{arch}"]
    found: dict[str, Any] = {
        "name": name,
        "sha256": filters.digest(program),
        "instructions": filters.count(program),
        "file": f"airgap/enclave/published/{name}.{arch}.bpf",
    }
    if name == "stage1":
        found["denies"] = {group: sorted(calls) for group, _, calls in tables.STAGE1}
        found["by_argument"] = ["clone", "ioctl", "prlimit64"]
    elif name == "no_exec":
        found["denies"] = {"exec": sorted(tables.NO_EXEC)}
        found["by_argument"] = []
    else:
        calls = {**tables.STAGE2, **(tables.GPU if name == "stage2_gpu" else {})}
        found["allows"] = sorted(calls)
        found["by_argument"] = ["clone", "mmap", "mprotect", "tgkill", "write"]
    return found
