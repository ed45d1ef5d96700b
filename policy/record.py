"""What a decision says of itself: reasons, missing facts, record (docs/design/policy.md, 6)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from policy.approvals import Approval, Case, fault_of
from policy.canonical import canonical_bytes
from policy.evaluator import Evaluation, Evaluator, RuleResult
from policy.facts import sources_of
from policy.logic import LETTERS, AnyPath, Comparison, F, T, Truth, U
from policy.pack import Rule
from policy.paths import Start
from policy.terms import FACTS, Digest, Fact, Outcome, Unknown, Value

if TYPE_CHECKING:
    from policy.engine import Decision

FORMAT = "airgap/decision/1"
ENGINE = "airgap/policy"
ENGINE_VERSION = "1"
DEFAULT_DENY = "DEFAULT-DENY"

_MOST_QUESTIONS = 3  # larger sets are given whole instead of searched for a smallest one
_SEVERITY = ("deny", "needs_approval", "oblige", "permit")


@dataclass(frozen=True, slots=True)
class Reason:
    """One ground of the answer."""

    rule: str
    version: int
    effect: Outcome | None
    state: str
    plain: str
    citation: str
    source: str
    confidence: str
    verify_before_release: bool
    topic: str
    lifted: bool
    roles: tuple[str, ...]
    approvers: int

    @property
    def hazard(self) -> bool:
        """Whether it is kept from users."""
        return self.topic == "hazard"

    @property
    def blocks(self) -> bool:
        """Whether it stands in the way of work."""
        return self.effect in {Outcome.DENY, Outcome.NEEDS_APPROVAL} and not self.lifted


@dataclass(frozen=True, slots=True)
class Missing:
    """A set of answers that could settle these rules."""

    facts: tuple[str, ...]
    questions: tuple[str, ...]
    asked_of: tuple[str, ...]
    rules: tuple[str, ...]
    blocks: bool
    hazard: bool


@dataclass(frozen=True, slots=True)
class Change:
    """The outcome from `on` onwards, and the rules whose answer differs then."""

    on: date
    outcome: Outcome
    rules: tuple[str, ...]


def reasons_of(evaluation: Evaluation) -> tuple[Reason, ...]:
    """List the grounds, the strictest first and then by rule id."""
    found = [
        (_SEVERITY.index(each.effect), _reason(each)) for each in evaluation.results if each.effect
    ]
    if not any(each.effect == "permit" for each in evaluation.results):
        found.append((0, _default_deny(evaluation)))
    found.sort(key=lambda pair: (pair[1].lifted, pair[0], pair[1].rule))
    return tuple(reason for _, reason in found)


_OUTCOMES = {
    "deny": Outcome.DENY,
    "needs_approval": Outcome.NEEDS_APPROVAL,
    "oblige": Outcome.PERMIT_WITH_OBLIGATIONS,
    "permit": Outcome.PERMIT,
}


def _reason(result: RuleResult) -> Reason:
    text = result.rule.text
    override = text.override
    return Reason(
        rule=text.id,
        version=text.version,
        effect=_OUTCOMES[result.effect or "deny"],
        state=result.state,
        plain=text.plain,
        citation=text.citation.text,
        source=text.citation.source,
        confidence=text.confidence,
        verify_before_release=text.verify_before_release,
        topic=text.topic,
        lifted=result.lifted_by is not None,
        roles=override.roles if override.kind == "approval" else (),
        approvers=override.approvers if override.kind == "approval" else 0,
    )


def _default_deny(evaluation: Evaluation) -> Reason:
    permits = [each for each in evaluation.results if each.rule.text.effect == "permit"]
    names = ", ".join(each.rule.id for each in permits) or "none is loaded for this scope"
    return Reason(
        rule=DEFAULT_DENY,
        version=1,
        effect=Outcome.DENY,
        state="fired",
        plain=f"No permit rule matched ({names}); what is not permitted is denied.",
        citation="Institutional rule: allow by exception",
        source="institutional",
        confidence="policy",
        verify_before_release=False,
        topic="base",
        lifted=False,
        roles=(),
        approvers=0,
    )


# -- what is missing ------------------------------------------------------------------------------


def missing_of(evaluator: Evaluator, evaluation: Evaluation) -> tuple[Missing, ...]:
    """Find, for each unknown rule, the smallest set of answers that could settle it."""
    groups: dict[tuple[str, ...], list[RuleResult]] = {}
    for result in evaluation.results:
        permit = result.rule.text.effect == "permit"
        if result.state == "unknown" or (permit and result.value == U):
            asks = _smallest_set(evaluator, evaluation, result)
            if asks:
                groups.setdefault(asks, []).append(result)
    found = []
    for asks, results in groups.items():
        questions = [_question(evaluation, each) for each in asks]
        found.append(
            Missing(
                facts=asks,
                questions=tuple(words for words, _ in questions),
                asked_of=tuple(dict.fromkeys(role for _, role in questions)),
                rules=tuple(each.rule.id for each in results),
                blocks=any(_blocks(each) for each in results),
                hazard=all(each.rule.text.topic == "hazard" for each in results),
            )
        )
    return tuple(sorted(found, key=lambda each: (not each.blocks, len(each.facts), each.facts)))


def _blocks(result: RuleResult) -> bool:
    permit = result.rule.text.effect == "permit"
    return permit or (result.effect in {"deny", "needs_approval"} and result.lifted_by is None)


def _smallest_set(
    evaluator: Evaluator, evaluation: Evaluation, result: RuleResult
) -> tuple[str, ...]:
    asks: dict[str, list[int]] = {}
    for at in result.compiled.positions:
        if evaluation.values[at] == U:
            for ask in _asks(evaluator, at):
                asks.setdefault(ask, []).append(at)
    names = sorted(asks)
    if result.rule.text.effect == "permit":
        return tuple(names)  # a permit needs them all
    for size in range(1, min(_MOST_QUESTIONS, len(names)) + 1):
        for chosen in itertools.combinations(names, size):
            if _could_settle(
                evaluation, result, sorted({at for ask in chosen for at in asks[ask]})
            ):
                return chosen
    return tuple(names)


def _could_settle(evaluation: Evaluation, result: RuleResult, positions: Sequence[int]) -> bool:
    values = list(evaluation.values)
    for answers in itertools.product((F, T), repeat=min(len(positions), 8)):
        for at, answer in zip(positions, answers, strict=False):
            values[at] = answer
        if _value(result, values) != U:
            return True
    return False


def _value(result: RuleResult, values: Sequence[Truth]) -> Truth:
    compiled = result.compiled
    value = min(compiled.applies_when(values), compiled.when(values))
    return value if compiled.unless is None else min(value, T - compiled.unless(values))


def _asks(evaluator: Evaluator, at: int) -> tuple[str, ...]:
    """Name what a person would have to answer for this leaf."""
    leaf = evaluator.program.leaves[at]
    return (f"path {at}",) if isinstance(leaf, AnyPath) else sources_of(leaf.fact)


def _question(evaluation: Evaluation, ask: str) -> tuple[str, str]:
    if ask.startswith("path "):
        return evaluation.paths[int(ask.removeprefix("path "))].words, "research_security"
    spec = FACTS[ask]
    return spec.question, spec.asked_of


# -- when it changes ------------------------------------------------------------------------------


def next_change(evaluator: Evaluator, evaluation: Evaluation) -> Change | None:
    """Evaluate each later boundary day in order until the outcome differs."""
    for day in evaluator.boundaries():
        if day <= evaluation.day:
            continue
        later = evaluator.evaluate(day)
        if later.outcome != evaluation.outcome:
            changed = [
                after.rule.id
                for before, after in zip(evaluation.results, later.results, strict=True)
                if (before.effect, before.lifted_by) != (after.effect, after.lifted_by)
            ]
            return Change(day, later.outcome, tuple(changed))
    return None


# -- approvals that do nothing ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Idle:
    """An approval that lifts nothing here, and why."""

    approval: Approval
    rules: tuple[str, ...]
    reason: str


def idle_approvals(
    evaluator: Evaluator, evaluation: Evaluation, *, hazard_role: bool = False
) -> tuple[Idle, ...]:
    """List approvals without effect, those of this bundle and project first.

    What stands in the way of a hazard rule would tell what a screen found: those rules are left out
    without the role.
    """
    case = evaluator.case(evaluation.day)
    results = {each.rule.id: each for each in evaluation.results}
    loaded = {each.id: each for each in evaluator.packs.rules}
    at_work = {each.lifted_by.digest for each in evaluation.results if each.lifted_by}
    found = []
    for approval in evaluator.approvals.approvals:
        named = [
            each
            for each in sorted(approval.rules)
            if hazard_role or each not in loaded or loaded[each].text.topic != "hazard"
        ]
        if named and approval.digest not in at_work:
            reasons = [_idle_reason(approval, loaded.get(each), results, case) for each in named]
            found.append(Idle(approval, tuple(named), "; ".join(dict.fromkeys(reasons))))
    found.sort(key=lambda each: _distance(each.approval, case))
    return tuple(found)


def _distance(approval: Approval, case: Case) -> tuple[bool, bool, str]:
    return approval.bundle != case.bundle, approval.project != case.project, str(approval.digest)


def _idle_reason(
    approval: Approval, rule: Rule | None, results: Mapping[str, RuleResult], case: Case
) -> str:
    if rule is None:
        return "no such rule is loaded"
    fault = fault_of(approval, rule, case)
    if fault is not None:
        return fault
    result = results.get(rule.id)
    if result is None:
        return f"{rule.id} is not asked for {case.scope}"
    if result.lifted_by is not None:
        return f"{rule.id} is lifted by another approval, which lasts longer"
    if result.effect in {"deny", "needs_approval"}:
        return f"{rule.id} waits for a fact that is unknown, which no approval replaces"
    return f"{rule.id} does not stand in the way"


# -- the record -----------------------------------------------------------------------------------


def facts_of(evaluator: Evaluator, evaluation: Evaluation) -> dict[str, Fact]:
    """Every fact by name, with the age of the lists on that day."""
    facts = dict(evaluator.facts)
    facts["lists.max_age_days"] = evaluation.age
    return dict(sorted(facts.items()))


def document(decision: Decision) -> dict[str, Any]:
    """Build the record."""
    evaluator, evaluation = decision.evaluator, decision.evaluation
    request = evaluator.request
    facts = [_fact(name, fact) for name, fact in decision.facts.items()]
    starts = {name: _start(start) for name, start in sorted(evaluator.starts.items())}
    change = decision.next_change
    return {
        "format": FORMAT,
        "engine": {"name": ENGINE, "version": ENGINE_VERSION},
        "scope": str(request.scope),
        "outcome": str(decision.outcome),
        "summary": summary(decision),
        "as_of": decision.as_of.isoformat(),
        "as_of_source": request.day_source,
        "known_at": instant(decision.known_at),
        "packs": [
            {
                "pack_id": pack.pack_id,
                "version": pack.version,
                "status": pack.status,
                "digest": str(pack.digest),
                "canonical_digest": str(pack.canonical_digest),
            }
            for pack in sorted(evaluator.packs.packs, key=lambda each: each.pack_id)
        ],
        "lists": [
            {
                "list_id": list_id,
                "edition": snapshot.text.edition if snapshot else None,
                "complete": snapshot.text.complete if snapshot else False,
                "dated": snapshot.dated.isoformat() if snapshot else None,
                "digest": str(snapshot.digest) if snapshot else None,
            }
            for list_id, snapshot in evaluator.held.items()
        ],
        "registry": {
            "version": evaluator.lineage.version,
            "digest": str(evaluator.lineage.digest),
        },
        "request": {
            "person": request.submitter,
            "project": request.project,
            "bundle": str(request.bundle) if request.bundle else None,
            "task": request.task,
            "facts_digest": str(Digest.of(canonical_bytes({"facts": facts, "starts": starts}))),
        },
        "facts": facts,
        "starts": starts,
        "trace": [_trace(evaluator, evaluation, each) for each in evaluation.results],
        "reasons": [_reason_document(each) for each in decision.reasons],
        "obligations": [
            {**duty.model_dump(mode="json"), "state": "open"} for duty in decision.obligations
        ],
        "missing": [
            {
                "facts": [_ask_name(evaluator, each) for each in missing.facts],
                "questions": list(missing.questions),
                "asked_of": list(missing.asked_of),
                "rules": list(missing.rules),
                "blocks": missing.blocks,
            }
            for missing in decision.missing
        ],
        "warnings": warnings_of(evaluation),
        "conflicts": _conflicts(evaluation),
        "next_change": None
        if change is None
        else {
            "on": change.on.isoformat(),
            "outcome": str(change.outcome),
            "rules": list(change.rules),
        },
        "approvals": _approvals(evaluation),
        "screens": [dict(sorted(each.items())) for each in request.screens],
    }


def summary(decision: Decision) -> str:
    """One line: the outcome, what decided it, and whether those rules await verification."""
    first = decision.reasons[0].effect if decision.reasons else None
    deciding = [each.rule for each in decision.reasons if each.effect is first and not each.lifted]
    marked = [each.rule for each in decision.reasons if each.verify_before_release]
    note = f"; to verify before release: {', '.join(marked)}" if marked else ""
    return f"{decision.outcome} by {', '.join(deciding) or 'nothing'}{note}"


def warnings_of(evaluation: Evaluation) -> list[dict[str, str]]:
    """Rules that are not in force yet, apply, and have announced themselves."""
    found = []
    for result in evaluation.results:
        text = result.rule.text
        begins = [
            window.start
            for window in text.valid
            if window.start is not None and window.start > evaluation.day
        ]
        announced = text.warn_from is not None and text.warn_from <= evaluation.day
        if result.state == "not_in_force" and announced and result.value != F and begins:
            found.append(
                {
                    "rule": text.id,
                    "from": min(begins).isoformat(),
                    "effect": text.effect if result.value == T else text.on_unknown,
                    "plain": text.plain,
                }
            )
    return found


def instant(moment: datetime) -> str:
    """RFC 3339 in UTC, to the microsecond."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _fact(name: str, fact: Fact) -> dict[str, Any]:
    if isinstance(fact, Unknown):
        known: dict[str, Any] = {"unknown": fact.reason}
    else:
        known = {
            "value": plain_value(fact.value),
            "asserted_by": fact.asserted_by,
            "asserted_on": fact.asserted_on.isoformat() if fact.asserted_on else None,
            "evidence": str(fact.evidence) if fact.evidence else None,
        }
    return {"name": name, **known, "source": fact.source, "derivation": list(fact.derivation)}


def plain_value(value: Value) -> bool | int | str | list[str]:
    """JSON form of a fact's value."""
    if isinstance(value, frozenset):
        return sorted(value)
    return value.isoformat() if isinstance(value, date) else value


def _start(start: Start) -> dict[str, Any]:
    origins = [
        {"relation": each.relation, "party": each.party, "sure": each.sure, "source": each.source}
        for each in start.origins
    ]
    origins.sort(key=lambda each: (str(each["relation"]), str(each["party"]), str(each["source"])))
    return {"origins": origins, "unknown": dict(sorted(start.unknown.items()))}


def _trace(evaluator: Evaluator, evaluation: Evaluation, result: RuleResult) -> dict[str, Any]:
    return {
        "rule": result.rule.id,
        "version": result.rule.text.version,
        "state": result.state,
        "value": LETTERS[result.value],
        "effect": result.effect,
        "lifted_by": str(result.lifted_by.digest) if result.lifted_by else None,
        "leaves": list(leaves_of(evaluator, evaluation, result)),
    }


def leaves_of(
    evaluator: Evaluator, evaluation: Evaluation, result: RuleResult
) -> Iterator[dict[str, Any]]:
    """Describe each leaf of a rule: its words, its value, its fact or the path that decided it."""
    for at in result.compiled.positions:
        leaf = evaluator.program.leaves[at]
        entry: dict[str, Any] = {"leaf": str(leaf), "value": LETTERS[evaluation.values[at]]}
        if isinstance(leaf, Comparison):
            entry["fact"] = leaf.fact
        else:
            path = evaluation.paths[at]
            entry["found"] = path.words
            entry["hops"] = [[hop.relation, hop.party, hop.by] for hop in path.hops]
        yield entry


def _ask_name(evaluator: Evaluator, ask: str) -> str:
    if ask.startswith("path "):
        return str(evaluator.program.leaves[int(ask.removeprefix("path "))])
    return ask


def _reason_document(reason: Reason) -> dict[str, Any]:
    return {
        "rule": reason.rule,
        "version": reason.version,
        "effect": str(reason.effect) if reason.effect else None,
        "state": f"{reason.state}, overridden" if reason.lifted else reason.state,
        "plain": reason.plain,
        "citation": reason.citation,
        "source": reason.source,
        "confidence": reason.confidence,
        "verify_before_release": reason.verify_before_release,
        "roles": list(reason.roles),
        "approvers": reason.approvers,
    }


def _conflicts(evaluation: Evaluation) -> list[dict[str, list[str]]]:
    permits = [each.rule.id for each in evaluation.results if each.effect == "permit"]
    against = [
        each.rule.id
        for each in evaluation.results
        if each.effect in {"deny", "needs_approval"} and each.lifted_by is None
    ]
    return [{"permit": permits, "against": against}] if permits and against else []


def _approvals(evaluation: Evaluation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for result in evaluation.results:
        approval = result.lifted_by
        if approval is not None:
            found.append(
                {
                    "rule": result.rule.id,
                    "digest": str(approval.digest),
                    "approvers": sorted(each.person for each in approval.approvers),
                    "expires": approval.expires.isoformat(),
                    "reason": approval.reason,
                    **({"break_glass": True} if approval.break_glass else {}),
                }
            )
    return found
