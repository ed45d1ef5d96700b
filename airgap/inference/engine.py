"""Continuous batching on the fast graph (docs/design/inference.md, 5).

Samples of all requests share one batch; one that ends leaves its slot to the next sample that
waits: of the request set that has the fewest rows, and there of the request that has the fewest.
Every decision about a sample rests on its own request, its index and what it has written: its
tokens do not depend on n, on its neighbours or on the order of arrival.

Where a grammar tells how a text goes on (a copy, a forced tag), the guess runs as one piece and
each of its places is drawn as ever, with its own random number, until a draw differs from the
guess: the same tokens in fewer runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from airgap.enclave.channel import ProgramError
from airgap.inference import sampling
from airgap.inference.authors import authors_ids, perplexity
from airgap.inference.constrain import Constraint, State, mask_words
from airgap.inference.fast import PIECE, FastModel, Found, Head, Slots
from airgap.inference.prefixes import Prefixes
from airgap.inference.protocol import Done, Generate, Progress, Sample, Score, Scores

WIDE = 1024  # candidates where no top-k is asked for; a smaller vocabulary is kept whole
WHOLE = 4096
_PROGRESS_S = 0.1
_LEAST_GUESS, _FIRST_GUESS, _MOST_GUESS = 8, 16, 64
_SCORE_BYTES = 64 * 1024 * 1024  # logits of one piece of a completion
_TRIES = np.int64(32)  # where the number of a redraw stands in the counter of the generator
_KEPT = 4  # a fourth of the memory may hold prefixes that no request needs now
_AGAIN = 16  # positions that a text may grow by when it is tokenised again
_SCRATCH = 24  # bytes that the head needs for each entry of the vocabulary of a row

Ids = npt.NDArray[np.int64]
Emit = Callable[[Sample | Progress], None]
Finish = Callable[[Done | ProgramError], None]


@dataclass(slots=True, eq=False)
class _Job:
    """A request under way."""

    request: Generate
    prompt: list[int]
    stops: frozenset[int]
    constraint: Constraint | None
    emit: Emit
    finish: Finish
    started: float
    deadline: float | None
    prefix: Slots | None = None
    next: int = 0
    finished: int = 0
    live: int = 0
    most: int = 0
    tokens: int = 0
    runs: int = 0
    told: float = 0.0
    closed: bool = False
    paused: bool = False

    @property
    def capacity(self) -> int:
        """Positions that a sample may come to."""
        return len(self.prompt) + self.request.max_new_tokens

    @property
    def waits(self) -> bool:
        """Whether a sample has no slot yet."""
        return self.next < self.request.n

    @property
    def owner(self) -> object:
        """Who shares turns with whom: the request set, or the request itself where it has none."""
        return self.request.request_set or self


@dataclass(slots=True, eq=False)
class _Row:
    """A sample in a slot: what it wrote, of which the last id is not in the buffer yet."""

    job: _Job
    index: int
    state: State | None
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    removed: float = 0.0
    width: int = _FIRST_GUESS

    @property
    def last(self) -> int:
        """The id that runs next."""
        return self.ids[-1] if self.ids else self.job.prompt[-1]

    @property
    def length(self) -> int:
        """Positions of prompt and text, the one that runs next included."""
        return len(self.job.prompt) + len(self.ids)


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
        self._budget = budget
        self._most_rows = most_rows
        self._clock = clock
        self._jobs: dict[int, _Job] = {}
        self._turn: deque[_Job] = deque()
        self._prefixes = Prefixes()
        self._rows: list[_Row] = []
        self._slots: Slots | None = None
        self._seen = np.empty((0, 0), dtype=np.int64)
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
        job = _Job(
            request=request,
            prompt=self._prompt(request),
            stops=frozenset(self._stops(request)),
            constraint=constraint,
            emit=emit,
            finish=finish,
            started=started,
            deadline=deadline,
        )
        self._require_room(len(job.prompt), request.max_new_tokens, again=request.ppl_authors)
        job.told = job.started
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
        return self._prefixes.forget(request_set)

    def step(self) -> None:
        """Do one round: fill free slots, run the graph, draw."""
        self._expire()
        try:
            self._admit()
            if self._rows:
                self._round()
        except (ProgramError, MemoryError) as error:
            told = error if isinstance(error, ProgramError) else out_of_memory()
            while self._jobs:  # the graph itself failed: nobody's rows can be trusted
                self._end(next(iter(self._jobs)), told)

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
        prompt = self._prompt(request)
        rest = [self._model.vocabulary.encode(one) for one in request.completions]
        if not all(rest):
            raise ProgramError(
                "request.malformed", "a completion has no tokens", "give at least one tag"
            )
        longest = max(len(ids) for ids in rest)
        self._require_room(len(prompt), longest)
        slots = self._model.slots(rows=1, capacity=len(prompt) + longest)
        self._model.prefill(prompt[:-1], slots)
        found = tuple((self._score(prompt, ids, slots), len(ids)) for ids in rest)
        return Scores(prompt_tokens=len(prompt), scores=found)

    def _score(self, prompt: list[int], ids: list[int], slots: Slots) -> float:
        total, inputs = 0.0, [prompt[-1], *ids[:-1]]
        piece = max(1, min(PIECE, _SCORE_BYTES // (4 * self._model.facts.vocab_size)))
        for start in range(0, len(ids), piece):
            part = np.array([inputs[start : start + piece]], dtype=np.int64)
            count = part.shape[1]
            head = Head(select=np.arange(count), target=np.array(ids[start : start + count]))
            after = np.array([len(prompt) + start + count - 1], dtype=np.int32)
            found = self._model.run(part, after, slots, head)
            if not np.isfinite(found.log_z).all():
                raise _not_finite(start)
            total += float((found.target_raw.astype(np.float64) - found.log_z).sum())
        return min(0.0, total)

    # Admission

    def _prompt(self, request: Generate | Score) -> list[int]:
        bos = self._model.facts.bos_id
        ids = [*([] if bos is None else [bos]), *self._model.vocabulary.encode(request.prompt)]
        if not ids:
            raise ProgramError(
                "request.malformed", "the prompt has no tokens", "give at least one tag"
            )
        return ids

    def _stops(self, request: Generate) -> list[int]:
        known = self._model.facts.tags
        for tag in request.stop:
            if tag not in known:
                raise ProgramError(
                    "model.stop",
                    f"stop tag {tag!r:.80} is not in the vocabulary of {self._model.facts.model}",
                    "without it a sample would never end there; use a model that has the tag",
                )
        return [known[tag] for tag in request.stop]

    def _position(self) -> int:
        facts = self._model.facts
        return 8 * facts.layers * facts.kv_heads * facts.head_dim

    def _row_bytes(self, capacity: int) -> int:
        return self._position() * capacity + _SCRATCH * self._model.facts.vocab_size

    def _fixed_bytes(self, prompt: int) -> int:
        """The prompt's own buffer, and the head of its last position."""
        return self._position() * prompt + self._row_bytes(0)

    def _again_bytes(self, capacity: int) -> int:
        """What the authors' perplexity of one sample takes while the batch waits."""
        return self._position() * (capacity + _AGAIN) + _SCORE_BYTES // 4

    def _fit(self, capacity: int, fixed: int) -> int:
        return min(self._most_rows, (self._budget - fixed) // self._row_bytes(capacity))

    def _require_room(self, prompt: int, new: int, *, again: bool = False) -> None:
        facts, capacity = self._model.facts, prompt + new
        if capacity > facts.max_context:
            raise ProgramError(
                "prompt.g10",
                f"prompt ({prompt} tokens) and budget ({new} tokens) need {capacity} positions; "
                f"{facts.model} has {facts.max_context}",
                f"ask for at most {facts.max_context - prompt} new tokens"
                if prompt < facts.max_context
                else "shorten the input",
            )
        fixed = self._fixed_bytes(prompt) + self._again_bytes(capacity) * again
        if self._fit(capacity, fixed) < 1:
            raise ProgramError(
                "model.memory",
                f"one sample of {capacity} positions needs "
                f"{(fixed + self._row_bytes(capacity)) >> 20} MiB; "
                f"{self._budget >> 20} MiB are planned for a request",
                "ask for fewer new tokens, or give the worker more memory",
            )

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
        decoding = bool(self._rows)
        while (job := self._next_job()) is not None:
            fresh = job.prefix is None
            if not self._make_room(job):
                return
            self._turn.remove(job)
            self._turn.append(job)
            self._place(job)
            if fresh and decoding:
                return

    def _next_job(self) -> _Job | None:
        """Return whose sample comes next: the owner with the fewest rows, then its own fewest."""
        waiting = [job for job in self._turn if job.waits and not job.paused]
        if not waiting:
            return None
        live: dict[object, int] = {}
        for job in self._turn:
            live[job.owner] = live.get(job.owner, 0) + job.live
        return min(waiting, key=lambda job: (live[job.owner], job.live))

    def _make_room(self, job: _Job) -> bool:
        """See that a slot is free that is long enough for `job`."""
        slots, live = self._slots, len(self._rows)
        if slots is not None and slots.capacity >= job.capacity and live < slots.rows:
            return True
        capacity = max([job.capacity, *(row.job.capacity for row in self._rows)])
        fixed = sum(self._fixed_bytes(len(one.prompt)) for one in self._jobs.values() if one.waits)
        if any(one.request.ppl_authors for one in self._jobs.values()):
            fixed += self._again_bytes(capacity)
        wanted = sum(one.request.n - one.next + one.live for one in self._jobs.values())
        least = self._row_bytes(capacity)
        rows = min(wanted, self._fit(capacity, min(fixed, self._budget - least)))
        longer = slots is not None and slots.capacity < job.capacity
        if rows <= live or (slots is not None and live and rows <= slots.rows and not longer):
            return False
        self._prefixes.shrink(max(0, self._budget - fixed - rows * least))
        if slots is None or not live:
            self._slots = None  # before the new ones: two sets would not fit the plan
            self._slots = self._model.slots(rows=rows, capacity=capacity)
        else:
            slots.resize(rows, capacity, [row.length - 1 for row in self._rows])
        seen = np.zeros((rows, capacity), dtype=np.int64)
        for number, row in enumerate(self._rows):
            self._note(seen[number], row)
        self._seen = seen
        return True

    def _place(self, job: _Job) -> None:
        """Start the next sample of `job` in the first free slot."""
        slots = self._slots
        if slots is None:
            return
        if job.prefix is None:
            job.prefix = self._prefill(job)
        number = len(self._rows)
        # The last id of the prompt runs with the row: its logits are the first to be drawn from.
        slots.copy(job.prefix, len(job.prompt) - 1, to=number)
        state = job.constraint.start() if job.constraint is not None else None
        row = _Row(job=job, index=job.next, state=state)
        job.next += 1
        job.live += 1
        self._rows.append(row)
        self._note(self._seen[number], row)
        if not job.waits:
            job.prefix = None

    def _prefill(self, job: _Job) -> Slots:
        """Run the prompt but for its last id, from where another one of its set has come to."""
        ids, request_set = job.prompt[:-1], job.request.request_set
        found = self._prefixes.find(request_set, ids) if request_set else None
        if found is not None and found[1] == len(ids):
            return found[0]
        self._prefixes.shrink(self._room_for_prefixes())
        prefix = self._model.slots(rows=1, capacity=len(job.prompt))
        start = 0
        if found is not None:
            start = found[1]
            prefix.copy(found[0], start, to=0)
        before = self._model.runs
        self._model.prefill(ids, prefix, start=start)
        job.runs += self._model.runs - before
        size = self._position() * len(job.prompt)
        self._prefixes.keep(request_set, ids, prefix, size=size, room=self._room_for_prefixes())
        return prefix

    def _room_for_prefixes(self) -> int:
        """Bytes that neither buffers nor prompts of requests under way may come to need."""
        used = sum(self._fixed_bytes(len(job.prompt)) for job in self._jobs.values() if job.waits)
        if self._slots is not None:
            used += self._slots.rows * self._row_bytes(self._slots.capacity)
        return max(0, min(self._budget // _KEPT, self._budget - used))

    @staticmethod
    def _note(seen: Ids, row: _Row) -> None:
        """Write what the penalty of a row punishes; the rest repeats its first id."""
        ids = row.job.prompt + row.ids
        seen[:] = ids[0]
        seen[: len(ids)] = ids

    # A round

    def _round(self) -> None:
        guesses = [[] if row.job.paused else self._guess(row) for row in self._rows]
        plain = [
            number
            for number, guess in enumerate(guesses)
            if not guess and not self._rows[number].job.paused
        ]
        jobs = {row.job for row in self._rows}
        for job in jobs:
            job.most = max(job.most, job.live)
        if plain:
            self._together(plain)
        for number, guess in enumerate(guesses):
            if guess:
                self._alone(number, guess)
        self._leave()
        for job in list(self._jobs.values()):  # one that waits for a slot is told that it waits
            self._tell(job)

    def _guess(self, row: _Row) -> list[int]:
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
        rows = self._rows
        ids = np.array([[row.last] for row in rows], dtype=np.int64)
        lengths = np.array([row.length for row in rows], dtype=np.int32)
        picked = [rows[number] for number in plain]
        head = self._head(
            np.array(plain),
            picked,
            [row.state for row in picked],
            seen=self._seen[plain],
            longest=max(row.length for row in picked),
        )
        found = self._run(ids, lengths, head, jobs={row.job for row in picked})
        steps = np.array([len(row.ids) for row in picked])
        columns, refused = self._draw(picked, found, steps, [row.state for row in picked])
        for place, row in enumerate(picked):
            if self._take(row, found, place, int(columns[place]), float(refused[place])):
                self._seen[plain[place], row.length - 1] = row.last

    def _alone(self, number: int, guess: list[int]) -> None:
        """Run the last id of a row and its guess as one piece; keep what the draws confirm."""
        row = self._rows[number]
        ids = np.array([[row.last, *guess]], dtype=np.int64)
        count = ids.shape[1]
        lengths = np.array([row.length + len(guess)], dtype=np.int32)
        states, state = [], row.state.copy() if row.state is not None else None
        for token in (*guess, None):
            states.append(state.copy() if state is not None else None)
            if state is not None and token is not None:
                state.accept(token)
        history = row.length
        seen = np.repeat(self._seen[number : number + 1, : history + len(guess)], count, axis=0)
        for place in range(1, count):
            seen[place, history : history + place] = guess[:place]
        rows = [row] * count
        head = self._head(np.arange(count), rows, states, seen=seen, longest=history + len(guess))
        found = self._run(ids, lengths, head, jobs={row.job}, first=number)
        columns, refused = self._draw(rows, found, len(row.ids) + np.arange(count), states)
        confirmed = 0
        for place in range(count):
            alive = self._take(row, found, place, int(columns[place]), float(refused[place]))
            if not alive:
                return
            self._seen[number, history + place] = row.last
            if place == len(guess) or row.last != guess[place]:
                break
            confirmed += 1
        full = confirmed == len(guess)
        row.width = min(_MOST_GUESS, 2 * row.width) if full else max(_LEAST_GUESS, row.width // 2)

    def _run(
        self,
        ids: Ids,
        lengths: npt.NDArray[np.int32],
        head: Head,
        *,
        jobs: set[_Job],
        first: int = 0,
    ) -> Found:
        if self._slots is None:
            raise ProgramError("model.run", "no buffers", "report this")
        found = self._model.run(ids, lengths, self._slots, head, first=first)
        for job in jobs:
            job.runs += 1
        return found

    def _head(
        self,
        select: Ids,
        rows: list[_Row],
        states: list[State | None],
        *,
        seen: Ids,
        longest: int,
    ) -> Head:
        """Say what the head shall do for each picked position."""
        penalty = np.array([row.job.request.repetition_penalty for row in rows], dtype=np.float32)
        punishes = bool((penalty != 1.0).any())
        return Head(
            select=np.asarray(select, dtype=np.int64),
            top_k=max(self._candidates(row.job.request) for row in set(rows)),
            seen=seen[:, :longest] if punishes else None,
            penalty=penalty if punishes else None,
            legal=self._legal(rows, states),
        )

    def _candidates(self, request: Generate) -> int:
        size = self._model.facts.vocab_size
        if not request.grammar.valence:  # its filter may refuse the best ones
            if request.temperature == 0.0:
                return 1
            if request.top_k:
                return min(request.top_k, size)
        return size if size <= WHOLE else WIDE

    def _legal(self, rows: list[_Row], states: list[State | None]) -> npt.NDArray[np.bool_] | None:
        if all(state is None for state in states):
            return None
        size = self._model.facts.vocab_size
        bound = [place for place, state in enumerate(states) if state is not None]
        words = np.zeros((len(bound), mask_words(size)), dtype=np.uint32)
        for line, place in zip(words, bound, strict=True):
            state = states[place]
            if state is not None:
                state.mask(line)
        constraint = rows[bound[0]].job.constraint
        if constraint is None:
            return None
        if len(bound) == len(rows):
            return constraint.legal_ids(words)
        legal = np.ones((len(rows), size), dtype=np.bool_)
        legal[bound] = constraint.legal_ids(words)
        return legal

    def _draw(
        self, rows: list[_Row], found: Found, steps: Ids, states: list[State | None]
    ) -> tuple[Ids, npt.NDArray[np.float64]]:
        """Return the column that each row draws (-1: none) and the mass that a filter refused."""
        requests = [row.job.request for row in rows]
        top_k = [request.top_k or self._candidates(request) for request in requests]
        columns = sampling.choose(
            found.scores,
            found.ids,
            self._uniforms(rows, steps),
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

    @staticmethod
    def _uniforms(rows: list[_Row], steps: Ids) -> npt.NDArray[np.float64]:
        return sampling.uniform(
            np.array([row.job.request.seed for row in rows], dtype=np.uint64),
            np.array([row.index for row in rows], dtype=np.int64),
            steps,
        )

    def _filtered(
        self, row: _Row, found: Found, at: tuple[int, int, int], state: State
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
                self._uniforms([row], np.array([step + (tries << _TRIES)], dtype=np.int64)),
                temperature=np.array([request.temperature]),
                top_p=np.array([request.top_p]),
                top_k=np.array([request.top_k or len(left)]),
            )
            column = int(left[drawn[0]])
        return -1, refused

    # The end of a sample, of a request

    def _take(self, row: _Row, found: Found, place: int, column: int, refused: float) -> bool:
        """Append what was drawn at one place; False when the sample has ended."""
        job = row.job
        if job.closed:
            return False
        log_z = float(found.log_z[place])
        if not np.isfinite(log_z):
            self._fail(job, _not_finite(len(row.ids)))
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

    def _finish(self, row: _Row, reason: str) -> None:
        job = row.job
        job.finished += 1
        job.live -= 1
        row.index = -1 - row.index  # leaves its slot at the end of the round
        job.emit(
            Sample(
                index=-1 - row.index,
                text=self._model.vocabulary.decode(row.ids[:-1] if reason == "eos" else row.ids),
                ids=tuple(row.ids),
                finish_reason=reason,
                logprob=row.logprob,
                removed_mass=min(1.0, row.removed / max(1, len(row.ids))),
                ppl_authors=self._authors(row) if job.request.ppl_authors else None,
            )
        )

    def _authors(self, row: _Row) -> float | None:
        """Return the authors' perplexity; None where their text no longer fits the context."""
        model = self._model
        ids = authors_ids(model.vocabulary, model.facts, [*row.job.prompt, *row.ids])
        if len(ids) > min(model.facts.max_context, row.job.capacity + _AGAIN):
            return None
        slots = model.slots(rows=1, capacity=len(ids))
        before = model.runs
        found = perplexity(ids, lambda first, rest: self._score([first], list(rest), slots))
        row.job.runs += model.runs - before
        return found

    def _leave(self) -> None:
        """Close the gaps that ended rows left with rows from the end."""
        rows, slots = self._rows, self._slots
        number = 0
        while number < len(rows):
            if rows[number].index >= 0 and not rows[number].job.closed:
                number += 1
                continue
            last = rows.pop()
            if number < len(rows) and slots is not None:
                slots.move(len(rows), last.length - 1, to=number)
                self._seen[number] = self._seen[len(rows)]
                rows[number] = last
        for key, job in list(self._jobs.items()):
            if job.finished == job.request.n:
                self._end(key, self._done(job))
        if not self._jobs:
            self._slots = None  # gives the memory back

    def _done(self, job: _Job) -> Done:
        return Done(
            prompt_tokens=len(job.prompt),
            tokens=job.tokens,
            elapsed_ms=round(1000 * (self._clock() - job.started)),
            runs=job.runs,
            rows=job.most,
        )

    def _tell(self, job: _Job) -> None:
        now = self._clock()
        if now - job.told >= _PROGRESS_S and not job.paused and job.finished < job.request.n:
            job.told = now
            job.emit(Progress(job.tokens, job.finished, job.request.n))

    def _fail(self, job: _Job, error: ProgramError) -> None:
        for key, one in list(self._jobs.items()):
            if one is job:
                self._end(key, error, leave=False)

    def _end(self, key: int, answer: Done | ProgramError, *, leave: bool = True) -> None:
        job = self._jobs.pop(key)
        self._drop(job, leave=leave)
        job.finish(answer)

    def _drop(self, job: _Job, *, leave: bool = True) -> None:
        """Forget a request; its rows leave now, or at the end of the round under way."""
        self._turn.remove(job)
        job.live, job.next, job.prefix, job.closed = 0, job.request.n, None, True
        if leave and any(row.job is job for row in self._rows):
            self._leave()


def out_of_memory() -> ProgramError:
    """Refuse what the plan allowed and the machine did not."""
    return ProgramError(
        "model.memory",
        "the worker ran out of memory",
        "ask for fewer samples or fewer new tokens",
    )


def _not_finite(step: int) -> ProgramError:
    return ProgramError(
        "model.nan",
        f"the model gave logits that are not numbers (step {step})",
        "verify the installed bundle; ask its builder for the parity record",
    )
