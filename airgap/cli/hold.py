"""`airgap hold`: what is held, who releases it, and the answer once it is released."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from airgap.cli.common import Json, Root, account_name, root_folder, show, stderr
from airgap.cli.signing import (
    EXPIRES,
    REASON,
    Confirm,
    Filed,
    Key,
    Passphrase,
    document_digest,
    require_typed,
    signer_of,
)
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from airgap.config import Site
    from airgap.holds import Hold, Holds
    from airgap.release_desk import ReleaseDesk
    from airgap.rules import Rules

HAZARD_HINT = "the hazard officer sees more: airgap hold show"

Reference = Annotated[str, typer.Argument(help="Reference of the hold, or its number.")]
Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        help="Ask the daemon there, for one's own holds; default [service] socket of site.toml, "
        "where the holds of the tree cannot be read.",
        readable=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="What is held for review, and its release.", no_args_is_help=True)
    group.command("list")(show_all)
    group.command("show")(show_one)
    group.command("release")(release)
    group.command("fetch")(fetch)
    group.command("open")(open_output)
    group.command("key")(make_key)
    group.command("alerts")(alerts)
    group.command("purge")(purge)
    app.add_typer(group, name="hold")


def show_all(*, socket: Socket = None, root: Root = None, json: Json = False) -> None:
    """List the holds of this tree, or at the daemon one's own: reference, who asked, how far."""
    daemon = socket or daemon_for(root)
    if daemon is not None:
        from airgap.service.client import holds as holds_there

        rows = holds_there(daemon)
    else:
        desk = Desk.of(root)
        rows = [desk.board.row(hold) for hold in desk.holds.every()]
    lines = [
        f"{row['reference']}  {row['opened'][:16]}  {row['person']}  {row['project']}"
        f"  {row['task']} ({row['stage']})  {row['state']}"
        + (f"  [{', '.join(row['rules'])}]" if "rules" in row else "")
        for row in rows
    ]
    show({"holds": rows}, Text("\n".join(lines) or "nothing is held"), json=json)


def show_one(hold: Reference, *, root: Root = None, json: Json = False) -> None:
    """Show one hold; what was asked, the rules and the classes only to the hazard officer."""
    desk = Desk.of(root)
    found = desk.holds.find(hold)
    row = desk.board.row(found)
    if desk.hazard_role:
        inputs, options = found.inputs_and_options()
        record = desk.holds.decision(found)
        facts = {each["name"]: each for each in record["facts"]}
        row |= {
            "inputs": inputs,
            "options": options,
            "reasons": record["reasons"],
            "classes": facts.get("screen.classes", {}).get("value", []),
            "faults": desk.board.faults(found),
        }
    lines = [f"{name:>10}  {words}" for name, value in row.items() for words in in_words(value)]
    text = "\n".join(lines) + ("" if desk.hazard_role else f"\n{HAZARD_HINT}")
    show(row, Text(text), json=json)


def in_words(value: Any) -> list[str]:
    """Return a value as lines: a reason by rule and plain words, a mapping by name."""
    if isinstance(value, dict):
        return [f"{name}: {each}" for name, each in value.items()]
    if not isinstance(value, list):
        return [str(value)]
    return [
        f"{each['rule']} ({each['state']}): {each['plain']}"
        if isinstance(each, dict)
        else str(each)
        for each in value
    ]


def alerts(
    *,
    every: Annotated[bool, typer.Option("--all", help="All of them, not the sample.")] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """List the quiet flags of tier H1 that are drawn for review; for the hazard officer alone."""
    desk = Desk.of(root)
    if not desk.hazard_role:
        raise RefusedError(
            "site.person",
            "this account is not that of a hazard officer",
            hint="site.toml gives the role `hazard_officer`",
        )
    found = desk.holds.alerts()
    rows = [
        {
            "commit": each.commit,
            "known_at": each.record["known_at"],
            **{name: each.record["request"][name] for name in ("person", "project", "task")},
            "classes": list(each.classes),
        }
        for each in found
        if every or each.drawn
    ]
    lines = [
        f"{row['known_at'][:16]}  {row['person']}  {row['project']}  {row['task']}"
        f"  {row['commit'][:16]}"
        for row in rows
    ]
    head = f"{len(rows)} of {len(found)} quiet flags"
    document = {"alerts": rows, "flags": len(found)}
    show(document, Text("\n".join([head, *lines])), json=json)


def release(
    hold: Reference,
    *,
    key: Key,
    reason: Annotated[str, REASON] = "",
    expires: Annotated[datetime | None, EXPIRES] = None,
    document: Filed = None,
    confirm: Confirm = None,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Sign a release; the first signer words it, the next ones sign the same words."""
    from airgap import holds
    from airgap.signed import on_record
    from policy.terms import Digest

    desk = Desk.of(root)
    found = desk.holds.find(hold)
    signer = signer_of(key, passphrase_file, desk.tree)
    mine = desk.require_releaser(found, signer)  # before anything is told of what holds it
    desk.require_releasable(found)
    open_release = desk.board.current(found)
    if open_release is None:
        if not reason or expires is None:
            raise UsageError(
                "usage.argument",
                "the first signer of a release gives --reason and --expires",
                hint="airgap hold release REF --key K --reason WHY --expires 2026-12-31",
            )
        issued = datetime.now(UTC).replace(microsecond=0)
        desk.require_terms(found, (expires.date() - issued.date()).days, filed=document is not None)
        statement = holds.word_release(
            found,
            reason=reason,
            issued=issued,
            expires=expires.date(),
            document=document_digest(document),
        )
        desk.confirm(found, statement.predicate.reason, confirm)
        envelope = holds.RELEASE.sign(statement, signer)
    else:
        if reason or expires or document:
            raise UsageError(
                "usage.argument",
                "a release of it is open already; its words are those of its first signer",
                hint="leave --reason, --expires and --document away to sign the same words",
            )
        desk.confirm(found, open_release.release.reason, confirm)
        envelope = holds.countersign_release(open_release.envelope, signer)
    signed = holds.verify_release(envelope, desk.trust)
    with on_record(desk.tree, "admin.hold", mine, Digest.of(envelope.payload)):
        path = desk.holds.add_release(envelope)
    row = desk.board.row(found) | {"file": str(path), "people": [p.person for p in signed.people]}
    lacking = desk.lacking(found)
    show(row, f"wrote {path}\n{found.reference}: {row['state']}{lacking}", json=json)


def fetch(
    hold: Reference,
    *,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
    sdf: Annotated[Path | None, typer.Option(help="Write the molecules as SDF.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report with drawings.")] = None,
    receipt: Annotated[Path | None, typer.Option(help="Write the receipt (tlog-proof).")] = None,
    socket: Socket = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Get the answer of a released hold: the same job and seed, judged and on record again."""
    from airgap.cli.run import infer_with_progress
    from airgap.serve import Job, check_outputs, open_broker, present

    outputs = {"csv": csv, "sdf": sdf, "html": html, "receipt": receipt}
    daemon = socket or daemon_for(root)
    if daemon is not None:
        _fetch_there(daemon, hold, outputs, json=json)
        return
    desk = Desk.of(root)
    found = desk.holds.find(hold)
    check_outputs(found.task, outputs)
    inputs, options = found.inputs_and_options()
    with open_broker(
        desk.tree,
        model=found.bundle,
        project=found.project,
        valence=options.get("valence") is True,
    ) as (broker, chosen):
        job = Job(found.task, inputs, chosen, options, held=found.request)
        answer = infer_with_progress(broker, job)
        presented = present(broker, job, answer, outputs)
    if not json:
        stderr.print(f"released: {found.reference}", markup=False, soft_wrap=True)
    show({**presented.json, "hold": found.reference}, presented.text, json=json)


def _fetch_there(daemon: Path, hold: str, outputs: dict[str, Path | None], *, json: bool) -> None:
    """Have the daemon answer it: as whom the kernel knows her, with no right on its files."""
    from airgap.cli.run import progress_bar
    from airgap.serve import check_outputs
    from airgap.service.client import fetch as fetch_there
    from airgap.service.client import hold_of

    found = hold_of(daemon, hold)
    check_outputs(found["task"], outputs)
    with progress_bar() as tell:
        presented = fetch_there(daemon, found["reference"], outputs, tell)
    if not json:
        stderr.print(f"released: {found['reference']}", markup=False, soft_wrap=True)
    show({**presented.json, "hold": found["reference"]}, presented.text, json=json)


def daemon_for(root: Path | None) -> Path | None:
    """Return the daemon that an account without a right on the tree's holds has to ask."""
    from airgap.cli.run import daemon_of

    tree = root_folder(root)
    daemon = daemon_of(root)
    return None if os.access(tree / "holds", os.R_OK | os.X_OK) else daemon


def open_output(
    hold: Reference,
    *,
    key: Annotated[Path, typer.Option("--key", help="Private half of the hold key.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A file that does not exist yet.")],
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Decrypt what the model wrote, for the people who review it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from bundle.keys import read_limited, read_passphrase

    desk = Desk.of(root)
    raw = read_limited(key, 1 << 16, code="hold.key", what="the key")
    try:
        private = serialization.load_pem_private_key(raw, read_passphrase(passphrase_file))
    except (ValueError, TypeError) as error:
        raise RefusedError("hold.key", f"{key}: {error!s:.120}") from error
    if not isinstance(private, X25519PrivateKey):
        raise RefusedError("hold.key", f"{key} is no X25519 key")
    content = desk.holds.open_output(desk.holds.find(hold), private)
    write_private(out, content)
    show({"out": str(out), "bytes": len(content)}, f"wrote {out}", json=json)


def purge(hold: Reference, *, root: Root = None, json: Json = False) -> None:
    """Remove what was typed and written of a hold; that it was held stays on record."""
    from airgap.signed import on_record

    desk = Desk.of(root)
    found = desk.holds.find(hold)
    with on_record(desk.tree, "admin.hold", account_name(), found.digest):
        gone = desk.holds.purge(found)
    show({"reference": found.reference, "removed": gone}, f"removed {', '.join(gone)}", json=json)


def make_key(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the private half goes.")],
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make the key that held outputs are encrypted to; its private half leaves this host."""
    from cryptography.hazmat.primitives import serialization

    from airgap.holds import KEY_FILE, new_key
    from bundle.keys import read_passphrase

    target = root_folder(root) / KEY_FILE
    if target.exists():
        raise RefusedError("hold.key", f"{target} is there already")
    public, key = new_key()
    word = read_passphrase(passphrase_file)
    lock = serialization.BestAvailableEncryption(word) if word else serialization.NoEncryption()
    write_private(
        out,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption_algorithm=lock
        ),
    )
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.write_bytes(public)
    words = f"wrote {target}\nkeep {out} with those who review holds, and not on this host"
    show({"public": str(target), "private": str(out)}, words, json=json)


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that its owner alone can read."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError as error:
        raise UsageError(
            "usage.argument", f"--out: {path} exists", hint="name a new file"
        ) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


# -- what a command needs of the tree -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Desk:
    """Holds, rules and people of a tree, and whether the reader has the hazard role."""

    tree: Path
    site: Site
    rules: Rules
    trust: Any
    holds: Holds
    hazard_role: bool
    board: ReleaseDesk

    @classmethod
    def of(cls, root: Path | None) -> Desk:
        """Open a tree."""
        from airgap.config import load_site
        from airgap.holds import Holds
        from airgap.inquiry import find_reader
        from airgap.release_desk import ReleaseDesk
        from airgap.rules import load_rules
        from bundle.trust import load_trust
        from policy.report import HAZARD_ROLE

        tree = root_folder(root)
        site, trust = load_site(tree), load_trust(tree / "trust").standing
        reader = find_reader(site, "", os.getuid(), account_name())
        role = reader is not None and HAZARD_ROLE in reader.roles
        rules, holds = load_rules(tree), Holds(tree, trust)
        board = ReleaseDesk(tree, site, rules, trust, holds, role)
        return cls(tree, site, rules, trust, holds, role, board)

    def require_releasable(self, hold: Hold) -> None:
        """Refuse where no signature could help: RefusedError `hold.release`."""
        rules = {each.id: each for each in self.rules.packs.rules}
        for name in self.holds.blocking(hold):
            rule = rules.get(name)
            if rule is None or rule.text.override.kind != "approval":
                raise RefusedError(
                    "hold.release",
                    "what holds it admits no release"
                    + (f": {name} cannot be lifted by approval" if self.hazard_role else ""),
                    hint="the hazard officer decides what happens to it outside this program",
                )

    def require_terms(self, hold: Hold, days: int, *, filed: bool) -> None:
        """Refuse a release that its rules would never count: RefusedError `hold.release`."""
        rules = {each.id: each for each in self.rules.packs.rules}
        terms = [rules[name].text.override for name in self.holds.blocking(hold)]
        most = min((each.max_days for each in terms if each.kind == "approval"), default=days)
        if days > most:
            raise RefusedError(
                "hold.release",
                f"it would run {days} days, and its rules admit {most} at most",
                hint=f"--expires at most {most} days from today",
            )
        if not filed and any(each.kind == "approval" and each.needs_document for each in terms):
            raise RefusedError(
                "hold.release",
                "its rules ask for a document on file",
                hint="add --document FILE: its digest is signed, and it stays with you",
            )

    def lacking(self, hold: Hold) -> str:
        """Say to who has signed why the release does not count yet, without the rules' names."""
        faults = self.board.faults(hold)
        return "".join(f"; {each}" for each in sorted({each.split(": ", 1)[1] for each in faults}))

    def require_releaser(self, hold: Hold, signer: Any) -> str:
        """Return who signs: a person of the trust root who did not ask; else `hold.release`."""
        from policy.approvals import same_person

        people = self.trust.people_of(each.public_key.keyid for each in signer)
        for each in sorted(people):
            if same_person(each) != same_person(hold.person):
                return str(each)
        raise RefusedError(
            "hold.release",
            "this key releases nothing here: it needs a person of the trust root who did not ask",
            hint="airgap trust show lists the people",
        )

    def confirm(self, hold: Hold, reason: str, confirm: str | None) -> None:
        """Show what will be signed and have the project typed; RefusedError if not."""
        require_typed(
            f"You release {hold.reference}: {hold.task} ({hold.stage}) asked by {hold.person} for"
            f" project {hold.project}: {reason}",
            hold.project,
            confirm,
            code="hold.release",
        )
