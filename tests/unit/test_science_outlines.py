"""Drawings of a host without RDKit's drawing module are shapes that a page accepts."""

import re

import pytest
from rdkit import Chem

from airgap.science import drawing, outlines
from airgap.science.svg import clean_svg

MOLECULES = {
    "aromatic": "CC(=O)Nc1ccc(O)cc1",
    "wedge and dash": "C[C@H](N)C(=O)O",
    "triple bond": "N#Cc1ccccc1",
    "ions and isotopes": "[2H]C([N+](C)(C)C)C(=O)[O-].[Cl-]",
    "one atom": "C",
    "radical": "[CH3]",
    "no bond but atoms": "O.[Na+]",
}


def drawn(smiles, width=264, height=190):
    molecule = outlines.prepared(Chem.MolFromSmiles(smiles))
    from rdkit.Chem import rdDepictor

    rdDepictor.Compute2DCoords(molecule)
    Chem.WedgeMolBonds(molecule, molecule.GetConformer())
    return molecule, outlines.shapes(molecule, width, height, drawing.BOND)


@pytest.mark.parametrize("smiles", MOLECULES.values(), ids=MOLECULES.keys())
@pytest.mark.parametrize("size", [(264, 190), (-1, -1), (40, 40)])
def test_every_shape_is_one_that_a_page_takes(smiles, size):
    _, (width, height, inner) = drawn(smiles, *size)
    assert width > 0 < height
    text = drawing._document(width, height, inner, "molecule")
    assert clean_svg(text).count("<text") == text.count("<text")
    numbers = [float(n) for n in re.findall(r"[ML](-?\d+\.\d) ", inner)]
    assert all(-1 <= number <= width + 1 for number in numbers)


def test_bonds_and_letters_are_those_of_the_molecule():
    molecule, (_, _, inner) = drawn("N#CC=CO")
    assert molecule.GetNumBonds() == 4
    assert inner.count("M") == 3 + 1 + 2 + 1  # triple, single, double, single
    assert re.findall(r">([^<]+)</text>", inner) == ["N", "OH"]


def test_wedges_are_drawn_from_their_atom():
    _, (_, _, inner) = drawn("C[C@H](N)C(=O)O")
    _, (_, _, flat) = drawn("CC(N)C(=O)O")
    assert inner.count("M") > flat.count("M")
