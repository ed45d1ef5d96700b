"""The documents that the staging side attests: evidence that travels, scan, conversion.

Everything here is canonical JSON or the publisher's own bytes, and the same for the same snapshot:
no clock, no random number, no local path. The seal is the only signature over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bundle.canonical import canonical_json
from bundle.evidence.anchors import PATH as ANCHORS
from bundle.manifest import REPORT, Evidence
from bundle.scan.roles import Role
from bundle.scan.strict import open_view
from bundle.staging.inspect import InspectReport
from bundle.write import Member
from policy.terms import URI_BASE, Digest

SOURCE = "META/evidence/source.sha256"
PINS = "META/evidence/pins.sha256"
UPSTREAM = "META/evidence/upstream"
_STATEMENT = "https://in-toto.io/Statement/v1"


def evidence_of(
    report: InspectReport, model_id: str, pins: Path | None
) -> tuple[tuple[Evidence, ...], list[Member]]:
    """Return what proves the origin.

    Digests of the source, the pin file, the publisher's evidence with the anchors that it was held
    against, and the hub's records.
    """
    items = [("source-digests", SOURCE, source_sums(report), "every file as inspected")]
    if pins is not None:
        text = next(
            (e["text"] for e in report.provenance["evidence"] if e["kind"] == "pins"),
            "the files that the institution fixed",
        )
        items.append(("pins", PINS, bytes(open_view(pins)), text))
    for item, proof in zip(report.upstream.items, report.proofs, strict=True):
        path = f"{UPSTREAM}/{item.name}"
        items.append((item.kind, path, item.data, (proof.verified or proof.declared)[:1024]))
        if item.signature is not None:
            text = f"signature over {item.name}"
            items.append((f"{item.kind}-signature", f"{path}.signature", item.signature, text))
    if report.proofs:
        items.append(
            (
                "anchors",
                ANCHORS,
                report.upstream.anchors.to_bytes(),
                "whom the staging side believed about publishers",
            )
        )
    if report.hub is not None:
        text = next(
            item["text"] for item in report.provenance["evidence"] if item["kind"] == "hub-revision"
        )
        items += [
            ("hub-revision", f"META/evidence/hub/{name}", bytes(open_view(place)), text)
            for name, place in _hub_records(report)
        ]
    return (
        tuple(
            Evidence(
                kind=kind, path=path, sha256=Digest.of(data).hex, subject=model_id, summary=text
            )
            for kind, path, data, text in items
        ),
        [Member(path, data, "evidence", "text/plain") for _, path, data, _ in items],
    )


def source_files(report: InspectReport) -> dict[str, str]:
    """Return path and SHA-256 of every file as inspected."""
    return {file.path: report.digests[file.path].sha256 for file in report.files}


def source_sums(report: InspectReport) -> bytes:
    """Return the digests of all files in the form of `sha256sum`."""
    return "".join(f"{sha256}  {path}\n" for path, sha256 in source_files(report).items()).encode()


def source_digest(report: InspectReport) -> Digest:
    """Return one digest for the whole snapshot: that of `source_sums`."""
    return Digest.of(source_sums(report))


def scan_statement(report: InspectReport, weights: Mapping[str, str]) -> bytes:
    """Return the results of the scan: ours, and what outside scanners said or why they did not."""
    outside = [
        {
            "name": f"outside scanner {run.name}",
            "annotations": {"status": run.verdict, "version": run.version, "text": run.text},
        }
        for run in report.scanners
    ]
    return canonical_json(
        {
            "_type": _STATEMENT,
            "subject": [
                {"name": path, "digest": {"sha256": digest}}
                for path, digest in sorted(weights.items())
            ],
            "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
            "predicate": {
                "result": "PASSED" if not report.findings else "WARNED",
                "configuration": [
                    {"name": REPORT, "digest": {"sha256": report.digest.hex}},
                    *outside,
                ],
                "passedTests": [file.path for file in report.files],
                "warnedTests": sorted({finding.path for finding in report.findings}),
                "failedTests": [],
            },
        }
    )


def conversion_statement(
    graphs: Mapping[str, str],
    weights: Mapping[str, str],
    tools: Mapping[str, str],
    seal: Mapping[str, object],
    *,
    pickles: Mapping[str, str] | None = None,
    recipes: Mapping[str, str] | None = None,
) -> bytes:
    """Return the build provenance of the graphs.

    `seal` is the stable part of its evidence; `pickles` are what the weights were made of, when
    they were not published as they are; `recipes` tell how new weights were made of them, by file.
    """
    parameters = {"task": "text-generation-with-past", "dtype": "fp32"}
    inputs = sorted({**weights, **(pickles or {})}.items())
    return canonical_json(
        {
            "_type": _STATEMENT,
            "subject": [
                {"name": path, "digest": {"sha256": digest}}
                for path, digest in sorted(graphs.items())
            ],
            "predicateType": "https://slsa.dev/provenance/v1",
            "predicate": {
                "buildDefinition": {
                    "buildType": f"{URI_BASE}convert/v1",
                    "externalParameters": {
                        **parameters,
                        **({"recipes": dict(recipes)} if recipes else {}),
                    },
                    "internalParameters": {"network": "none", "seal": dict(seal)},
                    "resolvedDependencies": [
                        {"name": path, "digest": {"sha256": digest}} for path, digest in inputs
                    ],
                },
                "runDetails": {
                    "builder": {"id": f"{URI_BASE}staging/v1", "version": dict(tools)},
                },
            },
        }
    )


def pickles_of(report: InspectReport) -> dict[str, str]:
    """Return the pickles that the weights were made of here, by name and SHA-256."""
    files = report.unpickled.files if report.unpickled else ()
    return {pair.source: pair.source_sha256 for pair in files}


def _hub_records(report: InspectReport) -> list[tuple[str, Path]]:
    return [
        (file.path.rpartition("/download/")[2], file.place)
        for file in report.files
        if report.roles.get(file.path) is Role.HUB and file.path.endswith(".metadata")
    ]
