"""Signatures of an export's manifest: Ed25519 and ML-DSA-87, by keys that sign nothing else.

The signed head proves the records; these two say who made the export and that nothing was added to
it or left out (docs/design/audit.md, 5 and 7). Which of them are required is for the importer.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA87PrivateKey, MLDSA87PublicKey

from airgap.audit.checkpoint import write_new
from airgap.audit.pem import private_pems, public_pem, read_pair
from policy.errors import RefusedError

FILE: Final = "manifest.sig"
FORMAT: Final = "airgap-audit-signatures/1"
PREFIX: Final = b"airgap-audit-export/1\n"  # what is signed begins so; the manifest follows
SCHEMES: Final = ("ed25519", "ml-dsa-87")
MAX_FILE: Final = 32_768
_LENGTHS: Final = {"ed25519": 64, "ml-dsa-87": 4_627}


@dataclass(frozen=True, slots=True)
class ExportPublic:
    """The two public keys of a host that exports."""

    lattice: MLDSA87PublicKey
    classic: Ed25519PublicKey

    def as_pem(self) -> bytes:
        """Return both keys, each as a PEM block."""
        return public_pem(self.lattice, self.classic)

    @property
    def key_id(self) -> str:
        """SHA-256 over both, 64 hexadecimal digits."""
        return hashlib.sha256(self.as_pem()).hexdigest()

    def verify(
        self, manifest: bytes, signatures: bytes, required: Sequence[str] = SCHEMES
    ) -> tuple[str, ...]:
        """Return the schemes that signed `manifest`.

        Args:
            manifest: The bytes of `manifest.json`.
            signatures: The bytes of `manifest.sig`, untrusted; empty when there is no such file.
            required: Schemes without which the export is refused.

        Raises:
            RefusedError: `audit.export`; malformed, a signature that does not hold, of another
                key, or a required one is missing.

        """
        found = _parse(signatures, self.key_id) if signatures else {}
        for scheme, signature in found.items():
            key = self.classic if scheme == "ed25519" else self.lattice
            try:
                key.verify(signature, PREFIX + manifest)
            except InvalidSignature:
                raise _refused(f"the {scheme} signature of the manifest does not hold") from None
        missing = [scheme for scheme in required if scheme not in found]
        if missing:
            raise _refused(f"the manifest lacks the signature by {' and '.join(missing)}")
        return tuple(scheme for scheme in SCHEMES if scheme in found)


@dataclass(frozen=True, slots=True)
class ExportKey:
    """The two private keys, in one file that only the owner of the log can read."""

    lattice: MLDSA87PrivateKey
    classic: Ed25519PrivateKey

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the keys at `path` (0400) and the public ones beside it (`.pub`)."""
        key = cls(MLDSA87PrivateKey.generate(), Ed25519PrivateKey.generate())
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_new(path.with_suffix(".pub"), key.public.as_pem(), 0o444, shared=True)
        write_new(path, private_pems(key.lattice, key.classic), 0o400, shared=True)
        return key

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the key file; RefusedError or FaultError `audit.key`."""
        match read_pair(path, code="audit.key", private=True):
            case [MLDSA87PrivateKey() as lattice, Ed25519PrivateKey() as classic]:
                if not path.stat().st_mode & 0o077:
                    return cls(lattice, classic)
                raise RefusedError(
                    "audit.key",
                    f"{path} can be read by others than its owner",
                    hint=f"chmod 0400 {path}, and ask whether the key must be replaced",
                )
        raise RefusedError("audit.key", f"{path} does not hold the two export keys")

    @property
    def public(self) -> ExportPublic:
        """The public halves."""
        return ExportPublic(self.lattice.public_key(), self.classic.public_key())

    def sign(self, manifest: bytes) -> bytes:
        """Return the content of `manifest.sig`."""
        message = PREFIX + manifest
        signatures = {
            "ed25519": base64.b64encode(self.classic.sign(message)).decode(),
            "ml-dsa-87": base64.b64encode(self.lattice.sign(message)).decode(),
        }
        document = {"format": FORMAT, "key": self.public.key_id, "signatures": signatures}
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def load_export_public(path: Path) -> ExportPublic:
    """Read a file of two public keys; RefusedError or FaultError `audit.key`."""
    match read_pair(path, code="audit.key", private=False):
        case [MLDSA87PublicKey() as lattice, Ed25519PublicKey() as classic]:
            return ExportPublic(lattice, classic)
    raise RefusedError("audit.key", f"{path} does not hold the two public export keys")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Take the members of a JSON object; ValueError when a key comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _parse(content: bytes, key_id: str) -> dict[str, bytes]:
    """Return the signatures by scheme; none is verified yet."""
    if len(content) > MAX_FILE:
        raise _refused(f"{FILE} has {len(content)} bytes")
    try:
        document = json.loads(content.decode(), object_pairs_hook=once)
        if document["format"] != FORMAT or set(document) != {"format", "key", "signatures"}:
            raise _refused(f"{FILE}: expected the format {FORMAT}")
        texts = document["signatures"]
        signatures = {name: base64.b64decode(text, validate=True) for name, text in texts.items()}
        if {name: base64.b64encode(raw).decode() for name, raw in signatures.items()} != texts:
            raise _refused(f"{FILE}: base64 in another form")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refused(f"{FILE} is malformed") from None
    if document["key"] != key_id:
        raise _refused(f"signed by key {document['key']!r:.20}, expected {key_id[:16]}")
    for scheme, signature in signatures.items():
        if _LENGTHS.get(scheme) != len(signature):
            raise _refused(f"{FILE}: a signature of scheme {scheme!r:.20} and wrong length")
    return signatures


def _refused(message: str) -> RefusedError:
    return RefusedError(
        "audit.export", message, hint="refuse this medium; ask the host for the export again"
    )
