"""Facts for the policy: from site.toml, from the manifest and the registry, from the screens.

Everything that `decide` needs beside the rules is gathered here and nothing is guessed: what nobody
stated is an unknown fact. No file is read; day and clock are passed in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo

from airgap.config import Person, Project, Site, Transaction
from airgap.model_facts import BundleFacts, bundle_facts, registry_facts
from airgap.rules import Rules
from bundle.manifest import ModelEntry
from policy.approvals import Approvals
from policy.engine import NO_APPROVALS, Decision, decide
from policy.evaluator import Request
from policy.paths import Origin, Start
from policy.terms import (
    SCREEN_CLASSES,
    Digest,
    Fact,
    Known,
    Scope,
    Unknown,
    Value,
)

__all__ = [
    "BundleFacts",
    "ScreenFacts",
    "TaskFacts",
    "bundle_facts",
    "decide_admission",
    "decide_use",
    "registry_facts",
]

PROBING_LIMIT = 3  # hazard holds of one person in 30 days that count as repeated probing
TIERS = ("H0", "H1", "H2", "H3", "H4")


# -- facts of the site ----------------------------------------------------------------------------


def _stated(facts: dict[str, Fact], name: str, value: Value | None, source: str) -> None:
    if value is not None:
        facts[name] = Known(value, source, asserted_by="site")


def site_facts(site: Site) -> dict[str, Fact]:
    """Facts of institution and system."""
    facts: dict[str, Fact] = {}
    where = "site.toml [institution]"
    _stated(facts, "institution.state", site.institution.state, where)
    _stated(facts, "institution.public", site.institution.public, where)
    where = "site.toml [system]"
    for name in ("owner", "ic_nss", "state_business", "cui_authorised", "in_ssp"):
        _stated(facts, f"system.{name}", getattr(site.system, name), where)
    if site.system.crypto is not None:
        facts["system.crypto_recorded"] = Known(value=True, source="site.toml [system.crypto]")
    return facts


def project_facts(site: Site, project: Project) -> dict[str, Fact]:
    """Facts of one project."""
    facts: dict[str, Fact] = {}
    where = f"site.toml [[project]] {project.id}"
    for name in ("sponsors", "instrument", "federal_funds", "award_date", "active", "closed"):
        _stated(facts, f"project.{name}", getattr(project, name), where)
    for name in ("to_dod", "embeds_model_or_output"):
        _stated(facts, f"deliverable.{name}", getattr(project.deliverable, name), where)
    _stated(facts, "performance.dod_contract", project.performance.dod_contract, where)
    _stated(facts, "data.markings", project.data.markings, where)
    _stated(facts, "data.export_class", project.data.export_class, where)
    deal = project.transaction or site.transaction
    where = where if project.transaction else "site.toml [transaction]"
    for name in ("buyer", "kind", "interconnection_only", "under_existing_contract"):
        _stated(facts, f"transaction.{name}", getattr(deal, name), where)
    return facts


def _shared_facts(site: Site) -> dict[str, Fact]:
    """Facts on which all projects of the site agree, for an admission that names no project."""
    per_project = [
        project_facts(site, project) for project in site.project if project.active is not False
    ]
    shared: dict[str, Fact] = {}
    for name in dict.fromkeys(name for facts in per_project for name in facts):
        found = [facts.get(name) for facts in per_project]
        values = {each.value if isinstance(each, Known) else None for each in found}
        first = found[0]
        if len(values) == 1 and isinstance(first, Known):
            shared[name] = Known(first.value, "site.toml, all projects alike", asserted_by="site")
        else:
            shared[name] = Unknown("the projects of the site differ; name one", "site.toml")
    return shared


def _counterparty(deal: Transaction) -> Start:
    if deal.counterparty is not None:
        return Start.parties([deal.counterparty], "site.toml, counterparty")
    if deal.kind in {"free_download", "own_work"}:
        return Start()
    return Start.nothing_known("no counterparty is named in site.toml")


def _personnel(people: Iterable[Person]) -> Start:
    origins: list[Origin] = []
    unknown: dict[str, str] = {}
    found = list(people)
    for person in found:
        source = f"site.toml [[person]] {person.id}"
        if person.affiliations is None:
            unknown["affiliated_with"] = f"the affiliations of {person.id} are not recorded"
        origins += [
            Origin("affiliated_with", each, sure=True, source=source)
            for each in person.affiliations or ()
        ]
    if not found:
        unknown["affiliated_with"] = "site.toml names nobody on the project"
    return Start(tuple(origins), unknown)


# -- admission ------------------------------------------------------------------------------------


def decide_admission(
    site: Site,
    rules: Rules,
    models: Sequence[ModelEntry] | BundleFacts,
    *,
    bundle_digest: Digest | None,
    project: str | None,
    as_of: date,
    known_at: datetime,
    verified: bool | None = None,
    submitter: str | None = None,
    approvals: Approvals = NO_APPROVALS,
    day_source: str = "caller",
    assumed: Mapping[str, Fact] = MappingProxyType({}),
) -> Decision:
    """Decide whether a bundle may enter.

    `models` are those of its manifest, or facts gathered before. Without a `project` the bundle is
    for all of them, and a fact on which they differ is unknown. `verified` says whether seal and
    hashes hold; None when nobody looked. `submitter` brings it in, and so cannot approve it.
    `assumed` are facts of a what-if, with a source that says so.

    Raises:
        RefusedError: `site.project`.

    """
    about = models if isinstance(models, BundleFacts) else bundle_facts(models, rules.registry)
    chosen = site.require_project(project) if project is not None else None
    facts = {**about.facts, **site_facts(site)}
    facts |= project_facts(site, chosen) if chosen else _shared_facts(site)
    if verified is not None:
        facts["bundle.verified"] = Known(verified, "verification of the bundle")
    facts |= assumed
    people = [each for each in site.person if chosen is None or chosen.id in each.projects]
    deal = (chosen.transaction if chosen else None) or site.transaction
    request = Request(
        scope=Scope.ADMISSION,
        bundle=bundle_digest,
        project=project,
        submitter=submitter,
        leads=chosen.principal_investigators if chosen else frozenset(),
        facts=facts,
        starts={
            **about.starts,
            "counterparty": _counterparty(deal),
            "personnel": _personnel(people),
        },
        day_source=day_source,
    )
    return _decide(request, rules, in_legal_zone(site, approvals), as_of, known_at)


def in_legal_zone(site: Site, approvals: Approvals) -> Approvals:
    """The same approvals, issued at the same instant, which falls on the legal day of the site."""
    if not approvals.approvals:
        return approvals
    zone = ZoneInfo(site.institution.legal_zone)
    return Approvals(
        tuple(replace(each, issued=each.issued.astimezone(zone)) for each in approvals.approvals)
    )


def _decide(
    request: Request, rules: Rules, approvals: Approvals, as_of: date, known_at: datetime
) -> Decision:
    return decide(
        request,
        rules.packs,
        rules.lists,
        rules.registry,
        approvals,
        as_of=as_of,
        known_at=known_at,
    )


# -- use ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What is to be done. `None` is unknown; markings and class of the project apply in any case.

    Args:
        name: The task as the user calls it, for example `retrosynthesis`.
        modality: Kind of material that it makes (docs/design/science.md, 2.3). None is
            unknown and is screened.
        markings: Of this input, beside those of the project's data.
        recipient: Name of the party to whom an output goes.

    """

    name: str
    modality: str | None
    action: str = "infer"
    subjects: frozenset[str] | None = None
    markings: frozenset[str] = frozenset()
    export_class: str | None = None
    max_sequence_nt: int | None = None
    recipient: str | None = None


@dataclass(frozen=True, slots=True)
class ScreenFacts:
    """What a hazard screen found; made from the helper's reply by `of`."""

    status: str
    tier: int
    classes: frozenset[str]
    pack: str
    mode: str
    target_tier: int | None = None  # of what a route is asked for; None: all that was screened

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> ScreenFacts:
        """Read a ScreenResult; whatever cannot be read makes the screen incomplete, which holds."""
        tier = document.get("tier")
        named = document.get("classes")
        status = document.get("status")
        classes = [_screen_class(each) for each in named] if isinstance(named, list) else [None]
        good = status == "complete" and tier in TIERS and None not in classes
        target = document.get("target_tier")
        good = good and (target is None or target in TIERS)
        return cls(
            status="complete" if good else "incomplete",
            tier=TIERS.index(tier) if tier in TIERS else 0,
            classes=frozenset(each for each in classes if each is not None),
            pack=str(document.get("pack", ""))[:200],
            mode=str(document.get("mode", ""))[:200],
            target_tier=TIERS.index(target) if target in TIERS else None,
        )


# Class of a screen pack: `1a03`, `1a03.listed`, `ag16.listed`, `dea_listed:1310.02.listed` of a
# site's pack, `near.1a03` for a resemblance.
_PARAGRAPH = re.compile(r"([123])[ab][0-9]{2}(\.listed)?|(ag)[0-9]{2}(?:\.listed)?|(near)\..+")


def _screen_class(name: object) -> str | None:
    """Map a class of a screen pack to the vocabulary, or None."""
    if not isinstance(name, str):
        return None
    if (own := name.partition(":")[0]) in SCREEN_CLASSES:
        return own
    found = _PARAGRAPH.fullmatch(name)
    if found is None:
        return None
    if found[3] or found[4]:
        return "ag_precursor" if found[3] else "similarity"
    if found[1] == "1":
        return "cwc1_exact" if found[2] else "cwc1_family"
    return f"cwc{found[1]}"


def decide_use(
    site: Site,
    rules: Rules,
    models: Sequence[ModelEntry] | BundleFacts,
    *,
    bundle_digest: Digest | None,
    person: str,
    project: str,
    task: TaskFacts,
    screen: ScreenFacts | Mapping[str, Any] | None,
    as_of: date,
    known_at: datetime,
    admitted: bool | None = None,
    hazard_holds: int | None = None,
    approvals: Approvals = NO_APPROVALS,
    day_source: str = "caller",
    assumed: Mapping[str, Fact] = MappingProxyType({}),
) -> Decision:
    """Decide whether a person may run a task; asked before the run and again before the release.

    `screen` is the result for input or output; without one the answer is no where one is needed.
    `admitted` says whether the bundle is installed with a permitting admission; None is unknown.
    `hazard_holds` counts the hazard holds of this person in the last 30 days; None, nobody counted,
    is an unknown as well, and denies where a screen is needed.

    Raises:
        RefusedError: `site.project`; `policy.request` for a word outside the vocabulary.

    """
    about = models if isinstance(models, BundleFacts) else bundle_facts(models, rules.registry)
    chosen = site.require_project(project)
    found = site.find_person(person)
    facts = {**about.facts, **site_facts(site), **project_facts(site, chosen)}
    facts |= _person_facts(person, found, chosen, as_of)
    facts |= _task_facts(task, chosen)
    if admitted is not None:
        facts["bundle.admitted"] = Known(admitted, "installed store")
    screens: tuple[Mapping[str, str | int | None], ...] = ()
    if screen is not None:
        result = screen if isinstance(screen, ScreenFacts) else ScreenFacts.of(screen)
        facts |= _screen_facts(result, task)
        screens = ({"pack": result.pack, "mode": result.mode, "tier": result.tier},)
    if hazard_holds is not None:
        probing = hazard_holds >= PROBING_LIMIT
        facts["screen.repeated_probing"] = Known(
            probing, "hazard holds of 30 days in the audit log"
        )
    facts |= assumed
    recipient = Start.nothing_known("no recipient is named")
    if task.recipient is not None:
        recipient = Start.parties([task.recipient], "task")
    request = Request(
        scope=Scope.USE,
        bundle=bundle_digest,
        project=project,
        task=task.name,
        submitter=person,
        leads=chosen.principal_investigators,
        facts=facts,
        starts={**about.starts, "recipient": recipient},
        screens=screens,
        day_source=day_source,
    )
    return _decide(request, rules, in_legal_zone(site, approvals), as_of, known_at)


def _person_facts(
    name: str, person: Person | None, project: Project, as_of: date
) -> dict[str, Fact]:
    if person is None:
        source = f"site.toml names nobody {name!r:.60}"
        return {"person.on_project": Known(value=False, source=source)}
    facts: dict[str, Fact] = {}
    where = f"site.toml [[person]] {person.id}"
    _stated(facts, "person.on_project", project.id in person.projects, where)
    if person.training_until is not None:
        _stated(facts, "person.training_current", as_of < person.training_until, where)
    where = person.record or where  # the site's own record is the source, never a guess
    _stated(facts, "person.us_person", person.us_person, where)
    _stated(facts, "person.export_licence", person.export_licence, where)
    return facts


def _task_facts(task: TaskFacts, project: Project) -> dict[str, Fact]:
    facts: dict[str, Fact] = {"task.action": Known(task.action, "task")}
    where = f"site.toml [[project]] {project.id}"
    _stated(facts, "task.modality", task.modality, "task")
    if project.actions is not None:
        _stated(facts, "task.action_allowed", task.action in project.actions, where)
    subjects = (project.subjects, task.subjects)
    if any(each is not None for each in subjects):
        union = frozenset().union(*(each for each in subjects if each is not None))
        _stated(facts, "task.subjects", union, where)
    if project.data.markings is not None:
        _stated(facts, "data.markings", project.data.markings | task.markings, where)
    elif task.markings:
        facts["data.markings"] = Unknown("the markings of the project are not recorded", where)
    classes = [each for each in (project.data.export_class, task.export_class) if each is not None]
    _stated(facts, "data.export_class", min(classes, key=_strictness, default=None), where)
    _stated(facts, "output.max_sequence_nt", task.max_sequence_nt, "output")
    return facts


# A task may be stricter than its project's data, never looser.
_STRICT_FIRST = ("ITAR", "ECCN", "unreviewed", "EAR99", "fundamental_research")


def _strictness(export_class: str) -> int:
    known = export_class in _STRICT_FIRST
    return _STRICT_FIRST.index(export_class) if known else 0  # the engine refuses a strange word


def _screen_facts(screen: ScreenFacts, task: TaskFacts) -> dict[str, Fact]:
    source = f"hazard screen, pack {screen.pack}"
    facts: dict[str, Fact] = {
        "screen.status": Known(screen.status, source),
        "screen.tier": Known(screen.tier, source),
        "screen.classes": Known(screen.classes, source),
    }
    if task.modality == "retrosynthesis" and screen.status == "complete":
        # A treaty chemical among the steps of a route counts like the target itself.
        target = screen.tier if screen.target_tier is None else screen.target_tier
        facts["screen.target_tier"] = Known(target, source)
    return facts
