"""Continuous batching on the fast graph (docs/design/inference.md, 5).

Samples of all requests share one batch; one that ends leaves its slot to the next sample that
waits: of the request set that has the fewest rows, and there of the request that has the fewest.
Every decision about a sample rests on its own request, its index and what it has written: its
tokens do not depend on n, on its neighbours or on the order of arrival. What fits is `plan`'s to
say, slots are `rows`' business, and how a token is drawn is that of `draws`.

Where a grammar tells how a text goes on (a copy, a forced tag), the guess runs as one piece and
each of its places is drawn as ever, with its own random number, until a draw differs from the
guess: the same tokens in fewer runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np

from airgap.enclave.channel import ProgramError
from airgap.inference import likelihoods
from airgap.inference.constrain import Constraint
from airgap.inference.draws import Draws
from airgap.inference.fast import FastModel, Found, Head
from airgap.inference.plan import Plan
from airgap.inference.protocol import Done, Generate, Progress, Sample, Score, Scores
from airgap.inference.refusals import (
    NOT_FINITE,
    not_finite,
    out_of_memory,
    prompt_ids,
    stop_ids,
)
from airgap.inference.rows import Batch, Emit, Finish, Job, Row

_PROGRESS_S = 0.1
_LEAST_GUESS, _MOST_GUESS = 8, 64


class Engine:
    """Runs requests on one model, as many at a time as fit."""

    def __init__(
        self,
        model: FastModel,
        *,
        budget: int,
        most_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take a loaded model.

        Args:
            model: The model.
            budget: Bytes that buffers and head may take.
            most_rows: Widest batch.
            clock: Monotonic seconds.

        """
        self._model = model
        self._plan = Plan(model.facts, budget=budget, most_rows=most_rows)
        self._clock = clock
        self._jobs: dict[int, Job] = {}
        self._turn: deque[Job] = deque()
        self._batch = Batch(model, self._plan)
        self._draws = Draws(model.facts.vocab_size)
        self._end_ids = frozenset(model.facts.eos_ids)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._jobs)

    @property
    def runnable(self) -> bool:
        """Whether anything is under way whose samples are taken."""
        return any(not job.paused for job in self._jobs.values())

    def submit(
        self,
        key: int,
        request: Generate,
        constraint: Constraint | None,
        *,
        emit: Emit,
        finish: Finish,
        deadline: float | None = None,
    ) -> None:
        """Take a request; `finish` gets its reply or its refusal, once.

        Args:
            key: Names the request for `cancel`.
            request: The request.
            constraint: Its compiled grammar.
            emit: Gets each sample as it ends.
            finish: Gets the end.
            deadline: In seconds of the clock; else the request says in how many milliseconds.

        Raises:
            ProgramError: `prompt.*`, `model.memory`, `model.stop`: nothing was begun.

        """
        started = self._clock()
        if deadline is None and request.deadline_ms:
            deadline = started + request.deadline_ms / 1000
        model = self._model
        job = Job(
            request=request,
            prompt=prompt_ids(request, model.facts, model.vocabulary),
            stops=frozenset(stop_ids(request, model.facts)),
            constraint=constraint,
            emit=emit,
            finish=finish,
            started=started,
            deadline=deadline,
            told=started,
        )
        self._plan.require(len(job.prompt), request.max_new_tokens, again=request.ppl_authors)
        self._jobs[key] = job
        self._turn.append(job)

    def cancel(self, key: int) -> bool:
        """Let go of a request; it gets no answer. False where it has ended already."""
        job = self._jobs.pop(key, None)
        if job is not None:
            self._drop(job)
        return job is not None

    def pause(self, key: int, *, paused: bool) -> None:
        """Draw nothing for a request whose samples nobody takes, or go on with it."""
        if key in self._jobs:
            self._jobs[key].paused = paused

    def forget(self, request_set: str) -> int:
        """Let go of the prefixes of a request set; returns how many there were."""
        return self._batch.forget(request_set)

    def step(self) -> None:
        """Do one round: fill free slots, run the graph, draw."""
        self._expire()
        try:
            self._admit()
            if self._batch.rows:
                self._round()
        except (ProgramError, MemoryError) as error:
            told = error if isinstance(error, ProgramError) else out_of_memory()
            while self._jobs:  # the graph itself failed: nobody's rows can be trusted
                self._end(next(iter(self._jobs)), told)
            self._batch.release()  # nor the buffers, which may be half resized

    def generate(self, request: Generate, constraint: Constraint | None, emit: Emit) -> Done:
        """Run one request to its end.

        Raises:
            ProgramError: `prompt.*` or `model.*`.

        """
        answers: list[Done | ProgramError] = []
        self.submit(0, request, constraint, emit=emit, finish=answers.append)
        while not answers:
            self.step()
        answer = answers[0]
        if isinstance(answer, ProgramError):
            raise answer
        return answer

    def score(self, request: Score) -> Scores:
        """Return the log-likelihood of each given completion after the prompt.

        Raises:
            ProgramError: `prompt.*` or `model.*`.

        """
        return likelihoods.score(self._model, self._plan, request)

    # Whose turn it is

    def _expire(self) -> None:
        now = self._clock()
        for key, job in list(self._jobs.items()):
            if job.deadline is not None and now >= job.deadline:
                error = ProgramError(
                    "model.deadline",
                    f"{job.finished} of {job.request.n} samples were done at the deadline",
                    "ask for fewer or shorter samples, or for more time",
                )
                self._end(key, error)

    def _admit(self) -> None:
        """Give free slots to waiting samples; while others decode, one prompt runs a round."""
        decoding = bool(self._batch.rows)
        begun: dict[Job, tuple[Found, list[Row]]] = {}
        while (job := self._next_job()) is not None:
            fresh = job.prefix is None
            first = self._batch.place(job, self._jobs.values(), partial(self._first_head, job))
            if first is None:
                break
            row, found = first
            begun.setdefault(job, (found, []))[1].append(row)
            self._turn.remove(job)
            self._turn.append(job)
            if fresh and decoding:
                break
        for found, rows in begun.values():
            self._begin(rows, found)

    def _first_head(self, job: Job) -> Head:
        """Return what is wanted of the last id of a prompt: the same for all samples of it."""
        state = job.constraint.start() if job.constraint is not None else None
        row = Row(job=job, index=0, state=state)
        return self._draws.head(np.zeros(1, np.int64), [row], [state], seen=np.array([job.prompt]))

    def _begin(self, rows: list[Row], found: Found) -> None:
        """Draw the first id of new samples of one request from what its prompt gave."""
        job, found = rows[0].job, found.repeat(len(rows))
        job.most = max(job.most, job.live)
        steps = np.zeros(len(rows), dtype=np.int64)
        columns, refused = self._draws.choose(rows, [row.state for row in rows], found, steps=steps)
        for place, row in enumerate(rows):
            if self._take(row, found, place, int(columns[place]), float(refused[place])):
                self._batch.seen[self._batch.rows.index(row), row.length - 1] = row.last
        if any(row.gone for row in rows):
            self._leave()

    def _next_job(self) -> Job | None:
        """Return whose sample comes next: the owner with the fewest rows, then its own fewest."""
        waiting = [job for job in self._turn if job.waits and not job.paused]
        if not waiting:
            return None
        live: dict[object, int] = {}
        for job in self._turn:
            live[job.owner] = live.get(job.owner, 0) + job.live
        return min(waiting, key=lambda job: (live[job.owner], job.live))

    # A round

    def _round(self) -> None:
        rows = self._batch.rows
        guesses = [[] if row.job.paused else self._guess(row) for row in rows]
        plain = [
            number
            for number, guess in enumerate(guesses)
            if not guess and not rows[number].job.paused
        ]
        for job in {row.job for row in rows}:
            job.most = max(job.most, job.live)
        if plain:
            self._together(plain)
        for number, guess in enumerate(guesses):
            if guess:
                self._alone(number, guess)
        self._leave()
        for job in list(self._jobs.values()):  # one that waits for a slot is told that it waits
            self._tell(job)

    def _guess(self, row: Row) -> list[int]:
        if row.state is None or row.width < _LEAST_GUESS:
            return []
        left = row.job.request.max_new_tokens - len(row.ids) - 1
        guess = row.state.guess(min(row.width, left)) if left >= _LEAST_GUESS else []
        return guess if len(guess) >= _LEAST_GUESS else []

    def _together(self, plain: list[int]) -> None:
        """Run the last id of every row at once; draw for the rows in `plain`.

        A row with a guess, or a paused one, takes part only because the rows of a run are
        neighbours; its own piece, or its next turn, writes the same position again.
        """
        batch, rows = self._batch, self._batch.rows
        ids = np.array([[row.last] for row in rows], dtype=np.int64)
        lengths = np.array([row.length for row in rows], dtype=np.int32)
        picked = [rows[number] for number in plain]
        states = [row.state for row in picked]
        # The whole width, whose rest repeats an id: a run of one shape stays bound (`fast`).
        head = self._draws.head(np.array(plain), picked, states, seen=batch.seen[plain])
        found = batch.run(ids, lengths, head, jobs={row.job for row in picked})
        steps = np.array([len(row.ids) for row in picked])
        columns, refused = self._draws.choose(picked, states, found, steps=steps)
        for place, row in enumerate(picked):
            if self._take(row, found, place, int(columns[place]), float(refused[place])):
                batch.seen[plain[place], row.length - 1] = row.last

    def _alone(self, number: int, guess: list[int]) -> None:
        """Run the last id of a row and its guess as one piece; keep what the draws confirm."""
        batch, row = self._batch, self._batch.rows[number]
        ids = np.array([[row.last, *guess]], dtype=np.int64)
        count = ids.shape[1]
        lengths = np.array([row.length + len(guess)], dtype=np.int32)
        states, state = [], row.state.copy() if row.state is not None else None
        for token in (*guess, None):
            states.append(state.copy() if state is not None else None)
            if state is not None and token is not None:
                state.accept(token)
        history = row.length
        seen = np.repeat(batch.seen[number : number + 1, : history + len(guess)], count, axis=0)
        for place in range(1, count):
            seen[place, history : history + place] = guess[:place]
        rows = [row] * count
        head = self._draws.head(np.arange(count), rows, states, seen=seen)
        found = batch.run(ids, lengths, head, jobs={row.job}, first=number)
        steps = len(row.ids) + np.arange(count)
        columns, refused = self._draws.choose(rows, states, found, steps=steps)
        confirmed = 0
        for place in range(count):
            alive = self._take(row, found, place, int(columns[place]), float(refused[place]))
            if not alive:
                return
            batch.seen[number, history + place] = row.last
            if place == len(guess) or row.last != guess[place]:
                break
            confirmed += 1
        full = confirmed == len(guess)
        row.width = min(_MOST_GUESS, 2 * row.width) if full else max(_LEAST_GUESS, row.width // 2)

    def _take(self, row: Row, found: Found, place: int, column: int, refused: float) -> bool:
        """Append what was drawn at one place; False when the sample has ended."""
        job = row.job
        if job.closed:
            return False
        log_z = float(found.log_z[place])
        if not np.isfinite(log_z):
            self._fail(job, not_finite(len(row.ids)))
            return False
        if row.state is not None:
            if np.isneginf(found.scores[place, 0]) or column < 0:
                self._finish(row, "dead_end")
                return False
            masked = float(-np.expm1(min(0.0, float(found.legal_z[place]) - log_z)))
            row.removed += min(1.0, masked + refused)
        token = int(found.ids[place, column])
        row.ids.append(token)
        row.logprob += min(0.0, float(found.raw[place, column]) - log_z)
        job.tokens += 1
        if token in self._end_ids:
            self._finish(row, "eos")
        elif token in job.stops:
            self._finish(row, "stop")
        elif len(row.ids) == job.request.max_new_tokens:
            self._finish(row, "length")
        else:
            if row.state is not None:
                row.state.accept(token)
            return True
        return False

    # The end of a sample, of a request

    def _finish(self, row: Row, reason: str) -> None:
        job, model = row.job, self._model
        job.finished += 1
        job.live -= 1
        row.ended = True  # leaves its slot at the end of the round
        perplexity = None
        if job.request.ppl_authors:
            before = model.runs
            whole = [*job.prompt, *row.ids]
            try:
                perplexity = likelihoods.authors_perplexity(model, whole, capacity=job.capacity)
            except ProgramError as error:
                if error.code != NOT_FINITE:  # the graph failed: nobody's rows can be trusted
                    raise
                self._fail(job, error)
                return
            job.runs += model.runs - before
        job.emit(
            Sample(
                index=row.index,
                text=model.vocabulary.continuation(
                    row.ids[:-1] if reason == "eos" else row.ids, job.request.prompt
                ),
                ids=tuple(row.ids),
                finish_reason=reason,
                logprob=row.logprob,
                removed_mass=min(1.0, row.removed / max(1, len(row.ids))),
                ppl_authors=perplexity,
            )
        )

    def _leave(self) -> None:
        """Free the slots of ended rows and end the requests that have all their samples."""
        self._batch.close_gaps()
        for key, job in list(self._jobs.items()):
            if job.finished == job.request.n:
                self._end(key, self._done(job))
        if not self._jobs:
            self._batch.release()

    def _done(self, job: Job) -> Done:
        return Done(
            prompt_tokens=len(job.prompt),
            tokens=job.tokens,
            elapsed_ms=round(1000 * (self._clock() - job.started)),
            runs=job.runs,
            rows=job.most,
        )

    def _tell(self, job: Job) -> None:
        now = self._clock()
        if now - job.told >= _PROGRESS_S and not job.paused and job.finished < job.request.n:
            job.told = now
            job.emit(Progress(job.tokens, job.finished, job.request.n))

    def _fail(self, job: Job, error: ProgramError) -> None:
        for key, one in list(self._jobs.items()):
            if one is job:
                self._end(key, error, leave=False)

    def _end(self, key: int, answer: Done | ProgramError, *, leave: bool = True) -> None:
        job = self._jobs.pop(key)
        self._drop(job, leave=leave)
        job.finish(answer)

    def _drop(self, job: Job, *, leave: bool = True) -> None:
        """Forget a request; its rows leave now, or at the end of the round under way."""
        self._turn.remove(job)
        job.live, job.next, job.prefix, job.closed = 0, job.request.n, None, True
        if leave and (not self._jobs or any(row.job is job for row in self._batch.rows)):
            self._leave()
