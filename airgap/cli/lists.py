"""`airgap policy lists|load-list|adjudicate`: lists of parties, how whole and how old they are."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from airgap.cli.common import Json, Root, root_folder, show
from airgap.cli.rules import AsOf, load, write_new
from airgap.cli.signing import Key, Passphrase, Reason, signer_of
from policy.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from policy.snapshots import ListSnapshot

Day = Annotated[str, typer.Option(help="YYYY-MM-DD.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group `policy`."""
    group.command("lists")(lists)
    group.command("load-list")(load_list)
    group.command("adjudicate")(adjudicate)


def lists(*, as_of: AsOf = None, root: Root = None, json: Json = False) -> None:
    """Say which edition of each list is held, how whole and how old; exit 1 for an alarm.

    A name that an incomplete edition does not hold is unknown, never clear.
    """
    from airgap.config import load_site

    rules = load(root)
    tree = root_folder(root)
    today = as_of.date() if as_of else datetime.now(UTC).date()
    if as_of is None and (tree / "site.toml").is_file():
        today = load_site(tree).legal_day(datetime.now(UTC)).as_of
    limit = _age_limit(rules.packs)
    rows = [
        _row(list_id, rules.lists.held_on(list_id, today), today, limit)
        for list_id in sorted(rules.packs.list_ids)
    ]
    alarms = [f"{row['list']}: {words}" for row in rows for words in row["alarms"]]
    lines = [
        f"{row['list']:<20} {row['edition'] or 'none held':<12} {row['names']:<26}"
        f" {row['age_words']}"
        for row in rows
    ]
    lines += [f"alarm: {each}" for each in alarms]
    document = {"as_of": today.isoformat(), "lists": rows, "exit": 1 if alarms else 0}
    show(document, Text("\n".join(lines)), json=json)
    if alarms:
        raise typer.Exit(1)


def _age_limit(packs: Any) -> int | None:
    """The age in days above which a loaded rule holds; of several the least."""
    from policy.logic import Comparison

    found = [
        leaf.operand + (leaf.form == "gte") * -1
        for program in packs.programs.values()
        for leaf in program.leaves
        if isinstance(leaf, Comparison)
        and leaf.fact == "lists.max_age_days"
        and leaf.form in {"gt", "gte"}
        and isinstance(leaf.operand, int)
    ]
    return min(found, default=None)


def _row(list_id: str, held: ListSnapshot | None, today: date, limit: int | None) -> dict[str, Any]:
    if held is None:
        return {
            "list": list_id,
            "edition": None,
            "complete": False,
            "names_held": 0,
            "names_in_edition": None,
            "names": "no name is held",
            "age_days": None,
            "age_words": "every path to it is unknown",
            "alarms": [],
        }
    age = (today - held.dated).days
    whole = held.text.names_in_edition
    names = f"{held.names_held} of {whole if whole is not None else '?'} names"
    alarms = []
    if limit is not None and age > limit:
        alarms.append(f"{age} days old, at most {limit} are taken: everything is held")
    review = held.text.next_review_by
    if review is not None and review <= today:
        alarms.append(f"a newer edition was to be looked for by {review}")
    return {
        "list": list_id,
        "edition": held.text.edition,
        "complete": held.text.complete,
        "names_held": held.names_held,
        "names_in_edition": whole,
        "names": names + ("" if held.text.complete else ", in part"),
        "age_days": age,
        "age_words": f"{age} days old" + (f", looked at again by {review}" if review else ""),
        "alarms": alarms,
    }


def load_list(
    notice: Annotated[Path, typer.Argument(help="XML of the Federal Register, full text.")],
    *,
    list_id: Annotated[str, typer.Option("--list", help="List that it is an edition of.")],
    edition: Annotated[str, typer.Option("--edition", help="Name of the edition.")],
    released: Day,
    published: Day,
    retrieved: Day,
    citation: Annotated[str, typer.Option("--citation", help="As the notice is cited.")],
    out: Annotated[Path, typer.Option("--out", help="New file, to be read and signed.")],
    review: Annotated[str, typer.Option("--review", help="Next review, YYYY-MM-DD.")] = "",
    parents: Annotated[
        int | None, typer.Option("--parents", help="Bullets that the edition has.")
    ] = None,
    names: Annotated[int | None, typer.Option("--names", help="Names that it has.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Keep what was read; other names stay unknown.")
    ] = False,
    root: Root = None,
    json: Json = False,
) -> None:
    """Read a list from your own copy of its notice; sign the result with `policy sign`."""
    from airgap import federal_register
    from airgap.config import read_plain
    from policy import parse_lists
    from policy.snapshots import require_same_edition

    found = federal_register.parse_notice(read_plain(notice, federal_register.MAX_BYTES + 1))
    shipped = next(
        (
            each
            for each in load(root).lists.snapshots
            if each.list_id == list_id and each.text.edition == edition
        ),
        None,
    )
    expected = names if names is not None or shipped is None else shipped.text.names_in_edition
    if not partial:
        federal_register.require_counts(found, parents=parents, names=expected)
    about = federal_register.Edition(
        list_id=list_id,
        edition=edition,
        released=as_day(released, "--released"),
        published=as_day(published, "--published"),
        retrieved_on=as_day(retrieved, "--retrieved"),
        citation=citation,
        next_review_by=as_day(review, "--review") if review else None,
        complete=not partial and expected is not None,
    )
    document = federal_register.snapshot_document(found, about, shipped)
    text = federal_register.to_yaml(document)
    (loaded,) = parse_lists(text.encode(), str(out))
    if shipped is not None and not shipped.text.complete:
        require_same_edition(shipped, loaded)
    write_new(out, text)
    words = (
        f"wrote {out}: {found.parents} companies with a bullet, {len(found.companies)} names from"
        f" FR Doc {found.document or 'without a number'}"
        f"{'' if about.complete else '; partial: a name that is not there stays unknown'}"
    )
    result = {
        "file": str(out),
        "document": found.document,
        "parents": found.parents,
        "names": len(found.companies),
        "complete": about.complete,
    }
    show(result, Text(words), json=json)


def adjudicate(
    name: Annotated[str, typer.Argument(help="Name of the party, as the registry has it.")],
    against: Annotated[str, typer.Argument(help="Name on the list that looks like it.")],
    *,
    list_id: Annotated[str, typer.Option("--list", help="The list.")],
    edition: Annotated[str, typer.Option("--edition", help="The edition; another is asked anew.")],
    same: Annotated[bool, typer.Option("--same/--not-same", help="Whether both mean one party.")],
    reason: Reason,
    expires: Day,
    key: Key,
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Sign whether a name that looks like a listed one means it; for one edition, until a day."""
    from airgap import adjudications
    from bundle.trust import load_trust

    tree = root_folder(root)
    held = {(each.list_id, each.text.edition) for each in load(root).lists.snapshots}
    if (list_id, edition) not in held:
        known = ", ".join(sorted(f"{one} {two}" for one, two in held))
        raise RefusedError(
            adjudications.CODE,
            f"no edition {edition!r:.40} of {list_id!r:.64} is held; there are {known[:300]}",
        )
    about = adjudications.adjudication(
        name=name,
        list_id=list_id,
        edition=edition,
        against=against,
        same=same,
        reason=reason,
        issued=datetime.now(UTC),
        expires=as_day(expires, "--expires"),
    )
    envelope = adjudications.sign(about, signer_of(key, passphrase_file, tree))
    ruling = adjudications.verify(envelope, load_trust(tree / "trust").standing)
    path = adjudications.write(envelope, tree)
    words = "is" if same else "is not"
    document = {
        "file": str(path),
        "same": same,
        "people": list(ruling.people),
        "expires": about.expires.isoformat(),
    }
    text = f"wrote {path}: {name} {words} {against} on {list_id} {edition}, until {about.expires}"
    show(document, Text(text), json=json)


def as_day(text: str, option: str) -> date:
    """Read a day of an option."""
    from policy.strict import parse_day

    day = parse_day(text)
    if not isinstance(day, date):
        raise UsageError("usage.argument", f"{option} {text!r:.40}: expected YYYY-MM-DD")
    return day
