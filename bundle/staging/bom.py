"""The bill of materials: CycloneDX 1.7 with a model card and the pedigree of the conversion.

Every claim bears `airgap:status`, `verified` where bytes or a proof confirm it and `declared`
where a publisher merely says so (docs/design/bundle.md, 6). The document is checked against
the schema of CycloneDX before it is sealed, and against the files again on the secured side.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from bundle.canonical import canonical_json
from bundle.evidence.levels import UNPICKLED
from bundle.fields import format_time
from bundle.manifest import ModelEntry
from bundle.scan.bom import PATH
from bundle.staging.inspect import InspectReport
from bundle.staging.parity import Parity
from policy.errors import FaultError, RefusedError
from policy.terms import URI_BASE, Digest

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, URI_BASE)


def bill_of_materials(
    model: ModelEntry,
    version: str,
    report: InspectReport,
    parity: Parity,
    *,
    files: Sequence[tuple[str, str, int]],
    tools: Mapping[str, str],
    created: datetime,
) -> bytes:
    """Return the canonical bytes of the document, checked against the schema.

    Args:
        model: The manifest's entry.
        version: Of the release.
        report: Of the snapshot.
        parity: The proof.
        files: Path, SHA-256 and size of every file below `payload/`.
        tools: Name and version of what took part in the conversion.
        created: Of the release.

    Raises:
        RefusedError: `build.bom`.
        FaultError: `host.extra`; the schema is not installed.

    """
    weights = [file for file in report.weights() if file.path.endswith(".safetensors")]
    source = {file.path: report.digests[file.path].sha256 for file in weights}
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, _identity(model, version, files))}",
        "version": 1,
        "metadata": {
            "timestamp": format_time(created),
            "lifecycles": [{"phase": "build"}],
            "tools": {
                "components": [
                    {"type": "library", "name": name, "version": number}
                    for name, number in sorted(tools.items())
                ]
            },
            "component": {
                "type": "data",
                "bom-ref": "release",
                "name": model.id,
                "version": version,
            },
        },
        "components": [_model(model, version, report, parity, files=files, source=source)],
        "dependencies": [{"ref": "release", "dependsOn": [f"model:{model.id}"]}],
    }
    raw = canonical_json(document)
    require_schema(raw)
    return raw


def require_schema(raw: bytes) -> None:
    """Check the bytes against the schema of CycloneDX 1.7.

    Raises:
        RefusedError: `build.bom`.
        FaultError: `host.extra`.

    """
    try:
        from cyclonedx.exception import MissingOptionalDependencyException
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        raise _missing(error) from error
    try:
        problem = JsonStrictValidator(SchemaVersion.V1_7).validate_str(raw.decode())
    except MissingOptionalDependencyException as error:
        raise _missing(error) from error
    if problem is not None:
        text = " ".join(str(problem.data if hasattr(problem, "data") else problem).split())
        raise RefusedError("build.bom", f"{PATH} breaks the schema: {text:.240}")


def _model(
    model: ModelEntry,
    version: str,
    report: InspectReport,
    parity: Parity,
    *,
    files: Sequence[tuple[str, str, int]],
    source: Mapping[str, str],
) -> dict[str, Any]:
    shape = report.architecture
    licence = model.licence.spdx
    named = {"name": licence} if licence.startswith("LicenseRef") or " " in licence else {}
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{model.id}",
        "name": model.id,
        "version": version,
        "supplier": {"name": model.supplier.legal_name},
        "licenses": [
            {"license": {**(named or {"id": licence}), "acknowledgement": "declared"}},
        ]
        if licence != "NOASSERTION"
        else [],
        "externalReferences": [
            {
                "type": "distribution",
                "url": model.source,
                "comment": f"revision {model.revision}",
                "hashes": [{"alg": "SHA-256", "content": digest}],
            }
            for _, digest in sorted(source.items())
        ],
        "pedigree": {
            "ancestors": [
                {
                    "type": "machine-learning-model",
                    "bom-ref": f"source:{path}",
                    "name": f"{model.source} {path}",
                    "version": model.revision,
                    "hashes": [{"alg": "SHA-256", "content": digest}],
                    "properties": [_status("verified")],
                }
                for path, digest in sorted(source.items())
            ]
            + [
                {
                    "type": "machine-learning-model",
                    "bom-ref": f"ancestor:{number}",
                    "name": hint.party,
                    "properties": [
                        _status(hint.status),
                        {"name": "airgap:relation", "value": hint.relation},
                        {"name": "airgap:basis", "value": hint.basis},
                    ],
                }
                for number, hint in enumerate(report.lineage)
            ],
            "patches": [{"type": "unofficial", "resolves": []}],
            "notes": (f"{UNPICKLED}; " if report.unpickled else "")
            + "exported to ONNX with a key-value cache in fp32, in a process without a "
            f"network; {len(parity.vectors)} prompts: largest difference of a logit {parity.full} "
            f"in a full pass and {parity.past} with the cache, same greedy tokens",
        },
        "modelCard": {
            "bom-ref": f"card:{model.id}",
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": shape.kind if shape else "unknown",
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": "max |delta logit|, full pass", "value": str(parity.full)},
                    {"type": "max |delta logit|, with cache", "value": str(parity.past)},
                ]
            },
            "considerations": {
                "useCases": [model.intended_use],
                "technicalLimitations": []
                if model.scientific_use
                else ["not for scientific use: a reference model for trying the road"],
            },
        },
        "properties": [
            _status("declared"),
            {"name": "airgap:provenance_level", "value": model.provenance_level},
            {"name": "airgap:reference_model", "value": str(model.reference_model).lower()},
            {"name": "airgap:scientific_use", "value": str(model.scientific_use).lower()},
            {"name": "airgap:supplier_jurisdiction", "value": model.supplier.jurisdiction},
        ],
        "components": [
            {
                "type": "file",
                "bom-ref": path,
                "name": path,
                "hashes": [{"alg": "SHA-256", "content": digest}],
                "properties": [
                    _status("verified"),
                    {"name": "airgap:size", "value": str(size)},
                ],
            }
            for path, digest, size in sorted(files)
        ],
    }


def _identity(model: ModelEntry, version: str, files: Sequence[tuple[str, str, int]]) -> str:
    return str(Digest.of(canonical_json([model.id, version, [list(f) for f in sorted(files)]])))


def _status(value: str) -> dict[str, str]:
    return {"name": "airgap:status", "value": value}


def _missing(error: Exception) -> FaultError:
    return FaultError(
        "host.extra",
        f"the schema of CycloneDX is not installed: {error!s:.120}",
        hint="install the extra `staging` from the wheelhouse of this release",
    )
