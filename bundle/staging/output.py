"""Where an output file may go: an ordinary file, or a new one in a folder that is there."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


def output_problem(path: Path) -> str:
    """Return why a file cannot be put there, or nothing.

    A finished file is renamed over what has its name, and that would take the place of a device.
    """
    folder = path.absolute().parent
    try:
        kind = stat.S_IFREG
        with contextlib.suppress(FileNotFoundError):
            kind = path.stat().st_mode
        if not path.name or stat.S_ISDIR(kind):
            return "it is a folder"
        if not stat.S_ISREG(kind):
            return "it is a pipe or device, not an ordinary file"
        if not folder.is_dir():
            return "its folder does not exist"
        if not os.access(folder, os.W_OK | os.X_OK):
            return "its folder cannot be written to"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", "") or "it is no name of a file"
    return ""
