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

from policy import citations
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


@dataclass(frozen=True, slots=True)
class Review:
    """Named people of the site read the text that something rests on; a verified value."""

    kind: str
    item: str
    confirmed: bool
    people: tuple[str, ...]
    read_on: date
    next_review: date
    text: bool  # the digest of the text that was read is in the statement

    def finding(self, today: date) -> tuple[str, str, bool] | None:
        """What is open in spite of it: code, words, and whether it is an error."""
        who = ", ".join(self.people)
        if not self.confirmed:
            return "citation", f"{who} read the text on {self.read_on}: it says otherwise", True
        if self.next_review <= today:
            words = f"{who} read it on {self.read_on}; it was due again on {self.next_review}"
            return "review", words, False
        return None


def lint(
    content: bytes,
    name: str,
    *,
    beside: Sequence[PolicyPack],
    lists: Iterable[ListSnapshot],
    today: date,
    reviews: Iterable[Review] = (),
) -> tuple[Finding, ...]:
    """Find what is wrong or open in a pack, in the order of its lines.

    `beside` are the packs that are loaded with it; `reviews` those of these very rules.
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
    held: dict[str, list[str]] = {}
    for each in lists:
        held.setdefault(each.list_id, []).append(each.text.citation)
    read = {each.item: each for each in reviews if each.kind == "rule"}
    for at, rule in enumerate(pack.rules):
        path: Path = ("rules", at)
        found += [
            _at(source, (*path, *where), code, f"{rule.id}: {words}", error=error)
            for where, code, words, error in _of_rule(rule, pack, held, read.get(rule.id), today)
        ]
    found += _of_pack(source, pack, beside)
    return tuple(sorted(found))


def lint_registry(
    registry: Registry, *, reviews: Iterable[Review] = (), today: date
) -> tuple[Finding, ...]:
    """Find edges and adjudications that nobody has put a name to."""
    read = {each.item: each for each in reviews if each.kind == "edge"}
    open_edges = [
        each.id for each in registry.edges if each.reviewer is None and each.id not in read
    ]
    decided = [
        each.id
        for part in registry.files
        for each in part.text.adjudications
        if each.reviewer is None
    ]
    found = [
        Finding(0, 0, code, f"edge {name}: {words}", error)
        for name, review in sorted(read.items())
        for code, words, error in filter(None, [review.finding(today)])
    ]
    for what, ids in (("edges", open_edges), ("adjudications", decided)):
        if ids:
            words = f"{len(ids)} {what} without a reviewer: {', '.join(ids[:12])}"
            found.append(Finding(0, 0, "registry.reviewer", words, error=False))
    return tuple(found)


def lint_lists(lists: Iterable[ListSnapshot]) -> tuple[Finding, ...]:
    """Find editions in force of which names are missing here, with how many are held."""
    found = []
    for each in lists:
        text = each.text
        if text.complete or text.status != "in_force":
            continue
        whole = "a number that is not recorded" if text.names_in_edition is None else None
        words = (
            f"{each.list_id} edition {text.edition} is held in part, {each.names_held} of"
            f" {whole or text.names_in_edition} names; what is not found on it is unknown"
        )
        found.append(Finding(0, 0, "list", words, error=False))
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


def _of_rule(
    rule: Rule,
    pack: PolicyPack,
    held: Mapping[str, Sequence[str]],
    review: Review | None,
    today: date,
) -> Iterator[_Open]:
    editions = [
        citation
        for leaf in rule.leaves()
        if isinstance(leaf, AnyPath) and leaf.hits_list is not None
        for citation in held.get(leaf.hits_list, ())
    ]
    yield from _of_citation(rule.text, editions, today)
    yield from _of_reading(rule.text, review, today)
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


def _of_citation(text: RuleText, editions: Sequence[str], today: date) -> Iterator[_Open]:
    """What can be seen without the text: form, years, days, titles, the edition that is held."""
    citation = text.citation
    begins = min((each.start for each in text.valid if each.start is not None), default=None)
    if any(each.start is None for each in text.valid):
        begins = None
    for words in citations.faults(
        citation.text, citation.url, rule=text.id, begins=begins, editions=editions
    ):
        yield ("citation",), "citation", words, True
    institutional = citation.source == "institutional"
    if citation.url is None and not institutional and not citations.is_identified(citation.text):
        words = "the citation has no address, and no number by which the text can be found"
        yield ("citation",), "citation", words, False
    if citation.checked_on is not None and citation.checked_on > today:
        words = f"checked on {citation.checked_on}, which is still to come"
        yield ("citation",), "citation", words, True


def _of_reading(text: RuleText, review: Review | None, today: date) -> Iterator[_Open]:
    """Whether a named person has read the text, in the pack or in a signed review of the site."""
    citation = text.citation
    if review is not None:
        if (open_still := review.finding(today)) is not None:
            yield ("citation",), *open_still
        return
    institutional = citation.source == "institutional"
    unread = citation.checked_on is None or citation.checked_by is None
    no_quote = citation.source == "primary" and text.confidence == "high"
    if (unread and not institutional) or text.verify_before_release:
        words = f"no named person has read {citation.text!r:.100}: for {text.owner}, by"
        yield ("citation",), "unread", f"{words} {text.review_by}", False
    elif no_quote and not citation.quote_sha256:
        yield ("citation",), "citation", "primary and high, and no digest of the quoted text", False
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
