"""Signed files of rules, lists and lineage of a site: DSSE beside each file.

Obeys docs/design/policy.md, 3. `NAME.yaml.sig.json` is an in-toto statement over the SHA-256 of
`NAME.yaml`, signed by as many people with the role `policy` as the trust root asks for. Who wrote
the file is named in the statement and does not count.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Literal

from airgap.signed import signers_of
from bundle.envelope import Envelope, add_signature, parse_envelope
from bundle.fields import Document, Instant, PersonId
from bundle.intoto import MAX_PAYLOAD, Kind, Statement
from bundle.keys import Signer, as_signers, read_limited
from bundle.root import RootDocument
from policy.approvals import same_person
from policy.errors import RefusedError
from policy.terms import URI_BASE, Digest

CODE = "policy.signature"
ROLE = "policy"
ENDING = ".sig.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.(yaml|toml)")
_HINT = "airgap policy sign FILE --key KEY, by a person of the trust root with the role `policy`"


class RulesFile(Document):
    """Who wrote the file, and when it was signed."""

    format: Literal["airgap-rules-file/1"] = "airgap-rules-file/1"
    author: PersonId | None = None
    issued: Instant


RULES = Kind(
    Statement[RulesFile],
    f"{URI_BASE}rules-file/v1",
    subject="",  # the name of the file
    code=CODE,
    what="the signature",
)


def sign_file(
    content: bytes, name: str, signer: Signer, *, author: str | None, issued: datetime
) -> Envelope:
    """Sign a file as its first approver; RefusedError `policy.signature` for a strange name."""
    if not _NAME.fullmatch(name):
        raise RefusedError(CODE, f"{name!r:.80}: a file of rules is called NAME.yaml or NAME.toml")
    with RULES.worded():
        about = RulesFile(author=author, issued=issued.replace(microsecond=0))
    return RULES.sign(RULES.draft(about, Digest.of(content), name), signer)


def countersign(envelope: Envelope, content: bytes, name: str, signer: Signer) -> Envelope:
    """Sign a file as a further approver; RefusedError `policy.signature` for another file."""
    _require_same(RULES.parse(envelope.payload), content, name)
    signed = {each.keyid for each in envelope.signatures}
    again = sorted(signed & {each.public_key.keyid for each in as_signers(signer)})
    if again:
        raise RefusedError(
            CODE,
            f"{name}: signed with key {again[0][:16]} already",
            hint="another person signs; to sign anew, remove the signature file first",
        )
    return add_signature(envelope, signer)


def verify_file(content: bytes, name: str, envelope: Envelope, root: RootDocument) -> RulesFile:
    """Return what was signed about a file, when enough people signed this very file.

    Raises:
        RefusedError: `policy.signature`; `seal.type` or `seal.algorithm` for a strange envelope.

    """
    statement = RULES.parse(envelope.payload)
    _require_same(statement, content, name)
    about = statement.predicate
    author = None if about.author is None else same_person(about.author)
    people = [
        each
        for each in signers_of(envelope, root, at=about.issued)
        if ROLE in each.roles and same_person(each.person) != author
    ]
    wanted = root.thresholds.policy
    roles = {role for each in people for role in each.roles}
    if len(people) < wanted.people or not set(wanted.required_roles) <= roles:
        named = ", ".join(each.person for each in people) or "nobody"
        raise RefusedError(
            CODE,
            f"{name}: {wanted.people} people with the role `{ROLE}` must sign it, its author"
            f" {about.author or '(not named)'} apart; {named} did",
            hint=_HINT,
        )
    return about


def is_about(envelope: Envelope, content: bytes, name: str) -> bool:
    """Whether a signature is about this very file."""
    signed = RULES.parse(envelope.payload)
    return signed.subject[0].name == name and signed.about == Digest.of(content)


def read_signature(path: Path) -> Envelope:
    """Read the signature beside the file at `path`; RefusedError `policy.signature` for none."""
    beside = path.with_name(path.name + ENDING)
    if not beside.is_file():
        raise RefusedError(
            CODE,
            f"{path}: not signed; expected its signature in {beside.name}",
            hint=_HINT,
        )
    return parse_envelope(
        read_limited(beside, MAX_PAYLOAD, code=CODE, what="the signature"), code=CODE
    )


def _require_same(statement: Statement[RulesFile], content: bytes, name: str) -> None:
    signed = statement.subject[0]
    found = Digest.of(content).hex
    if signed.name != name or signed.digest.sha256 != found:
        raise RefusedError(
            CODE,
            f"{name}: the signature is about {signed.name} sha256:{signed.digest.sha256}, and this"
            f" file is sha256:{found}",
            hint="have the file as it is now signed",
        )
