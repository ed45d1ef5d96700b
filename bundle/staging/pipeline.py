"""`airgap build`: from a snapshot to a draft of the release that only the builder has signed.

inspect -> admission -> convert (sealed) -> parity (sealed) -> bill of materials -> archive. The
policy is asked before the expensive steps, about the snapshot as it was hashed. The same snapshot,
facts and tools give the same body and manifest: no clock is read, `created` is an argument.
Everything happens in one work folder beside the output (`bundle.staging.resume`): a build that is
stopped leaves its finished steps there, and the next one goes on from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bundle.approval import have_room
from bundle.envelope import Envelope, sign_statement
from bundle.evidence.summary import PATH as SUMMARY
from bundle.evidence.summary import upstream_summary
from bundle.graphs import FileRef, Graph, Graphs, canonical_graphs
from bundle.keys import Signer, as_signers
from bundle.manifest import (
    REPORT,
    Base,
    Evidence,
    Licence,
    LicenceFound,
    Lineage,
    Manifest,
    ModelEntry,
    Origin,
    Release,
    Role,
    Supplier,
    first_problem,
)
from bundle.manifest import Parity as ParityClaim
from bundle.media import open_medium
from bundle.root import BUILDER
from bundle.scan.bom import PATH as BOM_PATH
from bundle.scan.payload import scan_payload
from bundle.scan.roles import Role as FileRole
from bundle.scan.strict import open_view
from bundle.scan.tokenizer import Tokenizer
from bundle.split import split
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
from bundle.staging.convert import PRECISIONS, Converted, convert, place_inputs
from bundle.staging.inspect import InspectReport, inspect_source
from bundle.staging.output import output_problem
from bundle.staging.parity import TOLERANCES, Assess, Parity, prove_parity, statement
from bundle.staging.resume import work_folder
from bundle.staging.sealed import RunSealed
from bundle.staging.source import Progress
from bundle.staging.upstream import Upstream
from bundle.staging.wheelhouse import Wheelhouse
from bundle.statement import PAYLOAD_TYPE, seal_statement
from bundle.trust import Trust, chain_document
from bundle.vectors import Vectors, canonical_vectors, vectors_path
from bundle.write import Member, write_archive
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

Admit = Callable[[Sequence[ModelEntry], Digest], bytes]
"""Gives the canonical record of the admission decision, or raises `policy.*`."""

DECISION = "META/policy/admission.json"
_ATTEST = "META/attest"
_SPACE = 6  # times the bytes of the weights: fp32 graph, its copy while it is written, the archive
_FLOOR = 64 * 1024 * 1024
_MEDIA = {".json": "application/json", ".md": "text/markdown", ".txt": "text/plain"}
# A sealed process holds the weights in fp32, the graph and a copy of it; and two libraries.
_MEMORY_FACTOR, _MEMORY_FLOOR = 5, 6144


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
class Cut:
    """How a draft is cut into volumes: the most bytes of one, and how many of parity."""

    size: int
    parity: int = 0


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was taken over from a build that was stopped: sealed runs by name, and chunks."""

    runs: tuple[str, ...] = ()
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class Built:
    """A finished draft; of a set of volumes `path` is the first one."""

    path: Path
    manifest: Manifest
    report: InspectReport
    parity: Parity
    vectors: tuple[Vectors, ...]
    builder: str
    decision: Mapping[str, Any]
    seal: Mapping[str, object]
    resumed: Resumed = Resumed()
    volumes: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the file, or of all volumes."""
        return sum(path.stat().st_size for path in self.volumes or (self.path,))


def build(
    folder: Path,
    out: Path,
    facts: Facts,
    *,
    trust: Trust,
    signer: Signer | Sequence[Signer],
    run_sealed: RunSealed | None,
    admit: Admit,
    pins: Path | None = None,
    upstream: Upstream | None = None,
    wheelhouse: Wheelhouse | None = None,
    cut: Cut | None = None,
    precisions: Sequence[str] = ("fp32",),
    reference: bool = True,
    assess: Assess | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build the draft of a release.

    Args:
        folder: The snapshot.
        out: The bundle; replaced if it exists, and untouched until the draft is complete.
        facts: What the snapshot does not say.
        trust: Of this site; names the person whose key `signer` is.
        signer: The builder's key; both keys in the profile `cnsa2`.
        run_sealed: Runs a program without a network; refused when there is none.
        admit: Asks the policy for the admission.
        pins: A file in the form of `sha256sum`.
        upstream: Evidence of the publisher, and whom this site believes.
        wheelhouse: Wheels that travel along.
        cut: Write volumes `out`.001, ... in the place of one file.
        precisions: Which the bundle shall hold; fp32 is always among them.
        reference: Whether it carries the reference graph where there is a fast one.
        assess: Counts valid completions, for the task figures of a precision.
        progress: Told stages and units.

    Raises:
        RefusedError: Codes of inspection, conversion, parity, policy and manifest.
        FaultError: `host.*`.

    """
    if run_sealed is None:
        raise RefusedError(
            "build.seal",
            "there is no sealed runner; a model is never converted outside the seal",
            hint="run `airgap doctor` to see what this host lacks, or convert on another one",
        )
    tell = progress or _silent
    builder = require_builder(trust, signer, facts.created)
    require_output(out)
    report = inspect_source(
        folder,
        pins=pins,
        upstream=dataclasses.replace(upstream or Upstream(), at=facts.created),
        name=facts.model_id,
        origin=facts.source,
        run_sealed=run_sealed,
        progress=progress,
    )
    report.require_ready()
    model = model_entry(report, facts, precisions)
    tell("admit", 0, 1)
    record = admit([model], source_digest(report))
    tell("admit", 1, 1)
    _require_space(report, out, cut)
    hashed = [(file.identity, report.digests[file.path].sha256) for file in report.files]
    with work_folder(out, hashed) as found:
        work, kept, run_sealed = found.folder, found.archive, found.keeping(run_sealed)
        source = work / "source"
        place_inputs(report, source)
        memory = memory_of(report)
        tell("convert", 0, 1)
        converted = convert(
            report,
            source,
            work / "graph",
            run_sealed=run_sealed,
            memory_mb=memory,
            precisions=precisions,
            reference=reference,
            progress=lambda done, total: tell("quantize", done, total),
        )
        tell("convert", 1, 1)
        tell("parity", 0, 1)
        parity = prove_parity(
            source,
            work / "graph",
            work / "parity",
            made=converted.graphs,
            run_sealed=run_sealed,
            memory_mb=memory,
        )
        tell("parity", 1, 1)
        tell("describe", 0, 1)
        draft = describe(
            report,
            facts,
            model,
            converted,
            parity,
            record=record,
            pins=pins,
            assess=assess,
            wheelhouse=wheelhouse,
        )
        tell("describe", 1, 1)

        def seal(manifest: Manifest) -> Envelope:
            scan_payload(_reader(draft.members), manifest)
            payload = seal_statement(
                manifest,
                builder=builder,
                policy_pack_digests=draft.pack_digests,
                attested=have_room(trust.document),
            ).to_bytes()
            return sign_statement(payload, PAYLOAD_TYPE, *as_signers(signer))

        whole = out if cut is None else found.kept / out.name
        manifest = write_archive(
            whole,
            draft.release.model_copy(update={"profile": trust.document.profile}),
            draft.members,
            trust_chain=chain_document(trust),
            seal=seal,
            progress=lambda done, total: tell("seal", done, total),
            kept=kept,
        )
        volumes = () if cut is None else _cut(whole, out, cut, tell)
    taken = Resumed(tuple(found.resumed), kept.resumed)
    return Built(
        volumes[0] if volumes else out,
        manifest,
        report,
        parity,
        draft.vectors,
        builder,
        draft.decision,
        converted.seal or parity.seal,
        taken,
        volumes,
    )


def _cut(whole: Path, out: Path, cut: Cut, tell: Progress) -> tuple[Path, ...]:
    """Write the volumes of a finished draft beside the place of `out`."""
    medium = open_medium(whole)
    try:
        return split(
            medium,
            out.absolute().parent,
            volume_size=cut.size,
            parity_count=cut.parity,
            progress=lambda done, total: tell("volumes", done, total),
        )
    finally:
        medium.close()


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


def require_builder(trust: Trust, signer: Signer | Sequence[Signer], at: datetime) -> str:
    """Return the person whose keys sign, who must be enrolled as a builder.

    Raises:
        RefusedError: `seal.role`.

    """
    keyids = [each.public_key.keyid for each in as_signers(signer)]
    keyid = keyids[0]
    who = next(iter(trust.document.people_of(keyids)), None)
    person = trust.document.people.get(who or "")
    if who is None or person is None or BUILDER not in person.roles or not person.is_enrolled(at):
        found = "nobody's here" if who is None else f"{who}'s, who is not enrolled as a builder"
        raise RefusedError(
            "seal.role",
            f"key {keyid} is {found}; a draft is signed by an enrolled builder",
            hint="`airgap trust show` lists people and roles; `airgap trust add` enrols a key",
        )
    return who


def memory_of(report: InspectReport) -> int:
    """Return the memory in MiB that the sealed processes may take."""
    return _MEMORY_FLOOR + _MEMORY_FACTOR * 4 * report.parameters // (1024 * 1024)


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
        bos_id=shape.bos_id,
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
    from bundle.canonical import parse_strict

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


def _reader(members: Sequence[Member]) -> Callable[[str], memoryview]:
    by_path = {member.path: member.source for member in members}

    def read(path: str) -> memoryview:
        source = by_path[path]
        return memoryview(source) if isinstance(source, bytes) else open_view(source)

    return read


def require_output(out: Path) -> None:
    """Refuse a place where no file can be put: `build.output`, fault `host.io`."""
    parent = out.absolute().parent
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise FaultError("host.io", f"{str(parent)!r:.160} cannot be written")
    problem = output_problem(out)
    if problem:
        raise RefusedError(
            "build.output",
            f"{str(out)!r:.160} cannot be a file: {problem}",
            hint="name a file in an existing folder, for example -o model-1.0.agb",
        )


def _require_space(report: InspectReport, out: Path, cut: Cut | None) -> None:
    weights = sum(tensor.end - tensor.start for tensor in report.tensors.values())
    needed = _FLOOR + (_SPACE if cut is None else 2 * _SPACE) * weights
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise FaultError(
            "host.space",
            f"building needs about {needed // 1024**2:,} MiB beside {out.name!r:.80}, "
            f"free are {free // 1024**2:,}",
            hint="free space, or name an output on a larger disk",
        )


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


def _silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""
