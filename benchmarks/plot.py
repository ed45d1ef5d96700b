"""Draw results as SVG for the documentation: a bar a peer, with the target as a mark.

    python benchmarks/plot.py RESULTS.json [--only PREFIX] [--title TEXT] -o FILE.svg

No library, no script, no font: a picture that a page of an enclave may hold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, ROW, TOP = 900, 330, 170, 34, 64
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1a1a1a}.q{fill:#555;font-size:12px}"
    ".b{fill:#2f6f8f}.m{fill:#a0522d}.t{stroke:#1a1a1a;stroke-width:2}.o{stroke:#999}"
    "@media(prefers-color-scheme:dark){text{fill:#eee}.q{fill:#aaa}.t{stroke:#eee}}"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="benchmarks/plot.py", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--only", default="", help="results whose name begins so")
    parser.add_argument("--title", default="Ratio to the peer in the same run; larger is better")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args(argv)
    rows = [row for path in options.results for row in json.loads(path.read_text())]
    rows = [row for row in rows if row["name"].startswith(options.only)]
    options.out.write_text(draw(rows, options.title), encoding="utf-8")
    return 0


def draw(rows: Sequence[dict[str, Any]], title: str) -> str:
    """Return the picture of results as `harness.save` wrote them."""
    rows = sorted(rows, key=lambda row: str(row["name"]))
    top = max((max(row["ratio"], row["target"]) for row in rows), default=1.0) * 1.05
    room = WIDTH - LEFT - RIGHT
    height = TOP + ROW * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text x="0" y="20" font-weight="bold">{escape(title)}</text>',
        f'<text class="q" x="0" y="40">{escape(_machine(rows))}</text>',
    ]
    one = LEFT + room / top
    parts.append(
        f'<line class="o" x1="{one:.1f}" x2="{one:.1f}" y1="{TOP - 10}" y2="{height - 24}"/>'
    )
    parts.append(f'<text class="q" x="{one:.1f}" y="{height - 8}" text-anchor="middle">1</text>')
    for place, row in enumerate(rows):
        y = TOP + ROW * place
        long, mark = room * row["ratio"] / top, LEFT + room * row["target"] / top
        kind = "b" if row["ratio"] >= row["target"] else "m"
        shown = f"{row['ratio']:.2f}x, target {row['target']:g}"
        name = label(row)
        parts += [
            f'<text x="0" y="{y + 16}">{escape(name)}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{max(1.0, long):.1f}" height="22"/>',
            f'<line class="t" x1="{mark:.1f}" x2="{mark:.1f}" y1="{y - 3}" y2="{y + 25}"/>',
            f'<text x="{LEFT + max(long, mark - LEFT) + 8:.1f}" y="{y + 16}">{shown}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def label(row: dict[str, Any]) -> str:
    """Say what a bar compares: the work, and beside whom where a peer is named."""
    facts, name = row["conditions"], str(row["name"]).split("/", 1)[-1]
    if "peer_is" not in facts or "rows" not in facts:
        return name
    work = "1 sequence" if facts["rows"] == 1 else f"{facts['rows']} sequences"
    scored = ", scored" if "likelihood" in name else ""
    return f"{work}{scored}: {str(facts['peer_is']).split(',')[0]}"


def _machine(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "no results"
    facts = rows[0]["conditions"]["machine"]
    loads = [row["conditions"]["machine"]["load"][0] for row in rows]
    return (
        f"{facts['cpu']}, {facts['cores_allowed']} cores, load {min(loads)} to {max(loads)}; "
        f"{facts['time'][:10]}; a bar below its mark is brown"
    )


if __name__ == "__main__":
    raise SystemExit(main())
