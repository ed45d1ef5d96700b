"""A decision in words: which rule, why, by which facts, what is missing, when it changes.

Hazard rules are an oracle. Without the hazard role a reader sees that something is held for review,
and neither the rule nor the facts of the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policy import record
from policy.canonical import canonical_bytes
from policy.engine import Decision
from policy.evaluator import RuleResult
from policy.logic import LETTERS, Comparison, Condition, Leaf, leaves
from policy.logic import Any as AnyOf
from policy.pack import ApprovalOverride, Obligation, Override, WaiverOverride
from policy.terms import Known, Outcome

HAZARD_ROLE = "hazard_officer"


@dataclass(frozen=True, slots=True)
class LeafView:
    """One condition: its words, its truth (T, F or U), what is known, and from where."""

    words: str
    truth: str
    value: str
    source: str
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeavesView:
    """The leaves of one condition; `any_of` says that one of them is enough."""

    leaves: tuple[LeafView, ...] = ()
    any_of: bool = False


@dataclass(frozen=True, slots=True)
class RuleView:
    """One rule that counts."""

    rule: str
    version: int
    effect: Outcome
    state: str
    plain: str
    citation: str
    pedigree: str
    lifting: str
    applies: LeavesView
    fires: LeavesView
    excepted: LeavesView


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a reader may see of a decision."""

    scope: str
    outcome: Outcome
    day: str
    day_source: str
    rules: tuple[RuleView, ...]
    obligations: tuple[Obligation, ...]
    missing: tuple[record.Missing, ...]
    warnings: tuple[dict[str, str], ...]
    change: record.Change | None
    held_for_review: bool
    quiet: int
    lists: tuple[str, ...]
    packs: tuple[str, ...]
    summary: str


def explain(decision: Decision, *, hazard_role: bool = False) -> Explanation:
    """Gather what is to be told; hazard rules only for their own role."""
    kept = {each.rule.id: each for each in decision.results if _shown(each, hazard_role)}
    reasons = [each for each in decision.reasons if hazard_role or not each.hazard]
    evaluator = decision.evaluator
    change = decision.next_change
    held = not hazard_role and any(each.hazard and each.blocks for each in decision.reasons)
    duties = {
        duty.id
        for each in kept.values()
        if each.effect is not None
        for duty in each.rule.text.obligations
    }
    # Of a hazard rule that was released not even the review is told.
    reviews = {f"{kind}{each.lower()}" for each in kept for kind in ("review-", "after-review-")}
    shown = tuple(each for each in decision.obligations if each.id in duties | reviews)
    outcome = _outcome(decision, reasons, hazard_held=held)
    if outcome is Outcome.PERMIT_WITH_OBLIGATIONS and decision.obligations and not shown:
        outcome = Outcome.PERMIT  # every obligation is one of a hazard rule
    return Explanation(
        scope=str(decision.scope),
        outcome=outcome,
        day=decision.as_of.isoformat(),
        day_source=evaluator.request.day_source,
        rules=tuple(_rule_view(decision, each, kept.get(each.rule)) for each in reasons),
        obligations=shown,
        missing=tuple(each for each in decision.missing if hazard_role or not each.hazard),
        warnings=tuple(record.warnings_of(decision.evaluation)),
        change=None if change is None else _change(change, set(kept)),
        held_for_review=held,
        quiet=sum(1 for each in kept.values() if each.effect is None),
        lists=tuple(
            f"{name} {held_list.text.edition}{'' if held_list.text.complete else ' (partial)'}"
            if held_list
            else f"{name} (none held)"
            for name, held_list in evaluator.held.items()
        ),
        packs=tuple(
            f"{pack.pack_id} {pack.version} {pack.status}" for pack in evaluator.packs.packs
        ),
        summary=_summary(outcome, reasons, hazard_held=held),
    )


def _shown(result: RuleResult, hazard_role: bool) -> bool:
    return hazard_role or result.rule.text.topic != "hazard"


def _outcome(decision: Decision, reasons: Sequence[record.Reason], *, hazard_held: bool) -> Outcome:
    """The outcome as far as it may be told: a hazard always reads as a hold."""
    if not hazard_held:
        return decision.outcome
    denied = any(each.blocks and each.effect is Outcome.DENY for each in reasons)
    return Outcome.DENY if denied else Outcome.NEEDS_APPROVAL


def _change(change: record.Change, shown: set[str]) -> record.Change:
    return record.Change(
        change.on, change.outcome, tuple(each for each in change.rules if each in shown)
    )


def _summary(outcome: Outcome, reasons: Sequence[record.Reason], *, hazard_held: bool) -> str:
    deciding = [each.rule for each in reasons if each.effect is outcome and not each.lifted]
    if hazard_held:
        deciding.append("held for review")
    marked = [each.rule for each in reasons if each.verify_before_release]
    note = f"; to verify before release: {', '.join(marked)}" if marked else ""
    return f"{outcome} by {', '.join(deciding) or 'its permit rules'}{note}"


def _rule_view(decision: Decision, reason: record.Reason, result: RuleResult | None) -> RuleView:
    pedigree = f"{reason.source.replace('_', ' ')}, confidence {reason.confidence}"
    if reason.verify_before_release:
        pedigree += ", to verify before release"
    state = "unknown" if reason.state == "unknown" else "fired"
    if result is None:
        return RuleView(
            reason.rule,
            reason.version,
            reason.effect or Outcome.DENY,
            state,
            reason.plain,
            reason.citation,
            pedigree,
            "settle the facts that its permit rules need",
            LeavesView(),
            _views_of_permits(decision),
            LeavesView(),
        )
    rule = result.rule
    approval = result.lifted_by
    lifted = f"overridden until {approval.expires} by " if approval else ""
    if approval:
        lifted += ", ".join(sorted(each.person for each in approval.approvers))
    return RuleView(
        reason.rule,
        reason.version,
        reason.effect or Outcome.DENY,
        state,
        reason.plain,
        reason.citation,
        pedigree,
        lifted or _lifting(rule.text.override, reason.state),
        _views(decision, rule.applies_when),
        _views(decision, rule.when),
        LeavesView() if rule.unless is None else _views(decision, rule.unless),
    )


def _views_of_permits(decision: Decision) -> LeavesView:
    """For a default deny: what the permit rules wanted and did not get."""
    found: list[LeafView] = []
    for result in decision.results:
        if result.rule.text.effect == "permit":
            for condition in (result.rule.applies_when, result.rule.when):
                found += [each for each in _views(decision, condition).leaves if each.truth != "T"]
    return LeavesView(tuple(found))


def _lifting(override: Override, state: str) -> str:
    match override:
        case ApprovalOverride():
            people = f"{override.approvers} of {', '.join(override.roles)}"
            document = ", with a document" if override.needs_document else ""
            return f"approval by {people}, at most {override.max_days} days{document}"
        case WaiverOverride():
            return f"a government waiver: {override.authority}"
    return "supply the missing fact" if state == "unknown" else "cannot be lifted; change the facts"


def _views(decision: Decision, condition: Condition) -> LeavesView:
    position = {leaf: at for at, leaf in enumerate(decision.evaluator.program.leaves)}
    found = dict.fromkeys(leaves(condition))
    return LeavesView(
        tuple(_leaf_view(decision, leaf, position[leaf]) for leaf in found),
        isinstance(condition, AnyOf) and len(found) > 1,
    )


def _leaf_view(decision: Decision, leaf: Leaf, at: int) -> LeafView:
    truth = LETTERS[decision.evaluation.values[at]]
    if isinstance(leaf, Comparison):
        fact = decision.facts[leaf.fact]
        if isinstance(fact, Known):
            grounds = (decision.facts.get(each) for each in fact.derivation)
            shown = [_shown_value(each) for each in grounds if isinstance(each, Known)]
            words = _shown_value(fact) + (f", from {' and '.join(shown)}" if shown else "")
            return LeafView(str(leaf), truth, words, fact.source, ())
        return LeafView(str(leaf), truth, f"unknown: {fact.reason}", fact.source, ())
    path = decision.evaluation.paths[at]
    steps = tuple(f"{hop.relation} {hop.party} [{hop.by}]" for hop in path.hops)
    target = leaf.hits_list or "domicile " + ", ".join(sorted(leaf.domicile_in or ()))
    return LeafView(f"lineage of {leaf.start} reaches {target}", truth, path.words, "", steps)


def _shown_value(fact: Known) -> str:
    value = record.plain_value(fact.value)
    if isinstance(value, list):
        return "{" + ", ".join(value) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def public_document(decision: Decision, *, hazard_role: bool = False) -> dict[str, Any]:
    """The record as a reader may see it; the whole of it with the hazard role.

    Without the role it drops hazard rules, screen facts, and the digests from which they could be
    guessed.
    """
    whole = decision.as_document()
    if hazard_role:
        return whole
    hazard = {each.rule.id for each in decision.results if each.rule.text.topic == "hazard"}
    shown = explain(decision)
    duties = {each.id for each in shown.obligations}
    whole["outcome"] = str(shown.outcome)
    whole["summary"] = shown.summary
    whole["held_for_review"] = shown.held_for_review
    whole["screens"] = []
    whole["request"].pop("facts_digest")
    whole["facts"] = [each for each in whole["facts"] if not each["name"].startswith("screen.")]
    whole["obligations"] = [each for each in whole["obligations"] if each["id"] in duties]
    whole["missing"] = [each for each in whole["missing"] if not set(each["rules"]) <= hazard]
    for name in ("trace", "reasons", "warnings", "approvals"):
        whole[name] = [each for each in whole[name] if each["rule"] not in hazard]
    for each in whole["missing"]:
        each["rules"] = [rule for rule in each["rules"] if rule not in hazard]
    whole["conflicts"] = [
        {**each, "against": [rule for rule in each["against"] if rule not in hazard]}
        for each in whole["conflicts"]
    ]
    if whole["next_change"] is not None:
        kept = [rule for rule in whole["next_change"]["rules"] if rule not in hazard]
        whole["next_change"] = {**whole["next_change"], "rules": kept}
    return whole


def is_restricted(decision: Decision) -> bool:
    """Whether a hazard rule had a say, so that the whole record is for the hazard role alone."""
    return any(each.hazard for each in decision.reasons)


def general_record(decision: Decision, restricted: str) -> bytes:
    """The public record as RFC 8785 JSON, with the commitment to the whole one."""
    return canonical_bytes({**public_document(decision), "restricted": restricted})


def general_outcome(decision: Decision) -> Outcome:
    """The outcome for the general log and for users: a hazard always reads as a hold."""
    return explain(decision).outcome
