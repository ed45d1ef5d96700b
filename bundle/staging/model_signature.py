"""`airgap sign-model`: a model signature that the tools of others verify; interoperability only.

Decides nothing about trust. The folder is walked closed, like a snapshot: no link, no device, and
every file is signed.
"""

from __future__ import annotations

from pathlib import Path

from bundle.evidence.oms import sign_folder
from bundle.keys import Signer
from bundle.staging.output import output_problem
from bundle.staging.source import hash_file, walk
from bundle.staging.views import write_page
from policy.errors import RefusedError


def write_signature(folder: Path, out: Path, signer: Signer) -> int:
    """Sign every file of `folder` and write the signature to `out`; returns their number.

    Raises:
        RefusedError: `source.*`, `seal.algorithm`, `build.output`.
        FaultError: `host.io`.

    """
    problem = output_problem(out)
    if problem:
        raise RefusedError("build.output", f"{str(out)!r:.160} cannot be a file: {problem}")
    base, place = folder.absolute(), out.absolute()
    inside = place.relative_to(base).as_posix() if place.is_relative_to(base) else None
    files = {
        file.path: hash_file(file, _ignore).sha256 for file in walk(folder) if file.path != inside
    }
    if not files:
        raise RefusedError("source.empty", f"{str(folder)!r:.160} holds nothing to sign")
    write_page(out, sign_folder(base.name, files, inside, signer).decode())
    return len(files)


def _ignore(count: int) -> None:
    """Show nothing."""
