"""`airgap report` and `airgap dossier`: evidence for sponsors, officers and assessors."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airgap.cli.common import Json, Root, account_name, root_folder, show, stdout
from airgap.cli.options import grouped
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from airgap.config import Site
    from airgap.dossier import LogFacts, Page
    from airgap.dossier.reports import About
    from bundle.root import RootDocument
    from policy.approvals import Approval

Anchors = Annotated[
    list[Path] | None,
    typer.Option("--anchors", help="Receipts or heads kept elsewhere; repeatable."),
]
Since = Annotated[str, typer.Option("--since", help="UTC, such as 2026-11-25.")]
Until = Annotated[str, typer.Option("--until", help="UTC, not included.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write the page, for screen and paper.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="A new folder for report.json, report.html, uses.csv, hashes."
    ),
]


@dataclass(frozen=True)
class Span:
    """The time that a report is about."""

    since: Since = ""
    until: Until = ""


@dataclass(frozen=True)
class Written:
    """Where a report is written, beside what is shown."""

    html: Html = None
    out: Out = None

    def finish(self, page: Page, *, json: bool) -> None:
        """Write what was asked for and show the page in words."""
        from airgap.dossier import render
        from airgap.serve.present import write_whole

        written = {}
        if self.html is not None:
            write_whole(self.html, render(page))
            written["html"] = str(self.html)
        if self.out is not None:
            files = {"report.json": to_json(page.document), "report.html": render(page)}
            if rows := page.document.get("uses"):
                files["uses.csv"] = to_csv(rows)
            written |= {name: str(self.out / name) for name in write_folder(self.out, files)}
        document = {**page.document, "id": page.id, "written": written}
        fit = stdout.width if stdout.is_terminal else sys.maxsize
        show(document, words(page, written, fit), json=json)


def register(app: typer.Typer) -> None:
    """Add the group and the command."""
    group = typer.Typer(help="Evidence by award and by control.", no_args_is_help=True)
    group.command("award")(award)
    group.command("controls")(controls)
    group.command("not-used")(not_used)
    group.command("oscal")(oscal)
    app.add_typer(group, name="report")
    app.command("dossier")(dossier)


@grouped
def award(
    award: Annotated[str, typer.Argument(help="Project of site.toml.")],
    *,
    span: Span,
    anchors: Anchors = None,
    written: Written,
    root: Root = None,
    json: Json = False,
) -> None:
    """Report who used what under an award, what was held, and which exceptions counted."""
    from airgap.cli.approve import owed
    from airgap.dossier import award_report, gather

    desk = Desk.of(root, anchors)
    evidence = gather(desk.audit, desk.log, project=award, since=span.since, until=span.until)
    page = award_report(
        evidence, desk.site, award, desk.about, approvals=desk.approvals(), reviews=owed(desk.tree)
    )
    written.finish(page, json=json)


@grouped
def controls(
    *,
    family: Annotated[str, typer.Option("--family", help="Such as 3.3; default all.")] = "",
    span: Span,
    anchors: Anchors = None,
    written: Written,
    root: Root = None,
    json: Json = False,
) -> None:
    """Report what evidence there is by control family of NIST SP 800-171."""
    from airgap.dossier import FAMILIES, controls_report, gather
    from airgap.dossier.reports import role_conflicts

    if family and family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UsageError("usage.argument", f"--family {family!r:.20}", hint=f"one of {known}")
    desk = Desk.of(root, anchors)
    evidence = gather(desk.audit, desk.log, since=span.since, until=span.until)
    conflicts = role_conflicts(desk.site, desk.trust())
    page = controls_report(evidence, desk.about, family=family, conflicts=conflicts)
    written.finish(page, json=json)


@grouped
def not_used(
    *,
    award: Annotated[str, typer.Option("--award", help="Project of site.toml, or another id.")],
    model: Annotated[
        str, typer.Option("--model", help="Name or digest of a bundle; default any model.")
    ] = "",
    span: Span,
    anchors: Anchors = None,
    written: Written,
    root: Root = None,
    json: Json = False,
) -> None:
    """Show from the log that nothing was used under an award. Exit 0 not used, 1 used."""
    from airgap.dossier import gather, not_used_report

    desk = Desk.of(root, anchors)
    evidence = gather(desk.audit, desk.log, project=award, since=span.since, until=span.until)
    digest = desk.digest(model) if model else ""
    page = not_used_report(evidence, desk.site, award, desk.about, model=digest)
    written.finish(page, json=json)
    if page.document["used"]:
        raise typer.Exit(1)


def oscal(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder that does not exist yet.")],
    anchors: Anchors = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Write an OSCAL component definition, a fragment of an SSP and rows of a POA&M."""
    from airgap.dossier import gather
    from airgap.dossier.system import oscal_documents

    desk = Desk.of(root, anchors)
    documents = oscal_documents(
        gather(desk.audit, desk.log), desk.site, desk.about, desk.tree, desk.log
    )
    files = write_folder(out, {name: to_json(each) for name, each in documents.items()})
    show({"out": str(out), "files": files}, "\n".join(f"{out}/{name}" for name in files), json=json)


@grouped
def dossier(
    request: Annotated[str, typer.Argument(help="Request id, or the reference of a record.")],
    *,
    anchors: Anchors = None,
    written: Written,
    root: Root = None,
    json: Json = False,
) -> None:
    """Gather one request: facts, rules, citations, dates, approvals, and proofs from the log."""
    from airgap.cli import hold
    from airgap.cli.approve import owed
    from airgap.dossier import request_dossier
    from airgap.dossier.request import find

    desk, held = Desk.of(root, anchors), hold.Desk.of(root)
    rules = held.rules.packs.rules
    hazard = frozenset(each.id for each in rules if each.text.topic == "hazard")
    found = find(desk.audit, desk.log, request, hazard=frozenset() if held.hazard_role else hazard)
    holds = [
        held.board.row(each)
        for each in held.holds.every()
        if found.request in {each.request, each.parent}
    ]
    page = request_dossier(found, desk.log, desk.about, holds=holds, reviews=owed(desk.tree))
    written.finish(page, json=json)


# -- output ---------------------------------------------------------------------------------------


def words(page: Page, written: dict[str, str], fit: int = sys.maxsize) -> str:
    """Return a page as plain text, long texts left out; tables within `fit` columns if they can."""
    lines = [page.title, page.subject]
    if page.banner:
        lines.append(f"NOTE: {page.banner}")
    lines.append("  ".join(f"{name} {value}" for name, value in page.figures))
    for section in page.sections:
        if section.text:
            continue
        lines += ["", section.title]
        lines += [f"  {line}" for line in section.words]
        width = max((len(name) for name, _ in section.facts), default=0)
        lines += [f"  {name.ljust(width)}  {value}" for name, value in section.facts]
        if section.rows:
            lines += [
                f"  {line}".rstrip() for line in _grid(section.head, section.rows[:40], fit - 2)
            ]
        if section.head and not section.rows:
            lines.append(f"  {section.empty}")
        if len(section.rows) > 40:  # noqa: PLR2004 - a screen; --html and --json have all
            lines.append(f"  and {len(section.rows) - 40} more: --html or --json")
    lines += ["", "What this cannot show"] + [f"  {line}" for line in page.limits]
    lines += ["", f"{page.author}, {page.created}, airgap {page.version}, id {page.id}"]
    return "\n".join(lines + [f"wrote {path}" for path in written.values()])


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], fit: int) -> list[str]:
    """Return aligned columns, numbers to the right; wider than `fit`, a cell a line."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if sum(widths) + 2 * (len(widths) - 1) > fit:
        label = max(map(len, head))
        cells = [[f"{n.ljust(label)}  {c}" for n, c in zip(head, row, strict=True)] for row in rows]
        return "\n\n".join("\n".join(each) for each in cells).split("\n")
    right = [all(re.fullmatch(r"[\d,.]+|-", cell) for cell in column[1:]) for column in columns]
    padded = [
        [cell.rjust(width) if number else cell.ljust(width) for cell in column]
        for column, width, number in zip(columns, widths, right, strict=True)
    ]
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def to_json(document: Any) -> str:
    """Return one JSON document, keys sorted."""
    import json as jsonlib

    return jsonlib.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Return rows as CSV; a cell that a spreadsheet would run is quoted."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        cells = [
            " ".join(map(str, value)) if isinstance(value, list) else str(value)
            for value in row.values()
        ]
        writer.writerow(f"'{each}" if each[:1] in "=+-@" and each else each for each in cells)
    return text.getvalue()


def write_folder(out: Path, files: dict[str, str]) -> list[str]:
    """Write files into a new folder, with their hashes in SHA256SUMS."""
    from hashlib import sha256

    if out.exists():
        raise UsageError("usage.argument", f"--out: {out} exists", hint="name a new folder")
    out.mkdir(parents=True, mode=0o755)
    sums = ""
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
        sums += f"{sha256(text.encode()).hexdigest()}  {name}\n"
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")
    return [*files, "SHA256SUMS"]


# -- what a command needs of the tree -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Desk:
    """The tree of a report: its site, its log as it was judged, and who makes the report."""

    tree: Path
    site: Site
    log: LogFacts
    about: About

    @classmethod
    def of(cls, root: Path | None, anchors: list[Path] | None) -> Desk:
        """Judge the log and find out who asks."""
        from importlib.metadata import version

        from airgap.audit import load_vkey
        from airgap.config import load_site
        from airgap.dossier.reports import About
        from airgap.dossier.usage import judge
        from airgap.inquiry import find_reader

        tree = root_folder(root)
        site = load_site(tree)
        key = tree / "keys" / "audit.vkey"
        log = judge(tree / "audit", load_vkey(key) if key.is_file() else None, anchors or ())
        reader = find_reader(site, "", os.getuid(), account_name())
        author = (reader.name or reader.id) if reader else account_name()
        about = About(author, datetime.now(UTC), version("airgap"), installed(tree))
        return cls(tree, site, log, about)

    @property
    def audit(self) -> Path:
        """Folder of the log."""
        return self.tree / "audit"

    def trust(self) -> RootDocument | None:
        """Return the newest trust root; None where there is none to be read."""
        from bundle.trust import load_trust
        from policy.errors import AirgapError

        try:
            return load_trust(self.tree / "trust").standing
        except AirgapError:
            return None

    def approvals(self) -> tuple[Approval, ...]:
        """Return the signed approvals of this tree."""
        from airgap.inquiry import site_approvals

        return site_approvals(self.tree).approvals

    def digest(self, model: str) -> str:
        """Return the digest of a bundle that is or was installed here, or as written."""
        if model.startswith("sha256:"):
            return model
        models: dict[str, str] = dict(self.about.models)
        found = [digest for digest, name in models.items() if name.startswith(model)]
        if len(found) != 1:
            raise RefusedError(
                "store.missing",
                f"{len(found)} installed bundles answer to {model!r:.60}",
                hint="give the digest: airgap list",
            )
        return found[0]


def installed(tree: Path) -> dict[str, str]:
    """Return names of installed bundles by digest; none where there is no store."""
    from airgap.install import Store
    from policy.errors import AirgapError

    try:
        return {
            str(each.digest): f"{each.manifest.name} {each.manifest.version}"
            for each in Store(tree / "store").survey()[0]
        }
    except AirgapError:
        return {}
