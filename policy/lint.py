"""What a reviewer should see before a pack is signed: each with line and column.

Obeys docs/design/policy.md, 3.

An error is wrong in any pack. A finding is open work: a draft may have it, a release may not.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from pydantic import ValidationError

from policy.errors import RefusedError
from policy.lineage import Registry
from policy.logic import (
    AnyPath,
    Comparison,
    Compiled,
    F,
    Leaf,
    T,
    Truth,
    compare,
    compile_condition,
)
from policy.pack import (
    SCHEMA,
    PackText,
    PolicyPack,
    Rule,
    RuleText,
    build_rule,
    combine,
    parse_pack,
    require_schema,
)
from policy.snapshots import ListSnapshot
from policy.strict import Path, Source, read_yaml, shift_day
from policy.terms import FACTS, Kind, Known, Scope, Value

LEAST_SCENARIOS = 4
MAX_WORLDS = 1 << 16  # larger rules are not searched for a world in which they fire
_PLACE = re.compile(r"^(?:.*?: )?line (\d+), column (\d+): (.*)$", re.DOTALL)


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing to mend. `error` stops a draft as well; everything stops a release."""

    line: int
    column: int
    code: str
    words: str
    error: bool


def lint(
    content: bytes,
    name: str,
    *,
    beside: Sequence[PolicyPack],
    lists: Iterable[ListSnapshot],
    today: date,
) -> tuple[Finding, ...]:
    """Find what is wrong or open in a pack, in the order of its lines.

    `beside` are the packs that are loaded with it.
    """
    try:
        source = read_yaml(content, name)
        require_schema(source, SCHEMA)
    except RefusedError as error:
        return (_refused(error),)
    found = _faults_of_form(source)
    if found:
        return tuple(sorted(found))
    try:
        pack = parse_pack(content, name)
    except RefusedError as error:
        return (_refused(error),)
    held = {each.list_id for each in lists}
    for at, rule in enumerate(pack.rules):
        path: Path = ("rules", at)
        found += [
            _at(source, (*path, *where), code, f"{rule.id}: {words}", error=error)
            for where, code, words, error in _of_rule(rule, pack, held, today)
        ]
    found += _of_pack(source, pack, beside)
    return tuple(sorted(found))


def lint_registry(registry: Registry) -> tuple[Finding, ...]:
    """Find edges and adjudications that nobody has put a name to."""
    open_edges = [each.id for each in registry.edges if each.reviewer is None]
    decided = [
        each.id
        for part in registry.files
        for each in part.text.adjudications
        if each.reviewer is None
    ]
    found = []
    for what, ids in (("edges", open_edges), ("adjudications", decided)):
        if ids:
            words = f"{len(ids)} {what} without a reviewer: {', '.join(ids[:12])}"
            found.append(Finding(0, 0, "registry.reviewer", words, error=False))
    return tuple(found)


# -- form -----------------------------------------------------------------------------------------


def _faults_of_form(source: Source) -> list[Finding]:
    """Every fault of form and vocabulary, and not only the first."""
    try:
        text = PackText.model_validate(source.value)
    except ValidationError as error:
        return [
            _at(
                source,
                tuple(each["loc"]),
                "schema",
                f"{'.'.join(map(str, each['loc']))}: {each['msg']}",
                error=True,
            )
            for each in error.errors(include_url=False, include_context=False, include_input=False)
        ]
    found: list[Finding] = []
    seen: set[str] = set()
    for at, rule in enumerate(text.rules):
        if rule.id in seen:
            found.append(
                _at(source, ("rules", at, "id"), "duplicate", f"{rule.id} stands twice", error=True)
            )
        seen.add(rule.id)
        found += _faults_of_rule(source, ("rules", at), rule)
    return found


def _faults_of_rule(source: Source, path: Path, rule: RuleText) -> list[Finding]:
    try:
        build_rule(source, path, rule)
    except RefusedError as error:
        return [_refused(error)]
    return []


def _refused(error: RefusedError) -> Finding:
    found = _PLACE.match(error.message)
    line, column, words = (int(found[1]), int(found[2]), found[3]) if found else (1, 1, str(error))
    return Finding(line, column, error.code.removeprefix("pack."), words, error=True)


def _at(source: Source, path: Path, code: str, words: str, *, error: bool) -> Finding:
    while path and path not in source.places:
        path = path[:-1]
    line, column = source.places.get(path, (1, 1))
    return Finding(line, column, code, words, error)


# -- rules ----------------------------------------------------------------------------------------

_Open = tuple[Path, str, str, bool]


def _of_rule(rule: Rule, pack: PolicyPack, held: set[str], today: date) -> Iterator[_Open]:
    yield from _of_citation(rule.text, today)
    yield from _of_dates(rule.text, today)
    yield from _of_sense(rule)
    for leaf in rule.leaves():
        if isinstance(leaf, AnyPath) and leaf.hits_list is not None and leaf.hits_list not in held:
            words = f"no edition of list {leaf.hits_list} is held: its paths are unknown"
            yield ("when",), "list", words, False
    played = Counter(each.expect for each in pack.scenarios if each.rule == rule.id)
    if sum(played.values()) < LEAST_SCENARIOS:
        words = f"{sum(played.values())} scenarios, {LEAST_SCENARIOS} are wanted"
        yield ("id",), "scenarios", words, False
    elif not played["fired"] and not played["unknown"]:
        yield ("id",), "scenarios", "no scenario in which it has an effect", False


def _of_citation(text: RuleText, today: date) -> Iterator[_Open]:
    citation = text.citation
    institutional = citation.source == "institutional"
    if citation.url is None and not institutional:
        yield ("citation",), "citation", "the citation has no address", False
    if citation.checked_on is None or (citation.checked_by is None and not institutional):
        yield ("citation",), "citation", "nobody is named who checked the citation", False
    if citation.source == "primary" and text.confidence == "high" and not citation.quote_sha256:
        yield ("citation",), "citation", "primary and high, and no digest of the quoted text", False
    if text.verify_before_release:
        yield ("verify_before_release",), "verify", "to be verified before release", False
    if text.review_by < today:
        yield ("review_by",), "review", f"its review was due on {text.review_by}", False
    if text.confidence in {"low", "unverified"} and text.effect == "deny":
        yield ("confidence",), "confidence", f"denies on {text.confidence} confidence", False


def _of_dates(text: RuleText, today: date) -> Iterator[_Open]:
    ends = [window.end for window in text.valid]
    if all(end is not None and end <= today for end in ends):
        yield ("valid",), "dates", "every window is past: the rule never applies again", True
    begins = [window.start for window in text.valid]
    if text.warn_from is not None:
        first = min((each for each in begins if each is not None), default=None)
        if first is None:
            yield ("warn_from",), "dates", "warns of a day that the rule does not have", True
        elif text.warn_from >= max(each for each in begins if each is not None):
            yield ("warn_from",), "dates", f"warns on {text.warn_from}, when it holds", True
    for at, each in enumerate(text.horizon):
        if each.by < today.isoformat()[: len(each.by)]:
            yield ("horizon", at), "dates", f"{each.by} is past: {each.text}", False


def _of_sense(rule: Rule) -> Iterator[_Open]:
    """Whether some world of facts makes the rule fire, and whether each leaf has a say."""
    distinct = list(dict.fromkeys(rule.leaves()))
    worlds = _worlds(distinct)
    if worlds is None:
        yield ("when",), "size", "too many facts to search for a world in which it fires", False
        return
    index = {leaf: at for at, leaf in enumerate(distinct)}
    value = _value_function(rule, index)
    fired = False
    moved = [False] * len(distinct)
    for world in worlds:
        truth = value(world)
        fired = fired or truth == T
        for at in range(len(distinct)):
            if not moved[at]:
                other = list(world)
                other[at] = T - world[at]
                moved[at] = value(other) != truth
    if not fired:
        yield ("when",), "dead", "no facts whatever make it fire", True
        return
    for leaf, has_say in zip(distinct, moved, strict=True):
        if not has_say:
            yield ("when",), "dead", f"the condition {leaf} changes nothing", True


def _value_function(rule: Rule, index: Mapping[Leaf, int]) -> Compiled:
    parts = [compile_condition(rule.applies_when, index), compile_condition(rule.when, index)]
    unless = None if rule.unless is None else compile_condition(rule.unless, index)

    def value(world: Sequence[Truth]) -> Truth:
        truth = min(part(world) for part in parts)
        return truth if unless is None else min(truth, T - unless(world))

    return value


def _worlds(distinct: Sequence[Leaf]) -> Iterator[list[Truth]] | None:
    """Leaf values of every combination of telling facts; None where there are too many."""
    by_fact: dict[str, list[Comparison]] = {}
    for leaf in distinct:
        if isinstance(leaf, Comparison):
            by_fact.setdefault(leaf.fact, []).append(leaf)
    options: list[list[dict[Leaf, Truth]]] = []
    size = 1
    for fact, leaves_of in by_fact.items():
        rows = []
        for value in _telling(fact, leaves_of):
            row: dict[Leaf, Truth] = {
                leaf: compare(leaf, Known(value, "lint")) for leaf in leaves_of
            }
            if row not in rows:
                rows.append(row)
        options.append(rows)
        size *= len(rows)
    for leaf in distinct:
        if isinstance(leaf, AnyPath):
            options.append([{leaf: F}, {leaf: T}])
            size *= 2
    if size > MAX_WORLDS:
        return None
    return (
        [next(row[leaf] for row in rows if leaf in row) for leaf in distinct]
        for rows in itertools.product(*options)
    )


def _telling(fact: str, leaves_of: Sequence[Comparison]) -> Iterator[Value]:
    """Values of a fact among which these comparisons can tell."""
    spec = FACTS[fact]
    operands: list[Value] = [leaf.operand for leaf in leaves_of]
    match spec.kind:
        case Kind.BOOL:
            yield from (False, True)
        case Kind.INT | Kind.DATE:
            for operand in operands:
                if isinstance(operand, date):
                    yield from (shift_day(operand, step) for step in (-1, 0, 1))
                elif isinstance(operand, int):
                    yield from (operand + step for step in (-1, 0, 1))
        case Kind.ENUM | Kind.SET:
            named = sorted(
                {
                    name
                    for each in operands
                    for name in (each if isinstance(each, frozenset) else [each])
                    if isinstance(name, str)
                }
            )
            others = sorted(spec.members - set(named))[:1] if spec.members else ["another"]
            if spec.kind is Kind.ENUM:
                yield from (*named, *others)
            else:
                sizes = range(min(len(named), 3) + 1)
                for size in sizes:
                    yield from map(frozenset, itertools.combinations(named, size))
                yield frozenset({*named, *others})


# -- packs together -------------------------------------------------------------------------------


def _of_pack(source: Source, pack: PolicyPack, beside: Sequence[PolicyPack]) -> list[Finding]:
    found = []
    if pack.status != "release":
        found.append(_at(source, ("status",), "status", "the pack is a draft", error=False))
    others = [each for each in beside if each.pack_id != pack.pack_id]
    taken = {rule.id: each.pack_id for each in others for rule in each.rules}
    for at, rule in enumerate(pack.rules):
        if rule.id in taken:
            try:
                combine(others, [pack])
            except RefusedError as error:
                words = f"{rule.id} stands in pack {taken[rule.id]} too: {error.message}"
                found.append(_at(source, ("rules", at, "id"), "overlap", words, error=True))
    every = [*others, pack]
    for scope in Scope:
        permits = [
            rule
            for each in every
            for rule in each.rules
            if scope in rule.scopes and rule.text.effect == "permit"
        ]
        if not permits:
            words = f"no permit rule for {scope}: everything is denied"
            found.append(_at(source, ("rules",), "permit", words, error=False))
    return found
