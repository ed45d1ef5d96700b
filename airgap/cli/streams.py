"""Standard input, output and error as they are found: closed, full, broken, or not in UTF-8."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO

from rich.console import Console

FAULT = 3
UNTOLD = 4
PIPE_CLOSED = 141
_NAMES = ("stdin", "stdout", "stderr")


class Screen(Console):
    """A console that reports a broken pipe to its caller; rich would leave with status 1."""

    def on_broken_pipe(self) -> None:
        """Raise it again: the command line has an exit status of its own for it."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def prepare() -> None:
    """Put the null device where a stream is closed, and let no character break a line.

    A closed descriptor would be given to the next file that is opened, and whatever is printed
    would then be written into that file.
    """
    for number, name in enumerate(_NAMES):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - stays open
    for stream in (sys.stdout, sys.stderr):
        set_errors(stream)


def set_errors(stream: Any) -> None:
    """Write what the encoding lacks as an escape; streams of tests have no such setting."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def is_utf8(stream: TextIO) -> bool:
    """Whether a stream takes every character as it is."""
    return (stream.encoding or "utf-8").lower().replace("-", "").replace("_", "") == "utf8"


# Why a document could not be written, one entry each; `told` turns them into an exit status.
lost: list[OSError] = []


def told(status: int) -> int:
    """Return the exit status of a command whose documents may have been lost.

    A caller that reads documents would take "no" for "yes" or for nothing: each has its own status.
    """
    if not lost or status not in {0, 1, 2}:
        return status
    return UNTOLD if status else FAULT


def finish(status: int) -> int:
    """Write out what is buffered and return the exit status: output that was lost is no success."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            discard(stream)
            status = status or PIPE_CLOSED
        except OSError:
            discard(stream)
            status = status or FAULT
    return status


def discard(stream: TextIO) -> None:
    """Send what is left in a stream nowhere, so that the interpreter ends without a word."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
