"""Held requests: what was held, how named people release it, and who gets the answer then.

Obeys docs/design/policy.md, 7 and 11.

A hold is a file of the tree: who asked for what, at which stage it was held, and the decision. What
the model wrote is not kept in it, only a commitment; with a hold key in the tree it lies beside,
encrypted to the people who review holds. A release is a signed statement over the exact hold, by
people other than the requester; the rules then judge it like any approval. Taking up a released
hold runs the same job with the same seed: the answer is the one that was held, or it is held anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import Field, StringConstraints, ValidationError

from airgap.approvals import ProjectId
from airgap.audit import commitment
from airgap.audit.layout import Layout
from airgap.signed import Day, keep, read_folder, signers_of
from bundle.canonical import canonical_json, parse_canonical
from bundle.durable import write_beside
from bundle.envelope import Envelope, add_signature
from bundle.fields import DigestText, Document, Instant, Sha256Hex, Text
from bundle.intoto import Kind, Statement
from bundle.keys import Signer, read_limited
from bundle.manifest import first_problem
from bundle.root import RootDocument
from policy.approvals import Approval, Approver, same_person
from policy.errors import FaultError, RefusedError
from policy.terms import URI_BASE, Digest

FOLDER = "holds"
RELEASES = Path("policy") / "releases"
KEY_FILE = Path("keys") / "hold.pub"
HOLD_LIMIT = 32 * 1024 * 1024
RECORD_LIMIT = 8 * 1024 * 1024
CHAIN = 8  # holds of one request, one after another
SAMPLE = 8  # of so many quiet flags one is drawn for review
RELEASERS = 2  # people from whom on a hold no longer counts as probing
_INFO = b"airgap/held-output/1"
_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
_REFERENCE = re.compile(r"(?P<origin>[^#]{1,200})#(?P<seq>0|[1-9][0-9]{0,15})")
_REQUEST = re.compile("[0-7][0-9A-HJKMNP-TV-Z]{25}")

Ulid = Annotated[str, StringConstraints(pattern="^[0-7][0-9A-HJKMNP-TV-Z]{25}$")]
Stage = Literal["input", "output"]


class HeldOutput(Document):
    """A commitment to the answer that was held: SHA-256 over the nonce and the answer."""

    commit: Sha256Hex
    nonce: Sha256Hex


class Hold(Document):
    """A held request. `job` is JSON of its inputs and options; `parent` a hold released before."""

    format: Literal["airgap-hold/1"] = "airgap-hold/1"
    request: Ulid
    reference: Text
    opened: Instant
    person: Text
    project: ProjectId
    task: Text
    stage: Stage
    bundle: DigestText
    decision: DigestText
    restricted: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    job: Annotated[str, Field(max_length=HOLD_LIMIT)]
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] | None = None
    parent: Annotated[str, Field(pattern="^([0-7][0-9A-HJKMNP-TV-Z]{25})?$")] = ""
    output: HeldOutput | None = None

    def to_bytes(self) -> bytes:
        """The canonical form: what a release is about."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))

    @property
    def digest(self) -> Digest:
        """Identity of the hold."""
        return Digest.of(self.to_bytes())

    @property
    def seq(self) -> int:
        """Record of the log that its reference names."""
        found = _REFERENCE.fullmatch(self.reference)
        return int(found["seq"]) if found else -1

    def inputs_and_options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was asked for, with the seed that was used."""
        job = json.loads(self.job)
        options = dict(job["options"])
        if self.seed is not None:
            options["seed"] = self.seed
        return dict(job["inputs"]), options


class Release(Document):
    """What is released: one hold, by its digest, until a day."""

    format: Literal["airgap-release/1"] = "airgap-release/1"
    reference: Text
    person: Text
    project: ProjectId
    task: Text
    stage: Stage
    reason: Text
    issued: Instant
    expires: Day
    document: DigestText | None = None


RELEASE = Kind(
    Statement[Release],
    f"{URI_BASE}release/v1",
    subject="hold",
    code="hold.release",
    what="the release",
)


@dataclass(frozen=True, slots=True)
class Signed:
    """A release with the people whose signatures hold, the requester not among them."""

    envelope: Envelope
    release: Release
    about: Digest
    people: tuple[Approver, ...]


@dataclass(frozen=True, slots=True)
class Alert:
    """A quiet flag: the whole record of a decision at tier H1, and the commitment in the log."""

    commit: str
    record: Mapping[str, Any]
    classes: tuple[str, ...]

    @property
    def drawn(self) -> bool:
        """Whether it belongs to the sample that is reviewed: one in `SAMPLE`, by its commitment."""
        return int(self.commit[:8], 16) % SAMPLE == 0


# -- releases -------------------------------------------------------------------------------------


def word_release(
    hold: Hold, *, reason: str, issued: datetime, expires: date, document: Digest | None
) -> Statement[Release]:
    """Word a release of `hold`; RefusedError `hold.release` for what a statement cannot say."""
    with RELEASE.worded():
        release = Release(
            reference=hold.reference,
            person=hold.person,
            project=hold.project,
            task=hold.task,
            stage=hold.stage,
            reason=reason,
            issued=issued,
            expires=expires,
            document=None if document is None else str(document),
        )
    return RELEASE.draft(release, hold.digest)


def countersign_release(envelope: Envelope, signer: Signer) -> Envelope:
    """Sign a release as a further person."""
    RELEASE.parse(envelope.payload)
    return add_signature(envelope, signer)


def verify_release(envelope: Envelope, trust: RootDocument) -> Signed:
    """Return a release with the people who count, there may be none; code `hold.release`."""
    statement = RELEASE.parse(envelope.payload)
    release = statement.predicate
    people = signers_of(envelope, trust, at=release.issued)
    return Signed(
        envelope=envelope,
        release=release,
        about=statement.about,
        people=tuple(p for p in people if same_person(p.person) != same_person(release.person)),
    )


# -- holds of a tree ------------------------------------------------------------------------------


class Holds:
    """The holds of one tree; `person` is who works here, as site.toml names the person."""

    def __init__(self, root: Path, trust: RootDocument, person: str = "") -> None:
        self._root, self._trust, self._person = root, trust, person
        self._folder = root / FOLDER

    def keep(self, hold: Hold, content: bytes | None = None) -> None:
        """Write a hold durably, and what the model wrote if there is a key to encrypt it to."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if content is not None and (key := self.public_key()) is not None:
            write_beside(
                self._folder / f"{hold.request}.sealed", _SUITE.encrypt(content, key, _INFO)
            )
        write_beside(self._folder / f"{hold.request}.json", hold.to_bytes())

    def commit(self, content: bytes) -> HeldOutput:
        """Commit to an answer."""
        nonce = os.urandom(32)
        return HeldOutput(commit=commitment(content, nonce).commit, nonce=nonce.hex())

    def every(self) -> list[Hold]:
        """Return every hold, oldest first; RefusedError `hold.file` for a file that is none."""
        paths = sorted(self._folder.glob("*.json")) if self._folder.is_dir() else []
        return [self._read(path) for path in paths]

    def find(self, name: str) -> Hold:
        """Return the hold of a reference, its number, or a request; RefusedError `hold.missing`."""
        found = [
            hold
            for hold in self.every()
            if name in {hold.reference, hold.request, str(hold.seq), f"#{hold.seq}"}
        ]
        if len(found) != 1:
            raise RefusedError(
                "hold.missing",
                f"{len(found)} holds answer to {name!r:.80}",
                hint="airgap hold list shows their references",
            )
        return found[0]

    def releases(self, hold: Hold) -> list[Signed]:
        """Return the releases of `hold`, those of most people first."""
        found = [verify_release(each, self._trust) for each in read_folder(self._root / RELEASES)]
        about = [each for each in found if each.about == hold.digest]
        return sorted(about, key=lambda each: (-len(each.people), -each.release.issued.timestamp()))

    def add_release(self, envelope: Envelope) -> Path:
        """Keep a release where it is found; signatures added later replace the file."""
        return keep(envelope, self._root / RELEASES)

    def decision(self, hold: Hold) -> dict[str, Any]:
        """Return the whole record of the decision that held it; FaultError `audit.object`."""
        if hold.restricted:
            return self._restricted(self._root / "restricted" / f"{hold.restricted}.json")
        wanted = Digest.parse(hold.decision)
        path = Layout(self._root / "audit").object(wanted.hex)
        raw = read_limited(path, RECORD_LIMIT, code="hold.file", what="the decision")
        if Digest.of(raw) != wanted:
            raise RefusedError("hold.file", f"{path} is not the record that the hold cites")
        return dict(json.loads(raw))

    def _restricted(self, path: Path) -> dict[str, Any]:
        raw = read_limited(path, RECORD_LIMIT, code="hold.file", what="the decision")
        try:
            document = json.loads(raw)
            content, nonce = document["record"].encode(), bytes.fromhex(document["nonce"])
            if commitment(content, nonce).commit == path.stem:
                return dict(json.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FaultError("audit.object", f"{path} is no restricted record: {error}") from error
        raise RefusedError("hold.file", f"{path} is not the record that was committed")

    def alerts(self) -> list[Alert]:
        """Return the quiet flags of tier H1, oldest first: what was released all the same."""
        folder = self._root / "restricted"
        found = []
        for path in folder.glob("*.json") if folder.is_dir() else ():
            record = self._restricted(path)
            facts = {each["name"]: each.get("value") for each in record["facts"]}
            if facts.get("screen.tier") == 1 and facts.get("screen.status") == "complete":
                found.append(Alert(path.stem, record, tuple(facts.get("screen.classes") or ())))
        return sorted(found, key=lambda each: (each.record["known_at"], each.commit))

    def blocking(self, hold: Hold) -> dict[str, int]:
        """Return the rules that held it, with the versions that did."""
        return {
            str(each["rule"]): int(each["version"])
            for each in self.decision(hold)["reasons"]
            if each["effect"] in {"deny", "needs_approval"} and "overridden" not in each["state"]
        }

    def approval_of(self, hold: Hold, signed: Signed) -> Approval:
        """Turn a release into the approval that the rules judge."""
        release = signed.release
        return Approval(
            digest=Digest.of(signed.envelope.payload),
            rules=self.blocking(hold),
            approvers=signed.people,
            reason=release.reason,
            bundle=Digest.parse(hold.bundle),
            project=hold.project,
            task=hold.task,
            issued=release.issued,
            expires=release.expires,
            document=None if release.document is None else Digest.parse(release.document),
        )

    def released(
        self,
        taken_up: str,
        *,
        stage: Stage,
        bundle: Digest,
        project: str,
        task: str,
        job: tuple[Mapping[str, Any], Mapping[str, Any]],
        content: bytes | None,
    ) -> tuple[Approval, ...]:
        """Return the approvals by which the hold `taken_up` lets this very job pass at `stage`.

        None where anything differs from what was held: person, bundle, project, task, inputs,
        options, or for an output the answer itself.
        """
        for hold in self._chain(taken_up):
            same = (hold.person, hold.bundle, hold.project, hold.task) == (
                *(self._person, str(bundle), project, task),
            )
            if hold.stage != stage or not same or not _same_job(hold, job):
                continue
            if stage == "output" and not _is_held(hold, content):
                continue
            return tuple(
                self.approval_of(hold, each) for each in self.releases(hold) if each.people
            )
        return ()

    def settled(self) -> frozenset[int]:
        """Return the records of holds that enough people released: these are no probing."""
        return frozenset(
            hold.seq
            for hold in self.every()
            if any(len(each.people) >= RELEASERS for each in self.releases(hold))
        )

    def taken_up(self, request: str) -> Hold:
        """Return one's own hold of that request; RefusedError `hold.missing`."""
        for hold in self._chain(request):
            return hold
        raise _not_yours()

    def answer_of(self, hold: Hold) -> Hold | None:
        """Return the newest hold of what the model wrote for the released input `hold`."""
        mine = (hold.request, "output", hold.person, hold.bundle, hold.job)
        found = [
            each
            for each in (self.every() if hold.stage == "input" else ())
            if (each.parent, each.stage, each.person, each.bundle, each.job) == mine
        ]
        return max(found, key=lambda each: (each.opened, each.request), default=None)

    def close(self, request: str, answer: str) -> None:
        """Note the reference of the answer that a hold led to."""
        for hold in self._chain(request):
            write_beside(self._folder / f"{hold.request}.answered", answer.encode())

    def purge(self, hold: Hold) -> list[str]:
        """Remove a hold with what was typed and written; its records stay in the log."""
        names = [f"{hold.request}{end}" for end in (".sealed", ".answered", ".json")]
        gone = [name for name in names if (self._folder / name).exists()]
        for name in gone:
            (self._folder / name).unlink(missing_ok=True)
        return gone

    def answered(self, hold: Hold) -> str:
        """Return the reference of the answer, empty while there is none."""
        path = self._folder / f"{hold.request}.answered"
        with contextlib.suppress(OSError):
            return path.read_text(encoding="utf-8")[:300]
        return ""

    # -- the key of those who review ---------------------------------------------------------------

    def public_key(self) -> X25519PublicKey | None:
        """Return the key that outputs are encrypted to; None where the tree has none."""
        path = self._root / KEY_FILE
        try:
            raw = path.read_bytes()[:4096]
        except FileNotFoundError:
            return None
        try:
            key = serialization.load_pem_public_key(raw)
        except ValueError as error:
            raise RefusedError("hold.key", f"{path} is no public key: {error!s:.80}") from error
        if not isinstance(key, X25519PublicKey):
            raise RefusedError("hold.key", f"{path} is no X25519 key")
        return key

    def open_output(self, hold: Hold, key: X25519PrivateKey) -> bytes:
        """Decrypt what the model wrote; RefusedError `hold.key` or `hold.missing`."""
        path = self._folder / f"{hold.request}.sealed"
        try:
            sealed = read_limited(path, HOLD_LIMIT, code="hold.missing", what="the held output")
        except FaultError as error:
            raise RefusedError(
                "hold.missing",
                f"no output is kept for {hold.reference}",
                hint="outputs are kept where keys/hold.pub was there when they were held",
            ) from error
        try:
            return bytes(_SUITE.decrypt(sealed, key, _INFO))
        except (InvalidTag, ValueError) as error:
            raise RefusedError("hold.key", "this key does not open that output") from error

    # -- files -------------------------------------------------------------------------------------

    def _chain(self, request: str) -> Iterator[Hold]:
        """Yield the hold and those whose release it needed before."""
        for _ in range(CHAIN):
            if not request:
                return
            path = self._folder / f"{request}.json"
            if not _REQUEST.fullmatch(request) or not path.exists():  # it names a file
                raise _not_yours()
            hold = self._read(path)
            if hold.person != self._person:
                raise _not_yours()
            yield hold
            request = hold.parent

    def _read(self, path: Path) -> Hold:
        raw = read_limited(path, HOLD_LIMIT + 65_536, code="hold.file", what="the hold")
        parse_canonical(raw, code="hold.file", what=path.name, limit=HOLD_LIMIT + 65_536)
        try:
            hold = Hold.model_validate_json(raw)
        except ValidationError as error:
            raise RefusedError("hold.file", f"{path}: {first_problem(error)}") from error
        if hold.to_bytes() != raw or path.stem != hold.request:
            raise RefusedError("hold.file", f"{path} is not a hold of that name")
        return hold


def _not_yours() -> RefusedError:
    """Say the same of a hold of somebody else and of one that is not there."""
    return RefusedError(
        "hold.missing",
        "you have no hold of that request",
        hint="airgap hold list shows yours; airgap hold fetch takes one up",
    )


def job_text(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Write inputs and options in one form, the seed apart."""
    kept = {name: value for name, value in options.items() if name != "seed"}
    document = {"inputs": dict(inputs), "options": kept}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def new_key() -> tuple[bytes, X25519PrivateKey]:
    """Make a key for those who review holds; return its public half as PEM, and the key."""
    key = X25519PrivateKey.generate()
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return public, key


def _same_job(hold: Hold, job: tuple[Mapping[str, Any], Mapping[str, Any]]) -> bool:
    inputs, options = job
    seed = options.get("seed")
    return job_text(inputs, options) == hold.job and (hold.seed is None or seed == hold.seed)


def _is_held(hold: Hold, content: bytes | None) -> bool:
    if content is None or hold.output is None:
        return False
    nonce = bytes.fromhex(hold.output.nonce)
    return commitment(content, nonce).commit == hold.output.commit
