"""Key files of two PEM blocks: a post-quantum key and a classical one, always both."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from airgap.audit.disk import open_plain
from policy.errors import FaultError

MAX_KEY_FILE: Final = 65_536
_PEM: Final = re.compile(rb"-----BEGIN ([A-Z ]{1,40})-----\n[A-Za-z0-9+/=\n]+-----END \1-----\n")


class _Public(Protocol):
    """What every public key can; the union of `cryptography` lacks the newest kinds."""

    def public_bytes(
        self, encoding: serialization.Encoding, form: serialization.PublicFormat, /
    ) -> bytes:
        """Return the key in this encoding."""
        ...


class _Private(Protocol):
    """What every private key of `cryptography` can."""

    def private_bytes(
        self,
        encoding: serialization.Encoding,
        form: serialization.PrivateFormat,
        encryption: serialization.KeySerializationEncryption,
        /,
    ) -> bytes:
        """Return the key in this encoding."""
        ...


def public_pem(*keys: _Public) -> bytes:
    """Return public keys one after another, each as a PEM block."""
    return b"".join(
        key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for key in keys
    )


def private_pems(*keys: _Private, passphrase: bytes = b"") -> bytes:
    """Return private keys one after another, each as a PEM block."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return b"".join(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        for key in keys
    )


def read_pair(path: Path, *, code: str, private: bool, passphrase: bytes = b"") -> list[object]:
    """Return the keys of a file with exactly two PEM blocks; empty when it is no such file.

    Raises:
        FaultError: `code`; the file cannot be read.

    """
    try:
        with open_plain(path) as file:
            content = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise FaultError(
            code, f"cannot read {path}: {error.strerror}", hint="check path and owner"
        ) from error
    blocks = [found[0] for found in _PEM.finditer(content)]
    if len(blocks) != 2 or b"".join(blocks) != content:  # noqa: PLR2004 - one of each kind
        return []
    try:
        if private:
            return [serialization.load_pem_private_key(b, passphrase or None) for b in blocks]
        return [serialization.load_pem_public_key(b) for b in blocks]
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return []
