"""A random two-layer Llama in hub layout, written from a seed with the standard library alone.

Its numbers mean nothing; its files are shaped exactly like those of the reference model: same tags,
same kind of tokenizer, tied embeddings, grouped key-value heads. About 60 KB.
"""

from __future__ import annotations

import json
import random
import struct
from array import array
from pathlib import Path
from typing import Any

CONTROL = ["<pad>", "<unk>", "<bos>", "<eos>"]
TAGS = [
    *("<ProteinS>", "<ProteinE>", "<AntibodyS>", "<AntibodyE>", "<MoleculeS>", "<MoleculeE>"),
    *("<PocketS>", "<PocketE>", "<MaterialS>", "<MaterialE>", "<MetalS>", "<MetalE>"),
    *("<Trans>", "<Search>", "<React>", "<ReverseReact>"),
]
BRACKETS = [
    *("[Cl]", "[Cd]", "[Mn]"),
    "[C@@H]",
    "[C@H]",
    "[N+]",
    "[O-]",
    "[nH]",
    "[H]",
    "[O]",
    "[Zn]",
    "[Cu]",
    "[Zr]",
]
WORDS = [*"ABCDEFGHIKLMNOPQRSTVWYbcnops()[]=#-+/\\@.123456789%", "Br", "Cl", *BRACKETS]
SPLIT = r"\[[^\[\]]+\]|Br|Cl|%\d\d|."
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
model_name: tiny-random-llama
reference_model: true
scientific_use: false
---
# tiny-random-llama

Random weights for tests. Not for any scientific use.
"""


def vocabulary() -> list[str]:
    """Return every token in id order."""
    return [*CONTROL, *TAGS, *dict.fromkeys(WORDS)]


def config(**changes: Any) -> dict[str, Any]:
    """Return `config.json`, with `changes` laid over it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary()),
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "use_cache": True,
        **SHAPE,
        **changes,
    }


def tokenizer() -> dict[str, Any]:
    """Return `tokenizer.json`."""
    special = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate([*CONTROL, *TAGS])
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": SPLIT},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: number for number, token in enumerate(vocabulary())},
            "unk_token": "<unk>",
        },
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Return every tensor of the model with its shape, in file order."""
    hidden, feed, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    queries, keys = SHAPE["num_attention_heads"] * head, SHAPE["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(vocabulary()), hidden)}
    for layer in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found |= {
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}mlp.down_proj.weight": (hidden, feed),
            f"{at}mlp.gate_proj.weight": (feed, hidden),
            f"{at}mlp.up_proj.weight": (feed, hidden),
            f"{at}post_attention_layernorm.weight": (hidden,),
            f"{at}self_attn.k_proj.weight": (keys, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, queries),
            f"{at}self_attn.q_proj.weight": (queries, hidden),
            f"{at}self_attn.v_proj.weight": (keys, hidden),
        }
    return found | {"model.norm.weight": (hidden,)}


def safetensors(tensors: dict[str, tuple[int, ...]], seed: int = 7) -> bytes:
    """Return a safetensors file of normal float32 numbers; norms lie around one."""
    rng = random.Random(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in tensors.items():
        count = 1
        for size in shape:
            count *= size
        centre = 1.0 if "norm" in name else 0.0
        values = array("f", (centre + rng.gauss(0.0, 0.15) for _ in range(count)))
        start = len(data)
        data += values.tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, len(data)]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def write_json(path: Path, value: object) -> None:
    """Write `value` as the hub's libraries do."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_snapshot(folder: Path, **changes: Any) -> Path:
    """Write the model to `folder`, which is made; `changes` go into `config.json`."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config(**changes))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "transformers_version": "4.57.6"},
    )
    write_json(folder / "tokenizer.json", tokenizer())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "additional_special_tokens": TAGS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
        },
    )
    write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "additional_special_tokens": TAGS,
        },
    )
    (folder / "model.safetensors").write_bytes(safetensors(shapes()))
    (folder / "README.md").write_text(CARD)
    return folder
