"""Where a model seems to come from: hints of card, configuration, tokenizer and tensor shapes.

Every hint names its basis and is `declared`: none of them proves a descent, and the curated
registry of the policy decides which count. Their use is to contradict a card that keeps silent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from bundle.scan.tokenizer import Tokenizer
from bundle.staging.architecture import Architecture
from policy.lineage import Registry, parse_lineage, unite

# layers, hidden, feed-forward, heads, key-value heads of published base models
_SHAPES = {
    (16, 2048, 8192, 32, 8): "llama-3.2-1b",
    (28, 3072, 8192, 24, 8): "llama-3.2-3b",
    (32, 4096, 14336, 32, 8): "llama-3-8b or mistral-7b",
    (28, 1024, 3072, 16, 8): "qwen3-0.6b",
    (28, 2048, 6144, 16, 8): "qwen3-1.7b",
    (36, 2560, 9728, 32, 8): "qwen3-4b",
    (36, 4096, 12288, 32, 8): "qwen3-8b",
    (28, 3584, 18944, 28, 4): "qwen2.5-7b",
}
# A control token that only the tokenizers of one family have
_TOKENS = {
    "<|begin_of_text|>": "llama-3 (tokenizer)",
    "<|im_start|>": "qwen (tokenizer)",
}
# Keys of a model card, and how the party that they name relates to the model.
_CARD = (
    ("base_model", "derived_from"),
    ("developers", "developed_by"),
    ("developer", "developed_by"),
    ("co_developers", "codeveloped_by"),
    ("fine_tuned_by", "fine_tuned_by"),
    ("finetuned_by", "fine_tuned_by"),
    ("distributed_by", "distributed_by"),
    ("distributor", "distributed_by"),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SHORT = 200


@dataclass(frozen=True, slots=True)
class Hint:
    """One hint: how the model relates to `party`, and what says so."""

    relation: str
    party: str
    basis: str
    status: str = "declared"


def lineage_hints(
    card: Mapping[str, Any],
    config: Mapping[str, Any],
    shape: Architecture | None,
    tokenizer: Tokenizer | None,
    source: str | None = None,
) -> tuple[Hint, ...]:
    """Collect the hints, each party and basis once; `source` is where it is from, hf:ORG/NAME."""
    found: list[Hint] = []
    for key, relation in _CARD:
        value = card.get(key)
        names = value if isinstance(value, list) else [value] if value is not None else []
        found += [
            Hint(relation, str(name)[:_SHORT], f"README.md#{key}") for name in names if str(name)
        ]
    path = config.get("_name_or_path")
    if isinstance(path, str) and _HUB_ID.fullmatch(path):
        found.append(Hint("derived_from", path, "config.json#_name_or_path"))
    if shape is not None:
        key_ = (shape.layers, shape.hidden, shape.feed_forward, shape.heads, shape.kv_heads)
        if key_ in _SHAPES:
            found.append(Hint("derived_from", _SHAPES[key_], "tensor shapes"))
    if tokenizer is not None:
        found += [
            Hint("derived_from", family, f"tokenizer.json holds {token}")
            for token, family in _TOKENS.items()
            if token in tokenizer.ids or token in tokenizer.special
        ]
    if source is not None and source.startswith("hf:") and "/" in source:
        found.append(Hint("distributed_by", source.partition("/")[0], "place of the download"))
    return tuple(dict.fromkeys(found))


def registry_hints(registry: Registry, source: str | None) -> tuple[Hint, ...]:
    """Return what the curated registry of this program says about a model from that place.

    They stand in the report beside the others. The policy reads the registry itself.
    """
    record = registry.model_of(source) if source else None
    if record is None:
        return ()
    basis = f"registry version {registry.version}, {record.id}"
    found = [
        Hint(relation, party, basis)
        for relation, parties in (
            ("developed_by", record.developed_by),
            ("codeveloped_by", record.codeveloped_by),
            ("fine_tuned_by", record.fine_tuned_by),
            ("distributed_by", record.distributed_by),
        )
        for party in parties
    ]
    found += [Hint("derived_from", base.family, basis) for base in record.derived_from or ()]
    return tuple(found)


def packaged_registry() -> Registry:
    """Load the lineage registry that comes with this program."""
    content = resources.files("policy").joinpath("registry/registry.yaml").read_bytes()
    return unite([parse_lineage(content, "registry.yaml")])


def silent_card(card: Mapping[str, Any], hints: tuple[Hint, ...]) -> str:
    """Say so when the card names no base model and something else does; empty otherwise."""
    other = [hint for hint in hints if not hint.basis.startswith("README.md")]
    derived = [hint for hint in other if hint.relation == "derived_from"]
    if derived and "base_model" not in card:
        names = ", ".join(f"{hint.party} ({hint.basis})" for hint in derived)
        return f"the card names no base model, but there are signs of {names}"
    return ""
