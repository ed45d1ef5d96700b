"""Runners for tests of the staging side: the real programs, without the seal.

`run_inline` loads torch once for the whole session; `unsealed.run_unsealed` starts a real child.
"""

from __future__ import annotations

import contextlib
import io
import os
import traceback
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import bundles

from bundle.staging import convert_main, parity_main, scanner_main, unpickle_main
from bundle.staging.pipeline import Built, build
from bundle.staging.release import Facts
from bundle.staging.sealed import SealedJob

PROGRAMS = {
    "convert_main.py": convert_main.main,
    "parity_main.py": parity_main.main,
    "scanner_main.py": scanner_main.main,
    "unpickle_main.py": unpickle_main.main,
}
FACTS = Facts(
    model_id="tiny",
    version="1.0",
    created=bundles.NOW,
    expires=bundles.NOW + timedelta(days=365),
    epoch=1,
)


@dataclass
class Result:
    """How a run ended."""

    status: int | None = 0
    signal: int | None = None
    stderr: str = ""
    evidence: dict[str, Any] = field(default_factory=lambda: {"rung": "none"})


def run_inline(job: SealedJob) -> Result:
    """Run one of the two programs in this process, as the sealed child would."""
    script = next(n for n, word in enumerate(job.argv) if word.endswith(".py"))
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            status = PROGRAMS[Path(job.argv[script]).name](list(job.argv[script + 1 :]))
        return Result(status)
    except Exception:  # noqa: BLE001 - whatever it raises, a child would end with 1
        return Result(1, stderr=traceback.format_exc())
    finally:
        os.environ.clear()
        os.environ.update(before)


def permit(models, digest) -> bytes:  # noqa: ARG001 - the shape of the question
    """Stand for a policy that permits."""
    return b'{"outcome":"permit","packs":[{"digest":"sha256:%s"}]}' % (b"7" * 64)


def build_tiny(folder: Path, out: Path, **changes: Any) -> Built:
    """Build a draft of the snapshot in `folder` with the keys of `bundles`."""
    arguments = {
        "trust": bundles.make_trust(),
        "signer": bundles.signer("builder"),
        "run_sealed": run_inline,
        "admit": permit,
        **changes,
    }
    return build(folder, out, arguments.pop("facts", FACTS), **arguments)
