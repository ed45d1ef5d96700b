"""One reading of a process, as the host shows it in /proc (docs/design/enclave.md, 7).

The broker reads it of the host's pid; nothing is reported by the process itself. What cannot be
read is None, never true.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from airgap.enclave.host import parse_id_map, parse_status
from airgap.enclave.root import unescape

NAMESPACES = ("net", "pid", "mnt", "ipc", "uts", "cgroup", "user")
_CAPABILITY_SETS = {
    "eff": "CapEff",
    "prm": "CapPrm",
    "inh": "CapInh",
    "bnd": "CapBnd",
    "amb": "CapAmb",
}
_DEAD = frozenset("ZX")
_LOOKS = 5


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the worker's mountinfo."""

    point: str
    writable: bool
    kind: str


@dataclass(frozen=True, slots=True)
class Facts:
    """One reading of /proc/PID. None means that the broker may not read it."""

    pid: int
    start_time: int
    session: int
    uids: tuple[int, ...]
    uid_map: tuple[tuple[int, int, int], ...] | None
    capabilities: dict[str, str]
    no_new_privs: int
    seccomp: int
    filters: int | None
    threads: int
    stray_threads: int | None  # whose identity or filters are not those of the process
    pid_inside: int
    dumpable: bool
    namespaces: dict[str, str] | None
    descriptors: dict[int, str] | None
    mounts: tuple[Mount, ...] | None
    executable: str | None
    environment: dict[str, str] | None
    limits: dict[str, int] | None
    links: tuple[str, ...] | None
    addresses: tuple[str, ...] | None
    routes: int | None
    sockets: int | None


def read(pid: int, proc: Path = Path("/proc")) -> Facts:
    """Read the facts of a live process; OSError when it is gone."""
    folder = proc / str(pid)
    status = parse_status((folder / "status").read_text())
    state, session, start = _stat((folder / "stat").read_text())
    if state in _DEAD:
        raise ProcessLookupError(errno.ESRCH, "the process has ended", str(folder))
    return Facts(
        pid=pid,
        start_time=start,
        session=session,
        **_identity(status),
        uid_map=_uid_map(folder),
        threads=int(status["Threads"]),
        stray_threads=_stray_threads(folder, status),
        # The files of a process that is not dumpable belong to root.
        dumpable=(folder / "status").stat().st_uid == int(status["Uid"].split()[1]),
        namespaces=_namespaces(folder),
        descriptors=_descriptors(folder),
        mounts=_mounts(folder),
        executable=_executable(folder),
        environment=_environment(folder),
        limits=_limits(folder),
        links=_links(folder),
        addresses=_addresses(folder),
        routes=_lines(folder / "net/route", skip=1),
        sockets=_sockets(folder),
    )


def read_again(before: Facts, proc: Path = Path("/proc")) -> Facts:
    """Read anew what two small files tell: who the process is, and that its filters are in force.

    A fifth of the cost of a whole reading; OSError when the process is gone.
    """
    folder = proc / str(before.pid)
    status = parse_status((folder / "status").read_text())
    state, _, start = _stat((folder / "stat").read_text())
    if state in _DEAD:
        raise ProcessLookupError(errno.ESRCH, "the process has ended", str(folder))
    return replace(before, start_time=start, **_identity(status))


def _identity(status: dict[str, str]) -> dict[str, Any]:
    """Return the facts of /proc/PID/status that never change in a sealed process."""
    return {
        "uids": tuple(int(word) for word in status["Uid"].split()),
        "capabilities": {
            key: status[name].lstrip("0") or "0" for key, name in _CAPABILITY_SETS.items()
        },
        "no_new_privs": int(status["NoNewPrivs"]),
        "seccomp": int(status["Seccomp"]),
        "filters": int(status["Seccomp_filters"]) if "Seccomp_filters" in status else None,
        "pid_inside": int(status["NSpid"].split()[-1]),
    }


def _stray_threads(folder: Path, status: dict[str, str]) -> int | None:
    """Count the threads that are not sealed as the process is: the kernel keeps all this by thread.

    One that is just ending has lost its filters already; it is gone at the next look.
    """
    whole = _identity(status)
    try:
        names = [entry.name for entry in (folder / "task").iterdir() if entry.name != folder.name]
    except OSError:
        return None
    for _ in range(_LOOKS):
        names = [name for name in names if not _like(folder / "task" / name, whole)]
        if not names:
            break
        time.sleep(0.001)
    return len(names)


def _like(folder: Path, whole: dict[str, Any]) -> bool:
    """Whether a thread has this identity and these filters, or has ended."""
    try:
        found = _identity(parse_status((folder / "status").read_text()))
    except OSError:
        return True
    return {**found, "pid_inside": 0} == {**whole, "pid_inside": 0}


def started_at(pid: int) -> float:
    """Return when a process was started, in seconds of the wall clock; OSError when it is gone."""
    _, _, ticks = _stat(Path(f"/proc/{pid}/stat").read_text())
    now, up = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)
    return now - up + ticks / os.sysconf("SC_CLK_TCK")


def own_namespaces() -> dict[str, str]:
    """Return the broker's own namespaces."""
    return _namespaces(Path("/proc/self")) or {}


def inherited_filters() -> int:
    """Return how many filters the broker itself runs under: a child inherits them."""
    status = parse_status(Path("/proc/self/status").read_text())
    return int(status.get("Seccomp_filters", "0"))


def _stat(text: str) -> tuple[str, int, int]:
    """Return state, session and start time of /proc/PID/stat; field 2 may hold anything."""
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[3]), int(fields[19])


def _uid_map(folder: Path) -> tuple[tuple[int, int, int], ...] | None:
    try:
        return parse_id_map((folder / "uid_map").read_text())
    except OSError:
        return None


def _environment(folder: Path) -> dict[str, str] | None:
    try:
        text = (folder / "environ").read_bytes().decode(errors="surrogateescape")
    except OSError:
        return None
    pairs = (entry.partition("=") for entry in text.split("\0") if entry)
    return {name: value for name, _, value in pairs}


_LIMITS = {
    "Max core file size": "CORE",
    "Max open files": "NOFILE",
    "Max file size": "FSIZE",
    "Max data size": "DATA",
    "Max address space": "AS",
}


def _limits(folder: Path) -> dict[str, int] | None:
    """Return the hard limits that a plan sets; -1 is no limit."""
    try:
        lines = (folder / "limits").read_text().splitlines()
    except OSError:
        return None
    out = {}
    for line in lines:
        name = _LIMITS.get(line[:26].strip())
        if name is not None:
            hard = line[26:].split()[1]
            out[name] = -1 if hard == "unlimited" else int(hard)
    return out


def _namespaces(folder: Path) -> dict[str, str] | None:
    try:
        return {name: str((folder / "ns" / name).readlink()) for name in NAMESPACES}
    except OSError:
        return None


def _descriptors(folder: Path) -> dict[int, str] | None:
    try:
        return {int(e.name): _kind(str(e.readlink())) for e in (folder / "fd").iterdir()}
    except OSError:
        return None


def _kind(target: str) -> str:
    return "pipe" if target.startswith("pipe:[") else target


def _mounts(folder: Path) -> tuple[Mount, ...] | None:
    try:
        text = (folder / "mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return None
    out = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        # Read-only by the mount or by the file system below it.
        sealed = "ro" in fields[5].split(",") or "ro" in tail[2].split(",")
        out.append(Mount(unescape(fields[4]), not sealed, tail[0]))
    return tuple(out)


def _executable(folder: Path) -> str | None:
    try:
        return str((folder / "exe").readlink())
    except OSError:
        return None


def _links(folder: Path) -> tuple[str, ...] | None:
    try:
        lines = (folder / "net/dev").read_text().splitlines()[2:]
    except OSError:
        return None
    return tuple(line.partition(":")[0].strip() for line in lines)


def _addresses(folder: Path) -> tuple[str, ...] | None:
    """Return local addresses: an interface that is up has some even without routes."""
    try:
        trie = (folder / "net/fib_trie").read_text()
        six = folder / "net/if_inet6"
        found = [line.split()[0] for line in six.read_text().splitlines()] if six.exists() else []
    except OSError:
        return None
    found += [line.split()[-1] for line in trie.splitlines() if line.lstrip().startswith("|--")]
    return tuple(dict.fromkeys(found))


def _lines(path: Path, *, skip: int) -> int | None:
    try:
        return max(0, len(path.read_text().splitlines()) - skip)
    except OSError:
        return None


def _sockets(folder: Path) -> int | None:
    """Return how many sockets the network namespace holds, of any family."""
    try:
        words = (folder / "net/sockstat").read_text().split()
    except OSError:
        return None
    return int(words[2]) if words[:2] == ["sockets:", "used"] else None
