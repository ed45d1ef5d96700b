"""`airgap audit`: read, verify and export the usage log, and check a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from airgap.cli.common import Json, Root, root_folder, show, stderr
from policy.errors import FaultError, RefusedError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from airgap.audit import Record, Vkey
    from airgap.audit.checkpoint import Checkpoint
    from airgap.audit.verify import Verdict

_Log = Annotated[
    Path | None,
    typer.Argument(help="Folder that holds `log/`: a copy or an export. Default: your own log."),
]
_VkeyFile = Annotated[
    Path | None,
    typer.Option("--vkey", help="File with the verifier key. Default for your own log: its own."),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(no_args_is_help=True, help="Read, verify and export the usage log.")
    group.command(name="show")(show_log)
    group.command(name="verify")(verify)
    group.command(name="export")(export)
    group.command(name="check-receipt")(check_receipt)
    app.add_typer(group, name="audit")


def show_log(
    log: _Log = None,
    *,
    person: Annotated[str, typer.Option(help="Only acts of this person.")] = "",
    project: Annotated[str, typer.Option(help="Only this project.")] = "",
    kind: Annotated[str, typer.Option(help="Such as inference, denial, admin.")] = "",
    phase: Annotated[str, typer.Option(help="event, intent, chunk or outcome.")] = "",
    outcome: Annotated[str, typer.Option(help="A verdict, a result or an error code.")] = "",
    model: Annotated[str, typer.Option(help="Beginning of the manifest digest.")] = "",
    req: Annotated[str, typer.Option(help="One request.")] = "",
    since: Annotated[str, typer.Option(help="UTC, such as 2026-11-25 or 2026-11-25T14:30.")] = "",
    until: Annotated[str, typer.Option(help="UTC, not included.")] = "",
    last: Annotated[int, typer.Option(min=0, help="The newest so many; 0 for all.")] = 40,
    root: Root = None,
    json: Json = False,
) -> None:
    """Show records of the log, oldest first. Reading is not verifying: see `audit verify`."""
    from airgap.audit.query import Filter, select

    wanted = Filter(person, project, kind, phase, outcome, model, req, since, until)
    records = select(_folder(log, root), wanted, last=last)
    document = {"records": [dict(record) for record in records], "count": len(records)}
    show(document, "no record matches" if not records else _table(records), json=json)


def verify(
    log: _Log = None,
    *,
    vkey: _VkeyFile = None,
    anchors: Annotated[
        list[Path] | None,
        typer.Option(help="Receipt, checkpoint, or a folder of them, kept elsewhere; repeatable."),
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Verify the log with its public key. Exit 0 good, 1 tampered, 3 cannot tell."""
    from airgap.audit.verify import verify_log

    folder, key = _folder(log, root), _key(log, vkey, root)
    if not folder.is_dir():
        raise FaultError("audit.absent", f"no folder {folder}", hint="check the path")
    with _Bar("verifying") as bar:
        verdict = verify_log(folder, vkey=key, anchors=anchors or (), progress=bar)
    show(verdict.as_document(), _verdict_text(verdict, key), json=json)
    raise typer.Exit(verdict.exit)


def export(
    log: _Log = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that does not exist yet.")],
    rows: Annotated[str, typer.Option("--format", help="jsonl or csv.")] = "jsonl",
    root: Root = None,
    json: Json = False,
) -> None:
    """Export evidence and derived rows. An export of your own log is itself on record."""
    from airgap.audit.export.manifest import Manifest, export_log
    from airgap.audit.export.rows import FORMATS
    from airgap.audit.layout import Layout

    if rows not in FORMATS:
        raise UsageError("usage.argument", f"--format: {rows!r:.40}", hint="use jsonl or csv")
    if out.exists():
        raise UsageError("usage.argument", f"--out: {out} exists", hint="name a new folder")
    source, target = Layout(_folder(log, root)), out.absolute()

    def write(head: Checkpoint) -> Manifest:
        with _Bar("exporting") as bar:
            return export_log(source, target, head=head, rows=rows, progress=bar)

    manifest = write(_head(source)) if log is not None else _recorded(root, rows, target, write)
    document = manifest.model_dump(exclude={"files"}) | {
        "out": str(target),
        "files": len(manifest.files),
    }
    text = (
        f"{manifest.size} records of {manifest.origin} in {target}\n"
        f"rows: {manifest.rows_file}, each with seq and leaf hash; evidence: log/\n"
        f"verify it elsewhere: airgap audit verify {out} --vkey FILE --anchors RECEIPTS"
    )
    show(document, text, json=json)


def check_receipt(
    receipt: Annotated[Path, typer.Argument(help="A .tlog-proof file.")],
    log: _Log = None,
    *,
    vkey: _VkeyFile = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Check a receipt: signature, proof, and that the log still holds its record."""
    from airgap.audit.check import check
    from airgap.audit.disk import open_plain

    try:
        with open_plain(receipt) as file:
            content = file.read(1 << 20)
    except OSError as error:
        raise FaultError(
            "host.io", f"cannot read {receipt}: {error.strerror}", hint="check the path"
        ) from error
    found = check(content, vkey=_key(log, vkey, root), folder=_folder(log, root))
    show(found.as_document(), found.text(), json=json)
    raise typer.Exit(found.exit)


def _recorded(root: Path | None, rows: str, out: Path, write: Any) -> Any:
    """Export the user's own log between a durable intent and a durable outcome."""
    from airgap.audit import AuditLog, Event, new_ulid
    from airgap.audit.checkpoint import parse_checkpoint
    from policy.terms import Digest

    tree = root_folder(root)
    req = new_ulid()
    with AuditLog.open(tree / "audit", key=tree / "keys" / "audit.pem", create=False) as log:
        start = log.append(Event(kind="export", phase="intent", req=req, data={"format": rows}))
        result: dict[str, Any] = {"format": rows, "result": "failed"}
        code = "host.io"
        try:
            manifest = write(parse_checkpoint(start.note.encode()))
        except RefusedError as error:
            code = error.code
            raise
        except KeyboardInterrupt:
            result["result"] = "cancelled"
            raise
        else:
            digest = Digest.of((out / "manifest.json").read_bytes())
            result |= {"first": 0, "last": manifest.size - 1, "root": manifest.root}
            result |= {"manifest": str(digest), "result": "complete"}
            code = ""
        finally:
            log.append(Event(kind="export", phase="outcome", req=req, err=code, data=result))
    return manifest


def _folder(log: Path | None, root: Path | None) -> Path:
    return root_folder(root) / "audit" if log is None else log.expanduser().absolute()


def _key(log: Path | None, vkey: Path | None, root: Path | None) -> Vkey | None:
    """Return the verifier key: the given one, or for the user's own log the one beside its key.

    A swapped key of one's own cannot give a good verdict: anchors that the old key signed fail it.
    """
    from airgap.audit import load_vkey

    own = root_folder(root) / "keys" / "audit.vkey"
    if vkey is None and (log is not None or not own.exists()):
        return None
    return load_vkey(vkey or own)


def _head(source: Any) -> Checkpoint:
    """Return the newest head of a copy, for an export that nobody records."""
    from airgap.audit.layout import last_checkpoint

    found = last_checkpoint(source.journal)
    if found is None:
        raise RefusedError("audit.absent", f"no signed head in {source.folder}", hint="check LOG")
    return found[0]


class _Bar:
    """A progress bar on standard error that is gone when the work is done."""

    def __init__(self, what: str) -> None:
        from rich.progress import Progress

        self._progress = Progress(console=stderr, transient=True)
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


def _table(records: list[Record]) -> Text:
    """Return aligned lines; whole cells, for a terminal may wrap them but must not cut them."""
    from rich.text import Text

    rows = [("seq", "time (UTC)", "what", "person", "project", "decision", "model", "result")]
    for record in records:
        phase = "" if record["phase"] == "event" else f" {record['phase']}"
        rows.append((
            str(record["seq"]),
            record["ts"][:19].replace("T", " "),
            record["kind"] + phase,
            record.get("actor", {}).get("name", ""),
            record.get("project", ""),
            _decision(record),
            record.get("model", "")[7:19],
            _result(record),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    used = [c for c in range(len(widths)) if any(row[c] for row in rows[1:])]
    lines = ["  ".join(row[c].ljust(widths[c]) for c in used).rstrip() for row in rows]
    return Text("\n").join([Text(lines[0], style="bold"), *(Text(line) for line in lines[1:])])


def _decision(record: Record) -> str:
    decision = record.get("decision", {})
    return " ".join(part for part in (decision.get("outcome"), decision.get("rule")) if part)


def _result(record: Record) -> str:
    data, tok, error = record.get("data", {}), record.get("tok"), record.get("err", {}).get("code")
    parts = [str(data[key]) for key in ("task", "result", "verdict", "reason") if key in data]
    parts += [error] if error else []
    parts += [f"{tok['in']}+{tok['out']} tokens"] if tok else []
    return ", ".join(parts)


def _verdict_text(verdict: Verdict, key: Vkey | None) -> str:
    from rich.markup import escape

    colour = {0: "green", 1: "red", 3: "yellow"}[verdict.exit]
    lines = [f"[bold {colour}]{verdict.verdict}[/]  {escape(verdict.origin)}"]
    lines.append(
        f"{verdict.records} records read, {verdict.size} under the newest signed head; "
        f"anchored to {verdict.anchored_size} by {verdict.anchors} outside heads, "
        f"{verdict.size - verdict.anchored_size} past the last anchor"
    )
    lines.append(f"key {key.key_id.hex()}  root {verdict.root}" if key else "no verifier key")
    lines += [escape(str(finding)) for finding in verdict.findings]
    return "\n".join(lines)
