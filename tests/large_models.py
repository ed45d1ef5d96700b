"""Snapshots of the true shapes that are promised, with random weights, written without torch.

Each is what a publisher would release: sharded safetensors in bf16 with an index, a configuration
and a tokenizer that knows the tags. Writing one takes memory for one matrix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_llama

from bundle.staging.architecture import expected_tensors, parse_architecture

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3,
    },
    "llama-3.2-3b": {
        **_LLAMA,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3,
    },
    "llama-3-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}
SHARD = 1 << 30
_POOL = 16_777_213  # a prime: no two rows of a matrix begin at one place of it


def write_snapshot(folder: Path, shape: str, **changes: Any) -> Path:
    """Write the model to `folder`, which is made; `changes` to its configuration."""
    folder.mkdir()
    config = {
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(config["vocab_size"])))
    (folder / "README.md").write_text(tiny_llama.CARD)
    tensors = expected_tensors(parse_architecture(config))
    shards, size = [{}], 0
    for name, dims in tensors.items():
        count = 2 * int(np.prod(dims))
        if size and size + count > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = dims, size + count
    pool = np.random.default_rng(7).standard_normal(_POOL, dtype=np.float32)
    weight_map, start = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        start = _write_shard(folder / file, shard, pool, start)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def tokenizer(size: int) -> dict[str, Any]:
    """Return a tokenizer of `size` words: ours, and words that no text holds."""
    document = tiny_llama.tokenizer()
    words = document["model"]["vocab"]
    words |= {f"[w{number}]": number for number in range(len(words), size)}
    return document


def bf16(values: np.ndarray) -> np.ndarray:
    """Return uint16: float32 rounded to the nearest bf16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], pool: np.ndarray, start: int
) -> int:
    header, place = {}, 0
    for name, dims in tensors.items():
        end = place + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [place, end]}
        place = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for dims in tensors.values():
            rest = int(np.prod(dims))
            scale, shift = (1.6 * dims[-1] ** -0.5, 0.0) if len(dims) > 1 else (0.1, 1.0)
            while rest:
                part = pool[start : start + rest]
                stream.write(bf16(part * np.float32(scale) + np.float32(shift)).tobytes())
                rest -= len(part)
                start = (start + len(part)) % _POOL
    return start


# -- an oracle of a few lines, one matrix in memory at a time --------------------------------------


class Oracle:
    """The published weights in numpy, fp32: no line of it is shared with the graph or torch."""

    ROWS = 4096  # of a matrix that are widened at once

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.places: dict[str, tuple[Path, int, list[int], str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(size))
            for name, item in header.items():
                if name != "__metadata__":
                    start = 8 + size + item["data_offsets"][0]
                    self.places[name] = path, start, item["shape"], item["dtype"]

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return float32[tokens, vocabulary]."""
        config = self.config
        path, start, dims, dtype = self.places["model.embed_tokens.weight"]
        x = self._widen(self._raw(path, start, dims, dtype)[ids], dtype)
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            x = x + self._attention(at, self._norm(x, f"{at}input_layernorm.weight"))
            y = self._norm(x, f"{at}post_attention_layernorm.weight")
            moe = "num_local_experts" in config
            x = x + (self._experts(at, y) if moe else self._forward(at, y))
        tied = config.get("tie_word_embeddings") is True
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return self._times(self._norm(x, "model.norm.weight"), head)

    def _attention(self, at: str, x: np.ndarray) -> np.ndarray:
        config, count = self.config, len(x)
        heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        parts = []
        for name, number in (("q", heads), ("k", kv), ("v", kv)):
            part = self._times(x, f"{at}self_attn.{name}_proj.weight").reshape(count, number, width)
            if f"{at}self_attn.{name}_norm.weight" in self.places:
                part = self._norm(part, f"{at}self_attn.{name}_norm.weight")
            parts.append(part if name == "v" else self._turn(part))
        q, k, v = (part.transpose(1, 0, 2) for part in parts)
        k, v = (np.repeat(part, heads // kv, axis=0) for part in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(width))
        scores[:, np.triu(np.ones((count, count), dtype=bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        mixed = (shares / shares.sum(axis=2, keepdims=True)) @ v
        flat = mixed.transpose(1, 0, 2).reshape(count, heads * width)
        return self._times(flat, f"{at}self_attn.o_proj.weight")

    def _turn(self, part: np.ndarray) -> np.ndarray:
        """Rotate the first half of each head against the second."""
        half = part.shape[2] // 2
        turns = self.config.get("rope_theta", 10000.0) ** (-np.arange(half) / half)
        scaling = self.config.get("rope_scaling") or {}
        if scaling:  # that of Llama 3
            waves = 2 * np.pi / turns
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            share = scaling["original_max_position_embeddings"] / waves
            smooth = np.clip((share - low) / (high - low), 0.0, 1.0)
            turns = turns * (smooth + (1 - smooth) / scaling["factor"])
        angles = np.arange(len(part))[:, None, None] * turns
        cos, sin = np.cos(angles), np.sin(angles)
        one, two = part[..., :half], part[..., half:]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], 2, dtype=np.float32)

    def _forward(self, at: str, x: np.ndarray) -> np.ndarray:
        gate, up = (self._times(x, f"{at}mlp.{name}_proj.weight") for name in ("gate", "up"))
        return self._times(gate / (1 + np.exp(-gate)) * up, f"{at}mlp.down_proj.weight")

    def _experts(self, at: str, x: np.ndarray) -> np.ndarray:
        moe, result = f"{at}block_sparse_moe.", np.zeros_like(x)
        logits = self._times(x, f"{moe}gate.weight")
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        best = np.argsort(-shares, axis=1)[:, : self.config["num_experts_per_tok"]]
        total = np.take_along_axis(shares, best, axis=1).sum(axis=1)
        for expert in range(self.config["num_local_experts"]):
            mine = (best == expert).any(axis=1)
            inner = f"{moe}experts.{expert}."
            if mine.any():
                gate, up = (self._times(x[mine], f"{inner}{name}.weight") for name in ("w1", "w3"))
                down = self._times(gate / (1 + np.exp(-gate)) * up, f"{inner}w2.weight")
                result[mine] += down * (shares[mine, expert] / total[mine])[:, None]
        return result

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        path, start, dims, dtype = self.places[name]
        scale = np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        weight = self._widen(self._raw(path, start, dims, dtype), dtype)
        return (x / scale * weight).astype(np.float32)

    def _times(self, x: np.ndarray, name: str) -> np.ndarray:
        path, start, dims, dtype = self.places[name]
        raw = self._raw(path, start, dims, dtype)
        found = np.empty((len(x), dims[0]), np.float32)
        for row in range(0, dims[0], self.ROWS):
            found[:, row : row + self.ROWS] = x @ self._widen(raw[row : row + self.ROWS], dtype).T
        return found

    @staticmethod
    def _raw(path: Path, start: int, dims: list[int], dtype: str) -> np.ndarray:
        kind = {"BF16": np.uint16, "F32": np.float32}[dtype]
        return np.memmap(path, kind, "r", start, tuple(dims))

    @staticmethod
    def _widen(raw: np.ndarray, dtype: str) -> np.ndarray:
        if dtype == "F32":
            return np.asarray(raw)
        return (np.asarray(raw).astype(np.uint32) << 16).view(np.float32)
