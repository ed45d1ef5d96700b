"""`airgap audit`: read, verify and export the usage log, prove a record, check a receipt."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from airgap.cli import audit_acts, audit_exports, witness
from airgap.cli.common import (
    Json,
    Root,
    account_name,
    root_folder,
    show,
    stderr,
    stdout,
    write_new,
)
from policy.errors import FaultError, RefusedError, UsageError
from policy.wording import counted

if TYPE_CHECKING:
    from rich.text import Text

    from airgap.audit import Record, Ring
    from airgap.audit.export.manifest import Manifest
    from airgap.audit.export.write import Plan
    from airgap.audit.findings import Verdict
    from airgap.audit.layout import Layout
    from airgap.audit.payloads import HolderKey
    from airgap.audit.query import Filter

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
    group.command(name="status")(status)
    group.command(name="prove")(prove)
    group.command(name="head")(head)
    audit_acts.register(group)
    witness.register(group)
    audit_exports.register(group)
    app.add_typer(group, name="audit")


def show_log(
    log: _Log = None,
    *,
    person: Annotated[str, typer.Option(help="Only acts of this person.")] = "",
    project: Annotated[
        str, typer.Option("--project", "--award", help="Only this project, one for each award.")
    ] = "",
    kind: Annotated[str, typer.Option(help="Such as inference, denial, admin.")] = "",
    phase: Annotated[str, typer.Option(help="event, intent, chunk or outcome.")] = "",
    outcome: Annotated[str, typer.Option(help="A verdict, a result or an error code.")] = "",
    model: Annotated[str, typer.Option(help="Beginning of the manifest digest.")] = "",
    req: Annotated[str, typer.Option(help="One request.")] = "",
    since: Annotated[str, typer.Option(help="UTC, such as 2026-11-25 or 2026-11-25T14:30.")] = "",
    until: Annotated[str, typer.Option(help="UTC, not included.")] = "",
    last: Annotated[int, typer.Option(min=0, help="The newest so many; 0 for all.")] = 40,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new records until interrupted.")
    ] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Show records of the log, oldest first. Reading is not verifying: see `audit verify`."""
    from airgap.audit.query import Filter, select

    wanted = Filter(person, project, kind, phase, outcome, model, req, since, until)
    if follow:
        _follow(_folder(log, root), wanted, last, json=json)
        return
    records = select(_folder(log, root), wanted, last=last)
    document = {"records": [dict(record) for record in records], "count": len(records)}
    show(
        document, "no record matches" if not records else _table(records, width=_width()), json=json
    )


def verify(
    log: _Log = None,
    *,
    vkey: _VkeyFile = None,
    anchors: Annotated[
        list[Path] | None,
        typer.Option(help="Receipt, checkpoint, or a folder of them, kept elsewhere; repeatable."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="Trust policy (tlog-policy): which witnesses a checkpoint needs."),
    ] = None,
    export_key: Annotated[
        Path | None,
        typer.Option("--export-key", help="Public export keys of the host that made an export."),
    ] = None,
    isso_key: Annotated[
        Path | None,
        typer.Option(
            "--isso-key",
            help="Private key of the payloads' holder: open each and check its commitment.",
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", help="Holds the passphrase of --isso-key."),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Put the verdict on your own log (verify.result).")
    ] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Verify the log with its public key. Exit 0 good, 1 tampered, 3 cannot tell."""
    from airgap.audit.export.sign import load_export_public
    from airgap.audit.quorum import load_policy
    from airgap.audit.verify import verify_log

    folder, key = _folder(log, root), _key(log, vkey, root)
    if not folder.is_dir():
        raise FaultError("audit.absent", f"no folder {folder}", hint="check the path")
    with _Bar("verifying") as bar:
        verdict = verify_log(
            folder,
            vkey=key,
            anchors=anchors or (),
            policy=load_policy(policy) if policy else None,
            export_keys=load_export_public(export_key) if export_key else None,
            holder=_holder(isso_key, passphrase_file) if isso_key else None,
            progress=bar,
        )
    if record:
        _record_verdict(log, root, verdict)
    show(verdict.as_document(), _verdict_text(verdict, key), json=json)
    raise typer.Exit(verdict.exit)


def export(
    log: _Log = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that does not exist yet.")],
    rows: Annotated[
        str, typer.Option("--format", help="Derived rows: jsonl, csv, ocsf, rfc5424, cef or hec.")
    ] = ("jsonl"),
    since: Annotated[
        str,
        typer.Option(
            "--since",
            help="Go on from a size: a number, LAST for the last export, COSIGNED for the last "
            "cosigned head. What lies before comes by its hashes, with a consistency proof.",
        ),
    ] = "0",
    payloads: Annotated[bool, typer.Option(help="Whether encrypted payloads travel along.")] = True,
    root: Root = None,
    json: Json = False,
) -> None:
    """Export evidence and derived rows. An export of your own log is itself on record."""
    from airgap.audit.export.rows import FORMATS, find_format
    from airgap.audit.export.write import Plan
    from airgap.audit.layout import Layout, last_checkpoint

    if find_format(rows) is None:
        known = ", ".join(sorted(FORMATS))
        raise UsageError("usage.argument", f"--format: {rows!r:.40}", hint=f"use one of {known}")
    if out.exists():
        raise UsageError("usage.argument", f"--out: {out} exists", hint="name a new folder")
    target = out.absolute()
    if log is not None:
        source = Layout(_folder(log, root))
        found = last_checkpoint(source.journal)
        if found is None:
            raise RefusedError("audit.absent", f"no signed head in {source.folder}")
        plan = Plan(found[0], rows, _since(since, 0, 0), payloads=payloads)
        manifest = _written(source, target, plan)
    else:
        manifest = _recorded(root, rows, target, since, payloads=payloads)
    document = manifest.model_dump(exclude={"files"}) | {
        "out": str(target),
        "files": len(manifest.files),
    }
    text = (
        f"records {manifest.first} to {manifest.size - 1} of {manifest.origin} in {target}\n"
        f"rows: {manifest.rows_file}, each with seq and leaf hash; evidence: log/\n"
        f"verify it elsewhere: airgap audit verify {out} --vkey audit.vkey --anchors RECEIPTS "
        "--export-key export.pub"
    )
    show(document, text, json=json)


def status(log: _Log = None, *, root: Root = None, json: Json = False) -> None:
    """Show how the log stands: size, anchors, space, and how old the last export is."""
    from airgap.audit.status import read_status

    found = read_status(_folder(log, root), _key(log, None, root))
    show(found.as_document(), found.text(), json=json)


def prove(
    seq: Annotated[int, typer.Argument(min=0, help="Number of the record.")],
    log: _Log = None,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the .tlog-proof file here.")
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Prove that a record lies in the log: a receipt that anybody checks with the public key."""
    from airgap.audit.layout import Layout, last_checkpoint
    from airgap.audit.tree import StoredTree

    layout = Layout(_folder(log, root))
    found = last_checkpoint(layout.journal)
    if found is None:
        raise RefusedError("audit.absent", f"no signed head in {layout.folder}")
    receipt = StoredTree(layout).receipt(seq, found[0])
    if out is not None:
        write_new(out, receipt.as_proof().encode())
    document = receipt.as_document() | {"out": str(out) if out else None}
    show(document, receipt.as_proof().rstrip("\n") if out is None else f"wrote {out}", json=json)


def head(
    log: _Log = None,
    *,
    qr: Annotated[
        Path | None, typer.Option("--qr", help="Also write the signed head as a QR code, SVG.")
    ] = None,
    show_qr: Annotated[bool, typer.Option("--show-qr", help="Draw it on the terminal.")] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Print the newest signed head for paper: what you keep shows a rollback later."""
    from airgap.audit.layout import Layout, last_checkpoint
    from airgap.audit.paper import Paper

    layout = Layout(_folder(log, root))
    found = last_checkpoint(layout.journal)
    if found is None:
        raise RefusedError("audit.absent", f"no signed head in {layout.folder}")
    paper = Paper(found[0])
    if qr is not None:
        write_new(qr, paper.svg().encode())
    text = paper.text() + (f"\n{paper.terminal()}" if show_qr else "")
    show(paper.as_document() | {"qr": str(qr) if qr else None}, text, json=json)


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


def _record_verdict(log: Path | None, root: Path | None, verdict: Verdict) -> None:
    from airgap.audit.daily import Looked, record_look

    if log is not None:
        raise UsageError("usage.argument", "--record is for your own log", hint="leave LOG out")
    with audit_acts.own_log(root_folder(root), changes=False) as own:
        record_look(own, Looked.of(verdict))


def _holder(key: Path, passphrase_file: Path | None) -> HolderKey:
    from airgap.audit.payloads import load_holder_key
    from bundle.keys import read_passphrase

    return load_holder_key(key, read_passphrase(passphrase_file))


def _recorded(root: Path | None, rows: str, out: Path, since: str, *, payloads: bool) -> Manifest:
    """Export the user's own log between a durable intent and a durable outcome."""
    from airgap.audit import Actor, Event, new_ulid
    from airgap.audit.checkpoint import parse_checkpoint
    from airgap.audit.export.sign import ExportKey
    from airgap.audit.export.write import Plan
    from airgap.audit.layout import Layout
    from policy.terms import Digest

    tree = root_folder(root)
    key_file = tree / "keys" / "export.pem"
    key = ExportKey.load(key_file) if key_file.exists() else ExportKey.create(key_file)
    req = new_ulid()
    with audit_acts.own_log(tree, changes=False) as log:
        start = _since(since, log.last_export.size, log.anchored)
        who, begun = Actor(account_name()), {"format": rows}
        intent = log.append(Event("export", "intent", req=req, actor=who, data=begun))
        result: dict[str, Any] = {"format": rows, "result": "failed"}
        code = "host.io"
        try:
            head = parse_checkpoint(intent.note.encode())
            plan = Plan(head, rows, start, log.last_export.number + 1, payloads=payloads, key=key)
            manifest = _written(Layout(log.folder), out, plan)
        except RefusedError as error:
            code = error.code
            raise
        except KeyboardInterrupt:
            result["result"] = "cancelled"
            raise
        else:
            digest = Digest.of((out / "manifest.json").read_bytes())
            result |= {"first": manifest.first, "last": manifest.size - 1, "root": manifest.root}
            result |= {"manifest": str(digest), "result": "complete"}
            code = ""
        finally:
            log.append(Event("export", "outcome", req=req, actor=who, err=code, data=result))
        log.note_export(manifest.size)
    return manifest


def _written(source: Layout, out: Path, plan: Plan) -> Manifest:
    from airgap.audit.export.write import export_log

    with _Bar("exporting") as bar:
        return export_log(source, out, plan, progress=bar)


def _since(text: str, exported: int, cosigned: int) -> int:
    """Return the size that `--since` names."""
    named = {"LAST": exported, "COSIGNED": cosigned}
    if text in named:
        return named[text]
    if not text.isascii() or not text.isdecimal() or len(text) > 15:  # noqa: PLR2004
        raise UsageError(
            "usage.argument", f"--since: {text!r:.40}", hint="use LAST, COSIGNED or a number"
        )
    return int(text)


def _follow(folder: Path, wanted: Filter, last: int, *, json: bool) -> None:
    """Print what is there and then what comes, one line a record."""
    import orjson

    from airgap.audit.query import follow

    for record in follow(folder, wanted, last=last):
        if json:
            stdout.out(orjson.dumps(record, option=orjson.OPT_SORT_KEYS).decode())
        else:
            stdout.print(_table([record], headed=False, width=_width()))


def _folder(log: Path | None, root: Path | None) -> Path:
    return root_folder(root) / "audit" if log is None else log.expanduser().absolute()


def _key(log: Path | None, vkey: Path | None, root: Path | None) -> Ring | None:
    """Return the verifier key: the given one, or for the user's own log the one beside its key.

    A swapped key of one's own cannot give a good verdict: anchors that the old key signed fail it.
    """
    from airgap.audit import load_ring

    own = root_folder(root) / "keys" / "audit.vkey"
    if vkey is None and (log is not None or not own.exists()):
        return None
    return load_ring(vkey or own)


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


def _width() -> int:
    """Return the columns of a terminal; 0 where scripts read."""
    return stdout.width if stdout.is_terminal else 0


def _table(records: list[Record], *, headed: bool = True, width: int = 0) -> Text:
    """Return aligned lines of whole cells; within `width` a record takes further lines."""
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
    near = _fitting([widths[c] for c in used], width)
    lines = []
    for row in rows:
        first = "  ".join(row[c].ljust(widths[c]) for c in used[:near]).rstrip()
        rest = "  ".join(row[c] for c in used[near:] if row[c])
        lines.append("\n".join([first, *_folded(rest, width)]))
    body = [Text(line) for line in lines[1:]]
    return Text("\n").join([Text(lines[0], style="bold"), *body] if headed else body)


def _fitting(widths: list[int], width: int) -> int:
    """Return how many columns stand on the first line: all, or as many as fit into `width`."""
    if not width:
        return len(widths)
    ends = itertools.accumulate(wide + 2 for wide in widths)
    return max(1, sum(end - 2 <= width for end in ends))


def _folded(text: str, width: int) -> list[str]:
    """Return the further lines of a record, indented; digests stay whole."""
    indent = " " * 6
    return wrap(
        text,
        width or sys.maxsize,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _decision(record: Record) -> str:
    decision = record.get("decision", {})
    return " ".join(part for part in (decision.get("outcome"), decision.get("rule")) if part)


def _result(record: Record) -> str:
    data, tok, error = record.get("data", {}), record.get("tok"), record.get("err", {}).get("code")
    parts = [str(data[key]) for key in ("task", "result", "verdict", "reason") if key in data]
    parts += [error] if error else []
    parts += [f"part {record['part']}, {record['out']['bytes']} bytes"] if "part" in record else []
    parts += [f"{tok['in']}+{tok['out']} tokens"] if tok else []
    return ", ".join(parts)


def _verdict_text(verdict: Verdict, key: Ring | None) -> Text:
    from rich.text import Text

    colour = {0: "green", 1: "red", 3: "yellow"}[verdict.exit]
    head = Text.assemble((verdict.verdict, f"bold {colour}"), f"  {verdict.origin}")
    lines: list[str] = []
    lines.append(
        f"{counted(verdict.records, 'record')} read, {verdict.size} under the newest signed head; "
        f"anchored to {verdict.anchored_size} by {counted(verdict.anchors, 'outside head')}, "
        f"{verdict.size - verdict.anchored_size} past the last anchor"
    )
    lines.append(
        f"key {key.newest.key_id.hex()}  root {verdict.root}" if key else "no verifier key"
    )
    lines += [str(finding) for finding in verdict.findings]
    return head.append("".join(f"\n{line}" for line in lines))
