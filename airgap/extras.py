"""Optional parts: looked up before any work begins, so that a refusal costs nothing."""

from __future__ import annotations

import importlib.util

from policy.errors import FaultError

# What each extra of the package must bring; looked up, never imported here.
EXTRAS = {
    "cpu": ("numpy", "onnxruntime", "tokenizers", "llguidance"),
    "science": ("rdkit", "gemmi"),
    "staging": ("torch", "transformers", "optimum", "onnx", "cyclonedx"),
}


def require_extras(*extras: str) -> None:
    """Refuse when a library of one of `extras` is not installed.

    Raises:
        FaultError: `host.extra`, naming what is missing and what to install.

    """
    for extra in extras:
        missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
        if missing:
            raise FaultError(
                "host.extra",
                f"this needs {', '.join(missing)}, which this environment does not hold",
                hint=f"install the extra `{extra}`, offline from the wheelhouse: airgap[{extra}]",
            )
