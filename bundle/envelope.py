"""DSSE envelopes, read strictly and verified key by key; FORMAT.md section 8.

The pre-authentication encoding and the schemes need few lines on top of `cryptography`.
securesystemslib counts key ids instead of keys, stops at the threshold and lets foreign exceptions
out on bad input: a wrapper would be longer than this module and would still have to do all of it.
It is the second implementation in the tests instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bundle.canonical import canonical_json, parse_canonical
from bundle.keys import SCHEMES, PublicKey, Signer, as_signers, decode_base64, encode_base64
from policy.errors import RefusedError

ENVELOPE_SIZE = 131_072
MAX_SIGNATURES = 64
MAX_SIGNATURE = 8192
MAX_STATEMENTS = 16
_KEYID = 64


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature, not yet verified; `keyid` says which key to try."""

    keyid: str
    sig: bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A parsed envelope. Nothing in it is trusted; signatures are ordered by key id, each once.

    `statements` are what people said of the payload beside signing it (`bundle.approval`), each an
    envelope of its own in its canonical form; only a seal has them.
    """

    payload: bytes
    payload_type: str
    signatures: tuple[Signature, ...]
    statements: tuple[bytes, ...] = ()

    def with_statements(self, statements: Iterable[bytes]) -> Envelope:
        """Return the envelope with these statements, in their order, each once."""
        return replace(self, statements=tuple(sorted(set(statements))))

    def to_bytes(self) -> bytes:
        """Return the canonical JSON form."""
        document: dict[str, object] = {
            "payload": encode_base64(self.payload),
            "payloadType": self.payload_type,
            "signatures": [
                {"keyid": item.keyid, "sig": encode_base64(item.sig)} for item in self.signatures
            ],
        }
        if self.statements:
            document["statements"] = [encode_base64(each) for each in self.statements]
        return canonical_json(document)

    def to_padded(self) -> bytes:
        """Return the form inside a bundle: 131,072 bytes, JSON and then spaces.

        Raises:
            RefusedError: `seal.malformed`; payload and signatures do not fit.

        """
        raw = self.to_bytes()
        if len(raw) > ENVELOPE_SIZE:
            raise RefusedError(
                "seal.malformed", f"the envelope has {len(raw):,} bytes of {ENVELOPE_SIZE:,}"
            )
        return raw.ljust(ENVELOPE_SIZE, b" ")


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the pre-authentication encoding of DSSE v1: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign_statement(
    payload: bytes, payload_type: str, *signers: Signer | Sequence[Signer]
) -> Envelope:
    """Return a new envelope with one signature a signer."""
    return add_signature(Envelope(payload, payload_type, ()), *signers)


def add_signature(envelope: Envelope, *signers: Signer | Sequence[Signer]) -> Envelope:
    """Return the envelope with one more signature of each signer.

    A person of the profile `cnsa2` signs with two keys: both in a sequence, or one after the other.

    Raises:
        RefusedError: `seal.malformed`; one of these keys has signed already.

    """
    message = pae(envelope.payload_type, envelope.payload)
    signed = {item.keyid: item for item in envelope.signatures}
    for signer in (each for given in signers for each in as_signers(given)):
        keyid = signer.public_key.keyid
        if keyid in signed:
            raise RefusedError("seal.malformed", f"key {keyid} has signed this already")
        signed[keyid] = Signature(keyid, signer.sign(message))
    ordered = tuple(signed[keyid] for keyid in sorted(signed))
    return replace(envelope, signatures=ordered)


def parse_envelope(
    raw: bytes, *, code: str = "seal.malformed", limit: int = ENVELOPE_SIZE
) -> Envelope:
    """Turn untrusted bytes, padded with spaces or not, into an envelope.

    Raises:
        RefusedError: `code`; not canonical JSON of exactly this shape, base64 with a second form,
            signatures unordered or one key twice.

    """
    return _parse(raw, code, limit, {"payload", "payloadType", "signatures"})


def parse_seal(raw: bytes) -> Envelope:
    """Turn the untrusted envelope of a bundle, which may hold statements, into one.

    Raises:
        RefusedError: `seal.malformed`, as `parse_envelope`; statements unordered, twice, too many.

    """
    fields = {"payload", "payloadType", "signatures", "statements"}
    return _parse(raw, "seal.malformed", ENVELOPE_SIZE, fields)


def _parse(raw: bytes, code: str, limit: int, fields: set[str]) -> Envelope:
    value = parse_canonical(raw.rstrip(b" "), code=code, what="the envelope", limit=limit)
    try:
        return _envelope(value, fields)
    except (ValueError, TypeError, KeyError) as error:
        raise RefusedError(code, f"the envelope is malformed: {error!s:.120}") from error


def find_signers(
    envelope: Envelope, keys: Mapping[str, PublicKey], *, payload_type: str
) -> tuple[str, ...]:
    """Return the key ids of all signatures that verify. An unknown key or a bad signature is none.

    Args:
        envelope: Parsed and untrusted.
        keys: Trusted keys by key id.
        payload_type: The only media type that the caller is ready to parse.

    Raises:
        RefusedError: `seal.type`, another payload type; `seal.algorithm`, a signature names a
            trusted key of a scheme that this program does not verify.

    """
    if envelope.payload_type != payload_type:
        raise RefusedError(
            "seal.type",
            f"expected payload type {payload_type}, found {envelope.payload_type!r:.80}",
        )
    message = pae(payload_type, envelope.payload)
    valid: list[str] = []
    for item in envelope.signatures:
        key = keys.get(item.keyid)
        if key is None:
            continue
        if not key.supported:
            raise RefusedError(
                "seal.algorithm",
                f"key {item.keyid} has scheme {key.scheme!r:.40} and {len(key.public)} bytes, "
                f"which is none of {', '.join(SCHEMES)}",
            )
        # One bad signature must not veto enough good ones: anyone can append a bad one.
        if key.find_valid(item.sig, message):
            valid.append(item.keyid)
    return tuple(valid)


def _envelope(value: Any, fields: set[str]) -> Envelope:
    given = set(value) if isinstance(value, dict) else set()
    if given not in (fields, fields - {"statements"}):
        raise ValueError("expected payload, payloadType and signatures, and no other field")
    payload_type, entries = value["payloadType"], value["signatures"]
    if not isinstance(payload_type, str) or not isinstance(entries, list):
        raise TypeError("payloadType is text and signatures a list")
    if len(entries) > MAX_SIGNATURES:
        raise ValueError(f"more than {MAX_SIGNATURES} signatures")
    signatures = tuple(_signature(entry) for entry in entries)
    keyids = [item.keyid for item in signatures]
    if keyids != sorted(set(keyids)):
        raise ValueError("signatures are not ordered by key id, or one key stands twice")
    statements = _statements(value["statements"]) if "statements" in given else ()
    return Envelope(_base64(value["payload"]), payload_type, signatures, statements)


def _statements(entries: Any) -> tuple[bytes, ...]:
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_STATEMENTS:
        raise ValueError(f"statements are a list of 1 to {MAX_STATEMENTS}")
    found = [_base64(entry) for entry in entries]
    if found != sorted(set(found)):
        raise ValueError("statements are not ordered, or one stands twice")
    return tuple(found)


def _signature(entry: Any) -> Signature:
    if not isinstance(entry, dict) or entry.keys() != {"keyid", "sig"}:
        raise ValueError("a signature has keyid and sig, and no other field")
    keyid = entry["keyid"]
    if not isinstance(keyid, str) or len(keyid) != _KEYID or set(keyid) - set("0123456789abcdef"):
        raise ValueError("a key id is 64 hexadecimal digits")
    sig = _base64(entry["sig"])
    if not 1 <= len(sig) <= MAX_SIGNATURE:
        raise ValueError("a signature has no bytes, or too many")
    return Signature(keyid, sig)


def _base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError("base64 is text")
    return decode_base64(value)
