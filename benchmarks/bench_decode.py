"""Samples with their log-likelihoods: our worker against what the authors' scripts do.

Obeys docs/design/inference.md, 7: one prompt, 32 samples and a likelihood for each, on the
reference model in fp32, one thread a side.
The peer is transformers: one batched `generate`, then a pass over each sequence. Both draw at the
authors' settings, so both write about as many tokens; the conditions name them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import Context, Result, SkipBenchmark, paired, seconds

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = Path(
    os.environ.get("AIRGAP_BENCH_MODEL", ROOT / "reference" / "logos-ref-tiny" / "model")
)
CONVERT = ROOT / "bundle" / "staging" / "convert_main.py"
PROMPTS = {
    "retrosynthesis": "<MoleculeS>CC(=O)Nc1ccc(OCc2ccccc2)cc1<MoleculeE><ReverseReact>",
    "molecule": "<MoleculeS>",
}
SAMPLES = 32
NEW_TOKENS = 128
THREADS = 1
TARGET = 2.7  # without the fast graph: docs/design/inference.md, 7


def run(context: Context) -> list[Result]:
    """Measure each prompt."""
    if not (SNAPSHOT / "model.safetensors").is_file():
        raise SkipBenchmark(f"no weights in {SNAPSHOT}")
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    with context.folder() as scratch:
        context.step("converting the reference model")
        ours, peer = Ours(installed(scratch / "model")), Peer(SNAPSHOT)
        found = []
        for name, prompt in PROMPTS.items():
            context.step(f"{name}: {SAMPLES} samples a run")
            pair = paired(
                seconds(lambda p=prompt: ours(p)), seconds(lambda p=prompt: peer(p)), context.runs
            )
            found.append(
                pair.lower_is_better(
                    f"{name}.likelihood",
                    unit="s",
                    target=TARGET,
                    samples=SAMPLES,
                    threads=THREADS,
                    peer_is="transformers generate, batch 32, then a pass a sequence",
                    our_tokens=ours.tokens,
                    peer_tokens=peer.tokens,
                )
            )
    return found


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


def installed(folder: Path) -> Path:
    """Convert the snapshot as staging does and write what the worker is told."""
    folder.mkdir()
    subprocess.run([sys.executable, "-I", str(CONVERT), str(SNAPSHOT), str(folder)], check=True)
    signature = json.loads((folder / "convert.json").read_text())
    shutil.copy(SNAPSHOT / "tokenizer.json", folder)
    config = json.loads((SNAPSHOT / "config.json").read_text())
    (folder / "graphs.json").write_text(json.dumps(graphs(folder, config, signature)))
    return folder


def graphs(folder: Path, config: dict[str, Any], signature: dict[str, Any]) -> dict[str, Any]:
    """Return graphs.json."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    control = {config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")} | {ids["<unk>"]}
    return {
        "format": "airgap-graphs/1",
        "model": "logos-ref-tiny",
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
                "name": "reference",
                "precision": "fp32",
                "path": "model.onnx",
                "sha256": _sha256(folder / "model.onnx"),
                "external": [],
                "inputs": signature["inputs"],
                "outputs": signature["outputs"],
                "kv_layout": "BHSD",
                "interface": "past",
            }
        ],
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    import harness

    harness.run_this(__file__)
