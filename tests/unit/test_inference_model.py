"""Loading: a model that is not what graphs.json says never runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from inference_models import change_graph, model_folder, rewrite, write_model

from airgap.enclave.channel import ProgramError
from airgap.inference.model import Cache, load_model
from airgap.inference.providers import PROVIDERS, require_provider


def load(folder, precision="fp32", demand="cpu"):
    return load_model(folder, precision=precision, demand=demand, threads=1)


def refused(folder, **options):
    load(model_folder())
    with pytest.raises(ProgramError) as caught:
        load(folder, **options)
    return caught.value.code


def test_a_model_loads_on_the_provider_that_was_demanded():
    assert load(model_folder()).provider == "CPUExecutionProvider"


@pytest.mark.parametrize("name", ["graphs.json", "tokenizer.json", "model.onnx"])
def test_a_missing_file_is_refused(name, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / name).unlink()
    assert refused(folder) == "model.file"


def test_missing_external_weights_are_refused(tmp_path):
    def change(document):
        document["graphs"][0]["external"] = [{"path": "model.onnx_data", "sha256": "0" * 64}]

    assert refused(write_model(tmp_path / "model", change)) == "model.file"


def test_a_file_beyond_its_limit_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    with (folder / "graphs.json").open("ab") as stream:
        stream.truncate(2 << 20)
    assert refused(folder) == "model.file"


def test_a_graph_with_another_digest_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    raw = bytearray((folder / "model.onnx").read_bytes())
    raw[-1] ^= 1
    (folder / "model.onnx").write_bytes(raw)
    assert refused(folder) == "model.graph"


@pytest.mark.parametrize("raw", [b"", b"\x00" * 100, b"not a graph"], ids=repr)
def test_bytes_that_are_no_graph_are_refused(raw, tmp_path):
    folder = write_model(tmp_path / "model")
    rewrite(folder, "model.onnx", raw)
    assert refused(folder) == "model.graph"


def test_a_truncated_graph_is_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    rewrite(folder, "model.onnx", (folder / "model.onnx").read_bytes()[:100_000])
    assert refused(folder) == "model.graph"


def cast_cache(graph):
    """Let the first cache input be half precision, as a graph of another precision has it."""
    value = next(v for v in graph.input if v.name == "past_key_values.0.key")
    value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    graph.node.insert(
        0, onnx.helper.make_node("Cast", [value.name], ["wide"], to=onnx.TensorProto.FLOAT)
    )
    for node in list(graph.node)[1:]:
        for place, name in enumerate(node.input):
            if name == value.name:
                node.input[place] = "wide"


def drop_mask_input(graph):
    value = next(v for v in graph.input if v.name == "attention_mask")
    value.name = "mask"
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[place] = "mask"


SIGNATURES = {"mixed cache types": cast_cache, "another input": drop_mask_input}


@pytest.mark.parametrize("change", SIGNATURES.values(), ids=SIGNATURES.keys())
def test_a_graph_with_another_signature_is_refused(change, tmp_path):
    assert refused(change_graph(write_model(tmp_path / "model"), change)) == "model.graph"


@pytest.mark.parametrize("field", ["kv_heads", "head_dim"])
def test_a_graph_of_another_shape_is_refused(field, tmp_path):
    def change(document):
        document[field] += 1

    assert refused(write_model(tmp_path / "model", change)) == "model.graph"


def test_a_graph_of_another_vocabulary_is_refused(tmp_path):
    def change(document):
        document["vocab_size"] += 8

    assert refused(write_model(tmp_path / "model", change)) == "model.graph"


def test_a_graph_that_hides_its_vocabulary_fails_without_writing_past_the_buffer(tmp_path):
    def hide(graph):
        logits = next(value for value in graph.output if value.name == "logits")
        logits.type.tensor_type.shape.dim[2].dim_param = "anything"

    for size in (-8, 8):
        folder = change_graph(write_model(tmp_path / f"model{size}"), hide)
        model = load(folder)
        assert isinstance(model.session.get_outputs()[0].shape[2], (str, int))
        model.facts = replace(model.facts, vocab_size=model.facts.vocab_size + size)
        with pytest.raises(ProgramError) as caught:
            model.run(np.array([[5]]), Cache(model, rows=1, capacity=4), 0)
        assert caught.value.code == "model.run"


def test_a_precision_that_is_not_there_is_refused():
    assert refused(model_folder(), precision="int4") == "model.precision"


@pytest.mark.parametrize("demand", ["cuda", "tensorrt"])
def test_a_provider_that_is_absent_is_refused(demand):
    import onnxruntime

    if PROVIDERS[demand][0] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    assert refused(model_folder(), demand=demand) == "model.provider"


def test_a_session_that_fell_back_to_the_cpu_is_refused():
    class Fallen:
        def get_providers(self):
            return ["CPUExecutionProvider"]

    require_provider(Fallen(), "CPUExecutionProvider")
    with pytest.raises(ProgramError) as caught:
        require_provider(Fallen(), "CUDAExecutionProvider")
    assert caught.value.code == "model.provider"


def test_a_prompt_in_pieces_gives_the_logits_of_one_run(monkeypatch):
    model = load(model_folder())
    ids = np.random.default_rng(1).integers(4, model.facts.vocab_size, 37).tolist()
    whole = model.prefill(ids, Cache(model, rows=1, capacity=40))
    monkeypatch.setattr("airgap.inference.model.PIECE_BYTES", 4 * model.facts.vocab_size * 5)
    assert model.piece == 5
    pieces = model.prefill(ids, Cache(model, rows=1, capacity=40))
    assert np.allclose(whole, pieces, atol=1e-5)


def test_a_failing_run_is_a_refusal_with_a_code():
    model = load(model_folder())
    with pytest.raises(ProgramError) as caught:
        model.run(np.array([[10_000]]), Cache(model, rows=1, capacity=4), 0)
    assert caught.value.code == "model.run"
