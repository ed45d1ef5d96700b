"""What both loops refuse, in the same words (docs/design/inference.md, 5).

The first functions turn a request into ids and say no before anything runs; the rest are the
refusals that only the work itself can find.
"""

from __future__ import annotations

from airgap.enclave.channel import ProgramError
from airgap.inference.graphs import ModelFacts
from airgap.inference.protocol import Generate, Score
from airgap.inference.vocabulary import Vocabulary

NOT_FINITE = "model.nan"


def prompt_ids(request: Generate | Score, facts: ModelFacts, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of the prompt; the start token comes once, where the model has one.

    Raises:
        ProgramError: `prompt.*`, or `request.malformed` for a prompt without tokens.

    """
    start = [] if facts.bos_id is None else [facts.bos_id]
    ids = [*start, *vocabulary.encode(request.prompt)]
    if not ids:
        raise _empty("the prompt")
    return ids


def completion_ids(request: Score, vocabulary: Vocabulary) -> list[list[int]]:
    """Return the ids of each completion to be scored.

    Raises:
        ProgramError: `prompt.*`, or `request.malformed` for a completion without tokens.

    """
    found = [vocabulary.encode(one, after=request.prompt) for one in request.completions]
    if not all(found):
        raise _empty("a completion")
    return found


def stop_ids(request: Generate, facts: ModelFacts) -> list[int]:
    """Return the ids of the stop tags.

    Raises:
        ProgramError: `model.stop`.

    """
    for tag in request.stop:
        if tag not in facts.tags:
            raise ProgramError(
                "model.stop",
                f"stop tag {tag!r:.80} is not in the vocabulary of {facts.model}",
                "without it a sample would never end there; use a model that has the tag",
            )
    return [facts.tags[tag] for tag in request.stop]


def require_context(facts: ModelFacts, *, prompt: int, new: int) -> None:
    """Refuse a prompt of so many ids with so many new ones where the context is shorter.

    Raises:
        ProgramError: `prompt.g10`.

    """
    if prompt + new > facts.max_context:
        raise ProgramError(
            "prompt.g10",
            f"prompt ({prompt} tokens) and budget ({new} tokens) need {prompt + new} positions; "
            f"{facts.model} has {facts.max_context}",
            f"ask for at most {facts.max_context - prompt} new tokens"
            if prompt < facts.max_context
            else "shorten the input",
        )


def too_large(capacity: int, *, needed: int, budget: int) -> ProgramError:
    """Refuse a sample of `capacity` positions that needs more bytes than are planned."""
    return ProgramError(
        "model.memory",
        f"one sample of {capacity} positions needs {needed >> 20} MiB; "
        f"{budget >> 20} MiB are planned for a request",
        "ask for fewer new tokens, or give the worker more memory",
    )


def out_of_memory() -> ProgramError:
    """Refuse what the plan allowed and the machine did not."""
    return ProgramError(
        "model.memory",
        "the worker ran out of memory",
        "ask for fewer samples or fewer new tokens",
    )


def not_finite(step: int) -> ProgramError:
    """Refuse logits from which nothing can be drawn."""
    return ProgramError(
        NOT_FINITE,
        f"the model gave logits that are not numbers (step {step})",
        "verify the installed bundle; ask its builder for the parity record",
    )


def _empty(what: str) -> ProgramError:
    return ProgramError("request.malformed", f"{what} has no tokens", "give at least one tag")
