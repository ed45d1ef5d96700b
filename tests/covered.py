"""Runs code in a fresh interpreter and brings its line coverage back, when coverage is measured.

Processes that seal themselves cannot write a data file: they send theirs over the channel.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import coverage

HERE = Path(__file__).resolve().parent


def measuring():
    """Return the coverage that runs in this process, None without one."""
    return coverage.Coverage.current()


def start_line():
    """Return source that starts coverage, without a file; it binds `COVERED`."""
    if measuring() is None:
        return "COVERED = None\n"
    sources = measuring().config.source
    return (
        "import coverage, coverage.sqldata, sqlite3, zlib\n"
        f"COVERED = coverage.Coverage(data_file=None, source={sources!r}, config_file=False)\n"
        "COVERED.start(); COVERED.get_data().dumps()\n"
    )


def keep(dumped):
    """Put data that another process has sent beside the data of this one."""
    if measuring() is not None and dumped:
        # A name of its own: `coverage combine` takes files of one suffix hash for copies.
        name = f"{measuring().config.data_file}.sealed-{secrets.token_hex(8)}"
        data = coverage.CoverageData(basename=name)
        data.loads(dumped)
        data.write()


def run_covered(code, *arguments, timeout=60):
    """Run `code`; it sets `ANSWER`, a JSON value, which is returned."""
    script = (
        f"import json, sys\nsys.path.insert(0, {str(HERE)!r})\n{start_line()}"
        f"ARGUMENTS = json.loads({json.dumps(json.dumps(arguments))})\n{code}\n"
        "print(json.dumps(ANSWER))\n"
        "if COVERED: COVERED.stop(); print(COVERED.get_data().dumps().hex())\n"
    )
    with tempfile.TemporaryDirectory(prefix="airgap-test-", ignore_cleanup_errors=True) as home:
        Path(home).chmod(0o755)  # the control runs as another uid
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, "TMPDIR": home},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    if measuring() is not None:
        keep(bytes.fromhex(lines.pop()))
    return json.loads(lines[-1])
