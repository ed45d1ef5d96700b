"""Who signed a piece of evidence: by a publisher's key, a certificate authority, or Sigstore.

Decides whether an envelope, a Sigstore bundle or a detached signature was made by an anchor of this
site, and how much that proves: a key or a certificate without a trusted time gives level 2, an
identity in a transparency log level 3 (docs/design/bundle.md, 4). Keys and certificates need the
base install only.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from bundle.envelope import pae
from bundle.evidence import sigstore
from bundle.evidence.anchors import Anchors, Authority, Identity, PublicKey
from bundle.fields import format_time
from bundle.scan.strict import parse_object
from policy.errors import RefusedError

IN_TOTO = "application/vnd.in-toto+json"
SIGNED_LIMIT = 8 * 1024 * 1024
MAX_CHAIN = 8
KEY_LEVEL, IDENTITY_LEVEL = 2, 3
_ISSUERS = (
    x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8"),
    x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1"),
)
_HASHES: Mapping[int, hashes.HashAlgorithm] = {
    256: hashes.SHA256(),
    384: hashes.SHA384(),
    521: hashes.SHA512(),
}
_MALFORMED = "evidence.malformed"


@dataclass(frozen=True, slots=True)
class Signature:
    """One that holds: what level it gives, by what means, and whose it is."""

    level: int
    mode: str
    who: str
    payload: bytes = b""


def open_statement(raw: bytes, anchors: Anchors, *, at: datetime, what: str) -> Signature:
    """Return the in-toto payload of a DSSE envelope or Sigstore bundle that an anchor signed.

    Args:
        raw: Untrusted.
        anchors: Of this site.
        at: The moment at which a certificate without a logged time must be valid.
        what: Names the piece in messages.

    Raises:
        RefusedError: `evidence.malformed .anchor .signature .identity`.
        FaultError: `host.extra`; only for an entry in a Sigstore log.

    """
    value = parse_object(memoryview(raw), code=_MALFORMED, what=what, limit=SIGNED_LIMIT)
    material = value.get("verificationMaterial")
    if "dsseEnvelope" not in value and material is None:
        kind, payload, signature = _envelope(value, what)
        found = _by_key(anchors, pae(kind, payload), signature, what)
    elif not isinstance(material, dict):
        raise _bad(what, "it has no verification material")
    elif material.get("tlogEntries"):
        found, kind, payload = _by_identity(raw, material, anchors, what)
    else:
        kind, payload, signature = _envelope(value.get("dsseEnvelope"), what)
        message = pae(kind, payload)
        if material.get("publicKey") is not None:
            found = _by_key(anchors, message, signature, what)
        else:
            found = _by_authority(material, anchors, message, signature, at=at, what=what)
    if kind != IN_TOTO:
        raise _bad(what, f"its payload is of type {kind!r:.60}, not {IN_TOTO}")
    return Signature(found.level, found.mode, found.who, payload)


def verify_detached(
    signature: bytes, data: bytes, sha256: str, anchors: Anchors, *, what: str
) -> Signature:
    """Verify a detached signature over `data`: raw or base64 of a key, or a Sigstore bundle.

    Raises:
        RefusedError: As above.
        FaultError: As above.

    """
    if signature[:1] == b"{":
        return verify_blob(signature, sha256, anchors, what=what)
    decoded = signature
    stripped = b"".join(signature.split())
    try:
        decoded = base64.b64decode(stripped, validate=True)
    except (binascii.Error, ValueError):
        decoded = signature
    return _by_key(anchors, data, decoded, what)


def verify_blob(raw: bytes, sha256: str, anchors: Anchors, *, what: str) -> Signature:
    """Verify a Sigstore bundle over the artifact with that digest; errors as above."""
    value = parse_object(memoryview(raw), code=_MALFORMED, what=what, limit=SIGNED_LIMIT)
    material = value.get("verificationMaterial")
    if not isinstance(material, dict):
        raise _bad(what, "it has no verification material")
    who = _expected(material, anchors, what)
    sigstore.verify_artifact(
        raw, _root(anchors, what), sha256, identity=who.identity, issuer=who.issuer
    )
    return Signature(IDENTITY_LEVEL, "sigstore", _name(who))


def _by_key(anchors: Anchors, message: bytes, signature: bytes, what: str) -> Signature:
    if not anchors.keys:
        raise _anchor(what, "it is signed by a key, and no publisher's key is given")
    for key in anchors.keys:
        if holds(key.public, message, signature):
            return Signature(KEY_LEVEL, "key", f"{key.name} (key by: {key.channel})")
    names = ", ".join(key.name for key in anchors.keys)
    raise RefusedError(
        "evidence.signature",
        f"{what}: its signature is not by a given key ({names:.160}), or it was changed",
        hint="compare the publisher's key by the second channel; do not take one from the snapshot",
    )


def _by_identity(
    raw: bytes, material: dict[str, Any], anchors: Anchors, what: str
) -> tuple[Signature, str, bytes]:
    who = _expected(material, anchors, what)
    signed = sigstore.verify_attestation(
        raw, _root(anchors, what), identity=who.identity, issuer=who.issuer
    )
    found = Signature(IDENTITY_LEVEL, "sigstore", _name(who))
    return found, signed.payload_type or "", signed.payload or b""


def _by_authority(
    material: dict[str, Any],
    anchors: Anchors,
    message: bytes,
    signature: bytes,
    *,
    at: datetime,
    what: str,
) -> Signature:
    """Check a certificate chain that no log and no timestamp vouches for, as of `at`."""
    chain = _chain(material, what)
    if not anchors.authorities:
        raise _anchor(what, "it is signed by a certificate, and no authority is given")
    names = _identities(chain[0])
    known = [each for each in anchors.authorities if each.identity in names]
    if not known:
        raise _identity(what, names, [each.identity for each in anchors.authorities])
    if not any(_leads_to(chain, authority, at) for authority in known):
        raise RefusedError(
            "evidence.signature",
            f"{what}: the certificate of {known[0].identity!r:.80} does not lead to a given "
            f"authority, or was not valid at {format_time(at)}",
            hint="a signature without a logged time holds only while its certificate does: ask the "
            "publisher to sign again",
        )
    key = chain[0].public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not holds(key, message, signature):
        raise RefusedError("evidence.signature", f"{what}: its signature does not hold")
    return Signature(KEY_LEVEL, "certificate", f"{known[0].identity} ({known[0].name})")


def holds(key: PublicKey, message: bytes, signature: bytes) -> bool:
    """Tell whether the signature over `message` is this key's."""
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, message)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(_HASHES[key.curve.key_size]))
        else:
            key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, KeyError):
        return False
    return True


def _leads_to(chain: list[x509.Certificate], authority: Authority, at: datetime) -> bool:
    """Follow the chain, each certificate valid at `at` and issued by the next, to a given root."""
    roots = {root.fingerprint(hashes.SHA256()): root for root in authority.certificates}
    current, rest = chain[0], chain[1:]
    if not _may_sign(current) or not _valid(current, at):
        return False
    for depth in range(MAX_CHAIN):
        for root in roots.values():
            if _valid(root, at) and _issued(current, root, depth):
                return True
        issuer = next((each for each in rest if _issued(current, each, depth)), None)
        if issuer is None or not _valid(issuer, at):
            return False
        current, rest = issuer, [each for each in rest if each is not issuer]
    return False


def _issued(child: x509.Certificate, issuer: x509.Certificate, below: int) -> bool:
    """Tell whether `issuer` is an authority that issued `child`, with `below` issuers beneath."""
    try:
        child.verify_directly_issued_by(issuer)
        basic = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
        issuer.extensions.get_extension_for_class(x509.NameConstraints)
    except x509.ExtensionNotFound as error:
        if error.oid != x509.NameConstraints.oid:
            return False  # no authority says of itself that it is none
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension):
        return False
    else:
        return False  # name constraints are not evaluated here, so they are not passed over
    limit = basic.path_length
    return basic.ca and usage.key_cert_sign and (limit is None or below <= limit)


def _may_sign(leaf: x509.Certificate) -> bool:
    try:
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
        if not usage.digital_signature:
            return False
        extended = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound as error:
        return error.oid == x509.ExtendedKeyUsage.oid
    except (ValueError, x509.DuplicateExtension):
        return False
    return ExtendedKeyUsageOID.CODE_SIGNING in extended


def _valid(certificate: x509.Certificate, at: datetime) -> bool:
    return certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc


def _expected(material: dict[str, Any], anchors: Anchors, what: str) -> Identity:
    """Return the one identity of this site that the certificate names; nothing is proved yet."""
    if not anchors.identities:
        raise _anchor(what, "it is signed by a Sigstore identity, and none is given to expect")
    leaf = _chain(material, what)[0]
    names, issuer = _identities(leaf), _issuer(leaf)
    for each in anchors.identities:
        if each.identity in names and each.issuer == issuer:
            return each
    wanted = [f"{each.identity} by {each.issuer}" for each in anchors.identities]
    raise _identity(what, {f"{name} by {issuer}" for name in names}, wanted)


def _chain(material: dict[str, Any], what: str) -> list[x509.Certificate]:
    single, listed = material.get("certificate"), material.get("x509CertificateChain")
    entries = [single] if single is not None else []
    if isinstance(listed, dict) and isinstance(listed.get("certificates"), list):
        entries += listed["certificates"]
    if not 1 <= len(entries) <= MAX_CHAIN:
        raise _bad(what, "it names neither a key nor a certificate")
    try:
        return [
            x509.load_der_x509_certificate(base64.b64decode(entry["rawBytes"], validate=True))
            for entry in entries
        ]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise _bad(what, "its certificate cannot be read") from error


def _identities(leaf: x509.Certificate) -> set[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = set(names.get_values_for_type(x509.RFC822Name))
        found |= set(names.get_values_for_type(x509.UniformResourceIdentifier))
        found |= set(names.get_values_for_type(x509.DNSName))
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return set()
    return {str(name) for name in found}


def _issuer(leaf: x509.Certificate) -> str:
    for oid in _ISSUERS:
        try:
            value = leaf.extensions.get_extension_for_oid(oid).value
        except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
            continue
        raw = value.value if isinstance(value, x509.UnrecognizedExtension) else b""
        if oid == _ISSUERS[0]:  # a DER UTF8String; the older one is bare text
            raw = raw[2:] if raw[:1] == b"\x0c" and len(raw) == raw[1] + 2 else b""
        return raw.decode("utf-8", "replace")
    return ""


def _envelope(value: Any, what: str) -> tuple[str, bytes, bytes]:
    """Return type, payload and the one signature of a DSSE envelope."""
    found = value if isinstance(value, dict) else {}
    signatures = found.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise _bad(what, "it has not exactly one signature")
    try:
        kind = found["payloadType"]
        payload = base64.b64decode(found["payload"], validate=True)
        signature = base64.b64decode(signatures[0]["sig"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise _bad(what, "its envelope cannot be read") from error
    if not isinstance(kind, str):
        raise _bad(what, "its payload type is not text")
    return kind, payload, signature


def _root(anchors: Anchors, what: str) -> str:
    if anchors.trusted_root is None:
        raise _anchor(what, "it needs a Sigstore trusted root, and none is given (--trusted-root)")
    return anchors.trusted_root


def _name(who: Identity) -> str:
    known = "" if who.name == who.identity else f" ({who.name})"
    return f"{who.identity} by {who.issuer}{known}"


def _bad(what: str, reason: str) -> RefusedError:
    return RefusedError(_MALFORMED, f"{what}: {reason}")


def _anchor(what: str, reason: str) -> RefusedError:
    return RefusedError(
        "evidence.anchor",
        f"{what}: {reason}",
        hint="give it with --signer-key, --signer-ca, --signer-identity or in a --publishers file",
    )


def _identity(what: str, found: set[str], wanted: list[str]) -> RefusedError:
    return RefusedError(
        "evidence.identity",
        f"{what}: signed by {', '.join(sorted(found)) or 'nobody named'!r:.200}; expected "
        f"{', '.join(wanted):.200}",
        hint="evidence counts only from the publisher that this site names",
    )
