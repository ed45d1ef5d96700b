"""What changes in the coming days, as a picture: on a terminal and as a page that prints well."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import date

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from policy.compare import Due, Outlook
from policy.terms import Outcome

WIDTH = 60  # cells of the terminal picture
_WORDS = {
    Outcome.DENY: "denied",
    Outcome.NEEDS_APPROVAL: "needs approval",
    Outcome.PERMIT_WITH_OBLIGATIONS: "permitted with duties",
    Outcome.PERMIT: "permitted",
}
_SIGNS = {
    Outcome.DENY: "x",
    Outcome.NEEDS_APPROVAL: "?",
    Outcome.PERMIT_WITH_OBLIGATIONS: "=",
    Outcome.PERMIT: "-",
}
_COLOURS = {
    Outcome.DENY: "red",
    Outcome.NEEDS_APPROVAL: "yellow",
    Outcome.PERMIT_WITH_OBLIGATIONS: "cyan",
    Outcome.PERMIT: "green",
}


def picture(
    start: date, spans: Sequence[int], views: Sequence[Outlook], due: Sequence[Due]
) -> RenderableType:
    """A bar a bundle, the changes with their rules, and what falls due."""
    last = spans[-1]
    parts: list[RenderableType] = [Text(f"From {start}, the next {last} days")]
    if not views:
        parts.append(Text("No bundle is installed for an active project."))
    for view in views:
        parts.append(Text(f"\n{view.name}: {_WORDS[view.now]} today"))
        parts.append(_bar(view, last))
        parts += [
            Text(f"  {each.on}  {_WORDS[each.outcome]}: {', '.join(each.rules)}")
            for each in view.changes
        ]
        counts = ", ".join(f"{len(view.within(span))} in {span} days" for span in spans)
        parts.append(Text(f"  changes: {counts}"))
    if views:
        legend = ", ".join(f"{sign} {_WORDS[outcome]}" for outcome, sign in _SIGNS.items())
        parts.append(Text(f"\n{legend}"))
    table = Table(title="Falls due", title_justify="left", box=None, pad_edge=False)
    for name in ("On", "What", "Words"):
        table.add_column(name, overflow="fold")
    for each in due:
        overdue = " (overdue)" if each.on < start else ""
        table.add_row(Text(f"{each.on}{overdue}"), Text(each.what), Text(each.words))
    return Group(*parts, Text(""), table) if due else Group(*parts)


def _bar(view: Outlook, days: int) -> Text:
    bar = Text("  ")
    for outcome, first, last in _stretches(view, days):
        cells = _cell(last, days) - _cell(first, days)
        bar.append(_SIGNS[outcome] * cells, style=_COLOURS[outcome])
    return bar


def _cell(day: int, days: int) -> int:
    return round(day * WIDTH / days)


def _stretches(view: Outlook, days: int) -> list[tuple[Outcome, int, int]]:
    """Outcome, first day and day after the last, counted from the start."""
    edges = [(view.now, 0), *((each.outcome, (each.on - view.start).days) for each in view.changes)]
    ends = [first for _, first in edges[1:]] + [days]
    return [(outcome, first, last) for (outcome, first), last in zip(edges, ends, strict=True)]


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;
color:#1b1f24}
h1{font-size:1.4rem;margin:0 0 .2rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
p.sub{color:#57606a;margin:0}svg{display:block;width:100%;height:auto;margin:.3rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem}
td,th{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid #d8dee4}
td:first-child{white-space:nowrap}.late{color:#a40e26;font-weight:600}
ul{margin:.2rem 0 .2rem 1.2rem;padding:0}code{font-size:.9em}
.key span{display:inline-block;margin-right:1.2rem}
.key i{display:inline-block;width:.9em;height:.9em;
margin-right:.35em;vertical-align:-.1em;border:1px solid #0002}
@media print{body{margin:0;padding:0;max-width:none}h2,svg,tr{break-inside:avoid}}
"""
_FILLS = {
    Outcome.DENY: "#c93c4b",
    Outcome.NEEDS_APPROVAL: "#e3b341",
    Outcome.PERMIT_WITH_OBLIGATIONS: "#5aa7c9",
    Outcome.PERMIT: "#57ab6b",
}


def page(
    system: str,
    start: date,
    spans: Sequence[int],
    views: Sequence[Outlook],
    due: Sequence[Due],
) -> str:
    """The same as a page without scripts or outside references."""
    title = f"Policy horizon of {html.escape(system)}"
    keys = "".join(
        f'<span><i style="background:{_FILLS[each]}"></i>{_WORDS[each]}</span>' for each in _FILLS
    )
    bars = "".join(_bar_of_page(view, spans) for view in views)
    rows = "".join(
        f"<tr><td{_late(each, start)}>{each.on}</td><td>{html.escape(each.what)}</td>"
        f"<td>{html.escape(each.words)}</td></tr>"
        for each in due
    )
    nothing = "<p>No bundle is installed for an active project.</p>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f'<p class="sub">From {start}, {spans[-1]} days. Admission of each installed bundle with'
        f" the facts, lists and approvals of that day.</p>\n"
        f'<p class="key">{keys}</p>\n{bars or nothing}\n<h2>Falls due</h2>\n'
        f"<table><thead><tr><th>On</th><th>What</th><th>Words</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>\n</body></html>\n"
    )


def _late(each: Due, start: date) -> str:
    return ' class="late"' if each.on < start else ""


def _bar_of_page(view: Outlook, spans: Sequence[int]) -> str:
    days = spans[-1]
    boxes = "".join(
        f'<rect x="{first * 1000 / days:.1f}" y="4" width="{(last - first) * 1000 / days:.1f}"'
        f' height="26" fill="{_FILLS[outcome]}"><title>{_WORDS[outcome]}</title></rect>'
        for outcome, first, last in _stretches(view, days)
    )
    ticks = "".join(
        f'<line x1="{span * 1000 / days:.1f}" x2="{span * 1000 / days:.1f}" y1="0" y2="36"'
        f' stroke="#1b1f24" stroke-dasharray="3 3"/><text x="{span * 1000 / days - 4:.1f}" y="50"'
        f' font-size="13" text-anchor="end">{span} days</text>'
        for span in spans
    )
    changes = "".join(
        f"<li>{each.on}: {_WORDS[each.outcome]} by "
        f"{', '.join(f'<code>{html.escape(rule)}</code>' for rule in each.rules)}</li>"
        for each in view.changes
    )
    return (
        f"<h2>{html.escape(view.name)}: {_WORDS[view.now]} today</h2>"
        f'<svg viewBox="0 0 1000 54" role="img" aria-label="{html.escape(view.name)}">'
        f"{boxes}{ticks}</svg><ul>{changes or '<li>no change</li>'}</ul>\n"
    )
