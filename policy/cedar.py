"""The two-valued part of the rules as Cedar policies and a schema (docs/design/policy.md, 14).

An export for tools that read Cedar, and an oracle for our own engine in the tests. It covers
decisions in which every fact is known and no approval is at hand. What it leaves out is named in
its head. Cedar answers yes or no, so each scope has three actions, from lenient to strict:

    `SCOPE_unforbidden`   only rules that deny stand in the way
    `SCOPE_unheld`        rules that need an approval stand in the way too
    `SCOPE_unbound`       so does every rule that brings an obligation

A request that errs counts as denied: Cedar skips a `forbid` that meets a missing attribute.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from policy.evaluator import Evaluation, Evaluator
from policy.logic import All, AnyPath, Comparison, Condition, Leaf, Not, T
from policy.logic import Any as AnyOf
from policy.pack import Packs, Rule, Window
from policy.terms import FACTS, Kind, Known, Outcome, Scope, Value

LEVELS = ("unforbidden", "unheld", "unbound")
LEFT_OUT = (
    "unknown facts: every attribute of the schema is required",
    "approvals, waivers, break-glass",
    "the text of obligations, questions, warnings, citations (see the annotations)",
    "lineage: `context.paths` says which paths reach a hit; the engine finds that out",
    "derived facts: the caller computes them as docs/design/policy.md, 2 says",
)
_CEDAR_TYPES = {
    Kind.BOOL: "Bool",
    Kind.INT: "Long",
    Kind.DATE: "Long",
    Kind.ENUM: "String",
    Kind.SET: "Set<String>",
}


@dataclass(frozen=True, slots=True)
class CedarExport:
    """Policies, schema, and what each attribute of `context.paths` stands for."""

    policies: str
    schema: str
    paths: Mapping[str, str]
    left_out: tuple[str, ...] = LEFT_OUT


def export(packs: Packs) -> CedarExport:
    """Write all rules as Cedar."""
    paths = _path_names(packs)
    head = "".join(f"// Left out: {each}\n" for each in LEFT_OUT)
    body = "\n".join(text for rule in packs.rules for text in _policies(rule, paths))
    return CedarExport(
        policies=head + "\n" + body,
        schema=_schema(packs, paths),
        paths={name: str(leaf) for leaf, name in paths.items()},
    )


def context_of(evaluator: Evaluator, evaluation: Evaluation, packs: Packs) -> dict[str, Any] | None:
    """The Cedar context of an evaluation; None where some fact or path that is read is unknown."""
    context: dict[str, Any] = {"as_of": _day_number(evaluation.day), "paths": {}}
    facts = {**evaluator.facts, "lists.max_age_days": evaluation.age}
    for name in _facts_read(packs, evaluator.request.scope):
        fact = facts.get(name)
        if not isinstance(fact, Known):
            return None
        group, _, rest = name.partition(".")
        context.setdefault(group, {})[rest] = _plain(fact.value)
    for leaf, name in _path_names(packs, evaluator.request.scope).items():
        found = evaluation.paths[evaluator.program.leaves.index(leaf)]
        if found.truth == 1:
            return None
        context["paths"][name] = found.truth == T
    return context


def outcome_of(allowed: Mapping[str, bool]) -> Outcome:
    """Our outcome from the three answers of Cedar by level."""
    if not allowed["unforbidden"]:
        return Outcome.DENY
    if not allowed["unheld"]:
        return Outcome.NEEDS_APPROVAL
    return Outcome.PERMIT if allowed["unbound"] else Outcome.PERMIT_WITH_OBLIGATIONS


# -- policies -------------------------------------------------------------------------------------


def _policies(rule: Rule, paths: Mapping[AnyPath, str]) -> Iterable[str]:
    for scope in sorted(rule.scopes):
        condition = _condition(rule, paths)
        levels = _forbidden_levels(rule)
        if rule.text.effect == "permit":
            yield _policy(rule, "permit", scope, LEVELS, condition)
        if levels:
            yield _policy(rule, "forbid", scope, levels, condition)


def _forbidden_levels(rule: Rule) -> tuple[str, ...]:
    match rule.text.effect:
        case "deny":
            return LEVELS
        case "needs_approval":
            return LEVELS[1:]
        case "oblige":
            return LEVELS[2:]
        case _:
            return LEVELS[2:] if rule.text.obligations else ()


def _policy(rule: Rule, effect: str, scope: Scope, levels: Iterable[str], condition: str) -> str:
    text = rule.text
    actions = ", ".join(f'Airgap::Action::"{scope}_{level}"' for level in levels)
    notes = {
        "id": f"{rule.id}/{scope}/{effect}",
        "version": str(text.version),
        "effect": text.effect,
        "citation": text.citation.text,
        "plain": text.plain,
    }
    annotations = "".join(
        f"@{name}({json.dumps(words, ensure_ascii=False)})\n" for name, words in notes.items()
    )
    return (
        f"{annotations}{effect} (\n  principal,\n  action in [{actions}],\n  resource\n)\n"
        f"when {{\n  {condition}\n}};\n"
    )


def _condition(rule: Rule, paths: Mapping[AnyPath, str]) -> str:
    parts = [_in_force(rule.text.valid), _expression(rule.applies_when, paths)]
    parts.append(_expression(rule.when, paths))
    if rule.unless is not None:
        parts.append(f"!({_expression(rule.unless, paths)})")
    kept = [each for each in parts if each != "true"]
    return " &&\n  ".join(kept) or "true"


def _in_force(windows: Iterable[Window]) -> str:
    spans = []
    for window in windows:
        bounds = []
        if window.start is not None:
            bounds.append(f"context.as_of >= {_day_number(window.start)}")
        if window.end is not None:
            bounds.append(f"context.as_of < {_day_number(window.end)}")
        spans.append(" && ".join(bounds) or "true")
    if "true" in spans:
        return "true"
    return spans[0] if len(spans) == 1 else "(" + " || ".join(f"({each})" for each in spans) + ")"


def _expression(condition: Condition, paths: Mapping[AnyPath, str]) -> str:
    match condition:
        case All(()):
            return "true"
        case All(parts):
            return "(" + " && ".join(_expression(each, paths) for each in parts) + ")"
        case AnyOf(parts):
            return "(" + " || ".join(_expression(each, paths) for each in parts) + ")"
        case Not(part):
            return f"!({_expression(part, paths)})"
        case AnyPath():
            return f"context.paths.{paths[condition]}"
        case _:
            return _comparison(condition)


def _comparison(leaf: Comparison) -> str:
    fact = f"context.{leaf.fact}"
    operand = _literal(leaf.operand)
    match leaf.form:
        case "in":
            return f"{operand}.contains({fact})"
        case "contains":
            return f"{fact}.contains({operand})"
        case "intersects":
            return f"{fact}.containsAny({operand})"
        case form:
            return f"{fact} {_SIGNS[form]} {operand}"


_SIGNS = {
    "eq": "==",
    "lt": "<",
    "lte": "<=",
    "gt": ">",
    "gte": ">=",
    "before": "<",
    "on_or_after": ">=",
}


def _literal(value: Value) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Value) -> Any:
    if isinstance(value, date):
        return _day_number(value)
    return sorted(value) if isinstance(value, frozenset) else value


def _day_number(day: date) -> int:
    """A day as a number that reads like it: 20260630."""
    return day.year * 10_000 + day.month * 100 + day.day


# -- schema ---------------------------------------------------------------------------------------


def _schema(packs: Packs, paths: Mapping[AnyPath, str]) -> str:
    lines = ["namespace Airgap {", "  entity Person;", "  entity Bundle;"]
    for scope in Scope:
        own = _path_names(packs, scope)
        groups: dict[str, list[str]] = {}
        for name in _facts_read(packs, scope):
            group, _, rest = name.partition(".")
            groups.setdefault(group, []).append(f'"{rest}": {_CEDAR_TYPES[FACTS[name].kind]}')
        groups["paths"] = [f'"{paths[leaf]}": Bool' for leaf in own]
        fields = ",\n".join(
            f'      "{group}": {{ {", ".join(each)} }}' for group, each in sorted(groups.items())
        )
        actions = ", ".join(f'"{scope}_{level}"' for level in LEVELS)
        lines += [
            f"  action {actions} appliesTo {{",
            "    principal: [Person],",
            "    resource: [Bundle],",
            f'    context: {{\n      "as_of": Long,\n{fields}\n    }}',
            "  };",
        ]
    return "\n".join([*lines, "}"]) + "\n"


def _leaves_read(packs: Packs, scope: Scope | None) -> list[Leaf]:
    scopes = Scope if scope is None else (scope,)
    return list(dict.fromkeys(leaf for each in scopes for leaf in packs.programs[each].leaves))


def _facts_read(packs: Packs, scope: Scope) -> list[str]:
    found = _leaves_read(packs, scope)
    return sorted({leaf.fact for leaf in found if isinstance(leaf, Comparison)})


def _path_names(packs: Packs, scope: Scope | None = None) -> dict[AnyPath, str]:
    """A name for each path, the same in every scope."""
    leaves = [leaf for leaf in _leaves_read(packs, None) if isinstance(leaf, AnyPath)]
    every = sorted(leaves, key=str)
    names = {leaf: f"p{number:02d}" for number, leaf in enumerate(every, 1)}
    wanted = set(_leaves_read(packs, scope))
    return {leaf: name for leaf, name in names.items() if leaf in wanted}
