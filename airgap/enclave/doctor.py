"""Which rung this host reaches, why, and what would raise it (docs/design/enclave.md, 2, 5, 9)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from airgap.enclave import host, tables, twin
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
class Step:
    """What would raise the rung: words, and commands that work offline, one a line."""

    words: str
    commands: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.words}: {'; '.join(self.commands)}" if self.commands else self.words


@dataclass(frozen=True, slots=True)
class Examination:
    """What `airgap doctor` prints."""

    facts: HostSurvey
    min_rung: str
    rungs: tuple[Rung, ...]
    advice: tuple[Step, ...]

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
            "advice": [str(step) for step in self.advice],
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


def advise(facts: HostSurvey, rungs: Sequence[Rung]) -> list[Step]:
    """Return steps that work offline, most useful first; empty on rung A.

    Commands are those of the host's own family where it is known, else of both.
    """
    if any(rung.name == "A" and rung.sealed for rung in rungs):
        return []
    reasons = {rung.name: (rung.code, rung.reason) for rung in rungs if not rung.sealed}
    found = [
        *_of_this_machine(facts, reasons),
        *_namespaces(facts, reasons),
        *_landlock(facts),
    ]
    if facts.autofs:
        stop = Step(
            f"stop the automounter at {facts.autofs[0]}", ("systemctl disable --now autofs",)
        )
        found.append(stop)
    closed = next((reason for code, reason in reasons.values() if code == "enclave.files"), None)
    if closed is not None:
        found.append(Step(f"install where others may read (/opt/airgap, not a home): {closed}"))
    if not found:
        words = "; ".join(f"{name}: {reason}" for name, (_, reason) in reasons.items())
        found.append(Step(f"no known remedy; the layers answered: {words}"[:600]))
    return found


def _of_this_machine(facts: HostSurvey, reasons: Mapping[str, tuple[str, str]]) -> list[Step]:
    """Return what concerns the machine and the account."""
    found = []
    if facts.arch not in tables.ENABLED:
        words = "use an x86-64 machine: no filter has been proven on another architecture"
        found.append(Step(words))
    if facts.uid == facts.overflow_uid:
        commands = ("useradd --system airgap", "runuser -u airgap -- airgap doctor")
        found.append(Step(f"start from another account than uid {facts.uid}", commands))
    if facts.seccomp_actions is not None and "errno" not in facts.seccomp_actions.split():
        found.append(Step("boot a kernel with CONFIG_SECCOMP_FILTER=y"))
    if any(code == "enclave.limits" for code, _ in reasons.values()):
        found.append(Step("raise the limits of this process", ("ulimit -n 1024",)))
    return found


def _namespaces(facts: HostSurvey, reasons: Mapping[str, tuple[str, str]]) -> list[Step]:
    """Return what lets a user make namespaces, and root make its own."""
    found = []
    code, reason = reasons.get("A", ("", ""))
    if not facts.sys_admin and facts.max_user_namespaces == 0:
        setting = "user.max_user_namespaces=15000"
        found.append(
            Step(
                "allow user namespaces (RHEL STIG RHEL-09-213105 allows it when documented with "
                "the ISSM), now and for good; or start from root, which needs none",
                (f"sysctl -w {setting}", f"echo {setting} > /etc/sysctl.d/61-airgap-userns.conf"),
            )
        )
    if not facts.sys_admin and facts.apparmor_userns == 1:
        found.append(
            Step(
                "give this interpreter an AppArmor profile with `userns,` (Ubuntu 24.04), and "
                "leave kernel.apparmor_restrict_unprivileged_userns as it is",
                (
                    "install -m 0644 packaging/apparmor/airgap /etc/apparmor.d/airgap",
                    "apparmor_parser -r /etc/apparmor.d/airgap",
                ),
            )
        )
    if code in {"enclave.namespaces", "enclave.root", "enclave.identity"}:
        if facts.own_filters:
            words = (
                f"this process runs under {facts.own_filters} system call filter(s) of a container "
                f"or service ({reason}): start outside of it, or allow unshare, mount and "
                "pivot_root in it"
            )
            found.append(Step(words))
        elif "selinux" in (facts.lsm or ""):
            found.append(
                Step(
                    "see whether SELinux denied it, read airgap.te before the second command, and "
                    "leave SELinux enforcing",
                    (
                        "ausearch -m AVC -ts recent | audit2allow -M airgap",
                        "semodule -i airgap.pp",
                    ),
                )
            )
    return found


def _landlock(facts: HostSurvey) -> list[Step]:
    """Return what turns Landlock on: the list of modules that runs now, with it in front."""
    if facts.landlock_abi >= 1:
        return []
    others = [name for name in (facts.lsm or "").split(",") if name not in {"", "landlock"}]
    wanted = ",".join(["landlock", *(others or ["lockdown", "yama", "integrity"])])
    red_hat = Step(
        "boot with Landlock (RHEL 9.6 or later)",
        (f'grubby --update-kernel=ALL --args="lsm={wanted}"', "systemctl reboot"),
    )
    debian = Step(
        "boot with Landlock (kernel 5.13 or later): in /etc/default/grub write "
        f'GRUB_CMDLINE_LINUX="lsm={wanted}"',
        ("update-grub", "systemctl reboot"),
    )
    family = family_of(facts.distro)
    return {"red hat": [red_hat], "debian": [debian]}.get(family, [red_hat, debian])


def family_of(distro: str) -> str:
    """Return `red hat`, `debian` or nothing, by the pretty name of a distribution."""
    name = distro.lower()
    if any(word in name for word in ("red hat", "rhel", "rocky", "alma", "centos", "fedora")):
        return "red hat"
    return "debian" if any(word in name for word in ("ubuntu", "debian")) else ""


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
