"""Bytes become a `PolicyPack`, or a refusal with its place (docs/design/policy.md, 3).

A pack is data: rules with one effect each, conditions of a closed vocabulary, a citation, dates,
a confidence and plain words. Signatures of a site's packs are checked before
(`airgap/site_rules.py`); every record names the digest of each pack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from policy.canonical import canonical_bytes
from policy.conditions import parse_condition
from policy.errors import RefusedError
from policy.logic import (
    AnyPath,
    Comparison,
    Compiled,
    Condition,
    Leaf,
    compile_condition,
    leaves,
)
from policy.scenarios import FactSetText, Scenario, ScenarioText, expand
from policy.strict import Day, Frozen, Name, Path, Source, Words, read_yaml
from policy.terms import (
    FACTS,
    Digest,
    Scope,
)

SCHEMA = "airgap/policy-pack/1"
MAX_RULES = 1_000
MAX_LEAVES = 64

RuleId = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9]*(-[A-Z0-9]+)*$", max_length=48)]
SourceTag = Literal["primary", "secondary", "analyst_knowledge", "article_only", "institutional"]
Confidence = Literal["high", "medium", "medium_low", "low", "unverified", "policy"]
Due = Literal[
    "at_admission", "at_start", "before_release", "at_closeout", "each_edition", "standing"
]
DUES: tuple[str, ...] = Due.__args__  # type: ignore[attr-defined]


class Window(Frozen):
    """Days in force, half-open: `to` is the first day not in force; null is no bound."""

    start: Day | None = Field(alias="from")
    end: Day | None = Field(alias="to")

    def holds(self, day: date) -> bool:
        """Whether `day` lies in the window."""
        return (self.start is None or self.start <= day) and (self.end is None or day < self.end)


class Obligation(Frozen):
    """A duty that comes with the answer."""

    id: Name
    text: Words
    owner: Name
    due: Due


class Citation(Frozen):
    """Where the rule stands, and who looked at it when."""

    text: Words
    url: Words | None
    source: SourceTag
    quote_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None
    checked_on: Day | None
    checked_by: Words | None


class NoOverride(Frozen):
    """Cannot be lifted: change the facts."""

    kind: Literal["none"]


class ApprovalOverride(Frozen):
    """Named people of these roles may lift it, for at most `max_days`."""

    kind: Literal["approval"]
    roles: tuple[Name, ...] = Field(min_length=1, strict=False)
    approvers: int = Field(ge=1, le=8)
    max_days: int = Field(ge=1, le=3660)
    needs_document: bool


class WaiverOverride(Frozen):
    """Only a government's own waiver lifts it."""

    kind: Literal["government_waiver"]
    authority: Words


Override = Annotated[NoOverride | ApprovalOverride | WaiverOverride, Field(discriminator="kind")]


class Horizon(Frozen):
    """A date that is law in the making."""

    by: Annotated[str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}(-[0-9]{2})?$")]
    estimate: bool
    text: Words


class RuleText(Frozen):
    """A rule as written."""

    id: RuleId
    version: int = Field(ge=1)
    topic: Literal[
        "base", "lineage", "state", "funder", "licence", "cui", "export", "hazard", "list"
    ]
    scope: tuple[Literal["admission", "use"], ...] = Field(min_length=1, strict=False)
    effect: Literal["deny", "needs_approval", "oblige", "permit"]
    statutory: bool
    basis: Literal[
        "statute",
        "regulation",
        "contract_clause",
        "award_term",
        "agency_policy",
        "state_directive",
        "licence",
        "institutional",
        "statute_scope_unsettled",
    ]
    valid: tuple[Window, ...] = Field(min_length=1, strict=False)
    warn_from: Day | None
    applies_when: Any
    when: Any
    unless: Any
    on_unknown: Literal["deny", "needs_approval", "oblige", "not_matched"]
    override: Override
    obligations: tuple[Obligation, ...] = Field(strict=False)
    horizon: tuple[Horizon, ...] = Field(default=(), strict=False)
    citation: Citation
    confidence: Confidence
    verify_before_release: bool
    review_by: Day
    owner: Name
    notes: Words | None
    plain: Words


class PackText(Frozen):
    """A pack as written."""

    schema_: str = Field(alias="schema")
    pack_id: Name
    pack_version: int = Field(ge=1)
    prepared_on: Day
    status: Literal["draft", "release"]
    states: tuple[str, ...] = Field(default=(), strict=False)
    rules: tuple[RuleText, ...] = Field(max_length=MAX_RULES, strict=False)
    fact_sets: tuple[FactSetText, ...] = Field(default=(), max_length=64, strict=False)
    scenarios: tuple[ScenarioText, ...] = Field(default=(), max_length=MAX_RULES, strict=False)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule with its conditions parsed."""

    text: RuleText
    applies_when: Condition
    when: Condition
    unless: Condition | None
    scopes: frozenset[Scope]

    @property
    def id(self) -> str:
        """The rule's id, with the fiscal year where the subject has one."""
        return self.text.id

    def leaves(self) -> list[Leaf]:
        """All leaves in writing order."""
        found = leaves(self.applies_when) + leaves(self.when)
        return found + (leaves(self.unless) if self.unless is not None else [])

    def in_force(self, day: date) -> bool:
        """Whether some window holds `day`."""
        return any(window.holds(day) for window in self.text.valid)


@dataclass(frozen=True, slots=True)
class PolicyPack:
    """A loaded pack: `digest` is of the exact bytes, `canonical_digest` of the meaning."""

    pack_id: str
    version: int
    status: str
    prepared_on: date
    states: frozenset[str]
    rules: tuple[Rule, ...]
    digest: Digest
    canonical_digest: Digest
    scenarios: tuple[Scenario, ...] = ()


def parse_pack(content: bytes, name: str = "pack") -> PolicyPack:
    """Load a rule pack.

    Raises:
        RefusedError: `pack.*`, with line and column.

    """
    source = read_yaml(content, name)
    require_schema(source, SCHEMA)
    text = source.build(PackText)
    for at, state in enumerate(text.states):
        fault = FACTS["institution.state"].fault(state)
        if fault:
            raise source.refusal("pack.vocabulary", ("states", at), fault)
    rules = []
    seen: set[str] = set()
    for at, rule_text in enumerate(text.rules):
        path: Path = ("rules", at)
        if rule_text.id in seen:
            raise source.refusal(
                "pack.duplicate", (*path, "id"), f"rule {rule_text.id} stands twice"
            )
        seen.add(rule_text.id)
        rules.append(build_rule(source, path, rule_text))
    return PolicyPack(
        pack_id=text.pack_id,
        version=text.pack_version,
        status=text.status,
        prepared_on=text.prepared_on,
        states=frozenset(text.states),
        rules=tuple(rules),
        digest=Digest.of(content),
        canonical_digest=Digest.of(canonical_bytes(source.value)),
        scenarios=_scenarios(source, text, seen),
    )


def _scenarios(source: Source, text: PackText, rules: set[str]) -> tuple[Scenario, ...]:
    for at, group in enumerate(text.scenarios):
        if group.rule not in rules:
            raise source.refusal(
                "pack.vocabulary",
                ("scenarios", at, "rule"),
                f"no rule of this pack is called {group.rule!r:.60}",
            )
    return expand(source, text.fact_sets, text.scenarios, text.prepared_on)


def require_schema(source: Source, schema: str) -> None:
    """Refuse a document of another kind or of a later format; `pack.version` or `pack.schema`."""
    if not isinstance(source.value, dict):
        raise source.refusal("pack.schema", (), "expected a mapping of fields")
    found = source.value.get("schema")
    if found != schema:
        code = "pack.version" if isinstance(found, str) and "/" in found else "pack.schema"
        raise source.refusal(
            code,
            ("schema",),
            f"schema is {found!r:.60}, expected {schema!r}",
            hint="this version reads no other format",
        )


def build_rule(source: Source, path: Path, text: RuleText) -> Rule:
    """Parse the conditions of a rule and check what ties its fields together; `pack.vocabulary`."""
    rule = Rule(
        text=text,
        applies_when=parse_condition(source, (*path, "applies_when"), text.applies_when),
        when=parse_condition(source, (*path, "when"), text.when),
        unless=None
        if text.unless is None
        else parse_condition(source, (*path, "unless"), text.unless, positive=False),
        scopes=frozenset(Scope(each) for each in text.scope),
    )
    problem = _fault_of(rule)
    if problem:
        field, words = problem
        raise source.refusal("pack.vocabulary", (*path, field), f"rule {text.id}: {words}")
    return rule


_ON_UNKNOWN: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "permit": frozenset({"not_matched"}),
        "oblige": frozenset({"oblige"}),
        "needs_approval": frozenset({"needs_approval", "deny"}),
        "deny": frozenset({"needs_approval", "deny"}),
    }
)


def _fault_of(rule: Rule) -> tuple[str, str] | None:
    """Check what ties the fields of one rule together; returns (field, problem)."""
    return _fault_of_effect(rule.text) or _fault_of_leaves(rule) or _fault_of_windows(rule.text)


def _fault_of_effect(text: RuleText) -> tuple[str, str] | None:
    if text.on_unknown not in _ON_UNKNOWN[text.effect]:
        allowed = " or ".join(sorted(_ON_UNKNOWN[text.effect]))
        return "on_unknown", f"a {text.effect} rule takes {allowed}, found {text.on_unknown}"
    if text.effect == "oblige" and not text.obligations:
        return "obligations", "an oblige rule without an obligation says nothing"
    if text.statutory and text.effect == "deny" and text.override.kind == "approval":
        return "override", "only a government waiver lifts what a statute forbids"
    if text.effect == "permit" and text.override.kind != "none":
        return "override", "a permit has nothing to lift"
    return None


def _fault_of_leaves(rule: Rule) -> tuple[str, str] | None:
    if rule.text.effect == "permit" and any(isinstance(leaf, AnyPath) for leaf in rule.leaves()):
        return "when", "any_path may not stand in a permit rule: a new list hit could loosen it"
    if len(rule.leaves()) > MAX_LEAVES:
        return "when", f"more than {MAX_LEAVES} leaves"
    if rule.text.topic != "hazard" and any(_reads_screen(leaf) for leaf in rule.leaves()):
        words = "what a hazard screen found may decide in rules of the topic hazard alone"
        return "topic", f"{words}: every other rule is told to users"
    return None


def _reads_screen(leaf: Leaf) -> bool:
    if isinstance(leaf, AnyPath) or leaf.fact == "screen.required":  # follows from the modality
        return False
    return leaf.fact.startswith("screen.")


def _fault_of_windows(text: RuleText) -> tuple[str, str] | None:
    end: date | None = date.min
    for window in text.valid:
        if window.start and window.end and window.start >= window.end:
            return "valid", f"an empty window from {window.start} to {window.end}"
        if end is None or (window.start or date.min) < end:
            return "valid", "windows overlap or do not stand in order"
        end = window.end
    return None


# -- several packs as one -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule whose conditions read leaf values by position."""

    rule: Rule
    applies_when: Compiled
    when: Compiled
    unless: Compiled | None
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """All rules of one scope, and each distinct leaf of them once.

    `moving` are the positions of leaves whose value depends on the day, `still` all others.
    """

    rules: tuple[CompiledRule, ...]
    leaves: tuple[Leaf, ...]
    fact_names: frozenset[str]
    moving: tuple[int, ...]
    still: tuple[tuple[int, Comparison], ...]


@dataclass(frozen=True)
class Packs:
    """The rules that hold: union of the packs, in the order of rule ids.

    `list_ids` are the lists that some rule of either scope names.
    """

    packs: tuple[PolicyPack, ...]
    rules: tuple[Rule, ...]
    programs: Mapping[Scope, Program]
    list_ids: frozenset[str]

    @cached_property
    def states(self) -> frozenset[str]:
        """US states for which a rule pack is loaded."""
        return frozenset().union(*(pack.states for pack in self.packs))


def combine(packs: Iterable[PolicyPack], site_packs: Iterable[PolicyPack] = ()) -> Packs:
    """Unite packs; a site pack may replace a rule that is not statutory by a stricter one.

    A further permit beside a shipped one can only loosen, because what is not permitted is denied.

    Raises:
        RefusedError: `pack.duplicate`, one id twice, or something of a site that would loosen.

    """
    packs, site_packs = tuple(packs), tuple(site_packs)
    _require_same_duties(packs, site_packs)
    rules: dict[str, Rule] = {}
    for pack in packs:
        for rule in pack.rules:
            if rule.id in rules:
                raise RefusedError("pack.duplicate", f"rule {rule.id} stands in two packs")
            rules[rule.id] = rule
    from_site: set[str] = set()
    for pack in site_packs:
        for rule in pack.rules:
            if rule.id in from_site:
                raise RefusedError("pack.duplicate", f"rule {rule.id} stands in two site packs")
            from_site.add(rule.id)
            before = rules.get(rule.id)
            problem = _loosens(before, rule) if before else None
            if problem:
                raise RefusedError(
                    "pack.duplicate",
                    f"site pack {pack.pack_id} may not replace rule {rule.id}: {problem}",
                    hint="a site pack adds rules of its own ids, or a stricter rule of the same id",
                )
            rules[rule.id] = rule
    _require_no_permit(packs, site_packs)
    ids = [each.pack_id for each in (*packs, *site_packs)]
    twice = sorted({each for each in ids if ids.count(each) > 1})
    if twice:
        raise RefusedError(
            "pack.duplicate",
            f"two packs are called {twice[0]}; a record could not say which one decided",
            hint="give the pack of the site a `pack_id` of its own",
        )
    ordered = tuple(rules[each] for each in sorted(rules))
    programs = {scope: _program([r for r in ordered if scope in r.scopes]) for scope in Scope}
    paths = [
        leaf
        for program in programs.values()
        for leaf in program.leaves
        if isinstance(leaf, AnyPath)
    ]
    return Packs(
        (*packs, *site_packs),
        ordered,
        MappingProxyType(programs),
        frozenset(leaf.hits_list for leaf in paths if leaf.hits_list is not None),
    )


_STRICTNESS = ("not_matched", "permit", "oblige", "needs_approval", "deny")


def _loosens(old: Rule, new: Rule) -> str | None:
    """Say why `new` is not plainly stricter than `old`: same conditions, nothing weaker."""
    before, after = old.text, new.text
    checks = {
        "a statutory rule stays as it is": not before.statutory,
        "a permit rule stays as it is": before.effect != "permit",
        "its topic differs": before.topic == after.topic,
        "its conditions differ": (old.applies_when, old.when, old.unless)
        == (new.applies_when, new.when, new.unless),
        "its scope is narrower": old.scopes <= new.scopes,
        "its dates differ": before.valid == after.valid,
        "its effect is weaker": _rank(after.effect) >= _rank(before.effect),
        "its answer to an unknown is weaker": _rank(after.on_unknown) >= _rank(before.on_unknown),
        "it drops or changes an obligation": all(
            any(_keeps(each, duty) for each in after.obligations) for duty in before.obligations
        ),
        "it is easier to lift": after.override == before.override or after.override.kind == "none",
        "its version is not higher": after.version > before.version,
    }
    return next((words for words, good in checks.items() if not good), None)


def _keeps(new: Obligation, old: Obligation) -> bool:
    """Whether it is the same duty, due no later."""
    same = (new.id, new.text, new.owner) == (old.id, old.text, old.owner)
    return same and DUES.index(new.due) <= DUES.index(old.due)


def _require_no_permit(shipped: Iterable[PolicyPack], site_packs: Iterable[PolicyPack]) -> None:
    """A permit of a site would let in what the conditions of the shipped one keep out."""
    permitted: dict[Scope, str] = {
        scope: rule.id
        for pack in shipped
        for rule in pack.rules
        if rule.text.effect == "permit"
        for scope in rule.scopes
    }
    for pack in site_packs:
        for rule in pack.rules:
            beside = sorted(permitted[each] for each in rule.scopes if each in permitted)
            if rule.text.effect == "permit" and beside:
                raise RefusedError(
                    "pack.duplicate",
                    f"site pack {pack.pack_id} may not permit by rule {rule.id} what {beside[0]}"
                    " does not",
                    hint="a site pack adds rules that deny, hold or oblige",
                )


def _require_same_duties(shipped: Iterable[PolicyPack], site_packs: Iterable[PolicyPack]) -> None:
    """A duty goes by its id, so that another text under the same id would take its place."""
    known = {
        duty.id: (duty.text, duty.owner)
        for pack in shipped
        for rule in pack.rules
        for duty in rule.text.obligations
    }
    for pack in site_packs:
        for rule in pack.rules:
            for duty in rule.text.obligations:
                wanted = known.setdefault(duty.id, (duty.text, duty.owner))
                if wanted != (duty.text, duty.owner):
                    raise RefusedError(
                        "pack.duplicate",
                        f"site pack {pack.pack_id}, rule {rule.id}: obligation {duty.id} stands"
                        f" elsewhere with another text or owner: {wanted[0]!r:.120}, {wanted[1]}",
                        hint="give the obligation an id of its own",
                    )


def _rank(effect: str) -> int:
    return _STRICTNESS.index(effect)


def _program(rules: list[Rule]) -> Program:
    index: dict[Leaf, int] = {}
    for rule in rules:
        for leaf in rule.leaves():
            index.setdefault(leaf, len(index))
    compiled = tuple(
        CompiledRule(
            rule=rule,
            applies_when=compile_condition(rule.applies_when, index),
            when=compile_condition(rule.when, index),
            unless=None if rule.unless is None else compile_condition(rule.unless, index),
            positions=tuple(dict.fromkeys(index[leaf] for leaf in rule.leaves())),
        )
        for rule in rules
    )
    return Program(
        rules=compiled,
        leaves=tuple(index),
        fact_names=frozenset(leaf.fact for leaf in index if isinstance(leaf, Comparison)),
        moving=tuple(at for leaf, at in index.items() if _moves(leaf)),
        still=tuple(
            (at, leaf)
            for leaf, at in index.items()
            if isinstance(leaf, Comparison) and not _moves(leaf)
        ),
    )


def _moves(leaf: Leaf) -> bool:
    return isinstance(leaf, AnyPath) or leaf.fact == "lists.max_age_days"
