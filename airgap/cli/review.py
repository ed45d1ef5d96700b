"""`airgap policy review`: what a person of the site has to read, and the signed answer."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from airgap.cli.common import Json, Root, root_folder, show
from airgap.cli.signing import Key, Passphrase, signer_of
from policy.errors import RefusedError, UsageError
from policy.wording import counted

if TYPE_CHECKING:
    from airgap.reviews import Item
    from policy.lint import Review

TEXT_LIMIT = 64 << 20


class FindingName(enum.StrEnum):
    """What came of the reading."""

    CONFIRMED = "confirmed"
    DIFFERS = "differs"


def register(group: typer.Typer) -> None:
    """Add the command to the group `policy`."""
    group.command("review")(review)


def review(
    item: Annotated[
        str,
        typer.Argument(help="Rule, screen pack or edge. Default: list all, with who read them."),
    ] = "",
    *,
    finding: Annotated[
        FindingName | None, typer.Option("--finding", help="Does the text say what stands here?")
    ] = None,
    read_on: Annotated[str, typer.Option("--read-on", help="The day. Default: today.")] = "",
    next_review: Annotated[str, typer.Option("--next", help="Day of the next review.")] = "",
    text: Annotated[
        Path | None,
        typer.Option("--text", help="File with the text that you read; its digest is signed."),
    ] = None,
    note: Annotated[str, typer.Option("--note", help="What you read, in your words.")] = "",
    key: Key = "",
    passphrase_file: Passphrase = None,
    root: Root = None,
    json: Json = False,
) -> None:
    """Sign that you read the text that a rule, screen pack or edge rests on; or list them.

    The statement is about this wording; another wording is asked for anew. Counted by
    `airgap policy lint` until the day of the next review.
    """
    from airgap.rulework import review_items, site_reviews

    tree = root_folder(root)
    items = review_items(tree)
    if not item:
        _list(items, site_reviews(tree, items), json=json)
        return
    found = [each for each in items if each.id == item]
    if len(found) != 1:
        raise RefusedError(
            "policy.review",
            f"{len(found)} rules, screen packs or edges are called {item!r:.64}",
            hint="airgap policy review lists them",
        )
    if finding is None or not note or not key or not next_review:
        raise UsageError(
            "usage.argument",
            f"a review of {item} needs --finding, --note, --next and --key",
            hint=f"it rests on: {found[0].citation}"[:300],
        )
    _sign(
        found[0],
        (finding.value, read_on, next_review, note),
        text,
        signer_of(key, passphrase_file, tree),
        tree,
        json=json,
    )


def _sign(
    item: Item,
    words: tuple[str, str, str, str],
    text: Path | None,
    signer: Any,
    tree: Path,
    *,
    json: bool,
) -> None:
    from airgap import reviews
    from airgap.cli.lists import as_day
    from bundle.keys import read_limited
    from bundle.trust import load_trust

    finding, read_on, next_review, note = words
    now = datetime.now(UTC)
    read = None
    if text is not None:
        read = read_limited(text, TEXT_LIMIT, code=reviews.CODE, what="the text")
    about = reviews.word(
        item,
        finding=finding,
        read_on=as_day(read_on, "--read-on") if read_on else now.date(),
        next_review=as_day(next_review, "--next"),
        text=read,
        note=note,
        issued=now,
    )
    envelope = reviews.sign(about, item, signer)
    made = reviews.verify(envelope, load_trust(tree / "trust").standing, [item])
    if made is None:
        raise TypeError("a review is about the item that it was made for")
    path = reviews.write(envelope, tree)
    document = {
        "file": str(path),
        "item": item.id,
        "finding": finding,
        "people": list(made.people),
        "read_on": about.read_on.isoformat(),
        "next_review": about.next_review.isoformat(),
    }
    said = "says what stands here" if made.confirmed else "says otherwise"
    show(
        document,
        Text(f"wrote {path}: {', '.join(made.people)} read {item.citation!r}; it {said}"),
        json=json,
    )


def _list(items: Sequence[Item], found: Sequence[Review], *, json: bool) -> None:
    read = {(each.kind, each.item): each for each in found}
    today = datetime.now(UTC).date()
    rows = [_row(each, read.get((each.kind, each.id)), today) for each in items]
    unread = sum(row["state"] == "not read" for row in rows)
    lines = [
        f"{row['item']:<22} {row['state']:<24} {row['owner']}: {row['citation']}" for row in rows
    ]
    lines.append(
        f"{counted(len(rows), 'text')} to be read, {unread} of them not read by anybody "
        "of this site"
    )
    show({"items": rows, "not_read": unread}, Text("\n".join(lines)), json=json)


def _row(item: Item, review: Review | None, today: date) -> dict[str, Any]:
    state = "not read"
    if review is not None:
        words = "read" if review.confirmed else "differs"
        late = ", due again" if review.next_review <= today else ""
        state = f"{words} {review.read_on}{late}"
    return {
        "item": item.id,
        "kind": item.kind,
        "citation": item.citation,
        "owner": item.owner,
        "due": None
        if item.due is None and review is None
        else str(review.next_review if review else item.due),
        "state": state,
        "people": list(review.people) if review else [],
        "digest": str(item.digest),
    }
