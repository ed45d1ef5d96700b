"""The chemistry program where it runs: in its own process, sealed, and nowhere else."""

import json
import subprocess
import sys

import pytest
from science_runs import CONTEXT, PDB, RUNS, sample

from airgap.enclave import SealRefused, SealSpec, launch
from airgap.science import results, svg
from policy.errors import RefusedError

BROKER_SIDE = ["grammar", "tasks", "results", "svg", "views"]


def test_broker_side_loads_no_chemistry_and_no_model():
    names = ", ".join(f"airgap.science.{name}" for name in BROKER_SIDE)
    code = f"import sys, {names}; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert "airgap.science.views" in loaded
    assert not {"rdkit", "gemmi", "onnxruntime", "numpy", "tokenizers"} & loaded


def test_prompt_side_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules);"
        "import airgap.science.checkpoint, airgap.science.completions, airgap.science.prompts;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {m for m in ran.stdout.split() if m not in sys.stdlib_module_names}
    assert foreign == {"airgap", "policy"}


@pytest.fixture(scope="module")
def helper():
    try:
        sealed = launch(SealSpec(profile="screen", program="airgap.science.program:create"))
    except SealRefused as refused:
        pytest.skip(f"this host reaches no rung: {refused.code}")
    yield sealed
    sealed.close()


@pytest.mark.parametrize("task", RUNS)
def test_every_operation_works_after_the_filters_are_on(helper, task):
    texts, inputs = RUNS[task]

    def ask(request) -> bytes:
        return helper.request(json.dumps(request).encode(), 60.0)

    head = {"task": task, "inputs": inputs}
    prepared = results.parse_prepared(ask({"op": "prepare", **head, "context": CONTEXT}))
    samples = [sample(number, text) for number, text in enumerate(texts)]
    assessed = results.parse_assessed(ask({"op": "assess", **head, "samples": samples}))
    drawings = results.draw_all(ask, inputs=inputs, assessed=assessed)
    assert prepared.input_screen.status == "complete"
    new = task == "binding-site"  # one of its answers is no copy
    assert assessed.output_screen.status == ("incomplete" if new else "complete")
    for texts in drawings.values():
        assert all(svg.clean_svg(text) for text in texts)
    assert ("$$$$" in results.sdf_all(ask, assessed)) == (task != "binding-site")


def test_salts_pockets_and_raw_prompts_work_after_the_filters_are_on(helper):
    def ask(request) -> bytes:
        return helper.request(json.dumps(request).encode(), 60.0)

    def prepare(task, **inputs) -> results.Prepared:
        request = {"op": "prepare", "task": task, "inputs": inputs, "context": CONTEXT}
        return results.parse_prepared(ask(request))

    for salt, parent in (
        ("CC(=O)[O-].[Na+]", "CC(=O)O"),
        ("C[NH2+]C.[Cl-]", "CNC"),
        ("F[B-](F)(F)c1ccccc1.[K+]", "F[B-](F)(F)c1ccccc1"),
        ("C[Mg+].[Br-]", "[CH3][Mg+]"),
        ("[O-]S(=O)(=O)c1ccc([N+]#N)cc1.O", "N#[N+]c1ccc(S(=O)(=O)[O-])cc1"),
    ):
        assert prepare("retrosynthesis", smiles=salt, fix=True).subject.product == parent
    marked = "<ProteinS>M<PocketS>K<PocketE>T<ProteinE><MoleculeS>"
    assert prepare("pocket-ligand", prompt=marked).subject.pockets == [1]
    drawn = {"op": "draw", "task": "pocket-ligand", "inputs": {"prompt": marked}, "rows": []}
    assert svg.clean_svg(results.parse_drawings(ask(drawn)).drawings["subject"][0])
    with pytest.raises(RefusedError) as refused:
        prepare("pocket-ligand", prompt="<ProteinS>MKT<MoleculeS>")
    assert refused.value.code == "prompt.g01"
    assert "(byte 13)" in refused.value.message
    with pytest.raises(RefusedError, match="has no meaning"):
        prepare("retrosynthesis", smiles="ibuprofen")


def test_structures_and_refusals_work_after_the_filters_are_on(helper):
    def prepare(**inputs) -> results.Prepared:
        request = {"op": "prepare", "task": "pocket-ligand", "inputs": inputs, "context": CONTEXT}
        return results.parse_prepared(helper.request(json.dumps(request).encode(), 60.0))

    assert prepare(pdb=PDB, ligand="NDP").subject.pockets == [0, 1]
    for inputs, code in (
        ({"pdb": "garbage"}, "prompt.structure"),
        ({"sequence": "mk"}, "prompt.g06"),
        ({}, "prompt.input"),
    ):
        with pytest.raises(RefusedError) as refused:
            prepare(**inputs)
        assert refused.value.code == code
