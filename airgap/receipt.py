"""One page about a verified bundle for the security officer: what, by whom, from where, how proved.

Says nothing that the seal does not cover or that was not checked a moment ago, and keeps what is
verified apart from what somebody merely declares. The page needs no other file and prints on one
sheet. docs/design/bundle.md, 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bundle.evidence.levels import SENTENCES
from bundle.fields import format_time, has_hidden
from bundle.manifest import REPORT
from bundle.scan.strict import parse_object

if TYPE_CHECKING:
    from bundle.manifest import Manifest, ModelEntry
    from bundle.scan import ScanReport
    from bundle.verify import SealedBundle

FORMAT = "airgap/receipt/2"
LIMIT = 16 * 1024 * 1024
ATTESTATIONS = "META/attest/"
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Receipt:
    """The facts of the page as one JSON document."""

    document: dict[str, Any]

    @classmethod
    def of(cls, sealed: SealedBundle, scan: ScanReport, *, now: datetime) -> Receipt:
        """Collect the facts of a bundle whose steps 0 to 8 hold; `now` is when they did."""
        manifest, people = sealed.manifest, sealed.trust.document.people
        report = _document(sealed, REPORT)
        verified, declared = _facts(sealed, report)
        roles = {who: list(people[who].roles) for who in sealed.seal.approvers}
        said = {each.person: each for each in sealed.seal.approvals}
        thresholds = sealed.trust.document.thresholds.seal
        return cls(
            {
                "format": FORMAT,
                "verdict": "sealed and whole",
                "verified_at": format_time(now),
                "bundle": str(sealed.digest),
                "file": sealed.path.name,
                "name": manifest.name,
                "version": manifest.version,
                "bundle_id": manifest.bundle_id,
                "epoch": manifest.epoch,
                "valid": [format_time(manifest.not_before), format_time(manifest.expires)],
                "content": {"files": len(manifest.files), "bytes": manifest.body.size},
                "approvers": [
                    {
                        "person": who,
                        "name": people[who].name,
                        "roles": list(said[who].roles) if who in said else roles[who],
                        "condition": (said[who].conditions or "") if who in said else "",
                    }
                    for who in sealed.seal.approvers
                ],
                "needed": thresholds.people,
                "builder": sealed.seal.builder,
                "trust": {
                    "version": sealed.trust.version,
                    "fingerprint": str(sealed.trust.fingerprint),
                },
                "medium": sealed.medium.facts(),
                "models": [_model(model) for model in manifest.models],
                "verified": verified,
                "declared": declared,
                "licences": [
                    {
                        "spdx": item.spdx,
                        "place": item.place,
                        "sha256": item.sha256 or "",
                        "status": item.status,
                    }
                    for model in manifest.models
                    for item in model.licences_found
                ],
                "licence_conflicts": _texts(report.get("licence_conflicts")),
                "scanners": _scanners(report),
                "findings": [f"{item.path}: {item.text}" for item in scan.findings]
                + [_finding(item) for item in _list(report.get("findings"))],
                "attestations": attested(sealed),
            }
        )

    @property
    def rows(self) -> Sequence[tuple[str, str]]:
        """Label and text for a screen."""
        facts = self.document
        rows = [
            ("bundle", f"{facts['name']} {facts['version']}: {facts['verdict']}"),
            ("digest", facts["bundle"]),
            ("verified at", facts["verified_at"]),
            ("approved by", people_text(facts)),
            ("built by", f"{facts['builder']} (does not count)"),
        ]
        rows += [("condition", text) for text in conditions(facts)]
        for model in facts["models"]:
            known = model["provenance"]
            rows += [
                ("source", f"{model['id']}: {model['source']} at {model['revision']}"),
                ("provenance", f"{known['level']}: {known['sentence']}"),
            ]
        rows += [("verified", text) for text in facts["verified"]]
        rows += [("declared", text) for text in facts["declared"]]
        rows += [("licence", licence_text(item)) for item in facts["licences"]]
        rows += [("conflict", text) for text in facts["licence_conflicts"]]
        rows += [("scanner", text) for text in facts["scanners"]]
        return rows


def receipt_page(receipt: Receipt) -> str:
    """Return the page; scripts, fonts and pictures from elsewhere: none."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=plain, licence=licence_text)
    page = environment.get_template("receipt.html.j2")
    facts = receipt.document
    return page.render(
        facts=facts, people=people_text(facts), conditions=conditions(facts), shown=_SHOWN
    )


def attested(sealed: SealedBundle) -> list[dict[str, Any]]:
    """Return type, subjects and short result of each statement in META/attest/."""
    return [
        statement_facts(entry.path, _document(sealed, entry.path))
        for entry in sealed.manifest.files
        if entry.path.startswith(ATTESTATIONS) and entry.path.endswith(".json")
    ]


def statement_facts(path: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return what one in-toto statement says, in short."""
    predicate = _dict(value.get("predicate"))
    result = predicate.get("result", predicate.get("verificationResult", ""))
    levels = ", ".join(_texts(predicate.get("verifiedLevels")))
    builder = _dict(_dict(predicate.get("runDetails")).get("builder")).get("id", "")
    return {
        "path": path,
        "type": str(value.get("predicateType", "unknown")),
        "subjects": len(_list(value.get("subject"))),
        "result": " ".join(str(part) for part in (result, levels, builder) if part),
    }


def people_text(facts: dict[str, Any]) -> str:
    """Name the approvers and their roles."""
    names = [f"{p['person']} ({', '.join(p['roles'])})" for p in facts["approvers"]]
    return f"{'; '.join(names)}; {facts['needed']} needed"


def conditions(facts: dict[str, Any]) -> list[str]:
    """Return on what conditions people approved, in their words."""
    return [f"{p['person']}: {p['condition']}" for p in facts["approvers"] if p["condition"]]


def licence_text(item: dict[str, str]) -> str:
    """Write one licence with its place and the first digits of its digest."""
    digest = f", sha256:{item['sha256'][:16]}…" if item["sha256"] else ""
    return f"{item['spdx']} ({item['status']}) in {item['place']}{digest}"


def plain(text: object) -> str:
    """Make foreign text safe to show: what a screen would hide or act on becomes visible."""
    found = str(text)
    return ascii(found)[1:-1] if has_hidden(found) else found


def _facts(sealed: SealedBundle, report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return what is verified and what is declared, in sentences."""
    manifest: Manifest = sealed.manifest
    evidence = list(_list(_dict(report.get("provenance")).get("evidence")))
    stated: dict[str, list[str]] = {"verified": [], "declared": []}
    for item in evidence:
        entry = _dict(item)
        if entry.get("status") in stated:
            stated[str(entry["status"])].append(str(entry.get("text")))
    verified = [
        (
            f"{len(sealed.seal.approvers)} people and the builder signed exactly these "
            f"{manifest.body.size:,} bytes"
        ),
        "every file passed the strict parser of its format, and again just now",
        *stated["verified"],
    ]
    several = len(manifest.models) > 1
    verified += [
        f"{f'{claim.model}: ' if several else ''}the graph of {claim.precision} answers like the "
        f"published weights within {claim.tolerance} on {claim.provider} (measured by the "
        "builder, sealed)"
        for claim in manifest.parity
    ]
    declared = list(stated["declared"])
    for model in manifest.models:
        whose = f"{model.id}: " if several else ""
        declared += [
            f"{whose}supplier: {model.supplier.legal_name} ({model.supplier.jurisdiction})",
            f"{whose}intended use: {model.intended_use}",
        ]
        declared += [
            f"{whose}{item.relation.replace('_', ' ')}: {item.party}"
            for item in model.lineage
            if item.status == "declared"
        ]
    return verified, declared


def _model(model: ModelEntry) -> dict[str, Any]:
    """Return what is said of one model."""
    return {
        "id": model.id,
        "source": model.source,
        "revision": model.revision,
        "supplier": model.supplier.legal_name,
        "jurisdiction": model.supplier.jurisdiction,
        "intended_use": model.intended_use,
        "scientific_use": model.scientific_use,
        "provenance": {
            "level": model.provenance_level,
            "sentence": SENTENCES[model.provenance_level],
        },
    }


def _scanners(report: dict[str, Any]) -> list[str]:
    found = []
    for item in _list(report.get("scanners")):
        entry = _dict(item)
        name = f"{entry.get('name')} {entry.get('version')}".strip()
        text = f": {entry.get('text')}" if entry.get("text") else ""
        found.append(f"{name} {entry.get('verdict')}{text}")
    return found or ["outside scanners: none was run"]


def _finding(item: Any) -> str:
    entry = _dict(item)
    return f"{entry.get('path')}: {entry.get('text')}"


def _document(sealed: SealedBundle, path: str) -> dict[str, Any]:
    raw = sealed.read(path)
    return parse_object(memoryview(raw), code="manifest.schema", what=path, limit=LIMIT)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [str(item) for item in _list(value)]
