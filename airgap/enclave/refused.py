"""The one refusal of this room: a layer is missing, so nothing was started."""

from __future__ import annotations

from airgap.enclave.host import HostSurvey
from policy.errors import RefusedError

_HINTS = {
    "arch": "only x86-64 has been proven; use such a machine",
    "deadline": "the program may be too large for `deadline_s`; see its last words in the message",
    "files": "make it readable for others (chmod -R a+rX) or install it outside of closed folders; "
    "on rung A the folders above it may stay closed, on other rungs they may not",
    "gpu": "see packaging/README.md for the nodes and the driver; `worker` runs on the CPU",
    "job": "see `airgap.enclave.run_sealed` for what a sealed job may be",
    "landlock": "run `airgap doctor`; some kernels report a Landlock that they do not have",
    "limits": "raise the limits of this process, for example `ulimit -n 1024`, and start it again",
    "output": "treat the input as hostile; nothing of the output was kept",
    "rung": "run `airgap doctor`; a lower rung is a decision of the site: `[enclave] min_rung`",
    "telemetry": "install onnxruntime 1.28, the last version without telemetry code",
}
_DEFAULT_HINT = "run `airgap doctor`: it names what this host is missing and how to get it"


class SealRefused(RefusedError):  # noqa: N818 - the name that the specification gives it
    """The seal could not be proven; the code is `enclave.<layer>`.

    Attributes:
        layer: The layer that is missing.
        facts: The survey of the host, where one was made.
        tried: Rungs that were left out or failed, with the reason.

    """

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(f"enclave.{layer}", message, hint=_HINTS.get(layer, _DEFAULT_HINT))
        self.layer = layer
        self.facts: HostSurvey | None = None
        self.tried: list[dict[str, str]] = []
