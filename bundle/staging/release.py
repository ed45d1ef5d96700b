"""What a release says: facts, manifest's entry, payload, bill of materials and statements.

Decides which document of a draft holds what (bundle/FORMAT.md); `bundle.staging.pipeline` runs the
steps and writes the archive. Nothing here converts or reads a clock: the same snapshot, facts,
figures and decision give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bundle.canonical import parse_strict
from bundle.evidence.summary import PATH as SUMMARY
from bundle.evidence.summary import upstream_summary
from bundle.graphs import FileRef, Graph, Graphs, canonical_graphs
from bundle.manifest import (
    REPORT,
    Base,
    Evidence,
    Licence,
    LicenceFound,
    Lineage,
    ModelEntry,
    Origin,
    Release,
    Role,
    Supplier,
    first_problem,
)
from bundle.manifest import Parity as ParityClaim
from bundle.scan.bom import PATH as BOM_PATH
from bundle.scan.roles import Role as FileRole
from bundle.scan.strict import open_view
from bundle.scan.tokenizer import Tokenizer
from bundle.staging.architecture import Architecture
from bundle.staging.attest import (
    conversion_statement,
    evidence_of,
    pickles_of,
    scan_statement,
    source_digest,
    source_files,
)
from bundle.staging.bom import bill_of_materials
from bundle.staging.bootstrap import ATTEST as WHEELS
from bundle.staging.bootstrap import attestation_of
from bundle.staging.convert import PRECISIONS, Converted
from bundle.staging.inspect import InspectReport
from bundle.staging.parity import TOLERANCES, Assess, Parity, statement
from bundle.staging.wheelhouse import Wheelhouse
from bundle.vectors import Vectors, canonical_vectors, vectors_path
from bundle.write import Member
from policy.errors import RefusedError
from policy.terms import Digest

DECISION = "META/policy/admission.json"
_ATTEST = "META/attest"
_MEDIA = {".json": "application/json", ".md": "text/markdown", ".txt": "text/plain"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the builder states; None leaves it to the snapshot.

    `revision` defaults to the hub's commit, else to a digest over the digests of all files. `base`
    is the older release that a delta may be made on.
    """

    model_id: str
    version: str
    created: datetime
    expires: datetime
    epoch: int
    source: str | None = None
    revision: str | None = None
    supplier: str | None = None
    jurisdiction: str | None = None
    modalities: tuple[str, ...] = ()
    intended_use: str | None = None
    bundle_id: str | None = None
    base: Base | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """All that goes into the archive, before it is written."""

    release: Release
    members: tuple[Member, ...]
    vectors: tuple[Vectors, ...]
    decision: Mapping[str, Any]
    pack_digests: tuple[Digest, ...]


def describe(
    report: InspectReport,
    facts: Facts,
    model: ModelEntry,
    converted: Converted,
    parity: Parity,
    *,
    record: bytes,
    pins: Path | None,
    assess: Assess | None = None,
    wheelhouse: Wheelhouse | None = None,
) -> Draft:
    """Make every document of the release; `record` is the decision of the policy."""
    payload = _payload(report, facts, converted)
    digests = {member.path: _digest(member) for member in payload}
    names = {
        f"/{name}"
        for made in converted.graphs
        for name in (made.path, *set(made.external).difference(made.published))
    }
    graph_files = {path: digest for path, digest in digests.items() if path.endswith(tuple(names))}
    weights = {
        file.path: report.digests[file.path].sha256
        for file in report.weights()
        if report.roles[file.path] is FileRole.WEIGHTS
    }
    decision = _decision(record)
    tools = {**converted.versions, **parity.versions}
    bom = bill_of_materials(
        model,
        facts.version,
        report,
        parity,
        files=[(member.path, digests[member.path], _size(member)) for member in payload],
        tools=tools,
        created=facts.created,
        wheelhouse=wheelhouse,
    )
    evidence, evidence_members = evidence_of(report, facts.model_id, pins)
    pack_digests = _pack_digests(decision)
    summary = upstream_summary(
        model, evidence, source_files(report), created=facts.created, policy=pack_digests
    )
    vectors = parity.vectors_documents(facts.model_id, assess)
    recipes = {made.codes: made.recipe for made in converted.graphs if made.codes}
    documents: list[tuple[str, bytes, Role]] = [
        (REPORT, report.to_bytes(), "report"),
        (f"{_ATTEST}/parity.json", statement(parity, graph_files, weights), "attestation"),
        (f"{_ATTEST}/scan.json", scan_statement(report, weights), "attestation"),
        (
            f"{_ATTEST}/conversion.json",
            conversion_statement(
                graph_files,
                weights,
                tools,
                stable_evidence(converted.seal),
                pickles=pickles_of(report),
                recipes=recipes,
            ),
            "attestation",
        ),
        (SUMMARY, summary, "attestation"),
        (BOM_PATH, bom, "sbom"),
        (DECISION, record, "policy"),
        *((vectors_path(each.precision), canonical_vectors(each), "vectors") for each in vectors),
    ]
    if wheelhouse is not None:
        documents.append((WHEELS, attestation_of(wheelhouse), "attestation"))
    members = [
        *(Member(path, data, role, "application/json") for path, data, role in documents),
        *evidence_members,
        *payload,
        *(() if wheelhouse is None else wheelhouse.members),
    ]
    release = _release(facts, model, evidence, vectors)
    if wheelhouse is not None:
        release = release.model_copy(update={"runtimes": wheelhouse.runtimes})
    return Draft(release, tuple(members), vectors, decision, pack_digests)


def _release(
    facts: Facts,
    model: ModelEntry,
    evidence: tuple[Evidence, ...],
    vectors: tuple[Vectors, ...],
) -> Release:
    return Release(
        bundle_id=facts.bundle_id or facts.model_id,
        name=facts.model_id,
        version=facts.version,
        created=facts.created,
        not_before=facts.created,
        expires=facts.expires,
        epoch=facts.epoch,
        base=facts.base,
        models=(model,),
        evidence=evidence,
        parity=tuple(
            ParityClaim(
                model=each.model,
                precision=each.precision,
                provider=each.provider,
                tolerance=str(TOLERANCES[each.precision]),
                vectors=vectors_path(each.precision),
            )
            for each in vectors
        ),
    )


def model_entry(
    report: InspectReport, facts: Facts, precisions: Sequence[str] = ("fp32",)
) -> ModelEntry:
    """Return the manifest's entry: stated facts first, then those of the card and the hub.

    Raises:
        RefusedError: `build.facts`; a fact is not of the form that the manifest demands.

    """
    try:
        return _model_entry(report, facts, precisions)
    except ValidationError as error:
        raise RefusedError(
            "build.facts",
            f"a fact about the model: {first_problem(error)}",
            hint="state it with an option of `airgap build`; names hold letters, digits, . _ + -",
        ) from error


def _model_entry(report: InspectReport, facts: Facts, precisions: Sequence[str]) -> ModelEntry:
    card = report.card
    stated = [found for found in report.licences if found.place.endswith("#license")]
    first = next(iter([*stated, *report.licences]), None)
    texts = [found for found in report.licences if first and found.spdx == first.spdx]
    # What is stated is verified where its complete text lies beside it.
    text = next((found for found in texts if found.status == "verified"), first)
    supplier = card.get("supplier")
    named = supplier if isinstance(supplier, dict) else {"legal_name": supplier}
    return ModelEntry(
        id=facts.model_id,
        source=facts.source or _source(report, facts.model_id),
        revision=facts.revision or _revision(report),
        provenance_level=report.provenance["level"],
        precisions=tuple(each for each in PRECISIONS if each == "fp32" or each in precisions),
        licence=Licence(
            spdx=first.spdx if first else "NOASSERTION",
            text_digest=f"sha256:{text.sha256}" if text else None,
            status="verified" if text and text.status == "verified" else "declared",
        ),
        licences_found=tuple(
            LicenceFound.model_validate(
                {"spdx": f.spdx, "place": f.place, "sha256": f.sha256, "status": f.status}
            )
            for f in report.licences
        ),
        supplier=Supplier(
            legal_name=facts.supplier or _text(named.get("legal_name")) or "not stated",
            jurisdiction=facts.jurisdiction or _text(named.get("jurisdiction")) or "unknown",
            status="declared",
        ),
        base_models=tuple(
            dict.fromkeys(h.party for h in report.lineage if h.relation == "derived_from")
        ),
        lineage=tuple(
            Lineage.model_validate({"relation": h.relation, "party": h.party, "status": h.status})
            for h in report.lineage
        ),
        modalities=facts.modalities or modalities_of(report),
        intended_use=facts.intended_use or _text(card.get("intended_use")) or "not stated",
        reference_model=report.reference_model,
        scientific_use=report.scientific_use,
    )


def modalities_of(report: InspectReport) -> tuple[str, ...]:
    """Return what the model reads and writes: as the card says, else as its tags tell."""
    stated = report.card.get("modalities")
    if isinstance(stated, list) and stated and all(isinstance(item, str) for item in stated):
        return tuple(stated)
    by_tag = {
        "<ReverseReact>": "retrosynthesis",
        "<MoleculeS>": "molecule",
        "<ProteinS>": "protein",
        "<AntibodyS>": "antibody",
        "<MaterialS>": "material",
    }
    return tuple(name for tag, name in by_tag.items() if tag in report.tags) or ("text",)


def _payload(report: InspectReport, facts: Facts, converted: Converted) -> tuple[Member, ...]:
    base = f"payload/{facts.model_id}"
    derived = tuple(
        sorted(
            f"sha256:{report.digests[file.path].sha256}"
            for file in report.weights()
            if report.roles[file.path] is FileRole.WEIGHTS
        )
    )
    members: list[Member] = []
    for file in report.carried():
        if "/" in file.path:
            continue
        found = report.roles[file.path]
        known: Role = "config" if found is FileRole.CONFIG else "document"
        digests = report.digests[file.path]
        members.append(
            Member(
                f"{base}/{file.path}",
                file.place,
                "tokenizer" if found is FileRole.TOKENIZER else known,
                _MEDIA.get(Path(file.path).suffix, "text/plain"),
                origin=Origin(sha256=digests.sha256, git_blob=digests.git_blob),
                sha256=digests.sha256,
            )
        )
    for made in converted.graphs:
        files: list[tuple[str, Role]] = [(made.path, "onnx")]
        files += [(name, "external-data") for name in made.external]
        for name, role in files:
            if any(member.path == f"{base}/{name}" for member in members):
                continue  # several graphs read one file
            place = converted.folder / name
            sha256 = hashlib.sha256(open_view(place)).hexdigest()
            if name in made.published:
                published = report.digests[name]
                origin = Origin(sha256=published.sha256, git_blob=published.git_blob)
                members.append(Member(f"{base}/{name}", place, role, origin=origin, sha256=sha256))
            else:
                members.append(
                    Member(f"{base}/{name}", place, role, derived_from=derived, sha256=sha256)
                )
    graphs = _graphs(report, facts, converted, {member.path: _digest(member) for member in members})
    members.append(
        Member(f"{base}/graphs.json", canonical_graphs(graphs), "graphs", "application/json")
    )
    return tuple(members)


def _graphs(
    report: InspectReport, facts: Facts, converted: Converted, digests: Mapping[str, str]
) -> Graphs:
    base = f"payload/{facts.model_id}"
    shape, tokenizer = _shape_of(report)
    return Graphs(
        model=facts.model_id,
        architecture=shape.kind,
        vocab_size=shape.vocabulary,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_context=shape.context,
        bos_id=report.start_id,
        eos_ids=shape.eos_ids,
        pad_id=shape.pad_id,
        unk_id=None if tokenizer.unk is None else tokenizer.ids[tokenizer.unk],
        reference_model=report.reference_model,
        scientific_use=report.scientific_use,
        tokenizer=FileRef(path="tokenizer.json", sha256=digests[f"{base}/tokenizer.json"]),
        tags=report.tags,
        graphs=tuple(
            Graph(
                name=made.name,
                precision=made.precision,
                path=made.path,
                sha256=digests[f"{base}/{made.path}"],
                external=tuple(
                    FileRef(path=name, sha256=digests[f"{base}/{name}"]) for name in made.external
                ),
                inputs=made.graph.inputs,
                outputs=made.graph.outputs,
                kv_layout="BHSD",
                interface=made.interface,
            )
            for made in converted.graphs
        ),
    )


def stable_evidence(seal: Mapping[str, object]) -> dict[str, object]:
    """Return the part of a seal's evidence that two runs on one host share: no ids, no times."""
    kept = ("type", "verdict", "profile", "rung", "net", "seccomp", "landlock")
    return {key: seal[key] for key in kept if key in seal}


def _decision(record: bytes) -> Mapping[str, Any]:
    value = parse_strict(record, code="build.facts", what="the admission decision", limit=1 << 22)
    return value if isinstance(value, dict) else {}


def _pack_digests(decision: Mapping[str, Any]) -> tuple[Digest, ...]:
    """Return the digests of the rule packs that decided, as the record names them."""
    packs = decision.get("packs")
    items = packs if isinstance(packs, list) else []
    found = {str(item["digest"]) for item in items if isinstance(item, dict) and "digest" in item}
    return tuple(Digest.parse(text) for text in sorted(found))


def _shape_of(report: InspectReport) -> tuple[Architecture, Tokenizer]:
    if report.architecture is None or report.tokenizer is None:
        raise RefusedError("source.incomplete", "the snapshot holds no complete model")
    return report.architecture, report.tokenizer


def _source(report: InspectReport, model_id: str) -> str:
    return f"local:{model_id}" if report.repository is None else f"hf:{report.repository}"


def _revision(report: InspectReport) -> str:
    """Return the commit of the hub, else a digest over the digests of all files."""
    if report.hub is not None:
        return report.hub.commit
    return str(source_digest(report))


def _digest(member: Member) -> str:
    if member.sha256 is not None:
        return member.sha256
    source = member.source
    return hashlib.sha256(source if isinstance(source, bytes) else open_view(source)).hexdigest()


def _size(member: Member) -> int:
    source = member.source
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""
