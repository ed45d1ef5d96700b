"""The promised shapes in their true widths, with few layers: served from the published bytes.

Each step is a process of its own, which tells its time and its peak memory: the fast graph and
`graphs.json` are written, an oracle of a few lines answers one matrix at a time, and the worker's
own loader and engine answer and decode. Each takes up to 7 GB of disk.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import large_models
import numpy as np
import pytest
from random_models import save_random, torch_logits

MODEL = "large"
IDS = [2, *range(4, 24)]
TOP = 64
MOST_BYTES = 10 << 30
LAYERS = {"mixtral-8x7b": 1}  # of which one has 1.4 billion numbers; the others have two


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_the_oracle_answers_like_torch(family, tmp_path):
    folder = save_random(tmp_path / "model", family)
    want = torch_logits(folder, [IDS])[0]
    assert abs(large_models.Oracle(folder).logits(IDS) - want).max() < 1e-4


@pytest.mark.soak
@pytest.mark.parametrize("shape", list(large_models.SHAPES))
def test_a_shape_of_true_width_is_served_from_the_published_bytes(shape, tmp_path):
    folder, work = tmp_path / "model", tmp_path / "work"
    work.mkdir()
    wrote = step("snapshot", folder, shape)
    made = step("graph", folder, work)
    assert made["graph_bytes"] < 1 << 20
    oracle = step("oracle", folder, work)
    served = step("serve", work)
    print(f"\n{shape}: {wrote['published'] >> 20} MiB published", *(
        f"{name} {one['seconds']:.1f} s, peak {one['peak'] >> 20} MiB"
        for name, one in (("graph", made), ("oracle", oracle), ("serve", served))
    ), f"loaded in {served['load']:.1f} s, {served['tokens_s']:.2f} tokens/s, "
       f"furthest logit {served['delta']:.1e}", sep="; ")  # fmt: skip
    assert served["delta"] < 1e-3
    assert served["same_best"]
    assert served["alone"] == served["together"]
    assert max(one["peak"] for one in (made, oracle, served)) < MOST_BYTES
    assert wrote["digests"] == made["digests"] == served["digests"]


def step(name, *words):
    """Run one step below in a process of its own."""
    argv = [sys.executable, __file__, name, *map(str, words)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(argv, capture_output=True, check=False, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def digests(folder):
    names = sorted(folder.glob("*.safetensors"))
    lines = subprocess.run(["sha256sum", *names], capture_output=True, check=True, text=True)
    return {Path(name).name: sha for sha, name in map(str.split, lines.stdout.splitlines())}


def snapshot(folder, shape):
    large_models.write_snapshot(Path(folder), shape, num_hidden_layers=LAYERS.get(shape, 2))
    published = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"published": published, "digests": digests(Path(folder))}


def graph(folder, work):
    """Write what a bundle would hold of the model, without its proof."""
    from datetime import UTC, datetime

    from bundle.staging import release
    from bundle.staging.convert import convert, place_inputs
    from bundle.staging.inspect import inspect_source

    now = datetime(2026, 1, 1, tzinfo=UTC)
    facts = release.Facts(model_id=MODEL, version="1", created=now, expires=now, epoch=1)
    report = inspect_source(Path(folder), name=MODEL)
    report.require_ready()
    place_inputs(report, Path(work, "source"))
    made = convert(
        report, Path(work, "source"), Path(work, "graph"), run_sealed=never, memory_mb=1,
        reference=False,
    )  # fmt: skip
    served = Path(work, MODEL)
    served.mkdir()
    for member in release._payload(report, facts, made):
        place = served / Path(member.path).name
        if isinstance(member.source, bytes):
            place.write_bytes(member.source)
        else:
            place.hardlink_to(member.source)
    size = sum(path.stat().st_size for path in served.glob("*.onnx"))
    return {"graph_bytes": size, "digests": digests(served)}


def never(job):
    raise AssertionError(job.argv)


def oracle(folder, work):
    np.save(Path(work, "oracle.npy"), large_models.Oracle(Path(folder)).logits(IDS))
    return {}


def serve(work):
    """Load the model as the worker does, hold it against the oracle, and decode."""
    from airgap.inference.engine import Engine
    from airgap.inference.fast import Head
    from airgap.inference.model import load_model
    from airgap.inference.protocol import Generate, Sample, segments_of

    start = time.perf_counter()
    model = load_model(Path(work, MODEL), precision="fp32", demand="cpu", threads=2)
    load = time.perf_counter() - start
    want = np.load(Path(work, "oracle.npy"))
    slots, found, half = model.slots(rows=1, capacity=len(IDS)), [], len(IDS) // 2
    for first, last in [(0, half), *((at, at + 1) for at in range(half, len(IDS)))]:
        head = Head(select=np.arange(last - first), top_k=TOP)
        after = np.array([last], dtype=np.int32)
        found.append(model.run(np.array([IDS[first:last]]), after, slots, head))
    ids, raw = (np.concatenate([getattr(one, name) for one in found]) for name in ("ids", "raw"))

    def ask(seed):
        return Generate(
            prompt=segments_of("<MoleculeS>CC"), n=2, max_new_tokens=8, temperature=1.0,
            top_p=1.0, top_k=50, repetition_penalty=1.05, seed=seed,
        )  # fmt: skip

    def texts(*requests):
        engine, lists = Engine(model, budget=1 << 28, most_rows=4), [[] for _ in requests]
        for key, request in enumerate(requests):
            engine.submit(key, request, None, emit=lists[key].append, finish=lambda _done: None)
        while engine.busy:
            engine.step()
        return [{one.index: one.ids for one in each if isinstance(one, Sample)} for each in lists]

    alone = [texts(ask(seed))[0] for seed in (1, 2)]
    start = time.perf_counter()
    together = texts(ask(1), ask(2))
    count = sum(len(ids) for each in together for ids in each.values())
    return {
        "load": load,
        "delta": float(abs(np.take_along_axis(want, ids, axis=1) - raw).max()),
        "same_best": bool((ids[:, 0] == want.argmax(axis=1)).all()),
        "alone": str(alone),
        "together": str(together),
        "tokens_s": count / (time.perf_counter() - start),
        "digests": digests(Path(work, MODEL)),
    }


if __name__ == "__main__":
    begun = time.perf_counter()
    told = {"snapshot": snapshot, "graph": graph, "oracle": oracle, "serve": serve}[sys.argv[1]](
        *sys.argv[2:]
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**told, "seconds": time.perf_counter() - begun, "peak": peak}))
