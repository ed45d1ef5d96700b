"""What the host says about a sealed process, compared with what the plan promised.

Obeys docs/design/enclave.md, 7.

Facts are read by the broker from /proc of the host pid; nothing is reported by the process itself.
What cannot be read is None, never true. `verify` is pure: the same facts give the same findings.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from airgap.enclave import filters, linux
from airgap.enclave import landlock as rules
from airgap.enclave.host import HostSurvey, parse_id_map, parse_status
from airgap.enclave.plan import Plan
from airgap.enclave.root import unescape

NAMESPACES = ("net", "pid", "mnt", "ipc", "uts", "cgroup", "user")
_CAPABILITY_SETS = {
    "eff": "CapEff",
    "prm": "CapPrm",
    "inh": "CapInh",
    "bnd": "CapBnd",
    "amb": "CapAmb",
}
DESCRIPTORS = {0: "/dev/null", 1: "/dev/null", 2: "pipe", 3: "pipe", 4: "pipe"}
_DEAD = frozenset("ZX")
_LOOKS = 5
NOT_COVERED = (
    "timing",
    "cpu load",
    "what /proc shows of a process to other accounts",
    "content of replies",
    "host root",
    "kernel 0-day",
)


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


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference between plan and host; `layer` names the layer that is missing."""

    layer: str
    message: str


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


def verify(
    facts: Facts,
    plan: Plan,
    *,
    own_filters: int,
    dumpable: bool | None,
    host: dict[str, str],
    uid: int,
) -> list[Finding]:
    """Compare a reading with the plan; an empty list means that every layer is there.

    Args:
        facts: The reading.
        plan: What the launcher was told.
        own_filters: Filters that the seal has installed by now, beside those it inherited.
        dumpable: What it must be; None before the worker has given it up.
        host: Namespaces of the broker.
        uid: The worker's uid as the broker sees it.

    """
    found: list[Finding] = []

    def expect(layer: str, what: str, actual: object, expected: object) -> None:
        if actual is not None and actual != expected:
            found.append(Finding(layer, f"{what} is {actual!r:.300}, expected {expected!r:.300}"))

    expect("identity", "the uid", facts.uids, (uid,) * 4)
    for name in ("eff", "prm", "inh", "amb"):
        expect("identity", f"the capability set {name}", facts.capabilities[name], "0")
    if plan["identity"] is not None:
        expect("identity", "the capability set bnd", facts.capabilities["bnd"], "0")
    expect("nnp", "no_new_privs", facts.no_new_privs, 1)
    expect("stage1", "the seccomp mode", facts.seccomp, 2)
    layer = "stage1" if own_filters == 1 else "stage2"
    expect(layer, "the number of filters", facts.filters, inherited_filters() + own_filters)
    expect(layer, "the number of threads with another seal", facts.stray_threads, 0)
    if dumpable is not None:
        expect("dumpable", "dumpable", facts.dumpable, dumpable)
    expect("environment", "the environment", facts.environment, plan["env"])
    if facts.limits is not None:
        found += [
            Finding("limits", f"RLIMIT_{name} is {facts.limits.get(name)}, expected at most {most}")
            for name, most in plan["limits"].items()
            if not 0 <= facts.limits.get(name, -1) <= most
        ]
    if plan["namespaces"]:
        found += _verify_namespaces(facts, plan, host)
    expect("descriptors", "the set of descriptors", _besides_gpu(facts, plan), DESCRIPTORS)
    if facts.executable is not None:
        expect("exec", "the program", facts.executable, plan["argv"][0])
    return found


def _besides_gpu(facts: Facts, plan: Plan) -> dict[int, str] | None:
    """Return the descriptors but for those that a GPU's driver holds: its nodes, and a memfd."""
    nodes = {bind["path"] for bind in plan["binds"] if bind["mode"] == "gpu"}
    if facts.descriptors is None or not nodes:
        return facts.descriptors
    return {
        number: target
        for number, target in facts.descriptors.items()
        if number in DESCRIPTORS or not (target in nodes or target.startswith("/memfd:"))
    }


def _verify_namespaces(facts: Facts, plan: Plan, host: dict[str, str]) -> list[Finding]:
    layers = {"net": "network", "mnt": "root"}
    found = [
        Finding(layers.get(name, "namespaces"), f"the {name} namespace is the host's own")
        for name in plan["namespaces"]
        if facts.namespaces is not None and facts.namespaces.get(name) == host.get(name)
    ]
    if "user" in plan["namespaces"] and facts.uid_map is not None:
        inside = [first for first, _, _ in facts.uid_map]
        if inside != (plan["mapping"] or [])[:1]:
            found.append(
                Finding("identity", f"the ids inside are {inside}, expected those of the plan")
            )
    if facts.pid_inside != 1:
        found.append(Finding("namespaces", f"the pid inside is {facts.pid_inside}, expected 1"))
    if facts.links is not None and facts.links != ("lo",):
        found.append(Finding("network", f"interfaces {facts.links} exist, expected lo alone"))
    if facts.addresses:
        found.append(Finding("network", f"addresses {facts.addresses[:4]} exist, expected none"))
    if facts.routes:
        found.append(Finding("network", f"{facts.routes} routes exist, expected none"))
    if facts.sockets:
        found.append(Finding("network", f"{facts.sockets} sockets exist, expected none"))
    if "mnt" in plan["namespaces"] and facts.mounts is not None:
        found += _verify_mounts(facts.mounts, plan)
    return found


def _verify_mounts(mounts: Sequence[Mount], plan: Plan) -> list[Finding]:
    """Every mount belongs to a bind of the plan, and only what the plan says is writable."""
    modes = {bind["path"]: bind["mode"] for bind in plan["binds"]}
    found = []
    for mount in mounts:
        owner = max(
            (p for p in modes if mount.point == p or mount.point.startswith(p.rstrip("/") + "/")),
            key=len,
            default=None,
        )
        if mount.point == "/":
            if mount.writable or mount.kind != "tmpfs":
                found.append(Finding("root", f"the root is {mount}, expected a read-only tmpfs"))
        elif owner is None:
            found.append(Finding("root", f"{mount.point!r} is mounted and not in the plan"))
        elif mount.writable and modes[owner] == "read":
            found.append(Finding("root", f"{mount.point!r} is writable, expected read-only"))
    if not any(mount.point == "/" for mount in mounts):
        found.append(Finding("root", "there is no private root"))
    return found


def differences(
    before: Facts, now: Facts, *, leave_out: frozenset[str] = frozenset()
) -> list[Finding]:
    """Return what has changed in a running worker that never may change.

    `leave_out` names facts that are the program's own business before stage 2.
    """
    found = []
    for layer, name in (
        ("identity", "start_time"),
        ("identity", "uids"),
        ("identity", "capabilities"),
        ("nnp", "no_new_privs"),
        ("stage2", "seccomp"),
        ("stage2", "filters"),
        ("stage2", "stray_threads"),
        ("dumpable", "dumpable"),
        ("namespaces", "pid_inside"),
        ("namespaces", "namespaces"),
        ("descriptors", "descriptors"),
        ("network", "links"),
        ("network", "addresses"),
        ("network", "routes"),
    ):
        if name in leave_out:
            continue
        was, is_now = getattr(before, name), getattr(now, name)
        if name == "descriptors" and any(_of_gpu(target) for target in (was or {}).values()):
            was, is_now = _lasting(was), _lasting(is_now)
        if was is not None and is_now is not None and was != is_now:
            found.append(Finding(layer, f"{name} was {was!r:.200} and is {is_now!r:.200}"))
    return found


def _of_gpu(target: str) -> bool:
    return target.startswith(("/dev/nvidia", "/memfd:"))


def _lasting(descriptors: dict[int, str] | None) -> dict[int, str] | None:
    """Return the descriptors but for those that a GPU's driver opens and closes as it works."""
    if descriptors is None:
        return None
    return {number: target for number, target in descriptors.items() if not _of_gpu(target)}


def glance(before: Facts, proc: Path = Path("/proc")) -> list[Finding]:
    """Compare what two small files tell: who the process is, and that its filters are in force.

    A fifth of the cost of a whole reading, for the moment before each request; OSError when the
    process is gone.
    """
    folder = proc / str(before.pid)
    status = parse_status((folder / "status").read_text())
    state, _, start = _stat((folder / "stat").read_text())
    if state in _DEAD:
        raise ProcessLookupError(errno.ESRCH, "the process has ended", str(folder))
    now = replace(before, start_time=start, **_identity(status))
    return differences(before, now)


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


# -- the documents --------------------------------------------------------------------------------


def live_filters(pid: int, expected: Sequence[bytes], facts: HostSurvey) -> bool | None:
    """Dump the filters of the live process and compare; None where the broker may not."""
    if not facts.sys_admin:
        return None
    try:
        dumped = linux.dump_filters(pid)
    except OSError:
        return None
    return dumped[-len(expected) :] == list(expected) if len(dumped) >= len(expected) else False


def seal_document(
    facts: HostSurvey,
    plan: Plan,
    loaded: Facts,
    sealed: Facts,
    *,
    policy: dict[str, Any],
    live: bool | None,
    last_filter: bytes,
    artifacts: dict[str, Any],
    tried: Sequence[dict[str, str]],
    probe: dict[str, Any] | None,
    self_test: dict[str, str],
    host: dict[str, str],
) -> dict[str, Any]:
    """Assemble the record of a seal; hidden facts come from the reading before stage 2."""
    stage1 = filters.stage1(facts.arch)
    last = "no_exec" if plan["profile"] == "convert" else "s2"
    landlock = plan["landlock"]
    spaces = sealed.namespaces or loaded.namespaces or {}
    descriptors = sealed.descriptors or loaded.descriptors
    mounts = sealed.mounts or loaded.mounts
    return {
        "type": "enclave.seal",
        "ts": utc(),
        "mono_ns": time.monotonic_ns(),
        "seq": 1,
        "prev": None,
        "host": facts.as_document(),
        "policy": policy,
        "verdict": "SEALED",
        "rung": plan["rung"],
        "profile": plan["profile"],
        "tried": list(tried),
        "proc": {
            "pid": sealed.pid,
            "starttime": sealed.start_time,
            "exe": loaded.executable,
            "exe_sha256": file_sha256(plan["argv"][0]),
            "uid": sealed.uids[1],
            "caps": sealed.capabilities,
            "nnp": sealed.no_new_privs,
            "seccomp": sealed.seccomp,
            "filters": sealed.filters,
            "threads": sealed.threads,
            "stray_threads": sealed.stray_threads,
            "dumpable": int(sealed.dumpable),
        },
        "ns": {name: [host.get(name), spaces.get(name)] for name in NAMESPACES},
        "net": {
            "links": None
            if sealed.links is None
            else [f"{link}:DOWN" for link in sealed.links]
            if plan["namespaces"]
            else list(sealed.links),
            "addrs": None if sealed.addresses is None else list(sealed.addresses),
            "routes": sealed.routes,
            "sockets": sealed.sockets if plan["namespaces"] else 0,
        },
        "fds": None
        if descriptors is None
        else [f"{n}:{k}" for n, k in sorted(descriptors.items())],
        "mounts": None
        if mounts is None or "mnt" not in plan["namespaces"]
        else [f"{m.point}:{'rw' if m.writable else 'ro'}" for m in mounts],
        "seccomp": {
            "s1": {"sha256": filters.digest(stage1), "insns": filters.count(stage1)},
            last: {"sha256": filters.digest(last_filter), "insns": filters.count(last_filter)},
            "live_dump_match": live,
        },
        "landlock": None if landlock is None else _landlock(landlock["abi"]),
        "limits": plan["limits"],
        "artifacts": artifacts,
        "probe": probe,
        "self_test": self_test,
        "not_covered": list(NOT_COVERED),
    }


def _landlock(abi: int) -> dict[str, Any]:
    """Return what was asked of Landlock; the launcher has tried it out before it went on."""
    files, network, scopes = rules.handled(abi)
    return {
        "abi_reported": abi,
        "fs": hex(files),
        "net": network,
        "scoped": scopes,
        "behaviour_verified": True,
    }


def digest_of(document: dict[str, Any]) -> str:
    """Return the digest by which the next document of the same worker names this one."""
    content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as bare hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utc() -> str:
    """Return the time of now in UTC, RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# -- readers of /proc -----------------------------------------------------------------------------


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


def inherited_filters() -> int:
    """Return how many filters the broker itself runs under: a child inherits them."""
    status = parse_status(Path("/proc/self/status").read_text())
    return int(status.get("Seccomp_filters", "0"))
