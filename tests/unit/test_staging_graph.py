"""The fast graph: the publisher's bytes, the publisher's numbers."""

import hashlib

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from random_models import (
    FAMILIES,
    VOCABULARY,
    FastGraph,
    all_logits,
    placed_tensors,
    save_random,
    torch_logits,
    write_fast,
)

from bundle.scan.onnx import parse_onnx
from bundle.scan.strict import open_view
from bundle.staging.architecture import Rope
from bundle.staging.graph import _Writer, interface, write_graph

TOLERANCE = 1e-4  # logits here reach 7: what float32 sums in another order may differ by
IDS = np.random.default_rng(1).integers(3, VOCABULARY, (3, 40))


def open_graph(folder):
    return FastGraph(folder, write_fast(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_logits_of_torch_in_a_full_pass_and_with_the_cache(family, tmp_path):
    save_random(tmp_path, family)
    want = torch_logits(tmp_path, IDS)
    graph = open_graph(tmp_path)
    cache = graph.cache(3, 64)
    found = graph.run(IDS[:, :12], [12] * 3, cache, np.arange(36))
    worst = [abs(all_logits(found).reshape(3, 12, -1) - want[:, :12]).max()]
    for step in range(12, 40):
        found = graph.run(IDS[:, step : step + 1], [step + 1] * 3, cache, [0, 1, 2])
        worst.append(abs(all_logits(found) - want[:, step]).max())
    assert max(worst) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_stored_types_are_read_where_they_lie(dtype, tmp_path):
    save_random(tmp_path, "llama", dtype=dtype)
    graph = open_graph(tmp_path)
    found = graph.run(IDS[:1], [40], graph.cache(1, 40), np.arange(40))
    assert abs(all_logits(found) - torch_logits(tmp_path, IDS[:1])[0]).max() < TOLERANCE


def test_rows_of_different_length_run_together_and_a_prompt_runs_in_pieces(tmp_path):
    save_random(tmp_path, "llama")
    want = torch_logits(tmp_path, IDS)
    graph = open_graph(tmp_path)
    lengths, cache = [5, 9, 12], graph.cache(3, 40)
    found = graph.run(IDS[:, :12], lengths, cache, [4, 12 + 8, 24 + 11])
    for row, length in enumerate(lengths):
        assert abs(all_logits(found)[row] - want[row, length - 1]).max() < TOLERANCE
    for _ in range(8):
        ids = [[IDS[row, length]] for row, length in enumerate(lengths)]
        lengths = [length + 1 for length in lengths]
        found = graph.run(np.array(ids), lengths, cache, [0, 1, 2])
        for row, length in enumerate(lengths):
            assert abs(all_logits(found)[row] - want[row, length - 1]).max() < TOLERANCE

    cache = graph.cache(1, 40)
    graph.run(IDS[:1, :16], [16], cache, [15])
    found = graph.run(IDS[:1, 16:], [40], cache, np.arange(24))
    assert abs(all_logits(found) - want[0, 16:]).max() < TOLERANCE


def test_the_head_punishes_masks_and_counts_like_its_definition(tmp_path):
    save_random(tmp_path, "llama")
    graph = open_graph(tmp_path)
    raw = torch_logits(tmp_path, IDS)[:, -1].astype(np.float64)
    legal = np.random.default_rng(2).random((3, VOCABULARY)) < 0.3
    target = np.array([7, 8, 9])
    found = graph.run(
        IDS,
        [40] * 3,
        graph.cache(3, 40),
        [39, 79, 119],
        seen=IDS,
        penalty=np.full((3, 1), 1.5, np.float32),
        legal=legal,
        target=target,
        top_k=np.array([20], np.int64),
    )
    want = raw.copy()
    for row in range(3):
        ids = np.unique(IDS[row])
        want[row, ids] = np.where(raw[row, ids] < 0, raw[row, ids] * 1.5, raw[row, ids] / 1.5)
    want[~legal] = -np.inf
    best = np.argsort(-want, axis=1)[:, :20]
    assert (found["ids"] == best).all()
    assert np.allclose(found["scores"], np.take_along_axis(want, best, axis=1), atol=TOLERANCE)
    assert np.allclose(found["raw"], np.take_along_axis(raw, best, axis=1), atol=TOLERANCE)
    assert np.allclose(found["log_z"], np.log(np.exp(raw).sum(axis=1)), atol=TOLERANCE)
    allowed = np.where(legal, np.exp(raw), 0.0).sum(axis=1)
    assert np.allclose(found["legal_z"], np.log(allowed), atol=TOLERANCE)
    assert np.allclose(found["target_raw"], raw[np.arange(3), target], atol=TOLERANCE)


def test_a_row_with_nothing_legal_has_scores_of_minus_infinity(tmp_path):
    save_random(tmp_path, "llama")
    graph = open_graph(tmp_path)
    nothing = np.zeros((1, VOCABULARY), np.bool_)
    found = graph.run(IDS[:1, :3], [3], graph.cache(1, 3), [2], legal=nothing)
    assert np.isneginf(found["scores"]).all()
    assert np.isnan(found["legal_z"]).all()
    assert np.isfinite(found["log_z"]).all()


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0, 3000.0])
def test_both_normalisers_are_exact_for_large_vocabularies(spread):
    wide = 128_256
    logits = np.random.default_rng(4).normal(size=(5, wide)).astype(np.float32) * spread
    peak = logits.max(axis=1).astype(np.float64)
    exact = peak + np.log(np.exp(logits - peak[:, None], dtype=np.float64).sum(axis=1))
    run = normaliser()
    together = run(logits)
    np.testing.assert_allclose(together, exact, rtol=3e-7, atol=3e-5)
    assert all(run(row[None])[0] == one for row, one in zip(logits, together, strict=True))
    part = np.where(np.arange(wide) % 1000 == 0, logits, -np.inf)
    peak = part.max(axis=1).astype(np.float64)
    exact = peak + np.log(np.exp(part - peak[:, None], dtype=np.float64).sum(axis=1))
    np.testing.assert_allclose(run(part.astype(np.float32)), exact, rtol=3e-7, atol=3e-5)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf], ids=str)
@pytest.mark.parametrize("width", [4, 148, 1000, 24_000])
def test_a_logit_that_is_no_number_leaves_no_finite_normaliser(value, width):
    run, draw = normaliser(), np.random.default_rng(width)
    for place in {0, 1, width - 1, *draw.integers(width, size=40).tolist()}:
        logits = draw.normal(size=(3, width)).astype(np.float32)
        assert np.isfinite(run(logits)).all()
        logits[1, place] = value
        assert np.isfinite(run(logits)).tolist() == [True, False, True]


def normaliser():
    """Return the part of the head that normalises, as a function of logits."""
    writer = _Writer(shape=None, tensors={}, quantized={})
    writer.integers("last_axis", [-1])
    writer.log_sum("logits", "log_z")
    values = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", "width"]),
        helper.make_tensor_value_info("log_z", TensorProto.FLOAT, ["rows"]),
    ]
    graph = helper.make_graph(
        writer.nodes, "part", values[:1], values[1:], list(writer.constants.values())
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda logits: session.run(None, {"logits": logits})[0]


def test_the_graph_is_small_deterministic_and_points_into_the_published_file(tmp_path):
    save_random(tmp_path, "llama")
    before = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    shape, placed = placed_tensors(tmp_path)
    raw = write_graph(shape, placed)
    assert raw == write_graph(shape, dict(reversed(placed.items())))
    (tmp_path / "fast.onnx").write_bytes(raw)
    graph = parse_onnx(
        open_view(tmp_path / "fast.onnx"), sizes=lambda name: (tmp_path / name).stat().st_size
    )
    assert len(raw) < 32 * 1024
    assert (graph.inputs, graph.outputs) == interface(shape.layers)
    spans = {(part.tensor, part.offset, part.length) for part in graph.external}
    assert spans == {
        (one.tensor.name, one.tensor.start, one.tensor.end - one.tensor.start)
        for one in placed.values()
    }
    FastGraph(tmp_path, shape)
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest() == before


@pytest.mark.parametrize("family", ["llama", "llama-linear", "qwen3"])
def test_rotary_frequencies_are_those_of_the_public_library(family, tmp_path):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    save_random(tmp_path, family)
    shape, _ = placed_tensors(tmp_path)
    want = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq.numpy()
    assert np.allclose(shape.rope.frequencies(shape.head_dim), want, rtol=3e-7)
    assert Rope(10000.0).frequencies(4) == (1.0, 0.01)
