"""The token table of a checkpoint against the sixteen tags: no id is a constant in our code.

A tag that a task needs and the checkpoint lacks, or whose id it gives twice, refuses that task.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from airgap.science.completions import CONTROL
from airgap.science.grammar import TAGS
from airgap.science.refusals import PromptError


@dataclass(frozen=True, slots=True)
class TokenReport:
    """How the added tokens of a checkpoint compare with the 16 tags.

    Attributes:
        missing: Tags that the checkpoint lacks.
        unknown: Added tokens in tag form that the grammar does not know.
        clash: Ids that belong to more than one token.
        not_special: Tags that are ordinary tokens, which a tokenizer may split.

    """

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    clash: tuple[int, ...]
    not_special: tuple[str, ...]


def compare_tokens(
    ids: Mapping[str, int], *, special: Collection[str] | None = None
) -> TokenReport:
    """Compare the added tokens of a checkpoint, token to id, with the tags of the grammar."""
    owners: dict[int, list[str]] = {}
    for token, number in ids.items():
        owners.setdefault(number, []).append(token)
    shape = re.compile(r"<[A-Za-z]+>")
    return TokenReport(
        missing=tuple(tag for tag in TAGS if tag not in ids),
        unknown=tuple(
            sorted(
                token
                for token in ids
                if shape.fullmatch(token) and token not in TAGS and not CONTROL.fullmatch(token)
            )
        ),
        clash=tuple(sorted(number for number, tokens in owners.items() if len(tokens) > 1)),
        not_special=()
        if special is None
        else tuple(tag for tag in TAGS if tag in ids and tag not in special),
    )


def require_tokens(ids: Mapping[str, int], needed: Sequence[str], *, model: str, task: str) -> None:
    """Refuse `task` on a checkpoint without a token it needs, or with its id given twice (g11)."""
    lacking = [tag for tag in needed if tag not in ids]
    if lacking:
        raise PromptError(
            "prompt.g11",
            f"{model} has no token {' '.join(lacking)}, which {task} needs",
            hint="choose another task or another model; `airgap list` shows what is installed",
        )
    twice = [tag for tag in needed if list(ids.values()).count(ids[tag]) > 1]
    if twice:
        raise PromptError(
            "prompt.g11",
            f"{model} gives the id of {' '.join(twice)} to another token as well",
            hint="its tokenizer was damaged in conversion: build the bundle again from the source",
        )
