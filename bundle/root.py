"""One version of the trust root: who may sign what, with which keys, and how many must.

Decides whether such a document agrees with itself, and makes the next version of it, not signed.
`bundle.trust` holds the versions together as a chain. FORMAT.md section 9.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.fields import Document, Instant, KeyId, PersonId, Text, Token, format_time
from bundle.keys import (
    ED25519,
    MLDSA87,
    P384,
    SCHEMES,
    PublicKey,
    PublicKeyFile,
    decode_base64,
)
from bundle.manifest import Profile, first_problem
from policy.errors import RefusedError
from policy.terms import Digest

FORMAT: Literal["airgap-root/1"] = "airgap-root/1"
ROOT_TYPE = "application/vnd.airgap.root+json"
CHAIN_LIMIT = 2 * 1024 * 1024
MAX_PEOPLE = 16

# Each of these roles does one thing; whoever bears any other role is an approver.
ROOT, BUILDER = "root", "builder"
OFFICES = frozenset({ROOT, BUILDER, "policy", "revocation"})

# The kinds of keys that a person needs to count, by profile: one of a set, of every set.
_NEEDED: Mapping[Profile, tuple[frozenset[str], ...]] = {
    "default": (frozenset({ED25519, P384}),),
    "cnsa2": (frozenset({MLDSA87}), frozenset({P384})),
}


class KeyEntry(Document):
    """A public key; `public` is base64 of the raw form."""

    scheme: Token
    public: Annotated[str, Field(max_length=8192)]


class Person(Document):
    """A person, the keys that act for her, and what she may do; `valid_to` is absent while open."""

    name: Text
    keys: tuple[KeyId, ...] = Field(min_length=1, max_length=16)
    roles: tuple[Token, ...] = Field(min_length=1, max_length=16)
    valid_from: Instant
    valid_to: Instant | None = None

    @property
    def approves(self) -> bool:
        """Whether one of the roles is that of an approver."""
        return bool(set(self.roles) - OFFICES)

    def is_enrolled(self, at: datetime) -> bool:
        """Whether the enrolment holds at that time."""
        return self.valid_from <= at and (self.valid_to is None or at < self.valid_to)


class Threshold(Document):
    """How many distinct people must sign, and which roles must be among them."""

    people: Annotated[int, Field(ge=1, le=MAX_PEOPLE)]
    required_roles: tuple[Token, ...] = ()


class Thresholds(Document):
    """One threshold for each kind of signed document."""

    root: Threshold
    seal: Threshold
    policy: Threshold
    revocation: Threshold


class RevocationRule(Document):
    """What a host does without a revocation list, or with one that is stale. Absent: it alarms."""

    required: bool = False
    stale: Literal["alarm", "refuse"] = "alarm"


class RootDocument(Document):
    """The signed content of one version of the trust root."""

    format: Literal["airgap-root/1"] = FORMAT
    version: Annotated[int, Field(ge=1, le=999_999)]
    issued: Instant
    expires: Instant
    profile: Profile
    keys: dict[KeyId, KeyEntry]
    people: dict[PersonId, Person]
    thresholds: Thresholds
    revocations: RevocationRule | None = None

    def to_bytes(self) -> bytes:
        """Return the canonical form."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))

    @property
    def fingerprint(self) -> Digest:
        """What is read out or printed to compare two copies; signatures are not part of it."""
        return Digest.of(self.to_bytes())

    def find_person(self, keyid: str) -> str | None:
        """Return the id of the person that a key acts for."""
        return next((who for who, person in self.people.items() if keyid in person.keys), None)

    def count_signatures(self, keyids: Iterable[str]) -> Mapping[str, int]:
        """Return for each person how often she signed, from the ids of keys whose signatures hold.

        In the profile `cnsa2` an ML-DSA-87 signature and a P-384 signature are one; half of it is
        none, and the person is not in the result.
        """
        held: dict[str, list[str]] = {}
        for keyid in set(keyids):
            who = self.find_person(keyid)
            if who is not None:
                held.setdefault(who, []).append(self.keys[keyid].scheme)
        counts = {who: self._count(schemes) for who, schemes in held.items()}
        return {who: count for who, count in counts.items() if count}

    def people_of(self, keyids: Iterable[str]) -> frozenset[str]:
        """Return the people who signed, as the profile counts, whatever their roles."""
        return frozenset(self.count_signatures(keyids))

    def _count(self, schemes: Iterable[str]) -> int:
        found = list(schemes)
        return min(sum(each in kinds for each in found) for kinds in _NEEDED[self.profile])

    def public_keys(self) -> Mapping[str, PublicKey]:
        """Return the keys by key id."""
        return {
            keyid: PublicKey(entry.scheme, decode_base64(entry.public))
            for keyid, entry in self.keys.items()
        }


def with_keys(
    old: RootDocument, keys: Iterable[PublicKeyFile], *, now: datetime, name: str = ""
) -> RootDocument:
    """Return version n+1, not signed, in which the keys are enrolled; codes as `add_key`."""
    now = require_after(old, now)
    entries, people = dict(old.keys), dict(old.people)
    for key in keys:
        if key.keyid in entries:
            raise RefusedError("trust.root", f"key {key.keyid} is enrolled already")
        entries[key.keyid] = KeyEntry(scheme=key.scheme, public=key.public)
        known = people.get(key.person)
        if known is None:
            people[key.person] = Person(
                name=name or key.person, keys=(key.keyid,), roles=key.roles, valid_from=now
            )
        else:
            roles = tuple(dict.fromkeys([*known.roles, *key.roles]))
            people[key.person] = known.model_copy(
                update={"keys": (*known.keys, key.keyid), "roles": roles}
            )
    return next_version(old, now=now, keys=entries, people=people)


def next_version(old: RootDocument, *, now: datetime, **changes: Any) -> RootDocument:
    """Return version n+1, not signed, with these fields changed.

    Raises:
        RefusedError: `trust.root`, it breaks a rule; `trust.clock`, `now` lies before version n.

    """
    issued = require_after(old, now)
    update = {"version": old.version + 1, "issued": issued, **changes}
    return check_root(old.model_copy(update=update))


def require_after(old: RootDocument, now: datetime) -> datetime:
    """Return `now` in whole seconds; RefusedError `trust.clock` when it lies before the root."""
    now = now.replace(microsecond=0)
    if now < old.issued:
        raise RefusedError(
            "trust.clock",
            f"the clock of this host says {format_time(now)}, but root {old.version} was issued at "
            f"{format_time(old.issued)}",
            hint="set the clock right, then run it again",
        )
    return now


def parse_root(raw: bytes) -> RootDocument:
    """Turn the payload of a root envelope into a checked document; RefusedError `trust.root`."""
    parse_canonical(raw, code="trust.root", what="the root document", limit=CHAIN_LIMIT)
    try:
        document = RootDocument.model_validate_json(raw)
    except ValidationError as error:
        raise RefusedError("trust.root", f"the root document: {first_problem(error)}") from error
    if document.to_bytes() != raw:
        raise RefusedError("trust.root", "the root document writes a field in another form")
    return check_root(document)


def check_root(document: RootDocument) -> RootDocument:
    """Return the document; RefusedError `trust.root` if it contradicts itself."""
    problem = _root_problem(document)
    if problem:
        raise RefusedError("trust.root", f"root {document.version}: {problem}")
    return document


def _root_problem(document: RootDocument) -> str:
    if not document.issued < document.expires:
        return "it expires before it is issued"
    problem = _key_problem(document)
    if problem:
        return problem
    root_people = [
        who
        for who in document.people_of(document.keys)
        if ROOT in document.people[who].roles and document.people[who].is_enrolled(document.issued)
    ]
    if len(root_people) < document.thresholds.root.people:
        return (
            f"{len(root_people)} root people with the keys of profile {document.profile} "
            "cannot meet its own threshold"
        )
    return ""


def _key_problem(document: RootDocument) -> str:
    publics: set[bytes] = set()
    for keyid, entry in document.keys.items():
        try:
            key = PublicKey(entry.scheme, decode_base64(entry.public))
        except ValueError:
            return f"key {keyid} is not base64"
        if key.public in publics:
            return f"key {keyid} stands twice under different ids"
        publics.add(key.public)
        # A scheme of a later version may stand here, and counts for nothing.
        if key.scheme in SCHEMES and (not key.supported or key.keyid != keyid):
            return f"key {keyid} is not the key of that id"
    used = [keyid for person in document.people.values() for keyid in person.keys]
    if len(used) != len(set(used)):
        return "one key acts for two people"
    if set(used) != document.keys.keys():
        return "people and keys do not match"
    return ""
