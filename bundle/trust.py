"""The trust root: whose signatures count on this host, for what, and how many are needed.

A chain of root documents after the rule of TUF: version n+1 is signed by the thresholds of version
n and of version n+1, without a gap. The first document of the chain is believed because the host
holds it; it got there by a typed fingerprint. FORMAT.md section 9.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from bundle.canonical import canonical_json, parse_canonical
from bundle.durable import write_beside
from bundle.envelope import Envelope, find_signers, parse_envelope, sign_statement
from bundle.fields import Document, format_time
from bundle.keys import (
    PublicKeyFile,
    Signer,
    as_signers,
    read_limited,
)
from bundle.manifest import Profile, first_problem
from bundle.revocation import Revocations, require_newer, verify_revocations
from bundle.root import (
    CHAIN_LIMIT,
    ROOT,
    ROOT_TYPE,
    KeyEntry,
    Person,
    RevocationRule,
    RootDocument,
    Threshold,
    Thresholds,
    check_root,
    parse_root,
    with_keys,
)
from policy.errors import FaultError, RefusedError
from policy.terms import Digest

MAX_ROOTS = 256
VALID_FOR = timedelta(days=5 * 365)

_LISTED = re.compile(r"([1-9][0-9]{0,5})\.revocations\.json")
_NUMBERED = re.compile(r"([1-9][0-9]{0,5})\.root\.json")


@dataclass(frozen=True, slots=True)
class Trust:
    """A verified chain of roots, oldest first; `document` is the newest and the one that counts.

    `revocations` is the newest list that this host has seen.
    """

    chain: tuple[Envelope, ...]
    documents: tuple[RootDocument, ...]
    revocations: Revocations | None = None

    @property
    def document(self) -> RootDocument:
        """The newest root document."""
        return self.documents[-1]

    @property
    def version(self) -> int:
        """The version of the newest root document."""
        return self.document.version

    @property
    def fingerprint(self) -> Digest:
        """The fingerprint of the newest root document."""
        return self.document.fingerprint

    @property
    def standing(self) -> RootDocument:
        """The newest root without revoked keys and people: who counts for any act but a seal.

        A seal is judged with the list beside the root, to tell a revoked key from a foreign one.
        """
        return self.unrevoked(self.document)

    def unrevoked(self, root: RootDocument) -> RootDocument:
        """Return a root without the keys and people that the list of this trust revokes."""
        if self.revocations is None:
            return root
        listed = self.revocations.document
        people = {
            who: person.model_copy(update={"keys": kept})
            for who, person in root.people.items()
            if who not in listed.people
            and (kept := tuple(keyid for keyid in person.keys if keyid not in listed.keys))
        }
        kept_keys = {keyid for person in people.values() for keyid in person.keys}
        entries = {keyid: entry for keyid, entry in root.keys.items() if keyid in kept_keys}
        return root.model_copy(update={"people": people, "keys": entries})

    def alarms(self, now: datetime) -> tuple[str, ...]:
        """Return what a person must hear: no list where the root demands one, or a stale list.

        Raises:
            RefusedError: `trust.stale`; the root says that this host must then refuse.

        """
        rule = self.document.revocations or RevocationRule()
        if self.revocations is None:
            text = "there is no revocation list, and the trust root demands one"
            text, refuse = (text if rule.required else ""), True
        else:
            text, refuse = self.revocations.alarm(now), rule.stale == "refuse"
        if text and refuse:
            raise RefusedError(
                "trust.stale", text, hint="airgap trust import-revocations FILE, with a newer list"
            )
        return (text,) if text else ()

    def follow(self, chain: Trust) -> Trust:
        """Return a longer chain with the list of this one.

        Raises:
            RefusedError: `trust.chain`; a new root has enough signatures with revoked keys only.

        """
        held = len(self.chain)
        judges = chain.documents[held - 1 : -1]
        for envelope, judge, new in zip(
            chain.chain[held:], judges, chain.documents[held:], strict=True
        ):
            for each in (judge, new):  # whom the held list revokes makes no root any more
                _require_root_threshold(envelope, self.unrevoked(each), new)
        return replace(chain, revocations=self.revocations)


class _Chain(Document):
    """`META/trust.json`: the roots, and the revocation list if there is one."""

    format: Literal["airgap-trust/1"] = "airgap-trust/1"
    roots: tuple[dict[str, object], ...] = Field(min_length=1, max_length=MAX_ROOTS)
    revocations: dict[str, object] | None = None


# -- making -----------------------------------------------------------------------------------


def new_root(
    owner: PublicKeyFile | Sequence[PublicKeyFile],
    signers: Signer | Sequence[Signer],
    *,
    now: datetime,
    people: int = 2,
    required_roles: tuple[str, ...] = (),
    profile: Profile = "default",
    valid_for: timedelta = VALID_FOR,
) -> Trust:
    """Begin a trust root whose only person is `owner`, who bears the role `root`.

    Raises:
        RefusedError: `trust.root`; the owner has no such role, or not the keys that the profile
            needs, or a key is another one.

    """
    owned = (owner,) if isinstance(owner, PublicKeyFile) else tuple(owner)
    holding = as_signers(signers)
    first = owned[0]
    for each in owned:
        if ROOT not in each.roles or each.person != first.person:
            raise RefusedError(
                "trust.root",
                f"key {each.keyid} of {each.person} has no role `root`, or is another person's",
                hint=f"airgap keys new NAME --person {first.person} --role root",
            )
    one = Threshold(people=1)
    now = now.replace(microsecond=0)
    document = check_root(
        RootDocument(
            version=1,
            issued=now,
            expires=now + valid_for,
            profile=profile,
            keys={each.keyid: KeyEntry(scheme=each.scheme, public=each.public) for each in owned},
            people={
                first.person: Person(
                    name=first.person,
                    keys=tuple(each.keyid for each in owned),
                    roles=first.roles,
                    valid_from=now,
                )
            },
            thresholds=Thresholds(
                root=one,
                seal=Threshold(people=people, required_roles=required_roles),
                policy=one,
                revocation=one,
            ),
        )
    )
    return _verify_chain([sign_statement(document.to_bytes(), ROOT_TYPE, *holding)])


def add_key(
    trust: Trust,
    key: PublicKeyFile | Sequence[PublicKeyFile],
    signers: Iterable[Signer],
    *,
    now: datetime,
    name: str = "",
) -> Trust:
    """Enrol keys and their people in version n+1 of the root, signed by `signers`.

    Raises:
        RefusedError: `trust.root`, the key or one of its roles contradicts the root; `trust.chain`,
            the signers do not meet the thresholds.

    """
    given = (key,) if isinstance(key, PublicKeyFile) else tuple(key)
    return append_root(trust, with_keys(trust.document, given, now=now, name=name), signers)


def append_root(trust: Trust, document: RootDocument, signers: Iterable[Signer]) -> Trust:
    """Sign `document` as the next version and return the longer chain; codes as `add_key`."""
    return append_envelope(trust, sign_statement(document.to_bytes(), ROOT_TYPE, *signers))


def append_envelope(trust: Trust, envelope: Envelope) -> Trust:
    """Return the chain with one more root, which must follow it and be signed by enough people.

    Raises:
        RefusedError: `trust.chain` or `trust.root`.

    """
    return trust.follow(_verify_chain([*trust.chain, envelope]))


# -- reading ----------------------------------------------------------------------------------


def load_trust(folder: Path) -> Trust:
    """Read and verify the chain that this host keeps in `folder`.

    Raises:
        RefusedError: `trust.missing`, nothing there; `trust.chain`, `trust.root`, it does not hold.

    """
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise FaultError("host.io", f"{folder} cannot be read: {error.strerror}") from error
    versions = sorted(int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name)))
    if not versions:
        raise RefusedError(
            "trust.missing",
            f"{folder} holds no trust root: nobody is trusted, so nothing can be accepted",
            hint="airgap trust init --from root.json --fingerprint sha256:...",
        )
    raws = [
        read_limited(
            folder / f"{version}.root.json", CHAIN_LIMIT, code="trust.chain", what="the root"
        )
        for version in versions
    ]
    trust = _verify_chain([parse_envelope(raw, code="trust.chain") for raw in raws])
    for version, document in zip(versions, trust.documents, strict=True):
        if document.version != version:
            raise RefusedError(
                "trust.chain",
                f"{folder / f'{version}.root.json'} holds version {document.version}",
                hint="bring back the file of that version; an older root must not stand for it",
            )
    lists = sorted(int(found[1]) for name in names if (found := _LISTED.fullmatch(name)))
    return replace(trust, revocations=_load_list(folder, lists[-1], trust)) if lists else trust


def accept_revocations(trust: Trust, envelope: Envelope) -> Trust:
    """Return the trust with a list that the newest root's people signed and that is not older.

    Raises:
        RefusedError: `trust.revocation`.

    """
    offered, held = verify_revocations(envelope, [trust.document]), trust.revocations
    require_newer(held, offered)
    if held is not None and offered.document != held.document:
        verify_revocations(envelope, [trust.standing])  # whom the held list revokes issues none
    return replace(trust, revocations=offered)


def _load_list(folder: Path, version: int, trust: Trust) -> Revocations:
    """Read the list that this host keeps; it was accepted under one of the roots of the chain."""
    path = folder / f"{version}.revocations.json"
    raw = read_limited(path, CHAIN_LIMIT, code="trust.revocation", what="the revocation list")
    found = verify_revocations(
        parse_envelope(raw, code="trust.revocation", limit=CHAIN_LIMIT), reversed(trust.documents)
    )
    if found.version != version:
        raise RefusedError("trust.revocation", f"{path} holds list {found.version}")
    return found


def save_trust(trust: Trust, folder: Path) -> Path:
    """Write every root of the chain that `folder` lacks; return the path of `root.json`.

    A version that exists is compared and never replaced (RefusedError `trust.chain`).
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    link, fresh = folder / "root.json", folder / f".root.{os.getpid()}"
    with _held(folder):  # two that enrol at once must not write one version twice
        for envelope, document in zip(trust.chain, trust.documents, strict=True):
            path = folder / f"{document.version}.root.json"
            if os.path.lexists(path):
                held = read_limited(path, CHAIN_LIMIT, code="trust.chain", what="the root")
                if parse_envelope(held, code="trust.chain").payload != envelope.payload:
                    raise RefusedError(
                        "trust.chain",
                        f"{path} is another root of the same version",
                        hint="somebody enrolled at the same time: look at it, then run it again",
                    )
                continue
            write_beside(path, envelope.to_bytes(), 0o644)
        if trust.revocations is not None:
            path = folder / f"{trust.revocations.version}.revocations.json"
            if not os.path.lexists(path):
                write_beside(path, trust.revocations.envelope.to_bytes(), 0o644)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(f"{trust.version}.root.json")
        fresh.replace(link)
    return link


def import_root(raw: bytes, fingerprint: Digest) -> Trust:
    """Begin the trust of a host from one root document and its fingerprint, which a person typed.

    Raises:
        RefusedError: `trust.fingerprint`, it is another document; `trust.chain` or `trust.root`.

    """
    trust = _verify_chain([parse_envelope(raw.strip(b"\n"), code="trust.chain")])
    if trust.fingerprint != fingerprint:
        raise RefusedError(
            "trust.fingerprint",
            f"expected {fingerprint}, the root document has {trust.fingerprint}",
            hint="compare both with what `airgap trust show` prints on the staging host",
        )
    return trust


def chain_document(trust: Trust) -> bytes:
    """Return `META/trust.json`: the whole chain, for hosts that know an older version."""
    roots = [
        parse_canonical(envelope.to_bytes(), code="trust.chain", what="the root", limit=CHAIN_LIMIT)
        for envelope in trust.chain
    ]
    document: dict[str, object] = {"format": "airgap-trust/1", "roots": roots}
    if trust.revocations is not None:
        document["revocations"] = parse_canonical(
            trust.revocations.envelope.to_bytes(),
            code="trust.revocation",
            what="the revocation list",
            limit=CHAIN_LIMIT,
        )
    return canonical_json(document)


def follow_chain(trust: Trust, raw: bytes) -> Trust:
    """Return the host's trust, extended by newer roots that a bundle carries.

    The bundle's chain must agree with every version that the host holds and leave no gap; it never
    replaces an anchor.

    Raises:
        RefusedError: `trust.chain` or `trust.root`.

    """
    value = parse_canonical(raw, code="trust.chain", what="META/trust.json", limit=CHAIN_LIMIT)
    try:
        _Chain.model_validate_json(raw)  # the shape; each root is read from its own bytes below
    except ValidationError as error:
        raise RefusedError("trust.chain", f"META/trust.json: {first_problem(error)}") from error
    roots = [parse_envelope(canonical_json(entry), code="trust.chain") for entry in value["roots"]]
    carried = _verify_chain(roots)  # old links too: no byte of the head is free
    held = {document.version: document for document in trust.documents}
    for document in carried.documents:
        if held.get(document.version, document) != document:
            raise RefusedError(
                "trust.chain",
                f"the bundle carries another root of version {document.version} than this host",
                hint="compare fingerprints with `airgap trust show` on both hosts",
            )
    newer = [
        envelope
        for envelope, document in zip(carried.chain, carried.documents, strict=True)
        if document.version > trust.version
    ]
    longer = trust.follow(_verify_chain([*trust.chain, *newer])) if newer else trust
    entry = value.get("revocations")
    return longer if entry is None else _follow_list(longer, carried, entry)


def _follow_list(trust: Trust, carried: Trust, entry: object) -> Trust:
    """Take the list that a bundle carries if it is newer; an older one only has to be genuine.

    A newer list must be signed as the newest root says: a key that was taken out of the roots
    issues none any more.
    """
    code = "trust.revocation"
    envelope = parse_envelope(canonical_json(entry), code=code, limit=CHAIN_LIMIT)
    offered = verify_revocations(envelope, [*reversed(trust.documents), *carried.documents])
    held = trust.revocations
    if held is not None and offered.version < held.version:
        return trust
    return accept_revocations(trust, envelope) if offered != held else trust


def require_dated(trust: Trust, now: datetime) -> None:
    """Refuse to take a root or a revocation list that is dated after `now`.

    Once kept it could not be followed by one of the true date, and the host would be stuck.

    Raises:
        RefusedError: `trust.clock`.

    """
    dates = [(f"root {trust.version}", trust.document.issued)]
    if trust.revocations is not None:
        found = trust.revocations
        dates.append((f"revocation list {found.version}", found.document.issued))
    for what, issued in dates:
        if now < issued:
            raise RefusedError(
                "trust.clock",
                f"{what} is dated {format_time(issued)}, this host has {format_time(now)}",
                hint="set the clock of this host right; if it is, have the document made again",
            )


def newest_of(raw: bytes) -> int:
    """Return the version of the last root in `META/trust.json`; codes as `follow_chain`."""
    parse_canonical(raw, code="trust.chain", what="the chain of roots", limit=CHAIN_LIMIT)
    try:
        last = _Chain.model_validate_json(raw).roots[-1]
    except ValidationError as error:
        raise RefusedError("trust.chain", f"the chain of roots: {first_problem(error)}") from error
    return parse_root(parse_envelope(canonical_json(last), code="trust.chain").payload).version


# -- helpers ----------------------------------------------------------------------------------


def _verify_chain(envelopes: list[Envelope]) -> Trust:
    documents: list[RootDocument] = []
    for envelope in envelopes:
        document = parse_root(envelope.payload)
        if documents:
            previous = documents[-1]
            if document.version != previous.version + 1:
                raise RefusedError(
                    "trust.chain", f"root {previous.version} is followed by {document.version}"
                )
            if document.issued < previous.issued:
                # A person who was retired could otherwise date her act before the retirement.
                raise RefusedError(
                    "trust.chain",
                    f"root {document.version} is dated {format_time(document.issued)}, before root "
                    f"{previous.version} of {format_time(previous.issued)}",
                    hint="a root never lies before the one that it follows; have it made again",
                )
            if previous.profile == "cnsa2" and document.profile != "cnsa2":
                raise RefusedError(
                    "trust.chain",
                    f"root {document.version} goes back from cnsa2 to {document.profile}",
                    hint="a profile never weakens: begin a new root and import it by fingerprint",
                )
            _require_root_threshold(envelope, previous, document)
        _require_root_threshold(envelope, document, document)
        documents.append(document)
    return Trust(tuple(envelopes), tuple(documents))


def _require_root_threshold(envelope: Envelope, judge: RootDocument, new: RootDocument) -> None:
    """Refuse unless enough root people of `judge` signed `new`."""
    keyids = find_signers(envelope, judge.public_keys(), payload_type=ROOT_TYPE)
    people = {
        who
        for who in judge.people_of(keyids)
        if ROOT in judge.people[who].roles and judge.people[who].is_enrolled(new.issued)
    }
    needed = judge.thresholds.root.people
    if len(people) < needed:
        raise RefusedError(
            "trust.chain",
            f"root {new.version} is signed by {len(people)} of {needed} root people "
            f"of version {judge.version}",
            hint="have it signed by the holders of the root keys",
        )


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Wait for the folder and hold it, without a file of its own."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
