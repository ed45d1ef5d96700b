"""Asks for a probe of a rung, keeps its result, and judges it (docs/design/enclave.md, 7).

The result is kept for (boot, kernel, rung, who starts it, filters, the very code of this room), as
nothing else can change it. `judge` is pure: what receivers got decides, and whatever proves nothing
counts as open.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from airgap.enclave import filters, host, probe
from airgap.enclave import plan as plans
from airgap.enclave.gpu import Driver
from airgap.enclave.host import HostSurvey
from airgap.enclave.process import last_words, require_descriptors
from airgap.enclave.refused import SealRefused
from policy.errors import CODES

_LIMIT_S = 60.0
_SIZE_LIMIT = 1 << 20
# Each of these has a receiver, so a control that calls it open must have been heard.
HEARD = frozenset(
    {
        "tcp4",
        "tcp6",
        "mptcp",
        "tcp_fastopen_sendto",
        "udp4_sendto",
        "udp6_sendto",
        "udp4_sendmsg",
        "udplite",
        "dns_udp",
        "dns_getaddrinfo",
        "unix_path_stream",
        "unix_path_dgram_sendto",
        "unix_path_dgram_sendmsg",
        "unix_abstract_stream",
        "socketpair_dgram_readdress",
        "io_uring_tcp",
        "io_uring_unix_path",
        "inherited_tcp_fd",
        "scm_rights_recv",
        "proc_fd_outside",
        "pidfd_getfd_outside",
        "write_shared_dir",
    }
)

_SCOPE_ABI = 6

_kept: dict[str, dict[str, Any]] = {}
_made: dict[str, float] = {}  # when this process made a report


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the probe table."""

    channel: str
    control: str
    stage1: str
    stage2: str
    convert: str
    closed_by: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a report means. `reason` is empty when the twin is sealed."""

    reason: str
    rows: tuple[Row, ...]
    not_tested: tuple[str, ...]
    control_open: int
    control_heard: int
    sealed_open: int
    sealed_heard: int

    @property
    def sealed(self) -> bool:
        """True when the control leaked and the twin did not."""
        return not self.reason


def probe_rung(
    rung: str,
    uid: int | None,
    facts: HostSurvey,
    state: Path | None,
    *,
    fresh: bool = False,
    older_than_s: float | None = None,
    profile: str = "worker",
    driver: Driver | None = None,
) -> dict[str, Any]:
    """Return the report of a probe of `rung`, kept or made now (about a second).

    Args:
        rung: A, U, B or C.
        uid: The worker's uid for a start by root; None picks a free one.
        facts: The survey of this host.
        state: Folder that keeps reports between processes; None keeps them in this process.
        fresh: Make a new one in any case.
        older_than_s: Make a new one unless this process has made one so lately.
        profile: What the twin is; `screen` has the layers of `worker`.
        driver: Where the driver of a GPU lies.

    """
    gpu = profile == "worker-gpu"
    wanted: dict[str, Any] = {"rung": rung, "profile": "worker-gpu" if gpu else "worker"}
    if gpu:
        wanted["driver"] = asdict(driver or Driver())
    key = cache_key(wanted, facts)
    if older_than_s is not None:
        fresh = time.monotonic() - _made.get(key, float("-inf")) > older_than_s
    if not fresh:
        found = _kept.get(key) or _load(state, key)
        if found is not None:
            _kept[key] = found
            return found
    if facts.uid == 0 and uid is None and host.mapped(facts, plans.INSIDE_ID):
        uid = host.free_uid()
    report = _run({**wanted, "uid": uid})
    if judge(report).sealed:  # a refusal is not kept: the administrator may have mended the host
        _kept[key] = report
        _made[key] = time.monotonic()
        _store(state, key, report)
    return report


def require_sealed(report: dict[str, Any]) -> None:
    """Raise SealRefused unless the report proves the seal."""
    refused = report.get("refused")
    if refused:
        layer = str(refused.get("layer"))
        known = layer if f"enclave.{layer}" in CODES else "probe"
        raise SealRefused(known, str(refused.get("message", ""))[:2000])
    verdict = judge(report)
    if not verdict.sealed:
        raise SealRefused("probe", verdict.reason)


def cache_key(wanted: dict[str, Any], facts: HostSurvey) -> str:
    """Return what a report is kept under."""
    what = {
        "boot": facts.boot_id,
        "kernel": facts.kernel,
        "twin": wanted,
        "uid": facts.uid,
        "uid_map": facts.uid_map,
        "landlock": facts.landlock_abi,
        "probe": probe.VERSION,
        "filters": {name: filters.digest(p) for name, p in filters.programs().items()},
        "code": own_code(),
        "python": plans.interpreter(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def own_code() -> str:
    """Return a digest of the sources of this room."""
    content = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


def _run(wanted: dict[str, Any]) -> dict[str, Any]:
    """Run the fixture as a process of its own."""
    require_descriptors()
    where = json.dumps({"packages": plans.package_folders(), "site": plans.site_folders()})
    entry = f"{plans.package_folders()['airgap']}/enclave/entry.py"
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    environment["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        done = subprocess.run(
            [plans.interpreter(), "-I", "-S", "-B", entry, "fixture", where],
            input=json.dumps(wanted).encode(),
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
            cwd="/",
            env=environment,
        )
        report = json.loads(done.stdout[:_SIZE_LIMIT])
    except subprocess.TimeoutExpired:
        return {"refused": {"layer": "probe", "message": f"the probe took over {_LIMIT_S:g} s"}}
    except ValueError:
        words = last_words(done.stderr[-4000:].decode(errors="replace"))
        return {"refused": {"layer": "probe", "message": f"the probe did not report{words}"}}
    return dict(report)


# -- judgement ------------------------------------------------------------------------------------


def judge(report: dict[str, Any]) -> Verdict:
    """Put together what was tried and what was heard; the first reason against the seal wins."""
    control = report.get("control") or {}
    stage1, stage2 = report.get("stage1") or {}, report.get("stage2") or {}
    convert = report.get("convert") or {}
    heard = {phase: set(names) for phase, names in (report.get("received") or {}).items()}
    rows = tuple(
        Row(
            name,
            _cell(control.get(name), name in heard.get("control", ())),
            _cell(stage1.get(name), name in heard.get("stage1", ())),
            _cell(stage2.get(name), name in heard.get("stage2", ())),
            _cell(convert.get(name), name in heard.get("convert", ())),
            probe.CLOSED_BY[name],
        )
        for name in probe.CHANNELS
    )
    phases = _phases(report)
    still_open = {
        name
        for phase in phases
        for name, answer in (report.get(phase) or {}).items()
        if _open(answer)
    }
    leaked = {name for phase in phases for name in heard.get(phase, ())}
    return Verdict(
        reason=_reason(report, heard),
        rows=rows,
        not_tested=tuple(
            f"{name}: {_cell(control.get(name), heard=False)}"
            for name in probe.CHANNELS
            if not _open(control.get(name))
        ),
        control_open=sum(_open(control.get(name)) for name in probe.CHANNELS),
        control_heard=len(heard.get("control", ())),
        sealed_open=len(still_open),
        sealed_heard=len(leaked),
    )


def _reason(report: dict[str, Any], heard: dict[str, set[str]]) -> str:
    """Return why the report does not prove the seal; empty when it does."""
    if report.get("refused"):
        return f"the twin did not start: {report['refused'].get('message', '')}"
    control = report.get("control") or {}
    deaf = [name for name in probe.CORE if not _open(control.get(name))]
    deaf += [n for n in HEARD if _open(control.get(n)) and n not in heard.get("control", ())]
    if deaf:
        return f"inconclusive: the control did not leak over {', '.join(sorted(set(deaf)))}"
    phases = {phase: report.get(phase) or {} for phase in _phases(report)}
    for phase, answers in phases.items():
        missing = [name for name in probe.CHANNELS if name not in answers]
        if missing:
            return f"inconclusive: {phase} did not try {', '.join(missing[:8])}"
    leaks = [f"{name} ({phase})" for phase in phases for name in sorted(heard.get(phase, ()))]
    leaks += [
        f"{name} ({phase}, open)"
        for phase, answers in phases.items()
        for name, answer in answers.items()
        if _open(answer) and name not in _tolerated(phase, report)
    ]
    if leaks:
        return f"the sealed twin got out over {', '.join(leaks)}"
    if _open(control.get("foreign_abi")) and report.get("foreign_abi") != signal.SIGSYS:
        return "a call by the i386 gate did not kill the sealed twin"
    return ""


def _phases(report: dict[str, Any]) -> tuple[str, ...]:
    """Return what must be sealed: rung C makes no claim for the time before stage 2."""
    return ("stage2",) if report.get("rung") == "C" else ("stage1", "stage2", "convert")


def _tolerated(phase: str, report: dict[str, Any]) -> frozenset[str]:
    """Return what may be open before stage 2, on hosts where Landlock is absent or old.

    A program that is started there inherits the seal; a signal is a bit to a process of the user.
    """
    out: frozenset[str] = frozenset()
    if phase == "stage1" and not report.get("landlock"):
        out = probe.OPEN_BEFORE_STAGE2
    if phase == "stage1" and report.get("profile") == "worker-gpu":
        out |= {"memfd_exec"}  # its memfds hold bytes; Landlock sees no file in one
    if phase != "stage2" and report.get("rung") == "B" and report.get("landlock", 0) < _SCOPE_ABI:
        out |= {"signal_outside"}
    return out


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a report that goes into the evidence."""
    verdict = judge(report)
    return {
        "version": report.get("version"),
        "ts": report.get("ts"),
        "own_network": report.get("own_network"),
        "control": {row.channel: row.control for row in verdict.rows},
        "sealed": {row.channel: [row.stage1, row.stage2, row.convert] for row in verdict.rows},
        "receiver_tokens_seen": verdict.sealed_heard,
        "foreign_abi_signal": report.get("foreign_abi"),
        "not_tested": list(verdict.not_tested),
    }


def _open(answer: list[str] | None) -> bool:
    return bool(answer) and answer is not None and answer[0] == probe.OPEN


def _cell(answer: list[str] | None, heard: bool) -> str:
    if heard:
        return "LEAK"
    if not answer:
        return "-"
    return "open" if answer[0] == probe.OPEN else str(answer[1])[:20]


# -- keeping --------------------------------------------------------------------------------------


def _load(state: Path | None, key: str) -> dict[str, Any] | None:
    """Read a kept report; one that is malformed or does not prove the seal is made again."""
    if state is None:
        return None
    path = state / f"probe-{key[:32]}.json"
    try:
        if path.stat().st_size > _SIZE_LIMIT or path.stat().st_uid != os.geteuid():
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("key") != key or not judge(found).sealed:
        return None
    return found


def _store(state: Path | None, key: str, report: dict[str, Any]) -> None:
    """Write beside and rename; a folder that cannot be written costs the next start a second."""
    report["key"] = key
    if state is None:
        return
    with contextlib.suppress(OSError):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=state)
        with os.fdopen(descriptor, "w") as file:
            json.dump(report, file)
        Path(beside).rename(state / f"probe-{key[:32]}.json")
