"""What the evidence proves, taken together: each piece checked, then one level L0 to L4.

The same function runs on the staging side, over the files of a snapshot, and in `verify --deep`,
over the digests that a bundle carries. A piece that does not hold refuses: bad evidence is worse
than none. Rules: FORMAT.md section 17.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from bundle.evidence import oms
from bundle.evidence.anchors import Anchors
from bundle.evidence.signed import IDENTITY_LEVEL, open_statement, verify_blob, verify_detached
from bundle.evidence.statements import (
    covered_by_checksums,
    covered_by_statement,
    read_build,
)
from bundle.scan.strict import parse_object
from policy.errors import RefusedError

Kind = Literal["oms", "sigstore", "checksums", "slsa"]
KINDS: tuple[Kind, ...] = ("oms", "sigstore", "checksums", "slsa")
SENTENCES = {
    "L0": "declared only: nothing is proved about the origin of these bytes",
    "L1": "hash-pinned: the bytes equal those that the institution fixed beforehand; this does not "
    "say who made them",
    "L2": "publisher's integrity: the holder of a key that came by a second channel published "
    "these bytes",
    "L3": "publisher's identity: a named identity signed these bytes, at a time that is on record",
    "L4": "build provenance: a named identity signed these bytes, and says by what build and from "
    "what source they were made",
}
UNPICKLED = (
    "the weights were converted from a pickle in a sealed process; the publisher never published "
    "the bytes that were converted here, so no signature of the publisher covers them"
)


@dataclass(frozen=True, slots=True)
class Source:
    """The files that evidence must speak of.

    `files` is path and SHA-256 of each; `needed` are those that travel or are converted, `weights`
    those among them that are weights; `exempt` need no evidence (records of the hub's client, the
    evidence itself). `unpickled` says that weights were made here from a pickle.
    """

    files: Mapping[str, str]
    needed: frozenset[str]
    weights: frozenset[str]
    exempt: frozenset[str] = frozenset()
    pinned: bool = False
    unpickled: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One piece of evidence as it was given; `signature` is that of a checksum file, detached."""

    kind: Kind
    name: str
    data: bytes
    signature: bytes | None = None


@dataclass(frozen=True, slots=True)
class Proof:
    """A piece that holds: the level that it gives to what it covers; 4 adds to 3, see `level_of`.

    `verified` and `declared` keep apart what bytes or signatures confirm and what is only said.
    """

    kind: Kind
    name: str
    sha256: str
    level: int
    covers: frozenset[str]
    signer: str
    verified: str
    declared: str = ""

    def as_documents(self) -> list[dict[str, Any]]:
        """Return the lines of the report."""
        head = {"kind": self.kind, "name": self.name, "sha256": self.sha256}
        lines = []
        if self.verified:
            lines.append({**head, "status": "verified", "text": self.verified})
        if self.declared:
            lines.append({**head, "status": "declared", "text": self.declared})
        return lines


def check(
    items: Sequence[Item], source: Source, anchors: Anchors, *, at: datetime
) -> tuple[Proof, ...]:
    """Check every piece; one that does not hold refuses.

    Args:
        items: As given.
        source: The files.
        anchors: Of this site.
        at: When a certificate without a logged time must be valid.

    Raises:
        RefusedError: `evidence.*`.
        FaultError: `host.extra`; Sigstore evidence where sigstore-python is missing.

    """
    return tuple(check_one(item, source, anchors, at=at) for item in items)


def check_one(item: Item, source: Source, anchors: Anchors, *, at: datetime) -> Proof:
    """Check one piece; errors as in `check`."""
    if item.kind == "oms":
        return _model_signature(item, source, anchors, at)
    if item.kind == "sigstore":
        return _sigstore(item, source, anchors, at)
    if item.kind == "checksums":
        return _checksums(item, source, anchors)
    return _provenance(item, source, anchors, at)


def level_of(source: Source, proofs: Sequence[Proof]) -> str:
    """Return the level: the highest that covers every file that travels or is converted.

    Weights that were made here from a pickle are not the publisher's bytes: L1 at most.
    """
    floor = "L1" if source.pinned else "L0"
    if source.unpickled or not source.needed:
        return floor
    for level in (IDENTITY_LEVEL, 2):
        covered = frozenset[str]().union(*(p.covers for p in proofs if min(p.level, 3) >= level))
        if source.needed <= covered:
            built = frozenset[str]().union(*(p.covers for p in proofs if p.kind == "slsa"
                                             and p.level >= IDENTITY_LEVEL))  # fmt: skip
            whole = level == IDENTITY_LEVEL and source.weights and source.weights <= built
            return "L4" if whole else f"L{level}"
    return floor


def uncovered(source: Source, proofs: Sequence[Proof]) -> tuple[str, ...]:
    """Return the needed files that no signature covers."""
    signed = frozenset[str]().union(*(p.covers for p in proofs if p.level))
    return tuple(sorted(source.needed - signed))


def _model_signature(item: Item, source: Source, anchors: Anchors, at: datetime) -> Proof:
    signed = open_statement(item.data, anchors, at=at, what=item.name)
    sha256 = _digest(item.data)
    same = frozenset(path for path, digest in source.files.items() if digest == sha256)
    covers = oms.covered(signed.payload, source.files, source.exempt | same, what=item.name)
    return Proof(
        "oms",
        item.name,
        sha256,
        signed.level,
        covers,
        signed.who,
        f"model signature ({signed.mode}) by {signed.who} over exactly the {len(covers)} files "
        "that are there",
        "" if signed.level >= IDENTITY_LEVEL else "the time of signing is not on record",
    )


def _sigstore(item: Item, source: Source, anchors: Anchors, at: datetime) -> Proof:
    value = parse_object(
        memoryview(item.data), code="evidence.malformed", what=item.name, limit=8 * 1024 * 1024
    )
    if "dsseEnvelope" in value:
        signed = open_statement(item.data, anchors, at=at, what=item.name)
        covers = covered_by_statement(signed.payload, source.files, what=item.name)
        declared = "what its predicate says beyond names and digests"
    else:
        digest, covers = _artifact(value, source, item.name)
        signed = verify_blob(item.data, digest, anchors, what=item.name)
        declared = ""
    return Proof(
        "sigstore",
        item.name,
        _digest(item.data),
        signed.level,
        covers,
        signed.who,
        f"Sigstore bundle by {signed.who} over {_count(covers)}",
        declared,
    )


def _artifact(value: Mapping[str, Any], source: Source, what: str) -> tuple[str, frozenset[str]]:
    """Return digest and paths of the file that a bundle over an artifact says it is for."""
    import base64  # noqa: PLC0415 - one line of this module needs it
    import binascii  # noqa: PLC0415

    content = value.get("messageSignature")
    named = content.get("messageDigest") if isinstance(content, dict) else None
    try:
        raw = base64.b64decode(named["digest"], validate=True) if isinstance(named, dict) else b""
    except (KeyError, TypeError, ValueError, binascii.Error):
        raw = b""
    covers = frozenset(path for path, digest in source.files.items() if digest == raw.hex())
    if not covers:
        raise RefusedError(
            "evidence.subject",
            f"{what}: no file here has the digest that it is for (sha256:{raw.hex():.64})",
            hint="give the bundle of a file of this very revision",
        )
    return raw.hex(), covers


def _checksums(item: Item, source: Source, anchors: Anchors) -> Proof:
    sha256 = _digest(item.data)
    covers = covered_by_checksums(item.data, source.files, what=item.name)
    if item.signature is None:
        return Proof(
            "checksums",
            item.name,
            sha256,
            0,
            covers,
            "",
            f"the SHA-256 of {_count(covers)} is the one in the checksum file",
            "that the publisher wrote the checksum file: nobody signed it",
        )
    signed = verify_detached(item.signature, item.data, sha256, anchors, what=item.name)
    return Proof(
        "checksums",
        item.name,
        sha256,
        signed.level,
        covers,
        signed.who,
        f"checksum file signed ({signed.mode}) by {signed.who}, with the SHA-256 of "
        f"{_count(covers)}",
    )


def _provenance(item: Item, source: Source, anchors: Anchors, at: datetime) -> Proof:
    signed = open_statement(item.data, anchors, at=at, what=item.name)
    build = read_build(signed.payload, source.files, anchors, what=item.name)
    return Proof(
        "slsa",
        item.name,
        _digest(item.data),
        signed.level,
        build.covers,
        signed.who,
        f"build provenance signed ({signed.mode}) by {signed.who}: {_count(build.covers)} built by "
        f"{build.builder} from {build.source}",
        "the parameters of the build, which no rule here names",
    )


def _count(covers: frozenset[str]) -> str:
    return f"{len(covers)} file{'s' if len(covers) != 1 else ''}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
