"""The store of a secured host: what is installed, what may not return, how a bundle enters."""

from airgap.install.installer import Decision, Gate, Installed, InstallEvent, Recorder, install
from airgap.install.store import InstalledBundle, Store, verify_installed

__all__ = [
    "Decision",
    "Gate",
    "InstallEvent",
    "Installed",
    "InstalledBundle",
    "Recorder",
    "Store",
    "install",
    "verify_installed",
]
