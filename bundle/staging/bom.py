"""The bill of materials: CycloneDX 1.7 with a model card and the pedigree of the conversion.

Every claim bears `airgap:status`, `verified` where bytes or a proof confirm it and `declared`
where a publisher merely says so (docs/design/bundle.md, 6). The document is checked against
the schema of CycloneDX before it is sealed, and against the files again on the secured side.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from bundle.canonical import canonical_json
from bundle.evidence.levels import UNPICKLED
from bundle.fields import format_time
from bundle.manifest import ModelEntry
from bundle.scan.bom import PATH
from bundle.staging.inspect import InspectReport
from bundle.staging.parity import Parity
from policy.errors import FaultError, RefusedError
from policy.terms import URI_BASE, Digest

if TYPE_CHECKING:
    from bundle.staging.wheelhouse import Wheelhouse

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
    wheelhouse: Wheelhouse | None = None,
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
        wheelhouse: The wheels that travel along.

    Raises:
        RefusedError: `build.bom`.
        FaultError: `host.extra`; the schema is not installed.

    """
    weights = [file for file in report.weights() if file.path.endswith(".safetensors")]
    source = {file.path: report.digests[file.path].sha256 for file in weights}
    own = [_model(model, version, report, parity, files=files, source=source)]
    wheels = [] if wheelhouse is None else _wheels(wheelhouse)
    raw = canonical_json(
        _document(
            model.id, version, [*own, *wheels],
            identity=_identity(model, version, files), tools=tools, created=created,
        )
    )  # fmt: skip
    require_schema(raw)
    return raw


def wheels_document(
    name: str, version: str, wheelhouse: Wheelhouse, *, created: datetime, identity: str
) -> bytes:
    """Return the canonical bytes of the document of a release without a model.

    Args:
        name: Of the release.
        version: Of the release.
        wheelhouse: What it holds.
        created: Of the release.
        identity: A text that is the same for the same wheels.

    """
    return canonical_json(
        _document(name, version, _wheels(wheelhouse), identity=identity, tools={}, created=created)
    )


def _document(
    name: str,
    version: str,
    components: Sequence[Mapping[str, Any]],
    *,
    identity: str,
    tools: Mapping[str, str],
    created: datetime,
) -> dict[str, Any]:
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, identity)}",
        "version": 1,
        "metadata": {
            "timestamp": format_time(created),
            "lifecycles": [{"phase": "build"}],
            "tools": {
                "components": [
                    {"type": "library", "name": tool, "version": number}
                    for tool, number in sorted(tools.items())
                ]
            },
            "component": {"type": "data", "bom-ref": "release", "name": name, "version": version},
        },
        "components": list(components),
        "dependencies": [
            {
                "ref": "release",
                "dependsOn": [each["bom-ref"] for each in components if each["type"] != "file"],
            }
        ],
    }


def _wheels(wheelhouse: Wheelhouse) -> list[dict[str, Any]]:
    """Return a library for each wheel with its file inside, then the lists and the installer."""
    libraries = [
        {
            "type": "library",
            "bom-ref": f"wheel:{wheel.path.name}",
            "name": wheel.name,
            "version": wheel.version,
            "purl": f"pkg:pypi/{wheel.name}@{wheel.version}",
            "licenses": [{"license": {"name": wheel.licence, "acknowledgement": "declared"}}]
            if wheel.licence != "NOASSERTION"
            else [],
            "properties": [
                _status("declared"),
                {"name": "airgap:attestation", "value": wheel.attestation},
            ],
            "components": [_file(wheel.member_path, wheel.sha256, wheel.path.stat().st_size)],
        }
        for wheel in wheelhouse.wheels
    ]
    others = [
        _file(member.path, hashlib.sha256(member.source).hexdigest(), len(member.source))
        for member in wheelhouse.members
        if isinstance(member.source, bytes) and member.path.startswith("payload/")
    ]
    return [*libraries, *others]


def _file(path: str, sha256: str, size: int) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": path,
        "name": path,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
        "properties": [_status("verified"), {"name": "airgap:size", "value": str(size)}],
    }


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
        "components": [_file(path, digest, size) for path, digest, size in sorted(files)],
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
