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

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, add_signature, find_signers, parse_envelope, sign_statement
from bundle.fields import DigestText, Document, Instant, Sha256Hex, Text
from bundle.keys import Signer, read_limited
from bundle.manifest import first_problem
from bundle.root import RootDocument
from bundle.statement import PAYLOAD_TYPE, STATEMENT_TYPE
from policy.approvals import BREAK_GLASS_PEOPLE, Approval, Approvals, Approver, same_person
from policy.errors import RefusedError
from policy.strict import parse_day
from policy.terms import Digest

CODE = "policy.approval"
OVERRIDE_TYPE: Literal["https://airgap.invalid/override/v1"] = (
    "https://airgap.invalid/override/v1"  # below policy.terms.URI_BASE
)
NOTE_TYPE: Literal["https://airgap.invalid/approval-note/v1"] = (
    "https://airgap.invalid/approval-note/v1"
)
FOLDER = Path("policy") / "approvals"
NOTES = Path("policy") / "approval-notes"
MAX_FILE = 1 << 18
MAX_FILES = 4_096

Day = Annotated[date, BeforeValidator(parse_day), PlainSerializer(date.isoformat, return_type=str)]
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


class _BundleDigest(Document):
    sha256: Sha256Hex


class _Subject(Document):
    name: Literal["META/manifest.json"] = "META/manifest.json"
    digest: _BundleDigest


class OverrideStatement(Document):
    """An in-toto statement about one bundle."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")] = (
        STATEMENT_TYPE
    )
    predicate: Override
    predicate_type: Annotated[
        Literal["https://airgap.invalid/override/v1"], Field(alias="predicateType")
    ] = OVERRIDE_TYPE
    subject: tuple[_Subject]

    def to_bytes(self) -> bytes:
        """The canonical form: what is signed."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude_none=True))


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
    try:
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
    except ValidationError as error:
        raise RefusedError(CODE, f"the approval: {first_problem(error)}") from error


def draft(bundle: Digest, override: Override) -> OverrideStatement:
    """Make the statement of an approval of `bundle`."""
    subject = _Subject(digest=_BundleDigest(sha256=bundle.hex))
    return OverrideStatement(subject=(subject,), predicate=override)


def sign(statement: OverrideStatement, signer: Signer) -> Envelope:
    """Sign an approval as its first approver."""
    return sign_statement(statement.to_bytes(), PAYLOAD_TYPE, signer)


def countersign(envelope: Envelope, signer: Signer) -> Envelope:
    """Sign an approval as a further approver."""
    parse_override(envelope.payload)
    return add_signature(envelope, signer)


def parse_override(payload: bytes) -> OverrideStatement:
    """Read the payload of an approval; RefusedError `policy.approval`."""
    parse_canonical(payload, code=CODE, what="the approval", limit=MAX_FILE)
    try:
        statement = OverrideStatement.model_validate_json(payload)
    except ValidationError as error:
        raise RefusedError(CODE, f"the approval: {first_problem(error)}") from error
    if statement.to_bytes() != payload:
        raise RefusedError(CODE, "the approval writes a field in another form")
    return statement


def verify_approval(envelope: Envelope, root: RootDocument) -> Approval:
    """Return the approval with those people whose signatures hold; there may be none.

    Raises:
        RefusedError: `policy.approval`, `seal.type` or `seal.algorithm`.

    """
    statement = parse_override(envelope.payload)
    override = statement.predicate
    return Approval(
        digest=Digest.of(envelope.payload),
        rules={rule.id: rule.version for rule in override.rules},
        approvers=signers_of(envelope, root, at=override.issued),
        reason=override.reason,
        bundle=Digest("sha256", bytes.fromhex(statement.subject[0].digest.sha256)),
        project=override.project,
        task=override.task,
        issued=override.issued,
        expires=override.expires,
        document=None if override.document is None else Digest.parse(override.document),
        authority=override.authority,
        break_glass=override.break_glass is True,
    )


def signers_of(envelope: Envelope, root: RootDocument, *, at: datetime) -> tuple[Approver, ...]:
    """Return the people enrolled at that time whose signatures hold, each once, in order."""
    keyids = find_signers(envelope, root.public_keys(), payload_type=PAYLOAD_TYPE)
    people = root.people_of(keyids)
    return tuple(
        Approver(who, frozenset(root.people[who].roles))
        for who in sorted(people)
        if root.people[who].is_enrolled(at)
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


def read_folder(folder: Path) -> list[Envelope]:
    """Read every signed file of a folder, signatures not yet verified; none where it is absent."""
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if len(paths) > MAX_FILES:
        raise RefusedError(CODE, f"more than {MAX_FILES} files in {folder}")
    return [read_approval(path) for path in paths]


def read_approval(path: Path) -> Envelope:
    """Read one file, its signatures not yet verified."""
    raw = read_limited(path, MAX_FILE, code=CODE, what="the approval")
    try:
        return parse_envelope(raw, code=CODE)
    except RefusedError as error:
        raise RefusedError(
            error.code,
            f"{path}: {error.message}",
            hint="move what is no signed approval out of this folder",
        ) from error


def write_approval(envelope: Envelope, root: Path, folder: Path = FOLDER) -> Path:
    """Put an approval where `load_approvals` finds it; signatures added later replace the file."""
    name = f"{Digest.of(envelope.payload).hex[:24]}.json"
    path = root / folder / name
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft_path = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with draft_path.open("xb") as file:
            file.write(envelope.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        draft_path.replace(path)
    finally:
        draft_path.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def on_record(root: Path, kind: str, person: str, about: Digest) -> Iterator[None]:
    """Put an act of a signer on record, before and after it, where this tree keeps a log.

    Args:
        root: The tree.
        kind: `admin.approval` or `admin.hold`.
        person: Who signs, as the trust root names the person.
        about: Digest of what was signed.

    """
    if not (root / "audit" / "log").is_dir():
        yield  # a staging tree: nothing is decided there
        return
    # Reading approvals needs no log.
    from airgap.audit import Actor, Event, new_ulid  # noqa: PLC0415
    from airgap.audit.site import open_site_log  # noqa: PLC0415
    from airgap.config import load_site  # noqa: PLC0415

    request, actor = new_ulid(), Actor(person)
    with open_site_log(root, load_site(root)) as log:
        log.append(Event(kind, "intent", req=request, actor=actor, data={"object": about}))
        result = "failed"
        try:
            yield
            result = "complete"
        finally:
            data: dict[str, str | Digest] = {"object": about, "result": result}
            log.append(Event(kind, "outcome", req=request, actor=actor, data=data))


# -- notes on approvals ---------------------------------------------------------------------------


class ApprovalNote(Document):
    """What is said about an approval, and since when."""

    format: Literal["airgap-approval-note/1"] = "airgap-approval-note/1"
    kind: Literal["revocation", "after-review"]
    text: Text
    issued: Instant


class _NoteSubject(Document):
    name: Literal["approval"] = "approval"
    digest: _BundleDigest


class _NoteStatement(Document):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")] = (
        STATEMENT_TYPE
    )
    predicate: ApprovalNote
    predicate_type: Annotated[
        Literal["https://airgap.invalid/approval-note/v1"], Field(alias="predicateType")
    ] = NOTE_TYPE
    subject: tuple[_NoteSubject]

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude_none=True))


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
    parse_override(approval.payload)
    try:
        note = ApprovalNote.model_validate({"kind": kind, "text": text, "issued": issued})
    except ValidationError as error:
        raise RefusedError(CODE, f"the note: {first_problem(error)}") from error
    subject = _NoteSubject(digest=_BundleDigest(sha256=Digest.of(approval.payload).hex))
    payload = _NoteStatement(subject=(subject,), predicate=note).to_bytes()
    return sign_statement(payload, PAYLOAD_TYPE, signer)


def verify_note(envelope: Envelope, root: RootDocument) -> Note:
    """Return a note with those people whose signatures hold; codes as `verify_approval`."""
    parse_canonical(envelope.payload, code=CODE, what="the note", limit=MAX_FILE)
    try:
        statement = _NoteStatement.model_validate_json(envelope.payload)
    except ValidationError as error:
        raise RefusedError(CODE, f"the note: {first_problem(error)}") from error
    if statement.to_bytes() != envelope.payload:
        raise RefusedError(CODE, "the note writes a field in another form")
    note = statement.predicate
    return Note(
        kind=note.kind,
        about=Digest("sha256", bytes.fromhex(statement.subject[0].digest.sha256)),
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
