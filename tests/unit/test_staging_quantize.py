"""Fewer bits a weight: the recipe, the file, and the graph that reads it."""

import hashlib

import hypothesis.strategies as st
import numpy as np
import pytest
from coded_faults import IN_GRAPH, seed_graph
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
from bundle.staging.parity import MAX_PART, MAX_SCALE, MAX_STEP, TOLERANCE
from bundle.staging.parity_main import Fast, exact_twin, misfit, open_session, with_logits
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


class Coded:
    """A model of codes: its graph, and the logits of what the codes stand for."""

    def __init__(self, folder, precision):
        save_random(folder, "llama-bias")
        self.folder, (self.shape, placed) = folder, placed_tensors(folder)
        self.found = quantize(placed, folder, folder / "codes.safetensors", precision=precision)
        self.linear = {name for name, one in placed.items() if is_linear(name, one.tensor)}
        self.raw = write_graph(self.shape, placed, self.found)
        (folder / "stands-for").mkdir()
        self.want = torch_logits(stand_for(folder, placed, self.found), IDS)[0]

    def logits(self, raw, rows=1):
        """Return what a graph answers; of several rows the second."""
        (self.folder / "fast.onnx").write_bytes(raw)
        graph = FastGraph(self.folder, self.shape)
        places = np.arange(24) + 24 * (rows - 1)
        ids = IDS.repeat(rows, axis=0)
        return all_logits(graph.run(ids, [24] * rows, graph.cache(rows, 24), places))

    def rounded(self, raw):
        """Return how far a graph is, root mean square, as a part of the logits' spread."""
        gap = ((self.logits(raw) - self.want) ** 2).mean() ** 0.5
        return float(gap / self.want.std(axis=1).mean())

    def exact(self, raw):
        """Return the furthest logit of the exact twin of a graph."""
        return float(abs(self.logits(exact_twin(raw)) - self.want).max())

    def changed(self, change):
        """Return the graph with a fault."""
        path = self.folder / "fast.onnx"
        path.write_bytes(self.raw)
        seed_graph(path, change)
        return path.read_bytes()


@pytest.fixture(scope="module", params=BITS)
def coded(request, tmp_path_factory):
    return Coded(tmp_path_factory.mktemp(request.param), request.param)


def test_the_graph_gives_the_logits_of_the_weights_that_the_codes_stand_for(coded):
    assert set(coded.found) == coded.linear
    assert "lm_head.weight" in coded.found
    assert "model.embed_tokens.weight" not in coded.found
    (coded.folder / "fast.onnx").write_bytes(coded.raw)
    parse_onnx(
        open_view(coded.folder / "fast.onnx"),
        sizes=lambda name: (coded.folder / name).stat().st_size,
    )
    assert 1e-4 < coded.rounded(coded.raw) < float(MAX_PART) / 5  # activations have 8 bits
    # And a row the same bits in any batch.
    assert np.array_equal(coded.logits(coded.raw, rows=3), coded.logits(coded.raw))
    assert coded.exact(coded.raw) < float(TOLERANCE) / 5
    published = torch_logits(coded.folder, IDS)[0]
    assert abs(coded.logits(exact_twin(coded.raw)) - published).max() > 1e-3  # not those


@pytest.mark.parametrize("fault", IN_GRAPH.values(), ids=IN_GRAPH)
def test_the_exact_twin_shows_what_the_limit_of_rounding_lets_pass(coded, fault):
    assert coded.exact(coded.raw) < float(TOLERANCE)
    wrong = coded.changed(fault)
    assert coded.rounded(wrong) < float(MAX_PART)
    assert coded.exact(wrong) > 2 * float(TOLERANCE)


PAIRS = [("self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_two_matrices_in_each_others_place_are_far_from_both_limits(coded, pair):
    def exchange(model, _folder):
        nodes = [
            next(
                n
                for n in model.graph.node
                if n.op_type == "MatMulNBits" and f"layers.1.{name}" in n.input[1]
            )
            for name in pair
        ]
        for place in (1, 2):
            inputs = [node.input[place] for node in nodes]
            nodes[0].input[place], nodes[1].input[place] = inputs[1], inputs[0]

    assert coded.exact(coded.raw) < float(TOLERANCE)
    wrong = coded.changed(exchange)
    assert coded.exact(wrong) > 1000 * float(TOLERANCE)
    assert coded.rounded(wrong) > float(MAX_PART)


def test_the_exact_twin_differs_from_its_graph_in_its_levels_alone(coded):
    import onnx

    twin = exact_twin(coded.raw)
    differing = [(one, other) for one, other in zip(coded.raw, twin, strict=True) if one != other]
    assert differing == [(4, 1)] * len(coded.found)  # a byte a product, and not one more
    graphs = [onnx.load_model_from_string(raw).graph for raw in (coded.raw, twin)]
    for one, other in zip(*(graph.node for graph in graphs), strict=True):
        if one.op_type == "MatMulNBits":
            level = next(a for a in other.attribute if a.name == "accuracy_level")
            assert level.i == 1
            level.i = 4
        assert one == other


def test_whole_logits_are_read_from_the_graph_with_one_output_more(coded):
    import onnx

    wide = with_logits(coded.raw)
    model = onnx.load_model_from_string(wide)
    assert len(model.graph.output) == len(onnx.load_model_from_string(coded.raw).graph.output) + 1
    path = coded.folder / "wide.onnx"  # of which there is no file
    assert not path.exists()
    ids = IDS[0].tolist()
    assert np.array_equal(Fast(open_session(path, wide)).logits(ids), coded.logits(coded.raw))
    with pytest.raises(ValueError, match="output"):
        with_logits(coded.raw + onnx.ModelProto(ir_version=10).SerializeToString())


def no_product(graph):
    del graph.node[:]


def other_level(graph):
    node = next(n for n in graph.node if n.op_type == "MatMulNBits")
    next(a for a in node.attribute if a.name == "accuracy_level").i = 2


def test_a_graph_whose_twin_would_be_another_in_more_has_none(coded):
    import onnx

    assert exact_twin(coded.raw)
    for change in (no_product, other_level):
        model = onnx.load_model_from_string(coded.raw)
        change(model.graph)
        with pytest.raises(ValueError, match="exact twin"):
            exact_twin(model.SerializeToString(deterministic=True))
    # Fields in another order mean the same, but are not the bytes that travel.
    first = onnx.ModelProto(ir_version=10).SerializeToString()
    assert coded.raw.startswith(first)
    with pytest.raises(ValueError, match="exact twin"):
        exact_twin(coded.raw[len(first) :] + first)


@given(
    bits=st.sampled_from(list(BITS.values())),
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 100),
    size=st.sampled_from([1e-38, 1e-20, 1.0, 1e20]),
)
def test_codes_of_the_recipe_fit_their_weights(bits, seed, width, size):
    random = np.random.default_rng(seed)
    weights = (random.normal(size=(3, width)) * size).astype(np.float32)
    weights[random.random(weights.shape) < 0.3] = 0.0
    step, scale = misfit(weights, *quantize_rows(weights, bits))
    assert step <= MAX_STEP
    assert scale <= MAX_SCALE


@pytest.mark.parametrize("bits", BITS.values())
def test_one_wrong_code_or_scale_fits_no_more(bits):
    weights = np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32)
    weights[1] = 0.0
    codes, scales = quantize_rows(weights, bits)
    assert max(misfit(weights, codes, scales)) <= MAX_STEP
    for place, byte in ((0, 1), (2, 5)):
        wrong = codes.copy()
        wrong[place, 1, byte] += 1  # one step, in one weight
        assert misfit(weights, wrong, scales)[0] > MAX_STEP
    for value in (scales[2, 0] * 1.0001, -scales[2, 0], np.float32(0), np.float32(np.nan)):
        wrong = scales.copy()
        wrong[2, 0] = value
        step, scale = misfit(weights, codes, wrong)
        assert not (step <= float(MAX_STEP) and scale <= float(MAX_SCALE))
    wrong = scales.copy()
    wrong[1, 1] = 0.01  # where all weights are nought
    assert misfit(weights, codes, wrong)[1] > MAX_SCALE


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
