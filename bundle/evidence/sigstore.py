"""The one adapter of sigstore-python: bundles verified offline under a pinned trusted root.

Decides whether a Sigstore bundle holds: certificate, transparency log or timestamp, signature, and
exactly one identity and issuer. The library compares no subjects, so it returns what was signed and
the caller compares. Shape is checked here first: one log entry, one kind of content, one signature.
The trusted root is always given; the library's own, and its update over the network, are never
used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bundle.scan.strict import parse_object
from policy.errors import FaultError, RefusedError

BUNDLE_LIMIT = 8 * 1024 * 1024
CODE = "evidence.signature"


@dataclass(frozen=True, slots=True)
class Signed:
    """What a bundle proves: who signed, and a DSSE payload of that type (None for an artifact)."""

    identity: str
    issuer: str
    payload_type: str | None = None
    payload: bytes | None = None


def verify_attestation(raw: bytes, trusted_root: str, *, identity: str, issuer: str) -> Signed:
    """Verify a bundle around a DSSE envelope and return its payload.

    Raises:
        RefusedError: `evidence.signature`, `evidence.malformed`.
        FaultError: `host.extra`; sigstore-python is not installed here.

    """
    _require_shape(raw, "dsseEnvelope")
    with _foreign() as library:
        bundle, verifier, rule = library.prepare(raw, trusted_root, identity, issuer)
        kind, payload = verifier.verify_dsse(bundle, rule)
    return Signed(identity, issuer, str(kind), bytes(payload))


def verify_artifact(
    raw: bytes, trusted_root: str, sha256: str, *, identity: str, issuer: str
) -> Signed:
    """Verify a bundle over the artifact with that SHA-256; errors as above."""
    _require_shape(raw, "messageSignature")
    with _foreign() as library:
        bundle, verifier, rule = library.prepare(raw, trusted_root, identity, issuer)
        verifier.verify_artifact(library.hashed(sha256), bundle, rule)
    return Signed(identity, issuer)


class _Library:
    """The names of sigstore-python that are used; importing them costs a second."""

    def __init__(self) -> None:
        from sigstore.hashes import Hashed  # noqa: PLC0415
        from sigstore.models import Bundle, TrustedRoot  # noqa: PLC0415
        from sigstore.verify import Verifier, policy  # noqa: PLC0415
        from sigstore_models.common.v1 import HashAlgorithm  # noqa: PLC0415

        self._hashed, self._bundle, self._root = Hashed, Bundle, TrustedRoot
        self._verifier, self._policy, self._algorithm = Verifier, policy, HashAlgorithm

    def prepare(self, raw: bytes, root: str, identity: str, issuer: str) -> tuple[Any, Any, Any]:
        from tempfile import NamedTemporaryFile  # noqa: PLC0415

        with NamedTemporaryFile("w", suffix=".json") as file:  # it takes a path and nothing else
            file.write(root)
            file.flush()
            trusted = self._root.from_file(file.name)
        return (
            self._bundle.from_json(raw),
            self._verifier(trusted_root=trusted),
            self._policy.Identity(identity=identity, issuer=issuer),
        )

    def hashed(self, sha256: str) -> Any:
        return self._hashed(digest=bytes.fromhex(sha256), algorithm=self._algorithm.SHA2_256)


@contextlib.contextmanager
def _foreign() -> Iterator[_Library]:
    """Turn whatever the library raises into a refusal: it leaks errors of many kinds."""
    try:
        library = _Library()
    except ImportError as error:
        raise FaultError(
            "host.extra",
            f"Sigstore evidence needs sigstore-python, which is not installed: {error!s:.80}",
            hint="verify it on a machine with the extra `staging`; the other checks need nothing",
        ) from error
    silenced = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield library
    except (RefusedError, FaultError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise RefusedError(
            CODE,
            f"the Sigstore bundle does not hold: {text:.200}",
            hint="ask the publisher for the bundle again; check that the trusted root is the one "
            "that was in force when it was signed",
        ) from error
    finally:
        logging.disable(silenced)


def _require_shape(raw: bytes, content: str) -> None:
    value = parse_object(
        memoryview(raw), code="evidence.malformed", what="the Sigstore bundle", limit=BUNDLE_LIMIT
    )
    found = [name for name in ("dsseEnvelope", "messageSignature") if value.get(name) is not None]
    material = value.get("verificationMaterial")
    entries = material.get("tlogEntries") if isinstance(material, dict) else None
    problem = ""
    if found != [content]:
        problem = f"it holds {' and '.join(found) or 'no content'}, not exactly a {content}"
    elif not isinstance(entries, list) or len(entries) != 1:
        problem = "it has not exactly one entry of a transparency log"
    elif content == "dsseEnvelope":
        envelope = value[content]
        signatures = envelope.get("signatures") if isinstance(envelope, dict) else None
        if not isinstance(signatures, list) or len(signatures) != 1:
            problem = "its envelope has not exactly one signature"
    if problem:
        raise RefusedError("evidence.malformed", f"the Sigstore bundle: {problem}")
