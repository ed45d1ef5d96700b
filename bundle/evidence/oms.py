"""OpenSSF model signing: the statement over a model folder, read more strictly than its own tool.

Decides whether a model signature covers exactly the files that are there. The tool lets a signature
leave files out (`ignore_paths`), follow links out of the folder (`allow_symlinks`), and identify a
model by a digest in which no name takes part; none of this is taken here. Also writes such a
statement, for folders of our own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from bundle.canonical import canonical_json
from bundle.envelope import pae
from bundle.evidence.signed import IN_TOTO
from bundle.keys import P384, Signer, encode_base64
from bundle.scan.strict import parse_object
from policy.errors import RefusedError

PREDICATE = "https://model_signing/signature/v1.0"
STATEMENT = "https://in-toto.io/Statement/v1"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
CODE = "evidence.oms"
PAYLOAD_LIMIT = 8 * 1024 * 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")


def covered(
    payload: bytes, files: Mapping[str, str], exempt: frozenset[str], *, what: str
) -> frozenset[str]:
    """Return the paths that the statement covers: all of `files` but the exempt ones.

    Args:
        payload: The in-toto statement, whose signature holds.
        files: Path and SHA-256 of every file that is there.
        exempt: Paths that need not be covered: the evidence itself, records of the hub client.
        what: Names the piece in messages.

    Raises:
        RefusedError: `evidence.oms`, `evidence.malformed`.

    """
    predicate = _predicate(payload, what)
    resources = _resources(predicate, what)
    _require_serialization(predicate, set(files) - exempt, what)
    extra = sorted(set(files) - set(resources) - exempt)
    if extra:
        raise _no(what, f"{extra[0]!r:.160} is there and not signed ({len(extra)} in all)")
    for path, digest in sorted(resources.items()):
        if path not in files:
            raise _no(what, f"{path!r:.160} is signed and not there")
        if files[path] != digest:
            raise _no(what, f"{path!r:.160}: signed sha256:{digest}, found sha256:{files[path]}")
    return frozenset(resources)


def sign_folder(name: str, files: Mapping[str, str], ignored: str | None, signer: Signer) -> bytes:
    """Return a model signature over the files, in the form that the `model_signing` tool verifies.

    Args:
        name: Of the model.
        files: Path and SHA-256 of every file in the folder.
        ignored: Where the signature itself will lie in the folder, None outside of it.
        signer: A P-384 key; the tool knows no Ed25519 and no ML-DSA.

    Raises:
        RefusedError: `seal.algorithm`; a key of another scheme.

    """
    if signer.public_key.scheme != P384:
        raise RefusedError(
            "seal.algorithm",
            f"a model signature needs a key of scheme {P384}, this one is "
            f"{signer.public_key.scheme}",
            hint="make one for this purpose with: airgap keys new NAME --scheme ecdsa-p384",
        )
    ordered = sorted(files.items())
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in ordered)).hexdigest()
    payload = canonical_json(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": root}}],
            "predicateType": PREDICATE,
            "predicate": {
                "serialization": {
                    "method": "files",
                    "hash_type": "sha256",
                    "allow_symlinks": False,
                    "ignore_paths": [] if ignored is None else [ignored],
                },
                "resources": [
                    {"name": path, "algorithm": "sha256", "digest": digest}
                    for path, digest in ordered
                ],
            },
        }
    )
    hint = hashlib.sha256(signer.public_key.pem).hexdigest()
    return canonical_json(
        {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": encode_base64(payload),
                "payloadType": IN_TOTO,
                "signatures": [
                    {"keyid": "", "sig": encode_base64(signer.sign(pae(IN_TOTO, payload)))}
                ],
            },
        }
    )


def _predicate(payload: bytes, what: str) -> dict[str, Any]:
    value = parse_object(
        memoryview(payload), code="evidence.malformed", what=what, limit=PAYLOAD_LIMIT
    )
    kind = value.get("predicateType")
    if value.get("_type") != STATEMENT or kind != PREDICATE:
        raise _no(
            what, f"its statement is of type {kind!r:.80}; only {PREDICATE} says how it was made"
        )
    predicate = value.get("predicate")
    if not isinstance(predicate, dict):
        raise _bad(what, "its predicate is not an object")
    resources, subjects = predicate.get("resources"), value.get("subject")
    if not isinstance(resources, list) or not isinstance(subjects, list) or len(subjects) != 1:
        raise _bad(what, "it has not exactly one subject and a list of resources")
    return predicate


def _resources(predicate: Mapping[str, Any], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in predicate["resources"]:
        entry = item if isinstance(item, dict) else {}
        name, digest = entry.get("name"), entry.get("digest")
        if not isinstance(name, str) or not isinstance(digest, str) or name in found:
            raise _bad(what, f"a resource without name or digest, or twice: {name!r:.80}")
        if entry.get("algorithm") != "sha256" or not _SHA256.fullmatch(digest):
            raise _no(what, f"{name!r:.80} has a digest of {entry.get('algorithm')!r:.40}")
        found[name] = digest
    if not found:
        raise _no(what, "it covers no file")
    return found


def _require_serialization(predicate: Mapping[str, Any], present: set[str], what: str) -> None:
    value = predicate.get("serialization")
    how = value if isinstance(value, dict) else {}
    if how.get("method") != "files" or how.get("hash_type") != "sha256":
        raise _no(
            what,
            f"it is made by {how.get('method')!r:.40} with {how.get('hash_type')!r:.40}; only "
            "whole files with sha256 can be held against the digests of a bundle",
        )
    if how.get("allow_symlinks") is not False:
        raise _no(what, "it lets a verifier follow links out of the model")
    ignored = how.get("ignore_paths", [])
    if not isinstance(ignored, list) or not all(isinstance(item, str) for item in ignored):
        raise _bad(what, "its ignore_paths are not a list of names")
    for name in ignored:
        plain = name.removeprefix("./").rstrip("/")
        hit = next((p for p in sorted(present) if p == plain or p.startswith(f"{plain}/")), None)
        if hit is not None:
            raise _no(what, f"it leaves {hit!r:.160} out (ignore_paths), which is there")


def _no(what: str, reason: str) -> RefusedError:
    return RefusedError(
        CODE,
        f"{what}: {reason}",
        hint="take files that the publisher did not sign out of the snapshot, or download it again",
    )


def _bad(what: str, reason: str) -> RefusedError:
    return RefusedError("evidence.malformed", f"{what}: {reason}")
