"""An approver's statement: in which role she approved which release, and on what condition.

The seal counts people; one payload, signed by all, cannot say who approved as what. So each
approver signs a statement of her own as well, in-toto and DSSE like the seal, bound to the payload
of the seal and kept beside its signatures. A seal that says `attested` counts nobody without one,
and of her roles only those that she named. FORMAT.md section 22.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import MAX_STATEMENTS, Envelope, find_signers, parse_envelope, sign_statement
from bundle.fields import DigestText, Document, Instant, PersonId, Sha256Hex, Text, Token
from bundle.keys import Signer
from bundle.manifest import first_problem
from bundle.root import OFFICES, RootDocument
from policy.errors import RefusedError
from policy.terms import URI_BASE, Digest

STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
APPROVAL_TYPE = f"{URI_BASE}approval/v1"
CODE = "seal.malformed"
APPROVAL_LIMIT = 16_384
_MOST = {"default": MAX_STATEMENTS, "cnsa2": 6}  # a statement has two signatures in `cnsa2`


class _Digest(Document):
    sha256: Sha256Hex


class _Subject(Document):
    name: Literal["META/manifest.json"] = "META/manifest.json"
    digest: _Digest


class Approval(Document):
    """The predicate. `seal` is the SHA-256 of the payload that she signed with the seal."""

    format: Literal["airgap-approval/1"] = "airgap-approval/1"
    person: PersonId
    roles: tuple[Token, ...] = Field(min_length=1, max_length=16)
    seal: DigestText
    report_digest: DigestText
    approved: Instant  # by her own clock
    expires: Instant  # that of the release
    conditions: Text | None = None


class ApprovalStatement(Document):
    """The whole statement; its subject is the bundle digest."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")] = (
        STATEMENT_TYPE
    )
    predicate: Approval
    predicate_type: Annotated[
        Literal["https://airgap.invalid/approval/v1"], Field(alias="predicateType")
    ] = "https://airgap.invalid/approval/v1"
    subject: tuple[_Subject]

    def to_bytes(self) -> bytes:
        """Return the canonical form: the payload that is signed."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude_none=True))


@dataclass(frozen=True, slots=True)
class Approved:
    """What is approved: taken from the seal."""

    payload: bytes
    manifest_sha256: str
    report_digest: str
    expires: datetime


def with_approval(
    envelope: Envelope,
    about: Approved,
    signers: Sequence[Signer],
    *,
    person: str,
    roles: Sequence[str],
    approved: datetime,
    conditions: str = "",
) -> Envelope:
    """Return the envelope with the statement of one more approver.

    Raises:
        RefusedError: `seal.malformed`; a field is not allowed, or there is no room.

    """
    try:
        statement = ApprovalStatement(
            subject=(_Subject(digest=_Digest(sha256=about.manifest_sha256)),),
            predicate=Approval(
                person=person,
                roles=tuple(roles),
                seal=str(Digest.of(about.payload)),
                report_digest=about.report_digest,
                approved=approved.replace(microsecond=0),
                expires=about.expires,
                conditions=conditions.strip() or None,
            ),
        )
    except ValidationError as error:
        raise RefusedError(CODE, f"the approval: {first_problem(error)}") from error
    made = sign_statement(statement.to_bytes(), PAYLOAD_TYPE, *signers).to_bytes()
    if len(made) > APPROVAL_LIMIT or len(envelope.statements) == MAX_STATEMENTS:
        raise RefusedError(CODE, "the envelope has no room for one more approval")
    return envelope.with_statements([*envelope.statements, made])


def have_room(root: RootDocument) -> bool:
    """Tell whether the statements of as many approvers as a seal needs fit into its envelope."""
    return root.thresholds.seal.people <= _MOST[root.profile]


def find_approvals(
    envelope: Envelope, about: Approved, root: RootDocument, revoked: Collection[str]
) -> Mapping[str, Approval]:
    """Return the approvals in a seal that hold, by person. Any other is none, and vetoes nothing.

    One holds when the person that it names signed it with keys of hers that are not revoked, when
    it names exactly this seal, and no role that the root does not give her.
    """
    found: dict[str, Approval] = {}
    for raw in envelope.statements:
        with contextlib.suppress(RefusedError):
            inner = parse_envelope(raw, limit=APPROVAL_LIMIT)
            keyids = find_signers(inner, root.public_keys(), payload_type=PAYLOAD_TYPE)
            signed = root.people_of(keyid for keyid in keyids if keyid not in revoked)
            if not signed:  # before the payload is parsed: it is nobody's word yet
                continue
            statement = parse_approval(inner.payload)
            approval = statement.predicate
            person = root.people.get(approval.person)
            if (
                person is not None
                and approval.person in signed
                and set(approval.roles) <= set(person.roles) - OFFICES
                and approval.seal == str(Digest.of(about.payload))
                and approval.report_digest == about.report_digest
                and approval.expires == about.expires
                and statement.subject[0].digest.sha256 == about.manifest_sha256
            ):
                found.setdefault(approval.person, approval)
    return found


def read_approvals(envelope: Envelope) -> tuple[Approval, ...]:
    """Return what the statements of a seal say; nobody's word on it is taken here."""
    found: list[Approval] = []
    for raw in envelope.statements:
        with contextlib.suppress(RefusedError):
            inner = parse_envelope(raw, limit=APPROVAL_LIMIT)
            found.append(parse_approval(inner.payload).predicate)
    return tuple(sorted(found, key=lambda each: each.person))


def parse_approval(raw: bytes) -> ApprovalStatement:
    """Turn an untrusted payload into an approval; RefusedError `seal.malformed`."""
    parse_canonical(raw, code=CODE, what="the approval", limit=APPROVAL_LIMIT)
    try:
        statement = ApprovalStatement.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError(CODE, f"the approval: {first_problem(error)}") from error
    if statement.to_bytes() != raw:
        raise RefusedError(CODE, "the approval writes a field in another form")
    return statement
