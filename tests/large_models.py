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
