"""The tokens that steer a model: what starts and ends a text, and the tags of our tasks.

Decides before any work begins whether generation would end, and whether a tag of a prompt is one
that no text can write. A model may lack the tags of a task, which is then refused where it is asked
for; half a pair it may not have, since a text that is opened would never be closed.
docs/design/science.md, 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bundle.scan.tokenizer import Tokenizer
from bundle.staging.architecture import Architecture
from policy.errors import RefusedError

PAIRS = tuple(
    (f"<{name}S>", f"<{name}E>")
    for name in ("Protein", "Antibody", "Molecule", "Pocket", "Material", "Metal")
)
TAGS = (
    *(tag for pair in PAIRS for tag in pair),
    "<Trans>",
    "<Search>",
    "<React>",
    "<ReverseReact>",
)
_SAME_RELEASE = "download tokenizer.json and generation_config.json of the same release"


def require_tokens(shape: Architecture, tokenizer: Tokenizer, tags: Mapping[str, int]) -> None:
    """Refuse a tokenizer whose ids, end tokens or tags cannot be those of the model.

    Args:
        shape: Of the model.
        tokenizer: Of the model.
        tags: Special tokens that neither start nor end a text.

    Raises:
        RefusedError: `source.shape`, ids and end tokens; `model.tags`.

    """
    if tokenizer.size > shape.vocabulary:
        raise RefusedError(
            "source.shape",
            f"tokenizer.json has ids up to {tokenizer.size - 1:,}, the weights "
            f"{shape.vocabulary:,} rows",
            hint="download the tokenizer that belongs to these weights",
        )
    ids = [shape.bos_id, shape.pad_id, *shape.eos_ids]
    if any(number is not None and number >= shape.vocabulary for number in ids):
        raise RefusedError("source.shape", "config.json names a token id outside the vocabulary")
    _require_ends(shape, tokenizer)
    _require_tags(tokenizer, tags)


def start_token(
    shape: Architecture, tokenizer: Tokenizer, settings: Mapping[str, Any]
) -> int | None:
    """Return the id that the publisher's tokenizer puts before each text.

    The template of tokenizer.json says so. Without one it is that of config.json, unless the
    settings say that none is put there: Qwen names a start token that its tokenizer never writes.

    Args:
        shape: Of the model.
        tokenizer: Of the model.
        settings: `tokenizer_config.json`, empty where there is none.

    Raises:
        RefusedError: `source.shape`; several tokens start a text, or one that nobody is.

    """
    if tokenizer.starts is None:
        silent = settings.get("add_bos_token") is False or settings.get("bos_token", "") is None
        return None if silent else shape.bos_id
    if not tokenizer.starts:
        return None
    if len(tokenizer.starts) > 1 or tokenizer.starts[0] not in set(tokenizer.ids.values()):
        raise RefusedError(
            "source.shape",
            f"tokenizer.json starts each text with the ids {list(tokenizer.starts)!r:.80}; known "
            "is one start token, and it has an entry",
            hint="take a release whose tokenizer starts a text with one token or none",
        )
    return tokenizer.starts[0]


def _require_ends(shape: Architecture, tokenizer: Tokenizer) -> None:
    """Refuse an end token that no text has, or that is a word of texts."""
    words = {number: text for text, number in tokenizer.ids.items()}
    special = set(tokenizer.special.values())
    for number in sorted(set(shape.eos_ids) - special):
        if number not in words:
            raise RefusedError(
                "source.shape",
                f"end token {number:,} has no entry in tokenizer.json",
                hint=_SAME_RELEASE,
            )
        raise RefusedError(
            "source.shape",
            f"end token {number:,} is {words[number]!r:.40} in tokenizer.json, which is not a "
            "special token: texts would end in the middle",
            hint=f"{_SAME_RELEASE}; eos_token_id may have been left at a library's default",
        )


def _require_tags(tokenizer: Tokenizer, tags: Mapping[str, int]) -> None:
    for tag in TAGS:
        if tag in tokenizer.ids and tag not in tags:
            raise _tags(
                f"{tag} starts or ends texts by config.json"
                if tag in tokenizer.special
                else f"{tag} is not a special token in tokenizer.json: a text could write it"
            )
    for pair in PAIRS:
        there = [tag for tag in pair if tag in tags]
        if len(there) == 1:
            lost = next(tag for tag in pair if tag not in tags)
            raise _tags(
                f"tokenizer.json has {there[0]} and no {lost}: what one opens would never be closed"
            )


def _tags(message: str) -> RefusedError:
    return RefusedError(
        "model.tags",
        message,
        hint="take the tokenizer.json that the model was trained with; a model without a task's "
        "tags is carried, half a pair is not",
    )
