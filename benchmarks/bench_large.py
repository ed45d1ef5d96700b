"""The 1 B shape whole: written, sealed, installed, decoded on this machine.

Opt-in by AIRGAP_BENCH_LARGE=1: it takes about 10 GB of disk, 12 GB of memory and 15 minutes. The
model is Llama-3.2-1B in shape, with random weights in bf16 in shards (`tests/large_models.py`).
Obeys docs/design/inference.md, 7:

- the writer of the fast graph: peak memory below 1.2 times the published bytes, below 60 s;
- the weights in the bundle have the digests that were published, or the benchmark fails;
- install on this host, with the parity vectors in the sealed worker, and a text from that worker;
- one sequence, fp32 and int8 (AIRGAP_BENCH_PRECISIONS): at least 90 % of the memory bound, which is
  the time in which this machine reads as many bytes (`memory_bound`), measured in turn;
- where onnxruntime-genai has its environment: the time to load, and one sequence from its prompt.

Loading, and all that is measured for memory, runs in a process of its own with the variables of a
sealed worker.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from harness import Context, Result, SkipBenchmark, alone, paired

ROOT = Path(__file__).resolve().parents[1]
SHAPE = os.environ.get("AIRGAP_BENCH_SHAPE", "llama-3.2-1b")
PRECISIONS = tuple(os.environ.get("AIRGAP_BENCH_PRECISIONS", "fp32,int8").split(","))
STEPS = 16
MOST_MEMORY, MOST_SECONDS, OF_BOUND, GENAI_ONE = 1.2, 60.0, 0.9, 1.2
THREADS = 2


def run(context: Context) -> list[Result]:
    """Measure each step of the road of one large model."""
    if not os.environ.get("AIRGAP_BENCH_LARGE"):
        raise SkipBenchmark("set AIRGAP_BENCH_LARGE=1; it takes 10 GB of disk and 15 minutes")
    sys.path.insert(0, str(ROOT / "tests"))
    import large_models

    with context.folder() as scratch:
        context.step(f"writing random weights in the shape of {SHAPE}")
        snapshot = large_models.write_snapshot(scratch / SHAPE, SHAPE)
        published = sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
        context.step("writing the fast graph")
        first = child("write", snapshot, scratch / "graph-0")
        wrote = [child("write", snapshot, scratch / f"graph-{n + 1}") for n in range(context.runs)]
        peaks, times = [one["peak"] for one in wrote], [one["seconds"] for one in wrote]
        results = [
            alone(lambda: peaks[-1] / published, MOST_MEMORY, 1, 0).lower_is_better(
                f"graph of {SHAPE}: peak memory against published bytes",
                unit="times",
                target=1.0,
                peak_mib=max(peaks) >> 20,
                published_mib=published >> 20,
                graph_bytes=first["graph"],
            ),
            alone(iter(times).__next__, MOST_SECONDS, len(times), 0).lower_is_better(
                f"graph of {SHAPE}: time to write", unit="s", target=1.0
            ),
        ]
        context.step("building, sealing, installing")
        road = install(snapshot, scratch, context)
        results.append(
            alone(lambda: road["install_s"], MOST_SECONDS, 1, 0).lower_is_better(
                f"install of {SHAPE} with its parity vectors, sealed", unit="s", target=1.0, **road
            )
        )
        for precision in PRECISIONS:
            context.step(f"decoding in {precision}")
            found = child("decode", Path(road["folder"]), precision, context.runs)
            ours, peer = iter(found["ours"]).__next__, iter(found["bound"]).__next__
            results.append(
                paired(ours, peer, context.runs, warm_ups=0).lower_is_better(
                    f"{SHAPE} {precision}, one sequence: share of the memory bound",
                    unit="s/token",
                    target=OF_BOUND,
                    load_s=found["load_s"],
                    peak_mib=found["peak"] >> 20,
                    bytes_a_step=found["bytes"],
                    read_gb_s=round(found["bytes"] / min(found["bound"]) / 1e9, 1),
                    one_row_s=round(statistics.median(found["ours"]), 4),
                    step_of_32_rows_s=round(statistics.median(found["batch"]), 4),
                )
            )
        return results + beside_genai(snapshot, Path(road["folder"]), scratch, context)


def beside_genai(snapshot: Path, folder: Path, scratch: Path, context: Context) -> list[Result]:
    """Measure loading and one sequence in turn with onnxruntime-genai; nothing where it is not."""
    import bench_peers
    from peers import Absent

    def theirs() -> float:
        peer = bench_peers.Remote("genai", snapshot, scratch / "genai")
        peer.close()
        return peer.load_s

    context.step("genai: writing its graph")
    try:
        theirs()
    except Absent as notice:
        context.step(str(notice))
        return []
    context.step("loading, ours and genai's")
    load = paired(lambda: float(child("load", folder)["load_s"]), theirs, context.runs)
    other = bench_peers.Remote("genai", snapshot, scratch / "genai")
    ours = bench_peers.Ours(folder)
    context.step("one sequence, ours and genai's")
    pair = paired(
        lambda: ours(rows=1, likelihood=False),
        lambda: other(rows=1, likelihood=False),
        context.runs,
    )
    other.close()
    line = bench_peers.result(
        "genai.decode.1", pair, GENAI_ONE, ours=ours, other=other, rows=1, model=SHAPE
    )
    shares = bench_peers.of_bound(snapshot, pair, context.runs)
    return [
        load.lower_is_better(f"{SHAPE}: loading, against genai", unit="s", target=1.0),
        dataclasses.replace(line, conditions={**line.conditions, **shares}),
    ]


def load(folder: str) -> dict[str, Any]:
    """Measure loading alone, as a worker does it."""
    from airgap.inference.model import load_model

    start = time.perf_counter()
    load_model(Path(folder), precision="fp32", demand="cpu", threads=THREADS)
    return {"load_s": time.perf_counter() - start, "peak": peak()}


def install(snapshot: Path, scratch: Path, context: Context) -> dict[str, Any]:
    """Build, seal and install; return times and what came of the vectors."""
    import bundles
    import staging_runs

    from airgap.enclave import SealSpec, launch, run_sealed
    from airgap.inference.protocol import Generate, parse_reply, segments_of
    from airgap.install import install as bring_in
    from airgap.install.parity import prover
    from bundle.staging.pipeline import build
    from bundle.staging.release import Facts
    from bundle.staging.sign import read_draft, sign
    from bundle.trust import save_trust

    now = datetime.now(UTC).replace(microsecond=0)
    trust = bundles.make_trust()
    facts = Facts("large", "1.0", now, now + timedelta(days=9), 1)
    out, root = scratch / "large.agb", scratch / "lab"
    start = time.perf_counter()
    built = build(
        snapshot,
        out,
        facts,
        trust=trust,
        signer=bundles.signer("builder"),
        run_sealed=run_sealed,
        admit=staging_runs.permit,
        precisions=PRECISIONS,
        reference=False,
        progress=lambda stage, done, total: context.step(f"building: {stage} {done}/{total}"),
    )
    built_s = time.perf_counter() - start
    require_same_weights(snapshot, built)
    for name in ("alice", "bob"):
        draft = read_draft(out)
        sign(draft, trust, bundles.signer(name), confirmation=draft.manifest.name, now=now)
    save_trust(trust, root / "trust")
    start = time.perf_counter()
    done = bring_in(
        out,
        root=root,
        now=datetime.now(UTC),
        gate=lambda *_: Permit(),
        audit=lambda _event: None,
        prove=prover(launched, state=root / "enclave"),
    )
    installed_s = time.perf_counter() - start
    folder = done.bundle.model_folder("large")
    start = time.perf_counter()
    spec = SealSpec(
        profile="worker",
        program="airgap.inference.program:create",
        config={"folder": str(folder), "precision": "fp32", "threads": THREADS},
        read_only=(done.bundle.folder,),
        state=root / "enclave",
        deadline_s=600,
    )
    worker = launch(spec)
    sealed_s = time.perf_counter() - start
    request = Generate(
        prompt=segments_of("<MoleculeS>CC(=O)Nc1ccc(OCc2ccccc2)cc1"),
        n=1,
        max_new_tokens=STEPS,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        seed=1,
    )
    reply = parse_reply(worker.request(request.encode(), 600))
    rung = worker.rung
    worker.close()
    return {
        "build_s": round(built_s, 1),
        "install_s": round(installed_s, 1),
        "sealed_start_s": round(sealed_s, 1),
        "sealed_tokens": reply.tokens,
        "rung": rung,
        "proofs": [each.text for each in done.proofs],
        "parity": [each.measured.text for each in built.vectors if each.measured],
        "max_delta": str(max(built.parity.full, built.parity.past)),
        "folder": str(folder),
    }


def require_same_weights(snapshot: Path, built: Any) -> None:
    """Fail unless every weight file in the bundle has the digest of the published one."""
    import hashlib

    carried = {
        entry.path.rpartition("/")[2]: entry.sha256
        for entry in built.manifest.published_weights("large")
    }
    for path in snapshot.glob("*.safetensors"):
        with path.open("rb") as stream:
            if carried.get(path.name) != hashlib.file_digest(stream, "sha256").hexdigest():
                raise RuntimeError(f"{path.name} does not travel as it was published")


@dataclasses.dataclass
class Permit:
    """A decision that permits; what it costs is measured elsewhere."""

    permitted: bool = True
    canonical: bytes = b"{}"

    @property
    def digest(self) -> Any:
        """The digest of the record."""
        from policy.terms import Digest

        return Digest.of(self.canonical)


def launched(spec: Any) -> Any:
    """Start a sealed process and end it with the block."""
    import contextlib

    from airgap.enclave import launch

    return contextlib.closing(launch(spec))


def child(work: str, *arguments: object) -> dict[str, Any]:
    """Run one of the measurements below in a process of its own; return what it printed."""
    from airgap.enclave.profiles import PROFILES

    words = [sys.executable, __file__, "--child", work, *map(str, arguments)]
    variables = os.environ | dict(PROFILES["worker"].environment)
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=variables)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(snapshot: str, out: str) -> dict[str, Any]:
    """Write the fast graph as a build does: read the headers, link the weights, parse it again."""
    from bundle.scan.onnx import parse_onnx
    from bundle.scan.safetensors import parse_safetensors
    from bundle.scan.strict import open_view
    from bundle.staging.architecture import parse_architecture, require_tensors
    from bundle.staging.graph import Placed, write_graph

    start, source, folder = time.perf_counter(), Path(snapshot), Path(out)
    folder.mkdir()
    shape = parse_architecture(json.loads((source / "config.json").read_bytes()))
    placed, sizes = {}, {}
    for path in sorted(source.glob("*.safetensors")):
        os.link(path, folder / path.name)
        sizes[path.name] = path.stat().st_size
        tensors = parse_safetensors(open_view(path)).tensors
        placed |= {tensor.name: Placed(path.name, tensor) for tensor in tensors}
    require_tensors(shape, {name: one.tensor for name, one in placed.items()})
    raw = write_graph(shape, placed)
    (folder / "fast.onnx").write_bytes(raw)
    parse_onnx(open_view(folder / "fast.onnx"), sizes=sizes.get, what="fast.onnx")
    return {"seconds": time.perf_counter() - start, "peak": peak(), "graph": len(raw)}


def decode(folder: str, precision: str, runs: str) -> dict[str, Any]:
    """Measure steps of one sequence, in turn with reading as many bytes."""
    import numpy as np
    from memory_bound import MemoryBound

    from airgap.inference.fast import FastModel, Head
    from airgap.inference.model import load_model

    start = time.perf_counter()
    model = load_model(Path(folder), precision=precision, demand="cpu", threads=THREADS)
    loaded = time.perf_counter() - start
    if not isinstance(model, FastModel):
        raise TypeError("the bundle has no fast graph in this precision")
    size = step_bytes(model, Path(folder))
    reader = MemoryBound(THREADS)

    def ours(rows: int = 1, steps: int = STEPS) -> float:
        slots = model.slots(rows=rows, capacity=64 + steps)
        model.prefill(list(range(4, 68)), slots)
        head = Head(select=np.arange(rows), top_k=50)
        began = time.perf_counter()
        for step in range(steps):
            lengths = np.full(rows, 65 + step, dtype=np.int32)
            model.run(np.full((rows, 1), 5), lengths, slots, head)
        return (time.perf_counter() - began) / steps

    ours()
    figures: dict[str, list[float]] = {"ours": [], "bound": [], "batch": []}
    for _ in range(int(runs)):
        figures["ours"].append(ours())
        figures["bound"].append(reader.seconds(size))
        figures["batch"].append(ours(32, 4))
    return {**figures, "load_s": round(loaded, 1), "bytes": size, "peak": peak()}


def step_bytes(model: Any, folder: Path) -> int:
    """Return the bytes of the matrices that one step reads, as they lie in memory."""
    from bundle.scan.safetensors import parse_safetensors
    from bundle.scan.strict import open_view

    tensors = {
        tensor.name: tensor
        for name, _ in model.graph.external
        for tensor in parse_safetensors(open_view(folder / name)).tensors
    }
    coded = {name.removesuffix(".codes") for name in tensors if name.endswith(".codes")}
    tied = "lm_head.weight" not in tensors
    total = 0
    for name, tensor in tensors.items():
        if name.endswith((".codes", ".scales")):
            total += tensor.end - tensor.start
        elif len(tensor.shape) > 1 and name not in coded:
            read = tied or name != "model.embed_tokens.weight"
            total += 4 * tensor.shape[0] * tensor.shape[1] * read  # widened when it is loaded
    return total


def peak() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        works: dict[str, Callable[..., dict[str, Any]]] = {
            "write": write,
            "decode": decode,
            "load": load,
        }
        print(json.dumps(works[sys.argv[2]](*sys.argv[3:])))
        sys.exit(0)
    import harness

    harness.run_this(__file__)
