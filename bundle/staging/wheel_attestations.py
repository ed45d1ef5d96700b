"""Attestations of wheels in the form of PEP 740: who published each wheel, verified at staging.

A provenance document lies beside a wheel as `FILE.whl.provenance`, as an index serves it. Each
attestation in it becomes a Sigstore bundle, which the one adapter verifies under the trusted root
and the identities that this site pins; its statement must name this very file and digest. One that
holds is enough; a document that is there and does not hold refuses. docs/design/bundle.md, 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.canonical import canonical_json
from bundle.evidence.anchors import Anchors, Identity
from bundle.evidence.sigstore import verify_attestation
from bundle.scan.strict import parse_object
from bundle.staging.wheelhouse import Proved, Wheel
from policy.errors import RefusedError

SUFFIX = ".provenance"
LIMIT = 4 * 1024 * 1024
MAX_ATTESTATIONS = 16
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"


@dataclass(frozen=True, slots=True)
class Attestations:
    """The documents of a folder, and whom this site believes."""

    folder: Path
    anchors: Anchors

    def __call__(self, wheel: Wheel) -> Proved:
        """Return what is proved about a wheel; `absent` where no document lies there.

        Raises:
            RefusedError: `evidence.anchor`, nobody is pinned; `evidence.malformed`; `.signature`,
                no attestation holds under a pinned identity; `.subject`, it is of another file.
            FaultError: `host.extra`.

        """
        place = self.folder / f"{wheel.path.name}{SUFFIX}"
        if not place.is_file():
            return Proved("absent")
        raw = place.read_bytes()[: LIMIT + 1]
        root, identities = self.anchors.trusted_root, self.anchors.identities
        if root is None or not identities:
            raise RefusedError(
                "evidence.anchor",
                f"{place.name!r:.120} needs a trusted root and identities of this site",
                hint="name them in the file of --publishers: trusted_root and [[identity]]",
            )
        problem: RefusedError | None = None
        for attestation in _attestations(raw, place.name):
            for identity in identities:
                try:
                    return Proved(_verify(attestation, wheel, root, identity), raw)
                except RefusedError as error:
                    if error.code != "evidence.signature":
                        raise
                    problem = error
        raise problem or RefusedError("evidence.malformed", f"{place.name!r:.120} attests nothing")


def _verify(attestation: Any, wheel: Wheel, root: str, identity: Identity) -> str:
    """Verify one attestation under one identity; return in words what it proves."""
    bundle = _as_bundle(attestation, wheel.path.name)
    signed = verify_attestation(bundle, root, identity=identity.identity, issuer=identity.issuer)
    statement = parse_object(
        memoryview(signed.payload or b""),
        code="evidence.malformed",
        what=f"the statement about {wheel.path.name}",
        limit=LIMIT,
    )
    subjects = statement.get("subject")
    wanted = [{"name": wheel.path.name, "digest": {"sha256": wheel.sha256}}]
    if (
        signed.payload_type != PAYLOAD_TYPE
        or statement.get("_type") != STATEMENT
        or subjects != wanted
    ):
        raise RefusedError(
            "evidence.subject",
            f"the attestation of {wheel.path.name!r:.120} speaks of another file",
            hint="fetch the provenance document of this very file",
        )
    return f"published by {identity.identity} ({identity.issuer})"


def _attestations(raw: bytes, what: str) -> Iterator[Any]:
    """Yield every attestation of a provenance document."""
    value = parse_object(memoryview(raw), code="evidence.malformed", what=what, limit=LIMIT)
    groups = value.get("attestation_bundles")
    found = [
        item
        for group in (groups if isinstance(groups, list) else [])
        if isinstance(group, dict) and isinstance(group.get("attestations"), list)
        for item in group["attestations"]
    ]
    if value.get("version") != 1 or not 1 <= len(found) <= MAX_ATTESTATIONS:
        raise RefusedError("evidence.malformed", f"{what!r:.120} is no provenance of version 1")
    yield from found


def _as_bundle(attestation: Any, what: str) -> bytes:
    """Return the Sigstore bundle that an attestation is, with other names for its parts."""
    try:
        material, envelope = attestation["verification_material"], attestation["envelope"]
        return canonical_json(
            {
                "mediaType": MEDIA_TYPE,
                "verificationMaterial": {
                    "certificate": {"rawBytes": material["certificate"]},
                    "tlogEntries": material["transparency_entries"],
                },
                "dsseEnvelope": {
                    "payload": envelope["statement"],
                    "payloadType": PAYLOAD_TYPE,
                    "signatures": [{"sig": envelope["signature"]}],
                },
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            "evidence.malformed", f"an attestation of {what!r:.120} lacks {error!s:.60}"
        ) from error
