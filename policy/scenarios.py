"""Golden scenarios as written in a pack (docs/design/policy.md, 3 and 15).

A scenario says what one rule answers to given facts on a day. Scenarios of one rule share what they
have in common; each then changes one thing. Whatever a set of facts does not name is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from policy.strict import Day, Frozen, Name, Path, Source, Words, parse_day
from policy.terms import FACTS, RELATIONS, STARTS, Kind, Outcome, Scope, Value, unknown_name

SELF = "self"  # relation of a start that is the party itself
MAX_CASES = 10_000
MAX_PARTIES = 64

State = Literal["not_in_force", "not_applicable", "not_fired", "fired", "unknown"]
Facts = dict[str, Any]
Starts = dict[str, dict[str, list[Words]]]


class FactSetText(Frozen):
    """Facts that many scenarios share, and the parties at which paths start."""

    id: Name
    scope: Literal["admission", "use"]
    facts: Facts
    starts: Starts = Field(strict=False)


class CaseText(Frozen):
    """One change and the answer to it; without `as_of` on the day on which the pack was made."""

    title: Words
    as_of: Day | None = None
    given: Facts = Field(default_factory=dict, alias="with")
    unknown: tuple[str, ...] = Field(default=(), strict=False)
    starts: Starts = Field(default_factory=dict, strict=False)
    nothing_known: tuple[str, ...] = Field(default=(), strict=False)
    expect: State
    outcome: Literal["deny", "needs_approval", "permit_with_obligations", "permit"] | None = None


class ScenarioText(Frozen):
    """The scenarios of one rule over one set of facts."""

    rule: Name | str
    over: Name
    given: Facts = Field(default_factory=dict, alias="with")
    starts: Starts = Field(default_factory=dict, strict=False)
    cases: tuple[CaseText, ...] = Field(min_length=1, max_length=MAX_CASES, strict=False)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What `rule` answers to these facts on a day.

    Args:
        starts: Start name -> relation -> parties; a start that is absent is not known at all.
        outcome: Of all shipped rules together; None where only the rule is of interest.

    """

    rule: str
    title: str
    scope: Scope
    as_of: date
    facts: Mapping[str, Value]
    starts: Mapping[str, Mapping[str, list[str]]]
    expect: str
    outcome: Outcome | None

    @property
    def key(self) -> str:
        """Its name: unique in a pack."""
        return f"{self.rule} [{self.scope}] {self.title}, {self.as_of}"


def expand(
    source: Source,
    fact_sets: tuple[FactSetText, ...],
    scenarios: tuple[ScenarioText, ...],
    prepared_on: date,
) -> tuple[Scenario, ...]:
    """Check every name and value, and spell each scenario out.

    Raises:
        RefusedError: `pack.vocabulary` or `pack.duplicate`, with line and column.

    """
    bases: dict[str, tuple[Scope, dict[str, Value], Starts]] = {}
    for at, each in enumerate(fact_sets):
        path: Path = ("fact_sets", at)
        if each.id in bases:
            raise source.refusal(
                "pack.duplicate", (*path, "id"), f"fact set {each.id} stands twice"
            )
        facts = _facts(source, (*path, "facts"), each.facts)
        _check_starts(source, (*path, "starts"), each.starts)
        bases[each.id] = (Scope(each.scope), facts, each.starts)
    found: list[Scenario] = []
    seen: set[str] = set()
    for at, group in enumerate(scenarios):
        path = ("scenarios", at)
        base = bases.get(group.over)
        if base is None:
            raise source.refusal(
                "pack.vocabulary", (*path, "over"), f"no fact set is called {group.over!r:.60}"
            )
        scope, facts, starts = base
        facts = facts | _facts(source, (*path, "with"), group.given)
        _check_starts(source, (*path, "starts"), group.starts)
        starts = starts | group.starts
        for number, case in enumerate(group.cases):
            where: Path = (*path, "cases", number)
            scenario = _spell_out(
                source, where, group.rule, case, scope=scope, facts=facts, starts=starts
            )
            day = case.as_of or prepared_on
            made = Scenario(group.rule, case.title, scope, day, *scenario)
            if made.key in seen:
                raise source.refusal("pack.duplicate", where, f"scenario {made.key} stands twice")
            seen.add(made.key)
            found.append(made)
    return tuple(found)


def _spell_out(
    source: Source,
    where: Path,
    rule: str,
    case: CaseText,
    *,
    scope: Scope,
    facts: dict[str, Value],
    starts: Starts,
) -> tuple[Mapping[str, Value], Mapping[str, Mapping[str, list[str]]], str, Outcome | None]:
    whole = facts | _facts(source, (*where, "with"), case.given)
    for number, name in enumerate(case.unknown):
        if name not in whole:
            raise source.refusal(
                "pack.vocabulary",
                (*where, "unknown", number),
                f"{rule}: {name!r:.60} is not among the facts of this scenario ({scope})",
            )
        del whole[name]
    _check_starts(source, (*where, "starts"), case.starts)
    paths = starts | case.starts
    for number, name in enumerate(case.nothing_known):
        if name not in paths:
            raise source.refusal(
                "pack.vocabulary",
                (*where, "nothing_known", number),
                f"{name!r:.60} is not among the starts of this scenario",
            )
        paths = {each: value for each, value in paths.items() if each != name}
    outcome = None if case.outcome is None else Outcome(case.outcome)
    return MappingProxyType(whole), MappingProxyType(paths), case.expect, outcome


def _facts(source: Source, path: Path, facts: Facts) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, plain in facts.items():
        spec = FACTS.get(name)
        if spec is None:
            raise source.refusal("pack.vocabulary", (*path, name), unknown_name(name, FACTS))
        if spec.derived:
            raise source.refusal(
                "pack.vocabulary", (*path, name), f"{name} is computed by the engine"
            )
        value: object = plain
        if spec.kind is Kind.DATE:
            value = parse_day(plain)
        elif spec.kind is Kind.SET and isinstance(plain, list):
            value = frozenset(each if isinstance(each, str) else repr(each) for each in plain)
        fault = spec.fault(value)
        if fault:
            raise source.refusal("pack.vocabulary", (*path, name), f"{name}: {fault}")
        found[name] = value  # type: ignore[assignment]
    return found


def _check_starts(source: Source, path: Path, starts: Starts) -> None:
    for name, relations in starts.items():
        if name not in STARTS - {"bundle_and_bases"}:
            raise source.refusal(
                "pack.vocabulary", (*path, name), f"no path starts at {name!r:.40}"
            )
        for relation, parties in relations.items():
            if relation not in RELATIONS | {SELF}:
                raise source.refusal(
                    "pack.vocabulary",
                    (*path, name, relation),
                    f"no relation is called {relation!r:.40}",
                )
            if len(parties) > MAX_PARTIES:
                raise source.refusal(
                    "pack.limit", (*path, name, relation), f"more than {MAX_PARTIES} parties"
                )
