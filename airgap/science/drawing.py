"""Drawings as small, plain SVG, inside the sealed helper: molecules, schemes, annotated sequences.

RDKit lays molecules out; its SVG is read back and written again as few paths with class names, so
that a page can colour it for light, dark and print, and so that nothing but shapes leaves the
helper. Colours stand as attributes too: a file taken out of the page still shows.
"""

from __future__ import annotations

import importlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from rdkit import Chem
from rdkit.Chem import rdDepictor, rdFMCS
from rdkit.Geometry import Point2D

from airgap.science import outlines


def _drawing_module() -> Any:
    """Return RDKit's own, None where it cannot be loaded: it is linked with X11."""
    try:
        return importlib.import_module("rdkit.Chem.Draw.rdMolDraw2D")
    except ImportError:
        return None


rdMolDraw2D = _drawing_module()  # noqa: N816 - the name of the library
BOND = 24.0
"""Bond length in pixels; all molecules of a scheme share it."""
CARD = (264, 190)
MCS_SECONDS = 1
TRACK_COLUMNS = 50
TRACK_LIMIT = 20_000

_INK = "#1b2430"
_COLOURS = {
    "#0000FF": ("n", "#2b50d8"),
    "#FF0000": ("o", "#cf222e"),
    "#33CCCC": ("f", "#0a7f6b"),
    "#00CC00": ("l", "#1a7f37"),
    "#CCCC00": ("s", "#8f6500"),
    "#FF7F00": ("p", "#b35900"),
    "#7F4C19": ("r", "#8a3a1e"),
    "#A01EEF": ("i", "#6f3bbf"),
}
_SVG = "{http://www.w3.org/2000/svg}"


def draw_molecule(molecule: Chem.Mol, size: tuple[int, int] = CARD) -> str:
    """Return a drawing that fits `size`, in pixels."""
    width, height = size
    _, _, shapes = _shapes(laid_out(molecule), width, height)
    return _document(width, height, shapes, "molecule")


def draw_scheme(
    product: Chem.Mol, reactants: Sequence[Chem.Mol], *, until: float = math.inf
) -> str:
    """Return the scheme product <= reactants, reactants turned as they lie in the product.

    Finding what they share is slow for some pairs: after `until`, a monotonic time, reactants lie
    as they come.
    """
    target = laid_out(product)
    parts = [_shapes(target, -1, -1)]
    for reactant in reactants:
        hurry = time.monotonic() > until
        lying = laid_out(reactant) if hurry else _aligned(reactant, target)
        parts.append(_shapes(lying, -1, -1))
    height = max(part[1] for part in parts)
    out: list[str] = []
    x = 0.0
    for number, (width, tall, shapes) in enumerate(parts):
        if number == 1:
            out.append(_arrow(x + 14, height / 2))
            x += 76
        elif number > 1:
            out.append(_plus(x + 12, height / 2))
            x += 24
        out.append(f'<g transform="translate({x:.1f} {(height - tall) / 2:.1f})">{shapes}</g>')
        x += width
    return _document(round(x), round(height), "".join(out), "scheme")


def draw_track(track: Mapping[str, Any]) -> str:
    """Return the annotated sequence: a cell a residue, a bar for its votes, numbers aside."""
    labels = [str(x) for x in track["labels"]]
    votes, copies = [int(vote) for vote in track["votes"]], max(1, int(track["copies"]))
    tips = [f"{votes[at]} of {copies}" for at in range(len(votes))]
    return _sequence(str(track["sequence"]), labels, [vote / copies for vote in votes], tips)


def draw_pocket(sequence: str, labels: Sequence[str], pockets: Sequence[int]) -> str:
    """Return the annotated sequence of an input: its pocket residues are marked."""
    inside = set(pockets)
    marked = [float(at in inside) for at in range(len(sequence))]
    tips = ["pocket" if one else "not marked" for one in marked]
    return _sequence(sequence, labels, marked, tips)


def _sequence(
    sequence: str, labels: Sequence[str], shares: Sequence[float], tips: Sequence[str]
) -> str:
    """Draw a cell a residue; `shares` of 0 to 1 are bars and shades, `tips` say them in words."""
    sequence = sequence[:TRACK_LIMIT]
    cell, bar, row, left = 17, 26, 66, 64
    out: list[str] = []
    for at, letter in enumerate(sequence):
        column, line = at % TRACK_COLUMNS, at // TRACK_COLUMNS
        x, y = left + column * cell + 4 * (column // 10), line * row + 12
        share, tip = shares[at], f"{labels[at]} {letter}: {tips[at]}"
        if share:
            tall = max(2.0, share * bar)
            out.append(
                f'<rect class="v" x="{x + 2}" y="{y + bar - tall:.1f}" width="{cell - 4}" '
                f'height="{tall:.1f}" rx="1.5" fill="#0b6e99"><title>{escape(tip)}</title></rect>'
                f'<rect class="v" x="{x}" y="{y + bar + 3}" width="{cell}" height="19" rx="3" '
                f'fill="#0b6e99" fill-opacity="{0.12 + 0.5 * share:.2f}"/>'
            )
        out.append(
            f'<text class="t" x="{x + cell / 2}" y="{y + bar + 17}" text-anchor="middle" '
            f'font-size="13" font-family="monospace" fill="{_INK}">{escape(letter)}'
            f"<title>{escape(tip)}</title></text>"
        )
        if column == 0:
            out.append(
                f'<text class="m" x="{left - 8}" y="{y + bar + 17}" text-anchor="end" '
                f'font-size="11" font-family="monospace" fill="#5b6673">{escape(labels[at])}</text>'
                f'<line class="g" x1="{left}" x2="{left + TRACK_COLUMNS * cell + 16}" '
                f'y1="{y + bar}" y2="{y + bar}" stroke="#c9d1d9" stroke-width="1"/>'
            )
        if column % 10 == 9 or at == len(sequence) - 1:  # noqa: PLR2004 - every tenth residue
            out.append(
                f'<text class="m" x="{x + cell / 2}" y="{y + bar + 30}" text-anchor="middle" '
                f'font-size="9" font-family="monospace" fill="#5b6673">'
                f"{escape(labels[at].rpartition(':')[2])}</text>"
            )
    lines = -(-max(1, len(sequence)) // TRACK_COLUMNS)
    width = left + TRACK_COLUMNS * cell + 24
    return _document(width, lines * row + 14, "".join(out), "track")


def laid_out(molecule: Chem.Mol) -> Chem.Mol:
    """Return a copy with two-dimensional coordinates, straightened, ready to be drawn."""
    if rdMolDraw2D is None:
        copy = outlines.prepared(molecule)
    else:
        copy = rdMolDraw2D.PrepareMolForDrawing(molecule, addChiralHs=False, wedgeBonds=False)
    rdDepictor.Compute2DCoords(copy, useRingTemplates=True)
    rdDepictor.StraightenDepiction(copy)
    return _wedged(copy)


def _wedged(molecule: Chem.Mol) -> Chem.Mol:
    """Wedge anew: wedges kept from other coordinates would show the mirror image."""
    for bond in molecule.GetBonds():
        bond.SetBondDir(Chem.BondDir.NONE)
    Chem.WedgeMolBonds(molecule, molecule.GetConformer())
    return molecule


def _aligned(reactant: Chem.Mol, target: Chem.Mol) -> Chem.Mol:
    """Lay a reactant out so that what it shares with the product lies as it lies there."""
    plain = laid_out(reactant)
    common = rdFMCS.FindMCS(
        [plain, target],
        timeout=MCS_SECONDS,
        completeRingsOnly=True,
        ringMatchesRingOnly=True,
    )
    if common.numAtoms < 4:  # noqa: PLR2004 - less is chance
        return plain
    pattern = Chem.MolFromSmarts(common.smartsString)
    mine, theirs = plain.GetSubstructMatch(pattern), target.GetSubstructMatch(pattern)
    if not mine or len(mine) != len(theirs):
        return plain
    places = target.GetConformer()
    fixed = {}
    for one, two in zip(mine, theirs, strict=True):
        spot = places.GetAtomPosition(two)
        fixed[one] = Point2D(spot.x, spot.y)
    turned = Chem.Mol(plain)
    rdDepictor.Compute2DCoords(turned, coordMap=fixed)
    turned = _wedged(turned)
    # Forced places can turn a double bond into its other isomer: three of 1,500 drawings did.
    return turned if shows(turned, reactant) else plain


def shows(drawn: Chem.Mol, molecule: Chem.Mol) -> bool:
    """Return whether coordinates and wedges, read back, give the same stereoisomer."""
    found = Chem.MolFromMolBlock(Chem.MolToMolBlock(drawn))
    return found is not None and Chem.MolToSmiles(found) == Chem.MolToSmiles(molecule)


def _shapes(molecule: Chem.Mol, width: int, height: int) -> tuple[float, float, str]:
    """Return width, height and the shapes of one molecule; with -1 the size follows the bonds."""
    if rdMolDraw2D is None:
        return outlines.shapes(molecule, width, height, BOND)
    drawer = rdMolDraw2D.MolDraw2DSVG(width, height)
    options = drawer.drawOptions()
    settings = {
        "clearBackground": False,
        "includeMetadata": False,
        "prepareMolsBeforeDrawing": False,
        "fixedBondLength": BOND,
        "bondLineWidth": 1.6,
        "scaleBondWidth": False,
        "padding": 0.06,
        "multipleBondOffset": 0.16,
        "additionalAtomLabelPadding": 0.06,
        "singleColourBonds": True,
        "minFontSize": 9,
        "maxFontSize": 15,
    }
    for name, value in settings.items():
        setattr(options, name, value)
    drawer.DrawMolecule(molecule)
    drawer.FinishDrawing()
    root = ET.fromstring(drawer.GetDrawingText())  # noqa: S314 - RDKit's own text, no user XML in it
    size = [float(str(root.get(name)).removesuffix("px")) for name in ("width", "height")]
    return size[0], size[1], _rewrite(root)


def _rewrite(root: ET.Element) -> str:
    """Join RDKit's shapes of one kind and colour into one path each."""
    joined: dict[tuple[str, str, str], list[str]] = {}
    for element in root.iter(f"{_SVG}path"):
        style = dict(
            part.strip().split(":", 1)
            for part in element.get("style", "").split(";")
            if ":" in part
        )
        data = re.sub(r"\s+", " ", element.get("d", "")).strip()
        data = re.sub(r" ?([MLQCZHV]) ?", r"\1", data.replace(",", " ").replace("  ", " "))
        fill = element.get("fill") or style.get("fill", "none")
        stroke = "none" if element.get("fill") else style.get("stroke", "none")
        width = style.get("stroke-width", "0").removesuffix("px")
        joined.setdefault((fill, stroke, width), []).append(data)
    for element in root.iter(f"{_SVG}ellipse"):  # the dots of a radical
        numbers = [float(element.get(name, "0")) for name in ("cx", "cy", "rx", "ry")]
        joined.setdefault(("#000000", "none", "0"), []).append(_circle(*numbers))
    return "".join(_path(*kind, "".join(data)) for kind, data in joined.items())


def _circle(cx: float, cy: float, rx: float, ry: float) -> str:
    half = f"A{rx:.1f} {ry:.1f} 0 1 0 "
    return f"M{cx - rx:.1f} {cy:.1f}{half}{cx + rx:.1f} {cy:.1f}{half}{cx - rx:.1f} {cy:.1f}Z"


def _path(fill: str, stroke: str, width: str, data: str) -> str:
    inside, colour = _colour(fill)
    outside, line = _colour(stroke)
    names = " ".join(
        name
        for name in (f"q{inside}" * (fill != "none"), f"k{outside}" * (stroke != "none"))
        if name
    )
    out = f'<path class="{names}" fill="{colour if fill != "none" else "none"}"'
    if stroke != "none":
        out += f' stroke="{line}" stroke-width="{float(width):.1f}" stroke-linecap="round"'
    return f'{out} d="{data}"/>'


def _colour(text: str) -> tuple[str, str]:
    return _COLOURS.get(text.upper()[:7], ("x", _INK))


def _arrow(x: float, y: float) -> str:
    """Return the open double arrow of retrosynthesis, 48 pixels long."""
    data = (
        f"M{x:.1f} {y - 3.5:.1f}H{x + 41:.1f}M{x:.1f} {y + 3.5:.1f}H{x + 41:.1f}"
        f"M{x + 36:.1f} {y - 9:.1f}L{x + 47:.1f} {y:.1f}L{x + 36:.1f} {y + 9:.1f}"
    )
    return (
        f'<path class="kx" fill="none" stroke="{_INK}" stroke-width="1.6" '
        f'stroke-linecap="round" d="{data}"/>'
    )


def _plus(x: float, y: float) -> str:
    return (
        f'<path class="kx" fill="none" stroke="{_INK}" stroke-width="1.6" stroke-linecap="round" '
        f'd="M{x - 5:.1f} {y:.1f}H{x + 5:.1f}M{x:.1f} {y - 5:.1f}V{y + 5:.1f}"/>'
    )


def _document(width: float, height: float, inner: str, kind: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{kind}" '
        f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}">{inner}</svg>'
    )


def warm_up() -> None:
    """Draw one of each, so that fonts and templates are in memory."""
    one = Chem.MolFromSmiles("C[C@H](N)C(=O)Oc1ccc(Br)cc1[N+](=O)[O-]")
    two = Chem.MolFromSmiles("O=C1CCCCCCCCCCC1.[CH3]")
    draw_molecule(one)
    draw_scheme(one, [two, one])
    draw_pocket("MK", ["1", "2"], [0])
    draw_track({"sequence": "MK", "labels": ["A:1", "A:2"], "votes": [1, 0], "copies": 1})
