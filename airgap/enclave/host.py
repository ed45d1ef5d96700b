"""What this host offers: facts that steer the attempt and never the verdict.

Obeys docs/design/enclave.md, 2. Only reads. A fact that cannot be read is None, never a guess.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import mmap
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from airgap.enclave import landlock, tables

_PROC = Path("/proc")
_CAP_KILL, _CAP_SYS_ADMIN = 5, 21
_WORKER_UIDS = range(
    61184, 65520
)  # systemd's range for dynamic users: no distribution assigns them
_NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "9p", "afs", "fuse.sshfs"}
)
_NODES = ("/dev/vsock", "/dev/net/tun", "/dev/infiniband", "/dev/nvidiactl", "/dev/kvm")
# The telemetry client inside some onnxruntime wheels; in two parts, for our own wheel is searched.
COLLECTOR = b"One" + b"Collector"


@dataclass(frozen=True, slots=True)
class HostSurvey:
    """Facts about this machine and this process; see the fields of the evidence record."""

    kernel: str
    distro: str
    arch: str
    boot_id: str
    lsm: str | None
    uid: int
    overflow_uid: int
    sys_admin: bool
    may_kill: bool  # a process of another uid; the death signal asks for it as well
    uid_map: tuple[tuple[int, int, int], ...]
    max_user_namespaces: int | None
    apparmor_userns: int | None
    landlock_abi: int
    io_uring_disabled: int | None
    yama: int | None
    seccomp_actions: str | None
    seccomp_actions_logged: str | None
    core_pattern_piped: bool | None
    autofs: tuple[str, ...]  # indirect maps: a lookup below them hands a name to a daemon
    network_mounts: tuple[str, ...]
    nodes: tuple[str, ...]
    threads: int
    onnxruntime: str | None
    telemetry: tuple[str, ...]
    own_filters: int = 0  # filters that this process runs under already: of a container, a service

    def as_document(self) -> dict[str, Any]:
        """Return the facts as JSON-ready values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def survey(proc: Path = _PROC) -> HostSurvey:
    """Read this host; `proc` is a parameter for tests."""
    status = parse_status(_text(proc / "self/status") or "")
    effective = int(status.get("CapEff", "0"), 16)
    mounts = parse_mounts(_text(proc / "self/mountinfo") or "")
    pattern = _text(proc / "sys/kernel/core_pattern")
    return HostSurvey(
        kernel=os.uname().release,
        distro=_distro(),
        arch=os.uname().machine,
        boot_id=_text(proc / "sys/kernel/random/boot_id") or "",
        lsm=_text(Path("/sys/kernel/security/lsm")),
        uid=os.geteuid(),
        overflow_uid=int(_text(proc / "sys/kernel/overflowuid") or 65534),
        sys_admin=bool(effective & (1 << _CAP_SYS_ADMIN)),
        may_kill=bool(effective & (1 << _CAP_KILL)),
        uid_map=parse_id_map(_text(proc / "self/uid_map") or ""),
        max_user_namespaces=_number(proc / "sys/user/max_user_namespaces"),
        apparmor_userns=_number(proc / "sys/kernel/apparmor_restrict_unprivileged_userns"),
        landlock_abi=landlock.reported_abi(),
        io_uring_disabled=_number(proc / "sys/kernel/io_uring_disabled"),
        yama=_number(proc / "sys/kernel/yama/ptrace_scope"),
        seccomp_actions=_text(proc / "sys/kernel/seccomp/actions_avail"),
        seccomp_actions_logged=_text(proc / "sys/kernel/seccomp/actions_logged"),
        core_pattern_piped=None if pattern is None else pattern.startswith("|"),
        autofs=tuple(m.point for m in mounts if m.kind == "autofs" and "direct" not in m.options),
        network_mounts=tuple(m.point for m in mounts if m.kind in _NETWORK_FILESYSTEMS),
        nodes=tuple(node for node in _NODES if Path(node).exists()),
        threads=int(status.get("Threads", "1")),
        onnxruntime=onnxruntime_version(),
        telemetry=telemetry_hits(),
        own_filters=int(status.get("Seccomp_filters", "0")),
    )


# -- which rungs can be tried ---------------------------------------------------------------------

RUNGS = ("A", "U", "B", "C")  # from the best down


def default_min_rung(facts: HostSurvey) -> str:
    """Return the least rung without a site decision: root can always build A."""
    return "A" if facts.uid == 0 else "B"


def rung_obstacles(facts: HostSurvey) -> dict[str, str]:
    """Return, for each rung that this host cannot reach by these facts, the reason."""
    out: dict[str, str] = {}
    if facts.arch not in tables.ENABLED:
        return dict.fromkeys(RUNGS, f"no filter is enabled for the architecture {facts.arch}")
    if facts.seccomp_actions is not None and "errno" not in facts.seccomp_actions.split():
        return dict.fromkeys(RUNGS, "the kernel offers no seccomp filters")
    if facts.uid == 0 and not facts.may_kill:
        reason = "root lacks CAP_KILL here: it could not end a worker, nor would its own end do so"
        return dict.fromkeys(RUNGS, reason)
    if facts.uid == facts.overflow_uid:
        # Inside a user namespace the files of root bear this number too: a worker that others may
        # read could not be told from one that they may not.
        reason = f"uid {facts.uid} is the kernel's number for unknown owners; use another account"
        return dict.fromkeys(RUNGS, reason)
    if facts.max_user_namespaces == 0:
        out["U"] = "user.max_user_namespaces is 0"
        if not facts.sys_admin:
            out["A"] = "user.max_user_namespaces is 0, so only root can make namespaces"
    # Without a root of its own, files are closed by Landlock, which lets a path be looked up.
    if facts.landlock_abi < 1:
        out["U"] = out["B"] = "the kernel reports no Landlock"
    elif facts.autofs:
        reason = f"autofs at {facts.autofs[0]}: a path lookup would reach the automount daemon"
        out["U"] = out["B"] = reason
    return out


def allowed_rungs(min_rung: str) -> tuple[str, ...]:
    """Return the rungs from the best down to `min_rung`."""
    return RUNGS[: RUNGS.index(min_rung) + 1]


def candidate_rungs(facts: HostSurvey, min_rung: str) -> tuple[list[str], dict[str, str]]:
    """Return the rungs to try, best first, and why the others are left out."""
    obstacles = rung_obstacles(facts)
    allowed = allowed_rungs(min_rung)
    left_out = dict(obstacles)
    for rung in RUNGS:
        if rung not in allowed:
            left_out.setdefault(rung, f"the least rung allowed here is {min_rung}")
    return [rung for rung in allowed if rung not in obstacles], left_out


# -- whose id the worker gets ---------------------------------------------------------------------


def mapped(facts: HostSurvey, uid: int) -> bool:
    """Say whether this user namespace knows `uid`."""
    return any(first <= uid < first + count for first, _, count in facts.uid_map)


def free_uid(taken: frozenset[int] | None = None) -> int:
    """Return a uid that no account and no process has, for a worker that root starts."""
    import pwd  # noqa: PLC0415 - needed by root alone

    used = _uids_of_processes() if taken is None else taken
    start = os.getpid() % len(_WORKER_UIDS)
    for step in range(len(_WORKER_UIDS)):
        uid = _WORKER_UIDS[(start + step) % len(_WORKER_UIDS)]
        if uid in used:
            continue
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise OSError(11, "no free uid between 61184 and 65519")


def _uids_of_processes() -> frozenset[int]:
    out = set()
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                out.add(entry.stat().st_uid)
            except OSError:
                continue
    return frozenset(out)


# -- onnxruntime's telemetry ----------------------------------------------------------------------


def onnxruntime_version() -> str | None:
    """Return the installed version without importing the library."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def telemetry_hits() -> tuple[str, ...]:
    """Return the names of onnxruntime's shared objects that carry the telemetry client."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or not found.submodule_search_locations:
        return ()
    return scan_for_collector(Path(next(iter(found.submodule_search_locations))))


def scan_for_collector(folder: Path) -> tuple[str, ...]:
    """Look for the client's name in every shared object below `folder`."""
    hits = []
    for path in sorted(folder.rglob("*.so*")):
        status = path.stat()
        if _holds_collector(str(path), status.st_mtime_ns, status.st_size):
            hits.append(path.name)
    return tuple(hits)


@functools.lru_cache(maxsize=64)
def _holds_collector(path: str, changed: int, size: int) -> bool:
    """Search one file; the time of change and the size are part of the key of the cache."""
    del changed
    if size == 0:
        return False
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        return content.find(COLLECTOR) >= 0


# -- parsers of /proc -----------------------------------------------------------------------------


def parse_status(text: str) -> dict[str, str]:
    """Read /proc/PID/status into names and values."""
    out = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            out[name] = value.strip()
    return out


def parse_id_map(text: str) -> tuple[tuple[int, int, int], ...]:
    """Read /proc/PID/uid_map: (first inside, first outside, count)."""
    rows = [tuple(int(word) for word in line.split()) for line in text.splitlines()]
    return tuple((row[0], row[1], row[2]) for row in rows if len(row) == 3)  # noqa: PLR2004 - columns


@dataclass(frozen=True, slots=True)
class MountLine:
    """What the survey wants from a line of mountinfo(5)."""

    point: str
    kind: str
    options: tuple[str, ...]


def parse_mounts(text: str) -> list[MountLine]:
    """Read mountinfo(5): mount point, file system type, options of the file system."""
    out = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) > 4 and len(tail) > 2:  # noqa: PLR2004 - columns
            out.append(MountLine(fields[4], tail[0], tuple(tail[2].split(","))))
    return out


def _distro() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return "unknown"
    return release.get("PRETTY_NAME", release.get("ID", "unknown"))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    found = _text(path)
    try:
        return None if found is None else int(found)
    except ValueError:
        return None
