"""Conditions of a rule, from plain values to typed trees (docs/design/policy.md, 3).

Both sides of every comparison are checked here, when the pack loads: at evaluation a type error
cannot occur.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from policy.logic import All, AnyPath, Comparison, Condition, Not
from policy.logic import Any as AnyOf
from policy.strict import Frozen, Name, Path, Source, parse_day
from policy.terms import (
    FACTS,
    MAKER_RELATIONS,
    RELATIONS,
    STARTS,
    Kind,
    Value,
    unknown_name,
)

_COMPARISONS: Mapping[str, frozenset[Kind]] = MappingProxyType(
    {
        "eq": frozenset({Kind.BOOL, Kind.INT, Kind.DATE, Kind.ENUM}),
        "in": frozenset({Kind.ENUM}),
        "contains": frozenset({Kind.SET}),
        "intersects": frozenset({Kind.SET}),
        "lt": frozenset({Kind.INT}),
        "lte": frozenset({Kind.INT}),
        "gt": frozenset({Kind.INT}),
        "gte": frozenset({Kind.INT}),
        "before": frozenset({Kind.DATE}),
        "on_or_after": frozenset({Kind.DATE}),
    }
)


def parse_condition(
    source: Source, path: Path, value: object, *, positive: bool = True
) -> Condition:
    """Parse one condition; depth is bounded by the YAML reader."""
    if not isinstance(value, dict) or len(value) != 1:
        raise source.refusal(
            "pack.vocabulary", path, f"a condition is a mapping with one form, found {value!r:.60}"
        )
    form, body = next(iter(value.items()))
    path = (*path, form)
    if form in _COMPARISONS:
        return _comparison(source, path, form, body)
    match form:
        case "all" | "any":
            if not isinstance(body, list):
                raise source.refusal("pack.vocabulary", path, f"{form} takes a list of conditions")
            if form == "any" and not body:
                raise source.refusal("pack.vocabulary", path, "an empty `any` is never true")
            parts = tuple(
                parse_condition(source, (*path, at), part, positive=positive)
                for at, part in enumerate(body)
            )
            return All(parts) if form == "all" else AnyOf(parts)
        case "not":
            return Not(parse_condition(source, path, body, positive=False))
        case "any_path":
            if not positive:
                raise source.refusal(
                    "pack.vocabulary", path, "any_path may not stand under `not` or in `unless`"
                )
            return _any_path(source, path, body)
    forms = ", ".join(sorted((*_COMPARISONS, "all", "any", "not", "any_path")))
    raise source.refusal(
        "pack.vocabulary", path, f"no form is called {form!r:.40}; there are {forms}"
    )


def _comparison(source: Source, path: Path, form: str, body: object) -> Comparison:
    if not isinstance(body, list) or len(body) != 2 or not isinstance(body[0], str):  # noqa: PLR2004 - a pair
        raise source.refusal(
            "pack.vocabulary", path, f"{form} takes [fact, value], found {body!r:.60}"
        )
    fact, operand = body
    spec = FACTS.get(fact)
    if spec is None:
        raise source.refusal("pack.vocabulary", (*path, 0), unknown_name(fact, FACTS))
    if spec.kind not in _COMPARISONS[form]:
        raise source.refusal(
            "pack.vocabulary", path, f"{form} does not fit {fact}, a {spec.kind} fact"
        )
    if form in {"in", "intersects"}:
        members = _names(source, (*path, 1), operand)
        for member in sorted(members):
            fault = spec.fault_of_member(member)
            if fault:
                raise source.refusal("pack.vocabulary", (*path, 1), f"{fact}: {fault}")
        return Comparison(form, fact, members)
    literal: Value = parse_day(operand) if spec.kind is Kind.DATE else operand  # type: ignore[assignment]
    fault = spec.fault_of_member(literal) if form == "contains" else spec.fault(literal)
    if fault:
        raise source.refusal("pack.vocabulary", (*path, 1), f"{fact}: {fault}")
    return Comparison(form, fact, literal)


class _AnyPathText(Frozen):
    start: str = Field(alias="from")
    via: tuple[str, ...] = Field(min_length=1, strict=False)
    hits_list: Name | None = None
    domicile_in: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$")], ...] | None = (
        Field(default=None, min_length=1, strict=False)
    )
    basis: Literal["published", "released"] | None = None


def _any_path(source: Source, path: Path, body: object) -> AnyPath:
    text = source.build_part(_AnyPathText, path, body)
    problem = _fault_of_path(text)
    if problem:
        raise source.refusal("pack.vocabulary", path, f"any_path: {problem}")
    return AnyPath(
        start=text.start,
        via=frozenset(text.via),
        hits_list=text.hits_list,
        domicile_in=None if text.domicile_in is None else frozenset(text.domicile_in),
        basis=text.basis,
    )


_FIRST_STEPS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "bundle": MAKER_RELATIONS,
        "base_bundles": MAKER_RELATIONS,
        "bundle_and_bases": MAKER_RELATIONS,
        "personnel": frozenset({"affiliated_with"}),
        "counterparty": frozenset(),  # these start at the party itself
        "recipient": frozenset(),
    }
)


def _fault_of_path(text: _AnyPathText) -> str | None:
    via = set(text.via)
    if text.start not in STARTS:
        return f"no path starts at {text.start!r:.40}; one of {', '.join(sorted(STARTS))}"
    if strange := via - RELATIONS:
        return f"no relation is called {min(strange)!r:.40}; one of {', '.join(sorted(RELATIONS))}"
    if (text.hits_list is None) == (text.domicile_in is None):
        return "give one of hits_list and domicile_in"
    if (text.hits_list is None) != (text.basis is None):
        return "basis goes with hits_list, and only with it"
    return _fault_of_first_step(text.start, via)


def _fault_of_first_step(start: str, via: set[str]) -> str | None:
    first = _FIRST_STEPS[start]
    if first and not via & first:
        return f"nothing leaves {start} by these relations"
    stray = via & (MAKER_RELATIONS | {"affiliated_with"}) - first
    return f"{min(stray)} does not leave {start}" if stray else None


def _names(source: Source, path: Path, value: object) -> frozenset[str]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise source.refusal("pack.vocabulary", path, "expected a list of names that is not empty")
    if len(set(value)) != len(value):
        raise source.refusal("pack.vocabulary", path, "a name stands twice")
    return frozenset(value)
