"""What a newcomer types: names, salts, DNA, raw prompts; and a report that can be repeated."""

import json

import pytest
from science_runs import (
    ASPIRIN,
    CONTEXT,
    HEADER,
    PDB,
    ask,
    assess,
    mol,
    prepare,
    program,
    run,
    sample,
)

from airgap.enclave.channel import ProgramError
from airgap.science import drawing, fields, molecules, raw, results, subjects, svg, tasks, views
from airgap.science.program import create


def refusal(task: str, **inputs) -> ProgramError:
    with pytest.raises(ProgramError) as refused:
        prepare(task, **inputs)
    return refused.value


# -- names and numbers ----------------------------------------------------------------------------

LOOKALIKES = {
    "a name": (
        *("ibuprofen", "aspirin", "Phenol", "acetic acid", "(S)-ibuprofen", "DMSO", "THF"),
        "2-(4-isobutylphenyl)propanoic acid",
    ),
    "a CAS number": ("50-78-2", "15687-27-1", " 50-78-2 ", "CAS 50-78-2"),
    "a formula": ("C9H8O4", "CH3COOH", "H2O"),
    "an InChI": ("InChI=1S/CH4/h1H4",),
    "an InChIKey": ("BSYNRYMUTXBXSQ-UHFFFAOYSA-N",),
}


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in LOOKALIKES.items() for text in texts]
)
def test_what_is_no_smiles_is_called_by_its_kind_and_not_looked_up(kind, text):
    error = refusal("retrosynthesis", smiles=text)
    assert error.code == "prompt.g07"
    assert f"this looks like {kind}, and nothing is looked up here" in error.hint
    assert "SMILES" in error.hint


@pytest.mark.parametrize(
    "text", ["CC(C", "C1CC", "CCX", "C[Xx]C", "c1cccc1", "Ccc", "Clc1ccccc1Brr", "", "x" * 4_000]
)
def test_broken_smiles_is_not_called_a_name(text):
    assert fields.lookalike(text) == ""
    assert "looks like" not in refusal("retrosynthesis", smiles=text).hint


def test_smiles_with_its_name_is_offered_without_it():
    assert refusal("retrosynthesis", smiles="CCO ethanol").hint.endswith("without the name, CCO")


def test_name_inside_a_raw_prompt_is_called_a_name_as_well():
    error = refusal("retrosynthesis", prompt=mol("ibuprofen") + "<ReverseReact>")
    assert error.code == "prompt.g07"
    assert "(byte 11)" in error.message
    assert "looks like a name" in error.hint


# -- salts ----------------------------------------------------------------------------------------

SALTS = {
    f"{ASPIRIN[:-1]}[O-].[Na+]": "CC(=O)Oc1ccccc1C(=O)O",
    "C[NH2+]CCc1ccccc1.[Cl-]": "CNCCc1ccccc1",
    "[NH3+]CC(=O)[O-].O": "NCC(=O)O",
    "O=C([O-])c1ccccc1[N+](=O)[O-].[K+]": "O=C(O)c1ccccc1[N+](=O)[O-]",
}


@pytest.mark.parametrize(("salt", "parent"), SALTS.items(), ids=SALTS)
def test_fix_offers_and_takes_the_neutral_parent_of_a_salt(salt, parent):
    assert parent in refusal("retrosynthesis", smiles=salt).hint
    reply = prepare("retrosynthesis", smiles=salt, fix=True)
    assert reply["subject"]["product"] == parent
    ion = salt.split(".", maxsplit=1)[0]
    assert any(f"neutral parent: {ion} became {parent}" in note for note in reply["notes"])


def test_fragment_that_no_proton_neutralises_keeps_its_charge_and_the_note_says_so():
    reply = prepare("retrosynthesis", smiles="C[N+](C)(C)CCO.[Cl-]", fix=True)
    assert reply["subject"]["product"] == "C[N+](C)(C)CCO"
    assert any("keeps its charge of +1" in note for note in reply["notes"])
    assert not any("neutral parent" in note for note in reply["notes"])


def test_an_ion_alone_is_no_salt_and_stays_as_it_is():
    notes: list[str] = []
    kept = molecules.read_product("CC(=O)[O-]", fix=True, notes=notes)
    assert (molecules.canonical(kept), notes) == ("CC(=O)[O-]", [])


# -- ranking --------------------------------------------------------------------------------------


def test_product_handed_back_ranks_after_every_answer_and_order_is_kept_on_both_sides():
    texts = [
        sample(0, mol("CCO"), -0.1),
        sample(1, mol("OCC"), -0.2),
        sample(2, mol("CCO") + mol("C"), -0.3),
        sample(3, mol("CC=O"), -9.0),
        sample(4, mol("CCBr") + mol("O"), -5.0),
        sample(5, mol("CCI"), -8.0),
        sample(6, mol("CCI"), -8.5),
    ]
    reply = assess("retrosynthesis", texts, {"smiles": "CCO"})
    rows = [(r["rank"], r["index"], r["votes"], r["handed_back"]) for r in reply["rows"]]
    assert rows == [
        (1, 5, 2, False),
        (2, 4, 1, False),
        (3, 3, 1, False),
        (4, 0, 2, True),
        (5, 2, 1, True),
    ]
    assert reply["summary"]["handed_back"] == 3


# -- DNA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "noted"),
    [
        ("ACGTACGTACGT", True),
        ("ACGUACGUACGU", True),
        ("ACGTACGTACG", False),
        ("ACGTACGTACGTM", False),
    ],
)
@pytest.mark.parametrize("task", ["binding-site", "pocket-ligand"])
def test_sequence_that_reads_like_dna_is_taken_as_residues_and_the_note_says_so(
    task, sequence, noted
):
    for inputs in ({"sequence": sequence}, {"fasta": f">a\n{sequence}\n"}):
        notes = prepare(task, **inputs)["notes"]
        assert any("reads like DNA" in note and "residues" in note for note in notes) == noted


# -- the report of a pocket -----------------------------------------------------------------------

LIGANDS = ["c1ccncc1<MoleculeE>"]


def report(task: str, texts: list, **inputs) -> str:
    prepared, assessed, drawings = run(task, texts, **inputs)
    return views.html(prepared, assessed, HEADER, drawings)


def test_report_of_a_pocket_lists_draws_and_can_be_repeated():
    page = report("pocket-ligand", LIGANDS, pdb=PDB, ligand="NDP")
    assert "Pocket: 2 of 3 residues" in page
    assert '<svg xmlns="http://www.w3.org/2000/svg" role="img" class="track"' in page
    assert "A:5 A: pocket" in page
    assert "A:8 G: not marked" in page
    assert "<code>AKG</code>" in page
    assert "A A:5, K A:6; pocket level 2" in page
    assert "positions in the sequence above: <code>1,2</code>" in page
    again = prepare("pocket-ligand", sequence="AKG", residues="1,2", level=2)
    assert again["prompt"] == prepare("pocket-ligand", pdb=PDB, ligand="NDP")["prompt"]


def test_report_without_a_pocket_or_without_drawings_still_states_the_sequence():
    assert "Protein, no residue marked" in report("pocket-ligand", LIGANDS, sequence="MKTA")
    assert "<code>MKTA</code>" in report("binding-site", ["MKTA<ProteinE>"], sequence="MKTA")
    prepared, assessed, _ = run("pocket-ligand", LIGANDS, sequence="MKTA", residues="2")
    page = views.html(prepared, assessed, HEADER, {})
    assert "<code>MKTA</code>" in page
    assert "K 2; pocket level 2" in page


def test_drawing_of_a_sequence_too_long_is_left_out():
    request = {"op": "draw", "task": "pocket-ligand", "rows": []}
    long = "M" * 5_000
    reply = json.loads(ask({**request, "inputs": {"sequence": long, "residues": "1-900"}}))
    assert reply["drawings"] == {}
    most = "M" * 900
    reply = json.loads(ask({**request, "inputs": {"sequence": most, "residues": "1-900"}}))
    assert svg.clean_svg(reply["drawings"]["subject"][0])
    assert drawing.draw_pocket("MK", ["1", "2"], [1]).count("pocket") == 2


def test_report_of_binding_sites_says_what_the_reference_model_was_taught():
    page = " ".join(report("binding-site", ["MKTA<ProteinE>"], sequence="MKTA").split())
    assert "mark a letter of a motif (N of N-X-S/T)" in page
    assert "It knows nothing about binding" in page
    context = {**CONTEXT, "reference_model": True}
    note = prepare("binding-site", context=context, sequence="MK")["notes"][-1]
    assert "knows nothing about binding" in note
    prepared, assessed, drawings = run("binding-site", ["MKTA<ProteinE>"], sequence="MKTA")
    other = views.Header(**{**_fields(HEADER), "reference_model": False})
    assert "motif" not in views.html(prepared, assessed, other, drawings)


def _fields(header: views.Header) -> dict:
    return {name: getattr(header, name) for name in header.__slots__}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"chain": "A"}, "chain belongs to a structure"),
        ({"ligand": "NDP"}, "ligand belongs to a structure"),
        ({"chain": "A", "ligand": "NDP"}, "chain and ligand belong to a structure"),
    ],
)
def test_verb_agrees_with_what_was_given(inputs, words):
    assert refusal("pocket-ligand", sequence="MK", **inputs).message == words


# -- raw prompts ----------------------------------------------------------------------------------

TYPED = {
    "retrosynthesis": {"smiles": "OCC"},
    "molecule": {},
    "material": {},
    "binding-site": {"sequence": "MKTA"},
    "pocket-ligand": {"sequence": "MKTA", "residues": "2,4"},
    "pocket-ligand bare": {"sequence": "MKTA"},
    "pocket-ligand level 3": {"sequence": "MKTA", "residues": "1,3", "level": 3},
}


@pytest.mark.parametrize("case", TYPED)
def test_raw_prompt_is_handled_like_the_typed_input_that_says_the_same(case):
    task, inputs = case.split()[0], TYPED[case]
    one = prepare(task, **inputs)
    deep = {"level": 3} if inputs.get("level") == 3 else {}
    two = prepare(task, prompt=one["prompt"] + "\n", **deep)
    assert two["notes"][0].startswith("raw prompt")
    assert {**one, "notes": []} == {**two, "notes": []}
    assert results.parse_prepared(json.dumps(two).encode()).prompt == one["prompt"]


def test_raw_prompt_is_screened_and_runs_to_the_report():
    held = prepare("retrosynthesis", prompt=mol("OCCSCCO") + "<ReverseReact>")
    assert held["input_screen"]["tier"] == "H3"
    page = report("retrosynthesis", [mol("CC=O")], prompt=mol("OCC") + "<ReverseReact>")
    assert "CC=O&gt;&gt;CCO" in page
    marked = "<ProteinS>M<PocketS>K<PocketE>TA<ProteinE><MoleculeS>"
    assert "Pocket: 1 of 4 residues" in report("pocket-ligand", LIGANDS, prompt=marked)


RAW_FAULTS = {
    "molecule not closed": ("retrosynthesis", "<MoleculeS>CCO<ReverseReact>", "prompt.g01", 14),
    "molecule, end of text": ("retrosynthesis", "<MoleculeS>CCO", "prompt.g01", 14),
    "protein not closed": ("pocket-ligand", "<ProteinS>MKTA<MoleculeS>", "prompt.g01", 14),
    "protein, end of text": ("binding-site", "<ProteinS>MKTA", "prompt.g01", 14),
    "search, not closed": ("binding-site", "<ProteinS>MK<Search><ProteinS>", "prompt.g01", 12),
    "not opened": ("retrosynthesis", "CCO<MoleculeE><ReverseReact>", "prompt.g02", 3),
    "unknown tag": ("retrosynthesis", "<MoleculesS>CCO", "prompt.g04", 0),
    "no open tag": ("binding-site", "<ProteinS>MK<ProteinE><Search>", "prompt.g05", 30),
    "another task": ("molecule", mol("CC") + "<ReverseReact>", "prompt.g05", 38),
    "bad residue": ("binding-site", "<ProteinS>MK1<ProteinE><Search><ProteinS>", "prompt.g06", 12),
    "no text": ("retrosynthesis", "", "prompt.g05", 0),
}


@pytest.mark.parametrize(
    ("task", "text", "code", "offset"), RAW_FAULTS.values(), ids=RAW_FAULTS.keys()
)
def test_raw_prompt_that_is_none_is_refused_with_its_place(task, text, code, offset):
    error = refusal(task, prompt=text)
    assert error.code == code
    assert error.hint
    assert f"(byte {offset})" in error.message
    assert "^" in error.message


@pytest.mark.parametrize(
    ("task", "inputs", "code"),
    [
        ("retrosynthesis", {"prompt": "x", "smiles": "C"}, "prompt.input"),
        ("binding-site", {"prompt": "x", "region": "1-2"}, "prompt.input"),
        ("pocket-ligand", {"prompt": "x", "residues": "1"}, "prompt.input"),
        ("molecule", {"prompt": "x", "fix": True}, "prompt.input"),
        ("molecule", {"prompt": 5}, "prompt.input"),
        (
            "pocket-ligand",
            {"prompt": "<ProteinS>M<PocketS>CCO<PocketE><ProteinE><MoleculeS>", "level": 3},
            "prompt.g09",
        ),
        (
            "pocket-ligand",
            {"prompt": "<ProteinS>MK<ProteinE><MoleculeS>", "level": 7},
            "prompt.input",
        ),
    ],
)
def test_raw_prompt_stands_alone(task, inputs, code):
    error = refusal(task, **inputs)
    assert error.code == code
    assert error.hint


def test_free_task_takes_a_raw_prompt_and_typed_input_gets_no_note_of_one():
    assert raw.notes({"smiles": "C"}) == []
    subjects.check_inputs(tasks.TASKS["molecule"], {"prompt": "<MoleculeS>"})
    assert raw.typed(tasks.TASKS["molecule"], {"prompt": "<MoleculeS>"}, {}) == {}


def test_cold_program_reads_no_raw_prompt():
    assert program() is program()
    request = {"op": "prepare", "task": "molecule", "inputs": {"prompt": "<MoleculeS>"}}
    with pytest.raises(ProgramError, match="warmed up"):
        create({}).handle(json.dumps({**request, "context": CONTEXT}).encode(), lambda _: None)
