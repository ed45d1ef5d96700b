"""Requests to the sealed chemistry program, answered in this process; and what tests ask it for."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache

from airgap.science import results, views
from airgap.science.grammar import TAGS
from airgap.science.program import Program, create

CONTEXT = {
    "model": "logos-ref-tiny",
    "max_context": 512,
    "vocab_size": 150,
    "tags": {tag: number + 4 for number, tag in enumerate(TAGS)},
}
ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
HEADER = views.Header(
    model="logos-ref-tiny",
    model_digest="sha256:" + "9f2c4e6b" * 8,
    precision="fp32",
    seed=7,
    prompt_commitment="sha256:" + "4be1f0c2" * 8,
    decision="permit as of 2026-09-01",
    seal="rung A; 61 channels probed, none open",
    receipt="lab.example/airgap record 12",
    created=datetime(2026, 9, 1, 10, 11, 12, tzinfo=UTC),
    scientific_use=False,
    reference_model=True,
    reasons=("BASE-USE: purpose stated",),
    version="0.1.0",
)


@cache
def program() -> Program:
    made = create({})
    made.warm_up()
    return made


def ask(request: dict) -> bytes:
    return program().handle(json.dumps(request).encode(), lambda _: None)


def prepare(task: str, options: dict | None = None, context: dict | None = None, **inputs) -> dict:
    return json.loads(
        ask(
            {
                "op": "prepare",
                "task": task,
                "inputs": inputs,
                "context": context or CONTEXT,
                "options": options or {},
            }
        )
    )


def sample(index: int, text: str, logprob: float = -3.0, finish: str = "eos") -> dict:
    return {
        "index": index,
        "text": text,
        "finish_reason": finish,
        "logprob": logprob,
        "tokens": 9,
        "removed_mass": 0.01,
    }


def assess(task: str, texts: list, inputs: dict | None = None) -> dict:
    samples = [
        text if isinstance(text, dict) else sample(index, text) for index, text in enumerate(texts)
    ]
    return json.loads(
        ask({"op": "assess", "task": task, "inputs": inputs or {}, "samples": samples})
    )


def run(task: str, texts: list, **inputs) -> tuple[results.Prepared, results.Assessed, dict]:
    """Prepare, assess and draw, with the broker's own parsers."""
    prepared = results.parse_prepared(json.dumps(prepare(task, **inputs)).encode())
    assessed = results.parse_assessed(json.dumps(assess(task, texts, inputs)).encode())
    return prepared, assessed, results.draw_all(ask, inputs=inputs, assessed=assessed)


def mol(smiles: str) -> str:
    return f"<MoleculeS>{smiles}<MoleculeE>"


RUNS = {
    "retrosynthesis": (
        [
            mol("CC(=O)OC(C)=O") + mol("O=C(O)c1ccccc1O"),
            mol("O=C(O)c1ccccc1O") + mol("CC(=O)OC(C)=O"),
            mol(ASPIRIN),
            mol("CC(=O") + mol("C"),
            mol("CC(=O)c1ccc") + "<MoleculeS>C",
        ],
        {"smiles": ASPIRIN},
    ),
    "molecule": (["CCO<MoleculeE>", "OCC<MoleculeE>", "C[C@H](N)C(=O)O<MoleculeE>", "CC("], {}),
    "binding-site": (
        ["M<PocketS>K<PocketE>TA<ProteinE>", "MKTA<ProteinE>", "MKTT<ProteinE>"],
        {"sequence": "MKTA"},
    ),
    "pocket-ligand": (["c1ccncc1<MoleculeE>", "CCN<MoleculeE>"], {"fasta": ">x\nMKTA"}),
    "material": (
        [
            "<MetalS>[O][Zn][Zn][Zn][Zn]<MetalE>"
            + mol("[O-]C(=O)c1ccc(cc1)C(=O)[O-]")
            + "<MaterialE>",
            "<MetalS>CCO<MetalE>" + mol("CC") + "<MaterialE>",
        ],
        {},
    ),
}

PDB = """\
ATOM      1  N   ALA A   5       0.000   0.000   0.000  1.00  0.00           N
ATOM      2  CA  ALA A   5       1.458   0.000   0.000  1.00  0.00           C
ATOM      3  CA  LYS A   6       4.000   2.000   0.000  1.00  0.00           C
ATOM      4  CA  GLY A   8      20.000   2.000   0.000  1.00  0.00           C
ATOM      5  H   GLY A   8       1.458   3.100   0.000  1.00  0.00           H
ATOM      6  CA  TRP B   1      40.000   2.000   0.000  1.00  0.00           C
HETATM    7  C1  NDP A 101       1.458   3.000   0.000  1.00  0.00           C
HETATM    8  O   HOH A 201       1.458   4.000   0.000  1.00  0.00           O
END
"""
