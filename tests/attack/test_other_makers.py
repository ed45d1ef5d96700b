"""Random models of other makers, made by a public library, on the whole road: no line of code more.

Each is built, sealed, installed with its vectors in the sealed worker, and asked for a text there.
The vocabulary is the reference model's, since the prompts of the parity proof need its tags; or the
real one of Mixtral with these tags, in both spellings.
"""

from __future__ import annotations

import contextlib
import re

import mixtral
import pytest
import tiny_llama
from enclave_harness import needs_namespaces
from random_models import FAMILIES, save_random
from staging_runs import build_tiny, run_inline
from test_parity_attacks import seal, sealed_trust, take_in

from airgap.enclave import SealSpec, launch
from airgap.inference.protocol import (
    Generate,
    Grammar,
    Sample,
    parse_event,
    parse_reply,
    segments_of,
)
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
    proof, samples = take_road(snapshot, out, tmp_path, Grammar())
    assert proof.run == proof.vectors
    assert samples


@needs_namespaces
@pytest.mark.parametrize(
    "kind", [mixtral.EACH, pytest.param(mixtral.FIRST, marks=pytest.mark.soak)]
)
def test_the_vocabulary_of_mixtral_goes_the_whole_road(kind, tmp_path):
    snapshot, out = tmp_path / "tiny", tmp_path / "tiny.agb"
    mixtral.save_random(snapshot, max_position_embeddings=1024)
    (snapshot / "tokenizer.json").write_bytes(mixtral.tokenizer_json(kind))
    proof, samples = take_road(snapshot, out, tmp_path, Grammar("structure", "molecule"))
    assert proof.run >= 5  # as many as its seconds allow: a head of 32,000 takes longer
    vocabulary = mixtral.vocabulary(kind)
    for sample in samples:
        assert re.fullmatch(r"[A-Za-z0-9@+\-\[\]()=#$%:./\\*~]+(<MoleculeE>)?", sample.text)
        assert vocabulary.continuation(sample.ids, segments_of("<MoleculeS>CC")) == sample.text


def take_road(snapshot, out, tmp_path, grammar):
    """Build, seal, install, prove and ask; return the proof and the samples."""
    (snapshot / "README.md").write_text(tiny_llama.CARD)
    build_tiny(snapshot, out, run_sealed=run_inline, reference=False)
    sealed_trust(tmp_path)

    done, _ = take_in(tmp_path, prover(seal, state=tmp_path / "enclave"))
    (proof,) = done.proofs
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
        stop=("<MoleculeE>",),
        grammar=grammar,
    )
    with contextlib.closing(launch(spec)) as worker:
        *events, reply = [frame.payload for frame in worker.stream(request.encode(), 60)]
    samples = [one for one in map(parse_event, events) if isinstance(one, Sample)]
    assert parse_reply(reply).tokens == sum(len(one.ids) for one in samples) > 0
    return proof, samples
