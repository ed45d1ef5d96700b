"""The parity program: the source in torch and the graphs in onnxruntime side by side. Runs sealed.

`python -I parity_main.py SOURCE GRAPHS PROMPTS OUT`, started by `bundle.staging.parity` through
the sealed runner. For each prompt a graph makes one full pass and then decodes `STEPS` greedy
tokens with its key-value cache. The source sees prompt and tokens in one pass without a cache:
where both choose the same token at every step, given the same context, both greedy sequences are
the same. The fast graph also runs the prompt in two pieces, and three beginnings of it of different
length in one batch; it gives its `FAST_TOP` largest logits and the logarithm of the sum of all, and
those are compared. It only measures; `bundle.staging.parity` judges the figures that it leaves in
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
FAST_TOP = 128  # logits of a position that are compared on the fast graph
TOP = 8  # largest logits kept a prompt, for the smoke test on the target


def main(argv: list[str]) -> int:
    """Compare `argv[0]` (source) with `argv[1]` (graphs) on `argv[2]`; figures go to `argv[3]`."""
    os.environ.update(QUIET)
    warnings.simplefilter("ignore")
    source, graphs, prompts, out = (Path(argument) for argument in argv)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    reference = Source(source)
    found = {
        name: kind(graphs / path)
        for name, path, kind in (("fast", "fast.onnx", Fast), ("reference", "model.onnx", Graph))
        if (graphs / path).exists()
    }
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for index, prompt in enumerate(json.loads(prompts.read_bytes())["prompts"]):
        ids, reason = reference.encode(prompt["prompt"])
        if reason:
            skipped.append({"index": index, "reason": reason})
        else:
            rows.append({"index": index, **compare(reference, found, ids)})
    (out / "parity.json").write_text(
        json.dumps(
            {
                "steps": STEPS,
                "graphs": sorted(found),
                "provider": " ".join(sorted({graph.provider for graph in found.values()})),
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


def open_session(path: Path) -> Any:
    """Open a graph on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Graph:
    """The reference graph in onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        self.session = open_session(path)
        self.provider = self.session.get_providers()[0]
        self.names = [value.name for value in self.session.get_inputs()]
        self.empty = {
            value.name: (1, value.shape[1], 0, value.shape[3])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.past: dict[str, Any] = {}

    def decode(self, ids: list[int]) -> tuple[list[int], Any, Any]:
        """Return the greedy tokens, the logits of the prompt and those of each step."""
        import numpy as np

        full = self._full(ids)
        steps, greedy = [full[-1]], [int(full[-1].argmax())]
        while len(greedy) < STEPS:
            steps.append(self._run([greedy[-1]], len(ids) + len(greedy) - 1)[-1])
            greedy.append(int(steps[-1].argmax()))
        return greedy, full, np.stack(steps)

    def deltas(self, ids: list[int], full: Any, steps: Any, theirs: Any) -> tuple[float, float]:
        """Return the largest difference from the source in the prompt, and in the steps."""
        answers = theirs[len(ids) - 1 :]
        return abs(theirs[: len(ids)] - full).max(), abs(answers - steps).max()

    def _full(self, ids: list[int]) -> Any:
        """Return float32[tokens, vocabulary] of one pass from an empty cache."""
        import numpy as np

        self.past = {name: np.zeros(shape, np.float32) for name, shape in self.empty.items()}
        return self._run(ids, 0)

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


class Fast:
    """The fast graph in onnxruntime on the CPU: one buffer, the head inside."""

    def __init__(self, path: Path) -> None:
        self.session = open_session(path)
        self.provider = self.session.get_providers()[0]
        values = self.session.get_inputs()
        self.caches = {
            value.name: (value.shape[1], value.shape[3])
            for value in values
            if value.name.startswith("past_key_values.")
        }
        self.size = next(value.shape[1] for value in values if value.name == "legal")
        self.buffers: dict[str, Any] = {}

    def decode(self, ids: list[int]) -> tuple[list[int], Any, Any]:
        """Return the greedy tokens, the heads of the prompt and those of each step."""
        self._reset(1, len(ids) + STEPS)
        full = self._run([ids], [len(ids)], range(len(ids)))
        greedy, steps = [int(full[0][-1, 0])], [tuple(part[-1:] for part in full)]
        while len(greedy) < STEPS:
            found = self._run([greedy[-1:]], [len(ids) + len(greedy)], [0])
            steps.append(found)
            greedy.append(int(found[0][0, 0]))
        return greedy, full, steps

    def deltas(self, ids: list[int], full: Any, steps: Any, theirs: Any) -> tuple[float, float]:
        """Return the largest difference in the prompt however it runs, and in the steps."""
        import numpy as np

        count = len(ids)
        half, thirds = count // 2, [max(1, count // 3), max(1, 2 * count // 3), count]
        self._reset(1, count)
        pieces = []
        for start, end in ((0, half), (half, count)):
            if end > start:
                pieces.append(self._run([ids[start:end]], [end], range(end - start)))
        self._reset(3, count)
        padded = [ids[:end] + ids[:1] * (count - end) for end in thirds]
        picked = [row * count + end - 1 for row, end in enumerate(thirds)]
        together = self._run(padded, thirds, picked)
        worst = [
            apart(theirs[:count], full),
            apart(theirs[:count], [np.concatenate(part) for part in zip(*pieces, strict=True)]),
            apart(theirs[[end - 1 for end in thirds]], together),
        ]
        answers = [np.concatenate(part) for part in zip(*steps, strict=True)]
        return float(np.max(worst)), apart(theirs[count - 1 :], answers)

    def _reset(self, rows: int, capacity: int) -> None:
        import numpy as np

        self.buffers = {
            name: np.zeros((rows, heads, capacity, width), np.float32)
            for name, (heads, width) in self.caches.items()
        }

    def _run(self, rows: list[list[int]], lengths: list[int], select: Any) -> tuple[Any, ...]:
        """Return (ids, raw logits, log of the sum of exp) at the picked places."""
        import numpy as np

        picked = np.array(list(select), np.int64)
        count = len(picked)
        feeds = {
            "input_ids": np.array(rows, np.int64),
            "seqlens_k": np.array(lengths, np.int32) - 1,
            "total_sequence_length": np.array(max(lengths), np.int32),
            "select": picked,
            "seen": np.zeros((count, 1), np.int64),
            "penalty": np.ones((count, 1), np.float32),
            "legal": np.ones((1, self.size), np.bool_),
            "constrained": np.array(False),
            "target": np.zeros(count, np.int64),
            "top_k": np.array([min(FAST_TOP, self.size)], np.int64),
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, array in self.buffers.items():
            other, place = name.replace("past_key_values.", "present."), array.ctypes.data
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, place)
            binding.bind_output(other, "cpu", 0, np.float32, array.shape, place)
        for name in ("ids", "raw", "log_z"):
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return tuple(value.numpy() for value in binding.get_outputs()[-3:])


def apart(theirs: Any, found: Any) -> float:
    """Return how far the largest logits and the sum over all are from the source's."""
    import numpy as np

    ids, raw, log_z = found
    wide = theirs.astype(np.float64)
    peak = wide.max(axis=1)
    sums = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    logits = abs(np.take_along_axis(wide, ids, axis=1) - raw).max()
    return float(np.maximum(logits, abs(sums - log_z).max()))  # a NaN stays one


def compare(reference: Source, graphs: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """Return the figures of one prompt; a number that is not finite is reported as it is."""
    import numpy as np

    decoded = {name: graph.decode(ids) for name, graph in graphs.items()}
    greedy = next(iter(decoded.values()))[0]  # another that differs is refused by the judge
    theirs = reference.full(ids + greedy[:-1])
    first, answers = theirs[len(ids) - 1], theirs[len(ids) - 1 :]
    ordered = np.sort(answers, axis=1)
    top = np.argsort(-first, kind="stable")[:TOP]
    found = {}
    for name, graph in graphs.items():
        tokens, full, steps = decoded[name]
        here, there = graph.deltas(ids, full, steps, theirs)
        found[name] = {"greedy": tokens, "full": text(here), "past": text(there)}
    return {
        "ids": ids,
        "source": answers.argmax(axis=1).tolist(),
        "graphs": found,
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
