"""The decoding loop: one prefill, n samples, run in batches (docs/design/inference.md, 5).

The memory of a request is planned before work begins; what cannot fit is refused. A sample's tokens
depend on the request's seed and its own index alone: neither on n nor on how samples share batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from airgap.enclave.channel import ProgramError
from airgap.inference import sampling
from airgap.inference.constrain import Constraint
from airgap.inference.graphs import ModelFacts
from airgap.inference.model import PIECE_BYTES, Cache, Logits, Model
from airgap.inference.protocol import Done, Generate, Progress, Sample, Score, Scores
from airgap.inference.refusals import (
    completion_ids,
    not_finite,
    prompt_ids,
    require_context,
    stop_ids,
    too_large,
)

_PROGRESS_S = 0.1
_DRAWS_AHEAD = 64  # steps whose random numbers are made at once
_SCRATCH = 112  # bytes a row needs for each vocabulary entry: float64 copies of the sampler
_RUNNING = 0
_REASONS = ("", "length", "stop", "eos", "dead_end")

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is cut: rows that run together, positions of each, bytes for all of it."""

    rows: int
    capacity: int
    size: int


def plan_memory(
    facts: ModelFacts, *, kv_bytes: int, prompt: int, new: int, n: int, budget: int, most_rows: int
) -> Plan:
    """Return the widest batch that fits into `budget` bytes.

    Args:
        facts: Shapes of the model.
        kv_bytes: Bytes of one number in its caches.
        prompt: Ids of the prompt, start token included.
        new: The most ids of one sample.
        n: Samples asked for.
        budget: Bytes that the request may take.
        most_rows: Widest batch that is worth running.

    Raises:
        ProgramError: `prompt.g10`, prompt and samples exceed the context; `model.memory`, not even
            one sample fits.

    """
    require_context(facts, prompt=prompt, new=new)
    capacity = prompt + new
    position = 2 * facts.layers * facts.kv_heads * facts.head_dim * kv_bytes
    fixed = 2 * position * prompt + min(PIECE_BYTES, 4 * facts.vocab_size * prompt)
    row = 2 * position * capacity + _SCRATCH * facts.vocab_size + 4 * new
    rows = min(n, most_rows, (budget - fixed) // row)
    if rows < 1:
        raise too_large(capacity, needed=fixed + row, budget=budget)
    return Plan(rows=rows, capacity=capacity, size=fixed + rows * row)


class Decoder:
    """Runs requests on one model, one at a time."""

    def __init__(
        self,
        model: Model,
        *,
        budget: int,
        most_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a loaded model.

        Args:
            model: The model.
            budget: Bytes that one request may take.
            most_rows: Widest batch.
            clock: Monotonic seconds.

        """
        self._model = model
        self._budget = budget
        self._most_rows = most_rows
        self._clock = clock

    def generate(
        self,
        request: Generate,
        constraint: Constraint | None,
        emit: Callable[[Sample | Progress], None],
    ) -> Done:
        """Draw every sample of `request`; each goes to `emit` as it ends.

        Raises:
            ProgramError: `prompt.*` or `model.*`, before the first run where it can be known.

        """
        if constraint is not None and constraint.filters:
            raise ProgramError(
                "model.valence",
                "the filter `valence` works on the fast graph; this model has the reference graph",
                "build the bundle with the fast graph, or leave --valence out",
            )
        started, first_run = self._clock(), self._model.runs
        prompt = prompt_ids(request, self._model.facts, self._model.vocabulary)
        stops = stop_ids(request, self._model.facts)
        plan = self._plan(len(prompt), request.max_new_tokens, request.n)
        prefix = self._prefill(prompt)
        cache = Cache(self._model, rows=plan.rows, capacity=plan.capacity)
        work = _Work(request, self._model, prompt=prompt, stops=stops, emit=emit, clock=self._clock)
        for first in range(0, request.n, plan.rows):
            count = min(plan.rows, request.n - first)
            batch = _Batch(work, np.arange(first, first + count), constraint)
            self._run(batch, cache, prefix)
        return Done(
            prompt_tokens=len(prompt),
            tokens=work.tokens,
            elapsed_ms=round(1000 * (self._clock() - started)),
            runs=self._model.runs - first_run,
            rows=plan.rows,
        )

    def score(self, request: Score) -> Scores:
        """Return the log-likelihood of each given completion after the prompt.

        Raises:
            ProgramError: `prompt.*` or `model.*`.

        """
        prompt = prompt_ids(request, self._model.facts, self._model.vocabulary)
        rest = completion_ids(request, self._model.vocabulary)
        longest = max(len(ids) for ids in rest)
        plan = self._plan(len(prompt), longest, 1)
        prefix = self._prefill(prompt)
        cache = Cache(self._model, rows=1, capacity=plan.capacity)
        found = tuple((self._score(ids, cache, prefix), len(ids)) for ids in rest)
        return Scores(prompt_tokens=len(prompt), scores=found)

    def _score(self, ids: list[int], cache: Cache, prefix: _Prefix) -> float:
        """Return the log-likelihood of `ids` after the prompt; runs in pieces like the prompt."""
        cache.fill(prefix.past, 1)
        length = prefix.past[0].shape[2]
        total = _likelihood(prefix.logits[None], ids[:1])
        for start in range(0, len(ids) - 1, self._model.piece):
            part = ids[start : start + self._model.piece + 1]
            logits = self._model.run(np.array([part[:-1]], dtype=np.int64), cache, length + start)
            total += _likelihood(logits[0], part[1:])
        return total

    def _plan(self, prompt: int, new: int, n: int) -> Plan:
        return plan_memory(
            self._model.facts,
            kv_bytes=np.dtype(self._model.kv_type).itemsize,
            prompt=prompt,
            new=new,
            n=n,
            budget=self._budget,
            most_rows=self._most_rows,
        )

    def _prefill(self, prompt: list[int]) -> _Prefix:
        cache = Cache(self._model, rows=1, capacity=len(prompt))
        logits = self._model.prefill(prompt, cache)
        return _Prefix(cache.past(1, len(prompt)), logits)

    def _run(self, batch: _Batch, cache: Cache, prefix: _Prefix) -> None:
        """Decode one batch to its end."""
        rows, length = len(batch), prefix.past[0].shape[2]
        cache.fill(prefix.past, rows)
        logits = np.broadcast_to(prefix.logits, (rows, len(prefix.logits)))
        while True:
            ids, moves = batch.advance(logits)
            if not len(batch):
                return
            cache.move(moves, rows, length)
            rows = len(batch)
            logits = self._model.run(ids[:, None], cache, length)[:, 0]
            length += 1


@dataclass(frozen=True, slots=True)
class _Prefix:
    """What the prompt leaves behind: its cache, one row, and the logits of its last position."""

    past: list[npt.NDArray[np.generic]]
    logits: Logits


class _Work:
    """One request under way: what its batches share, and its totals."""

    def __init__(
        self,
        request: Generate,
        model: Model,
        *,
        prompt: list[int],
        stops: list[int],
        emit: Callable[[Sample | Progress], None],
        clock: Callable[[], float],
    ) -> None:
        self.request = request
        self.settings = sampling.Settings(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
        )
        size = model.facts.vocab_size
        self.seen = _flags(size, prompt)
        self.ends = _flags(size, model.facts.eos_ids)
        self.stops = _flags(size, stops)
        self._vocabulary = model.vocabulary
        self.tokens = 0
        self.finished = 0
        self._emit = emit
        self._clock = clock
        self._told = clock()

    def count(self, tokens: int) -> None:
        """Add drawn tokens and tell the progress from time to time."""
        self.tokens += tokens
        now = self._clock()
        if now - self._told >= _PROGRESS_S:
            self._told = now
            self._emit(Progress(self.tokens, self.finished, self.request.n))

    def finish(
        self, index: int, ids: list[int], reason: str, logprob: float, removed: float
    ) -> None:
        """Hand over a finished sample; `removed` is a sum over its steps."""
        self.finished += 1
        self._emit(
            Sample(
                index=index,
                text=self._vocabulary.continuation(
                    ids[:-1] if reason == "eos" else ids, self.request.prompt
                ),
                ids=tuple(ids),
                finish_reason=reason,
                logprob=logprob,
                removed_mass=removed / max(1, len(ids)),
            )
        )


class _Batch:
    """Rows that run together; a row that ends leaves, and the last row takes its place."""

    def __init__(self, work: _Work, samples: Ids, constraint: Constraint | None) -> None:
        rows = len(samples)
        self._work = work
        self._samples = samples
        self._step = 0
        self._ids = np.empty((rows, work.request.max_new_tokens), dtype=np.int32)
        self._logprob = np.zeros(rows)
        self._removed = np.zeros(rows)
        self._uniforms = np.empty((rows, 0))
        self._seen = None
        if work.settings.repetition_penalty != 1.0:
            self._seen = np.repeat(work.seen[None], rows, axis=0)
        self._constraint = constraint
        if constraint is not None:
            constraint.begin(rows)

    def __len__(self) -> int:
        return len(self._samples)

    def advance(self, logits: Logits) -> tuple[Ids, list[tuple[int, int]]]:
        """Draw one token a row and let the finished rows go.

        Returns:
            The tokens of the rows that stay, and the moves (to, from) that closed the gaps; the
            same moves are due in the cache.

        """
        drawn = self._draw(logits)
        lives = ~drawn.dead
        self._ids[lives, self._step] = drawn.ids[lives]
        self._logprob[lives] += drawn.logprob[lives]
        self._removed[lives] += drawn.removed_mass[lives]
        reasons = self._reasons(drawn)
        for row in np.flatnonzero(reasons != _RUNNING).tolist():
            self._finish(row, _REASONS[reasons[row]])
        self._step += 1
        self._work.count(int(lives.sum()))
        return self._keep(drawn.ids, reasons == _RUNNING)

    def _draw(self, logits: Logits) -> sampling.Draw:
        ahead = self._step % _DRAWS_AHEAD
        if ahead == 0:
            self._uniforms = sampling.uniforms(
                self._work.request.seed, self._samples, self._step, _DRAWS_AHEAD
            )
        legal = None if self._constraint is None else self._constraint.legal()
        try:
            return sampling.draw(
                logits,
                self._uniforms[:, ahead],
                self._work.settings,
                seen=self._seen,
                legal=legal,
            )
        except sampling.NotFiniteError as error:
            raise not_finite(self._step) from error

    def _reasons(self, drawn: sampling.Draw) -> npt.NDArray[np.int8]:
        """Return for each row an index into `_REASONS`; what is set later wins."""
        reasons = np.full(len(self), _RUNNING, dtype=np.int8)
        if self._step + 1 == self._work.request.max_new_tokens:
            reasons[:] = _REASONS.index("length")
        reasons[self._work.stops[drawn.ids]] = _REASONS.index("stop")
        reasons[self._work.ends[drawn.ids]] = _REASONS.index("eos")
        reasons[drawn.dead] = _REASONS.index("dead_end")
        return reasons

    def _finish(self, row: int, reason: str) -> None:
        count = self._step + (reason != "dead_end")
        self._work.finish(
            index=int(self._samples[row]),
            ids=self._ids[row, :count].tolist(),
            reason=reason,
            logprob=float(self._logprob[row]),
            removed=float(self._removed[row]),
        )

    def _keep(self, ids: Ids, stays: sampling.Bools) -> tuple[Ids, list[tuple[int, int]]]:
        """Close the gaps with rows from the end and tell the rows that stay their token."""
        count = int(stays.sum())
        moves: list[tuple[int, int]] = []
        if count < len(self):
            gaps = np.flatnonzero(~stays[:count])
            late = count + np.flatnonzero(stays[count:])
            moves = list(zip(gaps.tolist(), late.tolist(), strict=True))
            order = np.arange(count)
            order[gaps] = late
            ids = ids[order]
            self._reorder(order)
            if self._constraint is not None:
                self._constraint.move(moves, count)
        if self._seen is not None:
            self._seen[np.arange(count), ids] = True
        if self._constraint is not None:
            self._constraint.accept(ids)
        return ids, moves

    def _reorder(self, order: Ids) -> None:
        self._samples = self._samples[order]
        self._ids = self._ids[order]
        self._logprob, self._removed = self._logprob[order], self._removed[order]
        self._uniforms = self._uniforms[order]
        if self._seen is not None:
            self._seen = self._seen[order]


def _flags(size: int, ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    found = np.zeros(size, dtype=np.bool_)
    found[list(ids)] = True
    return found


def _likelihood(logits: Logits, ids: list[int]) -> float:
    try:
        return float(sampling.log_likelihood(logits, np.array(ids, dtype=np.int64)).sum())
    except sampling.NotFiniteError as error:
        raise not_finite(0) from error
