"""What the host says about a sealed process, compared with what the plan promised.

Obeys docs/design/enclave.md, 7.

The facts are those of `reading`. `verify` is pure: the same facts give the same findings. What
could not be read is no finding, and null in the document of the seal.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airgap.enclave import filters, linux
from airgap.enclave import landlock as rules
from airgap.enclave.host import HostSurvey
from airgap.enclave.plan import Plan
from airgap.enclave.reading import NAMESPACES, Facts, Mount, read_again

DESCRIPTORS = {0: "/dev/null", 1: "/dev/null", 2: "pipe", 3: "pipe", 4: "pipe"}
NOT_COVERED = (
    "timing",
    "cpu load",
    "what /proc shows of a process to other accounts",
    "content of replies",
    "host root",
    "kernel 0-day",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference between plan and host; `layer` names the layer that is missing."""

    layer: str
    message: str


def verify(
    facts: Facts,
    plan: Plan,
    *,
    inherited: int,
    own_filters: int,
    dumpable: bool | None,
    host: dict[str, str],
    uid: int,
) -> list[Finding]:
    """Compare a reading with the plan; an empty list means that every layer is there.

    Args:
        facts: The reading.
        plan: What the launcher was told.
        inherited: Filters that the broker runs under itself.
        own_filters: Filters that the seal has installed by now, beside those.
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
    expect(layer, "the number of filters", facts.filters, inherited + own_filters)
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

    For the moment before each request; OSError when the process is gone.
    """
    return differences(before, read_again(before, proc))


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
