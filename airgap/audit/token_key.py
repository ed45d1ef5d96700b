"""A log key in a PKCS#11 token (docs/design/audit.md, 5).

The key file then holds the URI of the key instead of the key, and the PIN lies beside it, readable
by the owner alone: whoever copies both still has no key. Each signature opens the token, signs and
is verified before it is used. A token that is gone or refuses halts the log like a disk does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from airgap.audit.disk import open_plain
from bundle.keys import ED25519
from bundle.token import (
    TokenSigner,
    TokenUri,
    destroy_token_key,
    new_token_key,
    open_token,
    parse_uri,
)
from policy.errors import FaultError, RefusedError

MAX_PIN: Final = 256
_NUMBER: Final = re.compile(r"\.[0-9]+$")


@dataclass(frozen=True, slots=True)
class TokenKey:
    """An Ed25519 key in a token, with the PIN that opens it."""

    signer: TokenSigner
    pin: bytes

    @classmethod
    def make(cls, uri: str, pin: bytes) -> Self:
        """Make a key in a token, under a label that is free; RefusedError `trust.token`."""
        return cls(new_token_key(uri, pin, ED25519), pin)

    @classmethod
    def open(cls, uri: str, pin: bytes) -> Self:
        """Open a key in a token; RefusedError `trust.token`, or `audit.key` for another scheme."""
        found = open_token(uri, pin)
        if found.public_key.scheme != ED25519:
            raise RefusedError(
                "audit.key",
                f"{found.uri} is a key of scheme {found.public_key.scheme}, not Ed25519",
            )
        return cls(found, pin)

    def sign(self, data: bytes, /) -> bytes:
        """Return the signature; RefusedError `trust.token` where the token gives none."""
        return self.signer.sign(data)

    def public_key(self) -> Ed25519PublicKey:
        """Return the public half."""
        return Ed25519PublicKey.from_public_bytes(self.signer.public_key.public)

    @property
    def uri(self) -> str:
        """The URI as the key file holds it."""
        return full_uri(self.signer.uri)

    def next(self, epoch: int) -> Self:
        """Make the key of the next epoch in the same token, in place of an unused one."""
        here = self.signer.uri
        label = f"{_NUMBER.sub('', here.object)}.{epoch}"
        uri = full_uri(TokenUri(here.token, label, here.module))
        destroy_token_key(uri, self.pin)
        return self.make(uri, self.pin)


def full_uri(uri: TokenUri) -> str:
    """Return the URI of RFC 7512, module and all."""
    token, label, module = (
        quote(part, safe="/._-") for part in (uri.token, uri.object, uri.module)
    )
    return f"pkcs11:token={token};object={label}?module-path={module}"


def pin_path(key: Path) -> Path:
    """Return where the PIN of a key file lies: one for a log, whatever epoch."""
    return key.parent / f"{key.name.partition('.')[0]}.pin"


def open_reference(path: Path, content: bytes) -> TokenKey:
    """Open the key that a key file names.

    Raises:
        RefusedError: `audit.key`, the PIN is open to others; `trust.token`.
        FaultError: `audit.key`, there is no PIN file.

    """
    return TokenKey.open(_uri(content), read_pin(pin_path(path)))


def destroy_reference(path: Path, content: bytes) -> None:
    """Destroy the key that a key file names; nothing where it is gone already."""
    destroy_token_key(_uri(content), read_pin(pin_path(path)))


def read_pin(path: Path) -> bytes:
    """Return the first line of a PIN file that its owner alone can read."""
    try:
        with open_plain(path) as file:
            pin = file.read(MAX_PIN).split(b"\n")[0]
        mode = path.stat().st_mode
    except OSError as error:
        raise FaultError(
            "audit.key", f"cannot read the PIN {path}: {error.strerror}", hint="check the owner"
        ) from error
    if mode & 0o077:
        raise RefusedError(
            "audit.key",
            f"{path} can be read by others than its owner",
            hint=f"chmod 0400 {path}, and ask whether the PIN must be changed",
        )
    return pin


def _uri(content: bytes) -> str:
    text = content.removesuffix(b"\n").decode("utf-8", "replace")
    parse_uri(text)
    return text
