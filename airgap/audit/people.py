"""Acts that take two people: pruning the log, purging a payload (docs/design/audit.md, 8).

One person writes the act down and signs it, a second signs the same bytes. People and keys are
those of the trust root; two keys of one person are one person. What they signed names the log, the
range or the payload, and the reason, and holds for a week.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.envelope import Envelope, find_signers, parse_envelope
from bundle.fields import Count, DigestText, Document, Instant, Text
from bundle.keys import read_limited
from bundle.manifest import first_problem
from bundle.root import RootDocument
from policy.approvals import same_person
from policy.errors import RefusedError

CODE: Final = "audit.people"
PAYLOAD_TYPE: Final = "application/vnd.airgap.audit-act+json"
VALID: Final = timedelta(days=7)
NEEDED: Final = 2
_MAX_ACT: Final = 65_536


# `origin size root`, as one writes it down
_Head = Annotated[str, Field(pattern="^[!-~]{1,200} [0-9]{1,16} [A-Za-z0-9+/]{43}=$")]


class Act(Document):
    """What two people sign."""

    format: Literal["airgap-audit-act/1"] = "airgap-audit-act/1"
    act: Literal["prune", "spill.purge", "new-log"]
    origin: Annotated[str, Field(max_length=200)]
    issued: Instant
    reason: Text
    last: Count | None = None  # prune: the last record that goes
    profile: Annotated[str, Field(max_length=32)] | None = None  # prune: the retention in force
    manifest: DigestText | None = None  # prune: the export that holds what goes
    record: Count | None = None  # purge: a record that names the payload
    payload: DigestText | None = None  # purge: the payload
    previous: _Head | None = None  # new-log: the last known head of the log before, if any is known

    def to_bytes(self) -> bytes:
        """Return the canonical form: what is signed."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))


def parse_act(payload: bytes) -> Act:
    """Read what was signed; RefusedError `audit.people`."""
    parse_canonical(payload, code=CODE, what="the act", limit=_MAX_ACT)
    try:
        act = Act.model_validate_json(payload)
    except ValidationError as error:
        raise RefusedError(CODE, f"the act: {first_problem(error)}") from error
    if act.to_bytes() != payload:
        raise RefusedError(CODE, "the act writes a field in another form")
    return act


def read_act(path: Path) -> Envelope:
    """Read a signed act; RefusedError `audit.people`, FaultError `host.io`."""
    raw = read_limited(path, _MAX_ACT, code=CODE, what="the signed act")
    return parse_envelope(raw.removesuffix(b"\n"), code=CODE)


def require_two(
    envelope: Envelope, kind: str, origin: str, root: RootDocument, now: datetime
) -> tuple[Act, str, str]:
    """Return the act and the two people behind it.

    Args:
        envelope: Parsed and untrusted.
        kind: `prune`, `spill.purge` or `new-log`.
        origin: The log that it must be about.
        root: The people of this site.
        now: UTC.

    Raises:
        RefusedError: `audit.people`; another act or log, too old, or fewer than two approvers.

    """
    act = parse_act(envelope.payload)
    if act.act != kind or act.origin != origin:
        raise RefusedError(CODE, f"signed for {act.act} of {act.origin!r:.80}, not {kind} here")
    if not act.issued <= now < act.issued + VALID:
        raise RefusedError(
            CODE,
            f"signed on {act.issued:%Y-%m-%d}, it is {now:%Y-%m-%d}; it holds {VALID.days} days",
            hint="write the act down again and let both people sign",
        )
    keyids = find_signers(envelope, root.public_keys(), payload_type=PAYLOAD_TYPE)
    people = root.people_of(keyids)
    able = {
        same_person(who): who
        for who in sorted(people)
        if root.people[who].is_enrolled(now) and root.people[who].approves
    }
    if len(able) < NEEDED:
        raise RefusedError(
            CODE,
            f"{len(able)} of {NEEDED} approvers signed: {', '.join(able.values()) or 'nobody'}",
            hint="a second approver of the trust root signs it: airgap audit countersign",
        )
    first, second, *_ = sorted(able.values())
    return act, first, second
