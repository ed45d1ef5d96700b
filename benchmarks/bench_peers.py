"""The same weights, prompt and settings in our worker and in other runners, in one run.

Obeys docs/design/inference.md, 7. A Llama of 103 M parameters with random weights in fp32, so that
no sample ends early. Each peer runs in an environment of its own (`benchmarks/peers`); one that is
absent is left out. Wall time decides; the processor's seconds stand in the conditions, since they
hold better on a machine that has other work.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_decode
from harness import Context, Paired, Result, SkipBenchmark, paired
from memory_bound import MemoryBound
from peers import FOLDER, Absent, Peer

MODEL = os.environ.get("AIRGAP_BENCH_PEER_MODEL", "m103")
THREADS = int(os.environ.get("AIRGAP_BENCH_THREADS", str(len(os.sched_getaffinity(0)))))
TOKENS = int(os.environ.get("AIRGAP_BENCH_TOKENS", "64"))
ROWS = 32
PROMPT = bench_decode.PROMPTS["retrosynthesis"]
# (name, peer, rows, with a likelihood for each sample, least ratio)
LINES = (
    ("genai.likelihood.32", "genai", ROWS, True, 1.25),
    ("genai.decode.32", "genai", ROWS, False, 1.2),
    ("genai.decode.1", "genai", 1, False, 1.2),
    ("llamacpp.decode.1", "llamacpp", 1, False, 1.0),
    ("optimum.decode.32", "optimum", ROWS, False, 1.2),
    ("transformers.likelihood.32", "transformers", ROWS, True, 6.0),
)


def run(context: Context) -> list[Result]:
    """Measure each line whose peer is here."""
    only = os.environ.get("AIRGAP_BENCH_ONLY", "")
    snapshot = FOLDER / "models" / MODEL
    if not snapshot.exists():
        if MODEL != "m103":
            raise SkipBenchmark(f"no model in {snapshot}")
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        context.step("making a model of 103 M parameters")
        bench_decode.large_snapshot(snapshot)
    found: list[Result] = []
    absent: list[str] = []
    with context.folder() as scratch:
        context.step("writing our graph")
        folder = bench_decode.installed(snapshot, scratch / "ours")
        for name, peer, rows, likelihood, target in LINES:
            if only and only not in name:
                continue
            try:
                start = _OPENERS.get(peer, lambda model, kind=peer: Remote(kind, model))
                other = start(snapshot)
            except Absent as notice:
                absent.append(str(notice))
                continue
            context.step(f"{name}: {rows} x {TOKENS} tokens, {context.runs} runs a side")
            ours = Ours(folder)
            work = {"rows": rows, "likelihood": likelihood}
            pair = paired(partial(ours, **work), partial(other, **work), context.runs)
            shares = of_bound(snapshot, pair, context.runs) if rows == 1 else {}
            line = result(name, pair, target, ours=ours, other=other, rows=rows)
            found.append(replace(line, conditions={**line.conditions, **shares}))
            other.close()
    if not found:
        raise SkipBenchmark("; ".join(absent) or "nothing was asked for")
    return found


def result(
    name: str,
    pair: Paired,
    target: float,
    *,
    ours: Ours,
    other: Any,
    rows: int,
    model: str = MODEL,
) -> Result:
    """Return a line with what it needs to be judged."""
    return pair.lower_is_better(
        name,
        unit="s",
        target=target,
        model=model,
        precision="fp32",
        rows=rows,
        tokens=TOKENS,
        threads=THREADS,
        our_cpu_s=round(sorted(ours.cpu[1:])[len(ours.cpu[1:]) // 2], 3),
        peer_cpu_s=round(sorted(other.cpu[1:])[len(other.cpu[1:]) // 2], 3),
        peer_is=other.what,
        our_tokens=ours.tokens,
        peer_tokens=other.tokens,
    )


def of_bound(snapshot: Path, pair: Paired, runs: int) -> dict[str, float]:
    """Return which share of the memory bound both sides reach: no runner in fp32 can pass 1.

    A token of one sequence reads every matrix once. The bound is the time in which this machine
    reads as many bytes with as many threads (`memory_bound`); the prompt counts as nothing.
    """
    from safetensors import safe_open

    size = 0
    for path in snapshot.glob("*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
        tied = "lm_head.weight" not in shapes
        size += sum(
            4 * shape[0] * shape[1]
            for name, shape in shapes.items()
            if len(shape) > 1 and (tied or name != "model.embed_tokens.weight")
        )
    reader = MemoryBound(THREADS)
    bound = TOKENS * statistics.median(reader.seconds(size) for _ in range(2 * runs))
    return {
        "bound_s": round(bound, 3),
        "our_share_of_bound": round(bound / pair.ours, 3),
        "peer_share_of_bound": round(bound / pair.peer, 3),
    }


class Ours:
    """Our worker's program; a likelihood comes with every sample, asked for or not."""

    def __init__(self, folder: Path) -> None:
        from airgap.inference.program import create

        self.program = create({"folder": str(folder), "precision": "fp32", "threads": THREADS})
        self.program.warm_up()
        self.seed, self.tokens, self.cpu = 0, 0, list[float]()

    def __call__(self, *, rows: int, likelihood: bool) -> float:
        """Draw; returns seconds of the wall."""
        del likelihood
        from airgap.inference.protocol import Generate, parse_reply, segments_of

        self.seed += 1
        request = Generate(
            prompt=segments_of(PROMPT),
            n=rows,
            max_new_tokens=TOKENS,
            temperature=1.2,
            top_p=0.85,
            top_k=50,
            repetition_penalty=1.05,
            seed=self.seed,
        )
        wall, cpu = time.perf_counter(), time.process_time()
        reply = self.program.handle(request.encode(), lambda _event: None)
        spent = time.perf_counter() - wall
        self.cpu.append(time.process_time() - cpu)
        self.tokens = parse_reply(reply).tokens
        return spent


class Remote:
    """A peer in an environment of its own."""

    def __init__(self, kind: str, snapshot: Path, cache: Path = FOLDER / "models") -> None:
        self._peer = Peer(kind, model=str(snapshot), cache=str(cache), threads=THREADS)
        self.load_s = float(self._peer.ready["load"])
        self.what = f"{kind} {self._peer.ready['version']}"
        self._ids = prompt_ids(snapshot)
        self.seed, self.tokens, self.cpu = 0, 0, list[float]()

    def __call__(self, *, rows: int, likelihood: bool) -> float:
        """Draw, and score where it is asked for."""
        self.seed += 1
        answer = self._peer.ask(
            prompt=self._ids, rows=rows, tokens=TOKENS, seed=self.seed, likelihood=likelihood
        )
        self.tokens = answer["tokens"]
        self.cpu.append(answer["cpu"])
        return float(answer["seconds"])

    def close(self) -> None:
        """End its process."""
        self._peer.close()


class InProcess:
    """transformers, or optimum's model on onnxruntime: both have one `generate`."""

    def __init__(self, snapshot: Path, model: Any, what: str) -> None:
        import torch

        torch.set_num_threads(THREADS)
        self.model, self.what = model, what
        self._ids = prompt_ids(snapshot)
        self.seed, self.tokens, self.cpu = 0, 0, list[float]()

    def __call__(self, *, rows: int, likelihood: bool) -> float:
        """Draw in one batch, then score each sequence in a pass of its own."""
        import torch

        self.seed += 1
        torch.manual_seed(self.seed)
        wall, cpu = time.perf_counter(), time.process_time()
        first = torch.tensor([self._ids])
        with torch.no_grad():
            drawn = self.model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.2,
                top_p=0.85,
                top_k=50,
                repetition_penalty=1.05,
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                num_return_sequences=rows,
                pad_token_id=0,
            )
            if likelihood:
                for row in drawn:
                    logits = self.model(row[None]).logits[0, len(self._ids) - 1 : -1]
                    table = torch.log_softmax(logits, dim=-1)
                    table.gather(1, row[len(self._ids) :, None]).sum().item()
        spent = time.perf_counter() - wall
        self.cpu.append(time.process_time() - cpu)
        self.tokens = int(drawn.shape[0] * (drawn.shape[1] - len(self._ids)))
        return spent

    def close(self) -> None:
        """Nothing to end."""


def transformers_peer(snapshot: Path) -> InProcess:
    """Return transformers in fp32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32).eval()
    return InProcess(snapshot, model, f"transformers {transformers.__version__}, batched generate")


def optimum_peer(snapshot: Path) -> InProcess:
    """Return optimum's export, made once, with its own generate."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    folder = FOLDER / "models" / f"optimum-{snapshot.name}"
    if not folder.exists():
        ORTModelForCausalLM.from_pretrained(snapshot, export=True).save_pretrained(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
    return InProcess(snapshot, model, "optimum ORTModelForCausalLM, batched generate")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "transformers": transformers_peer,
    "optimum": optimum_peer,
}


def prompt_ids(snapshot: Path) -> list[int]:
    """Return the ids of the prompt, start token included, as our worker has them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(snapshot / "tokenizer.json"))
    return [2, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)
