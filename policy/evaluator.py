"""Every rule of a scope on one day, and the effects combined (docs/design/policy.md, 4 and 5).

Pure: the same values in give the same evaluation out on any machine. No exception is caught here; a
defect surfaces as a fault and callers fail closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import repeat
from typing import Literal, NamedTuple

from policy.approvals import Approval, Approvals, Case
from policy.errors import RefusedError
from policy.facts import check_facts, complete_facts, list_age
from policy.lineage import Registry
from policy.logic import AnyPath, Comparison, F, T, Truth, compare
from policy.pack import DUES, CompiledRule, Obligation, Packs, Program, Rule
from policy.paths import PathResult, Start, Walks, boundaries, path_finder
from policy.snapshots import ListSnapshot, Snapshots
from policy.terms import STARTS, Digest, Fact, Outcome, Scope

_AGE = "lists.max_age_days"

State = Literal["not_in_force", "not_applicable", "not_fired", "fired", "unknown"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked.

    Args:
        submitter: Person who asks; an approver must be somebody else.
        leads: Principal investigators of the project.
        facts: Supplied facts by registered name; an absent one is unknown.
        starts: First steps of lineage paths by start name; an absent one is unknown.
        screens: What the hazard screens report of themselves, for the record.
        day_source: Where the legal day came from, for the record.

    """

    scope: Scope
    bundle: Digest | None = None
    project: str | None = None
    task: str | None = None
    submitter: str | None = None
    leads: frozenset[str] = frozenset()
    facts: Mapping[str, Fact] = field(default_factory=dict)
    starts: Mapping[str, Start] = field(default_factory=dict)
    screens: tuple[Mapping[str, str | int | None], ...] = ()
    day_source: str = "caller"


class RuleResult(NamedTuple):
    """One rule in one evaluation; `effect` is None when it contributes nothing."""

    compiled: CompiledRule
    state: State
    value: Truth
    effect: str | None
    lifted_by: Approval | None

    @property
    def rule(self) -> Rule:
        """The rule as loaded."""
        return self.compiled.rule


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All rules of a scope on one day."""

    day: date
    values: tuple[Truth, ...]
    paths: Mapping[int, PathResult]
    age: Fact
    results: tuple[RuleResult, ...]
    outcome: Outcome
    obligations: tuple[Obligation, ...]


class Evaluator:
    """A request held against rules, lists, lineage and approvals; only the day varies."""

    def __init__(
        self,
        request: Request,
        *,
        packs: Packs,
        lists: Snapshots,
        lineage: Registry,
        approvals: Approvals,
        known_at: datetime,
    ) -> None:
        if known_at.tzinfo is None:
            raise RefusedError("policy.request", "known_at needs a time zone")
        check_facts(request.facts)
        if strange := set(request.starts) - (STARTS - {"bundle_and_bases"}):
            raise RefusedError("policy.request", f"no path starts at {min(strange)!r:.60}")
        self.request = request
        self.packs = packs
        self.lineage = lineage.known_by(known_at)
        self.approvals = approvals
        self.known_at = known_at
        self.program: Program = packs.programs[request.scope]
        held = _held(lists, packs.list_ids, known_at.astimezone(UTC).date())
        self.held: dict[str, ListSnapshot | None] = dict(held)
        self.facts = complete_facts(request.facts, self.program.fact_names, packs)
        self.starts = _starts(request)
        self._finder = path_finder(self.lineage, held)
        self._fixed = [F] * len(self.program.leaves)
        for at, leaf in self.program.still:
            self._fixed[at] = compare(leaf, self.facts[leaf.fact])

    def evaluate(self, day: date) -> Evaluation:
        """Evaluate every rule in scope as of `day`."""
        age = list_age(self.held.values(), day)
        values, paths = list(self._fixed), {}
        walks = Walks(self._finder, day)
        for at in self.program.moving:
            leaf = self.program.leaves[at]
            if isinstance(leaf, AnyPath):
                paths[at] = self._finder.find(leaf, self.starts[leaf.start], day, walks)
                values[at] = paths[at].truth
            else:
                values[at] = compare(leaf, age)
        results = tuple(
            map(
                self._result,
                self.program.rules,
                _in_force(self.program, day),
                repeat((values, day)),
            )
        )
        outcome, obligations = combine_effects(results)
        return Evaluation(day, tuple(values), paths, age, results, outcome, obligations)

    def _result(
        self,
        compiled: CompiledRule,
        in_force: bool,
        at: tuple[Sequence[Truth], date],
    ) -> RuleResult:
        values, day = at
        applies = compiled.applies_when(values)
        value = min(applies, compiled.when(values))
        if compiled.unless is not None:
            value = min(value, T - compiled.unless(values))
        if not in_force:
            return RuleResult(compiled, "not_in_force", value, None, None)
        if applies == F:
            return RuleResult(compiled, "not_applicable", value, None, None)
        if value == F:
            return RuleResult(compiled, "not_fired", value, None, None)
        text = compiled.rule.text
        effect = text.effect if value == T else text.on_unknown
        state: State = "fired" if value == T else "unknown"
        if effect in {"deny", "needs_approval"} and self.approvals.approvals:
            return RuleResult(compiled, state, value, effect, self._lifting(compiled, state, day))
        return RuleResult(compiled, state, value, None if effect == "not_matched" else effect, None)

    def _lifting(self, compiled: CompiledRule, state: State, day: date) -> Approval | None:
        """An unknown is settled by supplying the fact; only a plain review is lifted regardless."""
        text = compiled.rule.text
        if state == "unknown" and (text.statutory or text.on_unknown == "deny"):
            return None
        return self.approvals.lifting(compiled.rule, self.case(day))

    def case(self, day: date) -> Case:
        """What approvals are held against on `day`."""
        request = self.request
        return Case(
            scope=request.scope,
            bundle=request.bundle,
            project=request.project,
            task=request.task,
            submitter=request.submitter,
            leads=request.leads,
            as_of=day,
            known_at=self.known_at,
        )

    def boundaries(self) -> list[date]:
        """Every day on which something that this evaluation reads begins or ends, in order."""
        found: set[date | None] = set(boundaries(self.lineage, self.held.values()))
        for compiled in self.program.rules:
            for window in compiled.rule.text.valid:
                found |= {window.start, window.end}
        limits = [
            leaf.operand
            for leaf in self.program.leaves
            if isinstance(leaf, Comparison) and leaf.fact == _AGE and isinstance(leaf.operand, int)
        ]
        for snapshot in self.held.values():
            if snapshot is not None:
                for limit in limits:
                    found |= _after(snapshot.dated, limit, limit + 1)
        for approval in self.approvals.approvals:
            found |= {approval.issued.date(), approval.expires}
        return sorted(day for day in found if day is not None)


@lru_cache(maxsize=64)
def _held(
    lists: Snapshots, list_ids: frozenset[str], known_on: date
) -> tuple[tuple[str, ListSnapshot | None], ...]:
    """The edition of each list that was held on that day, in the order of list ids."""
    return tuple((each, lists.held_on(each, known_on)) for each in sorted(list_ids))


@lru_cache(maxsize=256)
def _in_force(program: Program, day: date) -> tuple[bool, ...]:
    """Which of the rules of this very program are in force on `day`."""
    return tuple(each.rule.in_force(day) for each in program.rules)


def _after(day: date, *offsets: int) -> set[date]:
    """Days at these offsets, as far as the calendar goes."""
    room = (date.max - day).days
    return {day + timedelta(days=each) for each in offsets if abs(each) <= min(room, 100_000)}


_NOTHING = Start.nothing_known()


def _starts(request: Request) -> dict[str, Start]:
    starts = {}
    for each in STARTS:
        start = request.starts.get(each, _NOTHING)
        starts[each] = Start(tuple(sorted(start.origins)), start.unknown)
    starts["bundle_and_bases"] = starts["bundle"].united(starts["base_bundles"])
    return starts


def combine_effects(
    results: Iterable[RuleResult],
) -> tuple[Outcome, tuple[Obligation, ...]]:
    """Combine: deny, then hold, then permit; without a matched permit rule the answer is deny."""
    effects: set[str] = set()
    duties: dict[str, Obligation] = {}
    for result in results:
        if result.effect is None:
            continue
        if result.lifted_by is None:
            effects.add(result.effect)
        else:
            _merge(duties, _review_duty(result.rule, result.lifted_by))
        for duty in result.rule.text.obligations:
            _merge(duties, duty)
    obligations = tuple(duties[each] for each in sorted(duties))
    if "deny" in effects or "permit" not in effects:
        return Outcome.DENY, obligations
    if "needs_approval" in effects:
        return Outcome.NEEDS_APPROVAL, obligations
    return (Outcome.PERMIT_WITH_OBLIGATIONS if obligations else Outcome.PERMIT), obligations


def _merge(duties: dict[str, Obligation], duty: Obligation) -> None:
    """One duty once; the earliest due date wins."""
    before = duties.get(duty.id)
    if before is None or DUES.index(duty.due) < DUES.index(before.due):
        duties[duty.id] = duty


def _review_duty(rule: Rule, approval: Approval) -> Obligation:
    if approval.break_glass:
        return Obligation(
            id=f"after-review-{rule.id.lower()}",
            text=f"Break-glass of {rule.id}: a person who did not sign it reviews it and signs the"
            " finding.",
            owner=rule.text.owner,
            due="standing",
        )
    return Obligation(
        id=f"review-{rule.id.lower()}",
        text=f"Review the approval of {rule.id} before it expires on {approval.expires}.",
        owner=rule.text.owner,
        due="standing",
    )
