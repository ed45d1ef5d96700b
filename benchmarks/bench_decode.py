"""Samples with their log-likelihoods: our worker against what the authors' scripts do.

Obeys docs/design/inference.md, 7: one prompt, 32 samples and a likelihood for each, in fp32, both
sides with the same threads. Three parts:

- the reference model (a vocabulary of 148, four layers: overheads, not products of matrices);
- with AIRGAP_BENCH_LARGE=1 a Llama of 103 M parameters with random weights, made by transformers;
- a copy with its grammar: runs of the graph for each token, against the same without guesses.

The peer of the first two is transformers: one batched `generate`, then a pass over each sequence.
Both draw at the authors' settings, so both write about as many tokens; the conditions name them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from harness import Context, Result, SkipBenchmark, alone, paired, seconds

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = Path(
    os.environ.get("AIRGAP_BENCH_MODEL", ROOT / "reference" / "logos-ref-tiny" / "model")
)
PROMPTS = {
    "retrosynthesis": "<MoleculeS>CC(=O)Nc1ccc(OCc2ccccc2)cc1<MoleculeE><ReverseReact>",
    "molecule": "<MoleculeS>",
}
SAMPLES = 32
NEW_TOKENS = 128
THREADS = int(os.environ.get("AIRGAP_BENCH_THREADS", "1"))
TARGET_SMALL = 2.7  # where overheads decide; the 6 of the design is for a model of 103 M
TARGET = 6.0
COPY_TARGET = 5.0  # tokens for each run of the graph
RESIDUES, ROOM = 200, 300  # prompt, copy and its pockets share a context of 512


def run(context: Context) -> list[Result]:
    """Measure each model and prompt."""
    if not (SNAPSHOT / "model.safetensors").is_file():
        raise SkipBenchmark(f"no weights in {SNAPSHOT}")
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    with context.folder() as scratch:
        context.step("converting the reference model")
        small = installed(SNAPSHOT, scratch / "small")
        found = [
            likelihood(context, SNAPSHOT, small, name, prompt, target=TARGET_SMALL)
            for name, prompt in PROMPTS.items()
        ]
        found.append(copies(context, small))
        if os.environ.get("AIRGAP_BENCH_LARGE"):
            context.step("making a model of 103 M parameters")
            snapshot = large_snapshot(scratch / "snapshot")
            large = installed(snapshot, scratch / "large")
            prompt = PROMPTS["retrosynthesis"]
            found.append(likelihood(context, snapshot, large, "103m", prompt, target=TARGET))
    return found


def likelihood(
    context: Context, snapshot: Path, folder: Path, name: str, prompt: str, *, target: float
) -> Result:
    """Measure samples and likelihoods on one model."""
    context.step(f"{name}: {SAMPLES} samples a run")
    ours, peer = Ours(folder), Peer(snapshot)
    pair = paired(seconds(lambda: ours(prompt)), seconds(lambda: peer(prompt)), context.runs)
    return pair.lower_is_better(
        f"{name}.likelihood",
        unit="s",
        target=target,
        samples=SAMPLES,
        threads=THREADS,
        graph="fast",
        peer_is="transformers generate, batch 32, then a pass a sequence",
        our_tokens=ours.tokens,
        peer_tokens=peer.tokens,
    )


def copies(context: Context, folder: Path) -> Result:
    """Count runs of the graph for the tokens of one constrained copy."""
    from airgap.inference.protocol import Generate, Grammar, parse_reply, segments_of

    context.step(f"copy of {RESIDUES} residues")
    worker = Ours(folder)
    sequence = ("MKVLATGEDRSTNQHPFYWIC" * 10)[:RESIDUES]
    rates: list[float] = []

    def once() -> float:
        worker.seed += 1
        request = Generate(
            prompt=segments_of(f"<ProteinS>{sequence}<ProteinE><Search><ProteinS>"),
            n=1,
            max_new_tokens=ROOM,
            temperature=1.0,
            top_p=0.95,
            top_k=50,
            repetition_penalty=1.0,
            seed=worker.seed,
            stop=("<ProteinE>",),
            grammar=Grammar("copy", "", sequence),
        )
        reply = parse_reply(worker.program.handle(request.encode(), lambda _event: None))
        rates.append(reply.tokens / reply.runs)
        return rates[-1]

    pair = alone(once, 1.0, context.runs)
    return pair.higher_is_better(
        "copy.tokens_per_run",
        unit="tokens/run",
        target=COPY_TARGET,
        residues=RESIDUES,
        peer_is="one run a token, which is what a loop without guesses needs",
    )


class Ours:
    """The worker's program, unsealed: the seal costs nothing (docs/design/enclave.md, 11)."""

    def __init__(self, folder: Path) -> None:
        from airgap.inference.program import create

        self.program = create({"folder": str(folder), "precision": "fp32", "threads": THREADS})
        self.program.warm_up()
        self.tokens = 0
        self.seed = 0

    def __call__(self, prompt: str) -> None:
        """Draw and score."""
        from airgap.inference.protocol import Generate, parse_reply, segments_of

        self.seed += 1
        request = Generate(
            prompt=segments_of(prompt),
            n=SAMPLES,
            max_new_tokens=NEW_TOKENS,
            temperature=1.2,
            top_p=0.85,
            top_k=50,
            repetition_penalty=1.05,
            seed=self.seed,
        )
        reply = self.program.handle(request.encode(), lambda _event: None)
        self.tokens = parse_reply(reply).tokens


class Peer:
    """Batched generate, then the likelihood of each sequence from a pass of its own."""

    def __init__(self, snapshot: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(THREADS)
        self.model = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(snapshot)
        self.tokens = 0
        self.seed = 0

    def __call__(self, prompt: str) -> None:
        """Draw, then score."""
        import torch

        self.seed += 1
        torch.manual_seed(self.seed)
        first = [self.tokenizer.bos_token_id, *self.tokenizer(prompt)["input_ids"]]
        with torch.no_grad():
            rows = self.model.generate(
                torch.tensor([first]),
                attention_mask=torch.ones(1, len(first), dtype=torch.int64),
                do_sample=True,
                temperature=1.2,
                top_p=0.85,
                top_k=50,
                repetition_penalty=1.05,
                max_new_tokens=NEW_TOKENS,
                num_return_sequences=SAMPLES,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            end, tokens = self.tokenizer.eos_token_id, 0
            for row in rows.tolist():
                new = row[len(first) :]
                new = new[: new.index(end) + 1] if end in new else new
                ids = torch.tensor([first + new])
                table = torch.log_softmax(self.model(ids).logits[0, len(first) - 1 : -1], dim=-1)
                table.gather(1, ids[0, len(first) :, None]).sum().item()
                tokens += len(new)
        self.tokens = tokens


def large_snapshot(folder: Path) -> Path:
    """Make a Llama of 103 M parameters with random weights and the reference tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=24_000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=2,
            eos_token_id=3,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SNAPSHOT / name, folder)
    return folder


def installed(snapshot: Path, folder: Path) -> Path:
    """Write the fast graph as staging does, and what the worker is told."""
    from bundle.scan.safetensors import parse_safetensors
    from bundle.scan.strict import open_view
    from bundle.staging.architecture import expected_tensors, parse_architecture
    from bundle.staging.graph import Placed, interface, write_graph

    folder.mkdir()
    config = json.loads((snapshot / "config.json").read_text())
    shape = parse_architecture(config)
    wanted = expected_tensors(shape)
    weights = snapshot / "model.safetensors"
    placed = {
        tensor.name: Placed(weights.name, tensor)
        for tensor in parse_safetensors(open_view(weights)).tensors
        if tensor.name in wanted
    }
    (folder / "fast.onnx").write_bytes(write_graph(shape, placed))
    for name in (weights.name, "tokenizer.json"):
        shutil.copy(snapshot / name, folder)
    inputs, outputs = interface(shape.layers)
    (folder / "graphs.json").write_text(json.dumps(graphs(folder, config, inputs, outputs)))
    return folder


def graphs(
    folder: Path, config: dict[str, Any], inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> dict[str, Any]:
    """Return graphs.json."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    control = {config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")} | {ids["<unk>"]}
    return {
        "format": "airgap-graphs/1",
        "model": "benchmark",
        "architecture": config["model_type"],
        "vocab_size": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "max_context": config["max_position_embeddings"],
        "bos_id": config["bos_token_id"],
        "eos_ids": [config["eos_token_id"]],
        "pad_id": config["pad_token_id"],
        "unk_id": ids["<unk>"],
        "reference_model": True,
        "scientific_use": False,
        "tokenizer": {"path": "tokenizer.json", "sha256": _sha256(folder / "tokenizer.json")},
        "tags": {token: number for token, number in ids.items() if number not in control},
        "graphs": [
            {
                "name": "fast",
                "precision": "fp32",
                "path": "fast.onnx",
                "sha256": _sha256(folder / "fast.onnx"),
                "external": [
                    {"path": "model.safetensors", "sha256": _sha256(folder / "model.safetensors")}
                ],
                "inputs": inputs,
                "outputs": outputs,
                "kv_layout": "BHSD",
                "interface": "shared",
            }
        ],
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)
