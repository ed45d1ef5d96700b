"""After an install: `update`, `switch`, `rollback`, `remove`, `backup` and `restore`."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, account_name, root_folder, show
from airgap.cli.forms import Arrival, BundlePath, Passphrase, Project, TransitKeys, Volumes
from airgap.cli.install import bundle_document, open_lab, take_in
from airgap.cli.options import grouped
from airgap.cli.runtimes import wheels_rows
from airgap.cli.shown import bar, table
from policy.errors import UsageError
from policy.wording import counted

if TYPE_CHECKING:
    from airgap.audit import Actor, AuditLog
    from airgap.audit.service import Log
    from airgap.config import Site
    from airgap.install.lifecycle import Switched
    from bundle.envelope import Envelope

NICE = 10
PATIENT_S = 30.0  # for the log's service to take the list of files of a backup


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("update")(update)
    app.command("switch")(switch)
    app.command("rollback")(rollback)
    app.command("remove")(remove)
    app.command("backup")(backup)
    app.command("restore")(restore)


@grouped
def update(
    bundle: BundlePath,
    *,
    arrival: Arrival,
    root: Root = None,
    json: Json = False,
) -> None:
    """Install a newer release of a line that is installed: a bundle, or a delta to what is here.

    The release before it stays in the store, for `airgap rollback`.
    """
    take_in(bundle, arrival, root=root, json=json, update=True)


def switch(
    name: Annotated[str, typer.Argument(help="Name, name-version or digest of a release.")],
    *,
    project: Project = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Make another installed model the default: the active or the newest release of its line."""
    _switch(name, None, project, root, json=json)


def rollback(
    release: Annotated[
        str,
        typer.Argument(help="An installed release (name-version, digest), or a bundle file."),
    ],
    *,
    approval: Annotated[
        Path,
        typer.Option("--approval", help="The signed approval: airgap trust rollback-sign."),
    ],
    project: Project = None,
    volume: Volumes = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Go back to an older release, by a signed approval that names it and this host's mark.

    The policy is asked again, and a release that is revoked or expired never comes back.
    """
    envelope = read_approval(approval)
    path = Path(release)
    if path.exists():
        arrival = Arrival(project, volume)
        take_in(path, arrival, root=root, json=json, rollback=envelope)
    else:
        _switch(release, envelope, project, root, json=json)


def read_approval(path: Path) -> Envelope:
    """Return a file that approves a rollback, parsed and not believed."""
    from bundle.envelope import parse_envelope
    from bundle.keys import read_limited
    from bundle.rollback import ROLLBACK_LIMIT

    code = "trust.rollback"
    raw = read_limited(path, 2 * ROLLBACK_LIMIT, code=code, what="the approval")
    return parse_envelope(raw.strip(b"\n"), code=code, limit=2 * ROLLBACK_LIMIT)


def remove(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Name, name-version or digest of a release.", metavar="[NAME]..."),
    ] = None,
    *,
    default: Annotated[
        bool, typer.Option("--default", help="Remove it even if it answers by default.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove all that runs; needs --keep-audit.")
    ] = False,
    keep_audit: Annotated[
        bool,
        typer.Option("--keep-audit", help="With --all: keep the log and what it is judged by."),
    ] = False,
    system: Annotated[
        bool, typer.Option("--system", help="With --all: also units, settings and profile.")
    ] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Delete releases, or with --all everything that can run; the log is never deleted.

    With --all these go: releases, held jobs, results of probes, private keys but the log's. These
    stay: the log with its keys, trust root, rules, approvals, site facts, restricted records.
    """
    from airgap.install.lifecycle import remove as drop

    if everything:
        _retire(names, root, keep_audit=keep_audit, system=system, json=json)
        return
    if keep_audit or system or not names:
        raise UsageError(
            "usage.argument",
            "remove takes names of releases, or --all --keep-audit",
            hint="airgap list shows what is installed",
        )
    folder = root_folder(root)
    log, record = _recorder(folder)
    with log:
        done = drop(names, root=folder, audit=record(log), default=default)
    found = [bundle_document(each, current=False) for each in done.bundles]
    rows = [
        ("removed", f"{each.manifest.name} {each.manifest.version}, {each.digest}")
        for each in done.bundles
    ]
    rows.append(("on record", f"audit log, record {done.receipts[-1].seq}"))
    document = {
        "format": "airgap/removed/1",
        "bundles": found,
        "receipts": [receipt.as_document() for receipt in done.receipts],
    }
    show(document, table(rows), json=json)


def backup(
    *,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    to: Annotated[
        list[Path] | None,
        typer.Option("--to", help="Public transit key of who may restore; repeatable."),
    ] = None,
    releases: Annotated[
        bool,
        typer.Option(
            "--releases/--no-releases", help="Whether installed releases go along, or come again."
        ),
    ] = True,
    root: Root = None,
    json: Json = False,
) -> None:
    """Write log, keys, rules and releases of this tree to one encrypted file; on record.

    A daemon goes on serving meanwhile. Keep the head that is printed apart from the file: a
    restored log must hold it.
    """
    from airgap.install.backup import back_up
    from bundle.keys import read_limited
    from bundle.transit import KEY_LIMIT, parse_transit_key

    if not to:
        raise UsageError(
            "usage.argument",
            "a backup holds private keys, and is written for somebody: --to NAME.transit.pub.json",
            hint="airgap keys transit NAME makes a pair; the private half stays with its holder",
        )
    recipients = [
        parse_transit_key(read_limited(path, KEY_LIMIT, code="transit.key", what="the key"))
        for path in to
    ]
    folder = root_folder(root)
    site, actor = _acting(folder)
    with bar("backup") as progress:
        done = back_up(
            folder,
            out.absolute(),
            recipients,
            open_log=lambda tree: _served_or_own_log(tree, site),
            actor=actor,
            now=datetime.now(UTC),
            releases=releases,
            progress=progress,
        )
    document = {
        "format": "airgap/backup/1",
        "file": str(out),
        "size": out.stat().st_size,
        "files": done.files,
        "records": done.records,
        "head": done.head,
        "inventory": str(done.inventory),
        "recipients": [each.keyid for each in done.transit.recipients],
        "receipt": done.receipt.as_document(),
    }
    rows = [
        (
            "backup",
            f"{out}, {out.stat().st_size:,} bytes, for {counted(len(recipients), 'recipient')}",
        ),
        ("holds", f"{counted(done.files, 'file')} and a log of {counted(done.records, 'record')}"),
        ("inventory", str(done.inventory)),
        ("on record", f"audit log, record {done.receipt.seq}"),
    ]
    text = f"{table(rows)}\n\nkeep this head apart from the file:\n\n{done.head}"
    show(document, text, json=json)


def restore(
    file: Annotated[Path, typer.Argument(help="The backup.")],
    *,
    vkey: Annotated[Path, typer.Option("--vkey", help="Verifier keys of the log, kept elsewhere.")],
    anchors: Annotated[
        list[Path] | None,
        typer.Option("--anchors", help="Receipts and heads kept elsewhere, or folders of them."),
    ] = None,
    transit_key: TransitKeys = None,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Bring a backup back into a new tree, and go on with its log.

    The old host must not go on with it too: give --anchors the newest receipts that you have.
    """
    from airgap.audit import load_ring
    from airgap.audit.site import open_own_log
    from airgap.config import load_site
    from airgap.host_setup import Places, settle_restored
    from airgap.install.restore import restore as bring_back
    from bundle.keys import read_passphrase
    from bundle.source import PlainFile
    from bundle.transit import TransitFile, load_identity

    folder = root_folder(root)
    phrase = read_passphrase(passphrase_file)
    identities = [load_identity(path, phrase) for path in transit_key or ()]
    ring = load_ring(vkey)

    def open_log(tree: Path) -> AuditLog:
        return open_own_log(tree, load_site(tree))

    plain = PlainFile(file)
    try:
        source = TransitFile(plain, identities)
        with bar("restore") as progress:
            done = bring_back(
                source,
                folder,
                ring=ring,
                anchors=anchors or (),
                open_log=open_log,
                actor=None,
                progress=progress,
            )
    finally:
        plain.close()
    left = settle_restored(Places(folder, folder, system=True), load_site(folder))
    document = {
        "format": "airgap/restored/1",
        "root": str(folder),
        "origin": done.origin,
        "records": done.records,
        "files": done.files,
        "created": done.created.isoformat(),
        "verdict": done.verdict.as_document(),
        "receipt": done.receipt.as_document(),
        "owners": left,
    }
    anchored = done.verdict.anchored_size
    rows = [
        (
            "restored",
            f"{folder}, {counted(done.files, 'file')}, backed up {done.created:%Y-%m-%d %H:%M} UTC",
        ),
        ("log", f"{done.origin}, {counted(done.records, 'record')} verified"),
        (
            "anchored",
            f"to {counted(anchored, 'record')} by what was given"
            if done.verdict.anchors
            else "by nothing: records after the backup, if there were any, cannot be told",
        ),
        ("goes on", f"audit log, record {done.receipt.seq}"),
        *([("owners", left)] if left else []),
        ("next", "airgap doctor; airgap status; airgap audit verify --vkey FILE"),
    ]
    show(document, table(rows), json=json)


def _switch(
    name: str, approval: Envelope | None, project: str | None, root: Path | None, *, json: bool
) -> None:
    from airgap.audit.site import open_site_log
    from airgap.install.lifecycle import switch as make_active
    from airgap.install.record import act_recorder
    from airgap.rule_history import put_on_record

    folder = root_folder(root)
    lab = open_lab(folder, project)
    with open_site_log(folder, lab.site) as log, bar("check") as progress:
        put_on_record(log, lab.rules)
        done = make_active(
            name,
            root=folder,
            now=lab.now,
            gate=lab.gate,
            audit=act_recorder(log, actor=lab.actor, project=project),
            approval=approval,
            progress=progress,
        )
    _show_switched(done, folder, json=json)


def _show_switched(done: Switched, folder: Path, *, json: bool) -> None:
    from airgap.service.presence import taken_over

    approval = done.approval
    service, told = taken_over(folder, str(done.bundle.digest))
    document: dict[str, Any] = {
        **bundle_document(done.bundle, current=True),
        "decision": str(done.decision.digest),
        "previous": None if done.previous is None else str(done.previous),
        "service": service,
        "approvers": [] if approval is None else list(approval.approvers),
        "receipt": done.receipt.as_document(),
    }
    manifest = done.bundle.manifest
    rows = [
        ("answers now", f"{manifest.name} {manifest.version}, epoch {manifest.epoch}"),
        ("digest", str(done.bundle.digest)),
        ("before", document["previous"] or "nothing"),
        ("admitted", f"decision {done.decision.digest}"),
    ]
    if approval is not None:
        rows.append(
            ("approved", f"{', '.join(approval.approvers)}: {approval.statement.reason:.200}")
        )
    rows += wheels_rows(manifest)
    rows.append(("on record", f"audit log, record {done.receipt.seq}"))
    show(document, table([*rows, *told]), json=json)


def _retire(
    names: list[str] | None, root: Path | None, *, keep_audit: bool, system: bool, json: bool
) -> None:
    from airgap.audit import Event, new_ulid
    from airgap.audit.site import open_site_log
    from airgap.host_setup import Places, Program, stop_daemon, take_down
    from airgap.install.lifecycle import retire
    from airgap.service.presence import require_none

    if names or not keep_audit:
        raise UsageError(
            "usage.argument",
            "--all takes no names, and needs --keep-audit: no command deletes the log",
            hint="export it, keep it for its term, and delete the folder by hand",
        )
    folder = root_folder(root)
    site, actor = _acting(folder)
    request = new_ulid()
    places, program = Places(folder, folder, system), Program()
    if system:
        stop_daemon(places, program)  # the log's own service goes on until all is on record
    require_none(folder)
    with open_site_log(folder, site) as log:

        def record(phase: str, result: str) -> Any:
            facts = {"object": "everything that runs", **({"result": result} if result else {})}
            return log.append(Event("admin.remove", phase, req=request, actor=actor, data=facts))

        done = retire(folder, audit=record)
    gone = list(take_down(places, program)) if system else []
    rows = [("removed", str(path.relative_to(folder))) for path in done.gone]
    rows += [("removed", path) for path in gone]
    rows += [("kept", str(path.relative_to(folder))) for path in done.kept]
    rows += (
        [("kept", "accounts, /etc/airgap, drop-ins, and the program: rm -r its folder")]
        if system
        else []
    )
    rows.append(("on record", f"audit log, record {done.receipt.seq}"))
    document = {
        "format": "airgap/retired/1",
        "removed": [*map(str, done.gone), *gone],
        "kept": [str(path) for path in done.kept],
        "receipt": done.receipt.as_document(),
    }
    show(document, table(rows), json=json)


def _acting(folder: Path) -> tuple[Any, Actor | None]:
    """Return the site and who acts, as the log names her."""
    from airgap.config import load_site
    from airgap.install.record import actor_of, find_submitter

    site = load_site(folder)
    person = find_submitter(site, os.getuid(), account_name())
    return site, None if person is None else actor_of(person)


def _served_or_own_log(folder: Path, site: Site) -> Log:
    """Return the log of the service that holds it, where one runs; else open it here."""
    from airgap.audit.site import find_log_socket, open_own_log
    from airgap.audit.steward import held_by_service

    served = held_by_service(
        find_log_socket(folder, site.audit), folder / "audit", deadline_s=PATIENT_S
    )
    if served is None:
        return open_own_log(folder, site)
    os.nice(NICE)  # people wait for answers on the same machine; nobody waits for a backup
    return served


def _recorder(folder: Path) -> tuple[Any, Any]:
    from airgap.audit.site import open_site_log
    from airgap.install.record import act_recorder

    site, actor = _acting(folder)
    return open_site_log(folder, site), lambda log: act_recorder(log, actor=actor, project=None)
