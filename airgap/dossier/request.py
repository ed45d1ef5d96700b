"""The dossier of one request: what the rules were asked, why they said so, and the proof of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from airgap.audit.layout import Layout, read_lines
from airgap.audit.receipt import Receipt
from airgap.audit.record import Record
from airgap.audit.tiles import Node, inclusion_path
from airgap.dossier.page import Page, Section
from airgap.dossier.reports import About, banner_of, log_section, page_of
from airgap.dossier.usage import LogFacts, read_object, signed_records
from bundle.merkle import leaf_hash
from bundle.merkle import root as merkle_root
from policy.errors import RefusedError

LEAVES_LIMIT = 2_000_000
"""Records up to which proofs are computed here; `airgap run --receipt` gives one of any log."""

_PROOFS = (
    "Each proof below is a file of its own (.tlog-proof): with the public key of the log, "
    "`airgap audit check-receipt` shows that the signed head covers the record."
)
_NO_PROOFS = "No proofs: the log is pruned or long; `airgap run --receipt` writes them."

LIMITS = (
    "What was typed and what the model wrote: the log holds commitments to both.",
    "Whether the facts were true: each stands with the source that stated it.",
    "Whether a rule reads its law rightly: see its confidence, and who checked it.",
    "What hazard rules said: their part of a decision is kept apart, for the hazard officer.",
)


@dataclass(frozen=True, slots=True)
class Dossier:
    """What was found of one request."""

    request: str
    records: tuple[Record, ...]
    decisions: tuple[tuple[str, dict[str, Any]], ...]
    receipts: tuple[Receipt, ...]


def find(folder: Path, log: LogFacts, name: str, hazard: frozenset[str] = frozenset()) -> Dossier:
    """Find a request by its id, or by the number or reference of one of its records.

    `hazard` are the rules that its reader may not see; without them nothing is left out.

    Raises:
        RefusedError: `usage.argument`; the log holds no such request.

    """
    records = list(_records_of(folder, log, name))
    if not records:
        raise RefusedError(
            "usage.argument",
            f"the log holds no request {name!r:.80}",
            hint="airgap audit show lists requests; give its `req`, or a reference such as #12",
        )
    cited = dict.fromkeys(each["decision"]["id"] for each in records if "decision" in each)
    return Dossier(
        request=str(records[0]["req"]),
        records=tuple(records),
        decisions=tuple((each, without(read_object(folder, each), hazard)) for each in cited),
        receipts=tuple(_receipts(folder, log, [each["seq"] for each in records])),
    )


def without(record: dict[str, Any], hazard: frozenset[str]) -> dict[str, Any]:
    """Return a decision record without what hazard rules and screens said."""
    if not hazard:
        return record
    kept = dict(record)
    for name in ("trace", "reasons", "warnings", "approvals"):
        kept[name] = [each for each in record[name] if each["rule"] not in hazard]
    kept["facts"] = [each for each in record["facts"] if not each["name"].startswith("screen.")]
    kept["missing"] = [each for each in record["missing"] if not set(each["rules"]) & hazard]
    kept["screens"] = []
    kept["left_out"] = "what hazard rules said; the digest is that of the whole record"
    return kept


def _records_of(folder: Path, log: LogFacts, name: str) -> list[Record]:
    number = name.rpartition("#")[2]
    if number.isascii() and number.isdigit():
        wanted = next(
            (each for each in signed_records(folder, log) if each["seq"] == int(number)), None
        )
        if wanted is None or "req" not in wanted:
            return []
        name = str(wanted["req"])
    return [each for each in signed_records(folder, log) if each.get("req") == name]


def _receipts(folder: Path, log: LogFacts, seqs: Sequence[int]) -> list[Receipt]:
    """Prove records against the newest signed head; none for a log that is pruned or too long."""
    layout = Layout(folder)
    if log.first or not 0 < log.size <= LEAVES_LIMIT:
        return []
    leaves: list[bytes] = []
    for path in sorted(layout.log.glob("seg/*")):
        leaves.extend(leaf_hash(line.removesuffix(b"\n")) for line in read_lines(path))
    leaves = leaves[: log.size]
    note = layout.checkpoint.read_text(encoding="utf-8")
    if note.split("\n")[1] != str(log.size) or len(leaves) != log.size:
        return []

    def node(place: Node) -> bytes:
        level, index = place
        return merkle_root(leaves[index << level : (index + 1) << level], hashlib.sha256)

    return [
        Receipt(seq, log.size, leaves[seq], inclusion_path(seq, log.size, node), note)
        for seq in seqs
    ]


def request_dossier(
    found: Dossier,
    log: LogFacts,
    about: About,
    *,
    holds: Sequence[Mapping[str, Any]] = (),
    reviews: Sequence[str] = (),
) -> Page:
    """Return the page of one request.

    Args:
        found: Its records, decisions and proofs.
        log: Judgement of the log.
        about: Author, time, names of models.
        holds: Rows of its holds, as `airgap hold list` shows them.
        reviews: Reviews that break-glass approvals still owe.

    """
    first, last = found.records[0], found.records[-1]
    sections: list[Section] = [_request_section(found, about)]
    for number, (digest, decision) in enumerate(found.decisions, 1):
        which = f"Decision {number} of {len(found.decisions)}" if len(found.decisions) > 1 else ""
        sections += decision_sections(decision, digest, which or "Decision")
    sections.append(
        Section(
            "Holds, releases and reviews",
            head=("reference", "stage", "state"),
            rows=[(str(h["reference"]), str(h["stage"]), str(h["state"])) for h in holds],
            words=reviews,
        )
    )
    sections += proof_sections(found, log)
    document = {
        "format": "airgap/dossier/1",
        "request": found.request,
        "records": [dict(each) for each in found.records],
        "decisions": [{"digest": digest, "record": record} for digest, record in found.decisions],
        "holds": [dict(each) for each in holds],
        "reviews_owed": list(reviews),
        "proofs": [each.as_proof() for each in found.receipts],
        "log": log.document(),
    }
    figures = [
        ("result", _result(found.records)),
        ("decided as of", found.decisions[-1][1]["as_of"] if found.decisions else "-"),
        ("records", str(len(found.records))),
        ("project", str(first.get("project", "-"))),
    ]
    return page_of(
        about,
        document,
        kind="decision dossier",
        title=f"Request {found.request}",
        subject=f"{first['ts']} to {last['ts']}",
        figures=figures,
        sections=sections,
        limits=LIMITS,
        banner=banner_of(log),
    )


def _result(records: Sequence[Record]) -> str:
    for each in reversed(records):
        if each["kind"] == "denial":
            outcome = each.get("decision", {}).get("outcome", "")
            return {"needs_approval": "held", "deny": "denied"}.get(outcome, "refused")
    data = records[-1].get("data", {})
    done = str(data.get("result", "open"))
    return "answered" if done == "complete" else done


def _request_section(found: Dossier, about: About) -> Section:
    first = found.records[0]
    data = {k: v for each in found.records for k, v in each.get("data", {}).items()}
    tokens = [each["tok"] for each in found.records if "tok" in each]
    commits = {
        side: each[side]["commit"]
        for each in found.records
        for side in ("in", "out")
        if side in each
    }
    facts = [
        ("person", first.get("actor", {}).get("name", "-")),
        ("project", first.get("project", "-")),
        ("task", data.get("task", "-")),
        ("model", about.model(first.get("model", ""))),
        ("seed", str(data.get("seed", "-"))),
        ("samples", str(data.get("samples", data.get("n", "-")))),
        *[("tokens read and written", f"{each['in']} and {each['out']}") for each in tokens[-1:]],
        *[(f"commitment to {'prompt' if k == 'in' else 'answer'}", v) for k, v in commits.items()],
        *[("error", each["err"]["code"]) for each in found.records if "err" in each],
    ]
    return Section("Request", facts=facts)


def decision_sections(decision: Mapping[str, Any], digest: str, title: str) -> list[Section]:
    """Return the sections of one decision record."""
    change = decision["next_change"]
    facts = [
        ("outcome", decision["outcome"].replace("_", " ")),
        ("summary", decision["summary"]),
        ("law and lists as of", f"{decision['as_of']} ({decision['as_of_source']})"),
        ("known at", decision["known_at"]),
        (
            "changes with the same facts",
            f"on {change['on']} to {change['outcome'].replace('_', ' ')}"
            + (f" by {', '.join(change['rules'])}" if change["rules"] else "")
            if change
            else "no date known",
        ),
        ("record", digest),
    ]
    traces = Counter(each["state"].replace("_", " ") for each in decision["trace"])
    evaluated = ", ".join(f"{n} {state}" for state, n in sorted(traces.items()))
    return [
        Section(f"{title}: {decision['scope']}", facts=[*facts, ("rules evaluated", evaluated)]),
        Section(
            "Why: rules that had an effect",
            head=("rule", "effect", "in plain words", "citation", "how sure"),
            rows=[
                (
                    f"{each['rule']} v{each['version']}, {each['state']}",
                    str(each["effect"] or "-").replace("_", " "),
                    each["plain"],
                    each["citation"],
                    f"{each['source'].replace('_', ' ')}, {each['confidence']}"
                    + ("; to verify before release" if each["verify_before_release"] else ""),
                )
                for each in decision["reasons"]
            ],
        ),
        Section(
            "Facts, and who stated them",
            head=("fact", "value", "source"),
            rows=[
                (each["name"], _value(each), str(each.get("source") or "-"))
                for each in decision["facts"]
                if each.get("unknown") != "not supplied"
            ],
        ),
        Section(
            "Obligations, approvals, warnings",
            head=("what", "text", "who, until"),
            rows=[
                *[
                    (f"obligation {each['id']}", each["text"], f"{each['owner']}, {each['due']}")
                    for each in decision["obligations"]
                ],
                *[
                    (
                        f"approval of {each['rule']}",
                        each["reason"] + " (break-glass)" * bool(each.get("break_glass")),
                        f"{', '.join(each['approvers'])}, until {each['expires']}",
                    )
                    for each in decision["approvals"]
                ],
                *[
                    (f"from {each['from']}: {each['rule']}", each["plain"], each["effect"])
                    for each in decision["warnings"]
                ],
                *[
                    (f"missing: {', '.join(each['facts'])}", "; ".join(each["questions"]),
                     ", ".join(each["asked_of"]))
                    for each in decision["missing"]
                ],
            ],
        ),
        Section(
            "What decided: packs, lists, lineage",
            head=("what", "version", "digest"),
            rows=[
                *[
                    (f"pack {each['pack_id']}", f"{each['version']} ({each['status']})",
                     each["digest"])
                    for each in decision["packs"]
                ],
                *[
                    (
                        f"list {each['list_id']}",
                        f"{each['edition'] or 'none held'}"
                        + (" (partial)" if each["edition"] and not each["complete"] else ""),
                        each["digest"] or "-",
                    )
                    for each in decision["lists"]
                ],
                ("lineage registry", str(decision["registry"]["version"]),
                 decision["registry"]["digest"]),
            ],
        ),
    ]  # fmt: skip


def _value(fact: Mapping[str, Any]) -> str:
    if "value" not in fact:
        return f"unknown: {fact.get('unknown', '')}"
    value = fact["value"]
    if isinstance(value, list):
        return "{" + ", ".join(str(each) for each in value) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def proof_sections(found: Dossier, log: LogFacts) -> list[Section]:
    """Return the records of the request, and a proof of each."""
    proven = {receipt.seq: receipt for receipt in found.receipts}
    rows = [
        (
            str(each["seq"]),
            each["ts"],
            f"{each['kind']} {each['phase']}",
            f"sha256:{proven[each['seq']].leaf.hex()}" if each["seq"] in proven else "-",
        )
        for each in found.records
    ]
    head = log_section(log)
    sections = [
        Section(
            "Log records",
            head=("record", "time (UTC)", "kind", "leaf"),
            rows=rows,
            words=[_PROOFS if proven else _NO_PROOFS],
        ),
        head,
    ]
    sections += [
        Section(f"Proof of record {receipt.seq}", text=receipt.as_proof())
        for receipt in found.receipts
    ]
    return sections
