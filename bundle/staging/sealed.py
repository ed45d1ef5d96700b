"""What the staging side asks of the sealed runner, which it is given and never brings itself.

`bundle.staging` may not import the enclave; the command that enters staging passes its runner in.
Without one nothing is converted: there is no unsealed default (docs/design/enclave.md, 1).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bundle.scan.strict import open_view
from policy.errors import FaultError, RefusedError

STDERR_LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True)
class SealedJob:
    """One run: a Python file and its arguments, in a process without a network.

    `argv` is the whole command line; `read_only` lists what the program may read besides the
    interpreter; `out` is an empty folder and the only place where it may write. Memory in MiB.
    """

    argv: tuple[str, ...]
    read_only: tuple[Path, ...]
    out: Path
    memory_mb: int
    timeout_s: float
    stderr_limit: int = STDERR_LIMIT


class SealedResult(Protocol):
    """How the run ended, and what the seal says about itself."""

    @property
    def status(self) -> int | None:
        """Exit status; None when a signal ended it."""

    @property
    def signal(self) -> int | None:
        """Number of that signal."""

    @property
    def stderr(self) -> str:
        """What it wrote, cut; untrusted."""

    @property
    def evidence(self) -> Mapping[str, Any]:
        """The record of the seal."""


RunSealed = Callable[[SealedJob], SealedResult]


def python(program: Path, *arguments: Path) -> tuple[str, ...]:
    """Return the command line that runs one of our programs in this interpreter, isolated."""
    return (sys.executable, "-I", "-B", str(program), *(str(argument) for argument in arguments))


def require_success(result: SealedResult, what: str, code: str) -> None:
    """Raise unless the run ended well; quotes the last line that it wrote.

    Raises:
        FaultError: `host.space` when the disk was full, else `code`.

    """
    if result.status == 0:
        return
    if "No space left on device" in result.stderr:
        raise FaultError(
            "host.space",
            f"{what} filled the disk",
            hint="free space, or name an output on a larger disk",
        )
    lines = result.stderr.strip().splitlines()
    last = lines[-1] if lines else "it wrote nothing"
    if result.signal is not None:
        last = f"ended by signal {result.signal}; {last}"
    raise FaultError(
        code,
        f"{what} failed: {last!r:.240}",
        hint="see that memory and disk suffice (about 3 times the weights in fp32); "
        "`airgap doctor` shows what the seal needs",
    )


def take(out: Path, name: str, limit: int, code: str) -> memoryview:
    """Return a file of at most `limit` bytes that a sealed run left; links are not followed.

    Raises:
        RefusedError: `code`; missing, not a regular file, or too large.

    """
    path = out / name
    if not path.is_file() or path.is_symlink() or path.stat().st_size > limit:
        raise RefusedError(code, f"the sealed run left no {name!r} of at most {limit:,} bytes")
    return open_view(path)


def require_only(out: Path, names: set[str], code: str) -> None:
    """Refuse anything in `out` that is not an expected regular file."""
    for entry in sorted(os.scandir(out), key=lambda item: item.name):
        if entry.name not in names or not entry.is_file(follow_symlinks=False):
            raise RefusedError(
                code, f"the sealed run left {entry.name!r:.80}, which is not expected"
            )


def place_file(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source`: by a hard link where the disk can, else by a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)
