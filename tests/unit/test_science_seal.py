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
        "import airgap.science.grammar, airgap.science.tasks;"
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
    assert prepared.input_screen.status == assessed.output_screen.status == "complete"
    for texts in drawings.values():
        assert all(svg.clean_svg(text) for text in texts)
    assert ("$$$$" in results.sdf_all(ask, assessed)) == (task != "binding-site")


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
