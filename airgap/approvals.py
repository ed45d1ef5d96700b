"""Signed overrides: DSSE over an in-toto statement, one file each.

Obeys docs/design/policy.md, 7.

Here an approval is drafted, signed and verified; whether it lifts a rule is decided by
`policy.approvals`. Approvers are people of the trust root: two keys of one person are one person,
and a signature by an unknown key is none.

A note is a signed statement about an approval: it takes one back, or it is the review that a
break-glass approval owes. Until that review is signed by somebody who did not sign the approval, it
stays open, expired or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from airgap.signed import CODE, Day, read_folder, signers_of
from bundle.envelope import Envelope, add_signature
from bundle.fields import DigestText, Document, Instant, Text
from bundle.intoto import Kind, Statement
from bundle.keys import Signer
from bundle.root import RootDocument
from policy.approvals import BREAK_GLASS_PEOPLE, Approval, Approvals, Approver, same_person
from policy.terms import URI_BASE, Digest

FOLDER = Path("policy") / "approvals"
NOTES = Path("policy") / "approval-notes"

RuleId = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9]*(-[A-Z0-9]+)*$", max_length=48)]
ProjectId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ApprovedRule(Document):
    """A rule in the version that was read."""

    id: RuleId
    version: Annotated[int, Field(ge=1)]


class Override(Document):
    """What is approved: rules, for one bundle, one project and one task or all, until a day."""

    format: Literal["airgap-override/1"] = "airgap-override/1"
    rules: tuple[ApprovedRule, ...] = Field(min_length=1, max_length=64)
    project: ProjectId
    task: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] | None = None
    reason: Text
    issued: Instant
    expires: Day
    document: DigestText | None = None
    authority: Text | None = None
    break_glass: Literal[True] | None = None


OVERRIDE = Kind(
    Statement[Override],
    f"{URI_BASE}override/v1",
    subject="META/manifest.json",
    code=CODE,
    what="the approval",
)


def override(
    *,
    rules: Mapping[str, int],
    project: str,
    task: str | None,
    reason: str,
    issued: datetime,
    expires: date,
    document: Digest | None,
    authority: str | None,
    break_glass: bool = False,
) -> Override:
    """Word an approval; RefusedError `policy.approval` for what a statement cannot say."""
    with OVERRIDE.worded():
        return Override(
            rules=tuple(ApprovedRule(id=each, version=rules[each]) for each in sorted(rules)),
            project=project,
            task=task,
            reason=reason,
            issued=issued,
            expires=expires,
            document=None if document is None else str(document),
            authority=authority,
            break_glass=True if break_glass else None,
        )


def countersign(envelope: Envelope, signer: Signer) -> Envelope:
    """Sign an approval as a further approver."""
    OVERRIDE.parse(envelope.payload)
    return add_signature(envelope, signer)


def verify_approval(envelope: Envelope, root: RootDocument) -> Approval:
    """Return the approval with those people whose signatures hold; there may be none.

    Raises:
        RefusedError: `policy.approval`, `seal.type` or `seal.algorithm`.

    """
    statement = OVERRIDE.parse(envelope.payload)
    override = statement.predicate
    return Approval(
        digest=Digest.of(envelope.payload),
        rules={rule.id: rule.version for rule in override.rules},
        approvers=signers_of(envelope, root, at=override.issued),
        reason=override.reason,
        bundle=statement.about,
        project=override.project,
        task=override.task,
        issued=override.issued,
        expires=override.expires,
        document=None if override.document is None else Digest.parse(override.document),
        authority=override.authority,
        break_glass=override.break_glass is True,
    )


def load_approvals(
    root: Path, trust: RootDocument, *, known_at: datetime | None = None
) -> Approvals:
    """Read and verify every file of `<root>/policy/approvals`.

    What was taken back after `known_at` still counted then.

    Raises:
        RefusedError: A file is not a signed approval; better loud than silently without effect.

    """
    found = [verify_approval(each, trust) for each in read_folder(root / FOLDER)]
    revoked = {
        each.about
        for each in load_notes(root, trust)
        if each.kind == "revocation" and (known_at is None or each.issued <= known_at)
    }
    return Approvals(tuple(each for each in found if each.digest not in revoked))


# -- notes on approvals ---------------------------------------------------------------------------


class ApprovalNote(Document):
    """What is said about an approval, and since when."""

    format: Literal["airgap-approval-note/1"] = "airgap-approval-note/1"
    kind: Literal["revocation", "after-review"]
    text: Text
    issued: Instant


NOTE = Kind(
    Statement[ApprovalNote],
    f"{URI_BASE}approval-note/v1",
    subject="approval",
    code=CODE,
    what="the note",
)


@dataclass(frozen=True, slots=True)
class Note:
    """A verified note; `about` is the digest of the approval."""

    kind: str
    about: Digest
    text: str
    issued: datetime
    people: tuple[Approver, ...]


@dataclass(frozen=True, slots=True)
class Review:
    """The review that a break-glass approval owes; `note` is None while it is open."""

    approval: Approval
    note: Note | None

    @property
    def is_open(self) -> bool:
        """Whether somebody still has to look at it."""
        return self.note is None


def sign_note(
    approval: Envelope, kind: str, text: str, issued: datetime, signer: Signer
) -> Envelope:
    """Sign a note about an approval; RefusedError `policy.approval` for what it cannot say."""
    OVERRIDE.parse(approval.payload)
    with NOTE.worded():
        note = ApprovalNote.model_validate({"kind": kind, "text": text, "issued": issued})
    return NOTE.sign(NOTE.draft(note, Digest.of(approval.payload)), signer)


def verify_note(envelope: Envelope, root: RootDocument) -> Note:
    """Return a note with those people whose signatures hold; codes as `verify_approval`."""
    statement = NOTE.parse(envelope.payload)
    note = statement.predicate
    return Note(
        kind=note.kind,
        about=statement.about,
        text=note.text,
        issued=note.issued,
        people=signers_of(envelope, root, at=note.issued),
    )


def load_notes(root: Path, trust: RootDocument) -> tuple[Note, ...]:
    """Return the notes that an approver of the trust root signed."""
    found = (verify_note(each, trust) for each in read_folder(root / NOTES))
    return tuple(
        each for each in found if any(trust.people[who.person].approves for who in each.people)
    )


def reviews_of(root: Path, trust: RootDocument) -> tuple[Review, ...]:
    """Return the review that each break-glass approval of two people owes, revoked ones too."""
    notes = [each for each in load_notes(root, trust) if each.kind == "after-review"]
    found = []
    for envelope in read_folder(root / FOLDER):
        approval = verify_approval(envelope, trust)
        if approval.break_glass and len(approval.approvers) >= BREAK_GLASS_PEOPLE:
            signed = {same_person(each.person) for each in approval.approvers}
            apart = [
                note
                for note in notes
                if note.about == approval.digest
                and any(same_person(who.person) not in signed for who in note.people)
            ]
            found.append(Review(approval, min(apart, key=lambda note: note.issued, default=None)))
    return tuple(found)
