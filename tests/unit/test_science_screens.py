"""The hazard screen: what the Annex defines is found in every written form, medicines are not."""

import re
import tomllib
from pathlib import Path

import pytest
from rdkit import Chem
from rdkit.Chem.EnumerateStereoisomers import EnumerateStereoisomers, StereoEnumerationOptions
from rdkit.Chem.MolStandardize import rdMolStandardize

from airgap.science import molecules, screens
from airgap.science.screens import Group, Screener, ScreenResult

VECTORS = Path(__file__).parents[1] / "vectors"
POSITIVE = tomllib.loads((VECTORS / "cwc_positive.toml").read_text())
PRECURSORS = tomllib.loads((VECTORS / "ag_positive.toml").read_text())
NEGATIVE = tomllib.loads((VECTORS / "cwc_negative.toml").read_text())
PACKS = {pack.name: pack for pack in screens.load_packs()}
PACK = PACKS["cwc"]
SCREENER = Screener(*PACKS.values())
FAMILIES = {family.paragraph: family for family in PACK.families}
LISTED = {}
for entry in PACK.listed:
    LISTED.setdefault(entry.paragraph, set()).add(entry.block)

ALKYL = {
    "H": None,
    "methyl": "C",
    "ethyl": "CC",
    "n-propyl": "CCC",
    "isopropyl": "C(C)C",
    "n-butyl": "CCCC",
    "pinacolyl": "C(C)C(C)(C)C",
    "cyclohexyl": "C1CCCCC1",
    "cyclopropyl": "C1CC1",
    "n-decyl": "C" * 10,
    "n-undecyl": "C" * 11,
    "phenyl": "c1ccccc1",
    "vinyl": "C=C",
}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    molecules.capture_log()


def core_of(paragraph: str, number: int = 0) -> Chem.RWMol:
    """Turn a core of the pack into atoms and bonds."""
    query = FAMILIES[paragraph].cores[number]
    edit = Chem.RWMol()
    for atom in query.GetAtoms():
        number = atom.GetAtomicNum()
        if not number:
            symbol = re.search(r"[A-Z][a-z]?", atom.GetSmarts().replace("X", ""))[0]
            number = Chem.GetPeriodicTable().GetAtomicNumber(symbol)
        added = edit.GetAtomWithIdx(edit.AddAtom(Chem.Atom(number)))
        added.SetIsAromatic(atom.GetIsAromatic())
        added.SetFormalCharge(int("&+" in atom.GetSmarts()))
    for bond in query.GetBonds():
        edit.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), bond.GetBondType())
    return edit


def grow(paragraph: str, groups: dict[int, list[str]], core: int = 0) -> Chem.Mol:
    """Build a member of a family: its core from the pack, with these groups on numbered atoms."""
    edit = core_of(paragraph, core)
    for atom in FAMILIES[paragraph].cores[core].GetAtoms():
        for name in groups.get(atom.GetAtomMapNum() or -1, []):
            if ALKYL[name] is not None:
                start = edit.GetNumAtoms()
                edit = Chem.RWMol(Chem.CombineMols(edit, Chem.MolFromSmiles(ALKYL[name])))
                edit.AddBond(atom.GetIdx(), start, Chem.BondType.SINGLE)
    for atom in edit.GetAtoms():
        if atom.GetAtomicNum() == 7 and atom.GetDegree() == 4:
            atom.SetFormalCharge(1)
    Chem.SanitizeMol(edit)
    return edit.GetMol()


# Families whose Annex example is grown here; its key must be the one that the pack lists by name.
EXAMPLES = {
    "1a01 sarin": ("1a01", {1: ["methyl"], 2: ["isopropyl"]}),
    "1a01 soman": ("1a01", {1: ["methyl"], 2: ["pinacolyl"]}),
    "1a02 tabun": ("1a02", {1: ["methyl", "methyl"], 2: ["ethyl"]}),
    "1a03 VX": ("1a03", {1: ["methyl"], 2: ["ethyl"], 3: ["isopropyl", "isopropyl"]}),
    "1b09 DF": ("1b09", {1: ["methyl"]}),
    "1b10 QL": ("1b10", {1: ["methyl"], 2: ["ethyl"], 3: ["isopropyl", "isopropyl"]}),
    "2a01 amiton": ("2a01", {}),
}


@pytest.mark.parametrize(("paragraph", "groups"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_example_that_the_annex_names_belongs_to_its_family_and_is_listed(paragraph, groups):
    made = grow(paragraph, groups)
    found = SCREENER.find_classes(made)
    assert found[paragraph] == ("H2" if paragraph.startswith("2") else "H3")
    assert screens.first_block(made) in LISTED[paragraph]
    assert f"{paragraph}.listed" in found


MEMBERS = {
    "1a01": [{1: ["n-propyl"], 2: ["n-decyl"]}, {1: ["ethyl"], 2: ["cyclohexyl"]}],
    "1a02": [{1: ["ethyl", "isopropyl"], 2: ["cyclohexyl"]}],
    "1a03": [
        {1: ["ethyl"], 2: ["H"], 3: ["methyl", "ethyl"]},
        {1: ["ethyl"], 2: ["n-decyl"], 3: ["methyl", "ethyl", "methyl"]},
    ],
    "1a13": [
        {1: ["n-decyl"], 2: ["n-decyl"], 3: ["n-decyl", "n-decyl"]},
        {1: ["methyl"], 2: ["H"], 3: ["ethyl", "ethyl"]},
    ],
    "1a14": [{1: ["methyl"], 2: ["methyl"], 3: ["ethyl", "ethyl"]}],
    "1b09": [{1: ["isopropyl"]}],
    "1b10": [{1: ["ethyl"], 2: ["cyclohexyl"], 3: ["methyl", "methyl"]}],
    "2a01": [{1: ["methyl"]}],
    "2b05": [{1: ["methyl", "isopropyl"]}],
    "2b06": [{1: ["methyl"], 2: ["isopropyl"], 3: ["ethyl", "n-propyl"]}],
    "2b10": [{1: ["isopropyl", "isopropyl"]}],
    "2b11": [{1: ["isopropyl", "ethyl"]}],
    "2b12": [{1: ["methyl", "methyl"]}],
}
OUTSIDE = {
    "1a01 O-alkyl above C10": ("1a01", {1: ["methyl"], 2: ["n-undecyl"]}),
    "1a01 P-butyl": ("1a01", {1: ["n-butyl"], 2: ["methyl"]}),
    "1a01 P-cyclopropyl": ("1a01", {1: ["cyclopropyl"], 2: ["methyl"]}),
    "1a01 O-phenyl": ("1a01", {1: ["methyl"], 2: ["phenyl"]}),
    "1a01 no ester": ("1a01", {1: ["methyl"]}),
    "1a02 N-butyl": ("1a02", {1: ["methyl", "n-butyl"], 2: ["ethyl"]}),
    "1a13 alkylidene above C10": (
        "1a13",
        {1: ["methyl"], 2: ["n-undecyl"], 3: ["methyl", "methyl"]},
    ),
    "1b09 P-butyl": ("1b09", {1: ["n-butyl"]}),
    "2b06 O-butyl": ("2b06", {1: ["n-butyl"], 2: ["ethyl"], 3: ["ethyl", "ethyl"]}),
    "2b10 N-butyl": ("2b10", {1: ["n-butyl", "n-butyl"]}),
    "2b11 primary": ("2b11", {1: []}),
    "2b11 three groups": ("2b11", {1: ["methyl", "n-butyl"]}),
    "2b12 vinyl": ("2b12", {1: ["vinyl", "methyl"]}),
}


@pytest.mark.parametrize("paragraph", MEMBERS)
def test_members_of_a_family_are_found_within_the_carbon_counts(paragraph):
    for core in range(len(FAMILIES[paragraph].cores)):
        for groups in MEMBERS[paragraph]:
            if core and paragraph in {"1a13", "1a14"}:
                continue  # the second core is the alkylated salt, written with a charge
            assert paragraph in SCREENER.find_classes(grow(paragraph, groups, core))


@pytest.mark.parametrize(("paragraph", "groups"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_what_the_paragraph_does_not_cover_is_not_of_its_family(paragraph, groups):
    assert MEMBERS[paragraph]
    assert paragraph not in SCREENER.find_classes(grow(paragraph, groups))


def test_every_family_has_a_member_in_these_tests():
    covered = {*MEMBERS, "1a16", "2b04"}
    assert covered == set(FAMILIES)


def forms(molecule: Chem.Mol) -> dict[str, Chem.Mol]:
    """Write one molecule in every form that could hide it."""
    smiles = Chem.MolToSmiles(molecule)
    carbon = Chem.Mol(molecule)
    for atom in carbon.GetAtoms():
        if atom.GetAtomicNum() == 6:
            atom.SetIsotope(13)
    heavy = Chem.AddHs(molecule)
    for atom in heavy.GetAtoms():
        if atom.GetAtomicNum() == 1:
            atom.SetIsotope(2)
    mapped = Chem.Mol(molecule)
    for atom in mapped.GetAtoms():
        atom.SetAtomMapNum(atom.GetIdx() + 1)
    found = written(molecule) | {
        "plain": molecule,
        "carbon-13": carbon,
        "deuterium": heavy,
        "hydrogens written": Chem.AddHs(molecule),
        "atom maps": mapped,
        "mixture": Chem.MolFromSmiles(f"{smiles}.CCO.c1ccccc1"),
        "unsanitised": molecules.parse_loosely(smiles),
        "other order": molecules.parse_loosely(Chem.MolToSmiles(molecule, doRandom=True)),
    }
    for number, other in enumerate(rdMolStandardize.TautomerEnumerator().Enumerate(molecule)):
        found[f"tautomer {number}"] = other
    stereo = EnumerateStereoisomers(molecule, options=StereoEnumerationOptions(maxIsomers=4))
    for number, other in enumerate(stereo):
        found[f"stereoisomer {number}"] = other
    return found | charged(molecule)


def written(molecule: Chem.Mol) -> dict[str, Chem.Mol]:
    """Write one molecule as SMILES texts that differ, and read them as the product does."""
    kekule = Chem.Mol(molecule)
    Chem.Kekulize(kekule, clearAromaticFlags=True)
    texts = {
        "kekulised": Chem.MolToSmiles(kekule, kekuleSmiles=True),
        "hydrogens in brackets": Chem.MolToSmiles(molecule, allHsExplicit=True),
        "hydrogens as atoms": Chem.MolToSmiles(Chem.AddHs(molecule)),
        "bonds explicit": Chem.MolToSmiles(molecule, allBondsExplicit=True),
    }
    atoms = range(molecule.GetNumAtoms())
    for number, root in enumerate(atoms[:: max(1, len(atoms) // 3)]):
        rooted = Chem.MolToSmiles(molecule, rootedAtAtom=root, canonical=False)
        texts[f"reordered {number}"] = rooted
        texts[f"ring digits {number}"] = re.sub(
            r"\[[^]]*\]|[1-9]", lambda at: at[0] if "[" in at[0] else f"%4{at[0]}", rooted
        )
    found = {}
    for name, text in texts.items():
        read = molecules.find_molecule(text)
        assert isinstance(read, Chem.Mol), (name, text)
        found[name], found[f"{name}, loosely"] = read, molecules.parse_loosely(text)
    return found


def charged(molecule: Chem.Mol) -> dict[str, Chem.Mol]:
    """Write salts and charge-separated forms, where the molecule has the atoms for them."""
    found: dict[str, Chem.Mol] = {}
    amine = Chem.MolFromSmarts("[NX3;+0;!$(N-[!#6]);!$(N-[#6]=[!#6])]")
    for (at,) in molecule.GetSubstructMatches(amine)[:1]:
        edit = Chem.RWMol(molecule)
        atom = edit.GetAtomWithIdx(at)
        atom.SetFormalCharge(1)
        atom.SetNumExplicitHs(atom.GetTotalNumHs() + 1)
        Chem.SanitizeMol(edit)
        found["hydrochloride"] = Chem.MolFromSmiles(Chem.MolToSmiles(edit) + ".[Cl-]")
    for (at,) in molecule.GetSubstructMatches(Chem.MolFromSmarts("[OX2H]"))[:1]:
        edit = Chem.RWMol(molecule)
        edit.GetAtomWithIdx(at).SetFormalCharge(-1)
        Chem.SanitizeMol(edit)
        found["sodium salt"] = Chem.MolFromSmiles(Chem.MolToSmiles(edit) + ".[Na+]")
        edit.GetAtomWithIdx(at).SetFormalCharge(0)
        sodium = edit.AddAtom(Chem.Atom(11))
        edit.AddBond(at, sodium, Chem.BondType.SINGLE)
        Chem.SanitizeMol(edit)
        found["sodium bonded"] = edit.GetMol()
    edit = Chem.RWMol(molecule)
    split = False
    for bond in edit.GetBonds():
        ends = sorted((bond.GetBeginAtom(), bond.GetEndAtom()), key=lambda a: -a.GetAtomicNum())
        if bond.GetBondType() == Chem.BondType.DOUBLE and ends[0].GetAtomicNum() in {15, 16}:
            bond.SetBondType(Chem.BondType.SINGLE)
            ends[0].SetFormalCharge(ends[0].GetFormalCharge() + 1)
            ends[1].SetFormalCharge(ends[1].GetFormalCharge() - 1)
            split = True
    if split:
        Chem.SanitizeMol(edit)
        found["charges apart"] = edit.GetMol()
    return found


@pytest.mark.parametrize("name", POSITIVE)
def test_positive_control_is_found_in_every_written_form(name):
    molecule = Chem.MolFromSmiles(POSITIVE[name])
    wanted = "H4" if name.startswith("1") else "H2"
    for form, written in forms(molecule).items():
        result = SCREENER.screen([written])
        assert (result.status, result.tier) == ("complete", wanted), form
        assert any(found.startswith(name[:4]) for found in result.classes), form


@pytest.mark.parametrize("name", PRECURSORS)
def test_precursor_is_found_in_every_written_form(name):
    molecule = Chem.MolFromSmiles(PRECURSORS[name])
    for form, written in forms(molecule).items():
        result = SCREENER.screen([written])
        assert (result.status, result.tier) == ("complete", "H2"), form
        assert any(found.startswith(name[:4]) for found in result.classes), form


@pytest.mark.parametrize("name", EXAMPLES)
def test_grown_example_is_found_in_every_written_form(name):
    paragraph, groups = EXAMPLES[name]
    for form, written in forms(grow(paragraph, groups)).items():
        result = SCREENER.screen([written])
        assert result.status == "complete", form
        assert result.tier >= ("H2" if paragraph.startswith("2") else "H3"), form


@pytest.mark.parametrize("name", NEGATIVE)
def test_negative_control_stays_at_or_below_h1(name):
    molecule = Chem.MolFromSmiles(NEGATIVE[name])
    for form, written in {"plain": molecule, **charged(molecule)}.items():
        result = SCREENER.screen([written])
        assert (result.status, result.tier <= "H1") == ("complete", True), (form, result.classes)
        assert all(found.startswith(screens.NEAR) for found in result.classes)


def test_second_quaternary_nitrogen_decides_the_carbamates():
    # The core of 1a16 from the pack, filled with methyl; nothing of the Annex's own chains.
    edit = core_of("1a16")
    charged_atoms = [atom.GetIdx() for atom in edit.GetAtoms() if atom.GetFormalCharge() > 0]
    for at in charged_atoms:
        for _ in range(3 - edit.GetAtomWithIdx(at).GetDegree()):
            edit.AddBond(at, edit.AddAtom(Chem.Atom(6)), Chem.BondType.SINGLE)
    bridge = edit.AddAtom(Chem.Atom(6))
    half = Chem.RWMol(edit)
    for at in charged_atoms:
        edit.AddBond(at, bridge, Chem.BondType.SINGLE)
    Chem.SanitizeMol(edit)
    assert "1a16" in SCREENER.find_classes(edit.GetMol())
    half.AddBond(charged_atoms[0], bridge, Chem.BondType.SINGLE)
    half.GetAtomWithIdx(charged_atoms[1]).SetFormalCharge(0)
    Chem.SanitizeMol(half)
    assert "1a16" not in SCREENER.find_classes(half.GetMol())
    assert "1a16" not in SCREENER.find_classes(Chem.MolFromSmiles(NEGATIVE["pyridostigmine"]))


def test_resemblance_to_schedule_1_is_noted_and_no_more():
    medicine = Chem.MolFromSmiles(NEGATIVE["isoflurophate"])
    assert SCREENER.screen([medicine]).classes == ("near.1a01",)
    assert SCREENER.screen([medicine]).tier == "H1"
    assert SCREENER.screen([medicine], target=True).tier == "H1"
    beyond = grow(*OUTSIDE["1a01 O-alkyl above C10"])
    assert SCREENER.find_classes(beyond)["near.1a01"] == "H1"
    assert "near.1a01" not in SCREENER.find_classes(grow(*EXAMPLES["1a01 sarin"]))
    choline = Chem.MolFromSmiles(NEGATIVE["diphenhydramine"])  # the core of 2b11 alone is no alert
    assert SCREENER.find_classes(choline) == {}


def test_steps_of_a_route_count_as_targets_where_the_treaty_names_them():
    bulk = [Chem.MolFromSmiles(PRECURSORS["ag16 dimethylamine"])]
    treaty = [Chem.MolFromSmiles(POSITIVE["3b14 thionyl chloride"])]
    found = SCREENER.screen(bulk, route=True)
    assert (found.tier, found.target_tier) == ("H2", "H0")
    assert SCREENER.screen(treaty, route=True).target_tier == "H2"
    assert SCREENER.screen(bulk + treaty, route=True).target_tier == "H2"
    assert SCREENER.screen(bulk).target_tier is None
    asked = SCREENER.screen(bulk, target=True)
    assert (asked.tier, asked.target_tier) == ("H3", "H2")


ODD = {
    "ion pair of phosphorus": ("O=[P+](Cl)Cl.[Cl-]", "3b05"),
    "ion pair beside a decoy": ("O=[P+](Cl)Cl.[Cl-].[Na+].[Br-].[K+].[I-]", "3b05"),
    "ion pair of carbon": ("Cl[C+]=O.[Cl-]", "3a01"),
    "ion pair of sulfur": ("O=[S+]Cl.[Cl-]", "3b14"),
    "alkoxide apart": ("CO[P+]OC.C[O-]", "3b08"),
    "hydrogen left out": ("CO[P](=O)OC", "3b10"),
    "five charges": ("Cl[P+](Cl)(Cl)[O-]", "3b05"),
    "N-oxide form of the nitro group": ("O=N(=O)C(Cl)(Cl)Cl", "3a04"),
    "alcoholate of a metal": ("[O-]CCSCC[O-].[Mg+2]", "2b13"),
    "protonated sulfur": ("OCC[SH+]CCO.[Cl-]", "2b13"),
    "dative bond": ("ClP(Cl)(Cl)->O", "3b05"),
    "bound to a metal": ("COP(OC)OC->[Cu]Cl", "3b08"),
}


@pytest.mark.parametrize(("text", "paragraph"), ODD.values(), ids=ODD.keys())
def test_odd_writings_hide_nothing(text, paragraph):
    found = SCREENER.screen([molecules.parse_loosely(text)])
    assert f"{paragraph}.listed" in found.classes


SALTS = ("C[P+](C)(C)C.[Cl-]", "C[S+](C)C.[I-]", "C[N+](C)(C)C.[Cl-]", "CC[n+]1ccccc1.[Br-]")


@pytest.mark.parametrize("text", SALTS)
def test_real_salts_stay_salts(text):
    molecule = Chem.MolFromSmiles(text)
    assert screens._rejoined(molecule) == []
    assert SCREENER.screen([molecule]).tier == "H0"


def test_list_of_the_australia_group_is_held_whole():
    pack = PACKS["ag"]
    own = {int(entry.paragraph[2:]) for entry in pack.listed} | {20, 24, 41, 42, 43, 44}
    text = (screens.PACK_FOLDER / "ag.toml").read_text().replace("\n# ", " ")
    sentence = re.search(r"paragraphs of cwc.toml: (.*?)\. +Fluoride", text, re.DOTALL)[1]
    elsewhere: set[int] = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", sentence):
        elsewhere |= set(range(int(first), int(last or first) + 1))
    assert own | elsewhere == set(range(1, 90))
    assert not own & elsewhere
    assert {entry.tier for entry in pack.listed} == {"H2"}
    assert len({entry.block for entry in pack.listed}) == len(pack.listed)


SITE_PACK = b"""
schema = "airgap/screen/1"
name = "lab"
version = 3
source = "List of the lab"
source_date = 2026-01-02
author = "ivy"
reviewer = "max"
reviewed_on = 2026-02-03

[[listed]]
paragraph = "dea_listed:1"
name = "Acetone, for a test"
tier = "H2"
block = "CSCPPACGZOOCGX"
atoms = "C3 O1"
"""


def test_pack_of_a_site_adds_to_those_that_are_shipped(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_bytes(SITE_PACK)
    own = Screener(*screens.load_packs([path]))
    acetone = [Chem.MolFromSmiles("CC(C)=O")]
    assert SCREENER.screen(acetone).tier == "H0"
    assert own.screen(acetone).classes == ("dea_listed:1.listed",)
    assert own.screen([Chem.MolFromSmiles("CCNCC")]).tier == "H2"
    assert "lab/3" in own.mode
    assert own.digest not in {SCREENER.digest, own.packs[-1].digest}
    assert own.packs[-1].reviewed_on.isoformat() == "2026-02-03"
    path.write_bytes(SITE_PACK.replace(b'"lab"', b'"cwc"'))
    with pytest.raises(ValueError, match="one name"):
        screens.load_packs([path])
    with pytest.raises(ValueError, match="more than"):
        screens.load_packs([path] * 20)
    with pytest.raises(ValueError, match="no screen pack"):
        Screener()


def test_route_to_anything_from_h2_up_holds():
    thiodiglycol = [Chem.MolFromSmiles(POSITIVE["2b13 thiodiglycol"])]
    assert SCREENER.screen(thiodiglycol).tier == "H2"
    assert SCREENER.screen(thiodiglycol, target=True).tier == "H3"
    harmless = [Chem.MolFromSmiles("CCO")]
    assert SCREENER.screen(harmless, target=True).tier == "H0"


def test_failure_is_incomplete_and_still_reports_what_was_found():
    huge = Chem.MolFromSmiles("C" * 1_200)
    found = Chem.MolFromSmiles(POSITIVE["2b13 thiodiglycol"])
    result = SCREENER.screen([found, huge])
    assert (result.status, result.tier, result.classes) == (
        *("incomplete", "H2"),
        ("2b13.listed",),
    )
    assert result.reason
    many = Chem.MolFromSmiles(".".join(["C"] * 100))
    assert SCREENER.screen([many]).status == "incomplete"


def test_time_out_is_incomplete():
    result = Screener(PACK, seconds=-1.0).screen([Chem.MolFromSmiles("CCO")])
    assert (result.status, result.reason) == ("incomplete", "time")


def test_results_without_structures_say_why():
    assert SCREENER.nothing("no input").status == "complete"
    assert "no input" in SCREENER.nothing("no input").mode
    assert SCREENER.incomplete("crash") == ScreenResult(
        "incomplete", "H0", SCREENER.digest, SCREENER.mode, (), "crash"
    )


def test_groups_fill_in_any_order_and_may_be_absent_from_zero():
    small, any_size = Group(1, 3, rings=False), Group(0, 10, rings=True)
    assert screens._fit([(10, True), (1, False)], [small, any_size])
    assert screens._fit([(2, False)], [small, any_size])
    assert not screens._fit([(10, True)], [small])
    assert not screens._fit([], [small])
    assert not screens._fit([(1, False), (1, False)], [small])


GOOD = (screens.PACK_FOLDER / "cwc.toml").read_bytes()
BAD_PACKS = {
    "not text": b"\xff\xfe",
    "not TOML": b"= =",
    "other schema": GOOD.replace(b"airgap/screen/1", b"airgap/screen/9"),
    "empty": b'schema = "airgap/screen/1"\nname = "x"\nversion = 1\nlisted = []\nfamily = []\n',
    "no list": b'schema = "airgap/screen/1"\nname = "x"\nversion = 1\n',
    "two packs in one": GOOD.replace(b'author = "', b'potency = "high"\nauthor = "', 1),
    "no reviewer": re.sub(rb"(?m)^reviewer = .*$", b"", GOOD),
    "no day": GOOD.replace(b"source_date = 2020-06-07", b'source_date = "lately"'),
    "name with a space": GOOD.replace(b'name = "cwc"', b'name = "c w"', 1),
    "strange paragraph": GOOD.replace(b'"1a01"', b'"9z01"', 1),
    "a block that is none": GOOD.replace(b'block = "DYAHQFWOVKZOOW"', b'block = "dyah"', 1),
    "atoms in another form": GOOD.replace(b'atoms = "C4 F1 O2 P1"', b'atoms = "C4F1O2P1"', 1),
    "a group backwards": GOOD.replace(b'1 = ["1-3"]', b'1 = ["3-1"]', 1),
    "a group that is empty": GOOD.replace(b'1 = ["1-3"]', b"1 = []", 1),
    "a group that is a number": GOOD.replace(b'1 = ["1-3"]', b"1 = 3", 1),
    "groups in a list": GOOD.replace(b"whole = true", b"whole = true\ngroups = [1]", 1),
    "groups that are a number": GOOD.replace(b"whole = true", b"whole = true\ngroups = 3", 1),
    "a group on no atom": GOOD.replace(b'1 = ["1-3"]', '"\u00b2" = ["1-3"]'.encode(), 1),
    "an exemption of numbers": GOOD.replace(b"whole = true", b"whole = true\nexempt = 3", 1),
    "a core without a pattern": re.sub(rb"(?m)^cores = .*$", b'cores = [""]', GOOD, count=1),
    "a name that is a number": GOOD.replace(b'name = "Saxitoxin"', b"name = 3", 1),
    "a group in another form": GOOD.replace(b'1 = ["1-3"]', b'1 = ["1 to 3"]', 1),
    "an exemption that is none": GOOD.replace(b'"KVGLBTYUCJYMND"', b'"KVGL"', 1),
    "whole is a text": GOOD.replace(b"whole = true", b'whole = "yes"', 1),
    "no cores": re.sub(rb"(?m)^cores = .*$", b"cores = []", GOOD, count=1),
    "version 0": GOOD.replace(b"version = 1", b"version = 0", 1),
    "no source": re.sub(rb"(?m)^source = .*$", b'source = " "', GOOD),
    "listed is no table": b"listed = [1]\n" + re.sub(rb"(?s)\[\[listed\]\].*", b"", GOOD),
    "a field missing": GOOD.replace(b'name = "Saxitoxin"\n', b"", 1),
    "wrong tier": GOOD.replace(b'tier = "H3"', b'tier = "H9"', 1),
    "not SMARTS": GOOD.replace(b'cores = ["[#15:1]', b'cores = ["[#15:1', 1),
    "unknown field": GOOD.replace(b"whole = true", b"whole = true\nroute = 1", 1),
    "unknown field of a name": GOOD.replace(b'atoms = "', b'potency = 1\natoms = "', 1),
    "too large": GOOD + b"#" * (1 << 20),
}


@pytest.mark.parametrize("raw", BAD_PACKS.values(), ids=BAD_PACKS.keys())
def test_bad_pack_is_refused(raw):
    assert screens.parse_pack(GOOD).digest == PACK.digest
    with pytest.raises(ValueError, match=r"pack|schema|tier|SMARTS|field|large"):
        screens.parse_pack(raw)


def test_pack_holds_every_paragraph_of_the_schedules_or_says_why_not():
    held = {entry.paragraph for entry in PACK.listed} | set(FAMILIES)
    schedule_1 = {f"1a{n:02}" for n in (*range(1, 9), *range(13, 17))}
    schedule_1 |= {f"1b{n:02}" for n in range(9, 13)}
    schedule_2 = {f"2a{n:02}" for n in range(1, 4)} | {f"2b{n:02}" for n in range(4, 15)}
    schedule_3 = {f"3a{n:02}" for n in range(1, 5)} | {f"3b{n:02}" for n in range(5, 18)}
    assert schedule_1 | schedule_2 | schedule_3 == held | {"1a08"}
    assert b"ricin (1a08), a protein" in GOOD
