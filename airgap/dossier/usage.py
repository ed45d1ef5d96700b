"""What a log says about use: one pass over its records, after the log itself was judged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airgap.audit import verify_log
from airgap.audit.checkpoint import Keys
from airgap.audit.layout import Layout
from airgap.audit.query import Filter, read_records
from airgap.audit.record import Record
from bundle.keys import read_limited
from policy.errors import RefusedError

OBJECT_LIMIT = 8 * 1024 * 1024
USES_LIMIT = 100_000
"""Most requests of one report; more would help nobody on a page."""


@dataclass(frozen=True, slots=True)
class LogFacts:
    """What is known of the log that a report was made from."""

    origin: str
    size: int
    root: str
    verdict: str
    anchors: int
    anchored_size: int
    first: int
    findings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "origin": self.origin,
            "size": self.size,
            "root": self.root,
            "verdict": self.verdict,
            "anchors": self.anchors,
            "anchored_size": self.anchored_size,
            "first_record": self.first,
            "findings": list(self.findings),
        }


@dataclass(slots=True)
class Usage:
    """One request, put together from its records."""

    req: str
    project: str
    person: str = ""
    task: str = ""
    model: str = ""
    begun: str = ""
    ended: str = ""
    result: str = ""
    decision: str = ""
    outcome: str = ""
    rule: str = ""
    samples: int = 0
    tokens: int = 0
    seqs: list[int] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "request": self.req,
            "begun": self.begun,
            "ended": self.ended,
            "person": self.person,
            "project": self.project,
            "task": self.task,
            "model": self.model,
            "result": self.result,
            "decision": self.decision,
            "outcome": self.outcome,
            "rule": self.rule,
            "samples": self.samples,
            "tokens": self.tokens,
            "records": list(self.seqs),
        }

    def take(self, record: Record) -> None:
        """Add what one record says."""
        data, decision = record.get("data", {}), record.get("decision", {})
        self.seqs.append(int(record["seq"]))
        self.begun = self.begun or record["ts"]
        self.ended = record["ts"]
        self.person = self.person or record.get("actor", {}).get("name", "")
        self.model = record.get("model", self.model)
        self.task = data.get("task", self.task)
        if decision:
            self.decision, self.outcome = decision["id"], decision["outcome"]
            self.rule = decision.get("rule", "")
        if record["kind"] == "denial":
            held = {"needs_approval": "held", "deny": "denied"}
            self.result = held.get(decision.get("outcome", ""), "refused")
            self.rule = self.rule or record.get("err", {}).get("code", "")
        elif record["phase"] == "outcome" and self.result not in {"held", "denied", "refused"}:
            self.result = "answered" if data.get("result") == "complete" else str(data["result"])
        elif not self.result:
            self.result = "open"
        self.samples = data.get("samples", self.samples)
        self.tokens += sum(record.get("tok", {}).values())


@dataclass(frozen=True, slots=True)
class Evidence:
    """One pass over a log: the requests, and how many records of each kind there are."""

    log: LogFacts
    uses: tuple[Usage, ...]
    kinds: Counter[str]
    projects: Counter[str]
    examined: int
    first_ts: str
    last_ts: str
    reviews: tuple[dict[str, Any], ...] = ()


def judge(folder: Path, keys: Keys | None, anchors: Sequence[Path] = ()) -> LogFacts:
    """Verify the log in `folder` and keep what a report must state of it.

    Raises:
        RefusedError: `audit.tampered`; no report is made from a log that was changed.
        RefusedError: `audit.absent`; there is none.

    """
    if not Layout(folder).log.is_dir():
        raise RefusedError(
            "audit.absent", f"no audit log in {folder}", hint="name a tree with --root"
        )
    verdict = verify_log(folder, vkey=keys, anchors=anchors)
    findings = tuple(str(each) for each in verdict.findings)
    if verdict.verdict == "tampered":
        raise RefusedError(
            "audit.tampered",
            f"the log was changed, so no report is made from it: {'; '.join(findings)[:400]}",
            hint="airgap audit verify shows every finding",
        )
    return LogFacts(
        origin=verdict.origin,
        size=verdict.size,
        root=verdict.root,
        verdict=verdict.verdict,
        anchors=verdict.anchors,
        anchored_size=verdict.anchored_size,
        first=verdict.first,
        findings=findings,
    )


def gather(
    folder: Path, log: LogFacts, *, project: str = "", since: str = "", until: str = ""
) -> Evidence:
    """Read the records under the newest signed head once.

    Args:
        folder: Holds `log/`.
        log: Its judgement.
        project: Only requests of this project; the counts are over all.
        since: UTC text; `until` is not included.
        until: The same.

    Raises:
        RefusedError: `usage.argument`, more requests than a report holds.
        UsageError: `since` or `until` is no UTC time.

    """
    uses: dict[str, Usage] = {}
    kinds: Counter[str] = Counter()
    projects: Counter[str] = Counter()
    examined, first_ts, last_ts = 0, "", ""
    within = Filter(since=since, until=until)
    for record in filter(within, signed_records(folder, log)):
        examined += 1
        first_ts, last_ts = first_ts or record["ts"], record["ts"]
        kinds[record["kind"]] += 1
        name = record.get("project", "")
        if record["kind"] not in {"inference", "denial"} or "req" not in record:
            continue
        if record["req"] not in uses and (not project or name == project):
            if len(uses) >= USES_LIMIT:
                raise RefusedError(
                    "usage.argument",
                    f"more than {USES_LIMIT} requests",
                    hint="narrow it down with --since and --until",
                )
            uses[record["req"]] = Usage(record["req"], name)
        if record["req"] in uses:
            uses[record["req"]].take(record)
        if record["kind"] == "inference" and record["phase"] == "intent":
            projects[name] += 1
    return Evidence(log, tuple(uses.values()), kinds, projects, examined, first_ts, last_ts)


def signed_records(folder: Path, log: LogFacts) -> Iterator[Record]:
    """Yield the records under the newest signed head, in order."""
    for record in read_records(folder):
        if record["seq"] >= log.size:
            return
        yield record


def read_object(folder: Path, digest: str) -> dict[str, Any]:
    """Return a JSON object that records cite; RefusedError `audit.object` for none or another."""
    from policy.terms import Digest  # noqa: PLC0415 - only where an object is read

    wanted = Digest.parse(digest)
    path = Layout(folder).object(wanted.hex)
    if not path.exists():
        raise RefusedError("audit.object", f"object {digest} is no longer in the log")
    raw = read_limited(path, OBJECT_LIMIT, code="audit.object", what="the object")
    if Digest.of(raw) != wanted:
        raise RefusedError("audit.object", f"the file of object {digest} is another one")
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise RefusedError("audit.object", f"object {digest} is no JSON object")
    return value
