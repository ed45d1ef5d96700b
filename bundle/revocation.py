"""The revocation list: keys, people, releases, models, files and wheels that count no more.

A list is signed by the threshold `revocation` of the trust root, travels in `META/trust.json` or
as a file of its own, and only grows: a host takes no list that is older than one it has seen, and
none that drops an entry. FORMAT.md section 18.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, find_signers
from bundle.fields import (
    Count,
    DigestText,
    Document,
    Instant,
    KeyId,
    Name,
    PersonId,
    Sha256Hex,
    Text,
    format_time,
)
from bundle.manifest import FileEntry, Manifest, first_problem
from policy.errors import RefusedError
from policy.terms import Digest

if TYPE_CHECKING:
    from bundle.root import RootDocument

CODE = "trust.revocation"
LIST_TYPE = "application/vnd.airgap.revocations+json"
LIST_LIMIT = 1024 * 1024
REVOCATION = "revocation"
KINDS = ("keys", "people", "bundles", "models", "files", "wheels")


class EpochFloor(Document):
    """All releases of a line with an epoch lower than `below` are revoked."""

    below: Annotated[Count, Field(ge=1)]
    reason: Text


class RevocationDocument(Document):
    """What is signed. Each entry is an identifier and the reason in words.

    `models` are SHA-256 digests of weights as published or as converted; `files` and `wheels` of
    any listed file. `epochs` are by `bundle_id`, and absent where there are none. `next_update` is
    when a newer list is due.
    """

    format: Literal["airgap-revocations/1"] = "airgap-revocations/1"
    version: Annotated[int, Field(ge=1, le=999_999)]
    issued: Instant
    next_update: Instant
    keys: dict[KeyId, Text] = Field(default_factory=dict)
    people: dict[PersonId, Text] = Field(default_factory=dict)
    bundles: dict[DigestText, Text] = Field(default_factory=dict)
    models: dict[Sha256Hex, Text] = Field(default_factory=dict)
    files: dict[Sha256Hex, Text] = Field(default_factory=dict)
    wheels: dict[Sha256Hex, Text] = Field(default_factory=dict)
    epochs: Annotated[dict[Name, EpochFloor] | None, Field(min_length=1)] = None

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))

    def entries(self) -> Mapping[tuple[str, str], str]:
        """Return all entries: (kind, identifier) to reason."""
        return {
            (kind, identifier): reason
            for kind in KINDS
            for identifier, reason in getattr(self, kind).items()
        }


@dataclass(frozen=True, slots=True)
class Revocations:
    """A list that enough people signed, as one root of the chain says."""

    envelope: Envelope
    document: RevocationDocument

    @property
    def version(self) -> int:
        """The version of the list."""
        return self.document.version

    def is_stale(self, now: datetime) -> bool:
        """Tell whether a newer list is due."""
        return now >= self.document.next_update

    def alarm(self, now: datetime) -> str:
        """Say that the list is stale, or nothing."""
        if not self.is_stale(now):
            return ""
        return (
            f"revocation list {self.version} is stale: a newer one was due on "
            f"{format_time(self.document.next_update)}"
        )


def parse_revocations(raw: bytes) -> RevocationDocument:
    """Turn the payload of an envelope into a list; RefusedError `trust.revocation`."""
    parse_canonical(raw, code=CODE, what="the revocation list", limit=LIST_LIMIT)
    try:
        document = RevocationDocument.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError(CODE, f"the revocation list: {first_problem(error)}") from error
    if document.to_bytes() != raw:
        raise RefusedError(CODE, "the revocation list writes a field in another form")
    if not document.issued < document.next_update:
        raise RefusedError(CODE, "the revocation list is due again before it is issued")
    return document


def verify_revocations(envelope: Envelope, roots: Iterable[RootDocument]) -> Revocations:
    """Return the list if the threshold `revocation` of one of `roots` signed it.

    Raises:
        RefusedError: `trust.revocation`; `seal.type` for a document of another type.

    """
    found = "no root to judge it by"
    for root in roots:
        keyids = find_signers(envelope, root.public_keys(), payload_type=LIST_TYPE)
        if not keyids:  # before the payload is parsed: it is nobody's word yet
            found = f"no signature of root {root.version} holds"
            continue
        document = parse_revocations(envelope.payload)
        people = {
            who
            for who in root.people_of(keyids)
            if REVOCATION in root.people[who].roles
            and root.people[who].is_enrolled(document.issued)
        }
        needed = root.thresholds.revocation.people
        if len(people) >= needed:
            return Revocations(envelope, document)
        found = f"{len(people)} of {needed} people with the role `revocation` signed"
    raise RefusedError(
        CODE,
        f"the revocation list does not hold: {found}",
        hint="have it signed by the people with the role `revocation`: airgap revoke sign",
    )


def require_newer(held: Revocations | None, offered: Revocations) -> None:
    """Refuse a list that is older than the held one, its twin, or drops an entry of it.

    Raises:
        RefusedError: `trust.revocation`.

    """
    if held is None:
        return
    if offered.version < held.version:
        raise RefusedError(
            CODE,
            f"revocation list {offered.version} is older than list {held.version} of this host",
            hint="bring the newest list; `airgap trust show` prints the version here",
        )
    if offered.version == held.version and offered.document != held.document:
        raise RefusedError(
            CODE,
            f"there is another revocation list of version {held.version} on this host",
            hint="ask who keeps the list: two of one version must not exist",
        )
    if offered.document.issued < held.document.issued:
        # Whoever was retired since could otherwise date a list before the retirement.
        raise RefusedError(
            CODE,
            f"revocation list {offered.version} is dated {format_time(offered.document.issued)}, "
            f"before list {held.version} of {format_time(held.document.issued)}",
            hint="issue the list again, with the clock set right",
        )
    for line, floor in (held.document.epochs or {}).items():
        kept = (offered.document.epochs or {}).get(line)
        if kept is None or kept.below < floor.below:
            raise RefusedError(
                CODE,
                f"revocation list {offered.version} lets epochs of {line} below {floor.below} "
                f"return, which list {held.version} revokes",
                hint="a revocation is final: issue the list again with every earlier entry",
            )
    dropped = sorted(held.document.entries().keys() - offered.document.entries().keys())
    if dropped:
        kind, identifier = dropped[0]
        raise RefusedError(
            CODE,
            f"revocation list {offered.version} drops {kind} {identifier}, which list "
            f"{held.version} revokes",
            hint="a revocation is final: issue the list again with every earlier entry",
        )


def revoked_signers(
    revocations: Revocations | None, root: RootDocument, keyids: Iterable[str]
) -> Mapping[str, str]:
    """Return which of these keys are revoked, or act for a revoked person, and why."""
    if revocations is None:
        return {}
    document, found = revocations.document, {}
    for keyid in keyids:
        who = root.find_person(keyid)
        reason = document.keys.get(keyid) or document.people.get(who or "")
        if reason:
            found[keyid] = reason
    return found


def require_unrevoked(revocations: Revocations | None, manifest: Manifest, digest: Digest) -> None:
    """Refuse a release that the list names, by digest or epoch, or that holds what it names.

    Raises:
        RefusedError: `trust.revoked`.

    """
    if revocations is None:
        return
    document = revocations.document
    reason = document.bundles.get(str(digest))
    if reason:
        raise _revoked(revocations, f"the release {digest}", reason)
    floor = (document.epochs or {}).get(manifest.bundle_id)
    if floor is not None and manifest.epoch < floor.below:
        what = f"epoch {manifest.epoch} of {manifest.bundle_id}, as all below {floor.below},"
        raise _revoked(revocations, what, floor.reason)
    for entry in manifest.files:
        reason = (
            document.files.get(entry.sha256)
            or (document.wheels.get(entry.sha256) if entry.role == "wheel" else None)
            or next((text for each in _origins(entry) if (text := document.models.get(each))), None)
        )
        if reason:
            raise _revoked(revocations, f"{entry.path!r:.160} in {digest}", reason)


def _origins(entry: FileEntry) -> Iterable[str]:
    """Return the digests by which a model may be revoked: as it is, and what it was made of."""
    yield entry.sha256
    if entry.origin is not None and entry.origin.sha256 is not None:
        yield entry.origin.sha256
    yield from (text.partition(":")[2] for text in entry.derived_from)


def _revoked(revocations: Revocations, what: str, reason: str) -> RefusedError:
    return RefusedError(
        "trust.revoked",
        f"{what} is revoked by list {revocations.version}: {reason:.200}",
        hint="carry another release here; `airgap trust show` names the list",
    )
