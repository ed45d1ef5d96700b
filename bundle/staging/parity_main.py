"""The parity program: the source in torch and the graph in onnxruntime side by side. Runs sealed.

`python -I parity_main.py SOURCE GRAPHS PROMPTS OUT`, started by `bundle.staging.parity` through
the sealed runner. For each prompt the graph makes one full pass and then decodes `STEPS` greedy
tokens with its key-value cache. The source sees prompt and tokens in one pass without a cache:
where both choose the same token at every step, given the same context, both greedy sequences are
the same. It only measures; `bundle.staging.parity` judges the figures that it leaves in
OUT/parity.json.

Numbers are written as decimal strings: the statement that carries them holds no floats.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

QUIET = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "DO_NOT_TRACK": "1",
    "PYTHONHASHSEED": "0",
}
STEPS = 64  # greedy tokens a prompt
TOP = 8  # largest logits kept a prompt, for the smoke test on the target


def main(argv: list[str]) -> int:
    """Compare `argv[0]` (source) with `argv[1]` (graphs) on `argv[2]`; figures go to `argv[3]`."""
    os.environ.update(QUIET)
    warnings.simplefilter("ignore")
    source, graphs, prompts, out = (Path(argument) for argument in argv)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    reference, graph = Source(source), Graph(graphs / "model.onnx")
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for index, prompt in enumerate(json.loads(prompts.read_bytes())["prompts"]):
        ids, reason = reference.encode(prompt["prompt"])
        if reason:
            skipped.append({"index": index, "reason": reason})
        else:
            rows.append({"index": index, **compare(reference, graph, ids)})
    (out / "parity.json").write_text(
        json.dumps(
            {
                "steps": STEPS,
                "provider": graph.provider,
                "versions": versions(),
                "rows": rows,
                "skipped": skipped,
            },
            sort_keys=True,
        )
    )
    return 0


class Source:
    """The published weights in torch, fp32, loaded from safetensors without remote code."""

    def __init__(self, folder: Path) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()
        self.bos = self.model.config.bos_token_id
        declared = json.loads((folder / "tokenizer.json").read_bytes())["model"].get("unk_token")
        self.unk = None if declared is None else self.tokenizer.token_to_id(declared)

    def encode(self, prompt: str) -> tuple[list[int], str]:
        """Return the ids and no reason, or no ids and the reason why this prompt cannot be used."""
        ids = list(self.tokenizer.encode(prompt).ids)
        if self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        if self.unk is not None and self.unk in ids:
            return [], "the tokenizer lacks a token"
        if len(ids) + STEPS > self.model.config.max_position_embeddings:
            return [], "longer than the context"
        return ids, ""

    def full(self, ids: list[int]) -> Any:
        """Return float32[tokens, vocabulary] of one pass without a cache."""
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


class Graph:
    """The converted graph in onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.provider = self.session.get_providers()[0]
        self.names = [value.name for value in self.session.get_inputs()]
        self.empty = {
            value.name: (1, value.shape[1], 0, value.shape[3])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.past: dict[str, Any] = {}

    def full(self, ids: list[int]) -> Any:
        """Return float32[tokens, vocabulary] of one pass from an empty cache."""
        import numpy as np

        self.past = {name: np.zeros(shape, np.float32) for name, shape in self.empty.items()}
        return self._run(ids, 0)

    def step(self, token: int) -> Any:
        """Append one token to the cache; returns float32[vocabulary]."""
        seen = next(iter(self.past.values())).shape[2]
        return self._run([token], seen)[-1]

    def _run(self, ids: list[int], seen: int) -> Any:
        import numpy as np

        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, seen + len(ids)), np.int64),
            "position_ids": np.arange(seen, seen + len(ids), dtype=np.int64)[None],
            **self.past,
        }
        outputs = [value.name for value in self.session.get_outputs()]
        found = self.session.run(outputs, {name: feed[name] for name in self.names})
        result = dict(zip(outputs, found, strict=True))
        self.past = {
            name: result[name.replace("past_key_values.", "present.")] for name in self.empty
        }
        return result["logits"][0]


def compare(reference: Source, graph: Graph, ids: list[int]) -> dict[str, Any]:
    """Return the figures of one prompt; a number that is not finite is reported as it is."""
    import numpy as np

    ours = graph.full(ids)
    steps, greedy = [ours[-1]], [int(ours[-1].argmax())]
    while len(greedy) < STEPS:
        steps.append(graph.step(greedy[-1]))
        greedy.append(int(steps[-1].argmax()))
    theirs = reference.full(ids + greedy[:-1])
    first, answers = theirs[len(ids) - 1], theirs[len(ids) - 1 :]
    ordered = np.sort(answers, axis=1)
    top = np.argsort(-first, kind="stable")[:TOP]
    return {
        "ids": ids,
        "source": answers.argmax(axis=1).tolist(),
        "graph": greedy,
        "full": text(abs(theirs[: len(ids)] - ours).max()),
        "past": text(abs(answers - np.stack(steps)).max()),
        "margin": text((ordered[:, -1] - ordered[:, -2]).min()),
        "top": [[int(token), text(first[token])] for token in top],
    }


def text(value: float) -> str:
    """Write a number with four significant digits, in the same way on every machine."""
    return f"{float(value):.3e}"


def versions() -> dict[str, str]:
    """Return the versions that decide the figures."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "onnxruntime", "tokenizers")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
