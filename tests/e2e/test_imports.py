"""Nothing on the secured side loads a library of the staging side, and the worker loads least."""

import json
import subprocess
import sys

import pytest
from conftest_road import call

HEAVY = {
    *("torch", "transformers", "optimum", "sigstore", "huggingface_hub", "model_signing"),
    *("onnx", "accelerate", "safetensors", "cyclonedx", "requests", "urllib3"),
}
# A seed: what is drawn by chance is held by chance.
DRAW = ("run", "molecule", "-n", "1", "--seed", "1", "--project", "route-design")
SECURED = {
    "verify": ["verify", "{bundle}", "--root", "{lab}", "--json"],
    "list": ["list", "--root", "{lab}", "--json"],
    "run": [*DRAW, "--root", "{lab}", "--json"],
    "audit verify": ["audit", "verify", "--root", "{lab}", "--json"],
    "policy explain": ["policy", "explain", "--model", "logos-8b", "--root", "{lab}", "--json"],
    "doctor": ["doctor", "--root", "{lab}", "--json"],
}
SCRIPT = """
import json, sys
from airgap import cli
status = cli.invoke(sys.argv[1:])
print("\\nMODULES", json.dumps([status, sorted(m.partition(".")[0] for m in sys.modules)]))
"""


@pytest.mark.parametrize("name", SECURED)
def test_secured_commands_load_no_staging_library(road, name):
    argv = [word.format(bundle=road.bundle, lab=road.lab) for word in SECURED[name]]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *argv], capture_output=True, text=True, check=True
    )
    status, modules = json.loads(done.stdout.rpartition("MODULES ")[2])
    assert status in {0, 3}, done.stdout
    assert not HEAVY & set(modules)
    if name in {"verify", "list", "audit verify"}:  # an auditor's machine has no extra at all
        assert not {"numpy", "onnxruntime", "rdkit", "tokenizers"} & set(modules)


def test_the_sealed_worker_names_what_it_has_loaded(road, capsys):
    """The evidence of a run proves one exporter-free process; its objects are in the log."""
    done = call(capsys, *DRAW, "--root", road.lab)
    assert done.status == 0
    seals = call(capsys, "audit", "show", "--kind", "enclave.seal", "--root", road.lab)
    profiles = {record["data"]["profile"] for record in seals.document["records"]}
    assert profiles == {"worker", "screen"}
