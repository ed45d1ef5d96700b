"""The record schema, version 1: what may stand on a line (docs/design/audit.md, 3).

A caller builds an `Event`; the owner of the log adds sequence, chain, clocks and identity and
writes one line. The schema of the line (`Record`) is the only one: an event is checked against it
when it is built, and `parse_line` checks the same rules on bytes that nobody trusts. Nothing that
a user or a model wrote has a field here.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, NamedTuple, Required, cast, get_args

import orjson
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from policy.errors import CODES, RefusedError
from policy.terms import Digest

MAX_LINE: Final = 16_384
MAX_INTEGER: Final = 2**53 - 1
FIRST_PREV: Final = "0" * 64

_CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

Whole = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Signed = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
Hex = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Sha256 = Annotated[str, StringConstraints(pattern="^sha256:[0-9a-f]{64}$")]
Ulid = Annotated[str, StringConstraints(pattern="^[0-7][0-9A-HJKMNP-TV-Z]{25}$")]
Name = Annotated[str, StringConstraints(pattern="^[ -~]{1,64}$")]
Word = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9._-]{1,64}$")]
Short = Annotated[str, StringConstraints(pattern="^[ -~]{0,256}$")]
Time = Annotated[str, StringConstraints(
    pattern=r"^[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9]\.[0-9]{6}Z$"
)]  # fmt: skip

Kind = Literal[
    "boot", "shutdown", "halt", "recovery", "heartbeat", "clock.step",
    "admission", "login",
    "enclave.seal", "enclave.exit", "enclave.incident",
    "decision", "inference", "denial", "egress.probe",
    "admin.install", "admin.update", "admin.rollback", "admin.trust", "admin.approval",
    "admin.hold", "admin.policy", "admin.keys",
    "admin.remove", "admin.backup", "admin.restore", "admin.bootstrap",
    "policy.load", "model.load", "key.rotate",
    "export", "prune", "spill.purge", "import.cosign", "verify.result",
]  # fmt: skip
KINDS: Final = get_args(Kind)
Phase = Literal["event", "intent", "chunk", "outcome"]
OutcomeWord = Literal["permit", "permit_with_obligations", "needs_approval", "deny"]
Auth = Literal["peercred", "self", "local"]

_STRICT: Final = ConfigDict(strict=True, extra="forbid")


@with_config(_STRICT)
class _Actor(TypedDict, total=False):
    uid: Required[Whole]
    auth: Required[Auth]
    name: Name
    role: Annotated[str, StringConstraints(pattern="^[ -~]{1,32}$")]


@with_config(_STRICT)
class _Decision(TypedDict, total=False):
    id: Required[Sha256]
    outcome: Required[OutcomeWord]
    rule: Annotated[str, StringConstraints(pattern="^[ -~]{1,128}$")]


@with_config(_STRICT)
class _Commit(TypedDict, total=False):
    commit: Required[Hex]
    bytes: Required[Whole]
    sealed: Sha256


_Tok = TypedDict("_Tok", {"in": Whole, "out": Whole})


@with_config(_STRICT)
class _Err(TypedDict):
    code: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+\.[a-z0-9_.-]+$", max_length=32)]


Value = str | int | bool | list[str]
_Data = dict[
    Annotated[str, StringConstraints(pattern="^[a-z0-9_]{1,32}$")],
    Short | Signed | bool | Annotated[list[Short], Field(max_length=48)],
]

_Input = TypedDict("_Input", {"in": _Commit}, total=False)  # `in` is a word of Python


@with_config(_STRICT)
class _Event(_Input, total=False):
    """What a caller gives."""

    kind: Required[Kind]
    phase: Required[Phase]
    req: Ulid
    actor: _Actor
    project: Word
    decision: _Decision
    policy: Sha256
    model: Sha256
    out: _Commit
    tok: _Tok
    lat_ms: Whole
    err: _Err
    src: Name
    label: Name
    part: Whole
    data: _Data


@with_config(_STRICT)
class _Record(_Event, total=False):
    """What the owner adds, and no caller."""

    v: Required[Literal[1]]
    seq: Required[Whole]
    prev: Required[Hex]
    ts: Required[Time]
    mono_ns: Required[Annotated[str, StringConstraints(pattern="^[0-9]{1,20}$")]]
    boot: Required[Annotated[str, StringConstraints(pattern="^[0-9a-f-]{36}$")]]
    host: Required[Annotated[str, StringConstraints(pattern="^[a-z0-9.-]{1,64}$")]]
    inst: Required[Ulid]


# The compiled validators: a log is verified at a hundred thousand lines a second.
_validate_event = TypeAdapter(_Event).validator.validate_python
_validate_record = TypeAdapter(_Record).validator.validate_python

Record = Mapping[str, Any]  # a parsed line that passed `parse_line`


class _Rule(NamedTuple):
    """Phases of a kind, the keys of its `data`, and whether a person must have acted."""

    phases: tuple[str, ...]
    data: dict[str, type]
    person: bool = False


_EVENT_ONLY: Final = ("event",)
_TWO: Final = ("intent", "outcome")
_ACT: Final[dict[str, type]] = {"object": str, "old": str, "new": str, "result": str}
# `parity` is what came of the vectors of a bundle on this host, a line a precision.
_TAKEN: Final = _ACT | {"parity": list}
# `evidence` cites what the act was about: approval of a rollback, inventory of a backup, ...
_KEPT_ACT: Final = _ACT | {"evidence": str}
_RANGE: Final[dict[str, type]] = {
    "first": int, "last": int, "root": str, "manifest": str, "format": str,
    "person_1": str, "person_2": str, "result": str,
}  # fmt: skip

RULES: Final[dict[str, _Rule]] = {
    "boot": _Rule(_EVENT_ONLY, {
        "version": str, "software": str, "vkey": str, "crypto": str, "mode": str,
        "seal_keys": list,
        "previous": str, "evidence": str, "reason": str, "person_1": str, "person_2": str,
    }),
    "shutdown": _Rule(_EVENT_ONLY, {"reason": str, "state": str}),
    "halt": _Rule(_EVENT_ONLY, {"reason": str, "state": str}),
    "recovery": _Rule(_EVENT_ONLY, {
        "bytes": int, "sha256": str, "file": str, "signed": int, "found": int, "reason": str,
    }),
    "heartbeat": _Rule(_EVENT_ONLY, {
        "anchored": int, "anchor_age_s": int, "free": int, "export_age_s": int, "state": str,
        "used_percent": int,
    }),
    "clock.step": _Rule(_EVENT_ONLY, {"drift_ms": int}),
    "admission": _Rule(_EVENT_ONLY, {"bundle": str, "result": str, "obligations": list}),
    "login": _Rule(_EVENT_ONLY, {"session": str}, person=True),
    "enclave.seal": _Rule(_EVENT_ONLY, {"rung": str, "profile": str, "evidence": str}),
    "enclave.exit": _Rule(_EVENT_ONLY, {
        "rung": str, "profile": str, "evidence": str, "status": int, "signal": int,
    }),
    "enclave.incident": _Rule(_EVENT_ONLY, {
        "rung": str, "profile": str, "evidence": str, "status": int, "signal": int, "reason": str,
    }),
    "decision": _Rule(_EVENT_ONLY, {"action": str, "resource": str}),
    "inference": _Rule(("intent", "chunk", "outcome"), {
        "task": str, "n": int, "seed": int, "max_new_tokens": int, "precision": str,
        "provider": str, "settings": str, "evidence": str, "screen": str, "tier": str,
        "samples": int, "result": str,
    }, person=True),
    "denial": _Rule(_EVENT_ONLY, {
        "count": int, "stage": str, "task": str, "tier": str,
    }, person=True),
    "egress.probe": _Rule(_TWO, {"probe": str, "result": str}),
    "policy.load": _Rule(_TWO, {"digest": str, "evidence": str, "seal": str, "result": str}),
    # `reason` and `previous`: why a daemon loads it, and in place of which release.
    "model.load": _Rule(_TWO, {
        "digest": str, "seal": str, "result": str, "reason": str, "previous": str,
    }),
    "key.rotate": _Rule(_EVENT_ONLY, {"use": str, "next": str, "epoch": int}, person=True),
    "export": _Rule(_TWO, _RANGE, person=True),
    "prune": _Rule(_TWO, _RANGE | {"profile": str}, person=True),
    "spill.purge": _Rule(_TWO, {
        "payload": str, "record": int, "reason": str, "person_1": str, "person_2": str,
        "result": str,
    }, person=True),
    "import.cosign": _Rule(_EVENT_ONLY, {
        "witness": str, "size": int, "time": str, "cosignature": str,
    }),
    "verify.result": _Rule(_EVENT_ONLY, {"verdict": str, "size": int, "anchored": int}),
} | {
    f"admin.{act}": _Rule(_TWO, _ACT, person=True)
    for act in ("trust", "approval", "hold", "policy", "keys", "remove")
} | {
    f"admin.{act}": _Rule(_TWO, _TAKEN, person=True) for act in ("install", "update")
} | {
    "admin.rollback": _Rule(_TWO, _KEPT_ACT | _TAKEN, person=True),
    "admin.bootstrap": _Rule(_TWO, _KEPT_ACT, person=True),
} | {  # the log is closed between what begins these and what ends them: no intent stays open
    f"admin.{act}": _Rule(_EVENT_ONLY, _KEPT_ACT, person=True) for act in ("backup", "restore")
}  # fmt: skip

# `data` keys that cite a file of `objects/`, beside `decision.id`.
OBJECT_KEYS: Final = frozenset({"evidence", "screen", "settings"})
# How an intent may end: `unknown` is written at the next start for one that a crash left open.
RESULTS: Final = frozenset({"complete", "failed", "refused", "cancelled", "unknown"})


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, as the caller knows it. The uid comes from the kernel, by way of the owner."""

    name: str
    role: str = ""


@dataclass(frozen=True, slots=True)
class DecisionRef:
    """The decision record that permits or denies: `id` is its digest, stored by `put_object`.

    `rule` names the deciding rule; for hazard rules only `HAZ`.
    """

    id: Digest | str
    outcome: str
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commitment to an input or output, and its length in bytes; see `commitment`."""

    commit: str
    bytes: int
    sealed: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """What a caller says happened. Building one checks it against the schema.

    Raises:
        RefusedError: `audit.record`; a field is missing, unknown, too long or not printable ASCII.

    """

    kind: str
    phase: str = "event"
    req: str = ""
    actor: Actor | None = None
    project: str = ""
    decision: DecisionRef | None = None
    policy: Digest | str = ""
    model: Digest | str = ""
    in_: Commit | None = None
    out: Commit | None = None
    tok: tuple[int, int] | None = None  # tokens read, tokens written
    lat_ms: int | None = None
    err: str = ""  # a code of `policy.errors`
    label: str = ""
    part: int | None = None
    data: Mapping[str, Value | Digest] | None = None

    def __post_init__(self) -> None:
        if self.err and self.err not in CODES:
            raise _bad(f"error code {self.err!r:.60} is not listed")
        check_event(self.fields(uid=0, auth="self"))

    def fields(self, *, uid: int, auth: Auth, src: str = "") -> dict[str, Any]:
        """Return the event as it stands in a record, with the actor that the owner vouches for.

        An act without a named person still has a uid where the kind asks for an actor.
        """
        rule = RULES.get(self.kind)
        actor: dict[str, Any] = {}
        if self.actor is not None or (rule is not None and rule.person):
            actor = {"uid": uid, "auth": auth}
            if self.actor is not None:
                actor |= _present(name=self.actor.name, role=self.actor.role)
        decision = self.decision and _present(
            id=str(self.decision.id), outcome=self.decision.outcome, rule=self.decision.rule
        )
        data = self.data and {
            key: str(value) if isinstance(value, Digest) else value
            for key, value in self.data.items()
        }
        fields = _present(
            kind=self.kind, phase=self.phase, req=self.req, actor=actor, project=self.project,
            decision=decision, policy=str(self.policy), model=str(self.model),
            out=self.out and _present(
                commit=self.out.commit, bytes=self.out.bytes, sealed=self.out.sealed
            ),
            tok=self.tok and {"in": self.tok[0], "out": self.tok[1]},
            lat_ms=self.lat_ms, err=self.err and {"code": self.err}, src=src, label=self.label,
            part=self.part, data=data,
        )  # fmt: skip
        if self.in_ is not None:
            fields["in"] = _present(
                commit=self.in_.commit, bytes=self.in_.bytes, sealed=self.in_.sealed
            )
        return fields


def check_event(fields: Mapping[str, Any]) -> None:
    """Return if these are the caller's fields of a valid record; RefusedError `audit.record`."""
    try:
        _validate_event(fields)
    except ValidationError as error:
        raise _bad(_first(error)) from None
    breach = _breach(fields)
    if breach:
        raise _bad(breach)


def encode(record: Mapping[str, Any]) -> bytes:
    """Return the line of a record, without its newline: keys sorted, no spaces, ASCII.

    Raises:
        RefusedError: `audit.record`; longer than `MAX_LINE`.

    """
    line = orjson.dumps(record, option=orjson.OPT_SORT_KEYS)
    if len(line) > MAX_LINE:
        raise _bad(f"a record of {len(line)} bytes; the limit is {MAX_LINE}")
    return line


def parse_line(line: bytes) -> Record:
    """Return the record on a line (without newline) that nobody trusts yet.

    Only the one canonical form passes: what `encode` writes is equal to RFC 8785 in this subset,
    so writing the parsed object again shows double keys, spaces, key order and odd escapes.

    Raises:
        RefusedError: `audit.record`.

    """
    if len(line) > MAX_LINE:
        raise _bad(f"a line of {len(line)} bytes; the limit is {MAX_LINE}")
    if not line.isascii() or b"\x7f" in line:
        raise _bad("not printable ASCII")
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _bad(f"not JSON: {error.msg:.80}") from None
    try:
        again = orjson.dumps(record, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:  # a lone surrogate, for one
        raise _bad(f"not in the subset: {error!s:.80}") from None
    if again != line:
        raise _bad("not in canonical form (double key, key order, space or escape)")
    try:
        _validate_record(record)
    except ValidationError as error:
        raise _bad(_first(error)) from None
    breach = _breach(record)
    if breach:
        raise _bad(breach)
    return cast("Record", record)


def citations(record: Mapping[str, Any]) -> list[str]:
    """Return the digests (`sha256:<hex>`) of the objects that a record cites."""
    cited = []
    if "decision" in record:
        cited.append(record["decision"]["id"])
    data = record.get("data")
    if data and not OBJECT_KEYS.isdisjoint(data):
        cited += [data[key] for key in sorted(OBJECT_KEYS & data.keys())]
    return cited


def sealed_payloads(record: Mapping[str, Any]) -> list[str]:
    """Return the digests (`sha256:<hex>`) of the encrypted payloads that a record names."""
    return [record[side]["sealed"] for side in ("in", "out") if "sealed" in record.get(side, ())]


def commitment(payload: bytes, nonce: bytes) -> Commit:
    """Commit to `payload` under 32 random bytes of `nonce` that nobody else ever sees.

    Without the nonce a short prompt cannot be guessed from its commitment; with the nonce dropped,
    the commitment can never be opened.
    """
    if len(nonce) != 32:  # noqa: PLR2004 - the design's length
        raise ValueError("a nonce has 32 bytes")
    return Commit(hashlib.sha256(nonce + payload).hexdigest(), len(payload))


def new_ulid(wall_ns: int | None = None, random: bytes | None = None) -> str:
    """Return a fresh ULID: 48 bits of milliseconds, 80 random bits."""
    milliseconds = (time.time_ns() if wall_ns is None else wall_ns) // 1_000_000
    tail = int.from_bytes(os.urandom(10) if random is None else random)
    number = (max(0, milliseconds) % 2**48) << 80 | tail
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def printable(text: str) -> str:
    """Return text as `data` takes it: other characters than printable ASCII as question marks."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:256]


def timestamp(wall_ns: int) -> str:
    """Return UTC text with microseconds for nanoseconds since 1970."""
    whole, rest = divmod(wall_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(whole, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


def _breach(fields: Mapping[str, Any]) -> str:
    """Return what a record lacks or has too much by the table of kinds; empty if nothing."""
    kind, phase = fields["kind"], fields["phase"]
    rule = RULES[kind]
    if phase not in rule.phases:
        return f"{kind} has no phase {phase}"
    if phase != "event" and "req" not in fields:
        return f"{kind} {phase} needs req"
    if rule.person and "actor" not in fields:
        return f"{kind} needs an actor"
    data = fields.get("data")
    breach = _data_breach(kind, phase, data) if data or phase == "outcome" else ""
    check = _BY_KIND.get(kind)
    return breach or (check(fields) if check else "")


def _data_breach(kind: str, phase: str, data: Mapping[str, Any] | None) -> str:
    data = data or {}
    known = RULES[kind].data
    for key, value in data.items():
        if known.get(key) is not type(value):
            return f"{kind} takes no data.{key} of this type"
    if phase == "outcome" and data.get("result") not in RESULTS:
        return f"an outcome needs data.result, one of {', '.join(sorted(RESULTS))}"
    if not OBJECT_KEYS.isdisjoint(data):
        for key in OBJECT_KEYS & data.keys():
            if not _DIGEST.fullmatch(data[key]):
                return f"data.{key} is not a digest"
    return ""


def _inference_breach(fields: Mapping[str, Any]) -> str:
    phase = fields["phase"]
    if phase == "outcome" and fields["data"]["result"] == "complete":
        if "err" in fields:
            return "a complete inference takes no err"
        phase = "complete outcome"
    missing = _INFERENCE[phase] - fields.keys()
    return f"an inference {phase} needs {min(missing)}" if missing else ""


def _denial_breach(fields: Mapping[str, Any]) -> str:
    return "" if "decision" in fields or "err" in fields else "a denial needs a decision or err"


def _decision_breach(fields: Mapping[str, Any]) -> str:
    return "" if "decision" in fields and "project" in fields else "needs decision and project"


_BY_KIND: Final = {
    "inference": _inference_breach,
    "denial": _denial_breach,
    "decision": _decision_breach,
}
_INFERENCE: Final = {
    "intent": frozenset({"project", "decision", "model", "in"}),
    "chunk": frozenset({"project", "part", "out"}),
    "outcome": frozenset({"project"}),
    "complete outcome": frozenset({"project", "out", "tok"}),
}
_DIGEST: Final = re.compile("sha256:[0-9a-f]{64}")


def _present(**fields: Any) -> dict[str, Any]:
    """Return the fields that say something; zero does."""
    return {k: v for k, v in fields.items() if v is not None and v not in ("", {})}


def _first(error: ValidationError) -> str:
    """Return the place and kind of the first fault, never the value."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    return f"{place or 'record'}: {found['msg']}"[:200]


def _bad(message: str) -> RefusedError:
    return RefusedError("audit.record", message)
