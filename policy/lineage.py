"""Who made a model: organisations, persons, control edges, bases (docs/design/policy.md, 8).

Names match exactly after normalisation, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple, TypeVar

import rfc8785
from pydantic import BeforeValidator, Field, StringConstraints

from policy.errors import RefusedError
from policy.pack import Confidence, SourceTag, require_schema
from policy.snapshots import Edition, normal_name
from policy.strict import Day, Frozen, Name, Words, parse_day, read_yaml
from policy.terms import Digest

SCHEMA = "airgap/lineage/1"
MAX_PARTIES = 20_000

_SURE = frozenset({"high", "medium"})
_SYMMETRIC = frozenset({"same_person_as", "affiliate_of"})


def _first_of_month(value: object) -> object:
    """Read a month as its first day."""
    if isinstance(value, str) and len(value) == len("2026-03"):
        value += "-01"
    return parse_day(value)


Key = TypeVar("Key")
Item = TypeVar("Item")
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


class LineageText(Frozen):
    """A registry file as written."""

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


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a person decided about two names that look alike, for one edition.

    It arrives as a verified value, like an approval. `name` and `against` are normalised.
    """

    name: str
    list_id: str
    edition: str
    against: str
    same: bool
    people: tuple[str, ...]
    expires: date | None
    digest: Digest
    issued: datetime | None = None  # of a signed one; that of a file is as old as its file


class Step(NamedTuple):
    """One edge as walked from one end."""

    relation: str
    target: str
    sure: bool
    valid: LooseWindow
    edge_id: str


@dataclass(frozen=True, eq=False)
class Registry:
    """The lineage graph, indexed once."""

    files: tuple[LineageFile, ...]
    version: str
    digest: Digest
    parties: Mapping[str, Party]
    edges: tuple[Edge, ...]
    models: Mapping[str, ModelRecord]
    findings: Mapping[tuple[str, str, str], Finding]
    steps: Mapping[str, tuple[Step, ...]]
    keys: Mapping[str, tuple[str, ...]]
    by_name: Mapping[str, str]
    by_source: Mapping[str, str]
    rulings: tuple[Ruling, ...] = ()

    def ruling(
        self, names: Iterable[str], listed: Iterable[str], edition: tuple[str, str], day: date
    ) -> Ruling | None:
        """What was decided about a party of these names and an entry of those; `same` goes first.

        An expired ruling is none.
        """
        ours, theirs = set(names), set(listed)
        found = [
            each
            for each in self.rulings
            if (each.list_id, each.edition) == edition
            and each.name in ours
            and each.against in theirs
            and (each.expires is None or day < each.expires)
        ]
        return max(found, key=lambda each: each.same, default=None)

    def known_by(self, moment: datetime) -> Registry:
        """The registry without the adjudications that were signed after `moment`."""
        later = any(each.issued is not None and each.issued > moment for each in self.rulings)
        return _known_by(self, moment) if later else self

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


@dataclass(frozen=True, slots=True)
class LineageFile:
    """A loaded registry file; its references are checked when files are united."""

    text: LineageText
    digest: Digest


def parse_lineage(content: bytes, name: str = "lineage") -> LineageFile:
    """Load one file of the lineage registry.

    Raises:
        RefusedError: `pack.*`, with line and column.

    """
    source = read_yaml(content, name)
    require_schema(source, SCHEMA)
    return LineageFile(source.build(LineageText), Digest.of(rfc8785.dumps(source.value)))


def unite(files: Iterable[LineageFile], rulings: Iterable[Ruling] = ()) -> Registry:
    """Make one registry of the packaged file and a site's own, in any order.

    An adjudication of a file counts when a reviewer is named; `rulings` are the signed ones.

    Raises:
        RefusedError: `pack.duplicate`, one id or name twice; `pack.vocabulary`, an unknown party.

    """
    parts = tuple(sorted(files, key=lambda each: each.digest))
    texts = [part.text for part in parts]
    parties = _by_id("party", [(each.id, each) for text in texts for each in text.parties])
    edges = _by_id("edge", [(each.id, each) for text in texts for each in text.edges])
    models = _by_id("model", [(each.id, each) for text in texts for each in text.models])
    findings = _by_id(
        "finding", [(_finding_key(each), each) for text in texts for each in text.list_findings]
    )
    for model in models.values():
        for end in _parties_of(model):
            _require_party(parties, end, f"model {model.id}")
    for finding in findings.values():
        _require_party(parties, finding.party, f"finding {finding.id}")
    keys = {party.id: _keys_of(party) for party in parties.values()}
    sources = {
        model.id: [each.casefold() for each in (model.id, *model.sources)]
        for model in models.values()
    }
    signed = tuple(sorted(rulings, key=lambda each: each.digest))
    identity = [str(part.digest) for part in parts] + [str(each.digest) for each in signed]
    return Registry(
        files=parts,
        version="+".join(str(text.registry_version) for text in texts),
        digest=Digest.of(rfc8785.dumps(identity)),
        parties=MappingProxyType(parties),
        edges=tuple(edges.values()),
        models=MappingProxyType(models),
        findings=MappingProxyType(findings),
        steps=MappingProxyType(_steps(parties, edges.values())),
        keys=MappingProxyType(keys),
        by_name=MappingProxyType(_invert(keys, "party name")),
        by_source=MappingProxyType(_invert(sources, "model source")),
        rulings=(*(each for part in parts for each in _reviewed(part)), *signed),
    )


@lru_cache(maxsize=64)
def _known_by(registry: Registry, moment: datetime) -> Registry:
    signed = [each for each in registry.rulings if each.expires is not None]
    return unite(
        registry.files, [each for each in signed if each.issued is None or each.issued <= moment]
    )


def _reviewed(part: LineageFile) -> list[Ruling]:
    return [
        Ruling(
            name=normal_name(each.name),
            list_id=each.list_id,
            edition=each.edition,
            against=normal_name(each.against),
            same=each.decision == "same",
            people=(each.reviewer,),
            expires=None,
            digest=part.digest,
        )
        for each in part.text.adjudications
        if each.reviewer is not None
    ]


def _by_id(kind: str, pairs: Iterable[tuple[Key, Item]]) -> dict[Key, Item]:
    found: dict[Key, Item] = {}
    for key, item in pairs:
        if key in found:
            raise RefusedError("pack.duplicate", f"{kind} {key} stands twice in the registry")
        found[key] = item
    return found


def _finding_key(finding: Finding) -> tuple[str, str, str]:
    return (finding.party, finding.list_id, finding.edition)


def _steps(parties: Mapping[str, Party], edges: Iterable[Edge]) -> dict[str, tuple[Step, ...]]:
    found: dict[str, list[Step]] = {each: [] for each in parties}
    for edge in edges:
        for end in (edge.subject, edge.object):
            _require_party(parties, end, f"edge {edge.id}")
        ends = [(edge.subject, edge.object)]
        if edge.relation in _SYMMETRIC:
            ends.append((edge.object, edge.subject))
        for near, far in ends:
            found[near].append(Step(edge.relation, far, edge.sure, edge.valid, edge.id))
    return {each: tuple(sorted(steps, key=_edge_id)) for each, steps in found.items()}


def _edge_id(step: Step) -> str:
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
