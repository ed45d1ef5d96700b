"""Random models of other makers, made by a public library, on the whole road: no line of code more.

Each is built, sealed, installed with its vectors in the sealed worker, and asked for a text there.
The vocabulary is the reference model's, since the prompts of the parity proof need its tags.
"""

from __future__ import annotations

import contextlib

import pytest
import tiny_llama
from enclave_harness import needs_namespaces
from random_models import FAMILIES, save_random
from staging_runs import build_tiny, run_inline
from test_parity_attacks import seal, sealed_trust, take_in

from airgap.enclave import SealSpec, launch
from airgap.inference.protocol import Generate, parse_reply, segments_of
from airgap.install.parity import prover

MAKERS = {
    "mistral": "float32",
    "qwen2": "float16",
    "qwen3": "bfloat16",
    "mixtral": "bfloat16",
    "llama": "bfloat16",  # with the rotary scaling of Llama 3
}


@needs_namespaces
@pytest.mark.parametrize(
    "family",
    [
        "qwen3",
        *(pytest.param(name, marks=pytest.mark.soak) for name in MAKERS if name != "qwen3"),
    ],
)
def test_a_model_of_another_maker_goes_the_whole_road(family, tmp_path):
    assert family in FAMILIES
    snapshot, out = tmp_path / "tiny", tmp_path / "tiny.agb"
    save_random(
        snapshot,
        family,
        dtype=MAKERS[family],
        num_hidden_layers=2,
        vocab_size=len(tiny_llama.vocabulary()),
        max_position_embeddings=1024,
        bos_token_id=2,
        eos_token_id=3,
    )
    tiny_llama.write_json(snapshot / "tokenizer.json", tiny_llama.tokenizer())
    (snapshot / "README.md").write_text(tiny_llama.CARD)
    build_tiny(snapshot, out, run_sealed=run_inline, reference=False)
    sealed_trust(tmp_path)

    done, _ = take_in(tmp_path, prover(seal, state=tmp_path / "enclave"))
    (proof,) = done.proofs
    assert proof.run == proof.vectors
    folder = done.bundle.model_folder("tiny")
    spec = SealSpec(
        profile="worker",
        program="airgap.inference.program:create",
        config={"folder": str(folder), "precision": "fp32", "threads": 1},
        read_only=(done.bundle.folder,),
        state=tmp_path / "enclave",
    )
    request = Generate(
        prompt=segments_of("<MoleculeS>CC"),
        n=2,
        max_new_tokens=5,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        seed=1,
    )
    with contextlib.closing(launch(spec)) as worker:
        assert parse_reply(worker.request(request.encode(), 60)).tokens > 0
