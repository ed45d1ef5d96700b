"""The parity program: the source in torch and the graphs in onnxruntime side by side. Runs sealed.

`python -I parity_main.py SOURCE GRAPHS PROMPTS OUT`, started by `bundle.staging.parity` through
the sealed runner; GRAPHS/plan.json names the graphs. It only measures; `bundle.staging.parity`
judges the figures that it leaves in OUT/parity.json. One model is in memory at a time: the answers
of the source lie in a file that is removed at the end.

A graph in fp32 makes one full pass of each prompt and then decodes `STEPS` greedy tokens with its
key-value cache, the fast one many prompts at once. The source sees prompt and tokens in one pass
without a cache: where both choose the same token at every step, given the same context, both greedy
sequences are the same. The fast graph also runs the prompt in two pieces, and three beginnings of
it of different length in one batch; it gives its `FAST_TOP` largest logits and the logarithm of the
sum of all, and those are compared.

A graph in another precision is held against the published weights by figures (divergence, best
token, greedy tokens, completions to be assessed). Where its matrices are codes, three things more
are measured, each alone: how far the codes in their file are from the published weights, in steps;
how far the graph's exact twin, which rounds no activation and is otherwise the same bytes, is from
a source that holds what the codes stand for; and how far the graph itself is from that source,
where nothing but the rounding of activations is left.

Numbers are written as decimal strings: the statement that carries them holds no floats.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Self

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
TOP = 8  # largest logits kept a prompt, for the proof on the target
ROWS = 16  # prompts that are decoded at once
PIECE = 32  # positions whose whole logits are taken at once
SAMPLES, SAMPLE_TOKENS, SAMPLE_TOP = 32, 96, 50  # completions of a task, drawn at temperature 1
FEW, LARGE = 8, 1 << 29  # completions of a task, where the weights have more bytes than that
TWINS = 3  # short prompts of the exact twin, beside the longest of all
ROUNDED, EXACT = 4, 1  # `accuracy_level` of the graph that travels, and of its twin
PART = 1 << 22  # weights of a matrix at once
TINY = 1e-30  # a block of smaller weights adds nothing to a sum in fp32
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
ANSWERS, CODED = "answers.bin", "coded.bin"


def main(argv: list[str]) -> int:
    """Compare `argv[0]` (source) with `argv[1]` (graphs) on `argv[2]`; figures go to `argv[3]`."""
    os.environ.update(QUIET)
    warnings.simplefilter("ignore")
    source, folder, path, out = (Path(argument) for argument in argv)
    plan = json.loads((folder / "plan.json").read_bytes())
    words = Words(source, plan["start"])
    prompts = json.loads(path.read_bytes())["prompts"]
    found = [
        (n, prompt["kind"], *words.encode(prompt["prompt"])) for n, prompt in enumerate(prompts)
    ]
    used = [(n, kind, ids) for n, kind, ids, reason in found if not reason]
    graphs = [Planned(folder, item) for item in plan["graphs"]]
    exact = [graph for graph in graphs if graph.precision == "fp32"]
    others = [graph for graph in graphs if graph.precision != "fp32"]
    session = exact[0].open()
    runs = session.decode([ids for _, _, ids in used])
    greedy = [run[0] for run in runs]
    kept = {exact[0].name: runs} if isinstance(session, Fast) else {}  # its heads are small
    del session, runs
    with Answers(out / ANSWERS) as theirs:
        reference = Source(source)
        for (_, _, ids), tokens in zip(used, greedy, strict=True):
            theirs.keep(reference.full(ids + tokens[:-1]))
        del reference
        rows = [
            {"index": n, "ids": ids, "graphs": {}, **first_answer(theirs[at], len(ids))}
            for at, (n, _, ids) in enumerate(used)
        ]
        providers = set()
        heads: dict[str, str] = {}
        longest = max((ids for _, _, ids in used), key=len)
        for graph in exact:
            session = graph.open()
            providers.add(session.provider)
            if isinstance(session, Fast):
                heads[graph.name] = text(session.head(longest))
            for at, (_, _, ids) in enumerate(used):
                run = kept[graph.name][at] if graph.name in kept else session.decode([ids])[0]
                rows[at]["graphs"][graph.name] = compare(session, ids, run, theirs[at])
            del session
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        count = SAMPLES if size < LARGE else FEW
        sampled = {kind: at for at, (_, kind, _) in reversed(list(enumerate(used)))}
        stops = {kind: words.number(tag) for kind, tag in plan["stops"].items()}
        tasks = [(used[at], stops.get(kind), count) for kind, at in sorted(sampled.items())]
        precisions = {
            graph.name: measure(graph, source, words, used, theirs=theirs, tasks=tasks, out=out)
            for graph in others
        }
        heads |= {name: figures.pop("head") for name, figures in precisions.items()}
        if others and exact[0].fast:
            baseline = exact[0].open()
            samples = [sample(baseline, words, *task) for task in tasks]
        else:
            samples = []
    (out / "parity.json").write_text(
        json.dumps(
            {
                "steps": STEPS,
                "graphs": sorted(graph.name for graph in exact),
                "provider": " ".join(sorted(providers)),
                "versions": versions(),
                "rows": rows,
                "heads": heads,
                "skipped": [{"index": n, "reason": reason} for n, _, _, reason in found if reason],
                "precisions": precisions,
                "samples": samples,
            },
            sort_keys=True,
        )
    )
    return 0


class Words:
    """The tokenizer, and what of the configuration bears on a prompt."""

    def __init__(self, folder: Path, start: int | None) -> None:
        from tokenizers import Tokenizer

        self.start = start
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_bytes())
        self.context = config["max_position_embeddings"]
        declared = json.loads((folder / "tokenizer.json").read_bytes())["model"].get("unk_token")
        self.unk = None if declared is None else self.tokenizer.token_to_id(declared)
        generation = folder / "generation_config.json"
        more = json.loads(generation.read_bytes()) if generation.exists() else {}
        ends = [config.get("eos_token_id"), more.get("eos_token_id")]
        self.ends = {n for end in ends for n in (end if isinstance(end, list) else [end])}

    def encode(self, prompt: str) -> tuple[list[int], str]:
        """Return the ids and no reason, or no ids and the reason why this prompt cannot be used."""
        ids = list(self.tokenizer.encode(prompt).ids)
        if self.start is not None and ids[:1] != [self.start]:
            ids.insert(0, self.start)
        if self.unk is not None and self.unk in ids:
            return [], "the tokenizer lacks a token"
        if len(ids) + STEPS > self.context:
            return [], "longer than the context"
        return ids, ""

    def number(self, tag: str) -> int | None:
        """Return the id of a tag, None where there is none."""
        found: int | None = self.tokenizer.token_to_id(tag)
        return found

    def text(self, ids: list[int]) -> str:
        """Return the text of ids, tags included."""
        found: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return found


class Source:
    """The published weights in torch, fp32, loaded from safetensors without remote code."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        self.model = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()

    def full(self, ids: list[int]) -> Any:
        """Return float32[tokens, vocabulary] of one pass without a cache."""
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()

    def take_codes(self, path: Path) -> dict[str, str]:
        """Put what the codes of a file stand for in the place of the matrices.

        Returns:
            How far they are from them: the two figures of `misfit`, the largest of all blocks.

        """
        import numpy as np
        import torch
        from safetensors import safe_open

        weights, worst = dict(self.model.named_parameters()), np.zeros(2)
        with safe_open(path, framework="numpy") as stored, torch.no_grad():
            for name in (key.removesuffix(".codes") for key in stored.keys()):  # noqa: SIM118
                if name.endswith(".scales"):
                    continue
                codes, scales = (stored.get_slice(f"{name}.{kind}") for kind in ("codes", "scales"))
                weight, width = weights[name], weights[name].shape[1]
                many = max(1, PART // width)
                for first in range(0, len(weight), many):
                    place = slice(first, min(first + many, len(weight)))
                    pair, part = (codes[place], scales[place]), weight[place].detach()
                    worst = np.maximum(worst, misfit(part.numpy(), *pair))
                    part.copy_(torch.from_numpy(values_of(*pair)[:, :width]))
        return {"step": text(worst[0]), "scale": text(worst[1])}


def steps_of(codes: Any) -> tuple[Any, int]:
    """Return float32[rows, blocks, 32], codes about their middle, and the middle.

    Two of 4 bits lie in a byte, the low half first.
    """
    import numpy as np

    middle = 128
    if codes.shape[2] == 16:  # noqa: PLR2004 - 32 codes of 4 bits
        codes = np.stack([codes & 15, codes >> 4], axis=3).reshape(*codes.shape[:2], 32)
        middle = 8
    return codes.astype(np.float32) - middle, middle


def values_of(codes: Any, scales: Any) -> Any:
    """Return float32[rows, blocks * 32], what codes stand for."""
    return (steps_of(codes)[0] * scales[:, :, None]).reshape(len(codes), -1)


def misfit(weights: Any, codes: Any, scales: Any) -> tuple[float, float]:
    """Return how far the codes of float32[rows, width] are from what the recipe makes of it.

    First in steps: a code is the one that is nearest to its weight, so at most half a step off.
    Then the scale of a block, relatively: its lowest code is its largest weight.
    """
    import numpy as np

    steps, middle = steps_of(codes)
    apart = np.zeros(steps.shape, np.float32)
    apart.reshape(len(apart), -1)[:, : weights.shape[1]] = weights
    largest = abs(apart).max(axis=2)
    scale = abs(abs(scales) * middle - largest) / np.maximum(largest, np.float32(TINY))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wanted = np.minimum(apart / scales[:, :, None], middle - 1)
    return abs(wanted - steps)[largest > TINY].max(initial=0.0), scale.max()


class Answers:
    """What the source answered, one array a prompt, in a file: together they are large."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: list[tuple[int, tuple[int, ...]]] = []
        self.size = 0

    def __enter__(self) -> Self:
        """Make the file."""
        self.path.touch(mode=0o600, exist_ok=False)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)

    def keep(self, logits: Any) -> None:
        """Append float32[tokens, vocabulary]."""
        with self.path.open("ab") as stream:
            stream.write(logits.tobytes())
        self.shapes.append((self.size, logits.shape))
        self.size += logits.nbytes

    def __getitem__(self, at: int) -> Any:
        """Return one array."""
        import numpy as np

        place, shape = self.shapes[at]
        return np.array(np.memmap(self.path, np.float32, "r", place, shape))


class Planned:
    """A graph of the plan."""

    def __init__(self, folder: Path, item: dict[str, str]) -> None:
        self.name, self.precision = item["name"], item["precision"]
        self.path = folder / item["path"]
        self.codes = folder / item["codes"] if item["codes"] else None
        self.fast = item["interface"] == "shared"

    def open(self) -> Any:
        """Load it."""
        return Fast(open_session(self.path)) if self.fast else Graph(open_session(self.path))

    def open_wide(self) -> Fast:
        """Load it with its logits as one output more."""
        return Fast(open_session(self.path, with_logits(self.path.read_bytes())))

    def open_twin(self) -> Fast:
        """Load its exact twin, which lies in no file, over the same weights and codes."""
        return Fast(open_session(self.path, exact_twin(self.path.read_bytes())))


def with_logits(raw: bytes) -> bytes:
    """Return the fast graph `raw` with one output more, the last: all logits.

    To read them by `top_k` sorts the vocabulary: 31 ms a position where it has 128 k tokens, beside
    53 ms of a 1 B model in int8. Without the output it must be the very bytes of `raw`.

    Raises:
        ValueError: It would not be.

    """
    import onnx

    model = onnx.load_model_from_string(raw)
    (logits,) = (node.input[0] for node in model.graph.node if list(node.output) == ["raw"])
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, ["picked", "all"])
    )
    wide = model.SerializeToString(deterministic=True)
    del model.graph.output[-1]
    if model.SerializeToString(deterministic=True) != raw:
        raise ValueError("the graph would differ in more than an output")
    return bytes(wide)


def exact_twin(raw: bytes) -> bytes:
    """Return the coded graph `raw` without the rounding of activations: level 1 for level 4.

    With the levels put back it must be the very bytes of `raw`. So nothing else is another: no
    edge, no scale, no offset in a file.

    Raises:
        ValueError: There is nothing to change, or more than the levels would change.

    """
    import onnx

    model = onnx.load_model_from_string(raw)
    levels = [
        attribute
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    found = []
    for level in (ROUNDED, EXACT):
        for attribute in levels:
            attribute.i = level
        found.append(model.SerializeToString(deterministic=True))
    back, twin = found
    if not levels or back != raw:
        raise ValueError("the exact twin would differ from the graph in more than its levels")
    return bytes(twin)


def open_session(path: Path, content: bytes | None = None) -> Any:
    """Open a graph on the CPU; `content` in the place of what the file at `path` holds."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if content is not None:
        options.add_session_config_entry(EXTERNAL_FOLDER, str(path.parent))
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    graph = path if content is None else content
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Graph:
    """The reference graph in onnxruntime on the CPU."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.provider = self.session.get_providers()[0]
        self.names = [value.name for value in self.session.get_inputs()]
        self.empty = {
            value.name: (1, value.shape[1], 0, value.shape[3])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.past: dict[str, Any] = {}

    def decode(self, prompts: list[list[int]]) -> list[Any]:
        """Return for each the greedy tokens, the logits of the prompt and those of each step."""
        return [self._decode(ids) for ids in prompts]

    def _decode(self, ids: list[int]) -> tuple[list[int], Any, Any]:
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

    def __init__(self, session: Any) -> None:
        self.session = session
        self.provider = self.session.get_providers()[0]
        values = self.session.get_inputs()
        self.caches = {
            value.name: (value.shape[1], value.shape[3])
            for value in values
            if value.name.startswith("past_key_values.")
        }
        self.half = any(value.type == "tensor(float16)" for value in values)
        self.size = next(value.shape[1] for value in values if value.name == "legal")
        self.buffers: dict[str, Any] = {}

    def decode(self, prompts: list[list[int]]) -> list[Any]:
        """Return for each the greedy tokens, the heads of the prompt and those of each step."""
        found = []
        for start in range(0, len(prompts), ROWS):
            found += self._decode(prompts[start : start + ROWS])
        return found

    def _decode(self, prompts: list[list[int]]) -> list[Any]:
        lengths = [len(ids) for ids in prompts]
        self.reset(len(prompts), max(lengths) + STEPS)
        runs: list[Any] = []
        for row, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
            full = self.run([ids], [length], range(length), first=row)
            runs.append(([int(full[0][-1, 0])], full, [tuple(part[-1:] for part in full)]))
        for step in range(1, STEPS):
            last = [greedy[-1:] for greedy, _, _ in runs]
            heads = self.run(last, [length + step for length in lengths], range(len(prompts)))
            for row, (greedy, _, steps) in enumerate(runs):
                steps.append(tuple(part[row : row + 1] for part in heads))
                greedy.append(int(heads[0][row, 0]))
        return runs

    def deltas(self, ids: list[int], full: Any, steps: Any, theirs: Any) -> tuple[float, float]:
        """Return the largest difference in the prompt however it runs, and in the steps."""
        import numpy as np

        count = len(ids)
        half, thirds = count // 2, [max(1, count // 3), max(1, 2 * count // 3), count]
        self.reset(1, count)
        pieces = []
        for start, end in ((0, half), (half, count)):
            if end > start:
                pieces.append(self.run([ids[start:end]], [end], range(end - start)))
        self.reset(3, count)
        padded = [ids[:end] + ids[:1] * (count - end) for end in thirds]
        picked = [row * count + end - 1 for row, end in enumerate(thirds)]
        together = self.run(padded, thirds, picked)
        worst = [
            apart(theirs[:count], full),
            apart(theirs[:count], [np.concatenate(part) for part in zip(*pieces, strict=True)]),
            apart(theirs[[end - 1 for end in thirds]], together),
        ]
        answers = [np.concatenate(part) for part in zip(*steps, strict=True)]
        return float(np.max(worst)), apart(theirs[count - 1 :], answers)

    def logits(self, ids: list[int]) -> Any:
        """Return float32[tokens, vocabulary] of one sequence; of a graph of `open_wide`."""
        import numpy as np

        self.reset(1, len(ids))
        whole = np.empty((len(ids), self.size), np.float32)
        wanted = (self.session.get_outputs()[-1].name,)
        for start in range(0, len(ids), PIECE):
            part = ids[start : start + PIECE]
            place, end = range(len(part)), start + len(part)
            (whole[start:end],) = self.run([part], [end], place, wanted=wanted)
        return whole

    def head(self, ids: list[int]) -> float:
        """Return how far penalty, mask, target and normalisers are from numpy's, on raw logits.

        Four places of one sequence, with a mask and without; what is asked is drawn from a fixed
        seed. The raw logits of all ids come from the same graph, which `apart` holds to the source.
        """
        import numpy as np

        count, size, draw = len(ids), self.size, np.random.default_rng(len(ids))
        places = [0, count // 3, 2 * count // 3, count - 1]
        lines = len(places)
        self.reset(1, count)
        every, raw = self.run([ids], [count], places, top=size, wanted=("ids", "raw"))
        logits = np.full((lines, size), np.nan)
        np.put_along_axis(logits, every, raw.astype(np.float64), axis=1)
        seen, target = draw.integers(size, size=(lines, 32)), draw.integers(size, size=lines)
        seen[:, 0], seen[:, 1] = target, every[:, 0]  # what is punished is also asked for
        penalty = np.linspace(1.05, 2.0, lines, dtype=np.float32)[:, None]
        mask = draw.random((lines, size)) < np.array([[0.5], [0.5], [0.05], [0.95]])
        mask[:, 0] = True
        old, punished = np.take_along_axis(logits, seen, axis=1), logits.copy()
        worse = np.where(old < 0, old * penalty, old / penalty)
        np.put_along_axis(punished, seen, worse, axis=1)
        worst = []
        for constrained in (True, False):
            legal = mask if constrained else np.ones_like(mask)
            asked = {
                "seen": seen,
                "penalty": penalty,
                "legal": mask,
                "constrained": np.array(constrained),
                "target": target,
            }
            self.reset(1, count)
            names = ("scores", "ids", "raw", "log_z", "legal_z", "target_raw")
            scores, best, mine, log_z, legal_z, wanted = self.run(
                [ids], [count], places, wanted=names, asked=asked
            )
            masked = np.where(legal, punished, -np.inf)
            ranked = -np.sort(-masked, axis=1)[:, : scores.shape[1]]
            worst += [
                differs(ranked, scores),
                differs(np.take_along_axis(masked, best, axis=1), scores),
                differs(np.take_along_axis(logits, best, axis=1), mine),
                differs(log_sums(logits), log_z),
                differs(log_sums(np.where(legal, logits, -np.inf)), legal_z),
                differs(np.take_along_axis(logits, target[:, None], axis=1)[:, 0], wanted),
            ]
        return float(np.max(worst))  # a NaN stays one

    def reset(self, rows: int, capacity: int) -> None:
        """Take empty buffers."""
        import numpy as np

        kind = np.float16 if self.half else np.float32
        self.buffers = {
            name: np.zeros((rows, heads, capacity, width), kind)
            for name, (heads, width) in self.caches.items()
        }

    def run(
        self,
        rows: list[list[int]],
        lengths: list[int],
        select: Any,
        *,
        top: int = FAST_TOP,
        first: int = 0,
        wanted: tuple[str, ...] = ("ids", "raw", "log_z"),
        asked: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """Return (ids, raw logits, log of the sum of exp) at the picked places, or what is wanted.

        The rows are those from `first` on in the buffers.
        """
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
            "top_k": np.array([min(top, self.size)], np.int64),
        } | (asked or {})
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, whole in self.buffers.items():
            array = whole[first : first + len(rows)]
            other, place = name.replace("past_key_values.", "present."), array.ctypes.data
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, place)
            binding.bind_output(other, "cpu", 0, array.dtype, array.shape, place)
        for name in wanted:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return tuple(value.numpy() for value in binding.get_outputs()[-len(wanted) :])


def apart(theirs: Any, found: Any) -> float:
    """Return how far the largest logits and the sum over all are from the source's."""
    import numpy as np

    ids, raw, log_z = found
    wide = theirs.astype(np.float64)
    logits = abs(np.take_along_axis(wide, ids, axis=1) - raw).max()
    return float(np.maximum(logits, abs(log_sums(wide) - log_z).max()))  # a NaN stays one


def differs(expected: Any, found: Any) -> float:
    """Return the largest difference; two that are both minus infinity do not differ."""
    import numpy as np

    equal = expected == found
    return float(np.where(equal, 0.0, abs(np.where(equal, 0.0, expected) - found)).max())


def log_sums(wide: Any) -> Any:
    """Return the logarithm of the sum of exp of each row."""
    import numpy as np

    peak = wide.max(axis=1)
    return peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))


def first_answer(theirs: Any, count: int) -> dict[str, Any]:
    """Return the greedy tokens of the source, its first answer and its narrowest choice."""
    import numpy as np

    answers = theirs[count - 1 :]
    ordered = np.partition(answers, -2, axis=1)
    return {
        "source": answers.argmax(axis=1).tolist(),
        "margin": text((ordered[:, -1] - ordered[:, -2]).min()),
        "top": best(answers[0]),
    }


def best(logits: Any) -> list[list[Any]]:
    """Return the largest logits with their ids."""
    import numpy as np

    order = np.argsort(-logits, kind="stable")[:TOP]
    return [[int(n), f"{float(logits[n]):.6e}"] for n in order]  # a target is held to all digits


def compare(session: Any, ids: list[int], run: Any, theirs: Any) -> dict[str, Any]:
    """Return the figures of one graph on one prompt; what is not finite is reported as it is."""
    tokens, full, steps = run
    here, there = session.deltas(ids, full, steps, theirs)
    return {"greedy": tokens, "full": text(here), "past": text(there)}


def measure(
    graph: Planned,
    folder: Path,
    words: Words,
    used: Any,
    *,
    theirs: Answers,
    tasks: Any,
    out: Path,
) -> dict[str, Any]:
    """Hold a graph in another precision against the published weights, and codes against theirs."""
    tokens = [
        theirs[at][len(ids) - 1 :].argmax(axis=1).tolist() for at, (_, _, ids) in enumerate(used)
    ]
    contexts = [ids + chosen[:-1] for (_, _, ids), chosen in zip(used, tokens, strict=True)]
    found: dict[str, Any] = {}
    with Answers(out / CODED) as coded:
        if graph.codes is not None:
            source = Source(folder)
            fit = source.take_codes(graph.codes)
            for context in contexts:
                coded.keep(source.full(context))
            del source
            found["codes"] = {**fit, **run_twin(graph.open_twin(), used, contexts, coded)}
        session = graph.open()
        found["head"] = text(session.head(max((ids for _, _, ids in used), key=len)))
        greedy = [run[0] for run in session.decode([ids for _, _, ids in used])]
        samples = [sample(session, words, *task) for task in tasks]
        found["provider"] = session.provider
        del session
        session, rows = graph.open_wide(), []
        for at, (index, _, ids) in enumerate(used):
            mine = session.logits(contexts[at])
            equal = [ours == other for ours, other in zip(greedy[at], tokens[at], strict=True)]
            row = {
                "index": index,
                "ids": ids,
                "greedy": greedy[at],
                "agree": equal.index(False) if False in equal else len(equal),
                "top": best(mine[len(ids) - 1]),
                **divergence(theirs[at], mine),
            }
            if graph.codes is not None:
                row["codes"] = divergence(coded[at], mine)
            rows.append(row)
    return {"rows": rows, "samples": samples, **found}


def run_twin(twin: Fast, used: Any, contexts: list[list[int]], coded: Answers) -> dict[str, Any]:
    """Return how far every logit of an exact twin is from what the codes stand for.

    The shortest prompts of `TWINS` kinds run at once, and the longest of all alone, whose last
    `PIECE` places are looked at: a fault of far positions is seen there. Then each goes on by one
    token with the cache. A run costs at least the widening of all matrices, so there are three.
    """
    import numpy as np

    shortest: dict[str, int] = {}
    for at in sorted(range(len(used)), key=lambda at: len(used[at][2])):
        shortest.setdefault(used[at][1], at)
    far = max(range(len(used)), key=lambda at: len(used[at][2]))
    picked = [at for at in shortest.values() if at != far][:TWINS]
    lengths = [len(used[at][2]) for at in picked]
    width, end = max(lengths), len(used[far][2])
    padded = [used[at][2] + used[at][2][:1] * (width - len(used[at][2])) for at in picked]
    places = [row * width + place for row, last in enumerate(lengths) for place in range(last)]
    twin.reset(len(picked) + 1, end + 1)
    near = twin.run(padded, lengths, places, top=twin.size)
    late = range(max(0, end - PIECE), end)
    deep = twin.run([used[far][2]], [end], late, top=twin.size, first=len(picked))
    every, ends = [*picked, far], [*lengths, end]
    following = [[contexts[at][last]] for at, last in zip(every, ends, strict=True)]
    past = twin.run(following, [last + 1 for last in ends], range(len(every)), top=twin.size)
    answers = [coded[at][: last + 1] for at, last in zip(every, ends, strict=True)]
    whole = [apart(np.concatenate([each[:-1] for each in answers[:-1]]), near)]
    whole.append(apart(answers[-1][late.start : end], deep))
    return {
        "prompts": [used[at][0] for at in every],
        "full": text(float(np.max(whole))),
        "past": text(apart(np.stack([each[-1] for each in answers]), past)),
    }


def divergence(published: Any, found: Any) -> dict[str, Any]:
    """Return divergence in nats (summed), equal best tokens, and how far the logits are apart.

    `delta` is the largest difference; `part` its root mean square as a part of the spread that the
    logits have at a position, which does not depend on how sure a model is.
    """
    import numpy as np

    total, same, worst, apart, spread = 0.0, 0, 0.0, 0.0, 0.0
    for start in range(0, len(published), PIECE):
        theirs = published[start : start + PIECE].astype(np.float64)
        ours = found[start : start + PIECE].astype(np.float64)
        logs = theirs - log_sums(theirs)[:, None]
        total += float((np.exp(logs) * (logs - ours + log_sums(ours)[:, None])).sum())
        same += int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum())
        worst = float(np.maximum(worst, abs(theirs - ours).max()))
        apart += float(((theirs - ours) ** 2).sum())
        spread += float(theirs.var(axis=1).sum()) * theirs.shape[1]
    return {
        "kl": text(total),
        "same": same,
        "positions": len(published),
        "delta": text(worst),
        "part": text((apart / spread) ** 0.5 if spread else float("nan")),
    }


def sample(
    session: Fast, words: Words, prompt: Any, stop: int | None, count: int
) -> dict[str, Any]:
    """Draw completions of one prompt without a grammar, with the same random numbers each time."""
    import numpy as np

    index, kind, ids = prompt
    budget = max(1, min(SAMPLE_TOKENS, words.context - len(ids)))
    session.reset(count, len(ids) + budget)
    random = np.random.default_rng(index)
    rows: list[list[int]] = [[] for _ in range(count)]
    ends = {*words.ends, stop} - {None}
    last, length = [list(ids)] * count, len(ids)
    for _ in range(budget):
        width = len(last[0])
        places = [row * width + width - 1 for row in range(count)]
        order, raw, _ = session.run(last, [length] * count, places, top=SAMPLE_TOP)
        wide = raw.astype(np.float64)
        shares = np.exp(wide - wide.max(axis=1, keepdims=True)).cumsum(axis=1)
        drawn = (shares < random.random((count, 1)) * shares[:, -1:]).sum(axis=1)
        chosen = np.take_along_axis(order, drawn[:, None], axis=1)[:, 0].tolist()
        for row, token in zip(rows, chosen, strict=True):
            if not ends.intersection(row[-1:]):
                row.append(int(token))
        last, length = [[token] for token in chosen], length + 1
        if all(ends.intersection(row[-1:]) for row in rows):
            break
    return {"index": index, "kind": kind, "completions": [told(words, row, stop) for row in rows]}


def told(words: Words, row: list[int], stop: int | None) -> dict[str, Any]:
    """Return one completion as text, and how it ended."""
    end = "stop" if row[-1] == stop else "eos" if row[-1] in words.ends else "length"
    shown = row[:-1] if end == "eos" else row
    return {"text": words.text(shown), "finish": end, "tokens": len(row)}


def text(value: float) -> str:
    """Write a number with four significant digits, in the same way on every machine."""
    return f"{float(value):.3e}"


def versions() -> dict[str, str]:
    """Return the versions that decide the figures."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "onnxruntime", "tokenizers")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
