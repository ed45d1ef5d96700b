"""Results for people: terminal table, CSV, JSON and a self-contained HTML report.

Every page carries the digest of the model, the seed, the commitment to the prompt, the decision,
the rung of the seal, the receipt of the audit log, the screen, and one line of what was not
checked. The stamp `scientific_use: false` comes from the signed manifest. The report loads nothing:
no script, no font, no image, no link; its style is allowed by its hash alone.

Runs in the broker: no RDKit here, and drawings pass `svg.clean_svg` before they enter a page.
"""

from __future__ import annotations

import base64
import csv as csvlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from airgap.science.results import (
    Assessed,
    MaterialRow,
    MoleculeRow,
    Prepared,
    RetroRow,
    Row,
    SiteRow,
)
from airgap.science.svg import clean_svg

TABLE_ROWS = 20
NARROW = 60
"""Columns of a terminal below which a table would break its words."""
REPORT_ROWS = 200
INVALID_SHOWN = 100
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_NON_METALS = frozenset(("H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Se", "Br", "I"))
TITLES = {
    "retrosynthesis": "Retrosynthesis",
    "molecule": "Molecules",
    "binding-site": "Binding sites",
    "pocket-ligand": "Pocket ligands",
    "material": "Materials",
}
STAMP = "scientific_use: false – reference model"


@dataclass(frozen=True, slots=True)
class Header:
    """The facts of a run that stand on every page.

    Attributes:
        model: Name, as in the manifest.
        model_digest: Digest of the bundle.
        precision: Of the graph that ran.
        seed: Of the request.
        prompt_commitment: Commitment to the prompt, as logged.
        decision: One line: outcome and digest of the policy decision.
        reasons: Lines of the decision that a user may read: rules with citations, obligations.
        seal: Rung of the seal and its probe result, in one line.
        receipt: Where the audit log holds this run.
        created: Time of the reply, UTC.
        scientific_use: As in the signed manifest.
        reference_model: As in the signed manifest.
        version: Of this program.
        constraint: What held the samples: `results.Prepared.constraint`.

    """

    model: str
    model_digest: str
    precision: str
    seed: int
    prompt_commitment: str
    decision: str
    seal: str
    receipt: str
    created: datetime
    scientific_use: bool
    reference_model: bool
    reasons: tuple[str, ...] = ()
    version: str = ""
    constraint: str = ""

    @property
    def stamp(self) -> str:
        """The stamp of a model that is not for science; empty for others."""
        if self.scientific_use:
            return ""
        return STAMP if self.reference_model else "scientific_use: false"


def screen_line(assessed: Assessed) -> str:
    """Return what a user may read of the output screen; never a rule, a match or a structure."""
    screen = assessed.output_screen
    if screen.status == "complete" and screen.tier in {"H0", "H1"}:  # H1 is noted in silence
        return f"not held; {screen.mode}; pack {short(screen.pack)}"
    return (
        "held for review" if screen.status != "complete" else f"marked; pack {short(screen.pack)}"
    )


def short(digest: str) -> str:
    """Return a digest with twelve digits of its hexadecimal part."""
    kind, colon, digits = digest.partition(":")
    return f"{kind}{colon}{digits[:12]}" if colon else digest[:12]


# -- JSON and CSV ---------------------------------------------------------------------------------


def document(prepared: Prepared, assessed: Assessed, header: Header) -> dict[str, Any]:
    """Return the whole result as one JSON document; the screens stay behind as one line each."""
    result = assessed.model_dump(mode="json", exclude={"output_screen", "parts", "sequences"})
    return {
        "format": "airgap/result/1",
        **result,
        "display": prepared.display,
        "preset": prepared.preset.model_dump(mode="json"),
        "constraint": prepared.constraint,
        "modality": prepared.modality,
        "notes": list(prepared.notes),
        "screen": screen_line(assessed),
        "stamp": header.stamp,
        "run": {**asdict(header), "created": _utc(header.created), "reasons": list(header.reasons)},
    }


_COMMON = ("rank", "votes", "n", "index", "logprob", "per_token", "removed_mass", "finish_reason")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "retrosynthesis": ("reactants", "reaction", "handed_back", "atoms_balance"),
    "molecule": (
        *("smiles", "inchikey", "formula", "mw", "logp", "tpsa", "qed", "fsp3"),
        *("donors", "acceptors", "rotatable", "heavy_atoms"),
    ),
    "binding-site": ("sites", "letters", "positions"),
    "material": ("metals", "linkers", "built"),
}
_COLUMNS["pocket-ligand"] = _COLUMNS["molecule"]
_RUN = ("model", "model_digest", "seed", "prompt_commitment", "scientific_use", "constraint")


def csv(assessed: Assessed, header: Header) -> str:
    """Return the rows as CSV (RFC 4180); text that a spreadsheet could run is quoted."""
    out = io.StringIO()
    writer = csvlib.writer(out, lineterminator="\r\n")
    asked = any(row.ppl_authors is not None for row in assessed.rows)
    own = (*(("ppl_authors",) if asked else ()), *_COLUMNS[assessed.task])
    writer.writerow([*_COMMON, *own, *_RUN])
    for row in assessed.rows:
        fields = {**row.model_dump(mode="json"), "n": assessed.summary.n, **_row_texts(row)}
        run = [getattr(header, name) for name in _RUN]
        writer.writerow([_cell(value) for value in [*(fields[c] for c in (*_COMMON, *own)), *run]])
    return out.getvalue()


def _row_texts(row: Row) -> dict[str, str]:
    match row:
        case RetroRow():
            return {"reactants": ".".join(part.smiles for part in row.reactants)}
        case SiteRow():
            return {
                "sites": " ".join(row.sites),
                "positions": " ".join(str(position) for position in row.positions),
            }
        case MaterialRow():
            return {
                "metals": " | ".join(metal.node for metal in row.metals),
                "linkers": ".".join(linker.smiles for linker in row.linkers),
            }
        case MoleculeRow():
            return {}


def _cell(value: object) -> str:
    """Return one cell; an apostrophe before a text that begins like a formula. Numbers stay."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value).replace("\x00", "")
    return f"'{text}" if text.startswith(_FORMULA) else text


# -- terminal -------------------------------------------------------------------------------------


def table(prepared: Prepared, assessed: Assessed, header: Header) -> Group:
    """Return the result for a terminal: stamp, first rows, counts, what was not checked."""
    summary = assessed.summary
    parts: list[Any] = [Text(prepared.display, style="bold")]
    if header.stamp:
        parts.append(Text(header.stamp, style="bold black on yellow"))
    parts.append(_Rows(*_grid(assessed)))
    more = len(assessed.rows) - TABLE_ROWS
    if more > 0:
        parts.append(Text(f"... and {more} more rows: --csv, --json or the report", style="dim"))
    if top := _top_residues(assessed)[:12]:
        named = ", ".join(f"{letter}{label} {votes}" for label, letter, votes in top)
        parts.append(Text(f"most votes, of {summary.n}: {named}"))
    parts.append(
        Text(
            f"{summary.valid} of {summary.n} valid, {summary.unique} different; "
            f"{_removed(prepared, summary.mean_removed_mass)}"
        )
    )
    parts.append(Text(f"not checked: {assessed.unchecked}", style="italic"))
    parts.append(Text(f"screen: {screen_line(assessed)}", style="dim"))
    parts.extend(Text(f"note: {note}", style="dim") for note in prepared.notes)
    return Group(*parts)


def _removed(prepared: Prepared, mass: float) -> str:
    forced = prepared.preset.valence
    who, least = ("structure+valence", "at least ") if forced else ("grammar", "")
    return f"{who} removed {least}{mass:.3f} of the probability on average"


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows as a table; on a narrow terminal as a block a row, because words must stay whole."""

    columns: list[tuple[str, bool]]
    rows: list[list[str]]

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Choose by the width that there is."""
        if options.max_width < NARROW:
            yield from self._blocks()
            return
        grid = Table(box=None, pad_edge=False, header_style="bold", row_styles=["", "dim"])
        for name, right in self.columns:
            grid.add_column(
                name,
                justify="right" if right else "left",
                overflow="fold",
                no_wrap=right,
                min_width=None if right or not name else NARROW // 4,
            )
        for cells in self.rows:
            grid.add_row(*[Text(cell) for cell in cells])
        yield grid

    def _blocks(self) -> Iterator[Text]:
        for cells in self.rows:
            named = [
                f"{name} {cell}".strip()
                for (name, _), cell in zip(self.columns, cells, strict=True)
                if cell
            ]
            yield Text("  ".join(named[:3]), style="bold")  # rank, votes, log-likelihood
            yield from (Text(line) for line in named[3:])


def _grid(assessed: Assessed) -> tuple[list[tuple[str, bool]], list[list[str]]]:
    n = assessed.summary.n
    shown = assessed.rows[:TABLE_ROWS]
    asked = any(row.ppl_authors is not None for row in assessed.rows)
    head = [("#", True), ("votes", True), ("log-lik.", True)]
    head += [("ppl (authors)", True)] if asked else []
    own = {
        "retrosynthesis": [("reactants", False), ("", False)],
        "binding-site": [("sites", True), ("marked residues", False)],
        "material": [("metal node", False), ("linkers", False)],
    }.get(
        assessed.task,
        [("SMILES", False), ("MW", True), ("QED", True), ("logP", True), ("TPSA", True)],
    )
    rows = [
        [
            *(str(row.rank), f"{row.votes}/{n}", f"{row.logprob:.2f}"),
            *([_perplexity(row)] if asked else []),
            *_own_cells(row),
        ]
        for row in shown
    ]
    return [*head, *own], rows


def _perplexity(row: Row) -> str:
    return "" if row.ppl_authors is None else f"{row.ppl_authors:.3f}"


def _own_cells(row: Row) -> list[str]:
    match row:
        case RetroRow():
            return [" + ".join(part.smiles for part in row.reactants), " ".join(flags(row))]
        case SiteRow():
            marked = " ".join(
                f"{letter}{label}" for letter, label in zip(row.letters, row.sites, strict=False)
            )
            return [str(len(row.sites)), marked or "none"]
        case MaterialRow():
            return [
                " | ".join(composition(metal.node) for metal in row.metals),
                " + ".join(linker.smiles for linker in row.linkers),
            ]
        case MoleculeRow():
            numbers = f"{row.mw:.1f}", f"{row.qed:.2f}", f"{row.logp:.2f}", f"{row.tpsa:.0f}"
            return [row.smiles, *numbers]


def flags(row: RetroRow) -> list[str]:
    """Return the warnings of one prediction, in words."""
    found = ["product handed back"] if row.handed_back else []
    return found if row.atoms_balance else [*found, "atoms of the product are missing"]


def composition(node: str) -> str:
    """Return the atoms of a dotted metal node as a formula, metals first: `Zn4 O`."""
    counts: dict[str, int] = {}
    for atom in node.split("."):
        symbol = "".join(c for c in atom if c.isalpha())
        counts[symbol] = counts.get(symbol, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (item[0] in _NON_METALS, item[0]))
    return " ".join(f"{symbol}{number if number > 1 else ''}" for symbol, number in ordered)


def formula(text: str) -> str:
    """Return a molecular formula with its numbers set low and its charge set high."""
    body, sign, charge = text.partition("-" if "-" in text else "+")
    low, high = (
        str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"),
        str.maketrans("0123456789+-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"),
    )
    return body.translate(low) + (charge + sign).translate(high)


# -- report ---------------------------------------------------------------------------------------


def html(
    prepared: Prepared,
    assessed: Assessed,
    header: Header,
    drawings: Mapping[str, Iterable[str]],
) -> str:
    """Return the report as one HTML file.

    Args:
        prepared: Reply of `prepare`.
        assessed: Reply of `assess`.
        header: Facts of the run.
        drawings: SVG texts by rank or `subject`, as the helper sent them; may be empty.

    Raises:
        FaultError: `science.svg`; a drawing holds what no drawing may hold.

    """
    style = _file("report.css") + (_file("stamp.css") if header.stamp else "")
    digest = base64.b64encode(sha256(style.encode()).digest()).decode()
    svgs = {
        key: [clean_svg(text, title=_title(key, assessed)) for text in texts]
        for key, texts in drawings.items()
    }
    environment = Environment(
        loader=FunctionLoader(_file),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        short=short, utc=_utc, flags=flags, composition=composition, formula=formula
    )
    page: str = environment.get_template("report.html.j2").render(
        style=style,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'",
        title=TITLES[assessed.task],
        prepared=prepared,
        assessed=assessed,
        rows=assessed.rows[:REPORT_ROWS],
        invalid=assessed.invalid[:INVALID_SHOWN],
        top=_top_residues(assessed),
        best=max((row.logprob for row in assessed.rows), default=0.0),
        worst=min((row.logprob for row in assessed.rows), default=0.0),
        header=header,
        screen=screen_line(assessed),
        svgs=svgs,
    )
    return page


def _title(key: str, assessed: Assessed) -> str:
    if key == "subject":
        return "input" if assessed.track is None else "votes per residue"
    return f"row {key}"


def _top_residues(assessed: Assessed) -> list[tuple[str, str, int]]:
    """Return the residues with most votes: label, letter, votes; at most thirty."""
    if assessed.track is None:
        return []
    track = assessed.track
    triples = zip(track.labels, track.sequence, track.votes, strict=True)
    return sorted((t for t in triples if t[2]), key=lambda t: -t[2])[:30]


def _utc(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _file(name: str) -> str:
    return (resources.files("airgap.science") / "templates" / name).read_text(encoding="utf-8")
