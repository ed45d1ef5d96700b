"""`airgap approve`: named people lift a rule for one bundle and project, or take that back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

import typer
from rich.text import Text

from airgap.cli.common import Json, Root, account_name, root_folder, show, stderr
from airgap.cli.signing import (
    EXPIRES,
    Confirm,
    Filed,
    Key,
    Passphrase,
    Reason,
    document_digest,
    require_typed,
    signer_of,
)
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from airgap.approvals import Override, Review
    from bundle.envelope import Envelope
    from bundle.intoto import Statement
    from policy.approvals import Approval
    from policy.terms import Digest


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Lift a rule as its terms allow, in writing.", no_args_is_help=True)
    group.command("new")(new)
    group.command("sign")(sign)
    group.command("list")(show_all)
    group.command("review")(review)
    group.command("revoke")(revoke)
    app.add_typer(group, name="approve")


def new(
    rules: Annotated[list[str], typer.Argument(help="Rules to lift, such as LIC-CONFLICT.")],
    *,
    key: Key,
    bundle: Annotated[str, typer.Option("--bundle", help="Bundle file, name or digest.")],
    project: Annotated[str, typer.Option("--project", help="The only project it counts for.")],
    reason: Reason,
    expires: Annotated[datetime, EXPIRES],
    task: Annotated[str, typer.Option("--task", help="The only task. Default: all.")] = "",
    document: Filed = None,
    authority: Annotated[
        str, typer.Option("--authority", help="For a government waiver: who granted it.")
    ] = "",
    break_glass: Annotated[
        bool,
        typer.Option(
            "--break-glass",
            help="An emergency: any two people, at most three days, and a review afterwards.",
        ),
    ] = False,
    confirm: Confirm = None,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Draft and sign an approval as its first person."""
    from airgap import approvals

    tree = root_folder(root)
    override = approvals.override(
        rules=approved_rules(rules, tree),
        project=project,
        task=task or None,
        reason=reason,
        issued=datetime.now(UTC).replace(microsecond=0),
        expires=expires.date(),
        document=document_digest(document),
        authority=authority or None,
        break_glass=break_glass,
    )
    statement = approvals.OVERRIDE.draft(override, bundle_digest(bundle, tree))
    require_confirmed(statement, confirm)
    envelope = approvals.OVERRIDE.sign(statement, signer_of(key, passphrase_file, tree))
    finish(envelope, tree, json=json)


def sign(
    approval: Annotated[Path, typer.Argument(help="The file that `approve new` wrote.")],
    *,
    key: Key,
    confirm: Confirm = None,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Sign an approval as a further person."""
    from airgap import approvals
    from airgap.signed import read_signed

    tree = root_folder(root)
    envelope = read_signed(approval)
    require_confirmed(approvals.OVERRIDE.parse(envelope.payload), confirm)
    signed = approvals.countersign(envelope, signer_of(key, passphrase_file, tree))
    finish(signed, tree, json=json)


def show_all(*, root: Root = None, json: Json = False) -> None:
    """List the approvals of this site, who signed them, and the reviews that are still owed."""
    from airgap.approvals import load_approvals, reviews_of
    from bundle.trust import load_trust

    tree = root_folder(root)
    trust = load_trust(tree / "trust").standing
    found, reviews = load_approvals(tree, trust).approvals, reviews_of(tree, trust)
    again = up_for_review(found, tree)
    told = Told.to_reader(tree)
    lines = [words_of(each, told) for each in found] or ["no approval"]
    lines += [review_words(each, told) for each in reviews] + again
    document = {
        "approvals": [document_of(each, told) for each in found],
        "reviews": [review_document(each, told) for each in reviews],
        "up_for_review": again,
    }
    show(document, Text("\n".join(lines)), json=json)


def up_for_review(found: Sequence[Approval], tree: Path) -> list[str]:
    """Name the approvals of lineage rules that are older than an edition of a list held here."""
    from airgap.rules import load_rules

    rules = load_rules(tree)
    lineage = {each.id for each in rules.packs.rules if each.text.topic in {"lineage", "list"}}
    editions = [(each.dated, each.text) for each in rules.lists.snapshots]
    lines = []
    for approval in found:
        about = sorted(set(approval.rules) & lineage)
        issued = approval.issued.astimezone(UTC).date()
        newer = sorted(f"{text.list_id} {text.edition}" for day, text in editions if day > issued)
        if about and newer:
            lines.append(
                f"up for review: the approval of {', '.join(about)} for {approval.project} is older"
                f" than {', '.join(newer)}"
            )
    return lines


def review(
    approval: Annotated[Path, typer.Argument(help="File of the break-glass approval.")],
    *,
    key: Key,
    finding: Annotated[str, typer.Option("--finding", help="What you found, in your words.")],
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Sign the review that a break-glass approval owes: by a person who did not sign it."""
    tree = root_folder(root)
    signer = signer_of(key, passphrase_file, tree)
    note(approval, "after-review", finding, signer, tree, json=json)


def revoke(
    approval: Annotated[Path, typer.Argument(help="File of the approval.")],
    *,
    key: Key,
    reason: Reason,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Take an approval back, as any one approver of the trust root: it lifts nothing any more."""
    tree = root_folder(root)
    signer = signer_of(key, passphrase_file, tree)
    note(approval, "revocation", reason, signer, tree, json=json)


def note(approval: Path, kind: str, text: str, signer: Any, tree: Path, *, json: bool) -> None:
    """Sign a note about an approval, if the signer is one who may, and put it in its place."""
    from airgap import approvals
    from airgap.signed import keep, on_record, read_signed
    from bundle.trust import load_trust
    from policy.approvals import same_person
    from policy.terms import Digest

    trust = load_trust(tree / "trust").standing
    target = read_signed(approval)
    about = approvals.verify_approval(target, trust)
    now = datetime.now(UTC).replace(microsecond=0)
    envelope = approvals.sign_note(target, kind, text, now, signer)
    found = approvals.verify_note(envelope, trust)
    signed = {same_person(each.person) for each in about.approvers}
    people = [each.person for each in found.people if trust.people[each.person].approves]
    if kind == "after-review":
        people = [each for each in people if same_person(each) not in signed]
        if not about.break_glass:
            raise RefusedError("policy.approval", "only a break-glass approval owes a review")
    if not people:
        raise RefusedError(
            "policy.approval",
            f"this key makes no {kind} of it: it needs an approver of the trust root"
            + ", and one who did not sign the approval" * (kind == "after-review"),
            hint="airgap trust show lists people and roles",
        )
    with on_record(tree, "admin.approval", people[0], Digest.of(envelope.payload)):
        path = keep(envelope, tree / approvals.NOTES)
    document = {"note": kind, "approval": str(about.digest), "people": people, "file": str(path)}
    words = f"wrote {path}: {kind} of {words_of(about)}, by {people[0]}"
    show(document, Text(words), json=json)


def owed(tree: Path) -> list[str]:
    """One line for each review that a break-glass approval of this tree still owes."""
    from airgap.approvals import FOLDER, reviews_of
    from bundle.trust import load_trust

    if not (tree / FOLDER).is_dir():
        return []
    found = [each for each in reviews_of(tree, load_trust(tree / "trust").standing) if each.is_open]
    told = Told.to_reader(tree) if found else EVERYTHING
    return [review_words(each, told) for each in found]


@dataclass(frozen=True, slots=True)
class Told:
    """Which rules of an approval a reader is told; that of a hazard rule says what was found."""

    hidden: frozenset[str] = frozenset()
    everything: bool = False

    @classmethod
    def to_reader(cls, tree: Path) -> Told:
        """For the account that runs this; all of it for the hazard role."""
        from airgap.config import load_site
        from airgap.inquiry import find_reader
        from airgap.rules import load_rules
        from policy.report import HAZARD_ROLE

        try:
            reader = find_reader(load_site(tree), "", os.getuid(), account_name())
            rules = load_rules(tree).packs.rules
        except RefusedError:
            return cls()  # `status` speaks of a broken tree too
        return cls(
            frozenset(each.id for each in rules if each.text.topic == "hazard"),
            everything=reader is not None and HAZARD_ROLE in reader.roles,
        )

    def rules(self, versions: Mapping[str, int]) -> dict[str, int]:
        """Rules by id, `HAZ` for those that are not told."""
        if self.everything:
            return dict(sorted(versions.items()))
        open_ = {each: at for each, at in versions.items() if not self._hides(each)}
        return dict(sorted((open_ | ({} if len(open_) == len(versions) else {"HAZ": 0})).items()))

    def _hides(self, rule: str) -> bool:
        return rule in self.hidden or rule.startswith("HAZ-")


EVERYTHING = Told(everything=True)


def review_words(each: Review, told: Told = EVERYTHING) -> str:
    """One line about a review that is owed or done."""
    rules = ", ".join(told.rules(each.approval.rules))
    people = ", ".join(who.person for who in each.approval.approvers)
    what = f"break-glass of {rules} for project {each.approval.project} by {people}"
    if each.note is None:
        return f"REVIEW OWED: {what}; airgap approve review"
    who = ", ".join(who.person for who in each.note.people)
    return f"reviewed: {what}; {each.note.issued:%Y-%m-%d} by {who}: {each.note.text}"


def review_document(each: Review, told: Told = EVERYTHING) -> dict[str, Any]:
    """The same as JSON."""
    done = each.note
    return {
        "approval": str(each.approval.digest),
        "rules": told.rules(each.approval.rules),
        "project": each.approval.project,
        "people": [who.person for who in each.approval.approvers],
        "open": each.is_open,
        "finding": None if done is None else done.text,
        "reviewed_by": [] if done is None else [who.person for who in done.people],
    }


def finish(envelope: Envelope, tree: Path, *, json: bool) -> None:
    """Verify what was signed, put it in its place and on record, and say whose signatures count."""
    from airgap.approvals import FOLDER, verify_approval
    from airgap.signed import keep, on_record
    from bundle.trust import load_trust

    approval = verify_approval(envelope, load_trust(tree / "trust").standing)
    who = approval.approvers[-1].person if approval.approvers else "nobody-enrolled"
    with on_record(tree, "admin.approval", who, approval.digest):
        path = keep(envelope, tree / FOLDER)
    warnings = warnings_of(approval, tree)
    for each in warnings:
        stderr.print(f"warning: {each}", markup=False, soft_wrap=True)
    idle = without_effect(approval, tree)
    for rule, reason in idle.items():
        stderr.print(f"lifts nothing yet: {rule}: {reason}", markup=False, soft_wrap=True)
    words = f"wrote {path}\n{words_of(approval)}"
    document = {
        **document_of(approval),
        "file": str(path),
        "warnings": warnings,
        "without_effect": idle,
    }
    show(document, Text(words), json=json)


def without_effect(approval: Approval, tree: Path) -> dict[str, str]:
    """Say for each rule why the approval, as signed now, would not lift it on its first day."""
    from airgap.config import load_site
    from airgap.rules import load_rules
    from policy.approvals import Case, fault_of
    from policy.terms import Scope

    leads: frozenset[str] = frozenset()
    try:
        project = load_site(tree).find_project(approval.project)
        leads = project.principal_investigators if project else leads
    except RefusedError:
        pass  # a tree without site facts: nobody is known to lead
    case = Case(
        scope=Scope.USE,
        bundle=approval.bundle,
        project=approval.project,
        task=approval.task,
        submitter="somebody who did not sign",
        leads=leads,
        as_of=approval.issued.astimezone(UTC).date(),
        known_at=approval.issued,
    )
    rules = {each.id: each for each in load_rules(tree).packs.rules}
    faults = {
        each: fault_of(approval, rules[each], case) for each in approval.rules if each in rules
    }
    return {rule: words for rule, words in sorted(faults.items()) if words}


def warnings_of(approval: Approval, tree: Path) -> list[str]:
    """Say so when this site lacks the project, or its legal day lies before the day of issue."""
    from airgap.config import load_site

    try:
        site = load_site(tree)
        day = site.legal_day(datetime.now(UTC))
    except RefusedError:
        return []  # without a site.toml nothing is decided here
    found = []
    if site.find_project(approval.project) is None:
        found.append(f"no project of site.toml is called {approval.project!r}")
    issued = approval.issued.astimezone(ZoneInfo(site.institution.legal_zone))
    if issued.date() <= day.as_of and issued <= day.known_at:
        return found
    words = f"issued on {issued.date()}, but this site decides as of {day.as_of}"
    found.append(f"{words} ({day.source}): the approval has no effect before its day of issue")
    return found


def document_of(approval: Approval, told: Told = EVERYTHING) -> dict[str, Any]:
    """The approval as JSON."""
    return {
        "digest": str(approval.digest),
        "rules": told.rules(approval.rules),
        "bundle": str(approval.bundle),
        "project": approval.project,
        "task": approval.task,
        "expires": approval.expires.isoformat(),
        "people": [each.person for each in approval.approvers],
        "break_glass": approval.break_glass,
    }


def words_of(approval: Approval, told: Told = EVERYTHING) -> str:
    """The approval in a line."""
    people = ", ".join(each.person for each in approval.approvers)
    return (
        f"{', '.join(told.rules(approval.rules))} for project {approval.project} until"
        f" {approval.expires}, signed by {people or 'nobody of the trust root'}"
        + ", BREAK-GLASS"
        * approval.break_glass
    )


def approved_rules(ids: list[str], tree: Path) -> dict[str, int]:
    """Name the rules in the versions that are loaded here."""
    from airgap.rules import load_rules

    versions = {each.id: each.text.version for each in load_rules(tree).packs.rules}
    for each in ids:
        if each not in versions:
            raise UsageError("usage.argument", f"no rule is called {each!r:.60}")
    return {each: versions[each] for each in ids}


def bundle_digest(bundle: str, tree: Path) -> Digest:
    """The digest of an installed bundle, of a bundle file with a good seal, or as written."""
    from airgap.inquiry import find_subject
    from airgap.rules import load_rules
    from policy.terms import Digest

    if bundle.startswith("sha256:"):
        return Digest.parse(bundle)
    now = datetime.now(UTC)
    found = find_subject(bundle=bundle, model="", root=tree, rules=load_rules(tree), now=now)
    if found.digest is None:
        raise UsageError("usage.argument", f"{bundle!r:.80} has no digest")
    return found.digest


def require_confirmed(statement: Statement[Override], confirm: str | None) -> None:
    """Show what will be signed and have the project typed; RefusedError otherwise."""
    override = statement.predicate
    rules = ", ".join(each.id for each in override.rules)
    require_typed(
        f"You approve {rules} for bundle {statement.about},"
        f" project {override.project}, until {override.expires}: {override.reason}",
        override.project,
        confirm,
        code="policy.approval",
    )
