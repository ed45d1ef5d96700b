"""`airgap audit` on exports: take one in, write rows, hand out the verifiers, report use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from airgap.cli.common import Json, Root, account_name, root_folder, show
from airgap.cli.options import grouped
from airgap.cli.report import Span, Written, installed
from policy.errors import FaultError, UsageError
from policy.wording import counted

_READ_ME = """Verifiers for exports of an airgap usage log. They share no code with airgap.

Keep this folder apart from the export that it judges, on media that you sealed or wrote yourself;
check it with `sha256sum -c SHA256SUMS`. Keys and receipts come from you, never from the export.

Python 3.9 or later with the package `cryptography` (ML-DSA-87 needs release 47 or later):
  python3 verify_export.py EXPORT --vkey audit.vkey --export-key export.pub --anchors RECEIPTS \\
      --memory FOLDER

Go, on Debian: apt install golang-go golang-golang-x-mod-dev (no download of modules)
  GO111MODULE=off GOPATH=/usr/share/gocode go build -o verify_export verify_export.go
  ./verify_export EXPORT ... the same options

Exit 0 good, 1 tampered, 2 usage, 3 cannot tell. What each does not judge stands at its head.
"""


def register(group: typer.Typer) -> None:
    """Add the commands to the group `audit`."""
    group.command(name="import")(import_)
    group.command(name="rows")(rows)
    group.command(name="tools")(tools)
    group.command(name="report")(report)


def import_(
    export: Annotated[Path, typer.Argument(help="Folder of an export, as it came on media.")],
    *,
    vkey: Annotated[Path, typer.Option("--vkey", help="Verifier keys of the log.")],
    export_key: Annotated[
        Path, typer.Option("--export-key", help="Public export keys of the host that made it.")
    ],
    memory: Annotated[
        Path, typer.Option("--memory", help="Folder where you remember the last of each log.")
    ],
    anchors: Annotated[
        list[Path] | None, typer.Option(help="Receipts or heads kept elsewhere; repeatable.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Trust policy: which witnesses a checkpoint needs.")
    ] = None,
    json: Json = False,
) -> None:
    """Judge an export by the last one that you took. Exit 0 good, 1 tampered, 3 cannot tell."""
    from airgap.audit import load_ring
    from airgap.audit.export.importing import import_export
    from airgap.audit.export.sign import load_export_public
    from airgap.audit.quorum import load_policy

    if not export.is_dir():
        raise FaultError("audit.absent", f"no folder {export}", hint="check the path")
    found = import_export(
        export,
        memory,
        vkey=load_ring(vkey),
        export_keys=load_export_public(export_key),
        anchors=anchors or (),
        policy=load_policy(policy) if policy else None,
    )
    verdict = found.verdict
    document = verdict.as_document() | {
        "number": found.number, "previous": found.previous, "remembered": found.remembered,
    }  # fmt: skip
    said = f"{verdict.verdict}: export {found.number} of {verdict.origin or export}"
    lines = [
        f"{said}, {counted(verdict.size, 'record')}, anchored to {verdict.anchored_size}",
        *map(str, verdict.findings),
        f"remembered in {memory}" if found.remembered else "not remembered",
    ]
    show(document, "\n".join(lines), json=json)
    raise typer.Exit(verdict.exit)


def rows(
    log: Annotated[
        Path | None, typer.Argument(help="Folder that holds `log/`, such as an export.")
    ] = None,
    *,
    name: Annotated[
        str, typer.Option("--format", help="jsonl, csv, ocsf, rfc5424[-NUMBER], cef or hec.")
    ] = "ocsf",
    out: Annotated[Path, typer.Option("--out", "-o", help="A file that does not exist yet.")],
    since: Annotated[int, typer.Option("--since", min=0, help="First record.")] = 0,
    root: Root = None,
    json: Json = False,
) -> None:
    """Write rows for a collector from the records under the newest head. Verify the log first."""
    from airgap.audit.export.rows import FORMATS, find_format
    from airgap.audit.export.write import write_rows
    from airgap.audit.layout import Layout

    chosen = find_format(name)
    if chosen is None:
        known = ", ".join(sorted(FORMATS))
        raise UsageError("usage.argument", f"--format: {name!r:.40}", hint=f"use one of {known}")
    folder = root_folder(root) / "audit" if log is None else log.expanduser().absolute()
    try:
        with out.open("xb") as file:
            count = write_rows(Layout(folder), file, chosen, since)
    except OSError as error:
        raise FaultError(
            "host.io", f"cannot write {out}: {error.strerror}", hint="name a new file"
        ) from error
    show({"out": str(out), "format": name, "rows": count}, f"{count} rows in {out}", json=json)


@grouped
def report(
    log: Annotated[
        Path | None, typer.Argument(help="A log or an export. Default: your own log.")
    ] = None,
    *,
    span: Span,
    vkey: Annotated[
        Path | None,
        typer.Option("--vkey", help="Verifier keys; default for your own log: its own."),
    ] = None,
    anchors: Annotated[
        list[Path] | None, typer.Option(help="Receipts or heads kept elsewhere; repeatable.")
    ] = None,
    written: Written,
    root: Root = None,
    json: Json = False,
) -> None:
    """Add up use by award, person, model, tokens, outcome and time. The log is verified first."""
    import os
    from datetime import UTC, datetime
    from importlib.metadata import version

    from airgap.audit import load_ring
    from airgap.audit.query import Filter
    from airgap.dossier import add_up, totals_report
    from airgap.dossier.reports import About
    from airgap.dossier.usage import judge

    Filter(since=span.since, until=span.until)  # refuses what is no time
    tree = root_folder(root)
    folder = tree / "audit" if log is None else log.expanduser().absolute()
    own = tree / "keys" / "audit.vkey"
    key = vkey if vkey is not None or log is not None or not own.is_file() else own
    facts = judge(folder, load_ring(key) if key is not None else None, anchors or ())
    author = account_name() or str(os.getuid())
    models = installed(tree) if log is None else {}
    about = About(author, datetime.now(UTC), version("airgap"), models)
    found = add_up(folder, facts, since=span.since, until=span.until)
    written.finish(totals_report(found, facts, about), json=json)


def tools(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that does not exist yet.")],
    json: Json = False,
) -> None:
    """Write the verifiers for other machines, in Python and in Go, to a folder of their own."""
    from importlib import resources

    from airgap.cli.report import write_folder

    source = resources.files("airgap.audit") / "tools"
    files = {
        name: (source / name).read_text(encoding="utf-8")
        for name in ("verify_export.py", "verify_export.go")
    }
    written = write_folder(out, files | {"README": _READ_ME})
    (out / "verify_export.py").chmod(0o755)
    text = "\n".join(f"{out / name}" for name in written)
    show({"out": str(out), "files": written}, f"{text}\nkeep them apart from exports", json=json)
