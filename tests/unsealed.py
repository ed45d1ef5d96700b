"""A runner for tests: the same programs in an ordinary child, in the shape of the sealed one."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from typing import Any

from bundle.staging.sealed import SealedJob


@dataclass(frozen=True)
class Result:
    """How it ended; the evidence says plainly that there was no seal."""

    status: int | None
    signal: int | None
    stderr: str
    evidence: dict[str, Any] = field(default_factory=lambda: {"rung": "none"})


def run_unsealed(job: SealedJob) -> Result:
    """Run the job and report how it ended."""
    done = subprocess.run(
        job.argv,
        capture_output=True,
        timeout=job.timeout_s,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"},
    )
    words = done.stderr[-job.stderr_limit :].decode("utf-8", "replace")
    ended = done.returncode < 0
    return Result(None if ended else done.returncode, -done.returncode if ended else None, words)
