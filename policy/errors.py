"""Errors of all three packages: what is refused, what failed, and the stable code of each.

Every error says what was checked, what was expected and what was found, and carries a next step
that works without a network. Codes read `room.reason`; scripts and tests rely on them.
"""

from __future__ import annotations

from typing import ClassVar

CODE_LIMIT = 32


class AirgapError(Exception):
    """Base of every error that this project raises on purpose.

    Args:
        code: A key of `CODES`.
        message: What was checked, expected and found. The caller quotes and cuts
            untrusted text.
        hint: A next step that works offline; empty when there is none to give.

    Raises:
        KeyError: `code` is not listed; a mistake of the programmer.

    """

    exit_status: ClassVar[int] = 3

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        if code not in CODES:
            raise KeyError(code)
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class RefusedError(AirgapError):
    """We understood, and the answer is no. Nothing changed."""

    exit_status = 1


class UsageError(AirgapError):
    """The command line or a request cannot be understood. Nothing was tried."""

    exit_status = 2


class FaultError(AirgapError):
    """We could not find out: a full disk, an unreadable file, a dead process. Nothing changed."""

    exit_status = 3


CODES: dict[str, str] = {
    # -- command line -------------------------------------------------------------------------
    "usage.argument": "a command-line argument has no meaning here",
    # -- shared vocabulary ----------------------------------------------------------------------
    "digest.malformed": "text is not a digest",
    # -- bundle: manifest -----------------------------------------------------------------------
    "manifest.canonical": "the manifest is not canonical JSON",
    "manifest.layout": "the archive and the list of files in the manifest differ",
    "manifest.paths": "a path that some host would read in another way",
    "manifest.schema": "the manifest breaks its schema",
    "manifest.version": "the manifest has a format that this program does not read",
    "scan.graphs": "graphs.json breaks its schema or contradicts the manifest",
    # -- bundle: trees --------------------------------------------------------------------------
    "merkle.proof": "an inclusion or consistency proof does not lead to the root",
    # -- host: the machine that runs the command ------------------------------------------------
    "host.self": "the three packages do not lie in one directory, or one is missing",
    "host.io": "a file could not be read or written",
    "host.space": "not enough free space",
    "host.extra": "an optional dependency is not installed",
    "host.internal": "an unexpected error: a defect of this program",
}


def describe(code: str) -> str:
    """Return the one-line meaning of `code`; KeyError when it is not listed."""
    return CODES[code]
