"""`airgap policy lint|test|diff|horizon|export|schema|sign`: work on the rules themselves."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from airgap.cli.common import Json, Root, root_folder, show, stderr
from airgap.cli.signing import Key, Passphrase, signer_of
from policy.errors import RefusedError, UsageError
from policy.wording import counted

if TYPE_CHECKING:
    from airgap.config import LegalDay, Site
    from airgap.rules import Rules
    from policy.compare import Difference, Due, Outlook
    from policy.lint import Finding

PACK_LIMIT = 4 << 20
MAX_DAYS = 36_600
SHOWN = 40  # lines of a long list on a terminal; --json gives all

Packs = Annotated[
    list[Path] | None, typer.Argument(help="Pack files. Default: every pack that is loaded.")
]
AsOf = Annotated[
    datetime | None,
    typer.Option("--as-of", formats=["%Y-%m-%d"], help="Day to count from. Default: today."),
]


class ExportForm(enum.StrEnum):
    """What `policy export` writes."""

    CEDAR = "cedar"
    OSCAL = "oscal"


def register(group: typer.Typer) -> None:
    """Add the commands to the group `policy`."""
    group.command("lint")(lint)
    group.command("test")(play_all)
    group.command("diff")(diff)
    group.command("horizon")(horizon)
    group.command("export")(export)
    group.command("schema")(schema)
    group.command("sign")(sign)


# -- lint and test ----------------------------------------------------------------------------


def lint(
    packs: Packs = None,
    *,
    release: Annotated[
        bool, typer.Option("--release", help="Open work of a draft counts as a fault too.")
    ] = False,
    as_of: AsOf = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Find faults and open work in packs, with line and column; exit 1 for a fault.

    A citation counts as read when a pack names who read it, or a person of this site signed so
    (`airgap policy review`).
    """
    from airgap.rulework import lint_screens, review_items, site_reviews
    from policy.lint import lint as lint_pack
    from policy.lint import lint_lists, lint_registry

    rules = load(root)
    today = as_of.date() if as_of else datetime.now(UTC).date()
    items = review_items(root_folder(root), rules)
    read = site_reviews(root_folder(root), items)
    found: list[tuple[str, Finding]] = []
    for name, content in _contents(packs, root):
        found += [
            (name, each)
            for each in lint_pack(
                content,
                name,
                beside=rules.packs.packs,
                lists=rules.lists.snapshots,
                today=today,
                reviews=read,
            )
        ]
    if not packs:
        found += [
            ("lineage registry", each)
            for each in lint_registry(rules.registry, reviews=read, today=today)
        ]
        found += [("lists", each) for each in lint_lists(rules.lists.snapshots)]
        found += list(lint_screens(items, read, today))
    failing = [each for _, each in found if release or each.error]
    document = {
        "findings": [
            {
                "file": name,
                "line": each.line,
                "column": each.column,
                "code": each.code,
                "error": each.error,
                "words": each.words,
            }
            for name, each in found
        ],
        "failing": len(failing),
        "exit": 1 if failing else 0,
    }
    lines = [
        f"{number}. {name}:{f' line {each.line}, column {each.column}:' if each.line else ''}"
        f" {'error' if each.error else 'open'} [{each.code}] {each.words}"
        for number, (name, each) in enumerate(found, 1)
    ]
    unread = sum(each.code == "unread" for _, each in found)
    lines.append(
        f"{counted(len(found), 'finding')}, "
        f"{counted(sum(each.error for _, each in found), 'error')}; "
        f"{counted(unread, 'text')}"
        " that no named person has read: airgap policy review"
    )
    show(document, Text("\n".join(lines)), json=json)
    _exit(failing)


def play_all(
    packs: Packs = None,
    *,
    mutants: Annotated[
        bool,
        typer.Option("--mutants", help="Break each rule on purpose; a scenario has to notice."),
    ] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Play the golden scenarios of packs; exit 1 when one does not hold."""
    from policy import combine, parse_pack
    from policy.trial import World, play, survivors

    rules = load(root)
    chosen = [parse_pack(content, name) for name, content in _contents(packs, root)]
    ids = {each.pack_id for each in chosen}
    beside = [each for each in rules.packs.packs if each.pack_id not in ids]
    whole = rules.packs if not packs else combine(beside, chosen)
    world = World(rules.lists, rules.registry)
    played = [
        each for pack in chosen for each in play(pack.scenarios, whole, world, pack.prepared_on)
    ]
    wrong = [each.words for each in played if not each.holds]
    left = (
        [
            f"{each.rule.id}: {each.change}"
            for pack in chosen
            for each in survivors(pack, [*beside, *chosen], world)
        ]
        if mutants
        else []
    )
    bare = sorted(
        rule.id
        for pack in chosen
        for rule in pack.rules
        if rule.id not in {each.rule for each in pack.scenarios}
    )
    failing = [*wrong, *left]
    document = {
        "scenarios": len(played),
        "wrong": wrong,
        "unnoticed": left if mutants else None,
        "rules_without_scenarios": bare,
        "exit": 1 if failing else 0,
    }
    lines = [f"does not hold: {each}" for each in wrong]
    lines += [f"not noticed: {each}" for each in left]
    lines += [f"no scenario: {each}" for each in bare]
    lines.append(f"{len(played)} scenarios, {len(wrong)} do not hold")
    if mutants:
        lines.append(f"{len(left)} changed rules went unnoticed")
    show(document, Text("\n".join(lines)), json=json)
    _exit(failing)


# -- diff and horizon -------------------------------------------------------------------------


def diff(
    new: Annotated[list[Path], typer.Argument(help="Files of packs, lists or lineage to try.")],
    *,
    logged: Annotated[
        bool, typer.Option(help="Ask the decisions of the log again, beside the scenarios.")
    ] = True,
    root: Root = None,
    json: Json = False,
) -> None:
    """Compare answers without and with NEW, on each day before, of and after a boundary.

    Golden scenarios and logged decisions are asked again. Exit 1 when an outcome changes.
    """
    from airgap import rulework
    from airgap.inquiry import site_approvals
    from airgap.rules import with_files
    from policy.compare import diff as compare

    tree = root_folder(root)
    before = load(root)
    after = with_files(before, new)
    now = datetime.now(UTC)
    history = rulework.logged_questions(tree, site_approvals(tree)) if logged else None
    questions = [*rulework.golden_questions(before, now), *(history.questions if history else ())]
    found = list(compare(rulework.rulebook(before), rulework.rulebook(after), questions))
    document = {
        "questions": len(questions),
        "logged": len(history.questions) if history else 0,
        "logged_left_out": history.left_out if history else 0,
        "changes": [_difference_document(each) for each in found],
        "exit": 1 if found else 0,
    }
    show(document, Text("\n".join(_difference_lines(found, len(questions)))), json=json)
    _exit(found)


def _difference_document(each: Difference) -> dict[str, Any]:
    return {
        "question": each.question,
        "from": each.first.isoformat(),
        "to": each.last.isoformat(),
        "before": str(each.before),
        "after": str(each.after),
        "rules": list(each.rules),
        "cause": each.cause,
    }


def _difference_lines(found: Sequence[Difference], asked: int) -> Iterable[str]:
    for cause in sorted({each.cause for each in found}):
        own = [each for each in found if each.cause == cause]
        yield f"Because of: {cause} ({len(own)})"
        for each in own[:SHOWN]:
            yield (
                f"  {each.first} to {each.last}: {each.before} -> {each.after}"
                f"  {', '.join(each.rules)}  [{each.question}]"
            )
        if len(own) > SHOWN:
            yield f"  {len(own) - SHOWN} more: see --json"
    yield f"{counted(asked, 'question')}, {counted(len(found), 'change')}"


def horizon(
    *,
    days: Annotated[str, typer.Option("--days", help="Spans in days.")] = "30,90,400",
    as_of: AsOf = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the timeline as a page.")
    ] = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Say which installed bundles change in the coming days and why, and what falls due."""
    from airgap import rulework
    from airgap.cli.timeline import page, picture
    from airgap.config import load_site
    from airgap.inquiry import site_approvals
    from policy.compare import dues, outlook

    tree = root_folder(root)
    spans = _spans(days)
    site, rules = load_site(tree), load(root)
    day = site.legal_day(datetime.now(UTC), as_of.date() if as_of else None)
    approvals = site_approvals(tree)
    book = rulework.rulebook(rules)
    views = [
        outlook(book, each, day.as_of, spans[-1])
        for each in rulework.bundle_questions(tree, site, rules, day, approvals)
    ]
    due = dues(book, approvals, day.as_of, spans[-1])
    document = _horizon_document(site, day, spans, views, due)
    if html is not None:
        write_new(html, page(site.institution.name or site.system.id, day.as_of, spans, views, due))
        stderr.print(f"wrote {html}", markup=False)
    show(document, picture(day.as_of, spans, views, due), json=json)


def _spans(text: str) -> list[int]:
    parts = text.split(",")
    if not all(each.isascii() and each.isdigit() and 0 < int(each) <= MAX_DAYS for each in parts):
        raise UsageError("usage.argument", f"--days {text!r:.60}: expected numbers of days")
    return sorted({int(each) for each in parts})


def _horizon_document(
    site: Site, day: LegalDay, spans: Sequence[int], views: Sequence[Outlook], due: Sequence[Due]
) -> dict[str, Any]:
    return {
        "as_of": day.as_of.isoformat(),
        "as_of_source": day.source,
        "system": site.system.id,
        "bundles": [
            {
                "name": each.name,
                "now": str(each.now),
                "within": {
                    str(span): [
                        {
                            "on": change.on.isoformat(),
                            "outcome": str(change.outcome),
                            "rules": list(change.rules),
                        }
                        for change in each.within(span)
                    ]
                    for span in spans
                },
            }
            for each in views
        ],
        "due": [
            {"on": each.on.isoformat(), "what": each.what, "words": each.words} for each in due
        ],
    }


# -- export, schema, sign ---------------------------------------------------------------------


def export(
    form: Annotated[ExportForm, typer.Argument(help="cedar or oscal.")],
    *,
    out: Annotated[Path, typer.Option("--out", help="New folder for the files.")],
    author: Annotated[str, typer.Option("--author", help="Who makes the OSCAL document.")] = "",
    root: Root = None,
    json: Json = False,
) -> None:
    """Write the loaded rules for tools that read Cedar or OSCAL; says what is left out."""
    rules = load(root)
    files, left_out = _cedar(rules) if form is ExportForm.CEDAR else _oscal(rules, author)
    try:
        out.mkdir(mode=0o755)
    except FileExistsError:
        raise UsageError("usage.argument", f"{out} exists already; name a new folder") from None
    for name, text in files.items():
        write_new(out / name, text)
    document = {"folder": str(out), "files": sorted(files), "left_out": list(left_out)}
    lines = [f"wrote {out / each}" for each in sorted(files)]
    show(
        document, Text("\n".join([*lines, *(f"left out: {each}" for each in left_out)])), json=json
    )


def _cedar(rules: Rules) -> tuple[dict[str, str], Sequence[str]]:
    import json as jsonlib

    from policy.cedar import export as to_cedar

    made = to_cedar(rules.packs)
    paths = jsonlib.dumps(dict(made.paths), indent=1, ensure_ascii=False) + "\n"
    files = {
        "policies.cedar": made.policies,
        "schema.cedarschema": made.schema,
        "paths.json": paths,
    }
    return files, made.left_out


def _oscal(rules: Rules, author: str) -> tuple[dict[str, str], Sequence[str]]:
    import json as jsonlib

    from airgap import oscal
    from airgap.rulework import packs_as_oscal

    gaps = (
        "implementation status, system facts and risk decisions are left to the institution",
        "rules are named by pack and digest; their text stays in the packs",
    )
    head = oscal.Head(
        title="Policy packs of airgap",
        author=author or "airgap",
        now=datetime.now(UTC).replace(microsecond=0),
        version="+".join(f"{each.pack_id}-{each.version}" for each in rules.packs.packs),
        gaps=gaps,
    )
    text = jsonlib.dumps(packs_as_oscal(rules, head), indent=1, ensure_ascii=False) + "\n"
    return {"component-definition.json": text}, gaps


def schema(
    name: Annotated[str, typer.Argument(help="policy-pack, lists or lineage.")] = "policy-pack",
    *,
    write: Annotated[
        Path | None, typer.Option("--write", help="Write all three into this folder instead.")
    ] = None,
    json: Json = False,
) -> None:
    """Print the JSON Schema of a pack, for an editor."""
    from policy.schema import PUBLISHED, to_text

    if write is not None:
        for file_name, make in PUBLISHED.items():
            (write / file_name).write_text(to_text(make()), encoding="utf-8")
        names = sorted(PUBLISHED)
        show({"files": names}, "\n".join(f"wrote {write / each}" for each in names), json=json)
        return
    made = PUBLISHED.get(f"{name}-1.schema.json")
    if made is None:
        known = ", ".join(each.removesuffix("-1.schema.json") for each in PUBLISHED)
        raise UsageError("usage.argument", f"no schema is called {name!r:.40}; there are {known}")
    show(made(), Text(to_text(made()).rstrip("\n")), json=json)


def sign(
    file: Annotated[
        Path, typer.Argument(help="A pack, list, lineage file or screen pack of this site.")
    ],
    *,
    key: Key,
    author: Annotated[
        str, typer.Option("--author", help="Who wrote it; the author does not count as a signer.")
    ] = "",
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Check a file of rules or lists and sign it; a further person signs the same file again."""
    from airgap import site_rules
    from airgap.rules import require_file
    from bundle.keys import read_limited
    from bundle.trust import load_trust

    tree = root_folder(root)
    content = read_limited(file, PACK_LIMIT + 1, code="pack.limit", what="the file")
    if file.suffix == ".toml":
        require_screen_pack(content, file)
    else:
        require_file(content, str(file))
    signer = signer_of(key, passphrase_file, tree)
    beside = file.with_name(file.name + site_rules.ENDING)
    if beside.exists() and not _is_stale(beside, content, file.name):
        envelope = site_rules.countersign(
            site_rules.read_signature(file), content, file.name, signer
        )
    else:
        envelope = site_rules.sign_file(
            content, file.name, signer, author=author or None, issued=datetime.now(UTC)
        )
    trust = load_trust(tree / "trust").standing
    try:
        site_rules.verify_file(content, file.name, envelope, trust)
        state = "counts"
    except RefusedError as error:
        state = f"does not count yet: {error.message}"
    _replace(beside, envelope.to_bytes())
    document = {"file": str(file), "signature": str(beside), "counts": state == "counts"}
    show(document, Text(f"wrote {beside}; it {state}"), json=json)


def require_screen_pack(content: bytes, file: Path) -> None:
    """Refuse what is no screen pack; its patterns are built in the sealed helper alone."""
    from airgap.science.packs import read_pack

    try:
        read_pack(content)
    except ValueError as error:
        raise RefusedError("pack.schema", f"{file}: {error}") from error


def _is_stale(beside: Path, content: bytes, name: str) -> bool:
    """Whether the signature at hand is about another state of the file."""
    from airgap import site_rules
    from bundle.envelope import parse_envelope
    from bundle.intoto import MAX_PAYLOAD
    from bundle.keys import read_limited

    raw = read_limited(beside, MAX_PAYLOAD, code=site_rules.CODE, what="the signature")
    return not site_rules.is_about(parse_envelope(raw, code=site_rules.CODE), content, name)


# -- shared -----------------------------------------------------------------------------------


def load(root: Path | None) -> Rules:
    """The rules of this tree."""
    from airgap.rules import load_rules

    return load_rules(root_folder(root))


def _contents(packs: Sequence[Path] | None, root: Path | None) -> list[tuple[str, bytes]]:
    """Name and bytes of the packs to look at: those named, else every pack that is loaded."""
    from airgap.config import read_plain
    from airgap.rules import shipped_files

    if packs:
        return [(str(each), read_plain(each, PACK_LIMIT + 1)) for each in packs]
    shipped = [(n, c) for n, c in shipped_files().items() if n.startswith("packs/")]
    folder = root_folder(root) / "policy"
    own = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    contents = [(str(path), read_plain(path, PACK_LIMIT + 1)) for path in own]
    return [*shipped, *((n, c) for n, c in contents if b"airgap/policy-pack/" in c[:4096])]


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet; UsageError otherwise."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError("usage.argument", f"{path} exists already; name a new file") from None


def _replace(path: Path, content: bytes) -> None:
    from bundle.durable import write_beside

    write_beside(path, content, 0o644)


def _exit(failing: Sequence[object]) -> None:
    if failing:
        raise typer.Exit(1)
