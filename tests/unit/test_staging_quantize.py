"""Fewer bits a weight: the recipe, the file, and the graph that reads it."""

import hashlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from random_models import (
    VOCABULARY,
    FastGraph,
    all_logits,
    placed_tensors,
    save_random,
    torch_logits,
)

from bundle.scan.onnx import parse_onnx
from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import open_view
from bundle.staging.graph import write_graph
from bundle.staging.parity import MAX_PART
from bundle.staging.quantize import BITS, dequantize_rows, is_linear, quantize, quantize_rows

IDS = np.random.default_rng(1).integers(3, VOCABULARY, (1, 24))


@pytest.mark.parametrize("bits", BITS.values())
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), width=st.integers(1, 100))
def test_a_code_is_never_further_than_a_step_from_its_weight(bits, seed, rows, width):
    weights = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    codes, scales = quantize_rows(weights, bits)
    back = dequantize_rows(codes, scales, bits)
    step = abs(scales).repeat(32, axis=1)
    assert (abs(back[:, :width] - weights) <= step[:, :width] * 1.001).all()
    assert (back[:, width:] == 0.0).all()
    largest = abs(weights).max(axis=1)
    assert np.allclose(abs(back).max(axis=1), largest, rtol=1e-6)  # the largest is met exactly


def test_a_block_of_zeros_stays_zero():
    codes, scales = quantize_rows(np.zeros((2, 64), np.float32), 4)
    assert (dequantize_rows(codes, scales, 4) == 0.0).all()


@pytest.mark.parametrize("precision", BITS)
def test_the_graph_gives_the_logits_of_the_weights_that_the_codes_stand_for(precision, tmp_path):
    save_random(tmp_path, "llama-bias")
    shape, placed = placed_tensors(tmp_path)
    found = quantize(placed, tmp_path, tmp_path / "codes.safetensors", precision=precision)
    assert set(found) == {name for name, one in placed.items() if is_linear(name, one.tensor)}
    assert "lm_head.weight" in found
    assert "model.embed_tokens.weight" not in found
    (tmp_path / "fast.onnx").write_bytes(write_graph(shape, placed, found))
    parse_onnx(
        open_view(tmp_path / "fast.onnx"), sizes=lambda name: (tmp_path / name).stat().st_size
    )
    (tmp_path / "stands-for").mkdir()
    want = torch_logits(stand_for(tmp_path, placed, found), IDS)[0]
    graph = FastGraph(tmp_path, shape)
    ours = all_logits(graph.run(IDS, [24], graph.cache(1, 24), np.arange(24)))
    rounded = ((ours - want) ** 2).mean() ** 0.5 / want.std(axis=1).mean()
    assert 1e-4 < rounded < float(MAX_PART) / 5  # activations have 8 bits
    rows = graph.run(IDS.repeat(3, axis=0), [24] * 3, graph.cache(3, 24), np.arange(24, 48))
    assert np.array_equal(all_logits(rows), ours)  # and a row the same bits in any batch
    right = (tmp_path / "fast.onnx").read_bytes()
    for pair in (("self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        exchange(tmp_path / "fast.onnx", *(f"layers.1.{name}" for name in pair))
        graph = FastGraph(tmp_path, shape)
        wrong = all_logits(graph.run(IDS, [24], graph.cache(1, 24), np.arange(24)))
        fault = float(((wrong - want) ** 2).mean() ** 0.5 / want.std(axis=1).mean())
        assert fault > float(MAX_PART), pair
        (tmp_path / "fast.onnx").write_bytes(right)
    in_full(tmp_path / "fast.onnx")
    graph = FastGraph(tmp_path, shape)
    ours = all_logits(graph.run(IDS, [24], graph.cache(1, 24), np.arange(24)))
    assert abs(ours - want).max() < 2e-4
    assert abs(ours - torch_logits(tmp_path, IDS)[0]).max() > 1e-3  # and not the published ones


def exchange(path, one, other):
    """Have two matrices of codes take each other's place in a graph."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    nodes = [
        next(n for n in model.graph.node if n.op_type == "MatMulNBits" and name in n.input[1])
        for name in (one, other)
    ]
    for place in (1, 2):
        inputs = [node.input[place] for node in nodes]
        nodes[0].input[place], nodes[1].input[place] = inputs[1], inputs[0]
    onnx.save(model, path)


def in_full(path):
    """Have the same graph compute its products in fp32, without rounding an activation."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    levels = [
        attribute
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert {attribute.i for attribute in levels} == {4}
    for attribute in levels:
        attribute.i = 1
    onnx.save(model, path)


def stand_for(folder, placed, found):
    """Write a snapshot whose matrices are what the codes stand for."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    target = folder / "stands-for"
    tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    raw = (folder / "codes.safetensors").read_bytes()
    for name, one in found.items():
        rows, width = placed[name].tensor.shape
        codes, scales = (
            np.frombuffer(raw[t.start : t.end], dtype=kind).reshape(t.shape)
            for t, kind in ((one.codes.tensor, np.uint8), (one.scales.tensor, np.float32))
        )
        assert codes.shape[0] == rows
        tensors[name] = torch.tensor(dequantize_rows(codes, scales, one.bits)[:, :width])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "config.json", target)
    return target


def test_the_file_is_strict_safetensors_and_the_same_each_time(tmp_path):
    save_random(tmp_path, "llama")
    _, placed = placed_tensors(tmp_path)
    told, digests = [], set()
    for name in ("a.safetensors", "b.safetensors"):
        quantize(
            placed,
            tmp_path,
            tmp_path / name,
            precision="int4",
            progress=lambda done, total: told.append((done, total)),
        )
        parse_safetensors(open_view(tmp_path / name))
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1
    assert told[-1][0] == told[-1][1] == len(told) // 2
    with pytest.raises(FileExistsError):
        quantize(placed, tmp_path, tmp_path / "a.safetensors", precision="int4")
