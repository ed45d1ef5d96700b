"""A signed statement about one thing: in-toto, one subject by its SHA-256, a predicate of ours.

What a person approves, releases, reviews or adjudicates is one such statement, and so is her word
on a release. A `Kind` says what is signed and how a refusal calls it; a payload has one form, the
canonical one, and every other is refused. Whose word a statement is, its reader decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, sign_statement
from bundle.fields import Document, Sha256Hex, Text
from bundle.keys import Signer
from bundle.manifest import first_problem
from policy.errors import RefusedError
from policy.terms import Digest

STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_PAYLOAD = 1 << 18

P = TypeVar("P", bound=Document)


class SubjectDigest(Document):
    """Digest set of the subject."""

    sha256: Sha256Hex


class Subject(Document):
    """What the statement is about."""

    name: Text
    digest: SubjectDigest


class Statement(Document, Generic[P]):
    """The whole statement; `Kind.parse` alone makes one of bytes."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")] = (
        STATEMENT_TYPE
    )
    predicate: P
    predicate_type: Annotated[str, Field(alias="predicateType")]
    subject: tuple[Subject]

    @property
    def about(self) -> Digest:
        """Digest of the subject."""
        return Digest("sha256", bytes.fromhex(self.subject[0].digest.sha256))

    def to_bytes(self) -> bytes:
        """Return the canonical form: the payload that is signed."""
        return canonical_json(self.model_dump(mode="json", by_alias=True, exclude_none=True))


@dataclass(frozen=True, slots=True)
class Kind(Generic[P]):
    """One kind of statement.

    Args:
        form: `Statement[...]` with the model of its predicate.
        predicate_type: URI below `policy.terms.URI_BASE`.
        subject: Name of what it is about; empty where each statement names its own.
        code: Of every refusal.
        what: What a refusal calls it, such as `the approval`.
        limit: Largest payload in bytes.

    """

    form: type[Statement[P]]
    predicate_type: str
    subject: str
    code: str
    what: str
    limit: int = MAX_PAYLOAD

    @contextlib.contextmanager
    def worded(self) -> Iterator[None]:
        """Turn what a predicate cannot say into a refusal, while it is put together."""
        try:
            yield
        except ValidationError as error:
            raise RefusedError(self.code, f"{self.what}: {first_problem(error)}") from error

    def draft(self, predicate: P, about: Digest, name: str = "") -> Statement[P]:
        """Make the statement about `about`, by `name` where the kind has no name of its own."""
        with self.worded():
            subject = Subject(name=name or self.subject, digest=SubjectDigest(sha256=about.hex))
            return self.form(
                predicate=predicate, predicate_type=self.predicate_type, subject=(subject,)
            )

    def sign(self, statement: Statement[P], *signers: Signer) -> Envelope:
        """Sign a statement as its first person."""
        return sign_statement(statement.to_bytes(), PAYLOAD_TYPE, *signers)

    def parse(self, payload: bytes) -> Statement[P]:
        """Turn an untrusted payload into a statement of this kind; RefusedError of its code."""
        parse_canonical(payload, code=self.code, what=self.what, limit=self.limit)
        with self.worded():
            statement = self.form.model_validate_json(payload)
        found = (statement.predicate_type, statement.subject[0].name)
        wanted = (self.predicate_type, self.subject or found[1])
        if found != wanted:
            raise RefusedError(
                self.code,
                f"{self.what}: expected {wanted[0]} about {wanted[1]!r}, "
                f"found {found[0]!r:.120} about {found[1]!r:.120}",
            )
        if statement.to_bytes() != payload:
            raise RefusedError(self.code, f"{self.what} writes a field in another form")
        return statement
