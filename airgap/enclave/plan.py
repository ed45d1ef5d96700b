"""Turns a survey and a wish into what a process gets, exactly (docs/design/enclave.md, 3 and 5).

Pure apart from looking at which files exist. The launcher executes the plan and adds nothing; the
evidence is compared with the same plan.
"""

from __future__ import annotations

import os
import site
import struct
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from airgap.enclave import filters, gpu
from airgap.enclave.host import HostSurvey, free_uid, mapped
from airgap.enclave.profiles import NODES, PROFILES, Profile

Mode = Literal["read", "write", "device", "gpu", "proc"]


class Bind(TypedDict):
    """One path in the private root; `owner` is the (uid, gid) whose files the worker may read."""

    path: str
    mode: Mode
    owner: list[int] | None


class LandlockPlan(TypedDict):
    """The rules and the ABI to ask for."""

    abi: int
    rules: list[list[str]]


class Plan(TypedDict):
    """All that the launcher is told."""

    rung: str
    profile: str
    broker: int
    namespaces: list[str]
    mapping: list[int] | None
    identity: list[int] | None
    binds: list[Bind]
    links: list[list[str]]
    root_kib: int
    check: list[str]
    landlock: LandlockPlan | None
    limits: dict[str, int]
    argv: list[str]
    env: dict[str, str]
    stage1: str
    last: str  # name of the filter that the program takes


PACKAGES = ("airgap", "bundle", "policy")
ROOT_KIB = 1024
_MIB = 1 << 20
_SYSTEM_LINKS = ("/bin", "/sbin", "/lib", "/lib64", "/lib32")
_SYSTEM_FILES = ("/etc/ld.so.cache",)
# Address space that is reserved and not used: libraries, and an arena of libc for each thread.
_ROOM_MIB = 256
# What each rung unshares; a user adds "user" to A. U maps no id and mounts nothing: it is for hosts
# that let a user make namespaces and then deny every capability inside.
NAMESPACES = {
    "A": ("net", "ipc", "pid", "mnt", "uts", "cgroup"),
    "U": ("net", "ipc", "pid", "uts", "user"),
    "B": (),
    "C": (),
}
INSIDE_ID = 61184  # the id inside, where the id outside is 0 of an outer user namespace


class PlanError(Exception):
    """The wish cannot be met on this host; `layer` names why."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(message)
        self.layer = layer


def package_folders() -> dict[str, str]:
    """Return the folder of each of our packages; they lie side by side, installed or editable."""
    parent = Path(__file__).resolve().parents[2]
    return {name: str(parent / name) for name in PACKAGES if (parent / name).is_dir()}


def site_folders() -> list[str]:
    """Return the folders of third-party packages that this interpreter uses."""
    found = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        found.append(site.getusersitepackages())
    return list(dict.fromkeys(folder for folder in found if Path(folder).is_dir()))


def interpreter() -> str:
    """Return the real file of this interpreter."""
    return os.path.realpath(sys.executable)


def loader(program: str) -> str | None:
    """Return the dynamic loader that an ELF program names, None for a static one."""
    with Path(program).open("rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            raise PlanError("files", f"the interpreter {program} is not a 64-bit ELF program")
        start, size, count = (
            *struct.unpack_from("<Q", head, 32),
            *struct.unpack_from("<HH", head, 54),
        )
        file.seek(start)
        table = file.read(size * count)
        for at in range(0, size * count, size):
            kind, _, offset = struct.unpack_from("<IIQ", table, at)
            if kind == 3:  # noqa: PLR2004 - PT_INTERP
                (length,) = struct.unpack_from("<Q", table, at + 32)
                file.seek(offset)
                return file.read(length).rstrip(b"\0").decode()
    return None


def runtime_folders() -> list[str]:
    """Return what an interpreter needs to run our packages: prefixes, sites, sources, /usr."""
    wanted = [
        "/usr",
        os.path.realpath(sys.base_prefix),
        sys.base_prefix,
        sys.prefix,
        str(Path(interpreter()).parent),
        *site_folders(),
        *package_folders().values(),
    ]
    return prune(wanted)


def prune(paths: Iterable[str]) -> list[str]:
    """Drop what lies below another path of the list; shortest first."""
    out: list[str] = []
    for path in sorted(dict.fromkeys(os.path.normpath(path) for path in paths), key=len):
        if not any(path == kept or path.startswith(kept.rstrip("/") + "/") for kept in out):
            out.append(path)
    return out


def built_environment(*, threads: int, scratch: str | None = None) -> dict[str, str]:
    """Return the whole environment of a sealed process: built from nothing, inherited by nobody."""
    home = scratch or "/nonexistent"
    out = {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": home,
        "OMP_NUM_THREADS": str(threads),
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }
    if scratch is not None:
        out["TMPDIR"] = scratch
    return out


def require_silent(hits: Sequence[str], environment: dict[str, str]) -> None:
    """Refuse a wheel that phones home unless its switch is off in this very environment."""
    if hits and environment.get("ORT_DISABLE_TELEMETRY") != "1":
        raise PlanError(
            "telemetry",
            f"onnxruntime carries a telemetry client ({', '.join(hits)}) and "
            "ORT_DISABLE_TELEMETRY=1 is not set for the sealed process",
        )


def require_inputs(paths: Iterable[str]) -> None:
    """Refuse an input that does not exist, before anything is measured or bound."""
    for path in paths:
        if not Path(path).exists():
            raise PlanError("files", f"there is no {path!r} to read")


def folder_bytes(paths: Iterable[str]) -> int:
    """Add up the sizes of the files at and below `paths`."""
    total = 0
    for path in paths:
        if Path(path).is_dir():
            for parent, _, names in os.walk(path):
                total += sum(Path(parent, name).lstat().st_size for name in names)
        else:
            total += Path(path).stat().st_size
    return total


def identity_of(facts: HostSurvey, uid: int | None) -> tuple[list[int] | None, list[int] | None]:
    """Return (ids to become, ids to map): root becomes a uid of its own, a user maps itself.

    Raises:
        PlanError: The worker would be uid 0.

    """
    if facts.uid != 0:
        return None, [os.getuid(), os.getgid()]
    chosen = free_uid() if uid is None else uid
    if chosen in {0, facts.overflow_uid}:
        raise PlanError(
            "identity", f"the worker's uid would be {chosen}, which is no account of its own"
        )
    if mapped(facts, chosen):
        return [chosen, chosen], None
    if any(first <= 0 < first + count and outside == 0 for first, outside, count in facts.uid_map):
        raise PlanError(
            "identity", "root of this user namespace is root outside, and there is no other id"
        )
    return None, [INSIDE_ID, INSIDE_ID]


def build(
    facts: HostSurvey,
    *,
    rung: str,
    profile: str,
    part: str,
    read_only: Sequence[str],
    writable: Sequence[str],
    environment: dict[str, str],
    memory_mb: int,
    descriptors: int,
    file_mb: int,
    uid: int | None,
    devices: str = gpu.DEVICES,
) -> Plan:
    """Return the plan of one sealed process.

    Args:
        facts: The survey that the rung was chosen by.
        rung: A, U, B or C.
        profile: A row of `profiles`.
        part: What `entry.py` runs after exec.
        read_only: The inputs; everything else that is readable belongs to the interpreter.
        writable: The only folders that may be written to; none for a worker.
        environment: The whole environment but for what the profile adds.
        memory_mb: Limit on data in MiB; address space gets twice the inputs and some room more.
        descriptors: Limit on open descriptors.
        file_mb: Largest file that may be written, in MiB.
        uid: The worker's uid for a start by root; None picks a free one.
        devices: The folder of device nodes, for a GPU.

    """
    row = profile_of(profile, rung)
    if (part == "convert") != (row.last_filter == "no_exec"):
        raise PlanError("job", f"profile {profile} is not what a {part} runs in")
    require_inputs(read_only)
    namespaces = list(NAMESPACES[rung])
    identity, mapping = identity_of(facts, uid)
    if rung != "A" and mapping is not None and facts.uid == 0:
        raise PlanError("identity", f"on rung {rung} the worker would stay uid 0")
    if rung != "A":
        mapping = None
    elif mapping is not None:
        namespaces.append("user")
    readable = [
        *runtime_folders(),
        *(path for path in _SYSTEM_LINKS if Path(path).is_dir() and not Path(path).is_symlink()),
        *(path for path in (*_SYSTEM_FILES, *row.kernel) if Path(path).exists()),
    ]
    binds: list[Bind] = [{"path": path, "mode": "read", "owner": None} for path in readable]
    covered = prune(readable)
    binds += [
        {"path": path, "mode": "read", "owner": _owner(path, identity)}
        for path in prune(read_only)
        if not any(path == kept or path.startswith(kept + "/") for kept in covered)
    ]
    binds += [{"path": path, "mode": "write", "owner": None} for path in writable]
    binds += [{"path": path, "mode": "device", "owner": None} for path in NODES]
    nodes: list[Bind] = []
    if row.gpu:
        nodes = _gpu_binds(devices, rung)
        binds += nodes
    packages = package_folders()
    program = interpreter()
    entry = f"{packages['airgap']}/enclave/entry.py"
    where = _where(packages)
    megabytes = memory_mb * _MIB
    inputs = folder_bytes(read_only)
    limits = {
        "CORE": 0,
        "NOFILE": descriptors,
        "FSIZE": file_mb * _MIB,
        "DATA": megabytes,
        "AS": megabytes + 2 * inputs + _ROOM_MIB * _MIB * (16 + (os.cpu_count() or 1)),
    }
    if row.gpu:
        del limits["AS"]  # the driver reserves addresses for the memory of every device
        limits["FSIZE"] = max(limits["FSIZE"], megabytes)  # its memfds are files
    return {
        "rung": rung,
        "profile": profile,
        "broker": os.getpid(),
        "namespaces": namespaces,
        "mapping": mapping,
        "identity": identity,
        "binds": sorted(binds, key=lambda bind: len(bind["path"])),
        "links": [[p, str(Path(p).readlink())] for p in _SYSTEM_LINKS if Path(p).is_symlink()],
        "root_kib": ROOT_KIB,
        "check": [program, entry, *site_folders(), *prune(read_only), *_paths(nodes, "gpu")],
        "landlock": _landlock(facts, rung, binds, program),
        "limits": limits,
        "argv": [program, "-I", "-S", "-B", entry, part, where],
        "env": environment | dict(row.environment),
        "stage1": filters.stage1(facts.arch).hex(),
        "last": row.last_filter,
    }


def profile_of(name: str, rung: str) -> Profile:
    """Return the row of a profile; refuse a name or a rung that the table does not have."""
    row = PROFILES.get(name)
    if row is None:
        raise PlanError("job", f"there is no profile {name!r:.40}; see `airgap enclave profiles`")
    if rung not in row.rungs:
        raise PlanError("rung", f"profile {name} runs on {', '.join(row.rungs)}, not on {rung}")
    return row


def runs_on(name: str, rung: str) -> bool:
    """Say whether a profile may run on a rung; a name that is not known is refused later."""
    return name not in PROFILES or rung in PROFILES[name].rungs


def _gpu_binds(devices: str, rung: str) -> list[Bind]:
    """Return the nodes of a GPU and the /proc that its driver writes to."""
    try:
        nodes = gpu.find_nodes(devices)
    except gpu.GpuError as error:
        raise PlanError("gpu", str(error)) from error
    binds: list[Bind] = [{"path": node, "mode": "gpu", "owner": None} for node in nodes]
    # The driver names its threads. On A in a /proc of its own; else in its own entry alone.
    own = "/proc" if rung == "A" else "/proc/self/task"
    return [*binds, {"path": own, "mode": "proc", "owner": None}]


def _paths(binds: Iterable[Bind], mode: Mode) -> list[str]:
    return [bind["path"] for bind in binds if bind["mode"] == mode]


def launcher_argv(incoming: int, outgoing: int) -> list[str]:
    """Return the command line of the launcher itself."""
    folder = package_folders()["airgap"]
    ends = [str(incoming), str(outgoing), str(os.getpid())]
    return [
        interpreter(),
        "-I",
        "-S",
        "-B",
        f"{folder}/enclave/entry.py",
        "launcher",
        folder,
        *ends,
    ]


def _where(packages: dict[str, str]) -> str:
    import json  # noqa: PLC0415 - used here alone

    return json.dumps({"packages": packages, "site": site_folders()})


def _owner(path: str, identity: list[int] | None) -> list[int] | None:
    """Return the owner of an input for an id map, when the worker is another user."""
    if identity is None:
        return None
    status = Path(path).stat()
    return [status.st_uid, status.st_gid]


def _landlock(
    facts: HostSurvey, rung: str, binds: Sequence[Bind], program: str
) -> LandlockPlan | None:
    """Return the file rules; rung A does without where the kernel has none, rung C always."""
    if facts.landlock_abi < 1 or rung == "C":
        return None
    rules = [[bind["path"], bind["mode"]] for bind in binds]
    rules += [[path, "exec"] for path in (program, loader(program)) if path]
    return {"abi": facts.landlock_abi, "rules": rules}
