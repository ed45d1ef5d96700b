"""How an explained decision looks in a terminal, narrow or wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from policy.report import Explanation, LeafView, RuleView
from policy.terms import Outcome

WIDEST = 110  # columns beyond which lines get hard to read

_STYLES = {
    Outcome.DENY: ("DENIED", "bold red"),
    Outcome.NEEDS_APPROVAL: ("NEEDS APPROVAL", "bold yellow"),
    Outcome.PERMIT_WITH_OBLIGATIONS: ("PERMITTED, WITH OBLIGATIONS", "bold green"),
    Outcome.PERMIT: ("PERMITTED", "bold green"),
}
_HEADS = {
    Outcome.DENY: "Denied by",
    Outcome.NEEDS_APPROVAL: "Held by",
    Outcome.PERMIT_WITH_OBLIGATIONS: "Duties from",
    Outcome.PERMIT: "Permit rules that match",
}
_FUTURES = {
    Outcome.DENY: "is denied",
    Outcome.NEEDS_APPROVAL: "needs approval",
    Outcome.PERMIT_WITH_OBLIGATIONS: "is permitted with obligations",
    Outcome.PERMIT: "is permitted",
}
_ANY = {"applies if": "if any of", "and": "and any of", "because": "any of", "unless": "unless any"}
_TRUTHS = {"T": ("yes", "green"), "F": ("no", "dim"), "U": ("?", "bold yellow")}


def view(
    explained: Explanation, *, title: str, assumed: Sequence[str], idle: Sequence[str] = ()
) -> RenderableType:
    """Lay out the whole explanation."""
    parts: list[RenderableType] = [_headline(explained, title)]
    if assumed:
        parts += [Text("Assumed, because this is a what-if:", "yellow"), *map(_bullet, assumed), ""]
    if explained.held_for_review:
        parts += [Text("Held for review by the hazard officer; details are restricted."), ""]
    for outcome, head in _HEADS.items():
        rules = [each for each in explained.rules if each.effect is outcome]
        if rules:
            parts += [Text(head, "bold underline"), *map(_rule, rules)]
    parts += _missing(explained)
    if idle:
        parts += [Text("Approvals without effect", "bold underline"), *map(_bullet, idle), ""]
    parts += [*_obligations(explained), *_dates(explained)]
    parts.append(_footer(explained))
    return Group(*parts)


def show_view(console: Console, explained: RenderableType) -> None:
    """Print in the width of the terminal, up to `WIDEST`."""
    width = min(console.width, WIDEST)
    console.print(explained, width=width, soft_wrap=False)


def _headline(explained: Explanation, title: str) -> RenderableType:
    word, style = _STYLES[explained.outcome]
    text = Text()
    text.append(f"{word}\n", style)
    text.append(f"{explained.scope} of {title}\n")
    text.append(f"as of {explained.day} ", "bold").append(f"({explained.day_source})", "dim")
    return Panel(text, border_style=style.removeprefix("bold "))


def _rule(rule: RuleView) -> RenderableType:
    head = Text()
    head.append(rule.rule, "bold").append(f" version {rule.version}", "dim")
    if rule.state == "unknown":
        head.append("  cannot be ruled out: a fact is unknown", "yellow")
    lines: list[RenderableType] = [
        head,
        Padding(Text(rule.plain), (0, 0, 0, 2)),
        Padding(Text(f"{rule.citation} ({rule.pedigree})", "dim"), (0, 0, 0, 2)),
    ]
    if rule.effect in {Outcome.DENY, Outcome.NEEDS_APPROVAL}:
        lines.append(Padding(Text(f"way out: {rule.lifting}"), (0, 0, 0, 2)))
    first, second = ("applies if", "and") if rule.applies.leaves else ("", "because")
    rows = ((first, rule.applies), (second, rule.fires), ("unless", rule.excepted))
    for word, shown in rows:
        if shown.leaves:
            lines.append(_leaves(_ANY[word] if shown.any_of else word, shown.leaves))
    lines.append("")
    return Group(*lines)


def _leaves(word: str, leaves: Sequence[LeafView]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=11, style="dim", justify="right")
    table.add_column(width=3, justify="right")
    table.add_column(overflow="fold")
    for at, leaf in enumerate(leaves):
        answer, style = _TRUTHS[leaf.truth]
        words = Text(leaf.words)
        known = Text(f"\n{leaf.value}", "yellow" if leaf.truth == "U" else "default")
        if leaf.source:
            known.append(f"  [{leaf.source}]", "dim")
        for step in leaf.steps:
            known.append(f"\n-> {step}", "dim")
        table.add_row("" if at else word, Text(answer, style), words + known)
    return table


def _missing(explained: Explanation) -> list[RenderableType]:
    if not explained.missing:
        return []
    found: list[RenderableType] = [Text("What is missing", "bold underline")]
    for each in explained.missing:
        text = Text()
        for name, question in zip(each.facts, each.questions, strict=True):
            label = "" if name.startswith("path ") else f" ({name})"
            text.append(f"{question}{label}\n")
        roles = ", ".join(each.asked_of)
        text.append(f"ask {roles}; settles {', '.join(each.rules)}", "dim")
        found.append(_mark("!" if each.blocks else "-", text, "yellow" if each.blocks else "dim"))
    return [*found, ""]


def _obligations(explained: Explanation) -> list[RenderableType]:
    if not explained.obligations:
        return []
    found: list[RenderableType] = [Text("Obligations", "bold underline")]
    for each in explained.obligations:
        text = Text(each.text)
        text.append(f"\n{each.id}: {each.owner}, {each.due.replace('_', ' ')}", "dim")
        found.append(_bullet(text))
    return [*found, ""]


def _dates(explained: Explanation) -> list[RenderableType]:
    found: list[RenderableType] = [Text("Dates", "bold underline")]
    change = explained.change
    if change is None:
        found.append(_bullet("With the same facts this outcome does not change at any known date."))
    else:
        rules = f" ({', '.join(change.rules)})" if change.rules else ""
        words = _FUTURES[change.outcome]
        found.append(_bullet(f"Next change: from {change.on} on it {words}{rules}."))
    found += [
        _bullet(f"From {each['from']} on {each['rule']} applies: {each['plain']}")
        for each in explained.warnings
    ]
    return [*found, ""]


def _footer(explained: Explanation) -> RenderableType:
    text = Text(style="dim")
    text.append(f"{explained.quiet} other rules were evaluated and do not apply or did not fire.\n")
    text.append(f"Packs: {', '.join(explained.packs)}. Lists: {', '.join(explained.lists)}.\n")
    text.append("This records a decision; it is no legal advice.")
    return text


def _bullet(words: str | Text) -> RenderableType:
    return _mark("-", Text(words) if isinstance(words, str) else words, "dim")


def _mark(sign: str, words: Text, style: str) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2, justify="right", style=style)
    table.add_column(overflow="fold")
    table.add_row(sign, words)
    return table
