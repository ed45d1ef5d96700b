"""`airgap policy replay`: decisions of the log made again, and compared byte for byte."""

from __future__ import annotations

import json as jsonlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from airgap.cli.common import Json, Root, account_name, root_folder, show
from policy.errors import RefusedError

if TYPE_CHECKING:
    from airgap.cli.report import Desk
    from airgap.rule_history import History, Replay
    from policy.approvals import Approval

RECORD_LIMIT = 8 << 20
NUMBER = 7  # digits of a record's number, written alone; a longer one is the beginning of an id
_ULID = re.compile("[0-7][0-9A-HJKMNP-TV-Z]{25}")
_COMMIT = re.compile("[0-9a-f]{64}")
SHOWN = 40  # lines on a terminal; --json gives all


def register(group: typer.Typer) -> None:
    """Add the command to the group `policy`."""
    group.command("replay")(replay)


def replay(
    decision: Annotated[
        str,
        typer.Argument(
            help="Id of a decision or its beginning, or a file with a whole record of this log."
            " Default: every decision of the log."
        ),
    ] = "",
    *,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make decisions of the log again, with the rules of then, and compare byte for byte.

    Exit 1 when one comes out otherwise or cannot be made again. Of a hazard decision the log keeps
    the public part; the whole record is a file for those who may read it.
    """
    from airgap.cli.report import Desk

    desk = Desk.of(root, None)
    tree = root_folder(root)
    file = Path(decision)
    if decision.endswith(".json") and file.is_file():
        wanted = [_of_file(file)]
    else:
        wanted = list(_of_log(desk.audit, desk.log, decision))
    if decision and not wanted:
        raise RefusedError(
            "policy.record",
            f"no decision of this log has an id that begins with {decision!r:.80}",
            hint="airgap audit show lists decisions with their ids",
        )
    from airgap.rule_history import History

    bench = _Bench(tree, History.of(desk.audit, desk.log))
    answers = [bench.answer(each) for each in wanted]
    counts = {word: sum(each.word == word for each in answers) for word in WORDS}
    failing = counts["differs"] + counts["not possible"]
    document = {
        "decisions": [each.document() for each in answers],
        **{word.replace(" ", "_"): count for word, count in counts.items()},
        "exit": 1 if failing else 0,
    }
    odd = [each for each in answers if len(answers) == 1 or each.word != "same"]
    lines = [f"{each.digest[:19]}  {each.outcome}  {each.word}{each.why}" for each in odd[:SHOWN]]
    if len(odd) > SHOWN:
        lines.append(f"{len(odd) - SHOWN} more: see --json")
    lines.append(", ".join(f"{count} {word}" for word, count in counts.items()))
    show(document, Text("\n".join(lines)), json=json)
    if failing:
        raise typer.Exit(1)


WORDS = ("same", "differs", "not possible", "public part only")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A record to make again; `seq` is the record of the log that cites it."""

    digest: str
    seq: int
    document: dict[str, Any]
    fault: str = ""


@dataclass(frozen=True, slots=True)
class _Answer:
    digest: str
    outcome: str
    word: str
    detail: str = ""

    @property
    def why(self) -> str:
        return f": {self.detail}" if self.detail else ""

    def document(self) -> dict[str, str]:
        return {
            "decision": self.digest,
            "outcome": self.outcome,
            "replay": self.word,
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True)
class _Bench:
    """What decisions are made again with."""

    tree: Path
    history: History

    def answer(self, wanted: _Wanted) -> _Answer:
        """Make one decision again and say how it came out."""
        made, word, detail = self.again(wanted)
        outcome = str(wanted.document.get("outcome", ""))
        if made is not None:
            word, detail = "same" if made.same else "differs", made.differs
        return _Answer(wanted.digest, outcome, word, detail)

    def again(self, wanted: _Wanted) -> tuple[Replay | None, str, str]:
        """The decision made again, or a word and the reason why that is not possible."""
        from airgap.rule_history import made_with
        from airgap.rule_history import replay as make

        document = wanted.document
        if wanted.fault:
            return None, "not possible", wanted.fault
        if "facts_digest" not in document.get("request", {}):
            return None, "public part only", ""
        missing = "no load of rules is on record before it"
        try:
            for load in self.history.before(wanted.seq):
                rules = self.history.rules_of(load)
                other = made_with(document, rules)
                if not other:
                    approvals, leads = self._approvals(document), self._leads(document)
                    return make(document, rules, approvals, leads=leads), "", ""
                missing = f"rules that the log did not keep: {other}"
        except RefusedError as error:
            missing = f"{error.code}: {error.message}"
        return None, "not possible", missing

    def _approvals(self, document: dict[str, Any]) -> Any:
        """Those of the site that were held then, and releases that the record names."""
        from airgap.config import load_site
        from airgap.gate import in_legal_zone
        from airgap.inquiry import site_approvals
        from policy.approvals import Approvals
        from policy.replay import times_of_record

        _, known_at = times_of_record(document)
        named = {each["digest"] for each in document.get("approvals", [])}
        kept = site_approvals(self.tree, known_at).approvals
        have = {str(each.digest) for each in kept}
        released = self._releases(named - have) if named - have else ()
        return in_legal_zone(load_site(self.tree), Approvals((*kept, *released)))

    def _releases(self, named: set[str]) -> tuple[Approval, ...]:
        from airgap.holds import Holds
        from bundle.trust import load_trust

        holds = Holds(self.tree, load_trust(self.tree / "trust").standing)
        found = (
            holds.approval_of(hold, each) for hold in holds.every() for each in holds.releases(hold)
        )
        return tuple(each for each in found if str(each.digest) in named)

    def _leads(self, document: dict[str, Any]) -> frozenset[str]:
        from airgap.config import load_site

        project = document["request"].get("project")
        chosen = load_site(self.tree).find_project(project) if project else None
        return chosen.principal_investigators if chosen else frozenset()


# -- one decision of the log, explained -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Explained:
    """A decision of the log: made again, or its public part where the whole one is not here."""

    title: str
    made: Replay | None
    hazard_role: bool
    public: dict[str, Any]
    beside: dict[str, Any]

    @property
    def words(self) -> str:
        """The public part in words."""
        lines = [self.title, str(self.public["summary"])]
        if self.public.get("held_for_review"):
            lines.append("Held for review by the hazard officer; details are restricted.")
        for each in self.public["reasons"]:
            lines += [f"{each['rule']} ({each['state']}): {each['plain']}", f"  {each['citation']}"]
        return "\n".join(lines)


def explained(name: str, root: Path | None) -> Explained:
    """Find one decision of the log and make it again, with the rules and approvals of then.

    Raises:
        RefusedError: `policy.record`, there is none, several, or it cannot be made again.

    """
    from airgap.cli.report import Desk
    from airgap.inquiry import find_reader
    from airgap.rule_history import History
    from policy.report import HAZARD_ROLE

    desk = Desk.of(root, None)
    wanted = _one(desk, name)
    whole = _whole(desk.tree, wanted)
    made, word, detail = _Bench(desk.tree, History.of(desk.audit, desk.log)).again(whole)
    if made is None and word == "not possible":
        raise RefusedError(
            "policy.record",
            f"decision {wanted.digest[:19]} cannot be made again: {detail}",
            hint="airgap dossier shows the record itself",
        )
    reader = find_reader(desk.site, "", os.getuid(), account_name())
    asked = wanted.document["request"]
    about = ", ".join(str(asked[key]) for key in ("task", "project", "person") if asked.get(key))
    if made is not None:
        word = "made again, the same to the byte" if made.same else f"DIFFERS in {made.differs}"
    return Explained(
        title=f"record #{wanted.seq} of the log: {about} ({word})",
        made=made,
        hazard_role=reader is not None and HAZARD_ROLE in reader.roles,
        public=wanted.document,
        beside={"logged": {"decision": wanted.digest, "record": wanted.seq, "replay": word}},
    )


def _one(desk: Desk, name: str) -> _Wanted:
    """The decision that a reference, a request (its last one) or the beginning of an id names."""
    from airgap.dossier.usage import signed_records

    request, (_, mark, number) = "", name.rpartition("#")
    if (mark or len(number) <= NUMBER) and number.isascii() and number.isdigit():
        records = signed_records(desk.audit, desk.log)
        named = next((each for each in records if each["seq"] == int(number)), None)
        found = [] if named is None else [named]
    elif _ULID.fullmatch(name):
        request = name
        found = [e for e in signed_records(desk.audit, desk.log) if e.get("req") == name]
    else:
        found = []
    ids = [each["decision"]["id"] for each in found if "decision" in each]
    prefix = ids[-1] if ids else "" if found or mark or request else name
    wanted = list(_of_log(desk.audit, desk.log, prefix)) if prefix else []
    if len(wanted) != 1:
        raise RefusedError(
            "policy.record",
            f"{len(wanted) or 'no'} decisions of this log answer to {name!r:.80}",
            hint="airgap audit show lists decisions; give an id, a request, or a number such as"
            " '#12'",
        )
    return wanted[0]


def _whole(tree: Path, wanted: _Wanted) -> _Wanted:
    """The whole record of a hazard decision, where this account can read it."""
    commit = str(wanted.document.get("restricted", ""))
    path = tree / "restricted" / f"{commit}.json"
    if not _COMMIT.fullmatch(commit) or not path.is_file():
        return wanted
    return replace(_of_file(path), seq=wanted.seq)


def _of_log(folder: Path, log: Any, prefix: str) -> Iterator[_Wanted]:
    """Every decision that the log cites, each once, as far as its id begins so."""
    from airgap.dossier.usage import read_object, signed_records

    wanted = prefix if not prefix or prefix.startswith("sha256:") else f"sha256:{prefix}"
    seen: set[str] = set()
    for record in signed_records(folder, log):
        digest = record.get("decision", {}).get("id")
        if not isinstance(digest, str) or digest in seen or not digest.startswith(wanted):
            continue
        seen.add(digest)
        try:
            yield _Wanted(digest, record["seq"], read_object(folder, digest))
        except RefusedError as error:
            yield _Wanted(digest, record["seq"], {}, f"{error.code}: {error.message}")


def _of_file(path: Path) -> _Wanted:
    """A whole record, or the restricted file that holds one."""
    from bundle.keys import read_limited
    from policy.terms import Digest

    raw = read_limited(path, RECORD_LIMIT, code="policy.record", what="the record")
    try:
        document = jsonlib.loads(raw)
        if isinstance(document, dict) and document.get("format") == "airgap/restricted/1":
            raw = document["record"].encode()
            document = jsonlib.loads(raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedError("policy.record", f"{path}: {error!s:.120}") from error
    if not isinstance(document, dict):
        raise RefusedError("policy.record", f"{path}: it is no JSON object")
    return _Wanted(str(Digest.of(raw)), 1 << 62, document)
