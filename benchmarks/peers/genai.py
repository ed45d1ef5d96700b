"""onnxruntime-genai as a peer: its own builder and its own loop, in its own environment.

First line `{"model", "cache", "threads"}`; then `{"prompt": ids, "rows", "tokens", "seed",
"likelihood"}`, answered by seconds of the wall and of the processor. With `likelihood` each sample
goes through the graph once more, since the loop keeps no raw logits of what it drew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def built(model: Path, cache: Path) -> Path:
    """Return the folder with genai's graph of a snapshot, built once."""
    folder = cache / f"genai-{model.name}"
    if not (folder / "genai_config.json").exists():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model)]
        where = ["-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", str(cache / "hub")]
        subprocess.run([*builder, *where], check=True, stdout=subprocess.DEVNULL)
    return folder


def loaded(folder: Path, threads: int) -> Any:
    """Load with a fixed number of threads."""
    path = folder / "genai_config.json"
    document = json.loads(path.read_text())
    options = document["model"]["decoder"]["session_options"]
    options["intra_op_num_threads"] = threads
    options["inter_op_num_threads"] = 1
    path.write_text(json.dumps(document))
    return og.Model(str(folder))


def run(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Draw, and score where it is asked for."""
    prompt, rows, tokens = request["prompt"], request["rows"], request["tokens"]
    wall, cpu = time.perf_counter(), time.process_time()
    params = og.GeneratorParams(model)
    length = len(prompt) + tokens
    params.set_search_options(
        do_sample=True,
        batch_size=rows,
        max_length=length,
        min_length=length,
        temperature=1.2,
        top_p=0.85,
        top_k=50,
        repetition_penalty=1.05,
        random_seed=request["seed"],
    )
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt] * rows, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    samples = [generator.get_sequence(row).tolist() for row in range(rows)]
    drawn = sum(len(one) - len(prompt) for one in samples)
    del generator
    if request["likelihood"]:
        for one in samples:
            likelihood(model, one, len(prompt))
    return {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "tokens": drawn,
    }


def likelihood(model: Any, ids: list[int], prompt: int) -> float:
    """Return the log-probability of a sample from a pass of its own."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 1, batch_size=1)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([ids], dtype=np.int32))
    logits = generator.get_output("logits")[0, prompt - 1 : -1].astype(np.float64)
    peak = logits.max(axis=1, keepdims=True)
    table = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    return float(np.take_along_axis(table, np.array(ids[prompt:])[:, None], axis=1).sum())


def main() -> None:
    """Answer line by line."""
    start = json.loads(sys.stdin.readline())
    folder = built(Path(start["model"]), Path(start["cache"]))
    begun = time.perf_counter()
    model = loaded(folder, start["threads"])
    ready = {"load": time.perf_counter() - begun, "version": og.__version__}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
