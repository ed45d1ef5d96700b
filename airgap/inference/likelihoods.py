"""The likelihood of given ids on the fast graph, and the authors' perplexity of a sample."""

from __future__ import annotations

import numpy as np

from airgap.inference.authors import authors_ids, perplexity
from airgap.inference.fast import PIECE, FastModel, Head, Slots
from airgap.inference.plan import AGAIN, SCORE_BYTES, Plan
from airgap.inference.protocol import Score, Scores
from airgap.inference.refusals import completion_ids, not_finite, prompt_ids


def score(model: FastModel, plan: Plan, request: Score) -> Scores:
    """Return the log-likelihood of each given completion after the prompt.

    Raises:
        ProgramError: `prompt.*` or `model.*`.

    """
    prompt = prompt_ids(request, model.facts, model.vocabulary)
    rest = completion_ids(request, model.vocabulary)
    longest = max(len(ids) for ids in rest)
    plan.require(len(prompt), longest)
    slots = model.slots(rows=1, capacity=len(prompt) + longest)
    if prompt[:-1]:
        model.prefill(prompt[:-1], slots)
    found = tuple((_log_likelihood(model, prompt, ids, slots), len(ids)) for ids in rest)
    return Scores(prompt_tokens=len(prompt), scores=found)


def authors_perplexity(model: FastModel, ids: list[int], *, capacity: int) -> float | None:
    """Return the authors' perplexity of prompt and sample.

    None where their text no longer fits the context, or grows beyond what was planned for a sample
    of `capacity` positions.
    """
    again = authors_ids(model.vocabulary, model.facts, ids)
    if len(again) > min(model.facts.max_context, capacity + AGAIN):
        return None
    slots = model.slots(rows=1, capacity=len(again))
    return perplexity(again, lambda first, rest: _log_likelihood(model, [first], list(rest), slots))


def _log_likelihood(model: FastModel, prompt: list[int], ids: list[int], slots: Slots) -> float:
    """Return that of `ids` after `prompt`, whose ids but for the last one were run in `slots`."""
    total, inputs = 0.0, [prompt[-1], *ids[:-1]]
    piece = max(1, min(PIECE, SCORE_BYTES // (4 * model.facts.vocab_size)))
    for start in range(0, len(ids), piece):
        part = np.array([inputs[start : start + piece]], dtype=np.int64)
        count = part.shape[1]
        head = Head(select=np.arange(count), target=np.array(ids[start : start + count]))
        after = np.array([len(prompt) + start + count - 1], dtype=np.int32)
        found = model.run(part, after, slots, head)
        if not np.isfinite(found.log_z).all():
            raise not_finite(start)
        total += float((found.target_raw.astype(np.float64) - found.log_z).sum())
    return min(0.0, total)
