"""The prompts of the parity proof, and whether a model can take them as far as its files tell it.

Decides before any work begins what the parity run would refuse after hours of it. Only what is
certain is refused: the tokenizer itself runs sealed, and later.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bundle.scan.strict import open_view, parse_object
from bundle.scan.tokenizer import Tokenizer
from bundle.staging.architecture import Architecture
from policy.errors import RefusedError

MIN_PROMPTS = 20
STEPS = 64
KINDS = frozenset(["molecule", "retrosynthesis", "binding-site", "pocket-ligand", "material"])
PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the packaged set: its kind, text and where it is from."""

    kind: str
    text: str
    source: str


def load_prompts() -> tuple[tuple[Prompt, ...], list[dict[str, str]]]:
    """Return the packaged prompts and the credits of their data."""
    document = parse_object(
        open_view(PROMPTS), code="parity.vectors", what="prompts.json", limit=1 << 20
    )
    prompts = tuple(
        Prompt(item["kind"], item["prompt"], item["source"]) for item in document["prompts"]
    )
    return prompts, document["credits"]


def require_prompts(used: Sequence[Prompt], among: int, reasons: Collection[str]) -> None:
    """Refuse where too few prompts can be used to prove anything: RefusedError `parity.vectors`."""
    missing = sorted(KINDS - {prompt.kind for prompt in used})
    if len(used) < MIN_PROMPTS or missing:
        raise RefusedError(
            "parity.vectors",
            f"{len(used)} of {among} prompts can be used, at least {MIN_PROMPTS} of all "
            f"five kinds are needed; kinds without one: {', '.join(missing) or 'none'}; "
            f"left out because: {'; '.join(sorted(reasons)) or 'nothing'}",
            hint="the model does not speak the grammar of the prompts, so they cannot prove it",
        )


def require_speech(shape: Architecture, tokenizer: Tokenizer) -> None:
    """Refuse a model that lacks a token of the prompts, or whose context is too short for them.

    Raises:
        RefusedError: `parity.vectors`.

    """
    prompts, used, reasons = load_prompts()[0], [], set()
    for prompt in prompts:
        fewest = fewest_pieces(prompt.text, tokenizer.ids) if tokenizer.plain else 0
        if fewest is None and tokenizer.unk is not None:
            reasons.add("the tokenizer lacks a token")
        elif (fewest or 0) + (shape.bos_id is not None) + STEPS > shape.context:
            reasons.add("longer than the context")
        else:
            used.append(prompt)
    require_prompts(used, len(prompts), reasons)


def lacking_tags(tokenizer: Tokenizer) -> dict[str, tuple[str, ...]]:
    """Return by kind of prompt the tags that the tokenizer lacks; that kind is of no use."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in sorted(KINDS):
        texts = [prompt.text for prompt in load_prompts()[0] if prompt.kind == kind]
        needed = dict.fromkeys(re.findall(r"<[A-Za-z]+>", "".join(texts)))
        lost = tuple(tag for tag in needed if tag not in tokenizer.special)
        if lost:
            found[kind] = lost
    return found


def fewest_pieces(text: str, known: Mapping[str, int]) -> int | None:
    """Return the fewest known pieces that make up `text`; None where none do."""
    longest = max(map(len, known), default=0)
    fewest: list[int | None] = [0]
    for end in range(1, len(text) + 1):
        counts = (
            count + 1
            for start in range(max(0, end - longest), end)
            if (count := fewest[start]) is not None and text[start:end] in known
        )
        fewest.append(min(counts, default=None))
    return fewest[-1]
