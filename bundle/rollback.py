"""A rollback: the signed approval to run one release that is older than what a host has seen.

A host takes no release below the high-water mark of its line. When the newer one turns out bad, as
many people as a seal needs sign which older release may come back, on a host that stands at which
mark, until when, and why. A revoked release never comes back, whoever signs. FORMAT.md section 21.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from pydantic import ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, find_signers, sign_statement
from bundle.fields import Count, DigestText, Document, Instant, Name, Text, format_time
from bundle.keys import Signer
from bundle.manifest import Manifest, first_problem
from bundle.revocation import require_unrevoked
from bundle.root import RootDocument
from bundle.trust import Trust
from policy.errors import RefusedError
from policy.terms import Digest

CODE = "trust.rollback"
ROLLBACK_TYPE = "application/vnd.airgap.rollback+json"
ROLLBACK_LIMIT = 65_536
LONGEST = timedelta(days=30)

Mark = tuple[int, Digest]
"""The highest epoch of a line that a host has had active, and the release that bore it."""


class HighWater(Document):
    """The mark that the host stands at when the people sign: so an approval is for now only."""

    epoch: Count
    bundle: DigestText


class RollbackStatement(Document):
    """What is signed. `bundle` is the one release that may come back, below the mark `above`."""

    format: Literal["airgap-rollback/1"] = "airgap-rollback/1"
    bundle: DigestText
    bundle_id: Name
    epoch: Count
    above: HighWater
    issued: Instant
    expires: Instant
    reason: Text

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json"))


@dataclass(frozen=True, slots=True)
class VerifiedRollback:
    """An approval that holds for this release on this host now; `approvers` are person ids."""

    statement: RollbackStatement
    approvers: tuple[str, ...]
    digest: Digest  # of the statement: what a record of the act names


def sign_rollback(
    manifest: Manifest,
    mark: Mark,
    reason: str,
    signers: Iterable[Signer],
    *,
    now: datetime,
    valid_for: timedelta = timedelta(days=7),
) -> Envelope:
    """Return the approval to bring back the release of `manifest`, signed by these keys.

    Args:
        manifest: Of the older release, from its bundle or from the store.
        mark: Of the host, from `Store.floors().epochs`.
        reason: Why, in words; it goes on record.
        signers: Keys of the first people who sign; others add theirs with `envelope.add_signature`.
        now: UTC.
        valid_for: 30 days at most.

    Raises:
        RefusedError: `trust.rollback`; the release is not older, or a field is not allowed.

    """
    issued = now.replace(microsecond=0)
    try:
        statement = RollbackStatement(
            bundle=str(manifest.digest),
            bundle_id=manifest.bundle_id,
            epoch=manifest.epoch,
            above=HighWater(epoch=mark[0], bundle=str(mark[1])),
            issued=issued,
            expires=issued + valid_for,
            reason=reason.strip(),
        )
    except ValidationError as error:
        raise RefusedError(CODE, f"the approval: {first_problem(error)}") from error
    return sign_statement(_checked(statement).to_bytes(), ROLLBACK_TYPE, *signers)


def parse_rollback(payload: bytes) -> RollbackStatement:
    """Turn the untrusted payload of an envelope into a statement; RefusedError `trust.rollback`."""
    parse_canonical(payload, code=CODE, what="the approval of a rollback", limit=ROLLBACK_LIMIT)
    try:
        statement = RollbackStatement.model_validate_json(payload)
    except ValidationError as error:
        raise RefusedError(CODE, f"the approval of a rollback: {first_problem(error)}") from error
    if statement.to_bytes() != payload:
        raise RefusedError(CODE, "the approval of a rollback writes a field in another form")
    return _checked(statement)


def verify_rollback(
    envelope: Envelope,
    trust: Trust,
    manifest: Manifest,
    *,
    builder: str,
    mark: Mark,
    now: datetime,
) -> VerifiedRollback:
    """Return the approval if enough people signed that this very release may come back here now.

    The people are those of a seal: `thresholds.seal` of the newest root, with its required roles,
    each bearing the role of an approver, enrolled at `issued` and `now`, not revoked, and none of
    them the builder of the release. The high-water mark is not lowered by a rollback: the caller
    leaves it as it is.

    Args:
        envelope: Parsed (`envelope.parse_envelope`, code `trust.rollback`) and untrusted.
        trust: Of this host, with its newest revocation list.
        manifest: Of the older release: verified, or that of the store.
        builder: Who built it, as its seal says (`VerifiedSeal.builder`).
        mark: Of its line on this host; the release must lie below it.
        now: UTC, from the caller's clock.

    Raises:
        RefusedError: `trust.rollback`, the approval does not hold, or is that of another release,
            host or time; `trust.revoked`, the release or its epoch is revoked; `seal.type`,
            another kind of document; `seal.algorithm`.

    """
    root = trust.standing
    keyids = find_signers(envelope, root.public_keys(), payload_type=ROLLBACK_TYPE)
    if not keyids:  # before the payload is parsed: it is nobody's word yet
        raise _too_few(0, root)
    statement = parse_rollback(envelope.payload)
    _require_scope(statement, manifest, mark)
    require_unrevoked(trust.revocations, manifest, manifest.digest)
    if not statement.issued <= now < statement.expires:
        raise RefusedError(
            CODE,
            f"the approval holds from {format_time(statement.issued)} to "
            f"{format_time(statement.expires)}, it is {format_time(now)}",
            hint="have a new one signed; airgap trust rollback-sign",
        )
    approvers = {
        who
        for who in root.people_of(keyids)
        if root.people[who].approves
        and root.people[who].is_enrolled(statement.issued)
        and root.people[who].is_enrolled(now)
    } - {builder}
    if len(approvers) < root.thresholds.seal.people:
        raise _too_few(len(approvers), root)
    held = {role for who in approvers for role in root.people[who].roles}
    missing = sorted(set(root.thresholds.seal.required_roles) - held)
    if missing:
        raise RefusedError(
            CODE,
            f"no person with the role {', '.join(missing)} signed the approval of the rollback",
            hint="airgap trust show lists people and roles",
        )
    return VerifiedRollback(statement, tuple(sorted(approvers)), Digest.of(envelope.payload))


def _checked(statement: RollbackStatement) -> RollbackStatement:
    if not statement.epoch < statement.above.epoch:
        raise RefusedError(
            CODE,
            f"epoch {statement.epoch} is not older than {statement.above.epoch}, the highest that "
            "the host has seen: that needs no approval, or none helps",
        )
    if not timedelta() < statement.expires - statement.issued <= LONGEST:
        raise RefusedError(CODE, f"an approval of a rollback holds {LONGEST.days} days at most")
    return statement


def _require_scope(statement: RollbackStatement, manifest: Manifest, mark: Mark) -> None:
    named = (statement.bundle, statement.bundle_id, statement.epoch)
    found = (str(manifest.digest), manifest.bundle_id, manifest.epoch)
    if named != found:
        raise RefusedError(
            CODE,
            f"the approval is for {statement.bundle} (epoch {statement.epoch}), the release is "
            f"{manifest.digest} (epoch {manifest.epoch})",
            hint="an approval is for one release; have another one signed",
        )
    if (statement.above.epoch, statement.above.bundle) != (mark[0], str(mark[1])):
        raise RefusedError(
            CODE,
            f"the approval is for a host that has seen epoch {statement.above.epoch} "
            f"({statement.above.bundle}), this one has seen epoch {mark[0]} ({mark[1]})",
            hint="have one signed that names the mark of this host; airgap trust rollback-sign",
        )


def _too_few(found: int, root: RootDocument) -> RefusedError:
    return RefusedError(
        CODE,
        f"{found} of {root.thresholds.seal.people} approvers beside the builder signed the "
        "approval of the rollback",
        hint="airgap trust rollback-sign FILE adds a signature; airgap trust show lists people",
    )
