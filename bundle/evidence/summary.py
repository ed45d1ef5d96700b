"""The verification summary: what was concluded from the evidence, and of which files (SLSA VSA).

Staging emits one for the upstream evidence, `META/attest/summary.json`; the seal is its signature.
`require_summary` is step 7 of the verification: the level that the manifest claims is the one of
the summary, every piece of evidence is covered, and the kinds of evidence can give that level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import format_time
from bundle.manifest import Evidence, Manifest, ModelEntry
from policy.errors import RefusedError
from policy.terms import URI_BASE, Digest

PATH = "META/attest/summary.json"
PREDICATE = "https://slsa.dev/verification_summary/v1"
SUMMARY_LIMIT = 4 * 1024 * 1024
_STATEMENT = "https://in-toto.io/Statement/v1"
# The kinds of evidence of which at least one must travel for a level to be claimed at all.
_NEEDED: Mapping[str, frozenset[str]] = {
    "L1": frozenset(["pins"]),
    "L2": frozenset(["oms", "sigstore", "checksums-signature"]),
    "L3": frozenset(["oms", "sigstore", "checksums-signature"]),
    "L4": frozenset(["slsa"]),
}
LEVELS = ("L0", "L1", "L2", "L3", "L4")


def upstream_summary(
    model: ModelEntry,
    evidence: Sequence[Evidence],
    files: Mapping[str, str],
    *,
    created: datetime,
    policy: Sequence[Digest],
) -> bytes:
    """Return the statement about the files of the source, in canonical form."""
    return statement(
        resource=f"{model.source}@{model.revision}",
        subjects=files,
        inputs={item.path: item.sha256 for item in evidence},
        level=model.provenance_level,
        moment=created,
        policy=[each.hex for each in policy],
    )


def statement(
    *,
    resource: str,
    subjects: Mapping[str, str],
    inputs: Mapping[str, str],
    level: str,
    moment: datetime,
    policy: Sequence[str],
) -> bytes:
    """Return a verification summary in canonical form; digests are SHA-256 in hexadecimal."""
    packs = [{"sha256": digest} for digest in sorted(policy)]
    return canonical_json(
        {
            "_type": _STATEMENT,
            "subject": [
                {"name": path, "digest": {"sha256": digest}}
                for path, digest in sorted(subjects.items())
            ],
            "predicateType": PREDICATE,
            "predicate": {
                "verifier": {"id": f"{URI_BASE}verifier/v1"},
                "timeVerified": format_time(moment),
                "resourceUri": resource,
                "policy": {
                    "uri": f"{URI_BASE}policy/v1",
                    **({"digest": packs[0]} if packs else {}),
                    **({"annotations": {"packs": packs}} if len(packs) > 1 else {}),
                },
                "inputAttestations": [
                    {"uri": path, "digest": {"sha256": digest}}
                    for path, digest in sorted(inputs.items())
                ],
                "verificationResult": "PASSED",
                "verifiedLevels": [f"AIRGAP_PROVENANCE_{level}"],
                "slsaVersion": "1.0",
            },
        }
    )


def require_summary(view: Callable[[str], memoryview], manifest: Manifest) -> None:
    """Hold the sealed summary against the manifest.

    Raises:
        RefusedError: `evidence.summary .subject .level`.

    """
    levels = sorted(model.provenance_level for model in manifest.models) or ["L0"]
    level = levels[0]  # of the bundle: the lowest of its models
    if manifest.find(PATH) is None:
        if levels[-1] in {"L0", "L1"}:
            return  # nothing of a publisher is claimed
        raise _no("summary", f"{PATH} is missing, and a model claims {levels[-1]}")
    value = parse_canonical(
        bytes(view(PATH)), code="evidence.summary", what=PATH, limit=SUMMARY_LIMIT
    )
    predicate = _object(_object(value).get("predicate"))
    if _object(value).get("predicateType") != PREDICATE:
        raise _no("summary", f"{PATH} is no verification summary")
    if predicate.get("verificationResult") != "PASSED":
        raise _no("summary", f"{PATH} does not say PASSED")
    if predicate.get("verifiedLevels") != [f"AIRGAP_PROVENANCE_{level}"]:
        raise _no(
            "level", f"the manifest claims {level}, the summary {predicate.get('verifiedLevels')!r}"
        )
    listed = _digests(predicate.get("inputAttestations"), "uri")
    wanted = {item.path: item.sha256 for item in manifest.evidence}
    for path in sorted(listed.keys() | wanted.keys()):
        if listed.get(path) != wanted.get(path):
            raise _no("summary", f"{path!r:.160} is not the evidence that was summed up")
    _require_subjects(_digests(_object(value).get("subject"), "name"), manifest)
    for model in manifest.models:  # the evidence of one model lifts no other one
        kinds = {item.kind for item in manifest.evidence if item.subject == model.id}
        level = model.provenance_level
        needed = _NEEDED.get(level, frozenset())
        if needed and not kinds & needed:
            names = ", ".join(sorted(needed))
            raise _no(
                "level", f"{model.id} claims {level} without any evidence of the kinds {names}"
            )


def _require_subjects(subjects: Mapping[str, str], manifest: Manifest) -> None:
    """Check that what travels unchanged, and what graphs were made from, was summed up."""
    known = set(subjects.values())
    for entry in manifest.files:
        if not entry.path.startswith("payload/"):
            continue
        sources = [digest.removeprefix("sha256:") for digest in entry.derived_from]
        if entry.origin is not None and entry.origin.sha256 is not None:
            sources.append(entry.origin.sha256)
            if entry.origin.sha256 != entry.sha256:
                raise _no("subject", f"{entry.path!r:.160} is not the file that it came from")
        for digest in sources:
            if digest not in known:
                raise _no("subject", f"{entry.path!r:.160} comes from a file that no summary names")


def _digests(value: Any, key: str) -> dict[str, str]:
    items = value if isinstance(value, list) else []
    return {
        str(item.get(key)): str(_object(item.get("digest")).get("sha256"))
        for item in items
        if isinstance(item, dict)
    }


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _no(what: str, reason: str) -> RefusedError:
    return RefusedError(
        f"evidence.{what}",
        reason,
        hint="refuse this release and ask its builder for one whose evidence fits",
    )
