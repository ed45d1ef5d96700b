"""A runner for tests: the same programs in an ordinary child, with the protocol of the sealed one."""

from __future__ import annotations

import subprocess
import sys

from bundle.staging.sealed import SealedJob, SealedResult


def run_unsealed(job: SealedJob) -> SealedResult:
    """Run the job and report how it ended; evidence says plainly that there was no seal."""
    done = subprocess.run(
        [sys.executable, "-I", "-B", *job.argv],
        capture_output=True,
        timeout=job.timeout_s,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": "/nonexistent"},
    )
    return SealedResult(done.returncode, done.stderr[-job.stderr_limit :], {"rung": "none"})
