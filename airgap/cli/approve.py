"""`airgap approve new|sign|list`: named people lift a rule for one bundle and project."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from airgap.approvals import OverrideStatement
    from bundle.envelope import Envelope
    from policy.approvals import Approval
    from policy.terms import Digest

DOCUMENT_LIMIT = 64 * 1024 * 1024  # bytes of the filed document

Key = Annotated[str, typer.Option("--key", help="Your private key: a file, or a name in keys/.")]
Confirm = Annotated[
    str | None, typer.Option("--confirm", help="What you would type: the project's id.")
]
Passphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Its first line opens the key.")
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Lift a rule as its terms allow, in writing.", no_args_is_help=True)
    group.command("new")(new)
    group.command("sign")(sign)
    group.command("list")(show_all)
    app.add_typer(group, name="approve")


def new(
    rules: Annotated[list[str], typer.Argument(help="Rules to lift, such as LIC-CONFLICT.")],
    *,
    key: Key,
    bundle: Annotated[str, typer.Option("--bundle", help="Bundle file, name or digest.")],
    project: Annotated[str, typer.Option("--project", help="The only project it counts for.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, in your words.")],
    expires: Annotated[
        datetime,
        typer.Option("--expires", formats=["%Y-%m-%d"], help="First day it no longer counts."),
    ],
    task: Annotated[str, typer.Option("--task", help="The only task. Default: all.")] = "",
    document: Annotated[
        Path | None, typer.Option("--document", help="The memo on file; its digest is kept.")
    ] = None,
    authority: Annotated[
        str, typer.Option("--authority", help="For a government waiver: who granted it.")
    ] = "",
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
    )
    statement = approvals.draft(bundle_digest(bundle, tree), override)
    require_confirmed(statement, confirm)
    envelope = approvals.sign(statement, signer_of(key, passphrase_file, tree))
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

    tree = root_folder(root)
    envelope = approvals.read_approval(approval)
    require_confirmed(approvals.parse_override(envelope.payload), confirm)
    signed = approvals.countersign(envelope, signer_of(key, passphrase_file, tree))
    finish(signed, tree, json=json)


def show_all(*, root: Root = None, json: Json = False) -> None:
    """List the approvals of this site, and who signed them."""
    from airgap.approvals import load_approvals
    from bundle.trust import load_trust

    tree = root_folder(root)
    found = load_approvals(tree, load_trust(tree / "trust").document).approvals
    lines = [words_of(each) for each in found] or ["no approval"]
    show({"approvals": [document_of(each) for each in found]}, "\n".join(lines), json=json)


def finish(envelope: Envelope, tree: Path, *, json: bool) -> None:
    """Verify what was signed, put it in its place, and say whose signatures count."""
    from airgap.approvals import verify_approval, write_approval
    from bundle.trust import load_trust

    approval = verify_approval(envelope, load_trust(tree / "trust").document)
    path = write_approval(envelope, tree)
    warnings = warnings_of(approval, tree)
    for each in warnings:
        stderr.print(f"warning: {each}", markup=False, soft_wrap=True)
    words = f"wrote {path}\n{words_of(approval)}"
    document = {**document_of(approval), "file": str(path), "warnings": warnings}
    show(document, words, json=json)


def warnings_of(approval: Approval, tree: Path) -> list[str]:
    """Say so when the legal day of this site lies before the day of issue."""
    from airgap.config import load_site

    try:
        day = load_site(tree).legal_day(datetime.now(UTC))
    except RefusedError:
        return []  # without a site.toml nothing is decided here
    issued = approval.issued.astimezone(UTC)
    if issued.date() <= day.as_of and issued <= day.known_at:
        return []
    words = f"issued on {issued.date()} (UTC), but this site decides as of {day.as_of}"
    return [f"{words} ({day.source}): the approval has no effect before its day of issue"]


def document_of(approval: Approval) -> dict[str, Any]:
    """The approval as JSON."""
    return {
        "digest": str(approval.digest),
        "rules": dict(sorted(approval.rules.items())),
        "bundle": str(approval.bundle),
        "project": approval.project,
        "task": approval.task,
        "expires": approval.expires.isoformat(),
        "people": [each.person for each in approval.approvers],
    }


def words_of(approval: Approval) -> str:
    """The approval in a line."""
    people = ", ".join(each.person for each in approval.approvers)
    return (
        f"{', '.join(sorted(approval.rules))} for project {approval.project} until"
        f" {approval.expires}, signed by {people or 'nobody of the trust root'}"
    )


def approved_rules(ids: list[str], tree: Path) -> dict[str, int]:
    """Name the rules in the versions that are loaded here."""
    from airgap.gate import load_rules

    versions = {each.id: each.text.version for each in load_rules(tree).packs.rules}
    for each in ids:
        if each not in versions:
            raise UsageError("usage.argument", f"no rule is called {each!r:.60}")
    return {each: versions[each] for each in ids}


def bundle_digest(bundle: str, tree: Path) -> Digest:
    """The digest of an installed bundle, of a bundle file with a good seal, or as written."""
    from airgap.gate import load_rules
    from airgap.inquiry import find_subject
    from policy.terms import Digest

    if bundle.startswith("sha256:"):
        return Digest.parse(bundle)
    now = datetime.now(UTC)
    found = find_subject(bundle=bundle, model="", root=tree, rules=load_rules(tree), now=now)
    if found.digest is None:
        raise UsageError("usage.argument", f"{bundle!r:.80} has no digest")
    return found.digest


def document_digest(path: Path | None) -> Digest | None:
    """The digest of the filed document."""
    from bundle.keys import read_limited
    from policy.terms import Digest

    if path is None:
        return None
    content = read_limited(path, DOCUMENT_LIMIT, code="policy.approval", what="the document")
    return Digest.of(content)


def signer_of(key: str, passphrase_file: Path | None, tree: Path) -> Any:
    """Open a private key: a file, or a name in keys/ of the tree."""
    from bundle.keys import load_signer, read_passphrase

    path = Path(key)
    if "/" not in key and not path.exists():
        path = tree / "keys" / f"{key.removesuffix('.pem')}.pem"
    return load_signer(path, read_passphrase(passphrase_file))


def require_confirmed(statement: OverrideStatement, confirm: str | None) -> None:
    """Show what will be signed and have the project typed; RefusedError otherwise."""
    override = statement.predicate
    rules = ", ".join(each.id for each in override.rules)
    stderr.print(
        f"You approve {rules} for bundle sha256:{statement.subject[0].digest.sha256},"
        f" project {override.project}, until {override.expires}: {override.reason}",
        markup=False,
        soft_wrap=True,
    )
    if confirm is None and sys.stdin.isatty():
        stderr.print(f"Type {override.project!r} to sign, anything else to stop: ", end="")
        confirm = sys.stdin.readline()
    if (confirm or "").strip() != override.project:
        raise RefusedError(
            "policy.approval",
            "nothing was signed: the confirmation is not the project's id",
            hint=f"read it, then add: --confirm {override.project}",
        )
