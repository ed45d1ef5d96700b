"""The perplexity that the authors' scripts print, on demand (docs/design/science.md, 3).

They decode prompt and sample to one text, start token included, take the padding text out, and
tokenise the whole again, with the start token of the tokenizer before it once more; then the mean
runs over every position of it. It mostly measures the prompt, and of another segmentation than the
sampled one; it is given beside `logprob` for comparison with their files and is never used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from airgap.inference.graphs import ModelFacts
from airgap.inference.protocol import PERPLEXITY_LIMIT
from airgap.inference.vocabulary import Vocabulary

CUT = 4096  # ids; the scripts cut longer texts without a word


def authors_ids(vocabulary: Vocabulary, facts: ModelFacts, ids: Sequence[int]) -> list[int]:
    """Return the ids that the scripts score for a prompt and its sample.

    Args:
        vocabulary: Of the model.
        facts: Of the model.
        ids: Prompt and sample, start and end tokens included.

    """
    text = vocabulary.decode(ids)
    if facts.pad_id is not None:
        text = text.replace(vocabulary.decode([facts.pad_id]), "")
    return vocabulary.encode_again(text)[:CUT]


def perplexity(ids: Sequence[int], score: Callable[[int, Sequence[int]], float]) -> float | None:
    """Return the perplexity of `ids`; None where there is nothing to predict.

    Args:
        ids: As `authors_ids` gives them.
        score: Returns the log-likelihood of the second argument after the one id of the first.

    """
    if len(ids) < 2:  # noqa: PLR2004 -- the first id is never predicted
        return None
    mean = -score(ids[0], ids[1:]) / (len(ids) - 1)
    return min(math.exp(min(mean, 690.0)), PERPLEXITY_LIMIT)
