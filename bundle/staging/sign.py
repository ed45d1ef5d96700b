"""`airgap sign`: an approver reads what the draft is, confirms in words, and adds one signature.

Decides whether a key may sign this draft at all: its person is enrolled as an approver and did not
build it. What is shown is what is signed: the report's bytes are held against the digest in the
seal before anybody reads them, and every chunk of the body is held against the tree: nobody signs
what a lab would refuse as damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bundle.approval import find_approvals, with_approval
from bundle.archive import Progress
from bundle.canonical import parse_canonical
from bundle.envelope import Envelope, add_signature, find_signers, parse_seal
from bundle.keys import Signer, as_signers
from bundle.manifest import REPORT, Manifest, parse_manifest
from bundle.media import open_medium
from bundle.medium import Medium
from bundle.revocation import revoked_signers
from bundle.root import BUILDER, OFFICES
from bundle.staging.release import DECISION
from bundle.statement import (
    PAYLOAD_TYPE,
    SealStatement,
    VerifiedSeal,
    approved_by,
    parse_statement,
    require_matches,
)
from bundle.trust import Trust
from bundle.verify import SealedBundle, verify_contents
from policy.errors import RefusedError
from policy.terms import Digest

REPORT_LIMIT = 16 * 1024 * 1024
SHORT = 8  # hex digits of the digest that count as a confirmation


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft whose parts belong together; nobody but the builder need have signed."""

    path: Path
    envelope: Envelope
    statement: SealStatement
    manifest: Manifest
    report: dict[str, Any]
    decision: dict[str, Any]  # of the policy of the staging side; the lab decides again

    @property
    def digest(self) -> Digest:
        """The bundle digest."""
        return self.manifest.digest

    def confirms(self, text: str) -> bool:
        """Tell whether `text` is the release's name or the first digits of its digest."""
        found = text.strip()
        short = found.removeprefix("sha256:").lower()
        return found == self.manifest.name or (
            len(short) >= SHORT and self.digest.hex.startswith(short)
        )


@dataclass(frozen=True, slots=True)
class Tally:
    """Who has signed, and what is still missing for the seal to hold."""

    builder: str
    builder_signed: bool
    approvers: tuple[str, ...]
    needed: int
    missing_roles: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether a host with this trust root accepts the seal."""
        enough = len(self.approvers) >= self.needed
        return self.builder_signed and enough and not self.missing_roles


def read_draft(path: Path) -> Draft:
    """Read the head and the report of a draft and check that they belong together.

    Raises:
        RefusedError: `archive.*`, `seal.*`, `manifest.*`.
        FaultError: `host.io`.

    """
    medium = open_medium(path)
    try:
        head = medium.head
        envelope = parse_seal(head.envelope)
        statement = parse_statement(envelope.payload)
        manifest = parse_manifest(head.manifest)
        require_matches(statement, manifest, head.manifest)
        medium.require_whole(manifest, manifest.digest)
        report = _document(medium, manifest, REPORT)
        # Wheels alone ask no rule about a model.
        decision = _document(medium, manifest, DECISION) if manifest.models else {}
    finally:
        medium.close()
    return Draft(path, envelope, statement, manifest, report, decision)


def count(draft: Draft, trust: Trust, envelope: Envelope | None = None) -> Tally:
    """Count the people who signed, as a host with this trust root does."""
    root = trust.document
    seal, signed_by = draft.statement.predicate, envelope or draft.envelope
    keyids = find_signers(signed_by, root.public_keys(), payload_type=PAYLOAD_TYPE)
    revoked = revoked_signers(trust.revocations, root, keyids)
    signed = root.people_of(keyid for keyid in keyids if keyid not in revoked)
    about = approved_by(draft.statement, signed_by.payload)
    approvals = find_approvals(signed_by, about, root, revoked)
    builder_signed = seal.builder in signed and BUILDER in root.people[seal.builder].roles
    approvers = {
        who
        for who in signed - {seal.builder}
        if root.people[who].approves and root.people[who].is_enrolled(seal.created)
    }
    roles = {who: root.people[who].roles for who in approvers}
    if seal.approvals is not None:
        roles = {who: approvals[who].roles for who in approvers & approvals.keys()}
    approvers &= roles.keys()
    held = {role for each in roles.values() for role in each}
    return Tally(
        seal.builder,
        builder_signed,
        tuple(sorted(approvers)),
        root.thresholds.seal.people,
        tuple(sorted(set(root.thresholds.seal.required_roles) - held)),
    )


def verify_payload(draft: Draft, trust: Trust, progress: Progress | None = None) -> None:
    """Hash every chunk of the draft and run the strict parsers, as a lab will.

    Raises:
        RefusedError: `chunk.*`, `archive.*`, `manifest.layout`, `bom.mismatch`, `scan.*`.
        FaultError: `host.io`.

    """
    nobody = VerifiedSeal(draft.statement, (), draft.statement.predicate.builder, ())
    medium = open_medium(draft.path)
    try:
        sealed = SealedBundle(medium, nobody, trust)
        if sealed.digest != draft.digest:
            raise RefusedError("seal.subject", "the draft changed while it was read")
        sealed.verify_body(progress=progress)
        verify_contents(sealed.manifest, sealed.view)
    finally:
        medium.close()


def _document(medium: Medium, manifest: Manifest, path: str) -> dict[str, Any]:
    """Read a small document of the body and hold it against the manifest that the seal names."""
    entry = manifest.find(path)
    raw = bytearray(min(entry.size, REPORT_LIMIT) if entry else 0)
    if entry is not None:
        medium.read_into(entry.offset, memoryview(raw))
    if entry is None or hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise RefusedError(
            "seal.subject",
            f"{path} is not the document that the seal names",
            hint="the draft was changed after it was built; build it again",
        )
    value = parse_canonical(bytes(raw), code="manifest.schema", what=path, limit=REPORT_LIMIT)
    return value if isinstance(value, dict) else {}


def require_approver(
    draft: Draft, trust: Trust, signer: Signer | Sequence[Signer], *, role: str = ""
) -> tuple[str, tuple[str, ...]]:
    """Return the person whose keys these are, and the roles in which she approves.

    Args:
        draft: What is to be signed.
        trust: Of this site.
        signer: Her key; both of them in the profile `cnsa2`.
        role: The role that she claims; it must be one of hers that approves. Empty: all of hers.

    Raises:
        RefusedError: `seal.people`, `seal.role`, `seal.malformed`, `seal.profile`.

    """
    root, seal = trust.document, draft.statement.predicate
    if seal.profile != root.profile:
        raise RefusedError(
            "seal.profile",
            f"this trust root demands profile {root.profile}, the draft has {seal.profile}",
            hint="build it again under this trust root",
        )
    keyids = [each.public_key.keyid for each in as_signers(signer)]
    owners = {root.find_person(keyid) for keyid in keyids}
    who = next(iter(root.people_of(keyids)), None)
    if len(owners) != 1 or who is None:
        known = ", ".join(sorted(filter(None, owners))) or "nobody"
        raise RefusedError(
            "seal.role",
            f"the keys {', '.join(keyids)} are those of {known} in this trust root; profile "
            f"{root.profile} needs {'ML-DSA-87 and P-384' if root.profile == 'cnsa2' else 'a key'} "
            "of one person",
            hint="`airgap trust add` enrols a key; `airgap trust show` lists them",
        )
    if who == seal.builder:
        raise RefusedError(
            "seal.people",
            f"{who} built this draft, and a builder never approves",
            hint="another person signs it",
        )
    person = root.people[who]
    if not person.approves or not person.is_enrolled(seal.created):
        raise RefusedError(
            "seal.role",
            f"{who} has the roles {', '.join(person.roles)} and was "
            f"{'' if person.is_enrolled(seal.created) else 'not '}enrolled when it was built; "
            "that is not an approver",
            hint="`airgap trust show` lists people and roles",
        )
    if who in count(draft, trust).approvers:
        raise RefusedError(
            "seal.people",
            f"{who} has signed this draft already; one person counts once",
            hint="another person signs it",
        )
    if revoked_signers(trust.revocations, root, keyids):
        raise RefusedError("seal.revoked", f"a key of {who} is revoked, and signs nothing more")
    able = tuple(each for each in person.roles if each not in OFFICES)
    if role and role not in able:
        raise RefusedError(
            "seal.role",
            f"{who} approves as {', '.join(able)}, not as {role!r:.64}",
            hint="give a role of yours with --role; `airgap trust show` lists them",
        )
    return who, (role,) if role else able


def sign(
    draft: Draft,
    trust: Trust,
    signer: Signer | Sequence[Signer],
    *,
    confirmation: str,
    now: datetime,
    role: str = "",
    conditions: str = "",
) -> Tally:
    """Add the signature of an approver in place, and her statement of approval.

    Args:
        draft: As shown to the approver.
        trust: Of this site.
        signer: The approver's key, or both.
        confirmation: What she typed.
        now: UTC; the time in her statement.
        role: In which she approves. Empty: in all of hers.
        conditions: On which she approves, in words; others read them, and no program does.

    Raises:
        RefusedError: `sign.confirm`, `seal.*`; the file is as it was.
        FaultError: `host.io`.

    """
    who, roles = require_approver(draft, trust, signer, role=role)
    if not draft.confirms(confirmation):
        raise RefusedError(
            "sign.confirm",
            f"{confirmation.strip()!r:.80} is neither {draft.manifest.name!r} nor the first "
            f"{SHORT} digits of {draft.digest}",
            hint="read the report, then type the name of the model that you approve",
        )
    again = read_draft(draft.path)  # the file may have changed while she was reading
    if (again.digest, again.envelope.payload) != (draft.digest, draft.envelope.payload):
        raise RefusedError(
            "seal.subject",
            "the draft changed between reading and signing",
            hint="read it again, then sign",
        )
    envelope = add_signature(again.envelope, *as_signers(signer))
    if draft.statement.predicate.approvals is not None:
        envelope = with_approval(
            envelope,
            approved_by(draft.statement, envelope.payload),
            as_signers(signer),
            person=who,
            roles=roles,
            approved=now,
            conditions=conditions,
        )
    medium = open_medium(draft.path)  # of a set, every volume is signed
    try:
        medium.require_whole(again.manifest, again.digest)
        medium.rewrite_envelope(envelope)
    finally:
        medium.close()
    return count(again, trust, envelope)
