"""Keys of people: public keys by scheme, and private keys in files.

A key id is the SHA-256 of the DER SubjectPublicKeyInfo, so that `openssl pkey -pubin -outform DER |
sha256sum` prints it; FORMAT.md section 7. Ed25519 is the only scheme so far. `Signer` is the place
where a token or another scheme joins.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Document, KeyId, Name, PersonId, Token
from bundle.manifest import first_problem
from policy.errors import FaultError, RefusedError

FORMAT: Literal["airgap-key/1"] = "airgap-key/1"
ED25519 = "ed25519"
KEY_FILE_LIMIT = 64 * 1024
PASSPHRASE_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key and its scheme; `public` is the raw form of the scheme (Ed25519: 32 bytes)."""

    scheme: str
    public: bytes

    @property
    def supported(self) -> bool:
        """Whether this program can verify with the key."""
        return self.scheme == ED25519 and len(self.public) == 32  # noqa: PLR2004 - RFC 8032

    @property
    def keyid(self) -> str:
        """The key id; ValueError when the scheme is not supported."""
        if not self.supported:
            raise ValueError(f"no key id for a key of scheme {self.scheme!r:.40}")
        der = Ed25519PublicKey.from_public_bytes(self.public).public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(der).hexdigest()

    def find_valid(self, signature: bytes, message: bytes) -> bool:
        """Tell whether `signature` over `message` is this key's."""
        if not self.supported:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


class Signer(Protocol):
    """A private key somewhere: in a file, or later in a token."""

    @property
    def public_key(self) -> PublicKey:
        """The public half."""

    def sign(self, message: bytes) -> bytes:
        """Sign `message` as the scheme says (Ed25519: RFC 8032, no pre-hash)."""


@dataclass(frozen=True, slots=True)
class FileSigner:
    """A private key read from a PKCS#8 file."""

    _private: Ed25519PrivateKey

    @property
    def public_key(self) -> PublicKey:
        """The public half."""
        raw = self._private.public_key().public_bytes_raw()
        return PublicKey(ED25519, raw)

    def sign(self, message: bytes) -> bytes:
        """Sign `message`."""
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
    folder: Path, name: str, *, person: str, roles: tuple[str, ...], passphrase: bytes = b""
) -> PublicKeyFile:
    """Make `NAME.pem` (mode 0600, encrypted when there is a passphrase) and `NAME.pub.json`.

    Raises:
        RefusedError: `trust.keyfile`; one of the files exists, or a name is not allowed.

    """
    private = Ed25519PrivateKey.generate()
    public = FileSigner(private).public_key
    try:
        document = PublicKeyFile(
            keyid=public.keyid,
            person=person,
            public=encode_base64(public.public),
            roles=roles,
            scheme=public.scheme,
        )
        _NameCheck(name=name)
    except ValidationError as error:
        raise RefusedError(
            "trust.keyfile", f"a key cannot be made: {first_problem(error)}"
        ) from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )
    secret, open_part = folder / f"{name}.pem", folder / f"{name}.pub.json"
    if secret.exists() or open_part.exists():
        raise RefusedError(
            "trust.keyfile",
            f"{secret} or {open_part.name} exists; a key is never overwritten",
            hint="choose another name, or move the old key away",
        )
    _write_new(secret, pem, 0o600)
    try:
        _write_new(open_part, document.to_bytes(), 0o644)
    except BaseException:
        secret.unlink()  # half a pair would be in the way of the next attempt
        raise
    return document


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


def load_signer(path: Path, passphrase: bytes = b"") -> FileSigner:
    """Read a private key file.

    Raises:
        RefusedError: `trust.keyfile`; others can read it, it is no such key, or the passphrase is
            missing or wrong.
        FaultError: `host.io`; it cannot be read.

    """
    raw = read_limited(path, KEY_FILE_LIMIT, code="trust.keyfile", what="the key file")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise RefusedError(
            "trust.keyfile",
            f"{path} can be read by other users",
            hint=f"chmod 600 {path}; make a new key if others may have read it",
        )
    try:
        private = serialization.load_pem_private_key(raw, passphrase or None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RefusedError(
            "trust.keyfile",
            f"{path} is not a PKCS#8 key that this passphrase opens",
            hint="give the right --passphrase-file, or none for a key without passphrase",
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise RefusedError("trust.keyfile", f"{path} holds no Ed25519 key")
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


def _write_new(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink()
        raise
