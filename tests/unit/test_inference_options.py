"""Options of providers from the graph manifest: every input named, and refusals without a GPU."""

from dataclasses import replace

import inference_models as models
import onnxruntime
import pytest

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import parse_graphs
from airgap.inference.options import PROVIDERS, Setup, Shapes, profiles, provider_options
from airgap.inference.program import create
from airgap.inference.providers import open_session, session_options

SHAPES = Shapes(rows=8, capacity=256, piece=64)


def facts():
    return parse_graphs((models.fast_folder() / "graphs.json").read_bytes())


def parsed(text):
    pairs = (one.rsplit(":", 1) for one in text.split(","))
    return {name: tuple(int(size) for size in shape.split("x")) for name, shape in pairs}


def test_each_profile_names_every_input_of_the_graph_and_no_other():
    known = facts()
    graph = known.graph("fp32", ("past",))
    found = {name: parsed(text) for name, text in profiles(known, graph, SHAPES).items()}
    assert set(found) == {f"trt_profile_{kind}_shapes" for kind in ("min", "opt", "max")}
    for shapes in found.values():
        assert set(shapes) == set(graph.inputs)
        assert len([name for name in shapes if "past" in name]) == 2 * known.layers
    least, usual, most = (found[f"trt_profile_{kind}_shapes"] for kind in ("min", "opt", "max"))
    for name in graph.inputs:
        triples = zip(least[name], usual[name], most[name], strict=True)
        assert all(low <= middle <= high for low, middle, high in triples), name


@pytest.mark.parametrize(("layers", "count"), [(16, 32), (36, 72)])
def test_a_deep_model_gets_a_shape_for_each_key_and_value(layers, count):
    known = replace(facts(), layers=layers)
    graph = replace(
        known.graph("fp32", ("past",)),
        inputs=("input_ids", "attention_mask", "position_ids", *known.past_inputs),
    )
    shapes = parsed(profiles(known, graph, SHAPES)["trt_profile_max_shapes"])
    assert len([name for name in shapes if name.startswith("past_key_values.")]) == count


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("new", [1, 64])
@pytest.mark.parametrize("cached", [0, 100, 192])
def test_every_run_within_the_sizes_lies_in_the_profile(rows, new, cached):
    known = facts()
    text = profiles(known, known.graph("fp32", ("past",)), SHAPES)
    least, most = (parsed(text[f"trt_profile_{kind}_shapes"]) for kind in ("min", "max"))
    run = {
        "input_ids": (rows, new),
        "position_ids": (rows, new),
        "attention_mask": (rows, cached + new),
        **dict.fromkeys(known.past_inputs, (rows, known.kv_heads, cached, known.head_dim)),
    }
    for name, shape in run.items():
        bounds = zip(least[name], shape, most[name], strict=True)
        assert all(low <= size <= high for low, size, high in bounds), name


def refusal(call, *given, **named):
    with pytest.raises(ProgramError) as caught:
        call(*given, **named)
    return caught.value.code


def test_tensorrt_takes_no_contrib_operators_no_unknown_input_and_no_longer_context():
    known = facts()
    graph = known.graph("fp32", ("past",))
    assert profiles(known, graph, SHAPES)
    assert refusal(profiles, known, known.graph("fp32"), SHAPES) == "model.provider"
    odd = replace(graph, inputs=(*graph.inputs, "position_bias"))
    assert refusal(profiles, known, odd, SHAPES) == "model.provider"
    long = replace(SHAPES, capacity=known.max_context + 1)
    assert refusal(profiles, known, graph, long) == "model.provider"
    assert refusal(Shapes, 0, 256, 64) == "model.config"
    assert refusal(Shapes, 1, 63, 64) == "model.config"


def test_tensorrt_without_engines_is_refused_and_with_them_reads_and_never_builds(tmp_path):
    known = facts()
    graph = known.graph("fp32", ("past",))
    assert refusal(provider_options, "tensorrt", Setup()) == "model.provider"
    setup = Setup(engines=tmp_path, shapes=SHAPES, device=1, device_mb=100)
    (name, options), (last, _) = provider_options("tensorrt", setup, known, graph)
    assert (name, last) == ("TensorrtExecutionProvider", "CPUExecutionProvider")
    assert options["device_id"] == "1"
    assert options["trt_engine_cache_path"] == str(tmp_path)
    assert options["trt_timing_cache_path"].startswith(str(tmp_path))
    assert (options["trt_ep_context_embed_mode"], options["trt_dump_ep_context_model"]) == (
        "0",
        "0",
    )
    assert options["trt_max_workspace_size"] == str(100 << 20)
    built = provider_options("tensorrt", replace(setup, build=True), known, graph)[0][1]
    assert built["trt_dump_ep_context_model"] == "1"
    half = provider_options("tensorrt", setup, known, replace(graph, precision="fp16"))[0][1]
    assert (half["trt_fp16_enable"], half["trt_bf16_enable"]) == ("1", "0")


def test_cuda_states_its_arena_its_device_and_its_order_of_sums():
    name, options = provider_options("cuda", Setup(device=2, device_mb=1024))[0]
    assert name == "CUDAExecutionProvider"
    assert options["device_id"] == "2"
    assert options["gpu_mem_limit"] == str(1 << 30)
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert (options["use_tf32"], options["enable_cuda_graph"]) == ("0", "0")
    fast = provider_options("cuda", Setup(deterministic=False))[0][1]
    assert (fast["use_tf32"], "gpu_mem_limit" in fast) == ("1", False)


def test_a_session_of_this_onnxruntime_takes_the_settings_and_refuses_a_gpu(tmp_path):
    options = session_options(Setup(threads=3, spin=False, arena=False), "cpu")
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    assert options.enable_cpu_mem_arena is False
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert session_options(Setup(), "cuda").use_deterministic_compute is True
    graph = models.fast_folder() / "fast.onnx"
    setup = Setup(spin=False, arena=False, engines=tmp_path, shapes=SHAPES)
    session = open_session(graph, demand="cpu", threads=1, setup=setup)
    assert session.get_providers()[0] == "CPUExecutionProvider"
    for demand in ("cuda", "tensorrt"):
        if PROVIDERS[demand][0] in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has the provider")
        code = refusal(open_session, graph, demand=demand, threads=1, setup=setup)
        assert code == "model.provider"


def test_the_facts_of_a_worker_say_how_it_runs():
    config = {"folder": str(models.fast_folder()), "precision": "fp32", "threads": 1}
    said = create({**config, "spin": False, "arena": False}).warm_up()
    assert (said["spin"], said["arena"], said["threads"]) == (False, False, 1)
    assert refusal(create, {**config, "spin": 1}) == "model.config"
    assert refusal(create, {**config, "device": 64}) == "model.config"
