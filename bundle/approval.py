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
from typing import Literal

from pydantic import Field

from bundle.envelope import MAX_STATEMENTS, Envelope, find_signers, parse_envelope
from bundle.fields import DigestText, Document, Instant, PersonId, Text, Token
from bundle.intoto import PAYLOAD_TYPE, Kind, Statement
from bundle.keys import Signer
from bundle.root import OFFICES, RootDocument
from policy.errors import RefusedError
from policy.terms import URI_BASE, Digest

CODE = "seal.malformed"
APPROVAL_LIMIT = 16_384
_MOST = {"default": MAX_STATEMENTS, "cnsa2": 6}  # a statement has two signatures in `cnsa2`


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


APPROVAL = Kind(
    Statement[Approval],
    f"{URI_BASE}approval/v1",
    subject="META/manifest.json",
    code=CODE,
    what="the approval",
    limit=APPROVAL_LIMIT,
)


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
    with APPROVAL.worded():
        predicate = Approval(
            person=person,
            roles=tuple(roles),
            seal=str(Digest.of(about.payload)),
            report_digest=about.report_digest,
            approved=approved.replace(microsecond=0),
            expires=about.expires,
            conditions=conditions.strip() or None,
        )
    manifest = Digest("sha256", bytes.fromhex(about.manifest_sha256))
    made = APPROVAL.sign(APPROVAL.draft(predicate, manifest), *signers).to_bytes()
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
            statement = APPROVAL.parse(inner.payload)
            approval = statement.predicate
            person = root.people.get(approval.person)
            if (
                person is not None
                and approval.person in signed
                and set(approval.roles) <= set(person.roles) - OFFICES
                and approval.seal == str(Digest.of(about.payload))
                and approval.report_digest == about.report_digest
                and approval.expires == about.expires
                and statement.about.hex == about.manifest_sha256
            ):
                found.setdefault(approval.person, approval)
    return found


def read_approvals(envelope: Envelope) -> tuple[Approval, ...]:
    """Return what the statements of a seal say; nobody's word on it is taken here."""
    found: list[Approval] = []
    for raw in envelope.statements:
        with contextlib.suppress(RefusedError):
            inner = parse_envelope(raw, limit=APPROVAL_LIMIT)
            found.append(APPROVAL.parse(inner.payload).predicate)
    return tuple(sorted(found, key=lambda each: each.person))
