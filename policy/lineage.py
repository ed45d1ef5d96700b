"""Who made a model: organisations, legal persons, control edges, base models (policy, section 8).

`any_path` is decided here. It is true when asserted edges lead to a hit, unknown when a step rests
on a disputed edge, an unresolved name or an unchecked list, and false otherwise, which reads "no
hit on edition X" and never "cleared". Names match exactly after normalisation, or not at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import rfc8785
from pydantic import BeforeValidator, Field, StringConstraints

from policy.errors import RefusedError
from policy.logic import AnyPath, F, T, Truth, U
from policy.pack import Confidence, SourceTag, require_schema
from policy.snapshots import Edition, Entry, ListSnapshot, normal_name
from policy.strict import Day, Frozen, Name, Source, Words, parse_day, read_yaml
from policy.terms import MAKER_RELATIONS, Digest

SCHEMA = "airgap/lineage/1"
MAX_PARTIES = 20_000
NO_DOMICILE = "none"  # a known value: a party without a seat, such as a set of files

_SURE = frozenset({"high", "medium"})
_SYMMETRIC = frozenset({"same_person_as", "affiliate_of"})
_SELF = "self"


def _first_of_month(value: object) -> object:
    """Read a month as its first day."""
    if isinstance(value, str) and len(value) == len("2026-03"):
        value += "-01"
    return parse_day(value)


LooseDay = Annotated[Day, BeforeValidator(_first_of_month)]
Domicile = Annotated[str, StringConstraints(pattern=r"^([A-Z]{2}|none)$")]


class LooseWindow(Frozen):
    """Half-open days; a month means its first day."""

    start: LooseDay | None = Field(alias="from")
    end: LooseDay | None = Field(alias="to")

    def holds(self, day: date) -> bool:
        """Whether `day` lies in the window."""
        return (self.start is None or self.start <= day) and (self.end is None or day < self.end)


class Party(Frozen):
    """An organisation, a unit of one, or an account that publishes models."""

    id: Name
    kind: Literal["legal_person", "internal_unit", "model_org", "project"]
    legal_name: Words | None
    names: tuple[Words, ...] = Field(strict=False)
    handles: tuple[Words, ...] = Field(default=(), strict=False)
    domicile: Domicile | None
    source: SourceTag
    confidence: Confidence
    litigation_watch: bool
    verify_before_release: bool
    note: Words | None


class Edge(Frozen):
    """A tie between two parties, with its citation."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Z]+-[0-9]{1,6}$")]
    subject: Name
    relation: Literal[
        "same_person_as", "subsidiary_of", "controlled_by", "affiliate_of", "owned_50_by"
    ]
    object: Name
    valid: LooseWindow
    status: Literal["asserted", "disputed"]
    citation: Words
    source: SourceTag
    confidence: Confidence
    checked_on: Day | None
    reviewer: Words | None
    verify_before_release: bool
    note: Words | None

    @property
    def sure(self) -> bool:
        """Whether it counts as true rather than as unknown."""
        return self.status == "asserted" and self.confidence in _SURE


class Base(Frozen):
    """A base model from which another was made."""

    family: Words
    developer: Name | None
    source: SourceTag
    confidence: Confidence
    note: Words | None


class DeclaredLicence(Frozen):
    """A licence, and where it is declared."""

    id: Name
    where: Name
    source: SourceTag
    verify_before_release: bool = False


class ModelRecord(Frozen):
    """What the registry knows about one model; an empty list says that there is none."""

    id: Name
    sources: tuple[Words, ...] = Field(min_length=1, strict=False)
    developed_by: tuple[Name, ...] = Field(strict=False)
    codeveloped_by: tuple[Name, ...] = Field(strict=False)
    fine_tuned_by: tuple[Name, ...] = Field(default=(), strict=False)
    distributed_by: tuple[Name, ...] = Field(default=(), strict=False)
    derived_from: tuple[Base, ...] | None = Field(strict=False)
    licences_declared: tuple[DeclaredLicence, ...] | None = Field(strict=False)
    modalities: tuple[Name, ...] | None = Field(strict=False)
    tuned_on_nih_ca: bool | None
    verify_before_release: bool
    note: Words | None = None


class Finding(Frozen):
    """A look at one edition for one party that was not a hit; hits stand in the snapshots."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Z]+-[0-9]{1,6}$")]
    party: Name
    list_id: Name = Field(alias="list")
    edition: Edition
    finding: Literal["no_hit", "not_checked"]
    source: SourceTag
    confidence: Confidence
    verify_before_release: bool
    note: Words | None


class Adjudication(Frozen):
    """A person's answer to a possible match, remembered for one edition."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Z]+-[0-9]{1,6}$")]
    name: Words
    list_id: Name = Field(alias="list")
    edition: Edition
    against: Words
    score: Words
    decision: Literal["same", "not_same"]
    reviewer: Words | None
    decided_on: Day | None
    verify_before_release: bool


class _File(Frozen):
    schema_: str = Field(alias="schema")
    registry_version: int = Field(ge=1)
    prepared_on: Day
    status: Literal["draft", "release"]
    reviewer: Words | None
    parties: tuple[Party, ...] = Field(max_length=MAX_PARTIES, strict=False)
    edges: tuple[Edge, ...] = Field(strict=False)
    models: tuple[ModelRecord, ...] = Field(strict=False)
    list_findings: tuple[Finding, ...] = Field(strict=False)
    adjudications: tuple[Adjudication, ...] = Field(strict=False)


class _Step(NamedTuple):
    """One edge as walked from one end."""

    relation: str
    target: str
    sure: bool
    valid: LooseWindow
    edge_id: str


@dataclass(frozen=True)
class Registry:
    """The lineage graph, indexed once."""

    version: str
    digest: Digest
    parties: Mapping[str, Party]
    edges: tuple[Edge, ...]
    models: Mapping[str, ModelRecord]
    findings: Mapping[tuple[str, str, str], Finding]
    steps: Mapping[str, tuple[_Step, ...]] = field(default_factory=dict, repr=False)
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    by_name: Mapping[str, str] = field(default_factory=dict, repr=False)
    by_source: Mapping[str, str] = field(default_factory=dict, repr=False)

    def party_of(self, name: str) -> str | None:
        """Resolve a party id, a name or a handle exactly; None when nobody is called so."""
        if name in self.parties:
            return name
        return self.by_name.get(normal_name(name))

    def publisher_of(self, source: str) -> str | None:
        """The party behind the account of a source such as `hf:Qwen/Qwen3-8B`."""
        return self.party_of(source.partition("/")[0]) if ":" in source else None

    def model_of(self, name: str) -> ModelRecord | None:
        """Find a model by id or source, without regard to case."""
        key = name.casefold()
        return self.models.get(self.by_source.get(key, key))


def parse_lineage(content: bytes, name: str = "lineage") -> Registry:
    """Load a lineage registry.

    Raises:
        RefusedError: `pack.*`, with line and column.

    """
    source = read_yaml(content, name)
    require_schema(source, SCHEMA)
    text = source.build(_File)
    _check_ids(source, text)
    return _index(
        version=str(text.registry_version),
        digest=Digest.of(rfc8785.dumps(source.value)),
        parties=text.parties,
        edges=text.edges,
        models=text.models,
        findings=text.list_findings,
    )


def unite(registries: Iterable[Registry]) -> Registry:
    """Unite registries, for example the packaged one and a site's; one id twice is refused."""
    parts = tuple(sorted(registries, key=lambda each: each.digest))
    if len(parts) == 1:
        return parts[0]
    for kind, ids in (
        ("party", [each for part in parts for each in part.parties]),
        ("edge", [each.id for part in parts for each in part.edges]),
        ("model", [each for part in parts for each in part.models]),
        ("finding", [" ".join(each) for part in parts for each in part.findings]),
    ):
        if twice := _first_repeat(ids):
            raise RefusedError("pack.duplicate", f"{kind} {twice} stands in two registries")
    return _index(
        version="+".join(part.version for part in parts),
        digest=Digest.of(rfc8785.dumps([str(part.digest) for part in parts])),
        parties=[party for part in parts for party in part.parties.values()],
        edges=[edge for part in parts for edge in part.edges],
        models=[model for part in parts for model in part.models.values()],
        findings=[finding for part in parts for finding in part.findings.values()],
    )


def _check_ids(source: Source, text: _File) -> None:
    groups: tuple[tuple[str, list[str]], ...] = (
        ("parties", [each.id for each in text.parties]),
        ("edges", [each.id for each in text.edges]),
        ("models", [each.id for each in text.models]),
        (
            "list_findings",
            [f"{each.party} {each.list_id} {each.edition}" for each in text.list_findings],
        ),
    )
    for group, ids in groups:
        seen: set[str] = set()
        for at, each in enumerate(ids):
            if each in seen:
                raise source.refusal("pack.duplicate", (group, at), f"{each} stands twice")
            seen.add(each)


def _finding_key(finding: Finding) -> tuple[str, str, str]:
    return (finding.party, finding.list_id, finding.edition)


def _first_repeat(ids: list[str]) -> str | None:
    seen: set[str] = set()
    return next((each for each in ids if each in seen or seen.add(each)), None)  # type: ignore[func-returns-value]


def _index(
    *,
    version: str,
    digest: Digest,
    parties: Iterable[Party],
    edges: Iterable[Edge],
    models: Iterable[ModelRecord],
    findings: Iterable[Finding],
) -> Registry:
    by_id = {party.id: party for party in parties}
    edges, models = tuple(edges), tuple(models)
    for model in models:
        for end in _parties_of(model):
            _require_party(by_id, end, f"model {model.id}")
    keys = {party.id: _keys_of(party) for party in by_id.values()}
    by_name = _invert(keys, "party name")
    by_source = _invert(
        {model.id: [each.casefold() for each in (model.id, *model.sources)] for model in models},
        "model source",
    )
    listed = {_finding_key(finding): finding for finding in findings}
    for party, _, _ in listed:
        _require_party(by_id, party, "a finding")
    return Registry(
        version=version,
        digest=digest,
        parties=MappingProxyType(by_id),
        edges=edges,
        models=MappingProxyType({model.id: model for model in models}),
        findings=MappingProxyType(listed),
        steps=MappingProxyType(_steps(by_id, edges)),
        keys=MappingProxyType(keys),
        by_name=MappingProxyType(by_name),
        by_source=MappingProxyType(by_source),
    )


def _steps(parties: Mapping[str, Party], edges: Iterable[Edge]) -> dict[str, tuple[_Step, ...]]:
    found: dict[str, list[_Step]] = {each: [] for each in parties}
    for edge in edges:
        for end in (edge.subject, edge.object):
            _require_party(parties, end, f"edge {edge.id}")
        ends = [(edge.subject, edge.object)]
        if edge.relation in _SYMMETRIC:
            ends.append((edge.object, edge.subject))
        for near, far in ends:
            found[near].append(_Step(edge.relation, far, edge.sure, edge.valid, edge.id))
    return {each: tuple(sorted(steps, key=_edge_id)) for each, steps in found.items()}


def _edge_id(step: _Step) -> str:
    return step.edge_id


def _parties_of(model: ModelRecord) -> tuple[str, ...]:
    makers = (*model.developed_by, *model.codeveloped_by, *model.fine_tuned_by)
    bases = tuple(base.developer for base in model.derived_from or () if base.developer)
    return (*makers, *model.distributed_by, *bases)


def _invert(owners: Mapping[str, Iterable[str]], what: str) -> dict[str, str]:
    """Index owners by what they are called; one call for two owners is refused."""
    found: dict[str, str] = {}
    for owner, names in owners.items():
        for name in names:
            if found.setdefault(name, owner) != owner:
                raise RefusedError(
                    "pack.duplicate", f"{what} {name!r:.60} means {found[name]} and {owner}"
                )
    return found


def _require_party(parties: Mapping[str, Party], party: str, where: str) -> None:
    if party not in parties:
        raise RefusedError(
            "pack.vocabulary", f"{where} names party {party!r:.60}, which is not there"
        )


def _keys_of(party: Party) -> tuple[str, ...]:
    own = (party.legal_name,) if party.legal_name else ()
    return tuple(dict.fromkeys(normal_name(each) for each in (*own, *party.names, *party.handles)))


# -- where a path starts --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """A first step of a path: `party` is an id, a name or a handle; not sure means unknown."""

    relation: str
    party: str
    sure: bool
    source: str


@dataclass(frozen=True, slots=True)
class Start:
    """First steps that are known, and relations about which nothing is known (with the reason)."""

    origins: tuple[Origin, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def nothing_known(cls, reason: str = "not supplied") -> Start:
        """A start about which nobody has said anything."""
        relations = (*MAKER_RELATIONS, "affiliated_with", _SELF)
        return cls((), MappingProxyType(dict.fromkeys(relations, reason)))

    @classmethod
    def parties(cls, names: Iterable[str], source: str) -> Start:
        """A start at the parties themselves (`counterparty`, `recipient`)."""
        return cls(tuple(Origin(_SELF, each, sure=True, source=source) for each in names))

    def united(self, other: Start) -> Start:
        """Both starts: everything known of either, and everything unknown of either."""
        return Start(
            tuple(dict.fromkeys((*self.origins, *other.origins))),
            MappingProxyType({**self.unknown, **other.unknown}),
        )


# -- paths ----------------------------------------------------------------------------------------


class Hop(NamedTuple):
    """One step of a found path, for the trace."""

    relation: str
    party: str
    by: str


class PathResult(NamedTuple):
    """Value of one `any_path`, the path that decided it, and words for a reader."""

    truth: Truth
    hops: tuple[Hop, ...]
    words: str


class PathFinder:
    """Evaluates `any_path` leaves over one registry and the editions that are held."""

    def __init__(self, registry: Registry, held: Mapping[str, ListSnapshot | None]) -> None:
        self.registry = registry
        self.held = held
        self._hits: dict[tuple[str, str], tuple[Entry, ...]] = {}

    def find(self, leaf: AnyPath, start: Start, day: date) -> PathResult:
        """Walk every path once, nearest first; a sure hit decides, else the best unknown."""
        allowed = leaf.via | {_SELF}
        best = PathResult(F, (), self._clear_words(leaf))
        for relation in sorted(allowed & start.unknown.keys()):
            words = f"{relation} of {leaf.start} is unknown: {start.unknown[relation]}"
            best = PathResult(U, (), words)
        queue: deque[tuple[str, bool, tuple[Hop, ...]]] = deque(
            (each.party, each.sure, (Hop(each.relation, each.party, each.source),))
            for each in start.origins
            if each.relation in allowed
        )
        seen: set[tuple[str, bool]] = set()
        while queue:
            name, sure, hops = queue.popleft()
            party = self.registry.party_of(name)
            if {(party or name, True), (party or name, sure)} & seen:
                continue
            seen.add((party or name, sure))
            truth, words = self._look(leaf, party, name, day)
            if truth == T and sure:
                return PathResult(T, hops, words)
            if truth != F and best.truth == F:
                doubt = "" if sure else "; a step on the way is disputed or weakly sourced"
                best = PathResult(U, hops, words + doubt)
            for step in self.registry.steps[party] if party else ():
                if step.relation in leaf.via and step.valid.holds(day):
                    hop = Hop(step.relation, step.target, step.edge_id)
                    queue.append((step.target, sure and step.sure, (*hops, hop)))
        return best

    def _clear_words(self, leaf: AnyPath) -> str:
        if leaf.hits_list is None:
            return "no party of that domicile"
        snapshot = self.held.get(leaf.hits_list)
        edition = snapshot.text.edition if snapshot else "none held"
        return f"no hit on {leaf.hits_list} edition {edition}"

    def _look(self, leaf: AnyPath, party: str | None, name: str, day: date) -> tuple[Truth, str]:
        if leaf.hits_list is not None:
            return self._look_at_list(leaf, leaf.hits_list, party, name, day)
        if party is None:
            return U, f"{name} is not in the lineage registry"
        domicile = self.registry.parties[party].domicile
        if domicile is None:
            deferred = self._stands_for_another(party, leaf.via, day)
            return (F, "") if deferred else (U, f"the domicile of {party} is not recorded")
        found = leaf.domicile_in is not None and domicile in leaf.domicile_in
        return (T if found else F), f"{party} is domiciled in {domicile}"

    def _look_at_list(
        self, leaf: AnyPath, list_id: str, party: str | None, name: str, day: date
    ) -> tuple[Truth, str]:
        snapshot = self.held.get(list_id)
        if snapshot is None:
            return U, f"no edition of {list_id} is held"
        edition = f"{list_id} edition {snapshot.text.edition}"
        basis = leaf.basis or "released"
        entries = self._entries(snapshot, party, name)
        for entry in entries:
            window = entry.window(basis)
            if window is not None and window.holds(day):
                return T, f"{party or name} is on {edition} as {entry.names[0]} ({basis})"
        if any(entry.window(basis) is None and _on_other_basis(entry, day) for entry in entries):
            return U, f"{party or name} is on {edition}, but its {basis} dates are not recorded"
        if party is None:
            return U, f"{name} is not in the lineage registry"
        if entries or self._looked_at(snapshot, party, leaf.via, day):
            return F, f"no hit for {party} on {edition}"
        held = "" if snapshot.text.complete else ", which is held in part"
        return U, f"{party} has not been checked against {edition}{held}"

    def _looked_at(
        self, snapshot: ListSnapshot, party: str, via: frozenset[str], day: date
    ) -> bool:
        key = (party, snapshot.list_id, snapshot.text.edition)
        finding = self.registry.findings.get(key)
        if finding is not None:
            return finding.finding == "no_hit"
        return snapshot.text.complete or self._stands_for_another(party, via, day)

    def _entries(self, snapshot: ListSnapshot, party: str | None, name: str) -> tuple[Entry, ...]:
        if party is None:
            return snapshot.matches((normal_name(name),))
        key = (snapshot.list_id, party)
        found = self._hits.get(key)
        if found is None:
            found = self._hits[key] = snapshot.matches(self.registry.keys[party])
        return found

    def _stands_for_another(self, party: str, via: frozenset[str], day: date) -> bool:
        """Whether it is a unit or account of a legal person that the path goes on to look at."""
        if self.registry.parties[party].kind not in {"internal_unit", "model_org"}:
            return False
        return "same_person_as" in via and any(
            step.relation == "same_person_as" and step.sure and step.valid.holds(day)
            for step in self.registry.steps[party]
        )


def _on_other_basis(entry: Entry, day: date) -> bool:
    windows = (entry.released, entry.published)
    return any(window is not None and window.holds(day) for window in windows)


def boundaries(registry: Registry, held: Iterable[ListSnapshot | None]) -> set[date]:
    """Every day on which an edge or a listing begins or ends."""
    found: set[date | None] = set()
    for edge in registry.edges:
        found |= {edge.valid.start, edge.valid.end}
    for snapshot in held:
        for entry in snapshot.text.entries if snapshot else ():
            for window in (entry.released, entry.published):
                found |= {window.start, window.end} if window else set()
    return {day for day in found if day is not None}
