"""Approvals and waivers: what lifts a rule, and what does not (docs/design/policy.md, 7).

An override changes no fact and no rule. It arrives here as a verified value: whoever made it from a
signed statement has checked the signatures, so each approver is a distinct named person.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime

from policy.pack import ApprovalOverride, Rule, WaiverOverride
from policy.terms import Digest, Scope

BREAK_GLASS_PEOPLE = 2
BREAK_GLASS_DAYS = 3
_NO_EMERGENCY = frozenset({"hazard", "cui"})  # topics that no emergency opens


@dataclass(frozen=True, slots=True)
class Approver:
    """A named person with the roles that the trust root gives this person."""

    person: str
    roles: frozenset[str]


@dataclass(frozen=True, slots=True)
class Approval:
    """A signed override or a registered waiver.

    Args:
        digest: Of the signed statement.
        rules: Rule id -> the version that was approved; another version is not.
        approvers: Those who signed. For a waiver: who registered it and who confirmed it.
        bundle: The only bundle; `project` the only project; `task` the only task, None for all.
        issued: When it was signed; its zone is that in which a day of law is counted.
        expires: First day on which it no longer counts.
        document: Digest of the filed document, where there is one.
        authority: For a government waiver: who granted it; None for an approval.
        break_glass: An emergency: any two people, for a short time, and a review afterwards.

    """

    digest: Digest
    rules: Mapping[str, int]
    approvers: tuple[Approver, ...]
    reason: str
    bundle: Digest
    project: str
    task: str | None
    issued: datetime
    expires: date
    document: Digest | None
    authority: str | None = None
    break_glass: bool = False


@dataclass(frozen=True, slots=True)
class Approvals:
    """All approvals at hand; empty is the ordinary case."""

    approvals: tuple[Approval, ...] = ()

    def lifting(self, rule: Rule, case: Case) -> Approval | None:
        """The approval that lifts `rule`; of several the one that lasts longest."""
        found = [each for each in self.approvals if fault_of(each, rule, case) is None]
        return max(found, key=lambda each: (each.expires, str(each.digest)), default=None)


@dataclass(frozen=True, slots=True)
class Case:
    """What an approval is held against."""

    scope: Scope
    bundle: Digest | None
    project: str | None
    task: str | None
    submitter: str | None
    leads: frozenset[str]
    as_of: date
    known_at: datetime


def same_person(name: str) -> str:
    """Key under which one person stays one person."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def fault_of(approval: Approval, rule: Rule, case: Case) -> str | None:
    """Say why `approval` does not lift `rule` in this case; None when it does."""
    version = approval.rules.get(rule.id)
    if version is None:
        return f"not for rule {rule.id}"
    if version != rule.text.version:
        return f"for version {version} of {rule.id}, and version {rule.text.version} is loaded"
    return (
        _fault_of_subject(approval, case)
        or _fault_of_day(approval, case)
        or _fault_of_people(approval, case)
        or _fault_of_kind(approval, rule, case)
    )


def _fault_of_subject(approval: Approval, case: Case) -> str | None:
    if approval.bundle != case.bundle:
        asked = "none with a digest" if case.bundle is None else "another"
        return f"for bundle {approval.bundle}, and the question is about {asked}"
    if approval.project != case.project:
        return f"for project {approval.project}"
    if approval.task is not None and approval.task != case.task:
        return f"for task {approval.task}"
    return None


def _fault_of_day(approval: Approval, case: Case) -> str | None:
    issued = approval.issued
    if issued > case.known_at or issued.date() > case.as_of:
        return f"not yet valid: issued on {issued.date()}, and the day decided is {case.as_of}"
    if case.as_of >= approval.expires:
        return f"expired on {approval.expires}"
    return None


def _fault_of_people(approval: Approval, case: Case) -> str | None:
    if case.submitter is None:
        return "nobody is named as the submitter, so nobody can be told apart from the approvers"
    people = [same_person(each.person) for each in approval.approvers]
    if len(set(people)) != len(people):
        return "one person signed twice"
    if same_person(case.submitter) in people:
        return "the submitter is among the approvers"
    return None


def _fault_of_kind(approval: Approval, rule: Rule, case: Case) -> str | None:
    if approval.break_glass:
        return _fault_of_emergency(approval, rule)
    match rule.text.override:
        case WaiverOverride():
            if approval.authority is None or approval.document is None:
                return "no government waiver with its document"
            return (
                None
                if len(approval.approvers) > 1
                else "too few people: registered, but not confirmed by a second one"
            )
        case ApprovalOverride() as terms:
            return _fault_of_terms(approval, rule, terms, case)
        case _:
            return "this rule cannot be lifted"


def _fault_of_emergency(approval: Approval, rule: Rule) -> str | None:
    if rule.text.topic in _NO_EMERGENCY or rule.text.statutory:
        return "break-glass is not for hazard, CUI or statutory rules"
    if not isinstance(rule.text.override, ApprovalOverride):
        return "break-glass only goes before an approval, and this rule takes none"
    days = (approval.expires - approval.issued.date()).days
    if days > BREAK_GLASS_DAYS:
        return f"runs longer than {BREAK_GLASS_DAYS} days, which is too long for break-glass"
    found = len(approval.approvers)
    lacking = f"too few people: {found} of {BREAK_GLASS_PEOPLE} for break-glass"
    return lacking if found < BREAK_GLASS_PEOPLE else None


def _fault_of_terms(
    approval: Approval, rule: Rule, terms: ApprovalOverride, case: Case
) -> str | None:
    leads = {same_person(each) for each in case.leads}
    fit = [each for each in approval.approvers if each.roles & set(terms.roles)]
    apart = [each for each in fit if same_person(each.person) not in leads]
    if rule.text.topic == "hazard":
        fit = apart
    days = (approval.expires - approval.issued.date()).days
    lacking = (
        f"too few people: {len(fit)} of {terms.approvers} with role {' or '.join(terms.roles)}"
    )
    faults = {
        lacking: len(fit) < terms.approvers,
        "a principal investigator alone does not release the own award": not apart,
        f"runs longer than {terms.max_days} days": days > terms.max_days,
        "its document is missing": terms.needs_document and approval.document is None,
        "a statute is not lifted by an approval": rule.text.statutory
        and rule.text.effect == "deny",
    }
    return next((words for words, true in faults.items() if true), None)
