"""One draw at each picked position: what the head shall give back, and which candidate is taken.

Each position has a row, whose request says how to draw, and the state of its grammar there; nothing
that is decided for one bears on another (docs/design/science.md, 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from airgap.inference import sampling
from airgap.inference.constrain import State, mask_words
from airgap.inference.fast import Found, Head
from airgap.inference.protocol import Generate
from airgap.inference.rows import Row

WIDE = 1024  # candidates where no top-k is asked for; a smaller vocabulary is kept whole
WHOLE = 4096
_AHEAD = 96  # steps that random numbers are drawn ahead; more than a guess has
_TRIES = np.int64(32)  # where the number of a redraw stands in the counter of the generator

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Draws:
    """Head and draws for a vocabulary of one size."""

    def __init__(self, size: int) -> None:
        """Take the number of entries of the vocabulary."""
        self._size = size

    def head(
        self, select: Ids, rows: Sequence[Row], states: Sequence[State | None], *, seen: Ids
    ) -> Head:
        """Say what the head shall do for each picked position.

        Args:
            select: Flat places of the run.
            rows: The row of each.
            states: The grammar of each, None where there is none.
            seen: int64[picked, any], what the penalty of each punishes.

        """
        penalty = np.array([row.job.request.repetition_penalty for row in rows], dtype=np.float32)
        punishes = bool((penalty != 1.0).any())
        return Head(
            select=np.asarray(select, dtype=np.int64),
            top_k=max(self._candidates(row.job.request) for row in set(rows)),
            seen=seen if punishes else None,
            penalty=penalty if punishes else None,
            legal=self._legal(rows, states),
        )

    def choose(
        self, rows: Sequence[Row], states: Sequence[State | None], found: Found, *, steps: Ids
    ) -> tuple[Ids, Floats]:
        """Return the column that each position draws (-1: none) and the mass a filter refused.

        Args:
            rows: The row of each position.
            states: The grammar of each.
            found: What the head gave.
            steps: Which token of its text each draws, from 0.

        """
        requests = [row.job.request for row in rows]
        top_k = [request.top_k or self._candidates(request) for request in requests]
        columns = sampling.choose(
            found.scores,
            found.ids,
            _uniforms(rows, steps.tolist()),
            temperature=np.array([request.temperature for request in requests]),
            top_p=np.array([request.top_p for request in requests]),
            top_k=np.array(top_k),
        )
        refused = np.zeros(len(rows))
        for place, state in enumerate(states):
            if state is not None and state.filters:
                columns[place], refused[place] = self._filtered(
                    rows[place], found, (place, int(steps[place]), int(columns[place])), state
                )
        return columns, refused

    def _candidates(self, request: Generate) -> int:
        if not request.grammar.valence:  # its filter may refuse the best ones
            if request.temperature == 0.0:
                return 1
            if request.top_k:
                return min(request.top_k, self._size)
        return self._size if self._size <= WHOLE else WIDE

    def _legal(
        self, rows: Sequence[Row], states: Sequence[State | None]
    ) -> npt.NDArray[np.bool_] | None:
        bound = [(place, state) for place, state in enumerate(states) if state is not None]
        constraint = rows[bound[0][0]].job.constraint if bound else None
        if constraint is None:
            return None
        words = np.zeros((len(bound), mask_words(self._size)), dtype=np.uint32)
        for line, (_, state) in zip(words, bound, strict=True):
            state.mask(line)
        if len(bound) == len(rows):
            return constraint.legal_ids(words)
        legal = np.ones((len(rows), self._size), dtype=np.bool_)
        legal[[place for place, _ in bound]] = constraint.legal_ids(words)
        return legal

    def _filtered(
        self, row: Row, found: Found, at: tuple[int, int, int], state: State
    ) -> tuple[int, float]:
        """Draw again, without what the filter refused, until it lets a token pass.

        Each try has a random number of its own, and the cuts are made on what is left: without them
        the outcome has exactly the distribution of a mask over the whole vocabulary.
        """
        place, step, column = at
        request = row.job.request
        left = np.arange(self._candidates(request))
        if np.isneginf(found.scores[place, 0]):
            return column, 0.0
        refused = 0.0
        for tries in range(1, len(left) + 1):
            if state.allows(int(found.ids[place, column])):
                return column, refused
            refused += float(np.exp(min(0.0, found.raw[place, column] - found.log_z[place])))
            left = left[left != column]
            scores = found.scores[place, left][None]
            if not len(left) or np.isneginf(scores[0, 0]):
                break
            drawn = sampling.choose(
                scores,
                found.ids[place, left][None],
                sampling.uniform(
                    _seeds([row]),
                    np.array([row.index], dtype=np.int64),
                    np.array([step + (tries << _TRIES)], dtype=np.int64),
                ),
                temperature=np.array([request.temperature]),
                top_p=np.array([request.top_p]),
                top_k=np.array([request.top_k or len(left)]),
            )
            column = int(left[drawn[0]])
        return -1, refused


def _uniforms(rows: Sequence[Row], steps: Sequence[int]) -> Floats:
    """Return float64[rows], the random number of each row at its step.

    A call of the generator costs as much for one number as for some hundred, and a step of a small
    model not much more than such a call: numbers are drawn some steps ahead.
    """
    first: dict[Row, int] = {}  # steps of one row rise
    short: dict[Row, int] = {}
    for row, step in zip(rows, steps, strict=True):
        start = first.setdefault(row, step)
        if not 0 <= start - row.numbers_from <= step - row.numbers_from < len(row.numbers):
            short[row] = start
    if short:
        ahead = np.array(list(short.values()), dtype=np.int64)[:, None] + np.arange(_AHEAD)
        drawn = sampling.uniform(
            np.broadcast_to(_seeds(short)[:, None], ahead.shape),
            np.broadcast_to(np.array([[row.index] for row in short]), ahead.shape),
            ahead,
        )
        for (row, start), numbers in zip(short.items(), drawn, strict=True):
            row.numbers, row.numbers_from = numbers, start
    return np.array(
        [row.numbers[step - row.numbers_from] for row, step in zip(rows, steps, strict=True)]
    )


def _seeds(rows: Iterable[Row]) -> npt.NDArray[np.uint64]:
    return np.array([row.job.request.seed for row in rows], dtype=np.uint64)
