"""Models that must not be converted, each refused with its code before any work begins."""

from __future__ import annotations

import json
import struct

import pytest
import tiny_llama
from staging_runs import build_tiny, run_inline

from bundle.scan.safetensors import parse_safetensors
from policy.errors import RefusedError

WEIGHTS = "model.safetensors"


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        found = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return change


def no_end(folder):
    config(eos_token_id=None)(folder)
    (folder / "generation_config.json").unlink()


def scaling(kind, **more):
    return config(rope_scaling={"rope_type": kind, "factor": 2.0, **more})


def cut(folder):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-1000])


def put(name, value, place=5):
    """Write one float32 into a tensor."""

    def change(folder):
        raw = bytearray((folder / WEIGHTS).read_bytes())
        tensors = parse_safetensors(memoryview(bytes(raw))).tensors
        start = next(one.start for one in tensors if one.name == name) + 4 * place
        raw[start : start + 4] = struct.pack("<f", value)
        (folder / WEIGHTS).write_bytes(bytes(raw))

    return change


def without(name):
    def change(folder):
        shapes = {key: size for key, size in tiny_llama.shapes().items() if key != name}
        (folder / WEIGHTS).write_bytes(tiny_llama.safetensors(shapes))

    return change


HEAD = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "truncated weights": (cut, "scan.safetensors"),
    "a weight is NaN": (put(HEAD, float("nan")), "source.values"),
    "a weight is infinite": (put("model.norm.weight", float("-inf"), 0), "source.values"),
    "a missing tensor": (without(HEAD), "source.shape"),
    "another hidden size": (config(hidden_size=48), "source.shape"),
    "another feed-forward": (config(intermediate_size=64), "source.shape"),
    "more layers": (config(num_hidden_layers=3), "source.shape"),
    "another number of heads": (config(num_key_value_heads=4), "source.shape"),
    "another vocabulary": (config(vocab_size=1000), "source.shape"),
    "no tied head": (config(tie_word_embeddings=False), "source.shape"),
    "a family nobody knows": (config(model_type="mamba"), "source.architecture"),
    "another class": (config(architectures=["LlamaForTokens"]), "source.architecture"),
    "another activation": (config(hidden_act="gelu"), "source.architecture"),
    "quantised already": (config(quantization_config={"bits": 4}), "source.architecture"),
    "rope scaling yarn": (scaling("yarn"), "source.architecture"),
    "rope scaling dynamic": (scaling("dynamic"), "source.architecture"),
    "rope scaling longrope": (scaling("longrope", short_factor=[1.0]), "source.architecture"),
    "rope scaling without a factor": (
        config(rope_scaling={"rope_type": "linear"}),
        "source.architecture",
    ),
    "rope base of nought": (config(rope_theta=0), "source.architecture"),
    "no end token": (no_end, "source.architecture"),
}


def never(job):
    raise AssertionError(f"work began: {job.argv}")


def build(folder, run_sealed):
    return build_tiny(folder, folder.with_suffix(".agb"), run_sealed=run_sealed, reference=False)


def test_the_untouched_model_builds(tmp_path):
    assert build(tiny_llama.write_snapshot(tmp_path / "tiny"), run_inline).path.exists()


@pytest.mark.parametrize(("change", "code"), BAD.values(), ids=BAD)
def test_a_bad_model_is_refused_before_work_begins(tmp_path, change, code):
    folder = tiny_llama.write_snapshot(tmp_path / "tiny")
    change(folder)
    with pytest.raises(RefusedError) as caught:
        build(folder, never)
    assert code == caught.value.code or code in caught.value.message
    assert not folder.with_suffix(".agb").exists()
