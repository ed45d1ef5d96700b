"""Execution providers of onnxruntime: a demand and not a wish (docs/design/inference.md, 6).

onnxruntime falls back to the CPU with a line in a log when a provider cannot start. Here that is a
refusal: what the session reports must be what was demanded. The options come from `options`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import Graph, ModelFacts
from airgap.inference.options import PROVIDERS, Setup, provider_options

__all__ = ["NATIVE_ERRORS", "PROVIDERS", "open_session", "require_provider"]

# onnxruntime's exceptions share no base but Exception; a bound run raises RuntimeError.
NATIVE_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    native.EPFail,
    native.EngineError,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
)
_FATAL_ONLY = 4  # of onnxruntime's severities: an error arrives as an exception, not in a log


def open_session(
    graph: Path,
    *,
    demand: str,
    threads: int,
    setup: Setup | None = None,
    facts: ModelFacts | None = None,
    described: Graph | None = None,
) -> ort.InferenceSession:
    """Open `graph` on the provider `demand`, a key of `PROVIDERS`, with its thread pool.

    Args:
        graph: The file.
        demand: A key of `PROVIDERS`.
        threads: Of the pool that computes.
        setup: Everything else about how it runs.
        facts: Of the model, for providers whose options need its shapes.
        described: What `graphs.json` says of the graph, for the same.

    Raises:
        ProgramError: `model.provider`, absent or replaced by another; `model.graph`, not loadable.

    """
    setup = replace(setup or Setup(), threads=threads)
    wanted = PROVIDERS[demand][0]
    available = ort.get_available_providers()
    if wanted not in available:
        raise ProgramError(
            "model.provider",
            f"provider {wanted} was demanded; this onnxruntime offers {', '.join(available)}",
            "demand `cpu`, or install the wheel for this provider from the bundle; "
            "airgap doctor --gpu says what is missing",
        )
    offered = provider_options(demand, setup, facts, described)
    if demand != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # from the wheels, before the seal: none can be opened later
    try:
        session = ort.InferenceSession(
            str(graph),
            session_options(setup, demand),
            providers=[name for name, _ in offered],
            provider_options=[options for _, options in offered],
        )
    except NATIVE_ERRORS as error:
        raise ProgramError(
            "model.graph",
            f"onnxruntime refuses {graph.name}: {str(error)!r:.300}",
            "verify the installed bundle; build it again if its files are intact",
        ) from error
    require_provider(session, wanted)
    return session


def require_provider(session: Any, wanted: str) -> None:
    """Refuse with `model.provider` unless the first provider of `session` is `wanted`."""
    found = session.get_providers()
    if not found or found[0] != wanted:
        raise ProgramError(
            "model.provider",
            f"provider {wanted} was demanded; the session runs on {', '.join(found) or 'none'}",
            "check the device and its driver (airgap doctor --gpu), or demand `cpu`",
        )


def session_options(setup: Setup, demand: str) -> ort.SessionOptions:
    """Return the options of the session itself: pools, memory, order of sums."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = setup.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _FATAL_ONLY
    # A pattern is kept for each shape, and each step of a sequence has a new one: it only grows.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = setup.arena
    options.use_deterministic_compute = setup.deterministic and demand != "cpu"
    if not setup.spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
