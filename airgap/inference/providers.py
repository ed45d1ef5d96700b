"""Execution providers of onnxruntime: a demand and not a wish (docs/design/inference.md, 6).

onnxruntime falls back to the CPU with a line in a log when a provider cannot start. Here that is a
refusal: what the session reports must be what was demanded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as native

from airgap.enclave.channel import ProgramError

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CPUExecutionProvider"],
}
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


def open_session(graph: Path, *, demand: str, threads: int) -> ort.InferenceSession:
    """Open `graph` on the provider `demand`, a key of `PROVIDERS`, with its thread pool.

    Raises:
        ProgramError: `model.provider`, absent or replaced by another; `model.graph`, not loadable.

    """
    wanted = PROVIDERS[demand]
    available = ort.get_available_providers()
    if wanted[0] not in available:
        raise ProgramError(
            "model.provider",
            f"provider {wanted[0]} was demanded; this onnxruntime offers {', '.join(available)}",
            "demand `cpu`, or install the wheel for this provider from the bundle",
        )
    try:
        session = ort.InferenceSession(str(graph), _options(threads), providers=wanted)
    except NATIVE_ERRORS as error:
        raise ProgramError(
            "model.graph",
            f"onnxruntime refuses {graph.name}: {str(error)!r:.300}",
            "verify the installed bundle; build it again if its files are intact",
        ) from error
    require_provider(session, wanted[0])
    return session


def require_provider(session: Any, wanted: str) -> None:
    """Refuse with `model.provider` unless the first provider of `session` is `wanted`."""
    found = session.get_providers()
    if not found or found[0] != wanted:
        raise ProgramError(
            "model.provider",
            f"provider {wanted} was demanded; the session runs on {', '.join(found) or 'none'}",
            "check the device and its driver, or demand `cpu`",
        )


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _FATAL_ONLY
    # A pattern is kept for each shape, and each step of a sequence has a new one: it only grows.
    options.enable_mem_pattern = False
    return options
