"""`airgap policy explain|check`, `airgap site init`; `airgap approve` stands beside it."""

from __future__ import annotations

import enum
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli import approve, lists, replay, review, rules
from airgap.cli.common import Json, Root, account_name, root_folder, show, stderr, stdout
from airgap.cli.options import grouped
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from airgap.rules import Rules
    from policy.engine import Decision
    from policy.record import Idle


MOST_IDLE = 8  # approvals without effect that are shown; --json gives all


class ScopeName(enum.StrEnum):
    """What is asked."""

    ADMISSION = "admission"
    USE = "use"


Bundle = Annotated[
    str, typer.Option("--bundle", help="A bundle file, or the name or digest of an installed one.")
]
Model = Annotated[str, typer.Option("--model", help="A model that the lineage registry knows.")]
ProjectName = Annotated[str, typer.Option("--project", help="Project of site.toml.")]
PersonName = Annotated[
    str, typer.Option("--person", help="Person of site.toml. Default: whose account this is.")
]
ScopeOption = Annotated[
    ScopeName | None,
    typer.Option("--scope", help="Default: use when a task is named, else admission."),
]
AsOf = Annotated[
    datetime | None,
    typer.Option("--as-of", formats=["%Y-%m-%d"], help="Day whose law applies. Default: today."),
]
KnownAt = Annotated[
    str,
    typer.Option(
        "--known-at",
        help="Ask with the rules, lists and approvals that this host had loaded by then: a day or"
        " an instant such as 2026-11-25T10:00:00Z.",
    ),
]
TaskName = Annotated[str, typer.Option("--task", help="Task, as `airgap run` calls it.")]
Action = Annotated[str, typer.Option("--action", help="What is done with the model.")]
Drafts = Annotated[
    list[Path] | None,
    typer.Option("--draft", help="A file of rules or lists that nobody has signed yet, to try it."),
]
Assume = Annotated[
    list[str] | None,
    typer.Option("--assume", help="A fact for this question only, such as screen.tier=0."),
]


@dataclass(frozen=True)
class Asked:
    """One question."""

    bundle: Bundle = ""
    model: Model = ""
    project: ProjectName = ""
    person: PersonName = ""
    scope: ScopeOption = None
    task: TaskName = ""
    action: Action = "infer"
    as_of: AsOf = None
    known_at: KnownAt = ""
    assume: Assume = None


def register(app: typer.Typer) -> None:
    """Add the groups."""
    approve.register(app)
    policy = typer.Typer(help="Ask the rules, and read why.", no_args_is_help=True)
    policy.command(name="explain")(explain)
    policy.command(name="check")(check)
    rules.register(policy)
    lists.register(policy)
    replay.register(policy)
    review.register(policy)
    app.add_typer(policy, name="policy")
    site = typer.Typer(help="What this site says about itself.", no_args_is_help=True)
    site.command(name="init")(init)
    app.add_typer(site, name="site")


@grouped
def explain(
    decision: Annotated[
        str,
        typer.Argument(
            help="A decision of the log: its id or the beginning, a request, or a record such as"
            " '#12'. Without it a what-if is explained."
        ),
    ] = "",
    *,
    asked: Asked,
    draft: Drafts = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Explain a decision: rules, citations, facts and their source, what is missing, dates.

    One of the log is made again, with the rules and approvals of then. In a what-if, facts that
    only a run has (seal, installation, screens) are assumed to be good, and listed.
    """
    from airgap.cli.explanation import show_view, view
    from policy import report

    if decision:
        if draft or asked != Asked():
            raise UsageError(
                "usage.argument",
                "a decision of the log has its own question, rules and day",
                hint="give it alone: airgap policy explain DECISION",
            )
        explain_logged(decision, root, json=json)
        return
    answer = decide(asked, root_folder(root), what_if=True, drafts=draft or [])
    if json:
        document = report.public_document(answer.decision, hazard_role=answer.hazard_role)
        show({**document, **answer.beside}, "", json=True)
        return
    explained = report.explain(answer.decision, hazard_role=answer.hazard_role)
    show_view(
        stdout, view(explained, title=answer.title, assumed=answer.assumed, idle=answer.idle_words)
    )


def explain_logged(name: str, root: Path | None, *, json: bool) -> None:
    """Explain a decision of the log."""
    from rich.text import Text

    from airgap.cli.explanation import show_view, view
    from policy import report

    found = replay.explained(name, root)
    if found.made is None:
        show({**found.public, **found.beside}, Text(found.words), json=json)
        return
    made, role = found.made.decision, found.hazard_role
    if json:
        show({**report.public_document(made, hazard_role=role), **found.beside}, "", json=True)
        return
    told = report.explain(made, hazard_role=role)
    show_view(stdout, view(told, title=found.title, assumed=()))


@grouped
def check(
    *,
    asked: Asked,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make one decision: exit 0 permitted, 1 denied or held, 3 fault. Nothing is assumed.

    For a bundle that is not being installed, add `--assume bundle.verified=true`.
    """
    from policy import report

    answer = decide(asked, root_folder(root), what_if=False)
    decision = answer.decision
    reviews = approve.owed(root_folder(root))
    if not json:
        for words in reviews:
            stderr.print(words, markup=False, soft_wrap=True)
        for words in answer.idle_words:
            stderr.print(f"approval without effect: {words}", markup=False, soft_wrap=True)
    if json or decision.permitted:
        document = report.public_document(decision, hazard_role=answer.hazard_role)
        end: dict[str, object] = {"exit": 0, "reviews_owed": reviews}
        if not decision.permitted:
            end |= {"exit": 1, "code": decision.refusal().code}
        show({**document, **answer.beside, **end}, document["summary"], json=json)
    if not decision.permitted:
        if json:
            raise typer.Exit(1)
        raise decision.refusal()


def init(*, root: Root = None, json: Json = False) -> None:
    """Write a commented site.toml in which every answer is still open; never over another one."""
    from airgap.config import create_site

    path = create_site(root_folder(root))
    show({"site": str(path)}, f"wrote {path}: fill it in, then `airgap policy explain`", json=json)


@dataclass(frozen=True, slots=True)
class Answered:
    """A decision, what it is about, what was assumed, and whether the reader may see hazards."""

    decision: Decision
    title: str
    assumed: list[str]
    hazard_role: bool
    idle: Sequence[Idle] = ()

    @property
    def beside(self) -> dict[str, Any]:
        """What a JSON answer tells beside the record."""
        idle = [
            {"digest": str(each.approval.digest), "rules": list(each.rules), "reason": each.reason}
            for each in self.idle
        ]
        return {"assumed": self.assumed, "approvals_without_effect": idle}

    @property
    def idle_words(self) -> list[str]:
        """The approvals without effect, for a reader."""
        words = [
            f"{', '.join(each.rules)}, signed by"
            f" {', '.join(who.person for who in each.approval.approvers) or 'nobody enrolled'}:"
            f" {each.reason}"
            for each in self.idle[:MOST_IDLE]
        ]
        more = len(self.idle) - MOST_IDLE
        return [*words, f"{more} more: see --json"] if more > 0 else words


def decide(asked: Asked, root: Path, *, what_if: bool, drafts: Sequence[Path] = ()) -> Answered:
    """Gather the facts of a question and decide it."""
    from airgap import inquiry
    from airgap.config import load_site, unnamed_site
    from airgap.rules import load_rules
    from policy.report import HAZARD_ROLE
    from policy.terms import Scope

    notes: list[str] = []
    try:
        site = load_site(root)
    except RefusedError as error:
        if error.code != "site.missing" or not what_if:
            raise
        site = unnamed_site()
        notes.append(f"there is no site.toml in {root}: every fact of the site is unknown")
    now = datetime.now(UTC)
    known_at = as_instant(asked.known_at, now) if asked.known_at else None
    rules = load_rules(root, drafts=drafts) if known_at is None else rules_known_at(root, known_at)
    if known_at is not None and drafts:
        raise UsageError(
            "usage.argument", "--draft is tried with the rules of today: no --known-at"
        )
    if known_at is None and asked.as_of is not None and asked.as_of.date() < now.date():
        notes.append(
            "the rules are those that are loaded today; --known-at asks with those of then"
        )
    notes += [f"the rules of {each}, which nobody has signed" for each in drafts]
    reader = inquiry.find_reader(site, asked.person, os.getuid(), account_name())
    subject = inquiry.find_subject(
        bundle=asked.bundle, model=asked.model, root=root, rules=rules, now=now
    )
    scope = Scope(asked.scope or ("use" if asked.task else "admission"))
    question = inquiry.Question(
        scope=scope,
        project=asked.project or None,
        person=reader.id if reader else None,
        task=inquiry.task_facts(asked.task, asked.action) if asked.task else None,
        assumed=inquiry.parse_assumptions(asked.assume or ()),
    )
    if what_if:
        assumed = inquiry.what_if(question, subject) | dict(question.assumed)
        question = replace(question, assumed=assumed)
    day = site.legal_day(now, asked.as_of.date() if asked.as_of else None)
    if known_at is not None:
        day = replace(day, known_at=known_at)
    approvals = inquiry.site_approvals(root, known_at)
    decision = inquiry.ask(question, subject, site, rules, day, approvals=approvals)
    hazard_role = reader is not None and HAZARD_ROLE in reader.roles
    return Answered(
        decision=decision,
        title=question.title_of(subject),
        assumed=[*notes, *question.assumed_words],
        hazard_role=hazard_role,
        idle=decision.idle_approvals(hazard_role=hazard_role),
    )


def as_instant(text: str, now: datetime) -> datetime:
    """Read `--known-at`; a day means its end in UTC. What is not known yet is refused."""
    from policy.record import instant

    try:
        moment = datetime.fromisoformat(text)
        if len(text) == len("2026-11-25"):
            moment = datetime.combine(moment.date(), time.max)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    except ValueError:
        raise UsageError(
            "usage.argument",
            f"--known-at {text!r:.40}: expected a day or an instant",
            hint="such as 2026-11-25 or 2026-11-25T10:00:00Z",
        ) from None
    if moment.date() == now.date() and len(text) == len("2026-11-25"):
        return now
    if moment > now:
        raise UsageError(
            "usage.argument",
            f"--known-at {text!r:.40}: it is {instant(now)}, and what will be known is not known",
        )
    return moment


def rules_known_at(root: Path, moment: datetime) -> Rules:
    """The rules that this host had loaded by then, from its log after the log was verified."""
    from airgap.audit import load_vkey
    from airgap.dossier.usage import judge
    from airgap.rule_history import History

    key = root / "keys" / "audit.vkey"
    log = judge(root / "audit", load_vkey(key) if key.is_file() else None)
    return History.of(root / "audit", log).rules_at(moment)
