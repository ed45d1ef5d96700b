"""llama.cpp as a peer, one sequence at a time, on the same fp32 weights in its own format.

First line `{"model", "cache", "threads"}`; then `{"prompt": ids, "tokens", "seed"}`, answered by
seconds of the wall and of the processor. The file is written here from config.json and safetensors:
the public converter knows no tokenizer of our kind, and ids are all that is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(path: Path) -> dict[str, Any]:
    """Return the fp32 tensors of a safetensors file."""
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    size = int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8 : 8 + size].tobytes())
    found = {}
    for name, one in header.items():
        if name == "__metadata__":
            continue
        if one["dtype"] != "F32":
            raise ValueError(f"{name} is {one['dtype']}")
        start, end = (8 + size + offset for offset in one["data_offsets"])
        found[name] = raw[start:end].view(np.float32).reshape(one["shape"])
    return found


def turned(weight: Any, heads: int) -> Any:
    """Order the rows of queries and keys as llama.cpp rotates them: neighbours in pairs."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows, columns))


def written(model: Path, cache: Path) -> Path:
    """Write the file once."""
    path = cache / f"{model.name}.gguf"
    if path.exists():
        return path
    config = json.loads((model / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta") or 10_000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)
    writer.add_tokenizer_model("none")
    for name, weight in tensors(model / "model.safetensors").items():
        plain = name.removeprefix("model.").removesuffix(".weight")
        if plain == "embed_tokens":
            writer.add_tensor("token_embd.weight", weight)
        elif plain == "norm":
            writer.add_tensor("output_norm.weight", weight)
        elif plain == "lm_head":
            writer.add_tensor("output.weight", weight)
        else:
            _, layer, rest = plain.split(".", 2)
            kind = _NAMES[rest]
            turn = {"attn_q": heads, "attn_k": groups}.get(kind)
            writer.add_tensor(
                f"blk.{layer}.{kind}.weight", turned(weight, turn) if turn else weight
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Draw one sample."""
    wall, cpu = time.perf_counter(), time.process_time()
    model.reset()
    model.set_seed(request["seed"])
    model.eval(request["prompt"])
    for _ in range(request["tokens"]):
        token = model.sample(top_k=50, top_p=0.85, temp=1.2, repeat_penalty=1.05)
        model.eval([token])
    return {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "tokens": request["tokens"],
    }


def main() -> None:
    """Answer line by line."""
    start = json.loads(sys.stdin.readline())
    path = written(Path(start["model"]), Path(start["cache"]))
    begun = time.perf_counter()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        model = llama_cpp.Llama(
            str(path), n_ctx=1024, n_threads=start["threads"], seed=0, verbose=False
        )
    ready = {"load": time.perf_counter() - begun, "version": llama_cpp.__version__}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
