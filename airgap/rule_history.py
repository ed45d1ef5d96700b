"""Which rules this host had loaded when: each load is on record, with the files themselves.

Obeys docs/design/policy.md, 6. A record of the log names rules by digest alone. So that a decision
can be made again years later, every session and install first puts the files of its rules into the
log as one object, and the record `policy.load` cites it. A set that was kept before is not stored
again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airgap.rules import Rules, Source, rules_of
from policy.canonical import canonical_bytes
from policy.engine import NO_APPROVALS, Decision, decide
from policy.errors import RefusedError
from policy.lineage import Ruling
from policy.record import instant
from policy.replay import request_of_record, times_of_record
from policy.terms import Digest

if TYPE_CHECKING:
    from airgap.audit.service import Log
    from airgap.dossier.usage import LogFacts
    from policy.approvals import Approvals

FORMAT = "airgap/rules-kept/1"
KIND = "policy.load"
CODE = "policy.known_at"
_HINT = "airgap audit show --kind policy.load lists what was loaded, and when"


def put_on_record(log: Log, rules: Rules) -> Digest:
    """Keep the files of these rules in the log and put their load on record, durably."""
    from airgap.audit import Event, new_ulid  # noqa: PLC0415 - readers need no writer

    kept = log.put_object(canonical_bytes(_document(rules)))
    request = new_ulid()
    data: dict[str, str | Digest] = {"digest": kept, "evidence": kept}
    log.append(Event(KIND, "intent", req=request, data=data))
    log.append(Event(KIND, "outcome", req=request, data={**data, "result": "complete"}))
    return kept


@dataclass(frozen=True, slots=True)
class Load:
    """One load of rules, as the log has it."""

    seq: int
    at: datetime
    kept: str


@dataclass(frozen=True, slots=True)
class History:
    """The loads of rules that a log tells of; the log was verified before."""

    folder: Path
    loads: tuple[Load, ...]
    first: int

    @classmethod
    def of(cls, folder: Path, log: LogFacts) -> History:
        """Read the loads of a log in one pass."""
        from airgap.dossier.usage import signed_records  # noqa: PLC0415 - as above

        loads = tuple(
            Load(record["seq"], datetime.fromisoformat(record["ts"]), record["data"]["evidence"])
            for record in signed_records(folder, log)
            if record["kind"] == KIND and record["phase"] == "outcome"
            # Before evidence was kept, a load had none.
            if record["data"].get("result") == "complete" and "evidence" in record["data"]
        )
        return cls(folder, loads, log.first)

    def rules_at(self, moment: datetime) -> Rules:
        """The rules that this host had loaded last by `moment`.

        Raises:
            RefusedError: `policy.known_at`, no load is on record by then; `audit.object`, what it
                cites is gone; `pack.*`, this release does not read it.

        """
        before = [each for each in self.loads if each.at <= moment]
        if not before:
            found = f"the first was at {instant(self.loads[0].at)}" if self.loads else "none is"
            pruned = f", and records before {self.first} are no longer here" if self.first else ""
            raise RefusedError(
                CODE,
                f"which rules were held at {instant(moment)} is not on record: no load of rules by"
                f" then, {found}{pruned}",
                hint=_HINT,
            )
        return self.rules_of(before[-1])

    def rules_of(self, load: Load) -> Rules:
        """The rules of one load; codes as `rules_at`."""
        from airgap.dossier.usage import read_object  # noqa: PLC0415 - as above

        return _read(read_object(self.folder, load.kept))

    def before(self, seq: int) -> Iterator[Load]:
        """The loads before a record, the newest first, each set of rules once."""
        seen: set[str] = set()
        for load in reversed(self.loads):
            if load.seq < seq and load.kept not in seen:
                seen.add(load.kept)
                yield load


# -- a decision made again ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replay:
    """A decision that was made again; `differs` names the first field that is another, or is ""."""

    digest: str
    outcome: str
    decision: Decision
    differs: str

    @property
    def same(self) -> bool:
        """Whether the record came out the same to the byte."""
        return not self.differs


def replay(
    document: Mapping[str, Any],
    rules: Rules,
    approvals: Approvals = NO_APPROVALS,
    *,
    leads: frozenset[str] = frozenset(),
) -> Replay:
    """Make the decision of a whole record again, at its own times, and compare the bytes.

    Raises:
        RefusedError: `policy.record`, it is no whole record.

    """
    request = request_of_record(document, leads=leads)
    as_of, known_at = times_of_record(document)
    decision = decide(
        request,
        rules.packs,
        rules.lists,
        rules.registry,
        approvals,
        as_of=as_of,
        known_at=known_at,
    )
    before = canonical_bytes(dict(document))
    differs = "" if decision.canonical == before else _first_difference(document, decision)
    return Replay(str(Digest.of(before)), str(document["outcome"]), decision, differs)


def made_with(document: Mapping[str, Any], rules: Rules) -> str:
    """Say which pack, list or registry of a record these rules are not; "" when they are its own.

    Lists are those that were held at the time of the record.
    """
    have = {str(each.digest) for each in rules.packs.packs}
    editions = {str(each.digest) for each in rules.lists.snapshots}
    try:
        packs = {
            each["digest"]: f"{each['pack_id']} {each['version']}" for each in document["packs"]
        }
        lists = {
            each["digest"]: f"{each['list_id']} {each['edition']}"
            for each in document["lists"]
            if each["digest"] is not None
        }
        _, known_at = times_of_record(document)
        registry = document["registry"]["digest"]
    except (KeyError, TypeError) as error:
        raise RefusedError("policy.record", f"the record is malformed: {error!s:.120}") from error
    missing = [f"pack {name}, {digest}" for digest, name in packs.items() if digest not in have]
    missing += [f"list {name}, {d}" for d, name in lists.items() if d not in editions]
    if not missing and len(have) != len(packs):
        missing = ["a pack more than the record names"]
    if str(rules.registry.known_by(known_at).digest) != registry:
        missing.append(f"registry {registry}")
    return "; ".join(missing)


def _first_difference(document: Mapping[str, Any], decision: Decision) -> str:
    made = json.loads(decision.canonical)
    return next(
        (key for key in sorted({*made, *document}) if made.get(key) != document.get(key)), "form"
    )


# -- the object in the log ------------------------------------------------------------------------


def _document(rules: Rules) -> dict[str, Any]:
    """What is kept; the signatures were checked at the load, and the log stands for that."""
    if not rules.sources:
        raise TypeError("these rules were not loaded from files")
    return {
        "format": FORMAT,
        "files": [
            {"name": each.name, "own": each.own, "text": each.content.decode()}
            for each in rules.sources
        ],
        "rulings": [
            _ruling_document(each) for each in rules.registry.rulings if each.expires is not None
        ],
    }


def _ruling_document(ruling: Ruling) -> dict[str, Any]:
    return {
        **asdict(ruling),
        "people": list(ruling.people),
        "expires": None if ruling.expires is None else ruling.expires.isoformat(),
        "issued": None if ruling.issued is None else instant(ruling.issued),
        "digest": str(ruling.digest),
    }


def _read(document: Mapping[str, Any]) -> Rules:
    if document.get("format") != FORMAT:
        raise RefusedError(
            CODE, f"expected rules kept as {FORMAT}, found {document.get('format')!r:.60}"
        )
    try:
        sources: Sequence[Source] = [
            Source(each["name"], each["text"].encode(), each["own"]) for each in document["files"]
        ]
        rulings = [
            Ruling(
                **{
                    **each,
                    "people": tuple(each["people"]),
                    "expires": None
                    if each["expires"] is None
                    else date.fromisoformat(each["expires"]),
                    "issued": None
                    if each["issued"] is None
                    else datetime.fromisoformat(each["issued"]),
                    "digest": Digest.parse(each["digest"]),
                }
            )
            for each in document["rulings"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(
            CODE, f"the rules that were kept are malformed: {error!s:.80}"
        ) from error
    return rules_of(sources, rulings)
