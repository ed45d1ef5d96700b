"""Small models with random weights, made by a public library: what a publisher could release."""

import json

import numpy as np

from bundle.scan.safetensors import parse_safetensors
from bundle.scan.strict import open_view
from bundle.staging.architecture import parse_architecture, require_tensors
from bundle.staging.graph import HEAD_OUTPUTS, Placed, interface, write_graph

VOCABULARY = 300
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("LlamaConfig", {"rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "square": ("LlamaConfig", {"hidden_size": VOCABULARY, "head_dim": 16}),
}


def save_random(folder, family, *, dtype="bfloat16", seed=0, **changes):
    """Write config and weights of a random model of `family` to `folder`."""
    import torch
    import transformers

    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**{**BASE, **fields, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            many = weight.ndim > 1
            weight.normal_(0.0, 1.6 * weight.shape[-1] ** -0.5) if many else weight.normal_(
                1.0, 0.2
            )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def torch_logits(folder, ids):
    """Return float32[rows, tokens, vocabulary] of the published weights in torch, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids), use_cache=False).logits.numpy()


def placed_tensors(folder):
    """Return (shape, tensors by name) of a snapshot."""
    shape = parse_architecture(json.loads((folder / "config.json").read_text()))
    placed = {
        tensor.name: Placed(path.name, tensor)
        for path in sorted(folder.glob("*.safetensors"))
        for tensor in parse_safetensors(open_view(path)).tensors
    }
    require_tensors(shape, {name: one.tensor for name, one in placed.items()})
    return shape, placed


def write_fast(folder):
    """Write `fast.onnx` beside the published weights; returns the shape."""
    shape, placed = placed_tensors(folder)
    (folder / "fast.onnx").write_bytes(write_graph(shape, placed))
    return shape


class FastGraph:
    """The fast graph in onnxruntime, bound to one key-value buffer."""

    def __init__(self, folder, shape):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        self.session = onnxruntime.InferenceSession(
            str(folder / "fast.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.shape = shape

    def cache(self, rows, capacity):
        shape = self.shape
        size = (rows, shape.kv_heads, capacity, shape.head_dim)
        return [np.zeros(size, np.float32) for _ in range(2 * shape.layers)]

    def run(self, ids, lengths, cache, select, **head):
        """Run `ids` so that row i then holds `lengths[i]` positions; returns the head's outputs."""
        picked = len(select)
        feeds = {
            "input_ids": np.ascontiguousarray(ids, dtype=np.int64),
            "seqlens_k": np.asarray(lengths, np.int32) - 1,
            "total_sequence_length": np.array(max(lengths), np.int32),
            "select": np.asarray(select, np.int64),
            "seen": np.zeros((picked, 1), np.int64),
            "penalty": np.ones((picked, 1), np.float32),
            "legal": np.ones((1, self.shape.vocabulary), np.bool_),
            "constrained": np.array("legal" in head),
            "target": np.zeros(picked, np.int64),
            "top_k": np.array([self.shape.vocabulary], np.int64),
            **head,
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in HEAD_OUTPUTS:
            binding.bind_output(name, "cpu")
        inputs, outputs = interface(self.shape.layers)
        past = [name for name in inputs if name.startswith("past_key_values.")]
        present = [name for name in outputs if name.startswith("present.")]
        for one, other, array in zip(past, present, cache, strict=True):
            part = array[: len(ids)]
            binding.bind_input(one, "cpu", 0, np.float32, part.shape, part.ctypes.data)
            binding.bind_output(other, "cpu", 0, np.float32, part.shape, part.ctypes.data)
        self.session.run_with_iobinding(binding)
        found = [value.numpy() for value in binding.get_outputs()[: len(HEAD_OUTPUTS)]]
        return dict(zip(HEAD_OUTPUTS, found, strict=True))


def all_logits(found):
    """Return float64[picked, vocabulary], from an answer whose `top_k` was the whole vocabulary."""
    logits = np.empty(found["raw"].shape)
    np.put_along_axis(logits, found["ids"], found["raw"], axis=1)
    return logits
