"""Train the reference model: packed rows in, checkpoints and a Hugging Face folder out.

Obeys docs/design/science.md, 7. Nothing is drawn at random after the first weights: the
order of rows follows from the corpus, the mix and the seed alone, which is why a resumed run can
replay it and reach the same weights as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpus import CONTEXT

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MIX = {
    "molecule": 0.48,
    "retro": 0.17,
    "react": 0.07,
    "protein": 0.05,
    "search": 0.14,
    "complex": 0.04,
    "material": 0.05,
}
"""Share of trained tokens by task. `search` is high because copying is not learnt below it."""
FILLER = "molecule"
"""The task whose documents close a row; the last of them is cut at the end of the row."""
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
LOGGED = 50
"""Steps between two points of the loss curve, each the mean over these steps."""
KEPT = 250
"""Steps between two checkpoints, about two minutes."""
WARM_UP = 100
LAST_RATE = 0.02
"""Learning rate of the last step as a share of the peak."""

SMOKE_STEPS = 100
SMOKE_REPEATED = 20
SMOKE_LOSS = 2.2
"""Nats per token that the mean over the last 50 smoke steps must stay under."""


class TrainingError(Exception):
    """A run cannot start, cannot be resumed, or did not do what the recipe promises."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the weights besides the corpus and the versions.

    `batch` rows of `length` tokens make a step; in the last `long_share` of the steps the rows are
    twice as long and half as many. `muon` and `adam` are peak learning rates.
    """

    steps: int
    seed: int
    batch: int = 16
    length: int = 256
    long_share: float = 0.25
    muon: float = 0.02
    adam: float = 4e-3
    width: int = 128
    layers: int = 4
    heads: int = 4
    feed: int = 320


@dataclass(slots=True)
class Progress:
    """What a run has done so far; `seconds` is wall time over all its parts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


# -- commands -------------------------------------------------------------------------------------


def train(out: Path, plan: Plan, *, resume: bool = False) -> dict[str, Any]:
    """Train to the end of `plan`; write `model/` and `training.json`, and return the latter."""
    run = Run(out, plan)
    if resume:
        run.load(out / "checkpoint.pt")
    while run.progress.step < plan.steps:
        run.advance()
        if run.progress.step % LOGGED == 0:
            print(run.line(), flush=True)
        if run.progress.step % KEPT == 0 or run.progress.step == WARM_UP:
            run.save(out / "checkpoint.pt")
            run.export(out / "model")
    run.export(out / "model")
    record = run.record()
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def smoke(out: Path, plan: Plan) -> dict[str, Any]:
    """Train `plan`, repeat its first steps, and return the figures; raise if one is wrong."""
    run = Run(out, plan)
    early = ""
    while run.progress.step < plan.steps:
        run.advance()
        if run.progress.step == SMOKE_REPEATED:
            early = run.digest()
    run.export(out / "model")
    again = Run(out, plan)
    for _ in range(SMOKE_REPEATED):
        again.advance()
    loss = mean(run.progress.losses[-LOGGED:])
    report = {
        "steps": plan.steps,
        "tokens": run.progress.tokens,
        "loss_first_10": round(mean(run.progress.losses[:10]), 4),
        "loss_last_50": round(loss, 4),
        "limit": SMOKE_LOSS,
        "seconds": round(run.progress.seconds + again.progress.seconds, 1),
        "repeated_steps": SMOKE_REPEATED,
        "digest": run.digest(),
    }
    if again.digest() != early:
        raise TrainingError(
            f"two runs differ after {SMOKE_REPEATED} steps: {early[:16]} and {again.digest()[:16]}"
        )
    if not loss < SMOKE_LOSS:
        raise TrainingError(f"loss {loss:.3f} nats/token is not under {SMOKE_LOSS}")
    return report


def mean(values: list[float]) -> float:
    """Return the arithmetic mean; a run without steps has none."""
    return sum(values) / len(values)


# -- one run --------------------------------------------------------------------------------------


class Run:
    """A model, its optimisers and its stream of rows, advanced one step at a time."""

    def __init__(self, out: Path, plan: Plan) -> None:
        """Read corpus and tokenizer from `out` and draw the first weights."""
        import torch
        from transformers import AutoTokenizer

        torch.set_num_threads(1)
        torch.manual_seed(plan.seed)
        torch.use_deterministic_algorithms(mode=True)
        self.plan = plan
        self.progress = Progress()
        self.tokenizer = AutoTokenizer.from_pretrained(out / "model")
        documents = read_corpus(out / "corpus", self.tokenizer, plan.seed)
        self.corpus = digest_of(documents)
        self.spent: Counter[str] = Counter()
        self.short = rows(documents, plan.length, self.spent)
        self.long = rows(documents, 2 * plan.length, self.spent)
        self.model = build_model(self.tokenizer, plan)
        self.optimisers = build_optimisers(self.model, plan)

    def batch(self, step: int) -> list[list[int]]:
        """Return the rows of one step; must be called for every step in order."""
        if step < self.plan.steps * (1 - self.plan.long_share):
            return [next(self.short) for _ in range(self.plan.batch)]
        return [next(self.long) for _ in range(self.plan.batch // 2)]

    def advance(self) -> None:
        """Take one step: bfloat16 forward and backward, float32 weights."""
        import torch

        began = time.monotonic()
        step = self.progress.step
        batch = torch.tensor(self.batch(step))
        for optimiser, peak in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * schedule(step, self.plan.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, _ in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.progress.losses.append(loss.item())
        self.progress.step += 1
        self.progress.tokens += batch.numel()
        self.progress.seconds += time.monotonic() - began

    def line(self) -> str:
        """Return one line for the operator: step, tokens, loss, rate, time left."""
        done = self.progress
        rate = done.tokens / done.seconds
        left = done.seconds / done.step * (self.plan.steps - done.step)
        return (
            f"step {done.step}/{self.plan.steps} tokens {done.tokens / 1e6:.2f}M "
            f"loss {mean(done.losses[-LOGGED:]):.4f} {rate:.0f} tokens/s "
            f"{left / 60:.1f} min left"
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint beside `path`, then rename, so that a crash leaves the old one."""
        import torch

        beside = path.with_suffix(".new")
        state = {
            "plan": asdict(self.plan),
            "corpus": self.corpus,
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
        }
        torch.save(state, beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; the rows it has seen are drawn again and dropped."""
        import torch

        state = torch.load(path, weights_only=True)
        if state["plan"] != asdict(self.plan) or state["corpus"] != self.corpus:
            raise TrainingError(f"{path} belongs to another plan or corpus")
        self.model.load_state_dict(state["model"])
        for (optimiser, _), kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.progress = Progress(**state["progress"])
        for step in range(self.progress.step):
            self.batch(step)

    def export(self, folder: Path) -> None:
        """Write configuration and float32 weights beside the tokenizer."""
        from transformers import GenerationConfig

        ids = {name: getattr(self.tokenizer, name) for name in SPECIAL_IDS}
        self.model.generation_config = GenerationConfig(do_sample=True, **ids)
        self.model.config.use_cache = True
        self.model.save_pretrained(folder)
        self.model.config.use_cache = False

    def digest(self) -> str:
        """Return the SHA-256 over all weights by name, lower-case hex."""
        state = hashlib.sha256()
        for name, weights in sorted(self.model.state_dict().items()):
            state.update(name.encode())
            state.update(weights.detach().numpy().tobytes())
        return state.hexdigest()

    def record(self) -> dict[str, Any]:
        """Return the record of the run: what went in, what came out, on what machine."""
        losses = self.progress.losses
        spent = self.spent.total()
        names = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "rdkit")
        return {
            "arguments": asdict(self.plan),
            "mix": MIX,
            "corpus_sha256": self.corpus,
            "weights_sha256": self.digest(),
            "parameters": self.model.num_parameters(),
            "vocabulary": len(self.tokenizer),
            "tokens": self.progress.tokens,
            "tokens_by_task": {task: self.spent[task] for task in MIX},
            "share_by_task": {task: round(self.spent[task] / spent, 4) for task in MIX},
            "minutes": round(self.progress.seconds / 60, 1),
            "tokens_per_second": round(self.progress.tokens / self.progress.seconds),
            "versions": {name: version(name) for name in names},
            "machine": machine(),
            "loss_unit": f"nats per token over the mix, mean of {LOGGED} steps",
            "loss": {
                str(end): round(mean(losses[end - LOGGED : end]), 4)
                for end in range(LOGGED, len(losses) + 1, LOGGED)
            },
        }


def machine() -> dict[str, Any]:
    """Return the facts that can change the rounding of a run: processor, threads, system."""
    import torch

    return {
        "architecture": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": torch.cpu.get_capabilities().get("avx512_bf16", False),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": " ".join(platform.libc_ver()),
    }


# -- parts ----------------------------------------------------------------------------------------


def read_corpus(
    folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int
) -> dict[str, list[list[int]]]:
    """Encode every document between start and end of text, shuffled by the seed."""
    documents = {}
    for task in MIX:
        lines = (folder / f"{task}.txt").read_text().splitlines()
        random.Random(f"{seed} {task}").shuffle(lines)
        encoded = tokenizer(lines)["input_ids"]
        documents[task] = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    return documents


def digest_of(documents: dict[str, list[list[int]]]) -> str:
    """Return the SHA-256 over all encoded documents in order, lower-case hex."""
    state = hashlib.sha256()
    for task, encoded in documents.items():
        state.update(task.encode())
        for ids in encoded:
            state.update(repr(ids).encode())
    return state.hexdigest()


def rows(
    documents: dict[str, list[list[int]]], length: int, spent: Counter[str]
) -> Iterator[list[int]]:
    """Yield rows of exactly `length` ids: whole documents, then molecules, the last of them cut.

    Each row starts with a fresh document, so generation from an empty context is a trained case.
    The task that is furthest below its share of tokens comes next; a task starts over when it is
    used up. A document longer than a row is passed over: half a copy teaches nothing. `spent`
    counts tokens by task and may be shared between streams.
    """
    place: Counter[str] = Counter()

    def draw(task: str) -> list[int]:
        while True:
            document = documents[task][place[task] % len(documents[task])]
            place[task] += 1
            if len(document) <= length:
                return document

    waiting: list[int] = []
    while True:
        row, waiting = waiting, []
        while len(row) < length:
            task = FILLER if waiting else neediest(spent)
            document = draw(task)
            if task == FILLER:
                document = document[: length - len(row)]
            spent[task] += len(document)
            if len(row) + len(document) <= length:
                row = row + document
            else:
                waiting = document
        yield row


def neediest(spent: Counter[str]) -> str:
    """Return the task that is furthest below its share of the tokens spent."""
    total = spent.total()
    return max(MIX, key=lambda task: (MIX[task] * total - spent[task], MIX[task]))


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak rate: warm up, then fall along a cosine to `LAST_RATE`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARM_UP) * (LAST_RATE + (1 - LAST_RATE) * cosine)


def build_model(tokenizer: PreTrainedTokenizerFast, plan: Plan) -> LlamaForCausalLM:
    """Return a Llama of fresh weights whose configuration carries the stamp of a fixture."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.width,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        intermediate_size=plan.feed,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
        reference_model=True,
        scientific_use=False,
    )
    return LlamaForCausalLM(config)


def build_optimisers(
    model: LlamaForCausalLM, plan: Plan
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return Muon for the matrices and AdamW for embedding and norms, each with its peak rate."""
    import torch

    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weights in model.named_parameters():
        (matrices if weights.ndim == 2 and "embed" not in name else others).append(weights)
    muon = torch.optim.Muon(matrices, lr=plan.muon, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=plan.adam, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, plan.muon), (adam, plan.adam)]
