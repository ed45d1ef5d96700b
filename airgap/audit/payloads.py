"""Encrypted payloads: prompts and outputs that only their holder can read (design 2 and 8).

A record carries a commitment and never a text. Where the site keeps texts, each is sealed with HPKE
(RFC 9180; ML-KEM-1024 with P-384, HKDF-SHA384, AES-256-GCM) to the public key of one office, the
security officer's. The host cannot read back what it sealed. Destroying a blob destroys the text
and the nonce: the commitment can never be opened again, and the log stays valid.

A blob is one header line, which names log, request and side and is bound into the key schedule as
`info`, and the ciphertext of the 32 bytes of the nonce and the payload.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM1024PrivateKey,
    MLKEM1024PublicKey,
)

from airgap.audit.checkpoint import write_new
from airgap.audit.pem import private_pems, public_pem, read_pair
from airgap.audit.record import Commit, Record, commitment
from policy.errors import RefusedError

FORMAT: Final = "airgap-sealed/1"
MAX_PAYLOAD: Final = 1 << 26
MAX_BLOB: Final = MAX_PAYLOAD + 65_536
NONCE: Final = 32
_MAX_HEADER: Final = 1_024
_SUITE: Final = hpke.Suite(hpke.KEM.MLKEM1024_P384, hpke.KDF.HKDF_SHA384, hpke.AEAD.AES_256_GCM)
SIDES: Final = ("in", "out")


@dataclass(frozen=True, slots=True)
class PayloadKey:
    """The public key to which a site seals payloads."""

    lattice: MLKEM1024PublicKey
    curve: EllipticCurvePublicKey

    @property
    def key_id(self) -> str:
        """SHA-256 over both public keys, 64 hexadecimal digits."""
        return hashlib.sha256(self.as_pem()).hexdigest()

    def as_pem(self) -> bytes:
        """Return both keys, each as a PEM block."""
        return public_pem(self.lattice, self.curve)

    def seal(self, payload: bytes, nonce: bytes, *, origin: str, req: str, side: str) -> bytes:
        """Return the blob of one payload; its commitment is `commitment(payload, nonce)`.

        Raises:
            RefusedError: `audit.payload`; too large.

        """
        if len(nonce) != NONCE or side not in SIDES:
            raise ValueError("a nonce has 32 bytes, a side is `in` or `out`")
        if len(payload) > MAX_PAYLOAD:
            raise RefusedError("audit.payload", f"a payload of {len(payload)} bytes")
        fields = {
            "format": FORMAT, "key": self.key_id, "origin": origin, "req": req, "side": side,
        }  # fmt: skip
        header = json.dumps(fields, sort_keys=True).encode() + b"\n"
        public = hpke.MLKEM1024P384PublicKey(self.lattice, self.curve)
        return header + _SUITE.encrypt(nonce + payload, public, info=header)


@dataclass(frozen=True, slots=True)
class HolderKey:
    """The private key of whoever may read payloads. It never lies on the host that seals."""

    lattice: MLKEM1024PrivateKey
    curve: EllipticCurvePrivateKey

    @classmethod
    def generate(cls) -> Self:
        """Make a key pair."""
        return cls(MLKEM1024PrivateKey.generate(), generate_private_key(SECP384R1()))

    @property
    def public(self) -> PayloadKey:
        """The public half."""
        return PayloadKey(self.lattice.public_key(), self.curve.public_key())

    def write(self, path: Path, passphrase: bytes = b"") -> None:
        """Write the key (0400, encrypted when there is a passphrase) and `NAME.pub` beside it."""
        pem = private_pems(self.lattice, self.curve, passphrase=passphrase)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_new(path.with_suffix(".pub"), self.public.as_pem(), 0o444)
        write_new(path, pem, 0o400)

    def is_meant(self, blob: bytes) -> bool:
        """Whether a blob says that it is sealed to this key; no proof of anything."""
        try:
            return _parse_header(blob.partition(b"\n")[0]).get("key") == self.public.key_id
        except RefusedError:
            return True

    def open(self, blob: bytes, record: Record, *, origin: str, side: str) -> bytes:
        """Return the payload of one side of a record.

        Raises:
            RefusedError: `audit.payload`; the blob is of another key, record or side, it was
                changed, or it is not what the record commits to.

        """
        header, _, sealed = blob.partition(b"\n")
        fields = _parse_header(header)
        expected = {"origin": origin, "req": record.get("req", ""), "side": side}
        for name, value in expected.items():
            if fields.get(name) != value:
                raise _refused(f"the blob is of {name} {fields.get(name)!r:.80}, not {value!r:.80}")
        if fields.get("key") != self.public.key_id:
            raise _refused(
                f"sealed to key {fields.get('key')!r:.20}, this is {self.public.key_id[:16]}",
                hint="use the holder's key to which this host sealed at that time",
            )
        private = hpke.MLKEM1024P384PrivateKey(self.lattice, self.curve)
        try:
            opened = _SUITE.decrypt(sealed, private, info=header + b"\n")
        except (InvalidTag, ValueError):
            raise _refused("the blob does not open: it was changed") from None
        nonce, payload = opened[:NONCE], opened[NONCE:]
        said = record.get(side, {})
        if len(nonce) != NONCE or commitment(payload, nonce) != Commit(
            said.get("commit", ""), said.get("bytes", -1)
        ):
            raise _refused("the blob holds another payload than the record commits to")
        return payload


def load_payload_key(path: Path) -> PayloadKey:
    """Read a public key file; RefusedError or FaultError `audit.payload`."""
    match read_pair(path, code="audit.payload", private=False):
        case [MLKEM1024PublicKey() as lattice, EllipticCurvePublicKey() as curve]:
            if isinstance(curve.curve, SECP384R1):
                return PayloadKey(lattice, curve)
    raise _no_key(path)


def load_holder_key(path: Path, passphrase: bytes = b"") -> HolderKey:
    """Read a private key file; RefusedError or FaultError `audit.payload`."""
    match read_pair(path, code="audit.payload", private=True, passphrase=passphrase):
        case [MLKEM1024PrivateKey() as lattice, EllipticCurvePrivateKey() as curve]:
            if isinstance(curve.curve, SECP384R1):
                return HolderKey(lattice, curve)
    raise _no_key(path)


def _parse_header(header: bytes) -> dict[str, Any]:
    if len(header) > _MAX_HEADER:
        raise _refused("the blob has no header")
    try:
        fields = json.loads(header)
    except (ValueError, RecursionError):
        raise _refused("the blob has no header") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _refused(f"expected the format {FORMAT}")
    return fields


def _no_key(path: Path) -> RefusedError:
    return RefusedError(
        "audit.payload",
        f"{path} holds no payload key that this passphrase opens",
        hint="make a pair with `airgap audit payload-key FILE`; the host gets FILE.pub alone",
    )


def _refused(message: str, hint: str = "") -> RefusedError:
    return RefusedError(
        "audit.payload", message, hint=hint or "keep log and blob as evidence; verify the log"
    )
