import json

import pytest
from rdkit import Chem
from science_runs import (
    ASPIRIN,
    CONTEXT,
    PDB,
    RUNS,
    ask,
    assess,
    mol,
    prepare,
    program,
    run,
    sample,
)

from airgap.enclave.channel import ProgramError
from airgap.science import assessment, drawing, molecules, results, structures
from airgap.science.grammar import TAGS
from airgap.science.program import _Ticker, create
from airgap.science.refusals import PromptError
from policy.errors import FaultError


def refusal(call, *args, **kwargs) -> ProgramError:
    with pytest.raises(ProgramError) as refused:
        call(*args, **kwargs)
    return refused.value


# -- prepare --------------------------------------------------------------------------------------


def test_product_becomes_a_canonical_prompt_that_the_broker_accepts():
    reply = prepare("retro", {"n": 4, "seed": 9}, smiles=" OC(=O)c1ccccc1OC(C)=O ")
    assert reply["prompt"] == f"<MoleculeS>{ASPIRIN}<MoleculeE><ReverseReact>"
    assert reply["subject"]["product"] == ASPIRIN
    assert reply["notes"] == ["the product is written as canonical SMILES"]
    parsed = results.parse_prepared(json.dumps(reply).encode())
    assert (parsed.preset.n, parsed.preset.seed, parsed.modality) == (4, 9, "retrosynthesis")
    assert parsed.input_screen.tier == "H0"


@pytest.mark.parametrize("task", RUNS)
def test_every_task_goes_from_input_to_drawings(task):
    texts, inputs = RUNS[task]
    prepared, assessed, drawings = run(task, texts, **inputs)
    assert prepared.task == assessed.task == task
    assert assessed.rows
    new = task == "binding-site"  # one of its answers is no copy: protein that nobody screened
    assert assessed.output_screen.status == ("incomplete" if new else "complete")
    if task != "binding-site":
        assert set(map(str, range(1, len(assessed.rows) + 1))) <= set(drawings)


PRODUCTS = {
    "branch not closed": ("CC(C", "prompt.g07", 2),
    "ring not closed": ("C1CC", "prompt.g07", 1),
    "valence": ("CC(C)(C)(C)C", "prompt.g07", 1),
    "aromaticity": ("c1cccc1", "prompt.g07", 0),
    "aromatic outside a ring": ("Ccc", "prompt.g07", 1),
    "no such element": ("C[Xx]C", "prompt.g07", 1),
    "two bonds in a row": ("C==C", "prompt.g07", 2),
    "empty": ("", "prompt.g07", None),
    "blank": ("   ", "prompt.g07", None),
    "a name": ("aspirin", "prompt.g07", 0),
    "SMILES and a name": ("CCO ethanol", "prompt.g07", 3),
    "wildcard": ("CC*", "prompt.g07", 2),
    "atom maps": ("[CH3:1][OH:2]", "prompt.g08", 4),
    "salt": ("CC(=O)[O-].[Na+]", "prompt.g08", 10),
    "reaction": ("CC.O>>CCO", "prompt.g12", 4),
    "reaction with agents": ("CC>O>CCO", "prompt.g12", 2),
    "tags": ("<MoleculeS>CC<MoleculeE>", "prompt.g03", 0),
    "dative bond": ("N->[Cu]", "prompt.g03", 2),
    "newline": ("CC\nO", "prompt.g07", 2),
    "too many atoms": ("C" * 600, "prompt.g07", 0),
    "long": ("C" * 5_000, "prompt.g07", 0),
    "a megabyte": ("C" * 1_000_000, "prompt.size", None),
    "not Latin": ("CCО", "prompt.g07", 2),
    "half a surrogate": ("C\ud800", "prompt.g07", 1),
}


@pytest.mark.parametrize(("smiles", "code", "offset"), PRODUCTS.values(), ids=PRODUCTS.keys())
def test_product_that_is_none_is_refused_with_its_place(smiles, code, offset):
    error = refusal(prepare, "retrosynthesis", smiles=smiles)
    assert error.code == code
    assert error.hint
    if offset is not None:
        assert f"(byte {offset})" in error.message


def test_valence_error_names_the_atom():
    error = refusal(prepare, "retrosynthesis", smiles="CC(C)(C)(C)C")
    assert "at atom 1: C has 5 bonds" in error.message


def test_fix_strips_maps_and_takes_the_largest_fragment_and_says_so():
    reply = prepare("retrosynthesis", smiles="[CH3:1][CH2:2][OH:3].[Cl-]", fix=True)
    assert reply["subject"]["product"] == "CCO"
    assert len(reply["notes"]) == 3
    assert "--fix" in refusal(prepare, "retrosynthesis", smiles="CC.C").hint


def test_fragment_that_fix_drops_is_screened_all_the_same():
    reply = prepare("retrosynthesis", smiles="CCCCCCCCCC.ClC(Cl)=O", fix=True)
    assert reply["input_screen"]["tier"] == "H3"


def test_target_on_a_schedule_is_held_and_the_reply_names_no_rule_to_users():
    reply = prepare("retrosynthesis", smiles="OCCSCCO")
    assert (reply["input_screen"]["status"], reply["input_screen"]["tier"]) == ("complete", "H3")
    assert "2b13" not in json.dumps({k: v for k, v in reply.items() if k != "input_screen"})


def test_sequence_is_not_screened_and_the_record_says_so():
    screen = prepare("binding-site", sequence="MKTA")["input_screen"]
    assert screen["status"] == "complete"
    assert "input sequence not screened" in screen["mode"]


def test_missing_token_disables_the_task_with_a_reason():
    tags = {tag: n for n, tag in enumerate(TAGS) if tag != "<Search>"}
    context = {**CONTEXT, "tags": tags}
    prepare("molecule", context=context)
    error = refusal(prepare, "binding-site", context=context, sequence="MK")
    assert error.code == "prompt.g11"
    assert "<Search>" in error.message


def test_reference_model_says_what_its_sites_are():
    context = {**CONTEXT, "reference_model": True}
    assert "motif" in prepare("binding-site", context=context, sequence="MK")["notes"][-1]
    assert prepare("molecule", context=context)["notes"] == []


# -- structures -----------------------------------------------------------------------------------


def test_pocket_is_what_lies_near_the_ligand_without_hydrogens_and_water():
    reply = prepare("pocket-ligand", pdb=PDB, ligand="NDP")
    assert reply["subject"]["labels"] == ["A:5", "A:6", "A:8"]
    assert reply["subject"]["pockets"] == [0, 1]
    assert "<PocketS>A<PocketE><PocketS>K<PocketE>G" in reply["prompt"]
    assert any("1 gaps in the numbering are joined" in note for note in reply["notes"])
    same = prepare("pocket-ligand", pdb=PDB, ligand="A:101", chain="A")
    assert same["prompt"] == reply["prompt"]


def test_pocket_by_residues_and_region_of_a_structure():
    reply = prepare("pocket-ligand", pdb=PDB, chain="A", residues="A:6,8")
    assert reply["subject"]["pockets"] == [1, 2]
    part = prepare("pocket-ligand", pdb=PDB, chain="A", residues="6", region="6-8")
    assert part["subject"]["labels"] == ["A:6", "A:8"]
    deep = prepare("pocket-ligand", pdb=PDB, chain="A", residues="6", level=3)
    assert "<PocketS>NCCCC[C@H](N)C(=O)O<PocketE>" in deep["prompt"]
    assert any("free acid" in note for note in deep["notes"])


CIF = """\
data_x
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_seq_id
_atom_site.auth_asym_id
_atom_site.auth_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.label_alt_id
_atom_site.pdbx_PDB_ins_code
_atom_site.occupancy
_atom_site.B_iso_or_equiv
ATOM 1 C CA MET A 1 A 7 0 0 0 . ? 1 1
ATOM 2 C CA LYS A 2 A 8 4 0 0 . ? 1 1
"""


def test_mmcif_is_read_as_well():
    assert prepare("binding-site", pdb=CIF)["subject"]["labels"] == ["A:7", "A:8"]


def test_equal_chains_need_no_choice():
    twice = PDB.replace(" TRP B   1      40.000", " TRP A   9      40.000")
    copy = "".join(
        line[:21] + "C" + line[22:] + "\n" for line in twice.splitlines() if line[:4] == "ATOM"
    )
    notes = prepare("binding-site", pdb=twice.replace("END\n", copy))["notes"]
    assert any("all 2 chains have one sequence" in note for note in notes)


STRUCTURES = {
    "not a structure": ({"pdb": "garbage"}, "prompt.structure"),
    "empty": ({"pdb": ""}, "prompt.structure"),
    "FASTA in its place": ({"pdb": ">a\nMKTA\n"}, "prompt.structure"),
    "water only": (
        {"pdb": "\n".join(line for line in PDB.splitlines() if "HOH" in line)},
        "prompt.structure",
    ),
    "several chains": ({"pdb": PDB}, "prompt.structure"),
    "no such chain": ({"pdb": PDB, "chain": "Z"}, "prompt.structure"),
    "no such ligand": ({"pdb": PDB, "ligand": "XYZ"}, "prompt.structure"),
    "water as ligand": ({"pdb": PDB, "ligand": "HOH"}, "prompt.structure"),
    "ligand far from the chain": ({"pdb": PDB, "ligand": "NDP", "chain": "B"}, "prompt.structure"),
    "no such residue": ({"pdb": PDB, "chain": "A", "residues": "99"}, "prompt.input"),
    "broken mmCIF": ({"pdb": "data_x\nloop_\n_a.b\n"}, "prompt.structure"),
    "chain without a structure": ({"sequence": "MK", "chain": "A"}, "prompt.input"),
    "ligand without a structure": ({"sequence": "MK", "ligand": "NDP"}, "prompt.input"),
    "too large": ({"pdb": "x" * 13_000_000}, "prompt.size"),
}


@pytest.mark.parametrize(("inputs", "code"), STRUCTURES.values(), ids=STRUCTURES.keys())
def test_structure_that_does_not_give_what_was_asked_is_refused(inputs, code):
    error = refusal(prepare, "pocket-ligand", **inputs)
    assert error.code == code
    assert error.hint


def test_odd_residues_are_noted():
    protein = structures.read_protein(
        PDB.replace("TRP", "MSE"), chain="B", ligand=None, residues=None, notes=(notes := [])
    )
    assert protein.sequence == "M" or notes


# -- assess ---------------------------------------------------------------------------------------


def test_votes_rank_before_likelihood_and_likelihood_is_of_the_best_sample():
    texts = [
        sample(0, mol("CCO"), -1.0),
        sample(1, mol("CC(=O)O") + mol("CN"), -9.0),
        sample(2, mol("NC") + mol("OC(C)=O"), -5.0),
        sample(3, mol("CCN"), -0.5),
    ]
    rows = assess("retrosynthesis", texts, {"smiles": "CC(=O)NC"})["rows"]
    assert [(row["votes"], row["index"], row["logprob"]) for row in rows] == [
        (2, 2, -5.0),
        (1, 3, -0.5),
        (1, 0, -1.0),
    ]
    assert rows[0]["indices"] == [1, 2]
    assert rows[0]["per_token"] == pytest.approx(-5 / 9, abs=1e-3)
    assert rows[0]["reaction"] == "CC(=O)O.CN>>CNC(C)=O"
    assert rows[0]["atoms_balance"]
    assert not rows[1]["atoms_balance"]


def test_product_handed_back_is_flagged_and_counted():
    reply = assess("retrosynthesis", [mol("OCC"), mol("CCO") + mol("C")], {"smiles": "CCO"})
    assert [row["handed_back"] for row in reply["rows"]] == [True, True]
    assert reply["summary"]["handed_back"] == 2


def test_one_broken_part_makes_the_prediction_invalid():
    reply = assess("retrosynthesis", [mol("CCO") + mol("C(C")], {"smiles": "CCO"})
    assert reply["rows"] == []
    assert reply["invalid"][0]["reason"].startswith("reactant 2 does not parse")


def test_multiplicity_of_reactants_counts():
    texts = [mol("CC"), mol("CC") + mol("CC")]
    assert len(assess("retrosynthesis", texts, {"smiles": "CCCC"})["rows"]) == 2


def test_molecules_collapse_by_identity_with_counts_and_properties():
    texts = ["CCO<MoleculeE>", "OCC<MoleculeE>", "CC(=O)O<MoleculeE>", "C<MoleculeE>C"]
    reply = assess("molecule", texts)
    first = reply["rows"][0]
    assert (first["smiles"], first["votes"], first["fsp3"]) == ("CCO", 2, 1.0)
    assert first["mw"] == pytest.approx(46.069, abs=1e-3)
    assert 0 < first["qed"] < 1
    assert reply["summary"]["valid"] == 3
    assert reply["invalid"][0]["remainder"] == "C"


def test_empty_smiles_and_empty_text_are_invalid():
    reply = assess("molecule", ["<MoleculeE>", "", "   "])
    assert reply["summary"]["valid"] == 0
    assert reply["output_screen"]["status"] == "complete"


@pytest.mark.parametrize(
    ("finish", "words"), [("length", "budget"), ("dead_end", "no legal token"), ("eos", "form")]
)
def test_reason_of_an_unfinished_sample_is_told(finish, words):
    reply = assess("molecule", [sample(0, "CC(", finish=finish)])
    assert words in reply["invalid"][0]["reason"]
    assert reply["invalid"][0]["text"] == "CC("


def test_votes_per_residue_count_exact_copies_only():
    texts = [
        "M<PocketS>K<PocketE>TA<ProteinE>",
        "M<PocketS>K<PocketE><PocketS>T<PocketE>A<ProteinE>",
        "MKTA<ProteinE>",
        "MKTT<ProteinE>",
        "MKT<ProteinE>",
    ]
    reply = assess("binding-site", texts, {"sequence": "MKTA"})
    assert reply["track"] == {
        "sequence": "MKTA",
        "labels": ["1", "2", "3", "4"],
        "votes": [0, 2, 1, 0],
        "copies": 3,
    }
    assert [one["reason"][-12:] for one in reply["invalid"]] == ["differs at 4", "differs at 4"]
    assert all(one["text"] is None for one in reply["invalid"])
    assert reply["sequences"] == ["MKTT"]  # a copy that was cut short holds nothing new
    assert reply["output_screen"]["reason"] == "new sequences were not screened"
    exact = assess("binding-site", [*texts[:3], texts[4]], {"sequence": "MKTA"})
    assert (exact["sequences"], exact["output_screen"]["status"]) == ([], "complete")
    assert "exact copy" in exact["output_screen"]["mode"]


def test_material_nodes_get_their_dots_back_and_are_never_parsed_as_one_molecule():
    reply = assess("material", RUNS["material"][0])
    (row,) = reply["rows"]
    assert row["metals"] == [{"text": "[O][Zn][Zn][Zn][Zn]", "node": "[O].[Zn].[Zn].[Zn].[Zn]"}]
    assert row["built"] == "3D not built"
    assert "names no metal" in reply["invalid"][0]["reason"]


@pytest.mark.parametrize(
    ("text", "node", "metal"),
    [
        ("[Cu][Cu]", "[Cu].[Cu]", True),
        ("[Zn+2].[O-2]", "[Zn+2].[O-2]", True),
        ("[O][O]", "[O].[O]", False),
        ("[Qq]", "[Qq]", False),
        ("Zn", "Zn", False),
        ("[Zn]C", "[Zn]C", False),
        ("", "", False),
    ],
)
def test_node_is_a_list_of_atoms(text, node, metal):
    assert molecules.dotted_node(text) == (node, metal)


def test_output_on_a_schedule_raises_the_tier_valid_or_not():
    valid = assess("molecule", ["OCCSCCO<MoleculeE>"])
    broken = assess("molecule", ["ClC(=O)(Cl"])
    half = assess("retrosynthesis", [mol("CCO") + "<MoleculeS>OCCSCCO"], {"smiles": "CCO"})
    for reply in (valid, broken, half):
        assert reply["output_screen"]["tier"] == "H2"
        assert reply["output_screen"]["status"] == "complete"


def test_text_that_cannot_be_screened_is_withheld():
    texts = ["C[Qq]C<MoleculeE>", "C1CC", "C" * 1_900, "C." * 60 + "C("]
    reply = assess("molecule", texts)
    assert [one["text"] for one in reply["invalid"]] == [None, "C1CC", None, None]
    assert reply["output_screen"]["status"] == "complete"


@pytest.mark.parametrize(
    ("text", "mended"),
    [("C1CC", "CCC"), ("CC(C", "CC(C)"), ("CC)C", "CCC"), ("CC(=", "CC"), ("C[Na", "CN"), ("", "")],
)
def test_mending_closes_what_is_open(text, mended):
    assert assessment.mend(text) == mended


# -- drawings and SDF -----------------------------------------------------------------------------


def test_alignment_never_shows_another_stereoisomer():
    pairs = [
        ("CC(=O)Nc1ccc(S(=O)(=O)N[C@@H](C)c2ccc(Cl)cc2Br)cc1", "C[C@H](N)c1ccc(Cl)cc1Br"),
        (
            "CC(=O)Nc1ccc(S(=O)(=O)N[C@@H](C)c2ccc(Cl)cc2Br)cc1",
            "C[C@H](NS(=O)(=O)c1ccc(N)cc1)c1ccc(Cl)cc1Br",
        ),
        ("CCOC(=O)/C=C/c1ccccc1", "CCOC(=O)/C=C/I"),
        ("O=C1Nc2ccccc2C1=CNc1ccccc1", "O=C1Nc2ccccc2/C1=C/O"),
        ("C[C@H]1CC[C@@H](C(C)C)C[C@@H]1O", "C[C@H]1CC[C@@H](C(C)C)CC1=O"),
    ]
    for product, reactant in pairs:
        target = drawing.laid_out(Chem.MolFromSmiles(product))
        assert drawing.shows(target, Chem.MolFromSmiles(product))
        turned = drawing._aligned(Chem.MolFromSmiles(reactant), target)
        assert drawing.shows(turned, Chem.MolFromSmiles(reactant))


def test_scheme_in_a_hurry_is_drawn_without_alignment():
    one, two = Chem.MolFromSmiles(ASPIRIN), Chem.MolFromSmiles("CC(=O)Cl")
    assert drawing.draw_scheme(one, [two, two], until=0.0).startswith("<svg")


def test_radicals_charges_and_isotopes_are_drawn():
    svg = drawing.draw_molecule(Chem.MolFromSmiles("[CH2]C[N+](C)(C)[13CH3]"))
    assert 'class="qn"' in svg


def test_many_drawings_come_in_portions():
    big = ".".join(["[Br][Br]"] * 30)
    rows = [{"rank": n + 1, "smiles": big} for n in range(90)]
    request = {"op": "draw", "task": "molecule", "inputs": {}, "rows": rows}
    reply = results.parse_drawings(ask(request))
    assert reply.next is not None
    assert len(reply.drawings) == reply.next
    _, assessed, _ = run("molecule", RUNS["molecule"][0])
    row = assessed.rows[0].model_copy(update={"smiles": big})
    many = assessed.model_copy(
        update={"rows": [row.model_copy(update={"rank": n + 1}) for n in range(90)]}
    )
    assert len(results.draw_all(ask, inputs={}, assessed=many)) == 90


def test_sdf_reads_back_with_its_fields():
    rows = assess("molecule", RUNS["molecule"][0])["rows"]
    text = json.loads(ask({"op": "sdf", "rows": rows}))["sdf"]
    supplier = Chem.SDMolSupplier()
    supplier.SetData(text)
    read = list(supplier)
    assert [Chem.MolToSmiles(m) for m in read] == [row["smiles"] for row in rows]
    assert read[0].GetProp("rank") == "1"
    assert float(read[0].GetProp("logprob")) == rows[0]["logprob"]
    reactants = assess("retrosynthesis", RUNS["retrosynthesis"][0], {"smiles": ASPIRIN})["rows"]
    text = json.loads(ask({"op": "sdf", "rows": reactants}))["sdf"]
    assert text.count("$$$$") == 3
    assert "row 1 part 2" in text


def test_sdf_field_cannot_break_out_of_its_line():
    row = {"rank": 1, "smiles": "CC", "inchikey": "x\n\n$$$$\nevil"}
    text = json.loads(ask({"op": "sdf", "rows": [row]}))["sdf"]
    assert text.count("\n$$$$\n") == 1


# -- requests -------------------------------------------------------------------------------------

BAD_REQUESTS = {
    "not JSON": b"{",
    "not UTF-8": b"\xff",
    "not an object": b"[]",
    "infinite number": b'{"op": "prepare", "n": Infinity}',
    "deep": b"[" * 100_000,
    "no operation": b"{}",
    "unknown operation": b'{"op": "exec"}',
    "task is a number": b'{"op": "prepare", "task": 5}',
    "inputs are a list": b'{"op": "prepare", "task": "molecule", "inputs": []}',
    "no context": b'{"op": "prepare", "task": "molecule"}',
    "no samples": b'{"op": "assess", "task": "molecule"}',
    "sample is text": b'{"op": "assess", "task": "molecule", "samples": ["CC"]}',
    "sample lacks a field": b'{"op": "assess", "task": "molecule", "samples": [{"index": 0}]}',
    "rows are text": b'{"op": "sdf", "rows": "CC"}',
    "row has no rank": b'{"op": "sdf", "rows": [{"smiles": "C"}]}',
    "row has parts of numbers": b'{"op": "sdf", "rows": [{"rank": 1, "linkers": [5]}]}',
    "row lacks its reactants": (
        b'{"op": "draw", "task": "retrosynthesis", "inputs": {"smiles": "C"}, "rows": '
        b'[{"rank": 1}]}'
    ),
    "track of unequal lists": (
        b'{"op": "draw", "task": "binding-site", "rows": [], "track": '
        b'{"sequence": "MK", "labels": ["1"], "votes": [0, 1], "copies": 1}}'
    ),
    "track of texts": (
        b'{"op": "draw", "task": "binding-site", "rows": [], "track": '
        b'{"sequence": "M", "labels": ["1"], "votes": ["x"], "copies": 1}}'
    ),
}


@pytest.mark.parametrize("raw", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_bad_request_is_refused(raw):
    error = refusal(program().handle, raw, lambda _: None)
    assert error.code in {"request.malformed", "prompt.input"}


@pytest.mark.parametrize(
    "change",
    [{"tokens": -1}, {"logprob": "x"}, {"index": True}, {"text": "C" * 300_000}, {"tokens": 1.5}],
)
def test_sample_out_of_range_is_refused(change):
    assert assess("molecule", [sample(0, "C<MoleculeE>")])["rows"]
    error = refusal(assess, "molecule", [{**sample(0, "C<MoleculeE>"), **change}])
    assert error.code == "request.malformed"


def test_program_that_is_cold_screens_nothing_and_answers_nothing():
    request = {"op": "prepare", "task": "molecule", "context": CONTEXT}
    error = refusal(create({}).handle, json.dumps(request).encode(), lambda _: None)
    assert "warmed up" in error.message


def test_reply_that_would_not_fit_is_refused():
    row = {"rank": 1, "smiles": "C", "formula": "x" * 2_000}
    error = refusal(ask, {"op": "sdf", "rows": [row] * 1_800})
    assert error.code == "request.limit"


def test_large_assessment_comes_in_parts_and_is_never_cut():
    texts = [sample(n, "CC(" + "<" * 1_950, finish="length") for n in range(900)]
    texts.append(sample(900, "CCO<MoleculeE>"))
    request = {"op": "assess", "task": "molecule", "inputs": {}, "samples": texts}
    parts: list[bytes] = []
    reply = program().handle(json.dumps(request).encode(), parts.append)
    assert all(len(part) < 3 * 1024 * 1024 for part in parts)
    whole = results.parse_assessed(reply, parts)
    assert (len(whole.rows), len(whole.invalid), whole.parts > 1) == (1, 900, True)
    for lost in ([], [part for part in parts if b'"part"' in part][1:]):
        with pytest.raises(FaultError, match="parts came"):
            results.parse_assessed(reply, lost)


def test_long_work_sends_signs_of_life():
    ticks: list[bytes] = []
    ticker = _Ticker(ticks.append)
    ticker(1, 10)
    assert ticks == []
    ticker._last -= 5.0
    ticker(2, 10)
    assert json.loads(ticks[0]) == {"event": "progress", "done": 2, "of": 10}
    small = assess("molecule", ["CCO<MoleculeE>"])
    assert results.parse_assessed(json.dumps(small).encode(), ticks).summary.n == 1


def test_sdf_of_many_rows_comes_in_portions():
    _, assessed, _ = run("molecule", RUNS["molecule"][0])
    many = assessed.model_copy(update={"rows": [assessed.rows[0]] * 450})
    assert results.sdf_all(ask, many).count("$$$$") == 450


def test_rdkit_prints_nothing(capfd):
    with pytest.raises(PromptError):
        molecules.read_molecule("C[Xx]", "product")
    molecules.find_molecule("CC(C)(C)(C)C")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def _structure(**changes):
    lines = [
        f"ATOM  {n:5d}  CA  ALA A{n:4d}    {n * 3.8:8.3f}   0.000   0.000  1.00  0.00           C"
        for n in range(1, 5)
    ]
    text = "\n".join(["REMARK   1 by A. Author", *lines, "END", ""])
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def _chain(text):
    return structures.read_protein(text, chain=None, ligand=None, residues=None, notes=[])


def test_a_structure_with_accents_is_read_and_hands_on_no_control_character():
    assert _chain(_structure(Author="Ångström\u202e")).sequence == "AAAA"
    odd = _chain(_structure(ALA="ÅÅÅ").replace("ÅÅÅ", "ALA", 2))
    assert odd.sequence == "AA"
    assert _chain(_structure().replace(" A ", " \x1b ")).chain == "?"
    assert _chain(_structure().replace("\n", "\r")).sequence == "AAAA"


def test_a_coordinate_that_is_no_number_is_refused():
    with pytest.raises(PromptError) as refused:
        _chain(_structure().replace("   3.800", "     nan"))
    assert refused.value.code == "prompt.structure"
