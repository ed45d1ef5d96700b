"""A linter for every JSON that a model library would read: keys that make a loader run code.

Decides whether a configuration may reach a loader at all. Keys are refused at any depth, whatever
their value; values that look like code or like a place on a hub are findings for the reader of the
report. docs/design/bundle.md, 5 (CVE-2026-4372, CVE-2026-5241).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bundle.scan.strict import parse_object
from policy.errors import RefusedError

CODE = "scan.config"
CONFIG_LIMIT = 4 * 1024 * 1024
MAX_TEXT = 1 << 17  # characters of one value; a chat template has its own, smaller limit

# Each names code, or a place to fetch code from. Matched without regard to case.
_REFUSED = re.compile(
    r"auto_map|.*trust_remote_code.*|_?attn_implementation_.+|_attn_implementation"
    r"|custom_pipelines?|custom_generate|_target_|.*_target_|__.*__|code_revision"
    r"|.*_kernels?_?(repo|hub)?|use_kernels|hub_kernels?|py/(object|reduce|function|type)",
    re.IGNORECASE,
)
_IMPORT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:[A-Za-z_]\w*)?")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(--[\w.]+)?")
_HARMLESS = re.compile(r"torch\.(float|bfloat|int|uint)\d+|v?\d[\d.]*")
# Where a place on a hub is only a memory of the past: read for lineage, never followed.
_MEMORIES = frozenset(["_name_or_path", "name_or_path", "base_model_name_or_path"])

# What a decoder-only configuration of the supported families holds; anything else is a finding.
KNOWN_KEYS = frozenset(
    [
        *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
        *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"),
        *("pretraining_tp", "tie_word_embeddings", "rope_theta", "rope_scaling"),
        *("rope_parameters", "attention_bias", "attention_dropout", "mlp_bias", "torch_dtype"),
        *("dtype", "transformers_version", "sliding_window", "use_sliding_window"),
        *("max_window_layers", "layer_types", "_name_or_path", "is_encoder_decoder"),
        *("reference_model", "scientific_use"),  # ours: a stamp that inspection reads
    ]
)


def lint_config(data: memoryview, what: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the parsed configuration and findings, one line each.

    Raises:
        RefusedError: `scan.config`; not strict JSON, or a key that makes a loader run code.

    """
    value = parse_object(data, code=CODE, what=what, limit=CONFIG_LIMIT)
    findings: list[str] = []
    for place, key, item in _walk(value, ""):
        if _REFUSED.fullmatch(key):
            raise RefusedError(
                CODE,
                f"{what}: key {place!r:.160} makes a model library load code or ask a hub",
                hint="remove the key, or take a release of this model in a standard architecture; "
                "then pin and inspect again",
            )
        if not isinstance(item, str):
            continue
        if len(item) > MAX_TEXT:
            raise RefusedError(CODE, f"{what}: the text at {place!r:.160} is too long")
        if key in _MEMORIES or key.endswith("template") or _HARMLESS.fullmatch(item):
            continue
        if _HUB.fullmatch(item):
            findings.append(f"{place}: {item!r:.80} looks like a place on a hub")
        elif _IMPORT.fullmatch(item):
            findings.append(f"{place}: {item!r:.80} looks like a name to import")
    return value, tuple(findings)


def unknown_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the keys of `config.json` that no supported architecture has."""
    return tuple(sorted(set(config) - KNOWN_KEYS))


def _walk(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of everything below `value`; items of a list bear its key."""
    pending: list[tuple[str, str, Any]] = [(place, "", value)]
    while pending:
        place, key, item = pending.pop()
        if isinstance(item, dict):
            for name, below in item.items():
                path = f"{place}.{name}" if place else name
                yield path, name, below
                pending.append((path, name, below))
        elif isinstance(item, list):
            for number, below in enumerate(item):
                path = f"{place}[{number}]"
                if isinstance(below, str):
                    yield path, key, below
                else:
                    pending.append((path, key, below))
