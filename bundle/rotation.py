"""Changes of the trust root: the next version, and the file that carries it between its signers.

Each function returns version n+1, not signed. It counts when the threshold `root` of version n and
of version n+1 have signed it. Root people who sit apart sign a proposal, which is the envelope of
that version with the signatures so far. An expired root is renewed in the same way; FORMAT.md 9.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from bundle.envelope import Envelope, add_signature, find_signers, sign_statement
from bundle.keys import PublicKeyFile, Signer
from bundle.root import (
    ROOT,
    ROOT_TYPE,
    RevocationRule,
    RootDocument,
    Threshold,
    next_version,
    parse_root,
    with_keys,
)
from bundle.trust import VALID_FOR, Trust
from policy.errors import RefusedError


def retire(old: RootDocument, person: str, *, now: datetime) -> RootDocument:
    """End the enrolment of a person; what she signed for earlier releases goes on counting."""
    known = _person(old, person)
    ended = old.people[known].model_copy(update={"valid_to": now.replace(microsecond=0)})
    return next_version(old, now=now, people={**old.people, known: ended})


def without_key(old: RootDocument, keyid: str, *, now: datetime) -> RootDocument:
    """Take a key out, and its person with her last key; nothing it signed counts any more."""
    who = old.find_person(keyid)
    if who is None:
        raise RefusedError("trust.root", f"key {keyid:.64} is not enrolled")
    rest = tuple(each for each in old.people[who].keys if each != keyid)
    people = {each: person for each, person in old.people.items() if each != who}
    if rest:
        people[who] = old.people[who].model_copy(update={"keys": rest})
    entries = {each: entry for each, entry in old.keys.items() if each != keyid}
    return next_version(old, now=now, keys=entries, people=people)


def rotate(
    old: RootDocument, keyids: Iterable[str], keys: Iterable[PublicKeyFile], *, now: datetime
) -> RootDocument:
    """Put new keys of the same people in the place of old ones, in one version.

    Raises:
        RefusedError: `trust.root`; a key is unknown, or a new key is another person's.

    """
    retired, fresh = tuple(keyids), tuple(keys)
    people = {old.find_person(keyid) for keyid in retired}
    if None in people or not retired:
        raise RefusedError("trust.root", "a key that is to go is not enrolled")
    strangers = sorted({key.person for key in fresh} - {who for who in people if who})
    if strangers or {key.person for key in fresh} != people:
        raise RefusedError(
            "trust.root",
            f"the new keys are those of {', '.join(sorted({k.person for k in fresh})) or 'nobody'},"
            f" the old ones of {', '.join(sorted(who for who in people if who))}",
            hint="a rotation gives the same person a new key: airgap keys new NAME --person ...",
        )
    grown = with_keys(old, fresh, now=now)
    entries = {each: entry for each, entry in grown.keys.items() if each not in retired}
    left = {
        who: person.model_copy(
            update={"keys": tuple(each for each in person.keys if each not in retired)}
        )
        for who, person in grown.people.items()
    }
    return next_version(old, now=now, keys=entries, people=left)


def renew(old: RootDocument, *, now: datetime, valid_for: timedelta = VALID_FOR) -> RootDocument:
    """Let the root hold for longer; an expired root is renewed like any other."""
    return next_version(old, now=now, expires=now.replace(microsecond=0) + valid_for)


def with_thresholds(
    old: RootDocument,
    *,
    now: datetime,
    root: int | None = None,
    seal: int | None = None,
    revocation: int | None = None,
    required_roles: tuple[str, ...] | None = None,
    rule: RevocationRule | None = None,
) -> RootDocument:
    """Change how many people must sign what; None leaves a number as it is."""
    kept = old.thresholds
    changed = kept.model_copy(
        update={
            "root": _with_people(kept.root, root),
            "revocation": _with_people(kept.revocation, revocation),
            "seal": _with_people(kept.seal, seal).model_copy(
                update={} if required_roles is None else {"required_roles": required_roles}
            ),
        }
    )
    return next_version(old, now=now, thresholds=changed, revocations=rule or old.revocations)


def to_cnsa2(old: RootDocument, *, now: datetime) -> RootDocument:
    """Raise the profile; every root person needs both keys by then. There is no way back."""
    return next_version(old, now=now, profile="cnsa2")


# -- proposals --------------------------------------------------------------------------------


def propose(document: RootDocument, signers: Iterable[Signer]) -> Envelope:
    """Return the next version with the signatures of those who are here."""
    return sign_statement(document.to_bytes(), ROOT_TYPE, *signers)


def sign_proposal(trust: Trust, envelope: Envelope, signers: Iterable[Signer]) -> Envelope:
    """Add signatures to a proposal that follows the newest root.

    Raises:
        RefusedError: `trust.chain`, it follows another root; `trust.root`, it breaks a rule;
            `seal.malformed`, a key signed already.

    """
    read_proposal(trust, envelope)
    return add_signature(envelope, *signers)


def read_proposal(trust: Trust, envelope: Envelope) -> RootDocument:
    """Return the version that a proposal wants; RefusedError `trust.chain` or `trust.root`."""
    if envelope.payload_type != ROOT_TYPE:
        raise RefusedError("trust.chain", "the file is no proposal of a trust root")
    document = parse_root(envelope.payload)
    if document.version != trust.version + 1:
        raise RefusedError(
            "trust.chain",
            f"the proposal is root {document.version}, the newest root here is {trust.version}",
            hint="bring the newest chain here (airgap trust import), or propose again",
        )
    return document


def missing_signers(trust: Trust, envelope: Envelope) -> str:
    """Say whose signatures a proposal still needs, or nothing."""
    new = parse_root(envelope.payload)
    lines: list[str] = []
    for judge in (trust.document, new):
        keyids = find_signers(envelope, judge.public_keys(), payload_type=ROOT_TYPE)
        able = {
            who
            for who, person in judge.people.items()
            if ROOT in person.roles and person.is_enrolled(new.issued)
        }
        signed = able & judge.people_of(keyids)
        if len(signed) < judge.thresholds.root.people:
            waiting = ", ".join(sorted(able - signed)) or "nobody"
            lines.append(
                f"{len(signed)} of {judge.thresholds.root.people} root people of version "
                f"{judge.version} signed; missing: {waiting}"
            )
    return "; ".join(lines)


def describe_change(old: RootDocument, new: RootDocument) -> list[str]:
    """Say what the next version changes, a line a change."""
    lines = [f"root {old.version} -> {new.version}"]
    for name in ("profile", "expires", "thresholds", "revocations"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            lines.append(f"{name}: {before} -> {after}")
    gone, come = old.keys.keys() - new.keys.keys(), new.keys.keys() - old.keys.keys()
    lines += [f"key out: {keyid} of {old.find_person(keyid)}" for keyid in sorted(gone)]
    lines += [
        f"key in:  {keyid} of {new.find_person(keyid)}, {new.keys[keyid].scheme}"
        for keyid in sorted(come)
    ]
    for who in sorted(old.people.keys() | new.people.keys()):
        before, after = old.people.get(who), new.people.get(who)
        if before is None or after is None:
            lines.append(f"person {'in' if before is None else 'out'}: {who}")
        elif (before.roles, before.valid_to, before.name) != (
            after.roles,
            after.valid_to,
            after.name,
        ):
            end = "" if after.valid_to is None else f", until {after.valid_to:%Y-%m-%d}"
            lines.append(f"person: {who}, {', '.join(after.roles)}{end}")
    return lines


def _with_people(threshold: Threshold, people: int | None) -> Threshold:
    return threshold if people is None else threshold.model_copy(update={"people": people})


def _person(old: RootDocument, person: str) -> str:
    if person not in old.people:
        raise RefusedError(
            "trust.root",
            f"{person!r:.64} is nobody in root {old.version}",
            hint="airgap trust show",
        )
    return person
