"""`airgap sign`: an approver reads what the draft is, confirms in words, and adds one signature.

Decides whether a key may sign this draft at all: its person is enrolled as an approver and did not
build it. What is shown is what is signed: the report's bytes are held against the digest in the
seal before anybody reads them. The body is not read: signing costs the same for any size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bundle.canonical import parse_canonical
from bundle.envelope import Envelope, add_signature, find_signers, parse_envelope
from bundle.keys import Signer
from bundle.manifest import REPORT, Manifest, parse_manifest
from bundle.media import open_medium
from bundle.medium import Medium
from bundle.staging.pipeline import DECISION
from bundle.statement import PAYLOAD_TYPE, SealStatement, parse_statement, require_matches
from bundle.trust import BUILDER, Trust
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
        envelope = parse_envelope(head.envelope)
        statement = parse_statement(envelope.payload)
        manifest = parse_manifest(head.manifest)
        require_matches(statement, manifest, head.manifest)
        medium.require_whole(manifest, manifest.digest)
        documents = [_document(medium, manifest, name) for name in (REPORT, DECISION)]
    finally:
        medium.close()
    return Draft(path, envelope, statement, manifest, documents[0], documents[1])


def count(draft: Draft, trust: Trust, envelope: Envelope | None = None) -> Tally:
    """Count the people who signed, as a host with this trust root does."""
    root = trust.document
    seal = draft.statement.predicate
    keyids = find_signers(envelope or draft.envelope, root.public_keys(), payload_type=PAYLOAD_TYPE)
    approvers, builder_signed = set(), False
    for keyid in keyids:
        who = root.find_person(keyid)
        if who is None:
            continue
        person = root.people[who]
        if who == seal.builder:
            builder_signed = builder_signed or BUILDER in person.roles
        elif person.approves and person.is_enrolled(seal.created):
            approvers.add(who)
    held = {role for who in approvers for role in root.people[who].roles}
    return Tally(
        seal.builder,
        builder_signed,
        tuple(sorted(approvers)),
        root.thresholds.seal.people,
        tuple(sorted(set(root.thresholds.seal.required_roles) - held)),
    )


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


def require_approver(draft: Draft, trust: Trust, signer: Signer) -> tuple[str, tuple[str, ...]]:
    """Return the person whose key this is, and her roles; she must be able to approve this draft.

    Raises:
        RefusedError: `seal.people`, `seal.role`, `seal.malformed`.

    """
    root, seal = trust.document, draft.statement.predicate
    keyid = signer.public_key.keyid
    who = root.find_person(keyid)
    if who is None:
        raise RefusedError(
            "seal.role",
            f"key {keyid} is nobody's in this trust root",
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
    return who, person.roles


def sign(draft: Draft, trust: Trust, signer: Signer, *, confirmation: str) -> Tally:
    """Add the signature of an approver in place.

    Args:
        draft: As shown to the approver.
        trust: Of this site.
        signer: The approver's key.
        confirmation: What she typed.

    Raises:
        RefusedError: `sign.confirm`, `seal.*`; the file is as it was.
        FaultError: `host.io`.

    """
    require_approver(draft, trust, signer)
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
    envelope = add_signature(again.envelope, signer)
    medium = open_medium(draft.path)  # of a set, every volume is signed
    try:
        medium.require_whole(again.manifest, again.digest)
        medium.rewrite_envelope(envelope)
    finally:
        medium.close()
    return count(again, trust, envelope)
