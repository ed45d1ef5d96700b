"""Signed adjudications: whether two names that look alike mean one party, for one edition.

Obeys docs/design/policy.md, 8. A person with the role `research_security` signs; the answer counts
for that edition of that list until a day, and is not asked for again before then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError

from airgap.approvals import Day, read_folder, signers_of
from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, sign_statement
from bundle.fields import Document, Instant, Sha256Hex, Text
from bundle.keys import Signer
from bundle.manifest import first_problem
from bundle.root import RootDocument
from bundle.statement import PAYLOAD_TYPE, STATEMENT_TYPE
from policy.errors import RefusedError
from policy.lineage import Ruling
from policy.snapshots import normal_name
from policy.terms import Digest

CODE = "policy.adjudication"
ROLE = "research_security"
MAX_DAYS = 400
FOLDER = Path("policy") / "adjudications"
MAX_FILE = 1 << 18
ADJUDICATION_TYPE: Literal["https://airgap.invalid/adjudication/v1"] = (
    "https://airgap.invalid/adjudication/v1"  # below policy.terms.URI_BASE
)


class Adjudication(Document):
    """The question, the answer, the reason, and how long it counts."""

    format: Literal["airgap-adjudication/1"] = "airgap-adjudication/1"
    name: Text
    list_id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    edition: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,31}$")]
    against: Text
    decision: Literal["same", "not_same"]
    reason: Text
    issued: Instant
    expires: Day


class _Digest(Document):
    sha256: Sha256Hex


class _Subject(Document):
    name: Literal["question"] = "question"
    digest: _Digest


class _Statement(Document):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")] = (
        STATEMENT_TYPE
    )
    predicate: Adjudication
    predicate_type: Annotated[
        Literal["https://airgap.invalid/adjudication/v1"], Field(alias="predicateType")
    ] = ADJUDICATION_TYPE
    subject: tuple[_Subject]

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude_none=True))


def adjudication(
    *,
    name: str,
    list_id: str,
    edition: str,
    against: str,
    same: bool,
    reason: str,
    issued: datetime,
    expires: date,
) -> Adjudication:
    """Word an adjudication; RefusedError `policy.adjudication` for what a statement cannot say."""
    try:
        made = Adjudication(
            name=name,
            list_id=list_id,
            edition=edition,
            against=against,
            decision="same" if same else "not_same",
            reason=reason,
            issued=issued.replace(microsecond=0),
            expires=expires,
        )
    except ValidationError as error:
        raise RefusedError(CODE, f"the adjudication: {first_problem(error)}") from error
    return _checked(made)


def sign(about: Adjudication, signer: Signer) -> Envelope:
    """Sign an adjudication."""
    subject = _Subject(digest=_Digest(sha256=_question(about).hex))
    statement = _Statement(subject=(subject,), predicate=about)
    return sign_statement(statement.to_bytes(), PAYLOAD_TYPE, signer)


def verify(envelope: Envelope, root: RootDocument) -> Ruling:
    """Return what was decided and by whom.

    Raises:
        RefusedError: `policy.adjudication`, no such statement, or nobody with the role signed it;
            `seal.type`, `seal.algorithm`.

    """
    parse_canonical(envelope.payload, code=CODE, what="the adjudication", limit=MAX_FILE)
    try:
        statement = _Statement.model_validate_json(envelope.payload)
    except ValidationError as error:
        raise RefusedError(CODE, f"the adjudication: {first_problem(error)}") from error
    if statement.to_bytes() != envelope.payload:
        raise RefusedError(CODE, "the adjudication writes a field in another form")
    about = _checked(statement.predicate)
    if statement.subject[0].digest.sha256 != _question(about).hex:
        raise RefusedError(CODE, "the adjudication is about another question than it states")
    people = [each for each in signers_of(envelope, root, at=about.issued) if ROLE in each.roles]
    if not people:
        raise RefusedError(
            CODE,
            f"{about.name!r:.80}: a person with the role `{ROLE}` must sign it, nobody did",
            hint="airgap trust show lists people and roles",
        )
    return Ruling(
        name=normal_name(about.name),
        list_id=about.list_id,
        edition=about.edition,
        against=normal_name(about.against),
        same=about.decision == "same",
        people=tuple(each.person for each in people),
        expires=about.expires,
        digest=Digest.of(envelope.payload),
        issued=about.issued,
    )


def load(root: Path, trust: RootDocument) -> Iterable[Ruling]:
    """Read and verify every file of `<root>/policy/adjudications`."""
    return [verify(each, trust) for each in read_folder(root / FOLDER)]


def write(envelope: Envelope, root: Path) -> Path:
    """Put an adjudication where `load` finds it; never over another file."""
    path = root / FOLDER / f"{Digest.of(envelope.payload).hex[:24]}.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(envelope.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    return path


def _checked(about: Adjudication) -> Adjudication:
    last = about.issued.date() + timedelta(days=MAX_DAYS)
    if not about.issued.date() < about.expires <= last:
        raise RefusedError(
            CODE,
            f"it counts from {about.issued.date()} until {about.expires}; at most {MAX_DAYS} days",
        )
    return about


def _question(about: Adjudication) -> Digest:
    """What was asked, as a content address: the subject of the statement."""
    parts = {
        "against": about.against,
        "edition": about.edition,
        "list": about.list_id,
        "name": about.name,
    }
    return Digest.of(canonical_json(parts))
