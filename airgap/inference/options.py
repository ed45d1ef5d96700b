"""The options of each execution provider, from the graph manifest (docs/design/inference.md, 6).

Nothing here is left to a default that another version may change. For TensorRT the profiles name
every input that `graphs.json` names, with each key and value tensor: one that is missing would make
it build a new engine whenever the cache grows. Engines are read from a folder that the lab signed
(`airgap.engines`) and are never built while a request waits.

Written from the documentation of onnxruntime: not run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import FAST, Graph, ModelFacts

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CPUExecutionProvider"],
}
_MIB = 1 << 20
_CONTEXT = "engine_ctx.onnx"
_TIMING = "timing.cache"


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes that a TensorRT engine is built for.

    Args:
        rows: Widest batch.
        capacity: Most positions of a sample, prompt included.
        piece: Most ids that run at once.

    """

    rows: int
    capacity: int
    piece: int

    def __post_init__(self) -> None:
        """Refuse sizes that no run could have."""
        if min(self.rows, self.capacity, self.piece) < 1 or self.piece > self.capacity:
            raise ProgramError(
                "model.config",
                f"engine for {self.rows} rows, {self.capacity} positions, {self.piece} at once: "
                "each must be 1 or more, and no piece longer than the capacity",
                "set the sizes within the context of the model",
            )


@dataclass(frozen=True, slots=True)
class Setup:
    """How a session is to run.

    Attributes:
        threads: Of the pool that computes; the other pool has one.
        spin: Threads wait by spinning: faster where the cores are ours alone.
        arena: Memory of the CPU is kept from run to run.
        device: Number of the GPU.
        device_mb: Most memory of the GPU; None for all of it.
        deterministic: On a GPU, ask for kernels that add up in one order; slower, and recorded.
        engines: Folder of signed engines, for `tensorrt`.
        shapes: What the engines were built for, for `tensorrt`.
        build: Build engines into `engines` (at install, never while serving).

    """

    threads: int = 1
    spin: bool = True
    arena: bool = True
    device: int = 0
    device_mb: int | None = None
    deterministic: bool = True
    engines: Path | None = None
    shapes: Shapes | None = None
    build: bool = False

    def document(self) -> dict[str, object]:
        """Return what the facts of a worker say of it."""
        return {
            "threads": self.threads,
            "spin": self.spin,
            "arena": self.arena,
            "device": self.device,
            "deterministic": self.deterministic,
        }


def provider_options(
    demand: str, setup: Setup, facts: ModelFacts | None = None, graph: Graph | None = None
) -> list[tuple[str, dict[str, str]]]:
    """Return each provider with its options, the demanded one first.

    Args:
        demand: A key of `PROVIDERS`.
        setup: How to run.
        facts: Of the model; needed for `tensorrt`.
        graph: The graph that will run; needed for `tensorrt`.

    Raises:
        ProgramError: `model.provider`, TensorRT with a graph or a set-up that it cannot take.

    """
    cpu: tuple[str, dict[str, str]] = (PROVIDERS["cpu"][0], {})  # its options are the session's
    if demand == "cpu":
        return [cpu]
    device = {"device_id": str(setup.device)}
    if demand == "cuda":
        limit = {} if setup.device_mb is None else {"gpu_mem_limit": str(setup.device_mb * _MIB)}
        return [(PROVIDERS[demand][0], {**device, **limit, **_cuda(setup)}), cpu]
    return [(PROVIDERS[demand][0], {**device, **_tensorrt(setup, facts, graph)}), cpu]


def _cuda(setup: Setup) -> dict[str, str]:
    return {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "DEFAULT",
        "do_copy_in_default_stream": "1",
        "enable_cuda_graph": "0",  # every step of a sequence has a shape of its own
        "use_tf32": "0" if setup.deterministic else "1",
    }


def _tensorrt(setup: Setup, facts: ModelFacts | None, graph: Graph | None) -> dict[str, str]:
    if facts is None or graph is None or setup.engines is None or setup.shapes is None:
        raise ProgramError(
            "model.provider",
            "TensorRT was demanded without the engines of this GPU",
            "demand `cuda`, which needs none",
        )
    limit = (
        {} if setup.device_mb is None else {"trt_max_workspace_size": str(_MIB * setup.device_mb)}
    )
    folder = str(setup.engines)
    return {
        "trt_fp16_enable": "1" if graph.precision == "fp16" else "0",
        "trt_bf16_enable": "1" if graph.precision == "bf16" else "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": f"{folder}/{_TIMING}",
        "trt_dump_ep_context_model": "1" if setup.build else "0",
        "trt_ep_context_file_path": f"{folder}/{_CONTEXT}",
        "trt_ep_context_embed_mode": "0",
        "trt_context_memory_sharing_enable": "1",
        "trt_force_sequential_engine_build": "1",
        **limit,
        **profiles(facts, graph, setup.shapes),
    }


def profiles(facts: ModelFacts, graph: Graph, shapes: Shapes) -> dict[str, str]:
    """Return the least, usual and largest shape of every input of `graph`, as TensorRT reads them.

    Raises:
        ProgramError: `model.provider`; the graph is none that TensorRT takes, or has an input
            whose shape is not known here.

    """
    if graph.interface == FAST:
        raise ProgramError(
            "model.provider",
            f"graph {graph.name} holds operators that TensorRT does not have",
            "demand `cuda` for this graph, or tensorrt with a bundle that has the reference graph",
        )
    if shapes.capacity > facts.max_context:
        raise ProgramError(
            "model.provider",
            f"engines for {shapes.capacity} positions; {facts.model} has {facts.max_context}",
            "build them within the context of the model",
        )
    rows, piece, capacity = shapes.rows, shapes.piece, shapes.capacity
    points = {  # rows, new ids, ids that are cached
        "min": (1, 1, 0),
        "opt": (rows, 1, max(1, capacity // 2)),
        "max": (rows, piece, capacity),
    }
    return {
        f"trt_profile_{name}_shapes": ",".join(
            f"{one}:{'x'.join(str(size) for size in _shape(one, facts, *point))}"
            for one in graph.inputs
        )
        for name, point in points.items()
    }


def _shape(name: str, facts: ModelFacts, rows: int, new: int, cached: int) -> tuple[int, ...]:
    if name in ("input_ids", "position_ids"):
        return rows, new
    if name == "attention_mask":
        # At the largest point the cache is full but for the new ids: both bounds must cover a run.
        return rows, cached + new
    if name in facts.past_inputs:
        return rows, facts.kv_heads, cached, facts.head_dim
    raise ProgramError(
        "model.provider",
        f"input {name!r:.80} has no shape that an engine could be built for",
        "build the bundle again with this version",
    )
