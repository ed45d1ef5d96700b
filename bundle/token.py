"""Keys in a token: PKCS#11 through `python-pkcs11` (extra `hsm`).

The private key never leaves the token. Ed25519 and P-384 work where the token offers them, and
ML-DSA-87 with a token of PKCS#11 3.2; a token that does not offer a scheme is refused by name.
A key is named by a URI of RFC 7512: `pkcs11:token=LABEL;object=LABEL?module-path=/usr/lib/x.so`.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from bundle.fields import has_hidden
from bundle.keys import ED25519, MLDSA87, P384, PublicKey
from policy.errors import FaultError, RefusedError

SCHEME: Final = "pkcs11:"
MODULE_VARIABLE: Final = "AIRGAP_PKCS11_MODULE"
_CODE: Final = "trust.token"
_PIN: Final = re.compile("pin-(value|source)", re.IGNORECASE)
_P384_BYTES: Final = 48
_ONE_AT_A_TIME: Final = threading.RLock()
_MLDSA87_SET: Final = 3  # CKP_ML_DSA_87
# Edwards25519 as a curve name and as an object identifier; tokens differ in what they take.
_EDWARDS: Final = (
    b"\x13\x0cedwards25519",
    bytes.fromhex("06032b6570"),
)


def names_token(text: str) -> bool:
    """Tell whether this is a `pkcs11:` URI, which begins in capitals as well."""
    return text[: len(SCHEME)].lower() == SCHEME


@dataclass(frozen=True, slots=True)
class TokenUri:
    """Which object of which token, and the library that talks to it."""

    token: str
    object: str
    module: str

    def __str__(self) -> str:
        return f"pkcs11:token={self.token};object={self.object}"


def parse_uri(text: str) -> TokenUri:
    """Read a `pkcs11:` URI.

    Raises:
        RefusedError: `trust.token`; no token or object, an attribute twice, or one not known here.

    """
    if _PIN.search(unquote(text)):  # it stays out of every message, as the rest of the URI does
        raise RefusedError(
            _CODE,
            "the URI of a key holds a PIN, or where to find one; others see a command line",
            hint="give --pin-file FILE, and change a PIN that stood there",
        )
    path, _, query = text[len(SCHEME) :].partition("?")
    found: dict[str, str] = {}
    for part in [*filter(None, path.split(";")), *filter(None, query.split("&"))]:
        name, _, value = part.partition("=")
        if name not in {"token", "object", "module-path", "type"} or name in found:
            raise RefusedError(_CODE, f"{name!r:.40} stands twice in the URI, or is not known")
        found[name] = unquote(value)
        if has_hidden(found[name]):
            raise RefusedError(_CODE, f"{name!r:.40} of the URI holds hidden characters")
    module = found.get("module-path") or os.environ.get(MODULE_VARIABLE, "")
    if not found.get("token") or not found.get("object") or not module:
        raise RefusedError(
            _CODE,
            "the URI names no token, no object, or no module",
            hint="pkcs11:token=LABEL;object=LABEL?module-path=/usr/lib/softhsm/libsofthsm2.so, or "
            f"set {MODULE_VARIABLE}",
        )
    return TokenUri(found["token"], found["object"], module)


@dataclass(frozen=True, slots=True)
class TokenSigner:
    """A private key in a token; each signature opens a session of its own."""

    uri: TokenUri
    public_key: PublicKey
    _pin: str

    def sign(self, message: bytes) -> bytes:
        """Sign `message` in the token, and hold the result against the public key.

        Raises:
            RefusedError: `trust.token`; the token refuses, or gives no valid signature.

        """
        with _session(self.uri, self._pin) as (api, session):
            private = _find(api, session, self.uri, private=True)
            if self.public_key.scheme == P384:
                raw = private.sign(hashlib.sha384(message).digest(), mechanism=api.Mechanism.ECDSA)
                signature = encode_dss_signature(
                    int.from_bytes(raw[:_P384_BYTES]), int.from_bytes(raw[_P384_BYTES:])
                )
            else:
                kind = "EDDSA" if self.public_key.scheme == ED25519 else "ML_DSA"
                signature = bytes(private.sign(message, mechanism=api.Mechanism[kind]))
        if not self.public_key.find_valid(signature, message):
            raise RefusedError(_CODE, f"{self.uri} gives a signature that does not verify")
        return signature


def open_token(text: str, pin: bytes) -> TokenSigner:
    """Open a key in a token.

    Raises:
        RefusedError: `trust.token`; no such token or object, wrong PIN, or another scheme.
        FaultError: `host.extra`, the library is not installed.

    """
    uri, word = parse_uri(text), _word(pin)
    with _session(uri, word) as (api, session):
        _find(api, session, uri, private=True)
        key = _public_key(api, _find(api, session, uri, private=False), uri)
    return TokenSigner(uri, key, word)


def new_token_key(text: str, pin: bytes, scheme: str) -> TokenSigner:
    """Make a key pair inside a token, under a label that is free.

    Raises:
        RefusedError: `trust.token`; the label is taken, or the token does not offer the scheme.

    """
    uri, word = parse_uri(text), _word(pin)
    with _session(uri, word) as (api, session):
        if list(session.get_objects({api.Attribute.LABEL: uri.object})):
            raise RefusedError(
                _CODE, f"{uri} exists; a key is never overwritten", hint="choose another object="
            )
        _generate(api, session, uri, scheme)
    return open_token(text, pin)


def destroy_token_key(text: str, pin: bytes) -> None:
    """Destroy a key pair in a token; nothing where there is none. RefusedError `trust.token`."""
    uri = parse_uri(text)
    with _session(uri, _word(pin)) as (api, session):
        for found in list(session.get_objects({api.Attribute.LABEL: uri.object})):
            found.destroy()


def _generate(api: Any, session: Any, uri: TokenUri, scheme: str) -> None:
    kinds = {
        ED25519: "EC_EDWARDS_KEY_PAIR_GEN",
        P384: "EC_KEY_PAIR_GEN",
        MLDSA87: "ML_DSA_KEY_PAIR_GEN",
    }
    if scheme not in kinds:
        raise RefusedError(_CODE, f"no scheme {scheme!r:.40}: {', '.join(kinds)}")
    offered = {getattr(each, "name", "") for each in session.token.slot.get_mechanisms()}
    wanted = {kinds[scheme], "ECDSA_KEY_PAIR_GEN"} if scheme == P384 else {kinds[scheme]}
    if not offered & wanted:
        raise RefusedError(
            _CODE,
            f"token {uri.token!r:.64} does not offer {scheme}",
            hint="use an encrypted key file for this scheme, or a token that offers it",
        )
    keep: dict[Any, Any] = {"store": True, "label": uri.object}
    keep["private_template"] = {api.Attribute.EXTRACTABLE: False, api.Attribute.SENSITIVE: True}
    try:
        if scheme == MLDSA87:
            session.generate_keypair(
                api.KeyType.ML_DSA,
                public_template={api.Attribute.PARAMETER_SET: _MLDSA87_SET},
                **keep,
            )
        elif scheme == P384:
            from pkcs11.util.ec import encode_named_curve_parameters  # noqa: PLC0415 - the extra

            curve = {api.Attribute.EC_PARAMS: encode_named_curve_parameters("secp384r1")}
            session.create_domain_parameters(api.KeyType.EC, curve, local=True).generate_keypair(
                **keep
            )
        else:
            _generate_edwards(api, session, keep)
    except (api.PKCS11Error, AttributeError, KeyError, NotImplementedError) as error:
        raise RefusedError(
            _CODE, f"token {uri.token!r:.64} makes no {scheme} key: {type(error).__name__}"
        ) from error


def _generate_edwards(api: Any, session: Any, keep: dict[Any, Any]) -> None:
    for number, name in enumerate(_EDWARDS):
        curve = {api.Attribute.EC_PARAMS: name}
        try:
            domain = session.create_domain_parameters(api.KeyType.EC_EDWARDS, curve, local=True)
            domain.generate_keypair(mechanism=api.Mechanism.EC_EDWARDS_KEY_PAIR_GEN, **keep)
        except api.PKCS11Error:
            if number + 1 == len(_EDWARDS):
                raise
        else:
            return


def _public_key(api: Any, found: Any, uri: TokenUri) -> PublicKey:
    """Return the public half of an object as this program knows it."""
    kind, key = found.key_type, None
    if kind == api.KeyType.ML_DSA:
        key = PublicKey(MLDSA87, bytes(found[api.Attribute.VALUE]))
    elif kind in {api.KeyType.EC, api.KeyType.EC_EDWARDS}:
        point = _unwrap(bytes(found[api.Attribute.EC_POINT]))
        key = PublicKey(P384 if kind == api.KeyType.EC else ED25519, point)
    if key is None or not key.supported:
        raise RefusedError(
            _CODE, f"{uri} is no key of a scheme known here: {ED25519}, {P384}, {MLDSA87}"
        )
    return key


def _unwrap(value: bytes) -> bytes:
    """Return a point without the OCTET STRING around it; some tokens leave that out."""
    if len(value) > 2 and value[0] == 4 and value[1] == len(value) - 2:  # noqa: PLR2004 - DER
        return value[2:]
    return value


@contextmanager
def _session(uri: TokenUri, pin: str) -> Iterator[tuple[Any, Any]]:
    """Open the token; every error of the library becomes a refusal that says what to look at."""
    try:
        import pkcs11 as api  # noqa: PLC0415 - the extra
    except ModuleNotFoundError as error:
        raise FaultError(
            "host.extra",
            "keys in tokens need python-pkcs11, which is not installed",
            hint="pip install 'airgap[hsm]'",
        ) from error
    try:
        # A login is of the whole process: two threads would log each other out.
        with _ONE_AT_A_TIME:
            token = api.lib(uri.module).get_token(token_label=uri.token)
            with token.open(rw=True, user_pin=pin) as session:
                yield api, session
    except (api.PKCS11Error, RuntimeError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise RefusedError(
            _CODE,
            f"{uri}: {reason:.160} ({type(error).__name__})",
            hint=f"check the PIN file, the label, and the module {uri.module}",
        ) from error


def _find(api: Any, session: Any, uri: TokenUri, *, private: bool) -> Any:
    kind = api.ObjectClass.PRIVATE_KEY if private else api.ObjectClass.PUBLIC_KEY
    wanted = {api.Attribute.CLASS: kind, api.Attribute.LABEL: uri.object}
    found = list(session.get_objects(wanted))
    if len(found) != 1:
        raise RefusedError(
            _CODE,
            f"{uri}: {len(found)} objects of class {kind.name} bear this label, expected one",
            hint="pkcs11-tool --list-objects --login shows what the token holds",
        )
    return found[0]


def _word(pin: bytes) -> str:
    if not pin:
        raise RefusedError(_CODE, "a token needs its PIN", hint="give --pin-file FILE")
    try:
        return pin.decode()
    except UnicodeDecodeError as error:
        raise RefusedError(_CODE, "the PIN is not UTF-8") from error
