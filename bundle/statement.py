"""The seal: an in-toto Statement over the manifest and the body, and the people who signed it.

Decides whether enough distinct people, none of them the builder, approved a release, and whether
the person who claims to have built it signed too; FORMAT.md section 10.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from bundle import intoto
from bundle.approval import Approval, Approved, find_approvals
from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import ENVELOPE_SIZE, Envelope, find_signers
from bundle.fields import (
    Count,
    DigestText,
    Document,
    Instant,
    Name,
    PersonId,
    Sha256Hex,
    Sha384Hex,
    format_time,
)
from bundle.manifest import REPORT, Manifest, Profile, canonical, first_problem
from bundle.revocation import Revocations, revoked_signers
from bundle.root import BUILDER, RootDocument
from policy.errors import RefusedError
from policy.terms import URI_BASE, Digest
from policy.wording import counted

PAYLOAD_TYPE = intoto.PAYLOAD_TYPE
SEAL_TYPE = f"{URI_BASE}seal/v1"
SEAL_FORMAT: Literal["airgap-seal/1"] = "airgap-seal/1"
PAYLOAD_LIMIT = ENVELOPE_SIZE // 2


class ManifestDigest(Document):
    """Digest set of the first subject; SHA-384 too, and only, in the profile `cnsa2`."""

    sha256: Sha256Hex
    sha384: Sha384Hex | None = None


class BodyDigest(Document):
    """Digest set of the second subject: the root of the chunk tree, which no file hash equals."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    rfc6962_sha256: Annotated[Sha256Hex | None, Field(alias="rfc6962-sha256")] = None
    rfc6962_sha384: Annotated[Sha384Hex | None, Field(alias="rfc6962-sha384")] = None


class ManifestSubject(Document):
    """The canonical manifest."""

    name: Literal["META/manifest.json"] = "META/manifest.json"
    digest: ManifestDigest


class BodySubject(Document):
    """The body of the archive."""

    name: Literal["body"] = "body"
    digest: BodyDigest


class Seal(Document):
    """The predicate: what approvers must see without the manifest, and who built the release."""

    format: Literal["airgap-seal/1"] = SEAL_FORMAT
    profile: Profile
    bundle_id: Name
    epoch: Count
    created: Instant
    not_before: Instant
    expires: Instant
    body_size: Count
    builder: PersonId
    approvals: Literal["attested"] | None = None  # an approver counts with her own statement only
    policy_pack_digests: tuple[DigestText, ...] = ()
    report_digest: DigestText


class SealStatement(Document):
    """The whole statement."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")] = (
        intoto.STATEMENT_TYPE
    )
    predicate: Seal
    predicate_type: Annotated[str, Field(alias="predicateType")] = SEAL_TYPE
    subject: tuple[ManifestSubject, BodySubject]

    def to_bytes(self) -> bytes:
        """Return the canonical form: the payload that is signed."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude_none=True))


@dataclass(frozen=True, slots=True)
class VerifiedSeal:
    """A seal that holds. `approvers` are person ids, the builder not among them."""

    statement: SealStatement
    approvers: tuple[str, ...]
    builder: str
    keyids: tuple[str, ...]
    approvals: tuple[Approval, ...] = ()  # of approvers who counted, by person


def seal_statement(
    manifest: Manifest,
    *,
    builder: str,
    policy_pack_digests: Sequence[Digest] = (),
    attested: bool = False,
) -> SealStatement:
    """Return the statement that seals `manifest`; ValueError when it lists no report.

    With `attested` each approver has to say in a statement of her own in which role she approves.
    """
    report = manifest.find(REPORT)
    if report is None:
        raise ValueError(f"the manifest lists no {REPORT}")
    return SealStatement(
        subject=(
            ManifestSubject(digest=_manifest_digest(canonical(manifest), manifest.profile)),
            BodySubject(
                digest=BodyDigest(rfc6962_sha384=manifest.body.root)
                if manifest.profile == "cnsa2"
                else BodyDigest(rfc6962_sha256=manifest.body.root)
            ),
        ),
        predicate=Seal(
            profile=manifest.profile,
            bundle_id=manifest.bundle_id,
            epoch=manifest.epoch,
            created=manifest.created,
            not_before=manifest.not_before,
            expires=manifest.expires,
            body_size=manifest.body.size,
            builder=builder,
            approvals="attested" if attested else None,
            policy_pack_digests=tuple(str(digest) for digest in policy_pack_digests),
            report_digest=str(report.checked),
        ),
    )


def parse_statement(raw: bytes) -> SealStatement:
    """Turn a payload into a seal statement.

    Raises:
        RefusedError: `seal.malformed`; `seal.type`, another predicate type.

    """
    value = parse_canonical(raw, code="seal.malformed", what="the statement", limit=PAYLOAD_LIMIT)
    _require_type(value)
    try:
        statement = SealStatement.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError("seal.malformed", f"the statement: {first_problem(error)}") from error
    if statement.to_bytes() != raw:
        raise RefusedError("seal.malformed", "the statement writes a field in another form")
    return statement


def verify_seal(
    envelope: Envelope, root: RootDocument, revocations: Revocations | None = None
) -> VerifiedSeal:
    """Return the statement if the builder and enough other people signed it.

    A person counts when enrolled at the time of `created`, with the role of an approver, and when
    she is not the builder. The threshold counts people, never keys; in the profile `cnsa2` both of
    a person's signatures must hold.

    Args:
        envelope: Parsed and untrusted.
        root: The newest root document of this host.
        revocations: The newest list of this host. What a revoked key signed counts for nothing.

    Raises:
        RefusedError: `seal.type`, `seal.algorithm`, `seal.malformed`, `seal.profile`,
            `seal.threshold`, `seal.people`, `seal.role`; `seal.revoked`, it would hold but for a
            revoked key or person.

    """
    keyids = find_signers(envelope, root.public_keys(), payload_type=PAYLOAD_TYPE)
    revoked = revoked_signers(revocations, root, keyids)
    try:
        return _judge(envelope, root, tuple(k for k in keyids if k not in revoked), revoked)
    except RefusedError as error:
        if not revoked or error.code not in {"seal.threshold", "seal.people", "seal.role"}:
            raise
        keyid, reason = min(revoked.items())
        raise RefusedError(
            "seal.revoked",
            f"{len(revoked)} of the keys that signed are revoked, and without them "
            f"{error.message}; key {keyid} of {root.find_person(keyid)}: {reason:.160}",
            hint="have the release signed again by people who are not revoked",
        ) from error


def approved_by(statement: SealStatement, payload: bytes) -> Approved:
    """Return what an approval of this seal is about; `payload` is the statement as it stands."""
    return Approved(
        payload,
        statement.subject[0].digest.sha256,
        statement.predicate.report_digest,
        statement.predicate.expires,
    )


def _judge(
    envelope: Envelope, root: RootDocument, keyids: tuple[str, ...], revoked: Collection[str]
) -> VerifiedSeal:
    """Count the people of keys whose signatures hold."""
    needed = root.thresholds.seal.people
    if not keyids:  # before the payload is parsed: it is nobody's word yet
        raise _too_few(0, needed, envelope)
    statement = parse_statement(envelope.payload)
    seal = statement.predicate
    if seal.profile != root.profile:
        raise RefusedError(
            "seal.profile",
            f"this host demands profile {root.profile}, the seal has {seal.profile}",
        )
    counts = root.count_signatures(keyids)
    approving = {who: n for who, n in counts.items() if _approves(root, who, seal.created)}
    approvals = find_approvals(envelope, approved_by(statement, envelope.payload), root, revoked)
    if seal.approvals is not None:
        approving = {who: n for who, n in approving.items() if who in approvals}
    signatures = sum(approving.values())
    if signatures < needed:
        others = sorted({who for k in keyids if (who := root.find_person(k)) is not None})
        raise _too_few(signatures, needed, envelope, others=others, seal=seal, said=approvals)
    people = set(approving)
    approvers = people - {seal.builder}
    if len(approvers) < needed:
        raise RefusedError(
            "seal.people",
            f"{signatures} valid signatures, but of {len(approvers)} of {needed} required "
            f"people beside the builder {seal.builder}: {', '.join(sorted(approvers)) or 'nobody'}",
            hint="another approver must sign: one person counts once, the builder never",
        )
    roles = {who: root.people[who].roles for who in approvers}
    if seal.approvals is not None:
        roles = {who: approvals[who].roles for who in approvers}
    _require_roles(root, roles, keyids, seal)
    said = tuple(approvals[who] for who in sorted(approvers) if who in approvals)
    return VerifiedSeal(statement, tuple(sorted(approvers)), seal.builder, keyids, said)


def require_matches(statement: SealStatement, manifest: Manifest, raw: bytes) -> None:
    """Check that the seal is that of this manifest; `raw` is the manifest as it stands.

    Raises:
        RefusedError: `seal.subject`.

    """
    require_subject(statement, raw)
    wanted = seal_statement(
        manifest,
        builder=statement.predicate.builder,
        policy_pack_digests=[Digest.parse(d) for d in statement.predicate.policy_pack_digests],
        attested=statement.predicate.approvals is not None,
    )
    if wanted != statement:
        raise RefusedError("seal.subject", "the seal and the manifest state different facts")


def require_subject(statement: SealStatement, raw: bytes) -> None:
    """Check that the seal names these bytes of a manifest; RefusedError `seal.subject`."""
    named = statement.subject[0].digest
    if _manifest_digest(raw, statement.predicate.profile) != named:
        raise RefusedError(
            "seal.subject",
            f"the seal is that of manifest {named.sha256}, the bundle carries "
            f"{Digest.of(raw).hex}, or the seal lacks a digest of its profile",
        )


def _manifest_digest(raw: bytes, profile: Profile) -> ManifestDigest:
    return ManifestDigest(
        sha256=Digest.of(raw).hex,
        sha384=Digest.of(raw, "sha384").hex if profile == "cnsa2" else None,
    )


def _approves(root: RootDocument, who: str, at: datetime) -> bool:
    person = root.people[who]
    return person.approves and person.is_enrolled(at)


def _require_roles(
    root: RootDocument, roles: Mapping[str, Sequence[str]], keyids: Sequence[str], seal: Seal
) -> None:
    held = {role for each in roles.values() for role in each}
    missing = sorted(set(root.thresholds.seal.required_roles) - held)
    if missing:
        raise RefusedError(
            "seal.role",
            f"no signature of a person who approved in the role {', '.join(missing)}",
            hint="have such a person sign; `airgap trust show` lists people and roles",
        )
    builder = root.people.get(seal.builder)
    if (
        builder is None
        or BUILDER not in builder.roles
        or not builder.is_enrolled(seal.created)
        or seal.builder not in root.people_of(keyids)
    ):
        raise RefusedError(
            "seal.role",
            f"{seal.builder} is named as the builder, but no enrolled builder's key of that "
            "person signed",
            hint="`airgap trust show` lists who may build",
        )


def _require_type(value: Any) -> None:
    if not isinstance(value, dict):
        raise RefusedError("seal.malformed", "the statement is not a JSON object")
    found = value.get("predicateType")
    if value.get("_type") != intoto.STATEMENT_TYPE or found != SEAL_TYPE:
        raise RefusedError("seal.type", f"expected predicate type {SEAL_TYPE}, found {found!r:.80}")


def _too_few(
    found: int,
    needed: int,
    envelope: Envelope,
    *,
    others: Sequence[str] = (),
    seal: Seal | None = None,
    said: Collection[str] = (),
) -> RefusedError:
    seen = f"{counted(len(envelope.signatures), 'signature')} in the envelope"
    if seal is not None:
        seen += (
            f"; signed by {', '.join(others)}, judged as enrolled at {format_time(seal.created)}"
        )
        silent = [who for who in others if who not in said and who != seal.builder]
        if seal.approvals is not None and silent:
            seen += f"; without a statement of approval that holds: {', '.join(silent)}"
    return RefusedError(
        "seal.threshold",
        f"{found} of {needed} required approvers' signatures hold ({seen})",
        hint="compare key ids, roles and dates with `airgap trust show`; sign it on the staging "
        "host",
    )
