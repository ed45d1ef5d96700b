"""Other runners, each in an environment of its own, spoken to line by line.

They never enter an environment of ours: onnxruntime-genai wants other versions of transformers and
onnxruntime than staging pins, and llama.cpp is built for the machine. `make` them once, with a
network or a wheelhouse: `python benchmarks/peers/make.py`. A benchmark skips a peer that is absent.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

FOLDER = Path(
    os.environ.get("AIRGAP_BENCH_PEERS", Path(__file__).resolve().parents[2] / "build" / "peers")
)


class Absent(Exception):  # noqa: N818 - a notice, not an error
    """The environment of a peer was not made here."""


class Peer:
    """A peer's process: one JSON object a line in, one out."""

    def __init__(self, name: str, **start: Any) -> None:
        """Start `benchmarks/peers/<name>.py` in its environment with `start` as its first line."""
        python = FOLDER / name / "bin" / "python"
        if not python.exists():
            raise Absent(f"no environment {FOLDER / name}: python benchmarks/peers/make.py {name}")
        script = Path(__file__).resolve().parent / f"{name}.py"
        environment = {
            **os.environ,
            "ORT_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self.ready = self.ask(**start)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return the answer."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
