"""Signed overrides: DSSE over an in-toto statement, one file each.

Obeys docs/design/policy.md, 7.

Here an approval is drafted, signed and verified; whether it lifts a rule is decided by
`policy.approvals`. Approvers are people of the trust root: two keys of one person are one person,
and a signature by an unknown key is none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, add_signature, find_signers, parse_envelope, sign_statement
from bundle.fields import DigestText, Document, Instant, Sha256Hex, Text
from bundle.keys import Signer, read_limited
from bundle.manifest import first_problem
from bundle.statement import PAYLOAD_TYPE, STATEMENT_TYPE
from bundle.trust import RootDocument
from policy.approvals import Approval, Approvals, Approver
from policy.errors import RefusedError
from policy.strict import parse_day
from policy.terms import Digest

CODE = "policy.approval"
OVERRIDE_TYPE: Literal["https://airgap.invalid/override/v1"] = (
    "https://airgap.invalid/override/v1"  # below policy.terms.URI_BASE
)
FOLDER = Path("policy") / "approvals"
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
    keyids = find_signers(envelope, root.public_keys(), payload_type=PAYLOAD_TYPE)
    people = {root.find_person(keyid) for keyid in keyids} - {None}
    return Approval(
        digest=Digest.of(envelope.payload),
        rules={rule.id: rule.version for rule in override.rules},
        approvers=tuple(
            Approver(who, frozenset(root.people[who].roles))
            for who in sorted(each for each in people if each is not None)
            if root.people[who].is_enrolled(override.issued)
        ),
        reason=override.reason,
        bundle=Digest("sha256", bytes.fromhex(statement.subject[0].digest.sha256)),
        project=override.project,
        task=override.task,
        issued=override.issued,
        expires=override.expires,
        document=None if override.document is None else Digest.parse(override.document),
        authority=override.authority,
    )


def load_approvals(root: Path, trust: RootDocument) -> Approvals:
    """Read and verify every file of `<root>/policy/approvals`.

    Raises:
        RefusedError: A file is not a signed approval; better loud than silently without effect.

    """
    folder = root / FOLDER
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if len(paths) > MAX_FILES:
        raise RefusedError(CODE, f"more than {MAX_FILES} approvals in {folder}")
    return Approvals(tuple(verify_approval(read_approval(path), trust) for path in paths))


def read_approval(path: Path) -> Envelope:
    """Read one file, its signatures not yet verified."""
    raw = read_limited(path, MAX_FILE, code=CODE, what="the approval")
    return parse_envelope(raw, code=CODE)


def write_approval(envelope: Envelope, root: Path) -> Path:
    """Put an approval where `load_approvals` finds it; signatures added later replace the file."""
    name = f"{Digest.of(envelope.payload).hex[:24]}.json"
    path = root / FOLDER / name
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
