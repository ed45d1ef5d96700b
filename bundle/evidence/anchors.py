"""Anchors: which publishers are believed, by key, by certificate authority, or by identity.

Decides nothing by itself. An anchor comes from this site, by a channel that is named beside it,
never from the snapshot. What the staging side used travels, sealed, as META/evidence/anchors.json;
FORMAT.md section 17.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Document, Text
from bundle.manifest import first_problem
from bundle.scan.strict import open_view, parse_object
from policy.errors import RefusedError

FORMAT: Literal["airgap-anchors/1"] = "airgap-anchors/1"
PATH = "META/evidence/anchors.json"
ANCHORS_LIMIT = 4 * 1024 * 1024
FILE_LIMIT = 1024 * 1024
CODE = "evidence.anchor"
MIN_RSA = 3072

PublicKey = ec.EllipticCurvePublicKey | Ed25519PublicKey | rsa.RSAPublicKey
_Pem = Annotated[str, Field(min_length=1, max_length=65536)]
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


class Key(Document):
    """A publisher's public key, and the channel by which it came here."""

    name: Text
    channel: Text
    pem: _Pem

    @property
    def public(self) -> PublicKey:
        """The key; RefusedError `evidence.anchor` when it is of no known kind."""
        try:
            found = load_pem_public_key(self.pem.encode())
        except (ValueError, TypeError) as error:
            raise _no(f"the key of {self.name!r:.80} is not a public key in PEM") from error
        if isinstance(found, ec.EllipticCurvePublicKey) and found.curve.name in _CURVES:
            return found
        if isinstance(found, rsa.RSAPublicKey) and found.key_size >= MIN_RSA:
            return found
        if isinstance(found, Ed25519PublicKey):
            return found
        raise _no(f"the key of {self.name!r:.80} is none of P-256, P-384, P-521, Ed25519, RSA 3072")


class Authority(Document):
    """A certificate authority, and the one identity (SAN) that it is believed about."""

    name: Text
    channel: Text
    identity: Text
    pem: _Pem

    @property
    def certificates(self) -> list[x509.Certificate]:
        """The roots; RefusedError `evidence.anchor` when there is none."""
        try:
            return x509.load_pem_x509_certificates(self.pem.encode())
        except ValueError as error:
            raise _no(f"the authority {self.name!r:.80} is no certificate in PEM") from error


class Identity(Document):
    """A Sigstore identity: the certificate's SAN, and who vouched for it, both exact."""

    name: Text
    identity: Text
    issuer: Text


class Builder(Document):
    """A build service that is believed about provenance, and the source that it must name."""

    id: Text
    source: Text


class Anchors(Document):
    """All that this site believes about publishers. `trusted_root` is Sigstore's JSON document."""

    format: Literal["airgap-anchors/1"] = FORMAT
    keys: tuple[Key, ...] = Field(default=(), max_length=64)
    authorities: tuple[Authority, ...] = Field(default=(), max_length=16)
    identities: tuple[Identity, ...] = Field(default=(), max_length=64)
    builders: tuple[Builder, ...] = Field(default=(), max_length=64)
    trusted_root: Annotated[str, Field(min_length=2, max_length=1024 * 1024)] | None = None

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))

    def joined(self, other: Anchors) -> Anchors:
        """Return the anchors of both; RefusedError `evidence.anchor` for two trusted roots."""
        roots = {root for root in (self.trusted_root, other.trusted_root) if root}
        if len(roots) > 1:
            raise _no("two different trusted roots are given")
        return Anchors(
            keys=self.keys + other.keys,
            authorities=self.authorities + other.authorities,
            identities=self.identities + other.identities,
            builders=self.builders + other.builders,
            trusted_root=next(iter(roots), None),
        )


def parse_anchors(raw: bytes) -> Anchors:
    """Read the canonical form; RefusedError `evidence.anchor`."""
    value = parse_canonical(raw, code=CODE, what=PATH, limit=ANCHORS_LIMIT)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise _no(f"{PATH} is not of the format {FORMAT}")
    return _validated(value, PATH)


def load_anchors(path: Path) -> Anchors:
    """Read a site's file of publishers: TOML, which names other files relative to itself.

    Raises:
        RefusedError: `evidence.anchor`.
        FaultError: `host.io`.

    """
    try:
        value = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _no(f"{path.name!r:.80} is not TOML: {error!s:.120}") from error
    entries: dict[str, Any] = {
        {
            "key": "keys",
            "authority": "authorities",
            "identity": "identities",
            "builder": "builders",
        }.get(name, name): item
        for name, item in value.items()
    }
    for kind in ("keys", "authorities"):
        for item in entries.get(kind, []):
            if isinstance(item, dict) and isinstance(item.get("file"), str):
                item["pem"] = read_text(path.parent / item.pop("file"))
    root = entries.get("trusted_root")
    if isinstance(root, str):
        entries["trusted_root"] = read_root(path.parent / root)
    return _validated(entries, path.name)


def read_root(path: Path) -> str:
    """Read a Sigstore trusted root; it must at least be a strict JSON object."""
    text = read_text(path)
    parse_object(memoryview(text.encode()), code=CODE, what=path.name, limit=FILE_LIMIT)
    return text


def read_text(path: Path) -> str:
    """Read a small text file; RefusedError `evidence.anchor`, FaultError `host.io`."""
    data = open_view(path)
    if len(data) > FILE_LIMIT:
        raise _no(f"{path.name!r:.80} has {len(data):,} bytes; at most {FILE_LIMIT:,} are read")
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no(f"{path.name!r:.80} is not UTF-8 text") from error


def _validated(value: Any, what: str) -> Anchors:
    try:
        anchors = Anchors.model_validate_json(canonical_json(value))
    except (ValidationError, ValueError) as error:
        text = first_problem(error) if isinstance(error, ValidationError) else f"{error!s:.120}"
        raise _no(f"{what:.80}: {text}") from error
    for key in anchors.keys:
        _ = key.public
    for authority in anchors.authorities:
        _ = authority.certificates
    return anchors


def _no(reason: str) -> RefusedError:
    return RefusedError(
        CODE, reason, hint="mend the file of publishers; docs/guide.md shows its form"
    )
