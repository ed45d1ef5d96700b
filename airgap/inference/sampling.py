"""From logits to one token a row, in float64, without a loop (docs/design/science.md, 4).

Every function here treats each row alone, so that a sample's tokens do not depend on its
neighbours, on the size of the batch or on the order of arrival. Randomness comes from a counter and
not from a state: Philox4x32-10 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) keyed by the seed of the request, with (step, sample) as its counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Settings:
    """How to draw: temperature 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class Draw:
    """One token a row; where `dead`, no token was legal and `ids` and `logprob` mean nothing."""

    ids: Ids
    logprob: Floats
    removed_mass: Floats
    dead: Bools


class NotFiniteError(ValueError):
    """A row of logits holds NaN or infinity, or nothing but minus infinity."""


def draw(
    logits: npt.NDArray[np.float32],
    uniforms: Floats,
    settings: Settings,
    *,
    seen: Bools | None = None,
    legal: Bools | None = None,
) -> Draw:
    """Draw one token for each row.

    Args:
        logits: float32[rows, vocabulary], as the graph gave them.
        uniforms: float64[rows] in [0, 1).
        settings: How to draw.
        seen: bool[rows, vocabulary], the tokens that the penalty punishes; needed unless it is 1.
        legal: bool[rows, vocabulary], what the grammar allows; None where there is no grammar.

    Raises:
        NotFiniteError: The logits cannot be used.

    """
    raw = np.array(logits, dtype=np.float64, order="C")
    shifted, log_z = _normalised(raw)
    scores = raw
    if settings.repetition_penalty != 1.0 and seen is not None:
        scores = punished(scores, seen, settings.repetition_penalty)
    removed = np.zeros(len(raw))
    dead = np.zeros(len(raw), dtype=np.bool_)
    if legal is not None:
        removed = np.clip((shifted * ~legal).sum(axis=1) / shifted.sum(axis=1), 0.0, 1.0)
        scores = np.where(legal, scores, -np.inf)
        dead = ~np.isfinite(scores.max(axis=1))
        scores[dead] = 0.0
    if settings.temperature == 0.0:
        ids = scores.argmax(axis=1)
    else:
        ids = _sampled(scores, uniforms, settings)
    chosen = np.take_along_axis(raw, ids[:, None], axis=1)[:, 0] - log_z
    return Draw(ids=ids, logprob=chosen, removed_mass=removed, dead=dead)


def choose(
    scores: npt.NDArray[np.floating[Any]],
    ids: Ids,
    uniforms: Floats,
    *,
    temperature: Floats,
    top_p: Floats,
    top_k: Ids,
) -> Ids:
    """Draw one of the candidates that the graph's head gave, for each row alone.

    The cuts and the draw are those of `draw`; only the candidates come from elsewhere, and each row
    has settings of its own.

    Args:
        scores: float[rows, candidates], best first; minus infinity where illegal.
        ids: int64[rows, candidates].
        uniforms: float64[rows] in [0, 1).
        temperature: float64[rows]; 0 is greedy.
        top_p: float64[rows].
        top_k: int64[rows]; 0 keeps every candidate.

    Returns:
        int64[rows], the column that was drawn.

    """
    columns = np.arange(scores.shape[1])
    hot = np.where(temperature > 0.0, temperature, 1.0)[:, None]
    ranked = scores.astype(np.float64) / hot
    best = ranked[:, :1]
    weights = np.exp(ranked - np.where(np.isfinite(best), best, 0.0))
    keep = np.where(top_k > 0, top_k, len(columns))
    weights[columns[None, :] >= np.where(temperature > 0.0, keep, 1)[:, None]] = 0.0
    mass = weights.cumsum(axis=1)
    cut = (top_p < 1.0)[:, None] & (mass - weights >= top_p[:, None] * mass[:, -1:])
    weights[cut] = 0.0
    # In order of ids: a tie in rank cannot swap two tokens.
    order = np.argsort(ids, axis=1, kind="stable")
    mass = np.take_along_axis(weights, order, axis=1).cumsum(axis=1)
    total = mass[:, -1]
    target = np.minimum(uniforms * total, np.nextafter(total, 0.0))
    place = np.minimum((mass <= target[:, None]).sum(axis=1), len(columns) - 1)
    return np.take_along_axis(order, place[:, None], axis=1)[:, 0]


def log_likelihood(logits: npt.NDArray[np.float32], ids: Ids) -> Floats:
    """Return the log-probability at temperature 1 of `ids[i]` under `logits[i]`, float64[rows]."""
    raw = np.array(logits, dtype=np.float64, order="C")
    _, log_z = _normalised(raw)
    return np.take_along_axis(raw, ids[:, None], axis=1)[:, 0] - log_z


def punished(scores: Floats, seen: Bools, penalty: float) -> Floats:
    """Return scores under the repetition penalty of Keskar and others (2019)."""
    return np.where(seen, np.where(scores < 0.0, scores * penalty, scores / penalty), scores)


def kept(scores: Floats, *, top_k: int, top_p: float) -> tuple[Ids, Floats]:
    """Return (ids, weights) of the candidates that survive both cuts.

    Args:
        scores: float64[rows, vocabulary], temperature applied; minus infinity where illegal.
        top_k: Keep this many of the highest scores (0: all). Among equal scores at the edge the
            choice is fixed but not specified.
        top_p: Then keep the smallest set of highest scores whose probability reaches this.

    Returns:
        Two arrays [rows, candidates], ids ascending in each row; weights are relative
        probabilities, the highest 1, and 0 for a candidate that was cut.

    """
    vocabulary = scores.shape[1]
    if 0 < top_k < vocabulary:
        ids = np.argpartition(scores, vocabulary - top_k, axis=1)[:, vocabulary - top_k :]
        ids.sort(axis=1)
        scores = np.take_along_axis(scores, ids, axis=1)
    else:
        ids = np.broadcast_to(np.arange(vocabulary), scores.shape)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    if top_p < 1.0:
        order = np.argsort(-weights, axis=1, kind="stable")
        ranked = np.take_along_axis(weights, order, axis=1)
        mass = ranked.cumsum(axis=1)
        ranked[mass - ranked >= top_p * mass[:, -1:]] = 0.0
        np.put_along_axis(weights, order, ranked, axis=1)
    return ids, weights


def uniform(seeds: npt.NDArray[np.uint64], samples: Ids, steps: Ids) -> Floats:
    """Return float64[...] in [0, 1): for each entry that of its own seed, sample and step.

    Args:
        seeds: uint64[...].
        samples: int64[...].
        steps: int64[...].

    """
    step, sample = steps.astype(np.uint64), samples.astype(np.uint64)
    counter = (step & _WORD, step >> _SHIFT, sample & _WORD, sample >> _SHIFT)
    return _fraction(philox(counter, (seeds & _WORD, seeds >> _SHIFT)))


def uniforms(seed: int, samples: npt.NDArray[np.int64], first_step: int, steps: int) -> Floats:
    """Return float64[samples, steps] in [0, 1); an entry depends on seed, sample and step alone.

    Args:
        seed: 0 to 2**64 - 1.
        samples: The index of each sample in its request.
        first_step: The step of column 0.
        steps: How many columns.

    """
    step = np.arange(first_step, first_step + steps, dtype=np.uint64)[None, :]
    sample = samples.astype(np.uint64)[:, None]
    shape = (len(samples), steps)
    counter = (
        np.broadcast_to(step & _WORD, shape),
        np.broadcast_to(step >> _SHIFT, shape),
        np.broadcast_to(sample & _WORD, shape),
        np.broadcast_to(sample >> _SHIFT, shape),
    )
    key = np.uint64(seed)
    return _fraction(philox(counter, (key & _WORD, key >> _SHIFT)))


Words = tuple[
    npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64]
]


Key = tuple[Any, Any]  # two 32-bit words in uint64: numbers, or arrays of the counter's shape


def philox(counter: Words, key: Key) -> Words:
    """Return Philox4x32-10 of four 32-bit words, elementwise; words travel in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ k0,
            p1 & _WORD,
            (p0 >> _SHIFT) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0 = (k0 + _WEYL[0]) & _WORD
        k1 = (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _fraction(words: Words) -> Floats:
    """Return 53 bits of the first two words, what a double holds between 0 and 1."""
    high, low, _, _ = words
    whole = (high << np.uint64(21)) | (low >> np.uint64(11))
    return whole.astype(np.float64) * 2.0**-53


def _normalised(raw: Floats) -> tuple[Floats, Floats]:
    """Return (exp(logits - row maximum), log of the row's sum of exp(logits))."""
    peak = raw.max(axis=1, keepdims=True)
    if not np.isfinite(peak).all():
        raise NotFiniteError
    shifted = np.exp(raw - peak)
    return shifted, peak[:, 0] + np.log(shifted.sum(axis=1))


def _sampled(scores: Floats, uniforms: Floats, settings: Settings) -> Ids:
    """Invert the distribution function in order of ids: a tie in rank cannot swap two tokens."""
    ids, weights = kept(scores / settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    mass = weights.cumsum(axis=1)
    total = mass[:, -1]
    target = np.minimum(uniforms * total, np.nextafter(total, 0.0))
    place = (mass <= target[:, None]).sum(axis=1)
    return np.take_along_axis(ids, place[:, None], axis=1)[:, 0]
