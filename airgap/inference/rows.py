"""Requests under way, their samples in slots, and the one set of buffers that all share.

Which request gets the next slot is the engine's to say; here a slot is made, filled and closed
(docs/design/inference.md, 5). A slot is never longer or a batch wider than `plan` allows, rows go
before kept prefixes, and a row that ends is replaced by the last one, so that the rows of a run are
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from airgap.enclave.channel import ProgramError
from airgap.inference.constrain import Constraint, State
from airgap.inference.fast import PIECE, FastModel, Found, Head, Slots
from airgap.inference.plan import Plan
from airgap.inference.prefixes import Prefix, Prefixes
from airgap.inference.protocol import Done, Generate, Progress, Sample

FIRST_GUESS = 16

Ids = npt.NDArray[np.int64]
Emit = Callable[[Sample | Progress], None]
Finish = Callable[[Done | ProgramError], None]


@dataclass(slots=True, eq=False)
class Job:
    """A request under way."""

    request: Generate
    prompt: list[int]
    stops: frozenset[int]
    constraint: Constraint | None
    emit: Emit
    finish: Finish
    started: float
    deadline: float | None
    prefix: Prefix | None = None
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
class Row:
    """A sample in a slot: what it wrote, of which the last id is not in the buffer yet.

    Attributes:
        numbers: Its random numbers from step `numbers_from` on, drawn ahead.

    """

    job: Job
    index: int
    state: State | None
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    removed: float = 0.0
    width: int = FIRST_GUESS
    ended: bool = False
    numbers: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    numbers_from: int = 0

    @property
    def gone(self) -> bool:
        """Whether it ended or its request did, so that its slot is free."""
        return self.ended or self.job.closed

    @property
    def last(self) -> int:
        """The id that runs next."""
        return self.ids[-1]

    @property
    def length(self) -> int:
        """Positions of prompt and text, the one that runs next included."""
        return len(self.job.prompt) + len(self.ids)

    @property
    def held(self) -> int:
        """Positions that its slot holds: before its first id is drawn, those of the prompt."""
        return len(self.job.prompt) + max(0, len(self.ids) - 1)


class Batch:
    """The rows that run together. Row n has slot n, and line n of `seen`.

    Attributes:
        rows: The samples under way.
        seen: int64[slots, capacity], what the penalty of a row punishes: the ids of prompt and
            text, then the first of them again.

    """

    def __init__(self, model: FastModel, plan: Plan) -> None:
        """Take a loaded model and the plan of its memory."""
        self._model = model
        self._plan = plan
        self._prefixes = Prefixes()
        self._slots: Slots | None = None
        self.rows: list[Row] = []
        self.seen: Ids = np.empty((0, 0), dtype=np.int64)

    @property
    def kept(self) -> int:
        """Bytes of the prefixes that are kept."""
        return self._prefixes.size

    def forget(self, request_set: str) -> int:
        """Let go of the prefixes of a request set; returns how many there were."""
        return self._prefixes.forget(request_set)

    def place(
        self, job: Job, jobs: Collection[Job], head: Callable[[], Head]
    ) -> tuple[Row, Found] | None:
        """Start the next sample of `job`; None where no slot is free or can be made.

        Args:
            job: Whose turn it is.
            jobs: All that are under way.
            head: Says what is wanted of the last id of the prompt, if that runs now.

        Returns:
            The sample, and what the head gave: its first id is drawn from it.

        Raises:
            ProgramError: `model.run`.

        """
        if not self._make_room(job, jobs) or self._slots is None:
            return None
        prefix = job.prefix if job.prefix is not None else self._prefill(job, jobs, head())
        number = len(self.rows)
        self._slots.copy(prefix.slots, len(job.prompt), to=number)
        state = job.constraint.start() if job.constraint is not None else None
        row = Row(job=job, index=job.next, state=state)
        job.next += 1
        job.live += 1
        self.rows.append(row)
        _note(self.seen[number], row)
        job.prefix = prefix if job.waits else None
        return row, prefix.found

    def run(
        self,
        ids: Ids,
        lengths: npt.NDArray[np.int32],
        head: Head,
        *,
        jobs: Collection[Job],
        first: int = 0,
    ) -> Found:
        """Run new ids on the slots from `first`; the run counts for `jobs`.

        Raises:
            ProgramError: `model.run`.

        """
        if self._slots is None:
            raise ProgramError("model.run", "no buffers", "report this")
        found = self._model.run(ids, lengths, self._slots, head, first=first)
        for job in jobs:
            job.runs += 1
        return found

    def close_gaps(self) -> None:
        """Let rows leave that ended or whose request did; rows from the end take their slots."""
        rows, number = self.rows, 0
        while number < len(rows):
            if rows[-1].gone:  # nothing of it is moved
                rows.pop()
                continue
            if rows[number].gone:
                last = rows[number] = rows.pop()
                if self._slots is not None:
                    self._slots.move(len(rows), last.held, to=number)
                self.seen[number] = self.seen[len(rows)]
            number += 1

    def release(self) -> None:
        """Give the memory of the buffers back."""
        self._slots = None

    def for_prefixes(self, jobs: Collection[Job]) -> int:
        """Return what neither buffers nor prompts of requests under way may come to need."""
        used = sum(self._plan.prompt(len(job.prompt)) for job in jobs if job.waits)
        if self._slots is not None:
            used += self._slots.rows * self._plan.row(self._slots.capacity)
        return self._plan.for_prefixes(used)

    def _make_room(self, job: Job, jobs: Collection[Job]) -> bool:
        """See that a slot is free that is long enough for `job`."""
        slots, live, plan = self._slots, len(self.rows), self._plan
        if slots is not None and slots.capacity >= job.capacity and live < slots.rows:
            return True
        capacity = max([job.capacity, *(row.job.capacity for row in self.rows)])
        beside = sum(plan.prompt(len(one.prompt)) for one in jobs if one.waits)
        if any(one.request.ppl_authors for one in jobs):
            beside += plan.again(capacity)
        wanted = sum(one.request.n - one.next + one.live for one in jobs)
        rows = plan.rows(capacity, wanted=wanted, beside=beside)
        longer = slots is not None and slots.capacity < job.capacity
        if rows <= live or (slots is not None and live and rows <= slots.rows and not longer):
            return False
        self._prefixes.shrink(plan.left(beside + rows * plan.row(capacity)))
        if slots is None or not live:
            self._slots = None  # before the new ones: two sets would not fit the plan
            self._slots = self._model.slots(rows=rows, capacity=capacity)
        else:
            slots.resize(rows, capacity, [row.held for row in self.rows])
        self.seen = np.zeros((rows, capacity), dtype=np.int64)
        for number, row in enumerate(self.rows):
            _note(self.seen[number], row)
        return True

    def _prefill(self, job: Job, jobs: Collection[Job], head: Head) -> Prefix:
        """Run the prompt, from where another one of its set has come to."""
        ids, request_set = job.prompt, job.request.request_set
        old, start = self._prefixes.find(request_set, ids) or (None, 0)
        if old is not None and start == len(old.ids) == len(ids) and old.head.asks_as(head):
            return old
        self._prefixes.shrink(self.for_prefixes(jobs))
        slots = self._model.slots(rows=1, capacity=len(ids))
        start = min(start, (len(ids) - 1) // PIECE * PIECE)  # its last id runs in any case
        if old is not None:
            slots.copy(old.slots, start, to=0)
        before = self._model.runs
        found = self._model.prefill(ids, slots, start=start, head=head)
        job.runs += self._model.runs - before
        prefix = Prefix(tuple(ids), slots, head, found)
        size = self._plan.prefix(len(ids))
        self._prefixes.keep(request_set, prefix, size=size, room=self.for_prefixes(jobs))
        return prefix


def _note(seen: Ids, row: Row) -> None:
    """Write what the penalty of a row punishes; the rest repeats its first id."""
    ids = row.job.prompt + row.ids
    seen[:] = ids[0]
    seen[: len(ids)] = ids
