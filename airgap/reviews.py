"""Signed reviews: a named person read the text that a rule, a screen pack or an edge rests on.

Obeys docs/design/policy.md, 3. What ships names no reviewer, because nobody at the institution has
read it. A person who has signs so; the statement is about this very wording, and another wording
asks anew. `airgap policy lint` counts it until its next review is due.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from airgap.signed import Day, keep_new, read_folder, signers_of
from bundle.envelope import Envelope
from bundle.fields import Document, Instant, Sha256Hex, Text
from bundle.intoto import Kind, Statement
from bundle.keys import Signer
from bundle.root import RootDocument
from policy.errors import RefusedError
from policy.lint import Review
from policy.terms import URI_BASE, Digest

CODE = "policy.review"
MAX_DAYS = 800
FOLDER = Path("policy") / "reviews"

ItemKind = Literal["rule", "screen_pack", "edge"]
# Who may answer for what, beside the role that a rule names as its owner.
ROLES: Mapping[str, frozenset[str]] = {
    "rule": frozenset({"policy"}),
    "screen_pack": frozenset({"hazard_officer", "policy"}),
    "edge": frozenset({"research_security", "policy"}),
}


class CitationReview(Document):
    """What was read, on which day, what came of it, and when it is due again."""

    format: Literal["airgap-citation-review/1"] = "airgap-citation-review/1"
    kind: ItemKind
    item: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    finding: Literal["confirmed", "differs"]
    read_on: Day
    next_review: Day
    text_sha256: Sha256Hex | None = None
    note: Text
    issued: Instant


REVIEW = Kind(
    Statement[CitationReview],
    f"{URI_BASE}citation-review/v1",
    subject="wording",
    code=CODE,
    what="the review",
)


@dataclass(frozen=True, slots=True)
class Item:
    """Something that a person has to read: its wording by digest, and who answers for it."""

    kind: ItemKind
    id: str
    digest: Digest
    citation: str
    owner: str
    due: date | None

    @property
    def roles(self) -> frozenset[str]:
        """The roles of those who may sign."""
        return ROLES[self.kind] | {self.owner}


def word(
    item: Item,
    *,
    finding: str,
    read_on: date,
    next_review: date,
    text: bytes | None,
    note: str,
    issued: datetime,
) -> CitationReview:
    """Word a review; RefusedError `policy.review` for what a statement cannot say."""
    with REVIEW.worded():
        made = CitationReview.model_validate(
            {
                "kind": item.kind,
                "item": item.id,
                "finding": finding,
                "read_on": read_on,
                "next_review": next_review,
                "text_sha256": None if text is None else Digest.of(text).hex,
                "note": note,
                "issued": issued.replace(microsecond=0),
            }
        )
    return _checked(made)


def sign(about: CitationReview, item: Item, signer: Signer) -> Envelope:
    """Sign a review of this wording."""
    return REVIEW.sign(REVIEW.draft(about, item.digest), signer)


def verify(envelope: Envelope, root: RootDocument, items: Iterable[Item]) -> Review | None:
    """Return what was found; None when the wording is one that is no longer loaded.

    Raises:
        RefusedError: `policy.review`, no such statement, or nobody who may answer signed it;
            `seal.type`, `seal.algorithm`.

    """
    statement = REVIEW.parse(envelope.payload)
    about = _checked(statement.predicate)
    wanted = (about.kind, about.item, statement.about)
    item = next((each for each in items if (each.kind, each.id, each.digest) == wanted), None)
    people = signers_of(envelope, root, at=about.issued)
    roles = ROLES[about.kind] if item is None else item.roles
    named = tuple(each.person for each in people if each.roles & roles)
    if not named:
        wanted_roles = ", ".join(sorted(roles))
        raise RefusedError(
            CODE,
            f"{about.item}: a person with one of the roles {wanted_roles} must sign it, nobody did",
            hint="airgap trust show lists people and roles",
        )
    if item is None:
        return None
    return Review(
        kind=about.kind,
        item=about.item,
        confirmed=about.finding == "confirmed",
        people=named,
        read_on=about.read_on,
        next_review=about.next_review,
        text=about.text_sha256 is not None,
    )


def load(root: Path, trust: RootDocument, items: Iterable[Item]) -> tuple[Review, ...]:
    """Read and verify every file of `<root>/policy/reviews`; of two the one that was read later."""
    items = tuple(items)
    found = [verify(each, trust, items) for each in read_folder(root / FOLDER)]
    newest: dict[tuple[str, str], Review] = {}
    for each in sorted((one for one in found if one is not None), key=_age):
        newest[each.kind, each.item] = each
    return tuple(newest.values())


def write(envelope: Envelope, root: Path) -> Path:
    """Put a review where `load` finds it; never over another file."""
    return keep_new(envelope, root / FOLDER)


def _age(review: Review) -> tuple[date, bool]:
    return review.read_on, not review.confirmed  # on one day the stricter counts


def _checked(about: CitationReview) -> CitationReview:
    signed = about.issued.date()
    if about.read_on > signed:
        raise RefusedError(CODE, f"read on {about.read_on}, signed on {signed}: not read yet")
    if not signed < about.next_review <= signed + timedelta(days=MAX_DAYS):
        raise RefusedError(
            CODE,
            f"the next review is due on {about.next_review}; it is signed on {signed}, and counts"
            f" for {MAX_DAYS} days at most",
        )
    return about
