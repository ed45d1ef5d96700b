"""The token table of a checkpoint against the tags of a task: no id is a constant in our code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from airgap.science.refusals import PromptError


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
