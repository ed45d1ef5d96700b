"""Which architecture a snapshot claims, and whether its tensors are exactly the ones that follow.

Decides whether the weights belong to the configuration: every tensor that the configuration implies
is there with its shape, and no other. Catches truncated shards, renamed files and a wrong config
before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bundle.scan.safetensors import Tensor
from policy.errors import RefusedError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_IGNORED = (".rotary_emb.inv_freq",)  # written by old releases, computed by every loader
_MAX = 1 << 24
_LAYERS = 1024  # and experts: a typo must not make us list tensors by the million
_CONTEXT = 1 << 20  # positions; the rotary tables are made when a graph is loaded
_MAX_REAL = 1e12


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base, and how frequencies are stretched for a longer context.

    `kind` is `default`, `linear` (all divided by `factor`) or `llama3` (low frequencies divided by
    `factor`, high ones kept, those between blended; bounds in turns over `original` positions).
    """

    base: float
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 1

    def frequencies(self, width: int) -> tuple[float, ...]:
        """Return radians a position, one for each pair of the `width` dimensions of a head."""
        plain = [self.base ** (-pair / width) for pair in range(0, width, 2)]
        if self.kind == "llama3":
            return tuple(self._llama3(one) for one in plain)
        return tuple(one / self.factor for one in plain)

    def _llama3(self, frequency: float) -> float:
        turns = self.original * frequency / (2 * math.pi)
        if turns > self.high:
            return frequency
        if turns < self.low:
            return frequency / self.factor
        blend = (turns - self.low) / (self.high - self.low)
        return (1 - blend) * frequency / self.factor + blend * frequency


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a decoder-only transformer, in the field's own words."""

    kind: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    rope: Rope
    epsilon: float
    window: int | None
    experts: int
    experts_chosen: int

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed head by head before rotation."""
        return self.kind == "qwen3"


def parse_architecture(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> Architecture:
    """Read `config.json`, and the end tokens of `generation_config.json` where it lists more.

    Raises:
        RefusedError: `source.architecture`.

    """
    kind = config.get("model_type")
    classes = config.get("architectures")
    if kind not in CLASSES or (classes is not None and classes != [CLASSES[str(kind)]]):
        raise RefusedError(
            "source.architecture",
            f"model_type {kind!r:.60} with architectures {classes!r:.80} is not converted; known: "
            + ", ".join(sorted(CLASSES)),
            hint="take a release in one of these architectures, or carry this model by other means",
        )
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    stops = [*_ids(config, "eos_token_id"), *_ids(generation or {}, "eos_token_id")]
    if not stops:
        raise RefusedError(
            "source.architecture",
            "no eos_token_id in config.json or generation_config.json: generation would not end",
        )
    if config.get("quantization_config") is not None:
        raise RefusedError(
            "source.architecture",
            "the weights are quantised already; the parity proof needs the original ones",
            hint="take the release in bf16, fp16 or fp32",
        )
    _require_plain(config)
    context = _count(config, "max_position_embeddings")
    mixture = kind == "mixtral"
    shape = Architecture(
        kind=str(kind),
        layers=_count(config, "num_hidden_layers"),
        hidden=hidden,
        feed_forward=_count(config, "intermediate_size"),
        heads=heads,
        kv_heads=_count(config, "num_key_value_heads", heads),
        head_dim=_count(config, "head_dim", hidden // heads),
        vocabulary=_count(config, "vocab_size"),
        context=context,
        tied=config.get("tie_word_embeddings", False) is True,
        attention_bias=config.get("attention_bias", kind == "qwen2") is True,
        mlp_bias=config.get("mlp_bias", False) is True,
        bos_id=next(iter(_ids(config, "bos_token_id")), None),
        eos_ids=tuple(dict.fromkeys(stops)),
        pad_id=next(iter(_ids(config, "pad_token_id")), None),
        rope=_rope(config, context),
        epsilon=_real(config, "rms_norm_eps", 1e-6),
        window=_window(config, str(kind)),
        experts=_count(config, "num_local_experts", 8) if mixture else 0,
        experts_chosen=_count(config, "num_experts_per_tok", 2) if mixture else 0,
    )
    _require_sound(shape)
    return shape


def expected_tensors(shape: Architecture) -> dict[str, tuple[int, ...]]:
    """Return every tensor that the architecture has, with its shape."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    projections = {"q": queries, "k": keys, "v": keys}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        found[f"{at}input_layernorm.weight"] = (shape.hidden,)
        found[f"{at}post_attention_layernorm.weight"] = (shape.hidden,)
        for name, size in projections.items():
            found[f"{at}self_attn.{name}_proj.weight"] = (size, shape.hidden)
            if shape.attention_bias:
                found[f"{at}self_attn.{name}_proj.bias"] = (size,)
        found[f"{at}self_attn.o_proj.weight"] = (shape.hidden, queries)
        if shape.attention_bias and shape.kind != "qwen2":
            found[f"{at}self_attn.o_proj.bias"] = (shape.hidden,)
        if shape.kind == "qwen3":
            found[f"{at}self_attn.q_norm.weight"] = (shape.head_dim,)
            found[f"{at}self_attn.k_norm.weight"] = (shape.head_dim,)
        found |= _feed_forward(shape, at)
    return found


def _feed_forward(shape: Architecture, at: str) -> dict[str, tuple[int, ...]]:
    wide, narrow = (shape.feed_forward, shape.hidden), (shape.hidden, shape.feed_forward)
    found: dict[str, tuple[int, ...]] = {}
    if shape.experts:
        found[f"{at}block_sparse_moe.gate.weight"] = (shape.experts, shape.hidden)
        for expert in range(shape.experts):
            inner = f"{at}block_sparse_moe.experts.{expert}."
            found |= {f"{inner}w{part}.weight": wide for part in (1, 3)}
            found[f"{inner}w2.weight"] = narrow
        return found
    for name, sizes in (("gate", wide), ("up", wide), ("down", narrow)):
        found[f"{at}mlp.{name}_proj.weight"] = sizes
        if shape.mlp_bias:
            found[f"{at}mlp.{name}_proj.bias"] = (sizes[0],)
    return found


def require_tensors(shape: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Compare the tensors of all weight files with those of the architecture.

    Raises:
        RefusedError: `source.shape`, naming the first tensor that differs and how many do.

    """
    expected = expected_tensors(shape)
    found = {name: t.shape for name, t in tensors.items() if not name.endswith(_IGNORED)}
    if shape.tied and "lm_head.weight" in found:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]  # a tied copy is allowed
    problems = [
        f"{name} has shape {list(found[name])}, config.json implies {list(size)}"
        for name, size in expected.items()
        if name in found and found[name] != size
    ]
    problems += [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name!r:.100} is not part of it" for name in found if name not in expected]
    kinds = sorted({t.dtype for t in tensors.values()} - {"F32", "F16", "BF16"})
    if kinds:
        problems.append(f"weights of type {', '.join(kinds)} are not converted")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RefusedError(
            "source.shape",
            f"the weights are not those of config.json: {problems[0]}{more}",
            hint="download the snapshot again; if it is complete, tell its publisher",
        )


def _require_plain(config: Mapping[str, Any]) -> None:
    """Refuse what a loader of the family would compute otherwise than the fast graph does."""
    activation = config.get("hidden_act", "silu")
    partial = config.get("partial_rotary_factor")
    layers = config.get("layer_types")
    for odd, what in (
        (activation not in ("silu", "swish"), f"hidden_act {activation!r:.40}"),
        (partial not in (None, 1.0), f"partial_rotary_factor {partial!r:.40}"),
        (
            layers is not None
            and (not isinstance(layers, list) or any(one != "full_attention" for one in layers)),
            f"layer_types {layers!r:.60}",
        ),
    ):
        if odd:
            raise RefusedError("source.architecture", f"config.json: {what} is not converted")


def _require_sound(shape: Architecture) -> None:
    """Refuse numbers that contradict each other, or that no model of these families has."""
    for problem, what in (
        (
            shape.heads % shape.kv_heads,
            f"{shape.heads} heads cannot share {shape.kv_heads} key-value heads",
        ),
        (
            shape.head_dim % 2 or not shape.head_dim,
            f"a head of {shape.head_dim} dimensions cannot be turned in pairs",
        ),
        (
            shape.experts_chosen > shape.experts,
            f"{shape.experts_chosen} of {shape.experts} experts cannot be chosen",
        ),
        (
            max(shape.layers, shape.experts) > _LAYERS,
            f"{shape.layers:,} layers, {shape.experts:,} experts: at most {_LAYERS:,} are read",
        ),
        (
            shape.context > _CONTEXT,
            f"{shape.context:,} positions: at most {_CONTEXT:,} are converted",
        ),
    ):
        if problem:
            raise RefusedError("source.architecture", f"config.json: {what}")


def _rope(config: Mapping[str, Any], context: int) -> Rope:
    """Read `rope_theta` and `rope_scaling`, or `rope_parameters` of newer writers."""
    newer = config.get("rope_parameters")
    scaling = newer if newer is not None else config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise RefusedError(
            "source.architecture", f"config.json: rope_scaling is {scaling!r:.60}, not an object"
        )
    base = _real(scaling if "rope_theta" in scaling else config, "rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return Rope(base)
    if kind == "linear":
        return Rope(base, "linear", _real(scaling, "factor"))
    if kind == "llama3":
        rope = Rope(
            base,
            "llama3",
            factor=_real(scaling, "factor"),
            low=_real(scaling, "low_freq_factor"),
            high=_real(scaling, "high_freq_factor"),
            original=_count(scaling, "original_max_position_embeddings", context),
        )
        if rope.low < rope.high:
            return rope
    raise RefusedError(
        "source.architecture",
        f"config.json: rope scaling {scaling!r:.120} is not converted; known: default, linear and "
        "llama3 with low_freq_factor below high_freq_factor",
        hint="take a release with one of these, or carry this model by other means",
    )


def _window(config: Mapping[str, Any], kind: str) -> int | None:
    """Return how many positions attention sees; None for all of them."""
    if kind.startswith("qwen") and config.get("use_sliding_window", False) is not True:
        return None
    if kind.startswith("qwen"):
        raise RefusedError(
            "source.architecture",
            "config.json: use_sliding_window, with windows in some layers only, is not converted",
        )
    if config.get("sliding_window") is None or kind == "llama":
        return None
    return _count(config, "sliding_window")


def _real(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value < _MAX_REAL:
        raise RefusedError(
            "source.architecture", f"config.json: {key} is {value!r:.40}, not a positive number"
        )
    return float(value)


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value < _MAX:
        raise RefusedError(
            "source.architecture", f"config.json: {key} is {value!r:.40}, not a count of 1 or more"
        )
    return value


def _ids(config: Mapping[str, Any], key: str) -> list[int]:
    value = config.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and 0 <= item < _MAX for item in items):
        raise RefusedError("source.architecture", f"{key} is {value!r:.60}, not a token id")
    return items
