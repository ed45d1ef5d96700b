"""A clock that ran ahead: the signed statement with which a host forgets a time that never was.

A host refuses when its clock lies before the latest thing that happened on it. After a run with the
clock years ahead that would be for years. The holders of the root keys then sign what the host
prints: the very time that it believes in, the true time, and why. FORMAT.md section 19.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Literal

from pydantic import ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, find_signers, sign_statement
from bundle.fields import Document, Instant, Text, format_time
from bundle.keys import Signer
from bundle.manifest import first_problem
from bundle.root import ROOT, RootDocument
from policy.errors import RefusedError

CODE = "trust.clock"
CLOCK_TYPE = "application/vnd.airgap.clock+json"
CLOCK_LIMIT = 65_536
VALID = timedelta(days=7)


class ClockStatement(Document):
    """What is signed: the time that the host believes in, and the true time of signing."""

    format: Literal["airgap-clock/1"] = "airgap-clock/1"
    forget: Instant
    issued: Instant
    reason: Text

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))


def sign_clock(
    forget: datetime, reason: str, signers: Iterable[Signer], *, now: datetime
) -> Envelope:
    """Return the statement, signed by these keys; RefusedError `trust.clock` for a bad reason."""
    try:
        statement = ClockStatement(
            forget=forget, issued=now.replace(microsecond=0), reason=reason.strip()
        )
    except ValidationError as error:
        raise RefusedError(CODE, f"the statement: {first_problem(error)}") from error
    return sign_statement(statement.to_bytes(), CLOCK_TYPE, *signers)


def parse_clock(payload: bytes) -> ClockStatement:
    """Turn a payload into a statement; RefusedError `trust.clock`."""
    parse_canonical(payload, code=CODE, what="the statement", limit=CLOCK_LIMIT)
    try:
        return ClockStatement.model_validate_json(payload)
    except ValidationError as error:
        raise RefusedError(CODE, f"the statement: {first_problem(error)}") from error


def verify_clock(
    envelope: Envelope, root: RootDocument, *, floor: datetime | None, now: datetime
) -> ClockStatement:
    """Return the statement if the threshold `root` signed it for the very time `floor`.

    Raises:
        RefusedError: `trust.clock`; too few signatures, another time, or older than a week.

    """
    keyids = find_signers(envelope, root.public_keys(), payload_type=CLOCK_TYPE)
    people = [who for who in root.people_of(keyids) if ROOT in root.people[who].roles]
    needed = root.thresholds.root.people
    if len(people) < needed:
        raise RefusedError(CODE, f"{len(people)} of {needed} root people signed the statement")
    statement = parse_clock(envelope.payload)
    able = [
        who
        for who in people
        if root.people[who].is_enrolled(statement.issued) and root.people[who].is_enrolled(now)
    ]
    if len(able) < needed:
        raise RefusedError(CODE, f"{len(able)} of {needed} root people were enrolled when signing")
    if floor is None or statement.forget != floor.replace(microsecond=0):
        found = "nothing" if floor is None else format_time(floor)
        raise RefusedError(
            CODE,
            f"signed to forget {format_time(statement.forget)}, this host believes in {found}",
            hint="airgap trust clock prints the time that has to be signed",
        )
    if not statement.issued <= now < statement.issued + VALID:
        raise RefusedError(
            CODE,
            f"signed at {format_time(statement.issued)}, it is {format_time(now)}; a statement "
            f"holds {VALID.days} days",
            hint="set the clock of this host right, or have it signed again",
        )
    return statement
