"""A process that cannot send anything out: survey, launch, proof (docs/design/enclave.md).

The sealed worker imports through this package, so it loads nothing by itself: each public name is
fetched from its module on first use.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # the worker has no use for the `typing` module; type checkers know this name
if TYPE_CHECKING:
    from airgap.enclave.channel import Frame, ProgramError
    from airgap.enclave.convert import SealedResult, run_sealed
    from airgap.enclave.host import HostSurvey, survey
    from airgap.enclave.refused import SealRefused
    from airgap.enclave.seal import launch
    from airgap.enclave.sealed import Enclave
    from airgap.enclave.spec import Caps, SealSpec

__all__ = [
    "Caps",
    "Enclave",
    "Frame",
    "HostSurvey",
    "ProgramError",
    "SealRefused",
    "SealSpec",
    "SealedResult",
    "launch",
    "run_sealed",
    "survey",
]

_HOME = {
    "Caps": "spec",
    "Enclave": "sealed",
    "Frame": "channel",
    "HostSurvey": "host",
    "ProgramError": "channel",
    "SealRefused": "refused",
    "SealSpec": "spec",
    "SealedResult": "convert",
    "launch": "seal",
    "run_sealed": "convert",
    "survey": "host",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"airgap.enclave.{_HOME[name]}"), name)
