"""Scenarios of a pack are played, and its rules are broken on purpose to see that one notices.

Obeys docs/design/policy.md, 15. Pure, like the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time
from types import MappingProxyType

from policy.approvals import Approvals
from policy.engine import NO_APPROVALS, Decision, decide
from policy.evaluator import Request
from policy.lineage import Registry
from policy.logic import All, Condition, Not, leaves
from policy.logic import Any as AnyOf
from policy.pack import Packs, PolicyPack, Rule, Window, combine
from policy.paths import Origin, Start
from policy.scenarios import Scenario
from policy.snapshots import Snapshots
from policy.strict import shift_day
from policy.terms import Known, Outcome

_SOURCE = "scenario"


@dataclass(frozen=True, slots=True)
class World:
    """What a scenario is played against, beside the rules."""

    lists: Snapshots
    registry: Registry


@dataclass(frozen=True, slots=True)
class Played:
    """A scenario and what came of it."""

    scenario: Scenario
    state: str
    outcome: Outcome

    @property
    def holds(self) -> bool:
        """Whether the rule answered as the pack says, and the rules together too."""
        expected = self.scenario.outcome
        return self.state == self.scenario.expect and expected in {None, self.outcome}

    @property
    def words(self) -> str:
        """What was expected and found, for a reader."""
        scenario = self.scenario
        expected = f"{scenario.expect}" + (f" ({scenario.outcome})" if scenario.outcome else "")
        return f"{scenario.key}: expected {expected}, found {self.state} ({self.outcome})"


def request_of(scenario: Scenario) -> Request:
    """The question that a scenario asks."""
    return Request(
        scope=scenario.scope,
        facts={name: Known(value, _SOURCE) for name, value in scenario.facts.items()},
        starts={
            name: Start(
                tuple(
                    Origin(relation, party, sure=True, source=_SOURCE)
                    for relation, parties in sorted(relations.items())
                    for party in parties
                ),
                MappingProxyType({}),
            )
            for name, relations in scenario.starts.items()
        },
        day_source=_SOURCE,
    )


def ask(
    scenario: Scenario,
    packs: Packs,
    world: World,
    *,
    known_on: date,
    as_of: date | None = None,
    approvals: Approvals = NO_APPROVALS,
) -> Decision:
    """Decide the question of a scenario, with what was held on `known_on` or its day, the later."""
    day = as_of or scenario.as_of
    known_at = datetime.combine(max(day, known_on), time(12), UTC)
    return decide(
        request_of(scenario),
        packs,
        world.lists,
        world.registry,
        approvals,
        as_of=day,
        known_at=known_at,
    )


def play(
    scenarios: Iterable[Scenario], packs: Packs, world: World, known_on: date
) -> Iterator[Played]:
    """Play scenarios under all rules together."""
    for scenario in scenarios:
        decision = ask(scenario, packs, world, known_on=known_on)
        yield Played(scenario, state_of(decision, scenario.rule), decision.outcome)


def state_of(decision: Decision, rule: str) -> str:
    """What a rule answered; `absent` where the scope has no such rule."""
    found = (each.state for each in decision.results if each.rule.id == rule)
    return next(found, "absent")


# -- rules broken on purpose ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mutant:
    """A rule with one thing changed that a scenario has to notice."""

    rule: Rule
    change: str


def mutants(rule: Rule) -> Iterator[Mutant]:
    """Drop and negate each leaf, move each date by a day, weaken or swap the effect."""
    for number, changed, words in _changed(rule.applies_when):
        yield Mutant(replace(rule, applies_when=changed), f"applies_when, leaf {number}: {words}")
    for number, changed, words in _changed(rule.when):
        yield Mutant(replace(rule, when=changed), f"when, leaf {number}: {words}")
    if rule.unless is not None:
        for number, changed, words in _changed(rule.unless):
            yield Mutant(replace(rule, unless=changed), f"unless, leaf {number}: {words}")
    for at, window in enumerate(rule.text.valid):
        for field, day in (("start", window.start), ("end", window.end)):
            if day is not None:
                for step in (-1, 1):
                    moved = window.model_copy(update={field: shift_day(day, step)})
                    valid = (*rule.text.valid[:at], moved, *rule.text.valid[at + 1 :])
                    yield Mutant(
                        _with_text(rule, valid=valid), f"valid {day}: moved by {step:+d} day"
                    )
    for effect, on_unknown in _OTHER_EFFECTS[rule.text.effect]:
        changed_rule = _with_text(rule, effect=effect, on_unknown=on_unknown)
        yield Mutant(changed_rule, f"effect {effect}, on_unknown {on_unknown}")


_OTHER_EFFECTS = {
    "deny": (("needs_approval", "needs_approval"), ("permit", "not_matched")),
    "needs_approval": (("deny", "deny"), ("permit", "not_matched")),
    "oblige": (("needs_approval", "needs_approval"), ("permit", "not_matched")),
    "permit": (("deny", "deny"), ("oblige", "oblige")),
}


def _with_text(rule: Rule, **changes: str | tuple[Window, ...]) -> Rule:
    return replace(rule, text=rule.text.model_copy(update=changes))


def _changed(condition: Condition) -> Iterator[tuple[int, Condition, str]]:
    """Every condition in which one leaf is dropped or negated."""
    for number, leaf in enumerate(leaves(condition)):
        dropped = _rebuilt(condition, number, drop=True)
        yield number, All(()) if dropped is None else dropped, f"dropped {leaf}"
        negated = _rebuilt(condition, number, drop=False)
        yield number, All(()) if negated is None else negated, f"negated {leaf}"


def _count(condition: Condition) -> int:
    match condition:
        case All(parts) | AnyOf(parts):
            return sum(map(_count, parts))
        case Not(part):
            return _count(part)
        case _:
            return 1


def _rebuilt(condition: Condition, number: int, *, drop: bool) -> Condition | None:
    """`condition` with leaf `number` gone or negated; None where nothing is left of it."""
    match condition:
        case All(parts) | AnyOf(parts):
            kept: list[Condition] = []
            for part in parts:
                size = _count(part)
                if 0 <= number < size:
                    changed = _rebuilt(part, number, drop=drop)
                    if changed is not None:
                        kept.append(changed)
                else:
                    kept.append(part)
                number -= size
            if isinstance(condition, All):
                return All(tuple(kept))
            return AnyOf(tuple(kept)) if kept else None
        case Not(part):
            changed = _rebuilt(part, number, drop=drop)
            return None if changed is None else Not(changed)
        case _:
            return None if drop else Not(condition)


def survivors(pack: PolicyPack, packs: Sequence[PolicyPack], world: World) -> Iterator[Mutant]:
    """Yield each changed rule of `pack` that none of its own scenarios notices."""
    others = [each for each in packs if each.pack_id != pack.pack_id]
    for rule in pack.rules:
        own = [each for each in pack.scenarios if each.rule == rule.id]
        rest = tuple(each for each in pack.rules if each.id != rule.id)
        expected = _answers(own, combine([*others, pack]), world, pack.prepared_on)
        for mutant in mutants(rule):
            changed = replace(pack, rules=(*rest, mutant.rule))
            found = _answers(own, combine([*others, changed]), world, pack.prepared_on)
            if found == expected:
                yield mutant


def _answers(
    scenarios: Iterable[Scenario], packs: Packs, world: World, known_on: date
) -> list[tuple[str, str | None]]:
    """State and effect of the rule in each scenario."""
    found: list[tuple[str, str | None]] = []
    for scenario in scenarios:
        decision = ask(scenario, packs, world, known_on=known_on)
        results = [each for each in decision.results if each.rule.id == scenario.rule]
        found.append((results[0].state, results[0].effect) if results else ("absent", None))
    return found
