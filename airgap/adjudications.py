"""Signed adjudications: whether two names that look alike mean one party, for one edition.

Obeys docs/design/policy.md, 8. A person with the role `research_security` signs; the answer counts
for that edition of that list until a day, and is not asked for again before then.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from airgap.signed import Day, keep_new, read_folder, signers_of
from bundle.canonical import canonical_json
from bundle.envelope import Envelope
from bundle.fields import Document, Instant, Text
from bundle.intoto import Kind, Statement
from bundle.keys import Signer
from bundle.root import RootDocument
from policy.errors import RefusedError
from policy.lineage import Ruling
from policy.snapshots import normal_name
from policy.terms import URI_BASE, Digest

CODE = "policy.adjudication"
ROLE = "research_security"
MAX_DAYS = 400
FOLDER = Path("policy") / "adjudications"


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


KIND = Kind(
    Statement[Adjudication],
    f"{URI_BASE}adjudication/v1",
    subject="question",
    code=CODE,
    what="the adjudication",
)


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
    with KIND.worded():
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
    return _checked(made)


def sign(about: Adjudication, signer: Signer) -> Envelope:
    """Sign an adjudication."""
    return KIND.sign(KIND.draft(about, _question(about)), signer)


def verify(envelope: Envelope, root: RootDocument) -> Ruling:
    """Return what was decided and by whom.

    Raises:
        RefusedError: `policy.adjudication`, no such statement, or nobody with the role signed it;
            `seal.type`, `seal.algorithm`.

    """
    statement = KIND.parse(envelope.payload)
    about = _checked(statement.predicate)
    if statement.about != _question(about):
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
    return keep_new(envelope, root / FOLDER)


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
