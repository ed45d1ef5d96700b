"""Reports from records: use under an award, evidence by control, and use that did not happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airgap.config import Project, Site
from airgap.dossier.controls import FAMILIES, ROWS
from airgap.dossier.page import Page, Section
from airgap.dossier.usage import Evidence, LogFacts, Usage
from bundle.canonical import canonical_json
from bundle.fields import format_time
from bundle.root import RootDocument
from policy.approvals import Approval, same_person
from policy.terms import Digest
from policy.wording import counted

ROWS_SHOWN = 400
"""Requests on a page; the JSON and CSV forms hold all."""

LOG_LIMITS = (
    "Work on other hosts, in other logs or with other tools.",
    "Whether a person named the right project: a request stands under the project it was run for.",
    "Prompts and answers: the log holds commitments, which only their owner can open.",
)


@dataclass(frozen=True, slots=True)
class About:
    """Who makes a report, when, with which version, and the models by digest for the reader."""

    author: str
    now: datetime
    version: str
    models: Mapping[str, str]

    def model(self, digest: str) -> str:
        """Name a model for the reader."""
        name = self.models.get(digest)
        return f"{name} ({digest[:19]})" if name else digest[:19] or "-"


def award_report(
    evidence: Evidence,
    site: Site,
    award: str,
    about: About,
    *,
    approvals: Sequence[Approval] = (),
    reviews: Sequence[str] = (),
) -> Page:
    """Report who used what under one award, what was held, and which exceptions counted.

    Raises:
        RefusedError: `site.project`.

    """
    project = site.require_project(award)
    uses = evidence.uses
    counts = Counter(use.result for use in uses)
    document: dict[str, Any] = {
        "format": "airgap/report-award/1",
        "award": award,
        "project": project_document(project),
        "log": evidence.log.document(),
        "period": {"first": evidence.first_ts, "last": evidence.last_ts},
        "records_examined": evidence.examined,
        "results": dict(sorted(counts.items())),
        "people": _count(use.person for use in uses),
        "models": _count(use.model for use in uses),
        "tasks": _count(use.task for use in uses),
        "uses": [use.row() for use in uses],
        "approvals": [approval_document(each) for each in approvals if each.project == award],
        "reviews_owed": list(reviews),
    }
    own = [each for each in approvals if each.project == award]
    sections = [
        Section("Award", facts=project_facts(project)),
        Section(
            "Statement of use",
            words=[statement_of_use(award, uses, about, evidence.log)],
            head=("model", "requests"),
            rows=[(about.model(name), str(n)) for name, n in _count(u.model for u in uses).items()],
        ),
        Section(
            "Requests",
            head=("begun (UTC)", "person", "task", "result", "decided by", "records"),
            rows=[
                (
                    use.begun[:19].replace("T", " "),
                    use.person,
                    use.task,
                    use.result,
                    " ".join(part for part in (use.outcome, use.rule) if part),
                    _range(use.seqs),
                )
                for use in uses[:ROWS_SHOWN]
            ],
            words=[f"The first {ROWS_SHOWN} of {len(uses)}."] if len(uses) > ROWS_SHOWN else (),
            empty="no request under this award in these records",
        ),
        Section(
            "Approvals and waivers in force or on file",
            head=("rules", "signed by", "issued", "until", "reason"),
            rows=[approval_row(each) for each in own],
            words=reviews,
        ),
        log_section(evidence.log, evidence),
    ]
    figures = [(name or "requests", str(n)) for name, n in sorted(counts.items())]
    return page_of(
        about,
        document,
        kind="report by award",
        title=f"Use under {award}",
        subject=project.title or "no title in site.toml",
        figures=figures or [("requests", "0")],
        sections=sections,
        limits=LOG_LIMITS,
        banner=banner_of(evidence.log),
    )


def controls_report(
    evidence: Evidence, about: About, *, family: str = "", conflicts: Sequence[str] = ()
) -> Page:
    """Report what evidence there is by control family; revision 2 first, revision 3 beside it.

    `conflicts` are duties that one person bears and two should; see `role_conflicts`.
    """
    rows = [row for row in ROWS if not family or row.family == family]
    document: dict[str, Any] = {
        "format": "airgap/report-controls/1",
        "publication": "NIST SP 800-171",
        "log": evidence.log.document(),
        "records_examined": evidence.examined,
        "period": {"first": evidence.first_ts, "last": evidence.last_ts},
        "rows": [
            {
                "family": row.family,
                "r2": list(row.r2),
                "r3": list(row.r3),
                "evidence": row.evidence,
                "records": row.count(evidence.kinds),
                "kinds": list(row.kinds),
                "responsibility": row.part,
                "institution": row.rest,
            }
            for row in rows
        ],
        "role_conflicts": list(conflicts),
    }
    duties = Section(
        "Duties of one person that two should bear (3.1.4)",
        head=("who and what",),
        rows=[(each,) for each in conflicts],
        empty="none in site.toml and the trust root",
    )
    sections = [
        Section(
            f"Family {name} (revision 3: {FAMILIES[name]})"
            if name in FAMILIES and name[0].isdigit()
            else f"Revision 3 only: {FAMILIES[name]}",
            head=("revision 2", "revision 3", "evidence emitted", "records", "responsibility"),
            rows=[
                (
                    ", ".join(row.r2) or "-",
                    ", ".join(row.r3),
                    row.evidence,
                    f"{row.count(evidence.kinds):,}" if row.kinds else "-",
                    f"{row.part}; the institution: {row.rest}",
                )
                for row in rows
                if row.family == name
            ],
        )
        for name in dict.fromkeys(row.family for row in rows)
    ]
    limits = (
        "Whether a requirement is met: that is for the institution's assessor.",
        "Titles of requirements: they stand in the publication.",
        "Controls of the host, its accounts and its network.",
        *LOG_LIMITS[:1],
    )
    return page_of(
        about,
        document,
        kind="report by control",
        title="Evidence by control family",
        subject="NIST SP 800-171, revisions 2 and 3",
        figures=[("records examined", f"{evidence.examined:,}"), ("rows", str(len(rows)))],
        sections=[*sections, duties, log_section(evidence.log, evidence)],
        limits=limits,
        banner=banner_of(evidence.log),
    )


def not_used_report(
    evidence: Evidence, site: Site, award: str, about: About, *, model: str = ""
) -> Page:
    """Report that the log holds no use under an award, or the uses that it does hold.

    Args:
        evidence: Of this award.
        site: Its facts.
        award: A project of site.toml, or an id that was never one here.
        about: Author and time.
        model: Only uses of this digest count.

    """
    found = [use for use in evidence.uses if not model or use.model == model]
    answered = [use for use in found if use.result == "answered"]
    attempts = [use for use in found if use.result != "answered"]
    project = site.find_project(award)
    used = bool(answered)
    what = f"model {about.model(model)}" if model else "any model"
    words = (
        f"The records 0 to {evidence.log.size - 1} of this log hold no answered request for {what}"
        f" under {award}."
        if not used
        else f"Answered requests for {what} under {award} in this log: {len(answered)}."
    )
    if attempts and not used:
        words += f" Requests that were refused, held or failed: {len(attempts)}."
    document: dict[str, Any] = {
        "format": "airgap/not-used/1",
        "award": award,
        "award_in_site": project is not None,
        "model": model or None,
        "used": used,
        "statement": words,
        "log": evidence.log.document(),
        "period": {"first": evidence.first_ts, "last": evidence.last_ts},
        "records_examined": evidence.examined,
        "requests_of_other_projects": sum(
            n for name, n in evidence.projects.items() if name != award
        ),
        "answered": [use.row() for use in answered],
        "not_answered": [use.row() for use in attempts],
    }
    log = evidence.log
    below = "below that no record can have been taken out without a contradiction"
    anchored = counted(log.anchored_size, "record")
    shows = [
        f"Every record up to {log.size - 1} was read; a signed head covers them all.",
        f"Outside heads that agree: {log.anchors}, up to {anchored}; {below}.",
        "A request is on record before any work begins.",
    ]
    limits = (
        *LOG_LIMITS[:2],
        f"Records past {log.anchored_size}: who holds the log key can sign a shorter log again.",
        "In embedded mode the user owns both log and key.",
        "Times come from the clock of the host.",
    )
    sections = [
        Section("Statement", words=[words]),
        Section("What it rests on", words=shows),
        Section(
            "Requests under this award",
            head=("begun (UTC)", "person", "task", "result", "records"),
            rows=[
                (
                    use.begun[:19].replace("T", " "),
                    use.person,
                    use.task,
                    use.result,
                    _range(use.seqs),
                )
                for use in [*answered, *attempts][:ROWS_SHOWN]
            ],
            empty="none",
        ),
        log_section(evidence.log, evidence),
    ]
    return page_of(
        about,
        document,
        kind="use that did not happen",
        title=f"{'Used' if used else 'Not used'} under {award}",
        subject=what,
        figures=[
            ("records examined", f"{evidence.examined:,}"),
            ("answered", str(len(answered))),
        ],
        sections=sections,
        limits=limits,
        banner=banner_of(evidence.log),
    )


# Pairs of duties that one person should not bear (docs/design/policy.md, 7).
_APART = (
    (frozenset({"builder"}), None, "builds and approves releases"),
    (
        frozenset({"log_reviewer"}),
        frozenset({"log_administrator", "system_administrator"}),
        "reviews the log and administers it",
    ),
    (frozenset({"policy_author"}), frozenset({"policy"}), "writes rules and approves them"),
    (
        frozenset({"principal_investigator"}),
        frozenset({"ehs", "biosafety", "export_control", "hazard_officer"}),
        "leads a project and releases hazard holds",
    ),
)


def role_conflicts(site: Site, trust: RootDocument | None) -> list[str]:
    """Return who bears two duties that should lie with two people, by site.toml and trust root."""
    roles: dict[str, set[str]] = {}
    approvers: set[str] = set()
    for person in site.person:
        roles.setdefault(same_person(person.id), set()).update(person.roles)
    for project in site.project:
        for lead in project.principal_investigators:
            roles.setdefault(same_person(lead), set()).add("principal_investigator")
    for who, enrolled in trust.people.items() if trust else ():
        roles.setdefault(same_person(who), set()).update(enrolled.roles)
        if enrolled.approves:
            approvers.add(same_person(who))
    return [
        f"{who} {words}: {', '.join(sorted(borne & one | borne & (two or set())))}"
        for who, borne in sorted(roles.items())
        for one, two, words in _APART
        if borne & one and (who in approvers if two is None else borne & two)
    ]


# -- what reports share ---------------------------------------------------------------------------


def statement_of_use(award: str, uses: Sequence[Usage], about: About, log: LogFacts) -> str:
    """Return the sentence that a sponsor asks for."""
    done = [use for use in uses if use.result == "answered"]
    if not done:
        return f"No request under {award} was answered in the records of {log.origin}."
    models = ", ".join(about.model(name) for name in dict.fromkeys(use.model for use in done))
    people = ", ".join(dict.fromkeys(use.person for use in done))
    return (
        f"Between {done[0].begun[:10]} and {done[-1].ended[:10]}, {people} put "
        f"{counted(len(done), 'request')}"
        f" to {models} under {award}; each was decided by rule and is on record in {log.origin}."
    )


def log_section(log: LogFacts, evidence: Evidence | None = None) -> Section:
    """Return what is known of the log itself."""
    facts = [
        ("log", log.origin),
        ("records under the newest signed head", f"{log.size:,}"),
        ("root", log.root),
        ("verification", log.verdict),
        ("outside heads that agree", f"{log.anchors}, up to record {log.anchored_size:,}"),
    ]
    if evidence is not None:
        facts.append(("time", f"{evidence.first_ts or '-'} to {evidence.last_ts or '-'}"))
    facts += [("finding", each) for each in log.findings[:8]]
    return Section("The log behind this page", facts=facts)


def project_document(project: Project) -> dict[str, Any]:
    """Return the facts of a project as JSON; what is not stated is null."""
    return {
        "id": project.id,
        "title": project.title,
        "sponsors": sorted(project.sponsors) if project.sponsors is not None else None,
        "instrument": project.instrument,
        "federal_funds": project.federal_funds,
        "award_date": project.award_date.isoformat() if project.award_date else None,
        "active": project.active,
        "closed": project.closed,
        "principal_investigators": sorted(project.principal_investigators),
    }


def project_facts(project: Project) -> list[tuple[str, str]]:
    """Return the same for a reader."""
    document = project_document(project)
    return [(name.replace("_", " "), _words(value)) for name, value in document.items()]


def approval_document(approval: Approval) -> dict[str, Any]:
    """Return an approval as JSON."""
    return {
        "digest": str(approval.digest),
        "rules": dict(sorted(approval.rules.items())),
        "people": [each.person for each in approval.approvers],
        "task": approval.task,
        "issued": format_time(approval.issued),
        "expires": approval.expires.isoformat(),
        "reason": approval.reason,
        "document": str(approval.document) if approval.document else None,
        "break_glass": approval.break_glass,
    }


def approval_row(approval: Approval) -> tuple[str, ...]:
    """Return an approval as cells."""
    return (
        ", ".join(sorted(approval.rules)) + " (break-glass)" * approval.break_glass,
        ", ".join(each.person for each in approval.approvers) or "nobody who counts",
        format_time(approval.issued)[:10],
        approval.expires.isoformat(),
        approval.reason,
    )


def page_of(
    about: About,
    document: dict[str, Any],
    *,
    kind: str,
    title: str,
    subject: str,
    figures: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    limits: Sequence[str],
    banner: str = "",
) -> Page:
    """Put a page together; its id is the digest of its JSON, author, time and limits included."""
    stamped = {
        **document,
        "author": about.author,
        "created": format_time(about.now),
        "version": about.version,
        "limits": list(limits),
    }
    return Page(
        kind=kind,
        title=title,
        subject=subject,
        figures=figures,
        sections=sections,
        limits=limits,
        author=about.author,
        created=format_time(about.now),
        version=about.version,
        id=str(Digest.of(canonical_json(stamped))),
        banner=banner,
        document=stamped,
    )


def banner_of(log: LogFacts) -> str:
    """Return a warning where nothing outside stands behind the log."""
    if log.verdict == "good":
        return ""
    return (
        "The log was not compared with an outside head, or not to its end: what follows rests on "
        "whoever holds its key. Give receipts or heads kept elsewhere with --anchors."
    )


def _count(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(name for name in names if name).items()))


def _range(seqs: Sequence[int]) -> str:
    return f"{seqs[0]} to {seqs[-1]}" if len(seqs) > 1 else str(seqs[0]) if seqs else "-"


def _words(value: object) -> str:
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def families() -> tuple[str, ...]:
    """Return the families of the table, in order."""
    return tuple(dict.fromkeys(row.family for row in ROWS))
