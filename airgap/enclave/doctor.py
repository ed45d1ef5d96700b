"""Which rung this host reaches, why, and what would raise it (docs/design/enclave.md, 2, 5, 9)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from airgap.enclave import host, twin
from airgap.enclave.host import HostSurvey
from airgap.enclave.refused import SealRefused
from airgap.enclave.twin import Row, Verdict

PROBED = ("A", "U", "B")  # C has one layer and is probed only where a site has chosen it
LAYERS = {
    "A": "own network, processes and root; files by Landlock; calls by two filters",
    "U": "own network and processes; files by Landlock; calls by two filters",
    "B": "files by Landlock; network and calls by two filters alone",
    "C": "calls by two filters alone, from the end of loading on",
}


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung on this host; `code` is empty when sealed, `seconds` is the time of its probe."""

    name: str
    sealed: bool
    code: str
    reason: str
    seconds: float
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Examination:
    """What `airgap doctor` prints."""

    facts: HostSurvey
    min_rung: str
    rungs: tuple[Rung, ...]
    advice: tuple[str, ...]

    @property
    def reached(self) -> Rung | None:
        """The best sealed rung that is allowed; None when the seal would be refused."""
        allowed = host.allowed_rungs(self.min_rung)
        return next((rung for rung in self.rungs if rung.sealed and rung.name in allowed), None)

    def as_document(self) -> dict[str, Any]:
        """Return everything, JSON-ready."""
        reached = self.reached
        return {
            "verdict": f"SEALED/{reached.name}" if reached else "REFUSED",
            "min_rung": self.min_rung,
            "rungs": [asdict(rung) for rung in self.rungs],
            "advice": list(self.advice),
            "host": self.facts.as_document(),
        }


def examine(min_rung: str | None = None, state: Path | None = None) -> Examination:
    """Survey the host and probe each rung afresh; `state` keeps good results for later launches."""
    facts = host.survey()
    least = min_rung or host.default_min_rung(facts)
    obstacles = host.rung_obstacles(facts)
    names = PROBED if least != "C" else (*PROBED, "C")
    rungs = tuple(_examine(name, facts, obstacles, state) for name in names)
    return Examination(facts, least, rungs, tuple(advise(facts, rungs)))


def _examine(name: str, facts: HostSurvey, obstacles: dict[str, str], state: Path | None) -> Rung:
    if name in obstacles:
        return Rung(name, False, "enclave.rung", obstacles[name], 0.0, None)
    started = time.monotonic()
    report = twin.probe_rung(name, None, facts, state, fresh=True)
    seconds = round(time.monotonic() - started, 2)
    verdict = twin.judge(report)
    try:
        twin.require_sealed(report)
    except SealRefused as refused:
        return Rung(name, False, refused.code, refused.message, seconds, verdict)
    return Rung(name, True, "", "", seconds, verdict)


# -- what would raise it --------------------------------------------------------------------------


def advise(facts: HostSurvey, rungs: Sequence[Rung]) -> list[str]:
    """Return steps that work offline, most useful first; empty on rung A."""
    if any(rung.name == "A" and rung.sealed for rung in rungs):
        return []
    out = []
    if facts.arch != "x86_64":
        out.append("use an x86-64 machine: no filter has been proven on another architecture")
    if not facts.sys_admin and facts.max_user_namespaces == 0:
        out.append(
            "sysctl -w user.max_user_namespaces=15000 (RHEL STIG RHEL-09-213105 allows it when "
            "documented with the ISSM), or start from root: it needs no user namespace"
        )
    if not facts.sys_admin and facts.apparmor_userns == 1:
        out.append(
            "give this interpreter an AppArmor profile with `userns,` (Ubuntu 24.04): "
            "/etc/apparmor.d/airgap, then apparmor_parser -r /etc/apparmor.d/airgap; "
            "leave kernel.apparmor_restrict_unprivileged_userns as it is"
        )
    if facts.landlock_abi < 1:
        out.append(
            "boot with Landlock: kernel 5.13 or later and lsm=landlock,… on its command line "
            "(grubby --update-kernel=ALL --args=… or GRUB_CMDLINE_LINUX and update-grub)"
        )
    if facts.autofs:
        out.append(f"stop the automounter at {facts.autofs[0]} (systemctl stop autofs)")
    unreadable = next((rung for rung in rungs if rung.code == "enclave.files"), None)
    if unreadable is not None:
        out.append(f"install where other users may read: {unreadable.reason}")
    if not out:
        reasons = "; ".join(f"{rung.name}: {rung.reason}" for rung in rungs)
        out.append(f"no known remedy; the layers answered: {reasons}"[:600])
    return out


# -- the table, short enough for one screen -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """Channels that behaved alike."""

    channels: tuple[str, ...]
    control: str
    sealed: str
    closed_by: str


def condense(rows: Sequence[Row]) -> tuple[list[Line], tuple[str, ...]]:
    """Group channels with the same answers; the second value is what this host could not test."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    untested: dict[str, list[str]] = {}
    for row in rows:
        if row.control not in {"LEAK", "open"}:
            untested.setdefault(row.control, []).append(row.channel)
            continue
        seen = dict.fromkeys((row.stage1, row.convert, row.stage2))
        sealed = " ".join(answer for answer in seen if answer != "-")
        groups.setdefault((row.control, sealed, row.closed_by), []).append(row.channel)
    lines = [Line(tuple(names), *key) for key, names in groups.items()]
    return lines, tuple(f"{answer}: {' '.join(names)}" for answer, names in untested.items())
