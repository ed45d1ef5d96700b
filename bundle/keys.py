"""Keys of people: public keys by scheme, and private keys in files.

Three schemes: Ed25519, ECDSA on P-384 with SHA-384, and ML-DSA-87. A key id is the SHA-256 of the
DER SubjectPublicKeyInfo, so that `openssl pkey -pubin -outform DER | sha256sum` prints it;
FORMAT.md section 7. `Signer` is what a key file and a token (`bundle.token`) have in common.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA87PrivateKey, MLDSA87PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.durable import write_new
from bundle.fields import Document, KeyId, Name, PersonId, Token
from bundle.manifest import first_problem
from policy.errors import FaultError, RefusedError

FORMAT: Literal["airgap-key/1"] = "airgap-key/1"
ED25519: Final = "ed25519"
P384: Final = "ecdsa-p384"
MLDSA87: Final = "ml-dsa-87"
SCHEMES: Final = (ED25519, P384, MLDSA87)
PAIR: Final = (MLDSA87, P384)  # what one person of the profile `cnsa2` signs with
KEY_FILE_LIMIT = 64 * 1024
PASSPHRASE_LIMIT = 4096

_RAW_SIZES: Final[Mapping[str, int]] = {ED25519: 32, P384: 97, MLDSA87: 2592}
_SHA384: Final = ec.ECDSA(hashes.SHA384())

PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey | MLDSA87PrivateKey


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key and its scheme.

    `public` is the raw form: Ed25519 32 bytes, P-384 the uncompressed point of 97 bytes, ML-DSA-87
    2,592 bytes. Signatures are 64 bytes, DER of `(r, s)` over SHA-384, and 4,627 bytes of pure
    ML-DSA with an empty context.
    """

    scheme: str
    public: bytes

    @classmethod
    def of(cls, key: PrivateKey) -> PublicKey:
        """Return the public half; ValueError for a curve other than P-384."""
        if isinstance(key, Ed25519PrivateKey):
            return cls(ED25519, key.public_key().public_bytes_raw())
        if isinstance(key, MLDSA87PrivateKey):
            return cls(MLDSA87, key.public_key().public_bytes_raw())
        if not isinstance(key.curve, ec.SECP384R1):
            raise ValueError(f"curve {key.curve.name}, not P-384")  # noqa: TRY004 - a value
        point = key.public_key().public_bytes(
            serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        )
        return cls(P384, point)

    @property
    def supported(self) -> bool:
        """Whether this program can verify with the key."""
        if _RAW_SIZES.get(self.scheme) != len(self.public):
            return False
        try:
            self._load()
        except ValueError:  # no point of the curve
            return False
        return True

    @property
    def der(self) -> bytes:
        """The DER SubjectPublicKeyInfo; ValueError when the scheme is not supported."""
        if _RAW_SIZES.get(self.scheme) != len(self.public):
            raise ValueError(f"no key id for a key of scheme {self.scheme!r:.40}")
        return self._load().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def pem(self) -> bytes:
        """The form that openssl reads; ValueError when the scheme is not supported."""
        body = base64.encodebytes(self.der).replace(b"\n", b"")
        lines = [body[at : at + 64] for at in range(0, len(body), 64)]
        return b"\n".join([b"-----BEGIN PUBLIC KEY-----", *lines, b"-----END PUBLIC KEY-----", b""])

    @property
    def keyid(self) -> str:
        """The key id; ValueError when the scheme is not supported."""
        return hashlib.sha256(self.der).hexdigest()

    def find_valid(self, signature: bytes, message: bytes) -> bool:
        """Tell whether `signature` over `message` is this key's."""
        if not self.supported:
            return False
        key = self._load()
        try:
            if not isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, message)
                return True
            if encode_dss_signature(*decode_dss_signature(signature)) != signature:
                return False  # BER has many forms of one signature
            key.verify(signature, message, _SHA384)
        except (InvalidSignature, ValueError):
            return False
        return True

    def _load(self) -> Ed25519PublicKey | ec.EllipticCurvePublicKey | MLDSA87PublicKey:
        if self.scheme == ED25519:
            return Ed25519PublicKey.from_public_bytes(self.public)
        if self.scheme == P384:
            if self.public[:1] != b"\x04":
                raise ValueError("the point is not in the uncompressed form")
            return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), self.public)
        return MLDSA87PublicKey.from_public_bytes(self.public)


class Signer(Protocol):
    """A private key somewhere: in a file, or in a token."""

    @property
    def public_key(self) -> PublicKey:
        """The public half."""

    def sign(self, message: bytes) -> bytes:
        """Sign `message` itself, never a hash of it, as the scheme says."""


def as_signers(signer: Signer | Sequence[Signer]) -> tuple[Signer, ...]:
    """Return the keys of a person who signs with one key or, in the profile `cnsa2`, with two."""
    return tuple(signer) if isinstance(signer, Sequence) else (signer,)


@dataclass(frozen=True, slots=True)
class FileSigner:
    """A private key read from a PKCS#8 file."""

    _private: PrivateKey

    @property
    def public_key(self) -> PublicKey:
        """The public half."""
        return PublicKey.of(self._private)

    def sign(self, message: bytes) -> bytes:
        """Sign `message`."""
        if isinstance(self._private, ec.EllipticCurvePrivateKey):
            return self._private.sign(message, _SHA384)
        return self._private.sign(message)


class PublicKeyFile(Document):
    """`NAME.pub.json`: what a person hands to whoever keeps the trust root."""

    format: Literal["airgap-key/1"] = FORMAT
    keyid: KeyId
    person: PersonId
    public: str = Field(max_length=8192)
    roles: tuple[Token, ...] = Field(min_length=1, max_length=16)
    scheme: Token

    @property
    def key(self) -> PublicKey:
        """The key itself."""
        return PublicKey(self.scheme, decode_base64(self.public))

    def to_bytes(self) -> bytes:
        """Return the canonical form and a newline."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"


def decode_base64(text: str) -> bytes:
    """Read standard base64 that encodes back to the same text; ValueError for any other."""
    raw = base64.b64decode(text, validate=True)
    if base64.b64encode(raw).decode() != text:
        raise ValueError("base64 has unused bits")
    return raw


def encode_base64(raw: bytes) -> str:
    """Write standard base64."""
    return base64.b64encode(raw).decode()


def new_key(
    folder: Path,
    name: str,
    *,
    person: str,
    roles: tuple[str, ...],
    passphrase: bytes = b"",
    scheme: str = ED25519,
) -> PublicKeyFile:
    """Make `NAME.pem` (mode 0600, encrypted when there is a passphrase) and `NAME.pub.json`.

    Raises:
        RefusedError: `trust.keyfile`; one of the files exists, or a name is not allowed.

    """
    private = _generate(scheme)
    document = public_key_file(name, PublicKey.of(private), person=person, roles=roles)
    secret, open_part = folder / f"{name}.pem", folder / f"{name}.pub.json"
    _require_free(secret, open_part)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    write_new(secret, pem, 0o600)
    try:
        write_new(open_part, document.to_bytes(), 0o644)
    except BaseException:
        secret.unlink()  # half a pair would be in the way of the next attempt
        raise
    return document


def new_pair(
    folder: Path, name: str, *, person: str, roles: tuple[str, ...], passphrase: bytes = b""
) -> tuple[PublicKeyFile, ...]:
    """Make both keys of one person for the profile `cnsa2`: `NAME-ml-dsa-87`, `NAME-ecdsa-p384`.

    Raises:
        RefusedError: `trust.keyfile`, as `new_key`; then neither key is left.

    """
    names = pair_names(name)
    _require_free(*(folder / f"{each}{end}" for each in names for end in (".pem", ".pub.json")))
    made: list[PublicKeyFile] = []
    try:
        for each, scheme in zip(names, PAIR, strict=True):
            made.append(
                new_key(
                    folder, each, person=person, roles=roles, passphrase=passphrase, scheme=scheme
                )
            )
    except BaseException:
        for each in names[: len(made)]:
            for end in (".pem", ".pub.json"):
                (folder / f"{each}{end}").unlink()
        raise
    return tuple(made)


def pair_names(name: str) -> tuple[str, ...]:
    """Return the names of the two keys that `new_pair` makes."""
    return tuple(f"{name}-{scheme}" for scheme in PAIR)


def public_key_file(
    name: str, key: PublicKey, *, person: str, roles: tuple[str, ...]
) -> PublicKeyFile:
    """Return the document of a public key; RefusedError `trust.keyfile` for a bad name."""
    try:
        _NameCheck(name=name)
        return PublicKeyFile(
            keyid=key.keyid,
            person=person,
            public=encode_base64(key.public),
            roles=roles,
            scheme=key.scheme,
        )
    except ValidationError as error:
        raise RefusedError(
            "trust.keyfile", f"a key cannot be made: {first_problem(error)}"
        ) from error


def save_public_key(folder: Path, name: str, document: PublicKeyFile) -> Path:
    """Write `NAME.pub.json` alone, for a key that lives in a token; refused if it exists."""
    path = folder / f"{name}.pub.json"
    _require_free(path)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_new(path, document.to_bytes(), 0o644)
    return path


def parse_public_key(raw: bytes) -> PublicKeyFile:
    """Turn the bytes of a `NAME.pub.json` into a checked document.

    Raises:
        RefusedError: `trust.keyfile`; malformed, unsupported scheme, or a key id of another key.

    """
    body = raw.removesuffix(b"\n")
    parse_canonical(body, code="trust.keyfile", what="the public key file", limit=KEY_FILE_LIMIT)
    try:
        document = PublicKeyFile.model_validate_json(body)
        keyid = document.key.keyid
    except ValidationError as error:
        raise RefusedError(
            "trust.keyfile", f"the public key file: {first_problem(error)}"
        ) from error
    except ValueError as error:
        raise RefusedError("trust.keyfile", f"the public key file: {error!s:.120}") from error
    if keyid != document.keyid:
        raise RefusedError("trust.keyfile", "the public key file bears the id of another key")
    return document


def read_private(path: Path, limit: int, *, what: str) -> bytes:
    """Read a file that its owner alone can read; RefusedError `trust.keyfile`, FaultError."""
    raw = read_limited(path, limit, code="trust.keyfile", what=what)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise RefusedError(
            "trust.keyfile",
            f"{path} can be read by other users",
            hint=f"chmod 600 {path}; make a new key if others may have read it",
        )
    return raw


def load_signer(path: Path, passphrase: bytes = b"") -> FileSigner:
    """Read a private key file.

    Raises:
        RefusedError: `trust.keyfile`; others can read it, it is no such key, or the passphrase is
            missing or wrong.
        FaultError: `host.io`; it cannot be read.

    """
    raw = read_private(path, KEY_FILE_LIMIT, what="the key file")
    try:
        private = serialization.load_pem_private_key(raw, passphrase or None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RefusedError(
            "trust.keyfile",
            f"{path} is not a PKCS#8 key that this passphrase opens",
            hint="give the right --passphrase-file, or none for a key without passphrase",
        ) from error
    if isinstance(private, ec.EllipticCurvePrivateKey) and not isinstance(
        private.curve, ec.SECP384R1
    ):
        raise RefusedError(
            "trust.keyfile", f"{path} holds a key on {private.curve.name}, not P-384"
        )
    if not isinstance(private, PrivateKey):
        raise RefusedError(
            "trust.keyfile", f"{path} holds no key of a scheme known here: {', '.join(SCHEMES)}"
        )
    return FileSigner(private)


def read_passphrase(path: Path | None) -> bytes:
    """Return the first line of a passphrase file, or nothing without a file."""
    if path is None:
        return b""
    raw = read_limited(path, PASSPHRASE_LIMIT, code="trust.keyfile", what="the passphrase file")
    line = raw.split(b"\n", maxsplit=1)[0].rstrip(b"\r")
    if not line:
        raise RefusedError("trust.keyfile", f"{path} holds no passphrase in its first line")
    return line


def read_limited(path: Path, limit: int, *, code: str, what: str) -> bytes:
    """Read a small file whole.

    Raises:
        RefusedError: `code`; not a plain file, or longer than `limit` bytes.
        FaultError: `host.io`; it is missing or cannot be read.

    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device would block or never end
            raise RefusedError(code, f"{what} {str(path)!r:.200} is not a plain file")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise FaultError(
            "host.io", f"{what} {str(path)!r:.200} cannot be read: {error.strerror}"
        ) from error
    if len(raw) > limit:
        raise RefusedError(code, f"{what} {str(path)!r:.200} has more than {limit:,} bytes")
    return raw


class _NameCheck(Document):
    name: Name


def _generate(scheme: str) -> PrivateKey:
    if scheme == ED25519:
        return Ed25519PrivateKey.generate()
    if scheme == P384:
        return ec.generate_private_key(ec.SECP384R1())
    if scheme == MLDSA87:
        return MLDSA87PrivateKey.generate()
    raise RefusedError(
        "trust.keyfile", f"no scheme {scheme!r:.40}: the schemes are {', '.join(SCHEMES)}"
    )


def _require_free(*paths: Path) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise RefusedError(
                "trust.keyfile",
                f"{path} exists; a key is never overwritten",
                hint="choose another name, or move the old key away",
            )
