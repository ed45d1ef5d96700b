"""Drawings without RDKit's drawing module, for hosts that lack the X11 libraries it is linked with.

A bare server has no libXrender, and the module cannot be loaded there. Layout, wedges and Kekulé
form are RDKit's all the same; here they become lines, wedges and letters. docs/design/science.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.sax.saxutils import escape

from rdkit import Chem

_LENGTH = 1.5  # of a bond in RDKit's coordinates
_INK = "#1b2430"
_INKS = {7: "#2b50d8", 8: "#cf222e", 9: "#0a7f6b", 15: "#b35900", 16: "#8f6500", 17: "#1a7f37"}
_FONT = 13
_GAP = 8.0  # pixels between an atom's letters and the end of a bond
_OFFSET = 3.2  # pixels between the lines of a double bond
_MARGIN = 14.0

Point = tuple[float, float]


def prepared(molecule: Chem.Mol) -> Chem.Mol:
    """Return a copy with alternating bonds, or as it is where RDKit finds none."""
    copy = Chem.Mol(molecule)
    Chem.KekulizeIfPossible(copy, clearAromaticFlags=True)
    return copy


def shapes(molecule: Chem.Mol, width: int, height: int, bond: float) -> tuple[float, float, str]:
    """Return width, height and the shapes of a molecule that has coordinates.

    Args:
        molecule: With a conformer and wedges.
        width: In pixels; -1 lets the size follow the bonds.
        height: In pixels, or -1.
        bond: Length of a bond in pixels, at most.

    """
    conformer = molecule.GetConformer()
    spots = [conformer.GetAtomPosition(at) for at in range(molecule.GetNumAtoms())]
    xs, ys = [spot.x for spot in spots], [-spot.y for spot in spots]
    wide, tall = max(xs) - min(xs), max(ys) - min(ys)
    scale = bond / _LENGTH
    if width > 0:
        scale = min(
            scale,
            (width - 2 * _MARGIN) / max(wide, 0.01),
            (height - 2 * _MARGIN) / max(tall, 0.01),
        )
    room = (wide * scale + 2 * _MARGIN, tall * scale + 2 * _MARGIN)
    size = (float(width), float(height)) if width > 0 else room
    left, top = ((size[n] - (wide, tall)[n] * scale) / 2 for n in (0, 1))
    places = [
        (left + (x - min(xs)) * scale, top + (y - min(ys)) * scale)
        for x, y in zip(xs, ys, strict=True)
    ]
    labels = [_label(atom) for atom in molecule.GetAtoms()]
    lines = "".join(part for each in molecule.GetBonds() for part in _bond(each, places, labels))
    drawn = f'<path class="kx" fill="none" stroke="{_INK}" stroke-width="1.6" d="{lines}"/>'
    texts = "".join(
        f'<text class="t" x="{x:.1f}" y="{y + _FONT / 3:.1f}" text-anchor="middle" '
        f'font-size="{_FONT}" font-family="sans-serif" fill="{_ink(atom)}">{escape(label)}</text>'
        for atom, label, (x, y) in zip(molecule.GetAtoms(), labels, places, strict=True)
        if label
    )
    return size[0], size[1], (drawn if lines else "") + texts


def _label(atom: Chem.Atom) -> str:
    """Return the letters of an atom; an ordinary carbon inside of a skeleton has none."""
    charge, radicals = atom.GetFormalCharge(), atom.GetNumRadicalElectrons()
    plain = atom.GetAtomicNum() == 6 and atom.GetDegree() > 0  # noqa: PLR2004 - carbon
    if plain and not charge and not radicals and not atom.GetIsotope():
        return ""
    hydrogens = atom.GetTotalNumHs()
    text = f"{atom.GetIsotope() or ''}{atom.GetSymbol()}"
    text += f"H{hydrogens if hydrogens > 1 else ''}" if hydrogens else ""
    if charge:
        text += f"{abs(charge) if abs(charge) > 1 else ''}{'+' if charge > 0 else '-'}"
    return text + "." * radicals


def _ink(atom: Chem.Atom) -> str:
    return _INKS.get(atom.GetAtomicNum(), _INK)


def _bond(bond: Chem.Bond, places: list[Point], labels: list[str]) -> Iterator[str]:
    """Yield the path of one bond: lines, or a wedge from its first atom."""
    first, second = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
    one, two = places[first], places[second]
    length = math.dist(one, two)
    if length < 1e-6:  # noqa: PLR2004 - atoms that lie on each other have no direction
        return
    along = ((two[0] - one[0]) / length, (two[1] - one[1]) / length)
    aside = (-along[1], along[0])
    start = _moved(one, along, _GAP if labels[first] else 0.0)
    end = _moved(two, along, -_GAP if labels[second] else 0.0)
    kind, wedge = bond.GetBondType(), bond.GetBondDir()
    if wedge == Chem.BondDir.BEGINWEDGE:
        left, right = _moved(end, aside, 3.2), _moved(end, aside, -3.2)
        for step in range(-3, 4):  # a filled wedge, as strokes from its point
            share = (step + 3) / 6
            tip = (
                left[0] + (right[0] - left[0]) * share,
                left[1] + (right[1] - left[1]) * share,
            )
            yield _line(start, tip)
    elif wedge == Chem.BondDir.BEGINDASH:
        for step in range(1, 6):
            spot = _moved(start, along, math.dist(start, end) * step / 5)
            yield _line(_moved(spot, aside, 0.65 * step), _moved(spot, aside, -0.65 * step))
    elif kind == Chem.BondType.DOUBLE:
        for offset in (_OFFSET / 2, -_OFFSET / 2):
            yield _line(_moved(start, aside, offset), _moved(end, aside, offset))
    elif kind == Chem.BondType.TRIPLE:
        for offset in (0.0, _OFFSET, -_OFFSET):
            yield _line(_moved(start, aside, offset), _moved(end, aside, offset))
    else:
        yield _line(start, end)


def _moved(point: Point, direction: Point, by: float) -> Point:
    return point[0] + direction[0] * by, point[1] + direction[1] * by


def _line(start: Point, end: Point) -> str:
    return f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"
