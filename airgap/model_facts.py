"""What manifest and lineage registry together say of the models in a bundle.

The registry answers where it knows a model by its source; a manifest may only add to that. Of a
model without a record everything that only a record says is unknown: who else made it, what it was
made from, and under which licences those bases stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from bundle.manifest import ModelEntry
from policy.errors import RefusedError
from policy.facts import UNREAD
from policy.lineage import ModelRecord, Registry
from policy.paths import Origin, Start
from policy.terms import FACTS, MAKER_RELATIONS, MODALITIES, PRECISIONS, Fact, Known, Unknown


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """Facts and first lineage steps of a bundle."""

    facts: Mapping[str, Fact]
    starts: Mapping[str, Start]


def bundle_facts(models: Sequence[ModelEntry], registry: Registry) -> BundleFacts:
    """Gather what manifest and registry say of the models together."""
    return _bundle_facts([_of_entry(entry, registry) for entry in models])


def registry_facts(model: str, registry: Registry) -> BundleFacts:
    """Gather what the registry alone says of a model; RefusedError `policy.model`."""
    record = registry.model_of(model)
    if record is None:
        known = ", ".join(sorted(registry.models))
        raise RefusedError(
            "policy.model",
            f"the lineage registry holds no model {model!r:.80}; it holds {known:.300}",
            hint="a site adds a model in a registry file of its own, under policy/ of its root",
        )
    return _bundle_facts([_of_record(record)])


@dataclass(frozen=True, slots=True)
class _Part:
    """What is known of one model: `source` answers where it can, `manifest` says the rest."""

    source: str
    manifest: str
    licences: frozenset[str]
    origins: tuple[Origin, ...]
    unknown_makers: Mapping[str, str]
    base_origins: tuple[Origin, ...]
    unknown_bases: Mapping[str, str]
    modalities: frozenset[str] | None
    tuned_on_nih_ca: bool | None
    precisions: frozenset[str] = frozenset()
    level: int | None = None
    complete: bool | None = None
    texts: bool | None = None


_NO_RECORD = "the lineage registry holds no record of this model"


def _of_record(record: ModelRecord) -> _Part:
    source = f"registry: {record.id}"
    origins = [
        Origin(relation, party, sure=True, source=source)
        for relation, parties in (
            ("developed_by", record.developed_by),
            ("codeveloped_by", record.codeveloped_by),
            ("fine_tuned_by", record.fine_tuned_by),
            ("distributed_by", record.distributed_by),
        )
        for party in parties
    ]
    bases: list[Origin] = []
    unknown_bases: dict[str, str] = {}
    if record.derived_from is None:
        unknown_bases = dict.fromkeys(MAKER_RELATIONS, "the base model is not recorded")
    for base in record.derived_from or ():
        if base.developer is None:
            unknown_bases["developed_by"] = f"nobody recorded who made {base.family}"
        else:
            sure = base.confidence in {"high", "medium"}
            words = f"{source}, base {base.family}"
            bases.append(Origin("developed_by", base.developer, sure=sure, source=words))
    licences = {each.id for each in record.licences_declared or ()} or {UNREAD}
    return _Part(
        source=source,
        manifest="",
        licences=frozenset(licences),
        origins=tuple(origins),
        unknown_makers={},
        base_origins=tuple(bases),
        unknown_bases=unknown_bases,
        modalities=None if record.modalities is None else frozenset(record.modalities),
        tuned_on_nih_ca=record.tuned_on_nih_ca,
    )


def _of_entry(entry: ModelEntry, registry: Registry) -> _Part:
    """Join a manifest entry with its record: the record answers, the manifest may only add."""
    record = registry.model_of(entry.source)
    known = _of_record(record) if record is not None else None
    origins = list(known.origins) if known else []
    bases = list(known.base_origins) if known else []
    unknown_makers = dict(
        known.unknown_makers if known else dict.fromkeys(MAKER_RELATIONS, _NO_RECORD)
    )
    unknown_bases = dict(
        known.unknown_bases if known else dict.fromkeys(MAKER_RELATIONS, _NO_RECORD)
    )
    for edge in entry.lineage:
        source = f"manifest of {entry.id} ({edge.status})"
        if edge.relation in MAKER_RELATIONS:
            origins.append(Origin(edge.relation, edge.party, sure=True, source=source))
            if edge.status == "verified":
                unknown_makers.pop(edge.relation, None)
    for name in (*entry.base_models, *_derived_from(entry)):
        party = registry.publisher_of(name if ":" in name else f"hf:{name}")
        if party is None:
            unknown_bases["developed_by"] = f"nobody recorded who made the base model {name:.80}"
        else:
            source = f"manifest of {entry.id}, base {name:.80}"
            bases.append(Origin("developed_by", party, sure=True, source=source))
    suppliers = (entry.supplier.legal_name, registry.publisher_of(entry.source))
    for supplier in suppliers:
        if supplier and supplier.casefold() not in _NOBODY:
            source = f"manifest of {entry.id}, supplier ({entry.supplier.status})"
            origins.append(Origin("distributed_by", supplier, sure=True, source=source))
    licences = set(known.licences) if known else {UNREAD}
    for spdx in (entry.licence.spdx, *(each.spdx for each in entry.licences_found)):
        licences |= licence_ids(spdx)
    return _Part(
        source=known.source if known else f"manifest of {entry.id}",
        manifest=f"manifest of {entry.id}",
        licences=frozenset(licences),
        origins=tuple(dict.fromkeys(origins)),
        unknown_makers=unknown_makers,
        base_origins=tuple(dict.fromkeys(bases)),
        unknown_bases=unknown_bases,
        modalities=frozenset(entry.modalities),
        tuned_on_nih_ca=known.tuned_on_nih_ca if known else None,
        precisions=frozenset(entry.precisions),
        level=int(entry.provenance_level.removeprefix("L")),
        complete=entry.supplier.legal_name.casefold() not in _NOBODY
        and UNREAD not in licence_ids(entry.licence.spdx),
        texts=entry.licence.text_digest is not None
        and all(each.sha256 is not None for each in entry.licences_found),
    )


_NOBODY = frozenset({"", "unknown", "none", "noassertion", "not stated"})


def _derived_from(entry: ModelEntry) -> tuple[str, ...]:
    return tuple(each.party for each in entry.lineage if each.relation == "derived_from")


def _bundle_facts(parts: Sequence[_Part]) -> BundleFacts:
    if not parts:
        return BundleFacts(MappingProxyType({}), MappingProxyType({}))
    record = "; ".join(dict.fromkeys(part.source for part in parts))
    manifest = "; ".join(dict.fromkeys(part.manifest or part.source for part in parts))
    named = (name for part in parts for name in (part.source, part.manifest) if name)
    either = "; ".join(dict.fromkeys(named))
    facts: dict[str, Fact] = {
        "bundle.licences": Known(frozenset().union(*(part.licences for part in parts)), either),
        "bundle.modalities": _union([part.modalities for part in parts], MODALITIES, manifest),
        "bundle.precisions": _union([part.precisions for part in parts], PRECISIONS, manifest),
        "bundle.tuned_on_nih_ca": _any_true([part.tuned_on_nih_ca for part in parts], record),
        "bundle.provenance_level": _least([part.level for part in parts], manifest),
        "bundle.manifest_complete": _all_true([part.complete for part in parts], manifest),
        "bundle.licence_texts_recorded": _all_true([part.texts for part in parts], manifest),
    }
    makers = Start()
    bases = Start()
    for part in parts:
        makers = makers.united(Start(part.origins, part.unknown_makers))
        bases = bases.united(Start(part.base_origins, part.unknown_bases))
    return BundleFacts(facts, {"bundle": makers, "base_bundles": bases})


def _union(sets: Sequence[frozenset[str] | None], members: frozenset[str], source: str) -> Fact:
    found: set[str] = set()
    for each in sets:
        if each is None:
            return Unknown("not recorded", source)
        found |= each
    strange = sorted(found - members)
    if strange:
        return Unknown(f"{strange[0]!r:.60} is not in the vocabulary", source)
    return Known(frozenset(found), source)


def _any_true(values: Sequence[bool | None], source: str) -> Fact:
    if True in values:
        return Known(value=True, source=source)
    return Unknown("not recorded", source) if None in values else Known(value=False, source=source)


def _all_true(values: Sequence[bool | None], source: str) -> Fact:
    if False in values:
        return Known(value=False, source=source)
    return Unknown("not recorded", source) if None in values else Known(value=True, source=source)


def _least(values: Sequence[int | None], source: str) -> Fact:
    known = [each for each in values if each is not None]
    if len(known) < len(values):
        return Unknown("not recorded", source)
    return Known(min(known), source)


_LICENCE_ALIASES = {
    "llama-3.2": "llama-3.2-community",
    "llama-3.2-aup": "llama-3.2-community",  # the use policy is part of the licence's terms
    "llama3.2": "llama-3.2-community",
}
_NO_LICENCE = frozenset({"", "noassertion", "none", "unknown", "other", "license", "proprietary"})
_OPERATORS = re.compile(r"\s+(?:and|or|with)\s+|[()]")


def licence_ids(expression: str) -> frozenset[str]:
    """Read an SPDX expression as the union of its licences: the product never picks one.

    A licence that names nothing gives `unread`.
    """
    found: set[str] = set()
    for part in _OPERATORS.split(expression.casefold().strip()):
        name = part.strip().removeprefix("licenseref-")
        if not name and expression.strip():
            continue
        name = _LICENCE_ALIASES.get(name, name)
        good = name not in _NO_LICENCE and FACTS["bundle.licences"].fault_of_member(name) is None
        found.add(name if good else UNREAD)
    return frozenset(found or {UNREAD})
