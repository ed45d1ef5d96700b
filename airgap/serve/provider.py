"""Which execution provider a site demands of its worker, and what the worker is told of it.

A demand and not a wish (docs/design/inference.md, 6): what this host cannot run is refused before
anything starts, and once more by the worker, which compares it with what its session reports.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, get_args

from airgap.config import InferenceSettings
from airgap.enclave.inventory import installed
from airgap.engine_store import Engines
from policy.errors import RefusedError, UsageError

# On which of onnxruntime's providers the parity of a precision must have been claimed. A GPU also
# takes what was claimed for the CPU: the graph is the same, and the record says where it ran.
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SHOWN_ON = {
    "cpu": (_CPU,),
    "cuda": (_CUDA, _CPU),
    "tensorrt": ("TensorrtExecutionProvider", _CUDA, _CPU),
}
MOST_ROWS = 64  # of a batch, as the worker has it by itself
_CHOICES = get_args(InferenceSettings.model_fields["provider"].annotation)


def demanded(settings: InferenceSettings, provider: str = "") -> str:
    """Return the provider of this run: the one named, else that of site.toml.

    Raises:
        UsageError: `usage.argument`, no such provider.

    """
    if provider and provider not in _CHOICES:
        raise UsageError(
            "usage.argument",
            f"--provider {provider!r:.40}: one of {', '.join(_CHOICES)}",
            hint="leave it out for that of site.toml, [inference] provider",
        )
    return provider or settings.provider


def profile_of(demand: str) -> str:
    """Return the profile of the seal that a worker on this provider runs in."""
    return "worker" if demand == "cpu" else "worker-gpu"


def require_host(demand: str, versions: Mapping[str, str] | None = None) -> None:
    """Refuse a provider whose libraries this environment does not hold.

    Args:
        demand: What is demanded.
        versions: Distributions by normal name; None reads those of this interpreter.

    Raises:
        RefusedError: `model.provider`.

    """
    if demand == "cpu":
        return
    found = installed() if versions is None else versions
    missing = [] if "onnxruntime-gpu" in found else ["onnxruntime-gpu"]
    if demand == "tensorrt" and not any(name.startswith("tensorrt-cu") for name in found):
        missing.append("TensorRT")
    if missing:
        raise RefusedError(
            "model.provider",
            f"provider {demand} was demanded; this environment holds no {' and no '.join(missing)}",
            hint="airgap doctor --gpu says what is missing; or demand cpu: site.toml, [inference] "
            "provider, or --provider cpu",
        )


def worker_settings(settings: InferenceSettings, demand: str) -> dict[str, Any]:
    """Return what the worker's configuration says of provider, threads and memory.

    What is as the worker would have it anyway is left out.
    """
    usual = InferenceSettings()
    kept = ["spin", "arena", "memory_mb"]
    if demand != "cpu":
        kept += ["device", "device_mb", "deterministic"]
    said = {name: getattr(settings, name) for name in kept}
    return {
        "threads": settings.threads or os.cpu_count() or 1,
        **({} if demand == "cpu" else {"provider": demand}),
        **{name: value for name, value in said.items() if value != getattr(usual, name)},
    }


def engine_settings(engines: Engines | None) -> dict[str, Any]:
    """Return what the worker is told of signed engines: where they lie, and for which sizes."""
    if engines is None:
        return {}
    shapes = engines.shapes
    return {
        "engines": str(engines.folder),
        "rows": shapes.rows,
        "positions": shapes.capacity,
        "piece": shapes.piece,
        "most_rows": min(MOST_ROWS, shapes.rows),
    }
