"""The promised shapes in their true widths, with one layer: as published, answered as by torch.

Each takes up to 4 GB of disk and 16 GB of memory.
"""

from __future__ import annotations

import hashlib

import large_models
import numpy as np
import pytest
from random_models import FastGraph, torch_logits, write_fast

pytestmark = pytest.mark.soak
IDS = np.arange(4, 16)[None]
TOP = 64


@pytest.mark.parametrize("shape", ["llama-3.2-3b", "llama-3-8b", "qwen3-8b", "mixtral-8x7b"])
def test_a_shape_of_true_width_answers_like_torch_from_the_published_bytes(shape, tmp_path):
    folder = large_models.write_snapshot(tmp_path / "model", shape, num_hidden_layers=1)
    digests = {path.name: digest(path) for path in folder.glob("*.safetensors")}
    want = torch_logits(folder, IDS)[0]
    known = write_fast(folder)
    assert (folder / "fast.onnx").stat().st_size < 1 << 20
    graph = FastGraph(folder, known)
    cache, top = graph.cache(1, 16), np.array([TOP], np.int64)
    found = graph.run(IDS[:, :8], [8], cache, np.arange(8), top_k=top)
    rows = [(found["ids"], found["raw"])]
    for step in range(8, IDS.shape[1]):
        found = graph.run(IDS[:, step : step + 1], [step + 1], cache, [0], top_k=top)
        rows.append((found["ids"], found["raw"]))
    ids, raw = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    assert abs(np.take_along_axis(want, ids, axis=1) - raw).max() < 1e-3
    assert (ids[:, 0] == want.argmax(axis=1)).all()
    assert digests == {path.name: digest(path) for path in folder.glob("*.safetensors")}


def digest(path):
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
