"""Laws of the hazard screen: no way of writing a listed chemical hides it; more is never less."""

import random
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdkit import Chem

from airgap.science import molecules, screens

VECTORS = Path(__file__).parents[1] / "vectors"
POSITIVE = {
    **tomllib.loads((VECTORS / "cwc_positive.toml").read_text()),
    **tomllib.loads((VECTORS / "ag_positive.toml").read_text()),
}
NEGATIVE = tomllib.loads((VECTORS / "cwc_negative.toml").read_text())
SCREENER = screens.Screener(*screens.load_packs())
HARMLESS = sorted(NEGATIVE.values())
IONS = ("[Na+]", "[Cl-]", "[K+]", "O", "CCO", "OS(=O)(=O)O", "[Ca+2]", "[NH4+]")


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    molecules.capture_log()


def labelled(molecule, chance):
    copy = Chem.Mol(molecule)
    for atom in copy.GetAtoms():
        if chance.random() < 0.4:
            atom.SetIsotope(atom.GetAtomicNum() * 2 + chance.randrange(3))
    return copy


def mapped(molecule, chance):
    copy = Chem.Mol(molecule)
    for atom in copy.GetAtoms():
        atom.SetAtomMapNum(chance.randrange(1, 900))
    return copy


def hydrogens(molecule, _chance):
    return Chem.AddHs(molecule)


def mixed(molecule, chance):
    return Chem.CombineMols(molecule, Chem.MolFromSmiles(chance.choice(HARMLESS)))


def salted(molecule, chance):
    return Chem.CombineMols(molecule, Chem.MolFromSmiles(chance.choice(IONS)))


def reordered(molecule, chance):
    order = list(range(molecule.GetNumAtoms()))
    chance.shuffle(order)
    return Chem.RenumberAtoms(molecule, order)


def kekulised(molecule, _chance):
    copy = Chem.Mol(molecule)
    Chem.Kekulize(copy, clearAromaticFlags=True)
    return copy


def rewritten(molecule, chance):
    text = Chem.MolToSmiles(
        molecule,
        canonical=False,
        doRandom=True,
        allHsExplicit=chance.random() < 0.5,
        allBondsExplicit=chance.random() < 0.5,
    )
    return molecules.parse_loosely(text)


STEPS = (labelled, mapped, hydrogens, mixed, salted, reordered, kekulised, rewritten)


@given(
    st.sampled_from(sorted(POSITIVE)),
    st.lists(st.sampled_from(STEPS), max_size=5),
    st.integers(0, 2**32),
)
def test_no_combination_of_written_forms_hides_a_listed_chemical(name, steps, seed):
    chance = random.Random(seed)
    molecule = Chem.MolFromSmiles(POSITIVE[name])
    for step in steps:
        before = molecule
        molecule = step(molecule, chance)
        if molecule is None or not screens.can_screen(molecule):
            molecule = before
        if step in {mixed, salted}:
            Chem.SanitizeMol(molecule)
        if step is rewritten and Chem.DetectChemistryProblems(molecule):
            molecule = before
        elif step is rewritten:
            Chem.SanitizeMol(molecule)
    result = SCREENER.screen([molecule])
    assert result.status == "complete"
    assert any(found.startswith(name[:4]) for found in result.classes), Chem.MolToSmiles(molecule)


@given(
    st.lists(st.sampled_from([*POSITIVE.values(), *HARMLESS]), max_size=4),
    st.sampled_from([*POSITIVE.values(), *HARMLESS]),
    st.booleans(),
)
def test_another_molecule_never_lowers_the_tier(texts, more, target):
    some = [Chem.MolFromSmiles(text) for text in texts]
    few = SCREENER.screen(some, target=target)
    many = SCREENER.screen([*some, Chem.MolFromSmiles(more)], target=target)
    assert many.tier >= few.tier
    assert set(many.classes) >= set(few.classes)


@given(st.lists(st.sampled_from([*POSITIVE.values(), *HARMLESS]), min_size=1, max_size=3))
def test_a_target_is_judged_no_milder_than_a_molecule(texts):
    found = [Chem.MolFromSmiles(text) for text in texts]
    assert SCREENER.screen(found, target=True).tier >= SCREENER.screen(found).tier
    assert SCREENER.screen(found, route=True).tier == SCREENER.screen(found).tier


@given(st.text(alphabet="CNOPSFcn()[]=#+-123456789.@/\\HlBrAs", max_size=60))
def test_any_text_is_a_molecule_that_is_judged_or_none(text):
    read = molecules.parse_loosely(text)
    if read is not None:
        assert SCREENER.screen([read]).status in {"complete", "incomplete"}
